"""A server in a process of its own, to be killed or measured: `python -m tests.nbd_serve SOCKET DRIVER SOURCE`.

DRIVER is "qcow2" or "raw" with a path, "graph" with `json:{...}`, or "memory" with a size in bytes. It says "ready" when it
listens, serves until its input ends, and then tells the server's counters as JSON, with "peak", its peak resident memory in
bytes.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import lamina
from lamina.nbd import Export, Server


def main(socket: str, driver: str, source: str) -> None:
    if driver == "memory":
        image = lamina.open({"driver": "memory", "size": int(source)}, read_only=False)
    elif driver == "graph":
        image = lamina.open(source, read_only=False)
    else:
        image = lamina.open(source, format=driver, read_only=False)
    with image, Server([Export(image, writable=True)], unix=socket) as server:
        print("ready", flush=True)
        sys.stdin.read()
        server.close()
        stats = server.stats()
    # Not getrusage: that counts what the process that started this one had in memory, too.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({**stats, "peak": int(peak) * 1024}))


if __name__ == "__main__":
    main(*sys.argv[1:])
