"""Prints the label of the ext4 file system in a partition of an image: superblock.py IMAGE NUMBER"""

import struct
import sys

import lamina

disk = {"driver": "qcow2", "file": {"filename": sys.argv[1]}}
with lamina.open({"driver": "partition", "partition": int(sys.argv[2]), "image": disk}) as partition:
    superblock = partition.read(1024, 1024)
(magic,) = struct.unpack_from("<H", superblock, 0x38)
if magic != 0xEF53:
    sys.exit("this is no ext4 file system")
print(superblock[0x78:0x88].rstrip(b"\0").decode(errors="backslashreplace"))
