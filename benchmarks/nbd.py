"""NBD: our server compared with qemu-nbd and nbdkit, and our client compared with nbdcopy.

All servers of a work run at the same time and their clients take turns, so that noise of the machine affects all alike; the
table shows the best round. The images are in memory (tmpfs) if it has enough free space: random writes to a file system on a
disk measure that file system. `run.py` calls this module; nothing here imports Lamina.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import nbd_servers, peers
from .measure import Failed
from .nbd_clients import CLIENTS, IN_FLIGHT, NBDCOPY, Figures, copied, fio, memory, nbdcopies, nbdcopy, qemu_img
from .nbd_servers import NBDKIT, OURS, Program, Server, Share

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

QEMU = "qemu-nbd"
OUR_COPY = "lamina copy"


@dataclass(frozen=True)
class Promise:
    """A ratio to the best of the programs whose names begin with `peer`: at least `target` times their rate, or at most
    `target` times their seconds. `peer` None: at most `target` times the bound of its memory."""

    peer: str | None
    target: float


#: A client of one server, and the programs to measure by the names of their rows.
Client = Callable[[Server], Figures]
Runs = dict[str, Callable[[], Figures]]


@dataclass(frozen=True)
class Work:
    """`unit`: "k/s", "GiB/s" or "s". `ours`: the row to which the promises apply. `runs` returns the rows for the running
    servers; by default each server is a row, and `client` does the work."""

    title: str
    unit: str
    client: Client
    promises: Sequence[Promise]
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


@dataclass
class Row:
    """One line of the table; a second promise of a row is a line without figures."""

    work: str
    program: str
    unit: str
    value: float | None = None
    cpu: float | None = None
    peak: int | None = None
    peer: str = ""
    ratio: float | None = None
    target: float | None = None
    verdict: str = ""
    error: str = ""


# -- works


def plan(lamina: list[str], target: Path, small: bool) -> Iterator[Session]:
    """The works with their promises. Copies are written to `target`."""
    seconds = 1 if small else 3
    disk = 64 * MIB if small else 512 * MIB
    sparse = 256 * MIB if small else 4 * GIB

    def requests(title: str, kind: str, depth: int, *promises: Promise, size: int = 4 * KIB) -> Work:
        unit = "k/s" if size < 256 * KIB else "GiB/s"
        client = partial(fio, kind=kind, size=size, depth=depth, seconds=seconds)
        return Work(f"nbd: {title}, {depth} in flight", unit, client, promises)

    def four(servers: dict[str, Server], client: Client) -> Runs:
        """Four clients of each server; for ours also one client, with which they are compared."""
        runs: Runs = {name: partial(client, server) for name, server in servers.items()}
        if OURS in servers:
            runs["one client"] = partial(fio, servers[OURS], "randread", 4 * KIB, 16, seconds)
        return runs

    title = "nbd: 4 KiB random reads of four clients, 16 in flight each"
    four_clients = partial(fio, kind="randread", size=4 * KIB, depth=16, seconds=seconds, jobs=4)
    raw = [
        requests("4 KiB random reads", "randread", 1, Promise(QEMU, 1.1), Promise(NBDKIT, 0.9)),
        requests("4 KiB random reads", "randread", 16, Promise(QEMU, 1.5), Promise(NBDKIT, 0.9)),
        requests("4 KiB random reads", "randread", 64, Promise(QEMU, 2.5), Promise(NBDKIT, 1.1)),
        requests("4 KiB random writes", "randwrite", 16, Promise(QEMU, 1.4)),
        requests("4 KiB random writes", "randwrite", 64, Promise(QEMU, 2.5)),
        requests("256 KiB sequential reads", "read", 16, Promise(QEMU, 1.8), Promise(NBDKIT, 0.9), size=256 * KIB),
        Work(title, "k/s", four_clients, [Promise("one client", 1.0)], runs=four),
    ]
    yield Session(raw, "raw", partial(_random, size=disk), own=True)

    count, sharing = (1 << 14, 128) if small else (1 << 20, 128)
    work = requests(f"4 KiB random reads of a {count >> 14} GiB qcow2", "randread", 16, Promise(QEMU, 1.3))
    make = partial(_qcow2, count=count, sharing=sharing)
    yield Session([work], "qcow2", make, form="qcow2", leave_out=[NBDKIT])

    extents = 1 << 12 if small else 1 << 16
    asking = [
        Work(
            f"nbd: qemu-img {command} of {extents:,} extents",
            "s",
            partial(qemu_img, command=command, target=target),
            [Promise(QEMU, 1.0)],
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
    yield Session([Work(title, "GiB/s", encrypted, [Promise(QEMU, 0.8)])], "raw", partial(_random, size=disk), tls=True)

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
        Work(f"nbd: nbdcopy of {what}, to a file", "s", partial(nbdcopy, target=target), [Promise(QEMU, 1.0)]),
        Work(f"nbd: nbdcopy of {what}, to nowhere", "s", partial(nbdcopy, target=None), [Promise(QEMU, 1.0)]),
        Work(
            f"nbd: copying {what}, from qemu-nbd",
            "s",
            partial(nbdcopy, target=target),
            [Promise(NBDCOPY, 1.2)],
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
            [Promise(None, 1)],
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


@dataclass
class Results:
    rows: list[Row] = field(default_factory=list)
    #: Where the images were: folder and kind of file system.
    folder: str = ""
    #: Whether Ctrl-C ended the run early.
    interrupted: bool = False

    def json(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]


def measure(lamina: list[str], folder: Path, rounds: int, *, only: str = "", small: bool = False) -> Results:
    """Measure the works with `only` in their titles, with the images in `folder` or, if there is enough space, in memory."""
    results = Results()
    programs = nbd_servers.programs(lamina)
    with tempfile.TemporaryDirectory(dir=_images_folder(folder, small), prefix="lamina-bench-nbd-") as there:
        parent = Path(there)
        results.folder = _file_system(parent)
        try:
            for session in plan(lamina, parent / "copy.raw", small):
                works = [work for work in session.works if only in work.title]
                if works:
                    results.rows += _session(session, works, programs, parent, rounds)
        except KeyboardInterrupt:  # keep the results so far
            results.interrupted = True
    return results


def _session(session: Session, works: list[Work], programs: list[Program], parent: Path, rounds: int) -> Iterator[Row]:
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
            runs = work.runs(servers, work.client)
            found: dict[str, Figures | Failed] = {}
            if not work.clients:
                found |= {program.name: failed[program.name] for program in programs if program.name in failed}
            found |= _in_turn(runs, rounds, seconds=work.unit == "s")
            order = [program.name for program in programs]
            names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
            yield from _rows(work, {name: found[name] for name in names})


def _in_turn(runs: Runs, rounds: int, *, seconds: bool) -> dict[str, Figures | Failed]:
    """The best round of each, with the CPU time of that round and the largest peak of all rounds."""
    found: dict[str, Figures | Failed] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            before = found.get(name)
            if isinstance(before, Failed):
                continue
            try:
                now = run()
            except Failed as failure:
                found[name] = failure
                continue
            if before is None:
                found[name] = now
                continue
            better = now if (now.value < before.value) == seconds else before
            found[name] = Figures(better.value, better.cpu, max(before.peak, now.peak), now.bound)
    return found


def _rows(work: Work, found: dict[str, Figures | Failed]) -> Iterator[Row]:
    ok = {name: figures for name, figures in found.items() if isinstance(figures, Figures)}
    for name, figures in found.items():
        row = Row(work.title, name, work.unit)
        if isinstance(figures, Failed):
            row.error = str(figures)
        else:
            row.value, row.cpu, row.peak = figures.value, figures.cpu, figures.peak
        for promise in work.promises if name == work.ours else ():
            row.target, row.verdict = promise.target, "n/a"
            ours = ok.get(name)
            others = [one for one in ok if promise.peer and one.startswith(promise.peer)]
            if ours and promise.peer is None and ours.bound:
                row.peer, row.ratio = f"{ours.bound / MIB:.0f} MiB, peak", ours.peak / ours.bound
                row.verdict = "met" if row.ratio <= promise.target else "missed"
            elif ours and others:
                best = min if work.unit == "s" else max
                row.peer = best(others, key=lambda one: ok[one].value)
                row.ratio = ours.value / ok[row.peer].value
                met = row.ratio <= promise.target if work.unit == "s" else row.ratio >= promise.target
                row.verdict = "met" if met else "missed"
            yield row
            row = Row(work.title, "", work.unit)
        if row.program:
            yield row


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


def _file_system(parent: Path) -> str:
    told = subprocess.run(
        ["stat", "-f", "-c", "%T", parent], capture_output=True, text=True, check=False
    ).stdout.strip()
    return f"{parent.parent} ({told or 'file system unknown'})"


def table(results: Results) -> str:
    """The rows as an aligned Markdown table."""
    scale = {"k/s": 1e3, "GiB/s": float(GIB), "s": 1.0}

    def cpu(row: Row) -> str:
        if row.cpu is None:
            return "" if not row.program else "n/a"
        return f"{row.cpu:.2f} s" if row.unit == "s" else f"{row.cpu * 1e6:.1f} us"

    lines: list[tuple[str, ...]] = [
        ("work", "program", "rate or wall", "CPU", "peak MiB", "ratio", "of", "target", ""),
    ]
    for row in results.rows:
        digits = {"k/s": 1, "GiB/s": 2, "s": 3}[row.unit]
        missing = "n/a" if row.program else ""
        lines.append(
            (
                row.work,
                row.program,
                missing if row.value is None else f"{row.value / scale[row.unit]:.{digits}f} {row.unit}",
                cpu(row),
                missing if row.peak is None else f"{row.peak / MIB:.0f}",
                "" if row.ratio is None else f"{row.ratio:.2f}",
                row.peer,
                "" if row.target is None else f"{row.target:.2f}",
                row.verdict or ("failed" if row.error else ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = {2, 3, 4, 5, 7}
    lines.insert(1, tuple("-" * (w - 1) + ":" if n in numbers else "-" * w for n, w in enumerate(widths)))
    aligned = (
        (text.rjust(w) if n in numbers else text.ljust(w) for n, (text, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in aligned),
            "",
            f"Images in {results.folder}. CPU: of the named program, for each request where there is a rate.",
            *(["Interrupted: the rest was not measured."] if results.interrupted else []),
            *(f"n/a: {row.program} ({row.work}): {row.error}" for row in results.rows if row.error),
        ]
    )
