"""NBD: our server compared with qemu-nbd and nbdkit, and our client compared with nbdcopy.

All servers of a work run at the same time and their clients take turns, so that noise of the machine affects all alike. The
images are in memory (tmpfs) if it has enough free space: random writes to a file system on a disk measure that file system.
`run.py` calls this module; nothing here imports Lamina.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from . import machine, nbd_servers, peers, results
from .measure import Failed
from .nbd_clients import CLIENTS, IN_FLIGHT, NBDCOPY, Figures, copied, fio, memory, nbdcopies, nbdcopy, qemu_img
from .nbd_servers import NBDKIT, OURS, Program, Server, Share
from .results import Promise, Row, Spread

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

#: The most rounds of a work.
ROUNDS = 3

QEMU = "qemu-nbd"
OUR_COPY = "lamina copy"


@dataclass(frozen=True)
class Target:
    """A ratio to the best of the programs whose names begin with `peer`: at least `limit` times their rate, or at most
    `limit` times their seconds. `peer` None: at most `limit` times the bound of its memory."""

    peer: str | None
    limit: float


#: A client of one server, and the programs to measure by the names of their rows.
Client = Callable[[Server], Figures]
Runs = dict[str, Callable[[], Figures]]


@dataclass(frozen=True)
class Work:
    """`unit`: "k/s", "GiB/s" or "s". `ours`: the row to which the targets apply. `runs` returns the rows for the running
    servers; by default each server is a row, and `client` does the work."""

    title: str
    unit: str
    client: Client
    targets: Sequence[Target]
    ours: str = OURS
    runs: Callable[[dict[str, Server], Client], Runs] = lambda servers, client: {
        name: partial(client, server) for name, server in servers.items()
    }
    #: Rows of clients, not of servers.
    clients: Sequence[str] = ()


@dataclass(frozen=True)
class Session:
    """Works with the same servers. `make` makes the image at the path; `own`: each server has a writable copy of its own.
    `leave_out`: servers that cannot serve this image."""

    works: Sequence[Work]
    image: str
    make: Callable[[Path], None]
    form: str = "raw"
    own: bool = False
    tls: bool = False
    leave_out: Sequence[str] = ()


# -- works


def plan(lamina: list[str], target: Path, small: bool) -> Iterator[Session]:
    """The works with their targets. Copies are written to `target`."""
    seconds = 1 if small else 2
    disk = 64 * MIB if small else 512 * MIB
    sparse = 256 * MIB if small else 4 * GIB

    def requests(title: str, kind: str, depth: int, *targets: Target, size: int = 4 * KIB) -> Work:
        unit = "k/s" if size < 256 * KIB else "GiB/s"
        client = partial(fio, kind=kind, size=size, depth=depth, seconds=seconds)
        return Work(f"nbd: {title}, {depth} in flight", unit, client, targets)

    def four(servers: dict[str, Server], client: Client) -> Runs:
        """Four clients of each server; for ours also one client, with which they are compared."""
        runs: Runs = {name: partial(client, server) for name, server in servers.items()}
        if OURS in servers:
            runs["one client"] = partial(fio, servers[OURS], "randread", 4 * KIB, 16, seconds)
        return runs

    title = "nbd: 4 KiB random reads of four clients, 16 in flight each"
    four_clients = partial(fio, kind="randread", size=4 * KIB, depth=16, seconds=seconds, jobs=4)
    raw = [
        requests("4 KiB random reads", "randread", 1, Target(QEMU, 1.1), Target(NBDKIT, 0.9)),
        requests("4 KiB random reads", "randread", 16, Target(QEMU, 1.5), Target(NBDKIT, 0.9)),
        requests("4 KiB random reads", "randread", 64, Target(QEMU, 2.5), Target(NBDKIT, 1.1)),
        requests("4 KiB random writes", "randwrite", 16, Target(QEMU, 1.4)),
        requests("4 KiB random writes", "randwrite", 64, Target(QEMU, 2.5)),
        requests("256 KiB sequential reads", "read", 16, Target(QEMU, 1.8), Target(NBDKIT, 0.9), size=256 * KIB),
        Work(title, "k/s", four_clients, [Target("one client", 1.0)], runs=four),
    ]
    yield Session(raw, "raw", partial(_random, size=disk), own=True)

    count, sharing = (1 << 14, 128) if small else (1 << 20, 128)
    work = requests(f"4 KiB random reads of a {count >> 14} GiB qcow2", "randread", 16, Target(QEMU, 1.3))
    make = partial(_qcow2, count=count, sharing=sharing)
    yield Session([work], "qcow2", make, form="qcow2", leave_out=[NBDKIT])

    extents = 1 << 12 if small else 1 << 16
    asking = [
        Work(
            f"nbd: qemu-img {command} of {extents:,} extents",
            "s",
            partial(qemu_img, command=command, target=target),
            [Target(QEMU, 1.0)],
        )
        for command in ("map", "convert")
    ]
    make = partial(_qcow2, count=extents, sharing=512, every=2, bits=12)
    yield Session(asking, "qcow2", make, form="qcow2", leave_out=[NBDKIT])

    # fio accepts no URI with certificates. One connection, as fio has.
    options = ("--connections=1", "--requests=16", "--request-size=262144")

    def encrypted(server: Server) -> Figures:
        found = nbdcopy(server, None, options)
        return Figures(disk / found.value, found.cpu / (disk / (256 * KIB)), found.peak)

    title = "nbd: TLS, 256 KiB sequential reads (nbdcopy), 16 in flight"
    yield Session([Work(title, "GiB/s", encrypted, [Target(QEMU, 0.8)])], "raw", partial(_random, size=disk), tls=True)

    def copying(servers: dict[str, Server], client: Client) -> Runs:
        served = [server for name, server in servers.items() if name.startswith(QEMU)]
        if not served:
            return {OUR_COPY: _no_qemu}
        commands = {OUR_COPY: [*lamina, "copy"], **nbdcopies()}
        server = served[-1]
        return {
            name: partial(copied, [*command, server.uri, str(target)], server, target)
            for name, command in commands.items()
        }

    what = f"{sparse // MIB} MiB, 10 % data"
    programs = (OUR_COPY, *nbdcopies())
    copies = [
        Work(f"nbd: nbdcopy of {what}, to a file", "s", partial(nbdcopy, target=target), [Target(QEMU, 1.0)]),
        Work(f"nbd: nbdcopy of {what}, to nowhere", "s", partial(nbdcopy, target=None), [Target(QEMU, 1.0)]),
        Work(
            f"nbd: copying {what}, from qemu-nbd",
            "s",
            partial(nbdcopy, target=target),
            [Target(NBDCOPY, 1.2)],
            ours=OUR_COPY,
            runs=copying,
            clients=programs,
        ),
    ]
    yield Session(copies, "sparse", partial(_sparse, size=sparse))

    size = 4 * MIB if small else 32 * MIB
    title = f"nbd: memory, {size // MIB} MiB {{}}, {IN_FLIGHT} in flight of {CLIENTS} clients"
    held = [
        Work(
            title.format(f"{kind}s"),
            "GiB/s",
            partial(memory, kind=kind, size=size, seconds=seconds),
            [Target(None, 1)],
        )
        for kind in ("read", "write")
    ]
    yield Session(held, "raw", partial(_random, size=disk), own=True)


def _no_qemu() -> Figures:
    raise Failed("there is no qemu-nbd to copy from")


def _random(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))


def _sparse(path: Path, size: int) -> None:
    """A tenth of the image is data, in random pieces of 1 MiB."""
    indexes = random.Random(1).sample(range(size // MIB), size // MIB // 10)
    with path.open("wb") as file:
        file.truncate(size)
        for index in sorted(indexes):
            file.seek(index * MIB)
            file.write(os.urandom(MIB))


def _qcow2(path: Path, count: int, sharing: int, every: int = 1, bits: int = 16) -> None:
    """One cluster in `every` has stored data."""
    options = ["--count", str(count), "--sharing", str(sharing), "--every", str(every), "--cluster-bits", str(bits)]
    command = [sys.executable, "-m", "benchmarks.images", "alternating", *options, str(path)]
    subprocess.run(command, check=True, cwd=peers.ROOT)


# -- running them


def measure(
    lamina: list[str], folder: Path, rounds: int, *, only: str = "", small: bool = False
) -> Iterator[results.Work]:
    """Measure the works with `only` in their titles, with the images in `folder` or, if there is enough space, in memory."""
    programs = nbd_servers.programs(lamina)
    with tempfile.TemporaryDirectory(dir=_images_folder(folder, small), prefix="lamina-bench-nbd-") as there:
        parent = Path(there)
        for session in plan(lamina, parent / "copy.raw", small):
            works = [work for work in session.works if only in work.title]
            if works:
                yield from _session(session, works, programs, parent, rounds)


def _session(
    session: Session, works: list[Work], programs: list[Program], parent: Path, rounds: int
) -> Iterator[results.Work]:
    programs = [program for program in programs if program.name not in session.leave_out]
    failed: dict[str, Failed] = {}
    servers: dict[str, Server] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent)))
        certificates = None
        if session.tls:
            from tests.certificates import write_certificates

            certificates = write_certificates(folder / "certificates")
        image = folder / f"image.{session.image}"
        session.make(image)
        for program in programs:
            mine = image
            if session.own and not program.missing:
                mine = image.with_name(f"{len(servers)}.{session.image}")
                shutil.copyfile(image, mine)
            share = Share(mine, session.form, session.own, certificates)
            try:
                servers[program.name] = stack.enter_context(nbd_servers.serving(program, share, folder))
            except Failed as failure:
                failed[program.name] = failure
        for work in works:
            print(f"measuring {work.title} ...", file=sys.stderr, flush=True)
            began = time.monotonic()
            runs = work.runs(servers, work.client)
            found: dict[str, list[Figures] | Failed] = {}
            if not work.clients:
                found |= {program.name: failed[program.name] for program in programs if program.name in failed}
            found |= _in_turn(runs, rounds)
            order = [program.name for program in programs]
            names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
            rows = rows_of(work, {name: found[name] for name in names})
            for row in rows:
                row.error = row.error.replace(f"{parent}/", "")
            how = f"median of {rounds}, images in {machine.file_system(parent)}"
            yield results.Work("nbd", work.title, how, rows, seconds=time.monotonic() - began)


def _in_turn(runs: Runs, rounds: int) -> dict[str, list[Figures] | Failed]:
    """The figures of each in all rounds."""
    found: dict[str, list[Figures] | Failed] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            before = found.setdefault(name, [])
            if isinstance(before, Failed):
                continue
            try:
                before.append(run())
            except Failed as failure:
                found[name] = failure
    return found


def rows_of(work: Work, found: Mapping[str, list[Figures] | Failed]) -> list[Row]:
    """A row for each program, with the figures in the unit of the work; ours has a promise for each target."""
    scale = {"k/s": 1e3, "GiB/s": float(GIB), "s": 1.0}[work.unit]
    ok = {name: figures for name, figures in found.items() if not isinstance(figures, Failed)}
    rows = []
    for name, figures in found.items():
        row = Row(name, work.unit)
        if isinstance(figures, Failed):
            row.error = str(figures)
        else:
            row.figure = Spread.of([one.value / scale for one in figures])
            row.cpu = median(one.cpu for one in figures) * (1.0 if work.unit == "s" else 1e6)
            row.memory = max(one.peak for one in figures)
        if name == work.ours:
            row.promises = [_promise(work, target, ok.get(name), ok) for target in work.targets]
        rows.append(row)
    return rows


def _promise(work: Work, target: Target, ours: list[Figures] | None, ok: Mapping[str, list[Figures]]) -> Promise:
    if target.peer is None:
        found = Promise("memory", target=target.limit)
        if ours and (bound := ours[0].bound):
            found.of = f"{bound / MIB:.0f} MiB"
            found.found = Spread.of([one.peak / bound for one in ours])
        return found
    seconds = work.unit == "s"
    found = Promise("wall" if seconds else "rate", target=target.limit, at_least=not seconds)
    values = {name: [one.value for one in figures] for name, figures in ok.items()}
    others = [name for name in values if name.startswith(target.peer)]
    if ours and others:
        best = min if seconds else max
        found.of = best(others, key=lambda name: median(values[name]))
        mine, theirs = values[work.ours], values[found.of]
        single = [one / other for one, other in zip(mine, theirs, strict=False)]
        found.found = Spread(median(mine) / median(theirs), min(single), max(single))
    return found


# -- the folder of the images


def _images_folder(folder: Path, small: bool) -> Path:
    """tmpfs, if it has space for a copy of the image for each server, and for the sparse file and its copy."""
    memory = Path("/dev/shm")
    needed = GIB if small else 5 * GIB
    try:
        free = shutil.disk_usage(memory).free
        with open("/proc/meminfo") as file:
            available = next(int(line.split()[1]) * KIB for line in file if line.startswith("MemAvailable:"))
    except OSError:
        return folder
    return memory if os.access(memory, os.W_OK) and min(free, available // 2) >= needed else folder
