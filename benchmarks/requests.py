"""Small requests: the cost of a read of 4 KiB in the library compared with `qemu-img bench`, and the cost of a filter; and an
image with many snapshots.

All programs read the same offsets over the whole disk: every 17th block of 4 KiB, and of the qcow2 image, in which every
other cluster is a hole, also one block of each stored cluster. The library reads in one thread, so its rate is compared with
the peer's with one request in flight and with 64. `run.py` measures these works with the others.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from . import peers
from .measure import Failed, run_once
from .results import Promise, Row, Spread, Work

GIB = 1 << 30

COUNT = 100_000
STEP = 17 * 4096
STORED = 2 * 65536

#: Runs in a child process, like a program of a user: seconds for each request, without and with a filter, five times.
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
print(json.dumps(times))
"""

#: Opens the image and lists its snapshots, thirty times, as a program that has Lamina loaded.
SNAPSHOTS = """\
import json, sys, time
import lamina

def seconds():
    began = time.perf_counter()
    with lamina.open(sys.argv[1], format="qcow2") as image:
        count = len(image.snapshots())
    assert count == int(sys.argv[2]), count
    return time.perf_counter() - began

print(json.dumps([seconds() for _ in range(31)][1:]))
"""

#: (requests in flight of the peer, format) -> the promised ratio to its rate.
TARGETS = {(1, "raw"): 3.0, (1, "qcow2"): 2.5, (64, "raw"): 0.6, (64, "qcow2"): 0.6}
#: The most milliseconds in which an image with so many snapshots is opened and they are listed, and microseconds of a filter.
SNAPSHOTS_MS, FILTER_US = 10.0, 1.0

#: The steps of a read, in an image: a name, a format, the image, and the distance of two reads.
Reads = tuple[str, str, Callable[[], Path], int]


def library(path: Path, form: str, step: int) -> tuple[list[float], list[float]]:
    """The microseconds of a read, and what one filter that passes all requests on adds, in each of five rounds."""
    command = [sys.executable, "-c", LIBRARY, str(path), form, str(COUNT), str(step)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    times = [(bare * 1e6, through * 1e6) for bare, through in json.loads(told)]
    return [bare for bare, _ in times], [through - bare for bare, through in times]


def bench(peer: peers.Peer, path: Path, form: str, step: int, depth: int) -> list[float]:
    """The microseconds of one request of qemu-img bench, in each of three rounds."""
    options = ["-f", form, "-c", str(COUNT), "-d", str(depth), "-s", "4096", "-S", str(step)]
    times = []
    for _ in range(3):
        done = subprocess.run([peer.qemu_img, "bench", *options, path], check=True, capture_output=True, text=True)
        found = re.search(r"completed in ([0-9.]+) seconds", done.stdout)
        if not found:
            raise Failed(f"qemu-img bench told no time: {done.stdout!r}")
        times.append(float(found[1]) / COUNT * 1e6)
    return times


def measure(
    folder: Path, image: Callable[..., Path], others: list[peers.Peer], *, only: str = "", small: bool = False
) -> Iterator[Work]:
    """The works with `only` in their titles; `image` makes an image in `folder` once (see `run.image_maker`)."""
    size, content, count = (GIB // 4, GIB // 16, 10_000) if small else (4 * GIB, 3 * GIB // 2, 1 << 20)
    raw = partial(image, "ext4.raw", "ext4", "--size", str(size), "--content", str(content))
    qcow2 = partial(image, "alternating-512.qcow2", "alternating", "--count", str(count), "--sharing", "512")
    works: list[Reads] = [
        ("4 KiB requests, raw", "raw", raw, STEP),
        ("4 KiB requests, qcow2, stored clusters", "qcow2", qcow2, STORED),
        ("4 KiB requests, qcow2, every other cluster a hole", "qcow2", qcow2, STEP),
    ]
    for title, form, make, step in works:
        if only in title:
            yield _timed(title, partial(_reads, make(), form, step, others))
    number = 30 if small else 1000
    title = f"opening an image with {number:,} snapshots and listing them"
    if only in title and others:
        yield _timed(title, partial(_snapshots, folder, number, others))


def _timed(title: str, rows: Callable[[], list[Row]]) -> Work:
    print(f"measuring {title} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    try:
        found = rows()
    except (Failed, subprocess.CalledProcessError) as failure:
        found = [Row("lamina library", error=str(failure).splitlines()[0])]
    return Work("requests", title, "median of its rounds", found, seconds=time.monotonic() - began)


def _reads(path: Path, form: str, step: int, others: list[peers.Peer]) -> list[Row]:
    bare, added = library(path, form, step)
    ours = Row("lamina library", "us", Spread.of(bare))
    theirs: list[Row] = []
    for depth in (1, 64):
        rows = [
            Row(f"{peer.name} bench, {depth} in flight", "us", Spread.of(bench(peer, path, form, step, depth)))
            for peer in others
        ]
        theirs += rows
        ours.promises.append(_rate(ours, rows, TARGETS[depth, form]))
    one = Row("lamina library, one more filter", "us", Spread.of(added))
    one.promises.append(Promise("added", "", one.figure, FILTER_US, unit="us"))
    return [ours, one, *theirs]


def _rate(ours: Row, others: list[Row], target: float) -> Promise:
    """Our rate compared with the best of the others."""
    found = Promise("rate", target=target, at_least=True)
    best = min(others, key=lambda row: row.figure.value if row.figure else float("inf"), default=None)
    if best is not None and best.figure and ours.figure:
        found.of, found.found = best.program, Spread(best.figure.value / ours.figure.value)
    return found


def _snapshots(folder: Path, number: int, others: list[peers.Peer]) -> list[Row]:
    path = folder / f"snapshots-{number}.qcow2"
    if not path.exists():
        print(f"making {path.name} ...", file=sys.stderr, flush=True)
        program = others[0].qemu_img
        subprocess.run([program, "create", "-q", "-f", "qcow2", path, "1G"], check=True)
        for one in range(number):
            subprocess.run([program, "snapshot", "-c", f"snapshot {one}", path], check=True)
    command = [sys.executable, "-c", SNAPSHOTS, str(path), str(number)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ours = Row("lamina library", "ms", Spread.of([1e3 * one for one in json.loads(told)]))
    ours.promises.append(Promise("wall", "", ours.figure, SNAPSHOTS_MS, unit="ms"))
    rows = [ours]
    for peer in others:
        taken = [run_once([peer.qemu_img, "snapshot", "-l", str(path)], folder / "stdout").wall for _ in range(30)]
        rows.append(Row(f"{peer.name} snapshot -l, the whole command", "ms", Spread.of([1e3 * one for one in taken])))
    return rows
