"""A demonstration on real files in a temporary folder: every command is printed before its output.

The tour creates two images, one over the other, and writes two patterns. Then it queries the status of every byte: whether it
is stored or reads as zero, its layer, and its location; for the images alone, and through a filter that declares a request
alignment of 4096. It reads the patterns back through that filter, copies the image through it, and serves a disk over NBD.
If QEMU's programs are installed, they answer the same questions, and the tour says which of two answers is wrong, and why. A
wrong result of Lamina ends the tour with exit status 1. It prints at most 80 lines (a test holds that).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

FILTER = "driver=blkdebug,align=4k,image.driver=qcow2,image.file.filename={}"
MIB100 = 100 << 20
ALIGNMENT, BLOCK = 4096, 512

Rows = list[dict[str, Any]]


def data(start: int, length: int, depth: int, offset: int | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"start": start, "length": length, "depth": depth, "zero": False, "data": True}
    return row if offset is None else {**row, "offset": offset}


def zero(start: int, length: int, depth: int) -> dict[str, Any]:
    return {"start": start, "length": length, "depth": depth, "zero": True, "data": False}


#: The four extents of the two patterns in the lower image, as seen from one layer above it.
EXACT = [data(0, 512, 1, 27648), zero(512, 512, 1), data(1024, 512, 1, 28160), zero(1536, MIB100 - 1536, 1)]
ROUNDED = [data(0, 4096, 1), zero(4096, MIB100 - 4096, 1)]
#: The compared keys; the output also has "present" and "compressed".
KEYS = {"start", "length", "depth", "zero", "data", "offset"}


def too_fine(boundaries: list[int], block: int) -> list[int]:
    """The boundaries inside a disk that a program cannot use if its requests are multiples of `block`."""
    return sorted({at for at in boundaries if at % block})


class Tour:
    """Runs commands in one folder, and counts the wrong results."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.wrong = 0

    def say(self, text: str) -> None:
        print(f"\n# {text}", flush=True)

    def run(self, *command: str) -> str:
        """Print and run one `lamina` command; its output is printed and returned."""
        print(f"$ lamina {shlex.join(command)}", flush=True)
        return self._output([sys.executable, "-m", "lamina", *command])

    def peer(self, program: str, *arguments: str) -> str | None:
        """Print and run a program of the same purpose, if it is installed; None if it is not."""
        path = shutil.which(program)
        if path is None:
            return None
        print(f"$ {program} {shlex.join(arguments)}", flush=True)
        return self._output([path, *arguments], must=False)

    def map(self, right: Rows, *arguments: str) -> None:
        """Run `map`, and compare its rows with the right ones."""
        rows = json.loads(self.run("map", "--output=json", *arguments))
        self.expect(kept(rows) == right)

    def extents(self, context: str, uri: str) -> list[tuple[int, int]]:
        """Run `map` for a context of an export; its extents as (offset, length)."""
        rows = [line.split() for line in self.run("map", f"--context={context}", uri).splitlines()]
        return [(int(row[0]), int(row[1])) for row in rows]

    def expect(self, right: bool, because: str = "") -> None:
        """Print the verdict on a result of Lamina."""
        print(f"  -> {'right' if right else 'WRONG'}{because and f': {because}'}", flush=True)
        self.wrong += not right

    def verdict(self, program: str, reason: str) -> None:
        """Print the verdict on a result of another program: `reason` says what is wrong with it, if anything is."""
        print(f"  -> {program} is {f'WRONG: {reason}' if reason else 'right as well'}", flush=True)

    def write(self, name: str, content: bytes) -> None:
        with open(os.path.join(self.folder, name), "wb") as file:
            file.write(content)

    def read(self, name: str) -> bytes:
        with open(os.path.join(self.folder, name), "rb") as file:
            return file.read()

    def stop(self, pid_file: str) -> None:
        """End the server whose process id is in that file, and wait until it has removed the file."""
        path = os.path.join(self.folder, pid_file)
        os.kill(int(self.read(pid_file)), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(0.02)
        if os.path.exists(path):
            self.expect(False, "the server did not end")

    def _output(self, command: list[str], *, must: bool = True) -> str:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        print(done.stdout + done.stderr, end="", flush=True)
        if must and done.returncode:
            self.expect(False, f"exit status {done.returncode}")
        return done.stdout


def kept(rows: Rows) -> Rows:
    return [{key: value for key, value in row.items() if key in KEYS} for row in rows]


def status(here: Tour) -> None:
    here.say("Two images: clusters of 512 bytes below, of 1 MiB above. Two patterns are written to the lower one.")
    here.run("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "back.qcow2", "100M")
    here.run("io", "-c", "w -q -P1 0 512", "-c", "w -q -P1 1k 512", "-f", "qcow2", "back.qcow2")
    here.run("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "back.qcow2", "-o", "cluster_size=1M", "top.qcow2")

    here.say(
        "1. What is where? Four extents, exact to the byte: two are stored one layer below the top, at these offsets."
    )
    here.map(EXACT, "-f", "qcow2", "top.qcow2")

    through = FILTER.format("top.qcow2")
    here.say(
        f"2. The same disk through a filter that declares requests of {ALIGNMENT} bytes: rounded to that alignment."
    )
    here.map(ROUNDED, "--image-opts", through)
    if told := here.peer("qemu-img", "map", "--output=json", "--image-opts", through):
        rows = kept(json.loads(told))
        fine = too_fine([row["start"] for row in rows], ALIGNMENT)
        here.verdict("qemu-img", rounding_fault(rows, fine))

    here.say("3. With --exact nothing is rounded: a filter that leaves bytes alone does not change what is stored.")
    here.map(EXACT, "--exact", "--image-opts", through)


def rounding_fault(rows: Rows, fine: list[int]) -> str:
    """What is wrong with a status of the disk through the filter."""
    if not any(row["data"] for row in rows):
        return "it reports no data at all. The filter hid the lower image, and a sparse copy would lose both patterns."
    if fine:
        return (
            f"its extents begin at {', '.join(map(str, fine))}: no multiples of the {ALIGNMENT} bytes that"
            "\n     the node declares. A program that keeps to the alignment can neither read nor skip such a part; and if it"
            "\n     skips the aligned block because a part of it is zero, it loses data."
        )
    return "" if rows == ROUNDED else "its extents are others."


def copying(here: Tour) -> None:
    through = FILTER.format("top.qcow2")
    here.say("4. Read the patterns back through the filter, copy the disk through it, and compare every byte.")
    patterns = [
        "-c",
        "read -q -P1 0 512",
        "-c",
        "read -q -P0 512 512",
        "-c",
        "read -q -P1 1k 512",
        "-c",
        "read -q -P0 1536 1M",
    ]
    here.run("io", "-r", *patterns, "--image-opts", through)
    here.run("convert", "-O", "raw", "--image-opts", through, "copy.raw")
    here.run("compare", "-f", "raw", "-F", "qcow2", "copy.raw", "top.qcow2")
    status = os.stat(os.path.join(here.folder, "copy.raw"))
    told = f"copy.raw is {status.st_size} bytes long and takes {status.st_blocks * 512} bytes of the disk"
    here.expect(status.st_size == MIB100 and status.st_blocks * 512 < 1 << 20, told)
    here.run("check", "-q", "-f", "qcow2", "back.qcow2")


def over_nbd(here: Tour) -> None:
    """Serve a disk whose size is not a multiple of its block size: the server keeps its promises up to the last byte."""
    here.say(f"5. A disk of 1000 bytes behind a filter with blocks of {BLOCK}, served over NBD on a Unix socket.")
    here.write("odd.raw", bytes(range(1, 251)) * 4)
    options = f"driver=blkdebug,align={BLOCK},image.driver=file,image.filename=odd.raw"
    here.run("serve", "-t", "--fork", "--pid-file", "server.pid", "-k", "disk.sock", "--image-opts", options)
    uri = "nbd+unix:///?socket=disk.sock"
    try:
        here.say(
            "6. Every extent that a client gets is a multiple of the block; the context lamina:exact has the exact ones."
        )
        rounded = here.extents("base:allocation", uri)
        exact = here.extents("lamina:exact", uri)
        here.expect(
            rounded == [(0, 1024)] and exact == [(0, 1000), (1000, 24)],
            "the padding up to 1024 reads as zeros, and belongs to a block with data",
        )
        here.run("copy", "-q", uri, "fetched.raw")
        here.expect(here.read("fetched.raw") == here.read("odd.raw") + bytes(24), "the copy is equal")
    finally:
        here.stop("server.pid")
    qemu_nbd(here, options)


def qemu_nbd(here: Tour, options: str) -> None:
    """The same disk behind the server of QEMU, if it is installed."""
    program = shutil.which("qemu-nbd")
    if program is None:
        return
    here.say("7. The same disk behind qemu-nbd.")
    socket = os.path.join(here.folder, "qemu.sock")
    print(f"$ qemu-nbd -t -r -k qemu.sock --image-opts {options} &", flush=True)
    server = subprocess.Popen([program, "-t", "-r", "-k", socket, "--image-opts", options], cwd=here.folder)
    try:
        deadline = time.monotonic() + 10
        while not os.path.exists(socket) and time.monotonic() < deadline and server.poll() is None:
            time.sleep(0.02)
        extents = here.extents("base:allocation", "nbd+unix:///?socket=qemu.sock")
        fine = too_fine([offset + length for offset, length in extents], BLOCK)
        reason = (
            f"it has announced a block size of {BLOCK}, and its extent ends at {', '.join(map(str, fine))}. Clients may"
            "\n     refuse such a reply: the protocol wants multiples of the block."
        )
        here.verdict("qemu-nbd", reason if fine else "")
    finally:
        server.terminate()
        server.wait(10)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="lamina-tour-") as folder:
        here = Tour(folder)
        status(here)
        copying(here)
        over_nbd(here)
        told = "All results of Lamina are right." if not here.wrong else f"{here.wrong} results of Lamina are WRONG."
        without = "" if shutil.which("qemu-img") else " Install qemu-utils to see the answers of QEMU beside them."
        print(f"\n{told}{without}")
        return int(here.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
