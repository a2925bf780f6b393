"""The clients of the NBD benchmark: fio, nbdcopy and qemu-img, and the figures of each run.

`nbd.py` calls them. Nothing here imports Lamina.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import peers
from .measure import Failed, run_once
from .nbd_servers import Server

KIB, MIB = 1 << 10, 1 << 20

NBDCOPY = "nbdcopy"

#: The memory limits of our server (`lamina.nbd.server.connection`): requests and replies of each client, and the pool.
CLIENTS, IN_FLIGHT = 8, 32
MEMORY = CLIENTS * 2 * MIB + IN_FLIGHT * MIB

#: Seconds that a client may wait for replies beyond its time.
_PATIENCE = 20


@dataclass
class Figures:
    """`value`: requests or bytes a second, or seconds. `cpu`: seconds of CPU time, for each request if requests are counted.
    `peak`: peak memory in bytes. `bound`: its limit in bytes, if there is one."""

    value: float
    cpu: float
    peak: int
    bound: int | None = None


def fio(server: Server, kind: str, size: int, depth: int, seconds: int, jobs: int = 1) -> Figures:
    """`kind` of fio (randread, randwrite, read, write), with `depth` requests of `size` bytes in flight in each of `jobs`."""
    if not (program := shutil.which("fio")):
        raise Failed("not there: install fio")
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [program, "--name=nbd", "--ioengine=nbd", f"--uri={server.uri}", f"--rw={kind}", f"--bs={size}"]
        command += [f"--iodepth={depth}", f"--numjobs={jobs}", "--group_reporting", "--norandommap", "--randrepeat=0"]
        command += ["--thread", "--time_based", f"--runtime={seconds}"]  # threads: when it is killed all of it is gone
        command += ["--output-format=json", f"--output={out.name}"]
        server.forget_peak()
        before = server.cpu()
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE + seconds)
        except subprocess.TimeoutExpired as error:
            raise Failed(f"fio was still waiting for replies after {_PATIENCE + seconds} s") from error
        spent = server.cpu() - before
        server.check()
        told = Path(out.name).read_text()
    if done.returncode:
        lines = (done.stderr + told).strip().splitlines()
        raise Failed(lines[0] if lines else f"fio ended with status {done.returncode}")
    job = json.loads(told[told.index("{") :])["jobs"][0]
    counts = job["write" if kind.endswith("write") else "read"]
    if job["error"] or not counts["total_ios"]:
        raise Failed(f"fio did {counts['total_ios']} requests and met error {job['error']}")
    value = counts["iops"] if size < 256 * KIB else counts["bw_bytes"]
    return Figures(value, spent / counts["total_ios"], server.peak())


def memory(server: Server, kind: str, size: int, seconds: int) -> Figures:
    """Long requests from several clients."""
    found = fio(server, kind, size, IN_FLIGHT // CLIENTS, seconds, jobs=CLIENTS)
    found.bound = server.idle + MEMORY
    return found


def nbdcopy(server: Server, target: Path | None, options: Sequence[str] = ()) -> Figures:
    """The system's nbdcopy, from `server` to a file, or to nowhere. The time is the client's, the rest the server's."""
    found = nbdcopies()
    if not found:
        raise Failed("nbdcopy is not there: install libnbd-bin")
    server.forget_peak()
    before = server.cpu()
    command = [*next(iter(found.values())), *options, server.uri, str(target or "null:")]
    seconds = copied(command, server, target).value
    return Figures(seconds, server.cpu() - before, server.peak())


def qemu_img(server: Server, command: str, target: Path) -> Figures:
    """The system's qemu-img as a client: `command` is "map", or "convert" to a file. The time is the client's, the rest the
    server's."""
    peer = peers.system()
    if peer is None:
        raise Failed("qemu-img is not there: install qemu-utils")
    words = [peer.qemu_img, command, "-f", "raw"]
    words += ["--output=json", server.uri] if command == "map" else ["-O", "raw", server.uri, str(target)]
    server.forget_peak()
    before = server.cpu()
    try:
        with tempfile.TemporaryDirectory() as folder:
            # A server that does not answer is a row, and not the end of the table.
            found = run_once(["timeout", "-s", "KILL", "120", *words], Path(folder, "stdout"))
            server.check()
    finally:
        target.unlink(missing_ok=True)
    return Figures(found.wall, server.cpu() - before, server.peak())


def nbdcopies() -> dict[str, list[str]]:
    """By name and version, those that are here: the system's first."""
    found = {}
    newest = peers.newest()
    for folder in (None, os.path.dirname(newest.qemu_img) if newest else ""):
        if folder != "" and (path := shutil.which("nbdcopy", path=folder)):
            told = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
            version = ".".join(told.split()[1].split(".")[:2])
            found[f"{NBDCOPY} {version}"] = [path]
    return found


def copied(command: list[str], server: Server, target: Path | None) -> Figures:
    """Run a client that copies; a file that it made is compared and removed."""
    with tempfile.TemporaryDirectory(dir=target.parent if target else None) as folder:
        try:
            # A server that does not answer is a row, and not the end of the table.
            found = run_once(["timeout", "-s", "KILL", "120", *command], Path(folder, "stdout"))
            server.check()
            if target and subprocess.run(["cmp", "-s", target, server.share.image], check=False).returncode:
                raise Failed("the copy is not its source")
        finally:
            if target:
                target.unlink(missing_ok=True)
    return Figures(found.wall, found.cpu, found.memory)
