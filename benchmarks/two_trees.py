"""Two versions of Lamina in turn: `python -m benchmarks.two_trees OLD NEW [--rounds 9]`, the `src` folders of both.

Each row is measured in turn: old, old again, and new, so that noise of the machine affects all alike. The table has medians,
the ratio of new to old, and that of old to itself, which is the spread that a ratio must exceed to mean something. Requests
run in long-lived processes; whole commands run in processes of their own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import images
from .measure import Failed, run_once

#: The source of a worker: it prints the names of its rows, and then, for each name that it reads, the microseconds of one
#: operation.
WORKER = r"""
import gc, os, sys, time
import lamina

folder = sys.argv[1]
buffer, cluster = bytearray(4096), b"y" * 65536
places = [(4096 * number, buffer) for number in range(500)]

def repeated(call, arguments, times):
    def go():
        began = time.perf_counter()
        for one in arguments * times:
            call(*one)
        return (time.perf_counter() - began) / (len(arguments) * times)
    return go

open(folder + "/a.raw", "wb").write(b"x" * (4 << 20))
raw = lamina.open(folder + "/a.raw", format="raw", read_only=False)
lamina.create(folder + "/a.qcow2", "qcow2", 16 * 1024 * 65536)
image = lamina.open(folder + "/a.qcow2", format="qcow2", read_only=False)
for number in range(64):
    image.write(number * 65536, cluster)
image.flush()
throttled = lamina.open({"driver": "throttle", "image": {"driver": "raw", "file": folder + "/a.raw"}}, force_share=True)
lamina.create(folder + "/many.qcow2", "qcow2", (1 << 18) * 512, cluster_size=512)
with lamina.open(folder + "/many.qcow2", format="qcow2", read_only=False) as many:
    for number in range(0, 1 << 18, 2):
        many.write(number * 512, b"z" * 512)
many = lamina.open(folder + "/many.qcow2", format="qcow2")

def windows():
    began = time.perf_counter()
    for _ in many.windows():
        pass
    return time.perf_counter() - began

def fresh(size, cluster_size):
    path = folder + "/fresh.qcow2"
    if os.path.exists(path):
        os.unlink(path)
    lamina.create(path, "qcow2", size, cluster_size=cluster_size)
    return lamina.open(path, format="qcow2", read_only=False)

def discard():
    with fresh(4096 * 4096, 4096) as new:
        new.write(0, b"q" * (4096 * 4096))
        began = time.perf_counter()
        new.discard(0, 4096 * 4096)
        return time.perf_counter() - began

def allocate():
    with fresh(4096 * 65536, 65536) as new:
        began = time.perf_counter()
        for number in range(64):
            new.write(number * 65536, cluster)
        return (time.perf_counter() - began) / 64

rows = {
    "raw, read of 4 KiB": repeated(raw.read_into, places, 2),
    "raw, write of 4 KiB": repeated(raw.write, places, 2),
    "raw, status of 64 KiB": repeated(raw.extents, [(0, 65536)], 40),
    "raw through throttle, read of 4 KiB": repeated(throttled.read_into, places, 2),
    "qcow2, read of 4 KiB": repeated(image.read_into, places, 2),
    "qcow2, write of 4 KiB in place": repeated(image.write, places, 2),
    "qcow2, write of a new cluster of 64 KiB": allocate,
    "qcow2, status of 64 KiB": repeated(image.extents, [(0, 65536)], 40),
    "qcow2, status of 64 KiB that nothing holds": repeated(image.extents, [(1 << 29, 65536)], 40),
    "qcow2, status of 1 GiB": repeated(image.extents, [(0, 1 << 30)], 20),
    "qcow2, flush of nothing": repeated(image.flush, [()], 500),
    "qcow2, windows over 262,144 extents": windows,
    "qcow2, discard of 4,096 clusters": discard,
}
gc.collect()
gc.freeze()
print("|".join(rows), flush=True)
for line in sys.stdin:
    print(rows[line.strip()]() * 1e6, flush=True)
"""


class Worker:
    """A process that has one version of Lamina loaded."""

    def __init__(self, source: str, folder: Path) -> None:
        folder.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder)],
            env={**os.environ, "PYTHONPATH": source},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.rows = self._line().split("|")

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Failed("a worker ended early")
        return line.strip()

    def measure(self, row: str) -> float:
        """The microseconds of one operation."""
        assert self._process.stdin is not None
        self._process.stdin.write(row + "\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def commands(folder: Path) -> dict[str, list[str]]:
    """Rows that are whole commands."""
    alternating = images.alternating(folder / "alternating.qcow2", sharing=512)
    data = folder / "data.raw"
    with data.open("wb") as file:
        for _ in range(8):
            file.write(os.urandom(64 << 20))
        file.truncate(4 << 30)
    made = folder / "made.qcow2"
    return {
        "lamina info": ["info", "-f", "qcow2", str(alternating)],
        "lamina map, 1,048,576 extents": ["map", "-f", "qcow2", "--output=json", str(alternating)],
        "lamina convert, 512 MiB of data to qcow2": ["convert", "-f", "raw", "-O", "qcow2", str(data), str(made)],
        "lamina create": ["create", "-q", "-f", "qcow2", str(made), "1G"],
    }


def shown(row: str, figures: tuple[list[float], list[float], list[float]], unit: float, digits: int) -> str:
    old, again, new = (statistics.median(one) * unit for one in figures)
    return (
        f"| {row} | {old:.{digits}f} | {new:.{digits}f} | {new / old:.2f} | {max(old, again) / min(old, again):.2f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dir", help="where the images lie (default: /dev/shm)", default="/dev/shm")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        print("| requests, us | old | new | new / old | old / itself |\n|---|---|---|---|---|", flush=True)
        workers = [
            Worker(source, folder / part) for source, part in zip((args.old, args.old, args.new), "abc", strict=True)
        ]
        for row in workers[0].rows:
            figures: tuple[list[float], list[float], list[float]] = ([], [], [])
            for number in range(args.rounds):
                for which in (0, 1, 2) if number % 2 else (2, 1, 0):
                    # The least of a few: an interrupt of the machine is no figure of a request.
                    figures[which].append(min(workers[which].measure(row) for _ in range(5)))
            print(shown(row, figures, 1, 2), flush=True)
        for worker in workers:
            worker.close()
        print("\n| commands, s | old | new | new / old | old / itself |\n|---|---|---|---|---|", flush=True)
        for row, words in commands(folder).items():
            figures = ([], [], [])
            for number in range(args.rounds + 1):
                for which in (0, 1, 2) if number % 2 else (2, 1, 0):
                    source = args.new if which == 2 else args.old
                    command = ["env", f"PYTHONPATH={source}", sys.executable, "-m", "lamina", *words]
                    taken = run_once(command, folder / "stdout").wall
                    (folder / "made.qcow2").unlink(missing_ok=True)
                    if number:  # the first round warms the cache
                        figures[which].append(taken)
            print(shown(row, figures, 1, 3), flush=True)


if __name__ == "__main__":
    began = time.monotonic()
    main()
    sys.stderr.write(f"{time.monotonic() - began:.0f} s\n")
