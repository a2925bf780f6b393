"""Counts the pieces of a disk by their sizes, with numpy over the columns of its extents: fragmentation.py IMAGE"""

import sys

import numpy as np

import lamina

with lamina.open(sys.argv[1], format="qcow2") as image:
    pieces = image.extents().where(data=True)
sizes = np.log2(pieces.length).astype(int)
for power, count in zip(*np.unique(sizes, return_counts=True), strict=True):
    print(f"{count} of {2**power} bytes or more")
jumps = np.count_nonzero(pieces.offset[1:] != pieces.offset[:-1] + pieces.length[:-1])
print(f"{jumps} of {len(pieces) - 1} pieces do not follow the one before")
