"""Prints how many bytes of the disk each layer of a chain owns: used_bytes.py IMAGE"""

import sys

import lamina

with lamina.open(sys.argv[1], format="qcow2") as image:
    extents = image.extents()
    for layer in image.layers:
        owned = extents.where(depth=layer.depth, present=True).totals()
        print(f"{layer.filename}: {owned.data} bytes of data, {owned.zero} of zeros")
