"""Copies a disk to a sparse raw file, with a line of progress: sparse_copy.py SOURCE TARGET"""

import sys

import lamina


def show(done: int, total: int) -> None:
    print(f"\r{100 * done // max(total, 1)} %", end="", file=sys.stderr)


result = lamina.convert(sys.argv[1], sys.argv[2], "raw", format="qcow2", progress=show)
print(f"read {result.read} of {result.size} bytes")
