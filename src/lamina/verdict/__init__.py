"""The verdict on an untrusted file: whether it can be handed on to programs that open images, and why not.

`lamina.inspect` is the public function, in `examine`; one module for each family of formats judges what is in the file.
Nothing but the file itself is opened, and only a few MiB of it are in memory at a time.
"""
