"""`lamina io`: reads, writes and inspects a disk by commands from -c, a terminal, or a pipe.

`command` is the program, `shell` reads commands, `commands` is the table of commands; `transfers`, `status` and `opening`
implement them. `session` has their common state: the open image and the requests in progress.
"""
