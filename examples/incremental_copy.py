"""Stores what a dirty bitmap has recorded in an overlay: incremental_copy.py DISK BITMAP LAST_BACKUP NEW_BACKUP"""

import sys

import lamina

disk, bitmap, last, new = sys.argv[1:]
with lamina.open(disk, format="qcow2", read_only=False) as image:
    lamina.convert(image, new, "qcow2", backing=last, backing_format="qcow2", changed=bitmap, durable=True)
    image.clear_bitmap(bitmap)  # only now: the copy is on stable storage
with lamina.open(new, format="qcow2") as backup:
    print(f"{backup.extents().where(depth=0, present=True).totals().length} bytes copied")
