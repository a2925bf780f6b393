"""`lamina io`: reads, writes and looks at a disk by commands, given with -c, typed, or piped in.

`command` is the program, `shell` the prompt, `commands` the table of what can be said; each of `transfers`, `status` and
`opening` holds the commands of one kind. `session` is what they share: the open image and the requests under way.
"""
