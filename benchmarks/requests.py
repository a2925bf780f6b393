"""Small requests: the cost of a read of 4 KiB in the library compared with `qemu-img bench`, and the cost of a filter.

`python -m benchmarks.requests FOLDER` needs the images of `run.py` in FOLDER (`make bench` passes its own). All programs read
the same offsets over the whole disk: every 17th block of 4 KiB, and of the qcow2 image, in which every other cluster is a
hole, also one block of each stored cluster. The library reads in one thread, so its rate is compared with the peer's with one
request in flight and with 64.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import peers

COUNT = 100_000
STEP = 17 * 4096
STORED = 2 * 65536

#: Runs in a child process, like a program of a user: the best of five, in seconds for each request.
LIBRARY = """\
import json, sys, time
import lamina
from lamina.image import Image
from lamina.node import FilterNode
from lamina.request import Child

class Pass(FilterNode):
    driver = "pass"

def seconds(image, count, step):
    buffer, size, at, read = memoryview(bytearray(4096)), image.size, 0, image.read_into
    began = time.perf_counter()
    for _ in range(count):
        read(at, buffer)
        at += step
        if at + 4096 > size:
            at = 0
    return (time.perf_counter() - began) / count

path, form, count, step = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
bare = lamina.open(path, format=form)
through = Image(Pass(Child(lamina.open(path, format=form).node, "image", grows=True)))
# In turn, so that noise of the machine affects both.
times = [(seconds(bare, count, step), seconds(through, count, step)) for _ in range(5)]
print(json.dumps([min(bare for bare, _ in times), min(passed for _, passed in times)]))
"""

#: (requests in flight of the peer, format) -> the promised ratio to its rate.
TARGETS = {(1, "raw"): 3.0, (1, "qcow2"): 2.5, (64, "raw"): 0.6, (64, "qcow2"): 0.6}


def library(path: Path, form: str, step: int) -> tuple[float, float]:
    """The seconds of a read, and of a read through one filter that passes all requests on."""
    command = [sys.executable, "-c", LIBRARY, str(path), form, str(COUNT), str(step)]
    bare, through = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return bare, through


def bench(peer: peers.Peer, path: Path, form: str, step: int, depth: int) -> float:
    """The seconds of one request of qemu-img bench, best of three."""
    options = ["-f", form, "-c", str(COUNT), "-d", str(depth), "-s", "4096", "-S", str(step)]
    times = []
    for _ in range(3):
        done = subprocess.run([peer.qemu_img, "bench", *options, path], check=True, capture_output=True, text=True)
        found = re.search(r"completed in ([0-9.]+) seconds", done.stdout)
        assert found, done.stdout
        times.append(float(found[1]) / COUNT)
    return min(times)


def measure(folder: Path, others: list[peers.Peer]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    raw, qcow2 = folder / "ext4.raw", folder / "alternating-512.qcow2"
    works = [("raw", "raw", raw, STEP), ("qcow2", "qcow2", qcow2, STORED), ("qcow2, half holes", "qcow2", qcow2, STEP)]
    for name_of, form, path, step in works:
        work = f"4 KiB read, {name_of}"
        bare, through = library(path, form, step)
        rows.append({"work": work, "program": "lamina library", "us": bare * 1e6})
        added = {
            "work": work,
            "program": "one filter adds",
            "us": (through - bare) * 1e6,
            "target": 1.0,
        }
        rows.append(added | {"verdict": "met" if added["us"] <= 1 else "missed"})
        for depth in (1, 64):
            times = {peer.name: bench(peer, path, form, step, depth) for peer in others}
            for name, time in times.items():
                rows.append({"work": work, "program": f"{name} bench, {depth} in flight", "us": time * 1e6})
            if times:
                ratio, target = min(times.values()) / bare, TARGETS[depth, form]
                rows[-1] |= {"ratio": ratio, "target": target, "verdict": "met" if ratio >= target else "missed"}
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| work | program | us a request | our rate, times the faster peer's | target | |",
        "|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        target = row.get("target", "")
        lines.append(
            f"| {row['work']} | {row['program']} | {row['us']:.2f} | {ratio} | {target} | {row.get('verdict', '')} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.requests", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the images of run.py are")
    options = parser.parse_args()
    print(table(measure(options.folder, [peer for peer in (peers.system(), peers.newest()) if peer])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
