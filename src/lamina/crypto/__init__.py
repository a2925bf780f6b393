"""Encrypted disks: ciphers over whole sectors, the LUKS1 header with its key slots, and secrets. Needs `lamina[crypto]`."""
