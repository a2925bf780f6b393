"""Prints the files of a backing chain, from the top down: inspect_a_chain.py IMAGE"""

import sys

import lamina

with lamina.open(sys.argv[1], format="qcow2") as image:
    print(f"a disk of {image.size} bytes")
    for layer in image.layers:
        print(f"{layer.depth}: {layer.filename}, {layer.format}, {layer.virtual_size} bytes")
    stored = image.extents().where(data=True)
    print(f"{stored.totals().length} bytes are stored, in {len(stored)} pieces")
