"""The measured NBD servers: their start, and the figures of the kernel for them.

All listen on Unix sockets. CPU time and peak memory come from `/proc/PID`, so a server runs through all rounds of a work and
its peak is reset before it. Nothing here imports Lamina.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import peers
from .measure import ENVIRONMENT, Failed

#: The most seconds until a server listens, and until it has ended.
_PATIENCE = 10.0
_TICKS = os.sysconf("SC_CLK_TCK")

OURS = "lamina serve"
NBDKIT = "nbdkit file"


@dataclass(frozen=True)
class Share:
    """An image to serve, its format, and the folder of certificates for TLS."""

    image: Path
    form: str = "raw"
    writable: bool = False
    certificates: Path | None = None


@dataclass(frozen=True)
class Program:
    """A server: `start`, the first words of its command; if it is empty, `missing` says which package to install."""

    name: str
    start: Sequence[str]
    missing: str = ""

    def command(self, share: Share, at: Path) -> list[str]:
        if self.name == OURS:
            words = ["serve", "-t", "-w" if share.writable else "-r", "-k", str(at), "-f", share.form]
            words += ["--tls-certificates", str(share.certificates)] if share.certificates else []
            return [*self.start, *words, str(share.image)]
        if self.name == NBDKIT:
            words = ["-f", "-U", str(at)] + ([] if share.writable else ["-r"])
            words += ["--tls=require", f"--tls-certificates={share.certificates}"] if share.certificates else []
            return [*self.start, *words, "file", str(share.image)]
        words = ["-t", "-e", "16", "--cache=writeback", "-k", str(at), "-f", share.form]
        words += [] if share.writable else ["-r"]
        if share.certificates:
            creds = f"tls-creds-x509,id=tls,endpoint=server,verify-peer=no,dir={share.certificates}"
            words += ["--object", creds, "--tls-creds", "tls"]
        return [*self.start, *words, str(share.image)]


def programs(lamina: list[str]) -> list[Program]:
    """Our server, both versions of qemu-nbd, and nbdkit, installed or not."""
    found = [Program(OURS, lamina)]
    for peer, otherwise in (
        (peers.system(), "qemu-nbd on PATH: install qemu-utils"),
        (peers.newest(), "a newer qemu-nbd: set LAMINA_PEERS_BIN"),
    ):
        path = Path(peer.qemu_img).with_name("qemu-nbd") if peer else None
        if peer and path and path.exists():
            found.append(Program(peer.name.replace("qemu-img", "qemu-nbd"), [str(path)]))
        else:
            found.append(Program(f"qemu-nbd {len(found)}", [], f"not there: {otherwise}"))
    path_of = shutil.which("nbdkit")
    found.append(Program(NBDKIT, [path_of] if path_of else [], "" if path_of else "not there: install nbdkit"))
    return found


class Server:
    """A running server."""

    def __init__(self, program: Program, process: subprocess.Popen[bytes], at: Path, share: Share) -> None:
        self.program = program
        self.share = share
        self._process = process
        self._proc = Path("/proc", str(process.pid))
        #: Peak memory before the first client, in bytes.
        self.idle = self.peak()
        certificates = f"&tls-certificates={share.certificates}" if share.certificates else ""
        self.uri = f"nbd{'s' if certificates else ''}+unix:///?socket={at}{certificates}"

    def cpu(self) -> float:
        """Seconds of CPU so far, user and system, of all threads."""
        # The name of the command, in parentheses, may contain any character.
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def peak(self) -> int:
        """The peak memory in bytes since `forget_peak`."""
        status = (self._proc / "status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def forget_peak(self) -> None:
        (self._proc / "clear_refs").write_text("5")

    def check(self) -> None:
        """Raises Failed if it has ended."""
        if self._process.poll() is not None:
            raise Failed(f"{self.program.name} ended with status {self._process.returncode}")


@contextlib.contextmanager
def serving(program: Program, share: Share, folder: Path) -> Iterator[Server]:
    """Run `program`, with its socket in `folder`. Raises Failed if it is not installed, or does not listen in time."""
    if program.missing:
        raise Failed(program.missing)
    at = Path(tempfile.mkdtemp(dir=folder, prefix="socket-"), "s")
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            program.command(share, at),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=ENVIRONMENT,
        )
        try:
            deadline = time.monotonic() + _PATIENCE
            while not _listens(at):
                if process.poll() is not None or time.monotonic() > deadline:
                    errors.seek(0)
                    lines = errors.read().decode(errors="replace").strip().splitlines()
                    raise Failed(lines[-1] if lines else "it does not listen")
                time.sleep(0.02)
            yield Server(program, process, at, share)
        finally:
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            shutil.rmtree(at.parent, ignore_errors=True)


def _listens(at: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(at))
        except OSError:
            return False
    return True
