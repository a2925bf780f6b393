"""A demonstration on real files in a temporary folder: every command is printed before its output.

The tour creates two images, one over the other, and writes two patterns. Then it queries the status of every byte: whether it
is stored or reads as zero, its layer, and its location. It does so for the images alone and through a filter that declares a
request alignment of 4096; it reads the patterns back through that filter, and copies the image through it. If qemu-img is
installed, its output is shown as well. A wrong result ends the tour with exit status 1.
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

FILTER = "driver=blkdebug,image.driver=qcow2,image.file.driver=file,image.file.filename={},align=4k"
MIB100 = 100 << 20

Rows = list[dict[str, Any]]


def data(start: int, length: int, depth: int, offset: int | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"start": start, "length": length, "depth": depth, "zero": False, "data": True}
    return row if offset is None else {**row, "offset": offset}


def zero(start: int, length: int, depth: int) -> dict[str, Any]:
    return {"start": start, "length": length, "depth": depth, "zero": True, "data": False}


def exact(depth: int) -> Rows:
    """The four extents of the two patterns in the lower image, as seen from `depth` layers above it."""
    return [
        data(0, 512, depth, 27648),
        zero(512, 512, depth),
        data(1024, 512, depth, 28160),
        zero(1536, MIB100 - 1536, depth),
    ]


def rounded(depth: int) -> Rows:
    return [data(0, 4096, depth), zero(4096, MIB100 - 4096, depth)]


class Tour:
    """Runs commands in one folder, and counts the wrong results."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.qemu_img = shutil.which("qemu-img")
        self.wrong = 0

    def say(self, text: str) -> None:
        print(f"\n# {text}", flush=True)

    def run(self, *command: str) -> str:
        """Print and run one `lamina` command; its output is printed and returned."""
        print(f"$ lamina {shlex.join(command)}", flush=True)
        return self._output([sys.executable, "-m", "lamina", *command], must=True)

    def map(self, right: Rows, *arguments: str, compare: bool = True) -> None:
        """Run `map`, compare the rows with the correct ones, and show the output of qemu-img for the same arguments."""
        rows = json.loads(self.run("map", "--output=json", *arguments))
        self.expect([{key: value for key, value in row.items() if key in KEYS} for row in rows] == right)
        if self.qemu_img and compare:
            print(f"  for comparison: qemu-img {shlex.join(['map', '--output=json', *arguments])}", flush=True)
            self._output([self.qemu_img, "map", "--output=json", *arguments], indent="  | ")

    def expect(self, right: bool) -> None:
        print("  -> correct" if right else "  -> WRONG", flush=True)
        self.wrong += not right

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
        self.expect(not os.path.exists(path))

    def _output(self, command: list[str], *, must: bool = False, indent: str = "") -> str:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        print("".join(f"{indent}{line}\n" for line in (done.stdout + done.stderr).splitlines()), end="", flush=True)
        if must and done.returncode:
            self.expect(False)
        return done.stdout


#: The compared keys; the output also has "present" and "compressed".
KEYS = {"start", "length", "depth", "zero", "data", "offset"}


def tour(here: Tour) -> None:
    here.say("Two images: 512-byte clusters below, 1 MiB clusters above. Two patterns are written to the lower one.")
    here.run("create", "-f", "qcow2", "-o", "cluster_size=512", "back.qcow2", "100M")
    here.run("io", "-c", "w -P1 0 512", "-c", "w -P1 1k 512", "-f", "qcow2", "back.qcow2")
    here.run("create", "-f", "qcow2", "-F", "qcow2", "-b", "back.qcow2", "-o", "cluster_size=1M", "top.qcow2")
    here.run("info", "top.qcow2")

    through = FILTER.format("top.qcow2")
    here.say("1. The image alone: four exact extents, stored one layer below the top.")
    here.map(exact(1), "-f", "qcow2", "top.qcow2")
    here.say("2. Through a filter that declares requests of 4096 bytes: rounded to that alignment.")
    here.map(rounded(1), "--image-opts", through)
    here.say("3. The same with --exact: a filter that leaves bytes alone does not change the exact status.")
    here.map(exact(1), "--exact", "--image-opts", through, compare=False)
    here.say("4. The lower image alone, through the filter.")
    here.map(rounded(0), "--image-opts", FILTER.format("back.qcow2"))

    here.say("Read the patterns back through the filter (a different pattern would fail the command).")
    patterns = ["-c", "read -P1 0 512", "-c", "read -P0 512 512", "-c", "read -P1 1k 512", "-c", "read -P0 1536 2560"]
    here.run("io", "-r", *patterns, "--image-opts", through)

    here.say("Copy the image through the filter to raw, and compare every byte with the original.")
    here.run("convert", "-O", "raw", "--image-opts", through, "copy.raw")
    here.run("compare", "-f", "raw", "-F", "qcow2", "copy.raw", "top.qcow2")
    status = os.stat(os.path.join(here.folder, "copy.raw"))
    print(f"  copy.raw: {status.st_size} bytes long, {status.st_blocks * 512} bytes on disk", flush=True)
    here.expect(status.st_size == MIB100)
    if here.qemu_img:
        print("  for comparison: qemu-img compare -f raw -F qcow2 copy.raw top.qcow2", flush=True)
        said = here._output(
            [here.qemu_img, "compare", "-f", "raw", "-F", "qcow2", "copy.raw", "top.qcow2"], indent="  | "
        )
        here.expect(said.strip() == "Images are identical.")

    here.say("Check both images.")
    for image in ("back.qcow2", "top.qcow2"):
        here.run("check", "-f", "qcow2", image)


def over_nbd(here: Tour) -> None:
    """Serve a disk whose size is not a multiple of its block size: the server keeps its promises up to the last byte."""
    here.say("A disk of 1000 bytes behind a filter with blocks of 512, served over NBD on a Unix socket.")
    here.write("odd.raw", bytes(range(1, 251)) * 4)
    options = "driver=blkdebug,align=512,image.driver=file,image.filename=odd.raw"
    here.run("serve", "--persistent", "--fork", "--pid-file", "server.pid", "-k", "disk.sock", "--image-opts", options)
    uri = "nbd+unix:///?socket=disk.sock"
    try:
        here.run("info", uri)
        here.say(
            "5. The size of the export is a multiple of the block, and so is every extent; lamina:exact has the exact ones.",
        )
        rows = json.loads(here.run("map", "--output=json", "--context=base:allocation", uri))
        here.expect([(row["offset"], row["length"], row["type"]) for row in rows] == [(0, 1024, 0)])
        rows = json.loads(here.run("map", "--output=json", "--context=lamina:exact", uri))
        here.expect([(row["offset"], row["length"]) for row in rows] == [(0, 1000), (1000, 24)])
        if nbdinfo := shutil.which("nbdinfo"):
            print(f"  for comparison: nbdinfo --map {uri}", flush=True)
            here._output([nbdinfo, "--map", uri], indent="  | ")
        here.say("Copy it from the server and compare.")
        here.run("copy", uri, "fetched.raw")
        here.expect(here.read("fetched.raw") == here.read("odd.raw") + bytes(24))
    finally:
        here.stop("server.pid")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="lamina-tour-") as folder:
        here = Tour(folder)
        tour(here)
        over_nbd(here)
        without = "" if here.qemu_img else " (qemu-img is not installed: there is no comparison with it)"
        print(f"\n{'All results are correct' if not here.wrong else f'{here.wrong} results are wrong'}{without}.")
        return int(here.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
