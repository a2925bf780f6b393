"""`lamina io` beside qemu-io: the same command lines on twin images give the same text, exit status and bytes."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lamina.cli.main import main

MIB = 1 << 20

#: Command lines on a raw image of 1 MiB, disk.raw, whose whole text is compared.
SAME = [
    ["write 0 512", "read -P 0xcd 0 512"],
    ["w 0 512", "r 0 512", "l", "i", "a 0", "f", "d 0 4k", "t 2M", "l", "q", "l"],
    ["write 1000 24", "read -v 990 40"],
    ["write 3 0", "read 0 0", "read 1M 0", "write -z 5 0", "readv 0 0", "writev 0 0"],
    ["read -v 256k 2k", "read -v 0 256", "read -v 0 1", "read -v 16 16", "read -v 4095 17"],
    ["read -v -P 0 0 4", "read -vq 0 4", "read -qP 1 0 4", "readv -vP 1 0 2 2"],
    ["read -P 5 0 512", "length", "read -P 5 0 1"],
    ["write -P 65 100 100", "read -P 65 100 100", "read -P 65 99 100", "read -P 65 100 101"],
    ["write -P 010 0 4", "read -P 8 0 4", "write -P 0xFF 4 4", "write -P +3 8 4", "write -P 0 12 4", "read -v 0 16"],
    ["write -P 3 0 512", "read -P 3 -s 4 0 512", "read -P 3 -l 4 0 513", "read -P 3 -s 510 -l 4 0 600"],
    ["read -P 0 -s 4 -l 4 0 512", "read -p 0 512", "write -p 0 512"],
    ["read -P5 -P 0 0 4", "read 0 4 -q", "read 0 4 -P 7", "read 0 -P 3 4"],
    ["write -s pattern 0 8", "read -v 0 8", "write -s pattern 100 1", "write -s pattern 200 3", "read -v 196 10"],
    ["write -s disk.raw 4k 70000", "read -v 4k 32"],
    ["write -z 0 64k", "write -zu 64k 64k", "write -zn 128k 64k", "write -zf 1 3", "write -f 0 512"],
    ["write 0 1M", "write -z 100 1000", "write -zu 5000 100000", "discard 0 64k"],
    ["write -C 0 64k", "read -C 0 64k", "discard -C 0 64k", "write -Cq 0 512", "read -vC 0 16", "readv -C 0 4 5"],
    ["readv 0 512 512", "readv -v 0 4 5", "readv -P 3 0 512 512", "readv 0 512 0 1"],
    ["writev 0 512 512", "writev -P 5 0 4 5", "writev -f 0 1", "writev -q 0 4k 4k"],
    ["read 0 2M", "read 0 512", "read 1M 1", "read 7E 1", "read 1048575 2", "read 2M 0"],
    ["write 0 2M", "write 1048575 2", "write -z 1M 1", "writev 0 1M 1", "readv 0 1M 1", "discard 0 2M", "length"],
    ["discard 0 64k", "discard 1 2", "discard 1M 0", "discard 2M 0", "discard -q 0 512"],
    ["read 1.5k 0.5k", "read 0x10 0x10", "read 1B 1b", "read 010 1", "read +5 1", "read 5. 1", "read 1.0001k 1"],
    ["read 1K 1", "read 0.25M 1", "read 0X200 1", "read    0    4", " read 0 4 ", "", "   "],
    ["flush", "truncate 2M", "length", "write 1536k 512", "truncate 3M", "read -P 0 2M 1M", "truncate -m off 1k", "l"],
    ["map", "alloc 0", "alloc 64k", "alloc 64k 64k", "alloc 0 2M", "alloc 2M", "alloc 1 3", "alloc 0 0"],
    ["alloc 1048575", "alloc 5000 1", "alloc 1500000", "info"],
    ["close", "open -o driver=raw disk.raw", "length", "close", "open -o driver=raw,offset=512,size=1k disk.raw", "l"],
    ["close", "open -r -o driver=raw -o offset=1M disk.raw", "l", "map"],
    ["close", "open -o driver=raw,file.driver=file,file.filename=disk.raw", "w 0 1", "reopen -r", "r 0 1", "reopen -w"],
    ["reopen -r", "read 0 1", "reopen -w -c none", "write 0 512", "reopen", "read 7 9", "reopen -c writeback"],
    ["sleep 1", "sleep 0x1", "length", "quit", "length"],
    ["read -P 1 0 1", "quit", "length"],
    ["sigraise 0", "length"],
    ["aio_flush", "aio_write -q 0 512", "aio_flush", "aio_read -qP 0xcd 0 512", "aio_flush", "length"],
    ["aio_write 0 512", "aio_flush", "aio_read 0 512 512", "aio_flush", "aio_write -C 0 1k", "aio_flush"],
    ["aio_write -P 3 0 64k", "aio_flush", "aio_read -vP 3 0 20", "aio_flush", "aio_read -P 4 0 512", "aio_flush"],
    ["aio_write -z 0 512", "aio_flush", "aio_write -zu 0 64k", "aio_flush", "aio_write -f 5 5", "aio_flush"],
    ["aio_read 0 4M", "aio_flush", "aio_write 0 4M", "aio_flush", "aio_write -z 0 4M", "aio_flush"],
    ["aio_read -i 0 512", "aio_write -i 0 512", "aio_flush"],
    ["aio_write 0 512", "quit", "length"],
]

#: Command lines that are refused, in words of our own: only the exit status and the bytes are compared.
REFUSED = [
    ["bogus", "write 0 512"],
    ["read", "write -P 1 0 1"],
    ["read 0 1 2"],
    ["read -Z 0 1"],
    ["read -1 1", "read 0 -1"],
    ["read x 1", "read 0 x", "read 1e3 1", "read 1kB 1", "read 8E 1", "read 1.3 1", "read 9223372036854775808 1"],
    [
        "write -P 256 0 4",
        "write -P -1 0 4",
        "write -P abc 0 4",
        "write -P 08 0 4",
        "write -P 0x 0 4",
        "write -P 1.0 0 4",
    ],
    ['write -P "1" 0 512', "write -P '1' 0 512"],
    ["read\t0\t4"],
    ["write -P"],
    ["write -n 0 64k"],
    ["write -u 0 64k"],
    ["write -zP 1 0 64k"],
    ["write -z -s pattern 0 64k"],
    ["write -s absent 0 4"],
    ["write -s . 0 4"],
    ["write -s empty 0 4"],
    ["write -c 0 64k"],
    ["read -s 4 0 512"],
    ["read -l 4 0 512"],
    ["read -P 0 -s 4 -l 600 0 512"],
    ["read -P 0 -s 600 0 512"],
    ["read 0 2G"],
    ["write 0 2147483137"],
    ["readv 0 1G 1G"],
    ["aio_write 0 2G"],
    ["aio_write -z 0 512 512"],
    ["aio_write -u 0 512"],
    ["writev -z 0 1"],
    ["flush x"],
    ["truncate"],
    ["truncate x"],
    ["truncate -5"],
    ["truncate -m bogus 4M"],
    ["truncate -m metadata 4M"],
    ["alloc"],
    ["map x"],
    ["open disk.raw"],
    ["close", "close", "length"],
    ["close", "open"],
    ["close", "open absent"],
    ["close", "open -o driver=raw,bogus=1 disk.raw"],
    ["close", "open -t bogus -o driver=raw disk.raw"],
    ["reopen -rw"],
    ["reopen x"],
    ["reopen -o bogus=1", "write 0 512"],
    ["reopen -c bogus"],
    ["reopen -r", "write 0 512", "discard 0 512", "write -z 0 512", "aio_write 0 512", "truncate 0"],
    ["sleep", "sleep x", "sleep 1 2", "sleep -1"],
    ["sigraise x"],
    ["help bogus"],
]

#: Options of the program, on an image given by name.
PROGRAM = [
    (["-f", "raw", "-r", "disk.raw"], ["read 0 512", "write 0 512"]),
    (["-f", "raw", "-n", "disk.raw"], ["write 0 512", "write 3 100", "read -v 3 4"]),
    (["-f", "raw", "-t", "none", "disk.raw"], ["write -P 9 511 2", "read -P 9 511 2", "flush"]),
    (["-f", "raw", "-t", "writethrough", "disk.raw"], ["write 0 5", "write -z 1 2"]),
    (["-f", "raw", "-t", "directsync", "disk.raw"], ["write 0 5"]),
    (["-f", "raw", "-t", "unsafe", "-d", "ignore", "disk.raw"], ["write 0 64k", "discard 0 64k", "discard 0 2M"]),
    (["-f", "raw", "-d", "unmap", "-i", "threads", "disk.raw"], ["discard 0 64k", "read -P 0 0 64k"]),
    (["-f", "raw", "-m", "disk.raw"], ["write 0 512"]),
    (["-f", "raw", "-C", "disk.raw"], ["write -P 5 0 512", "read -P 5 0 512", "info", "reopen -r", "read 0 1"]),
    (["-f", "raw", "-C", "-r", "disk.raw"], ["read 0 512"]),
    (["-f", "raw", "-r", "-U", "disk.raw"], ["read 0 512"]),
    (["--image-opts", "driver=raw,file.filename=disk.raw"], ["write 0 512", "length"]),
    (["--image-opts", "driver=raw,file.filename=disk.raw,offset=4k"], ["write 0 512", "map"]),
    (["--format", "raw", "--read-only", "disk.raw"], ["length"]),
    ([], ["open -r -o driver=raw disk.raw", "length"]),
    ([], ["length"]),
    (["-f", "raw", "absent"], ["length"]),
    (["-f", "bogus", "disk.raw"], ["length"]),
    (["-f", "raw", "-d", "bogus", "disk.raw"], ["length"]),
    (["-f", "raw", "-t", "bogus", "disk.raw"], ["length"]),
    (["-f", "raw", "-i", "bogus", "disk.raw"], ["length"]),
    (["-f", "raw", "-U", "disk.raw"], ["length"]),
    (["-f", "raw", "--image-opts", "driver=raw,file.filename=disk.raw"], ["length"]),
]

#: On an overlay of qcow2 over a base with some data. `info` is compared without regard to the order of its lines.
CHAIN = [
    ["map", "alloc 0 1M", "read -P 1 0 64k", "read -P 2 1M 1M", "read -P 0 64k 64k"],
    ["write -P 3 128k 64k", "write -z 1M 64k", "discard 5M 64k", "write 9M 512", "map", "alloc 0 10M", "alloc 1000000"],
    ["write -P 4 65000 2000", "read -P 4 65000 2000", "read -v 64990 20", "read -P 1 0 65000", "map"],
    ["truncate 20M", "map", "length", "read -P 0 10M 10M", "write 15M 512", "map"],
    ["aio_write -q -P 5 0 64k", "aio_write -q -P 6 64k 64k", "aio_write -q -z 2M 1M", "aio_flush", "map"],
    ["write -z -u 0 3M", "map", "read -P 0 0 3M", "flush", "reopen -r", "read 0 1"],
    ["info"],
]


def settled(text: str) -> str:
    """`text` without the times and rates, which are never the same twice."""
    text = re.sub(r"(1 ops; ).*$", r"\1TIME", text, flags=re.MULTILINE)
    return re.sub(r"^(\d+,1,).*$", r"\1TIME", text, flags=re.MULTILINE)


def prepare(folder: Path) -> None:
    """The files that the command lines name."""
    folder.mkdir()
    rng = random.Random(5)
    with open(folder / "disk.raw", "wb") as file:
        file.truncate(MIB)
        file.seek(256 << 10)
        file.write(rng.randbytes(64 << 10))
    (folder / "pattern").write_bytes(b"aB1")
    (folder / "empty").touch()


class Twins:
    """Two folders with the same files, and the same command line run in each: by qemu-io and by `lamina io`."""

    def __init__(self, qemu: Any, folder: Path, monkeypatch: Any, capfd: Any) -> None:
        self.qemu, self.monkeypatch, self.capfd = qemu, monkeypatch, capfd
        self.theirs, self.ours = folder / "theirs", folder / "ours"
        for one in (self.theirs, self.ours):
            prepare(one)

    def run(self, options: list[str], commands: list[str]) -> tuple[tuple[int, str], tuple[int, str, str]]:
        """(their exit status and text), (our exit status, text, and what stands on standard error)."""
        words = [word for command in commands for word in ("-c", command)] + options
        self.monkeypatch.chdir(self.theirs)
        done = self.qemu.io(*words, check=False)
        self.monkeypatch.chdir(self.ours)
        self.capfd.readouterr()
        status = main(["io", *words])
        said = self.capfd.readouterr()
        return (done.returncode, settled(done.stdout)), (status, settled(said.out), said.err)

    def assert_same_files(self) -> None:
        for path in sorted(self.theirs.iterdir()):
            assert (self.ours / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.fixture
def twins(qemu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Twins:
    return Twins(qemu, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("commands", SAME, ids=lambda commands: ";".join(commands)[:60])
def test_the_same_text_status_and_bytes(twins: Twins, commands: list[str]) -> None:
    (status, text), (our_status, our_text, complaint) = twins.run(["-f", "raw", "disk.raw"], commands)
    assert our_text == text, complaint
    assert our_status == status
    twins.assert_same_files()


def test_all_of_them_in_one_session(twins: Twins) -> None:
    lines = [line for commands in SAME for line in commands if line not in ("q", "quit")]
    lines = [line for line in lines if not line.startswith(("open", "close", "reopen"))]
    (status, text), (our_status, our_text, complaint) = twins.run(["-f", "raw", "disk.raw"], lines)
    assert our_text == text, complaint
    assert our_status == status == 1
    twins.assert_same_files()


@pytest.mark.parametrize("commands", REFUSED, ids=lambda commands: ";".join(commands)[:60])
def test_what_is_refused_there_is_refused_here(twins: Twins, commands: list[str]) -> None:
    (status, _), (our_status, _, complaint) = twins.run(["-f", "raw", "disk.raw"], commands)
    assert our_status == status == 1
    assert complaint.startswith("lamina: ")
    twins.assert_same_files()


@pytest.mark.parametrize(("options", "commands"), PROGRAM, ids=lambda words: " ".join(words)[:60])
def test_options_of_the_program(twins: Twins, options: list[str], commands: list[str]) -> None:
    (status, text), (our_status, our_text, complaint) = twins.run(options, commands)
    assert our_text == text, complaint
    assert our_status == status
    twins.assert_same_files()


@pytest.mark.parametrize("commands", CHAIN, ids=lambda commands: ";".join(commands)[:60])
@pytest.mark.parametrize("filtered", [False, True], ids=["plain", "blkdebug"])
def test_on_a_chain_of_qcow2(twins: Twins, commands: list[str], filtered: bool) -> None:
    twins.monkeypatch.chdir(twins.theirs)
    twins.qemu.img("create", "-q", "-f", "qcow2", "base.qcow2", "10M")
    twins.qemu.io("-f", "qcow2", "-c", "write -P 1 0 64k", "-c", "write -P 2 1M 1M", "base.qcow2")
    twins.qemu.img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    for name in ("base.qcow2", "top.qcow2"):
        shutil.copy(twins.theirs / name, twins.ours / name)
    options = ["-f", "qcow2", "top.qcow2"]
    if filtered:
        options = ["--image-opts", "driver=blkdebug,image.driver=qcow2,image.file.filename=top.qcow2"]
    (status, text), (our_status, our_text, complaint) = twins.run(options, commands)
    if commands == ["info"]:
        text, our_text = "\n".join(sorted(text.splitlines())), "\n".join(sorted(our_text.splitlines()))
    assert our_text == text, complaint
    assert our_status == status
    same = twins.qemu.img("compare", "-f", "qcow2", "-F", "qcow2", twins.theirs / "top.qcow2", twins.ours / "top.qcow2")
    assert "identical" in same.stdout
    assert twins.qemu.check(twins.ours / "top.qcow2")[0] == 0


def test_many_requests_beside_one_another(twins: Twins) -> None:
    """Each tells of itself in lines that stay together, in whatever order they end."""
    lines = [f"aio_write -P {number} {number * 4096} 4096" for number in range(1, 60)] + ["aio_flush"]
    lines += [f"aio_read -P {number} {number * 4096} 4096" for number in range(1, 60)]
    (status, text), (our_status, our_text, complaint) = twins.run(["-f", "raw", "disk.raw"], lines)

    def reports(said: str) -> list[tuple[str, ...]]:
        rows = said.splitlines()
        return sorted(zip(rows[::2], rows[1::2], strict=True))

    assert reports(our_text) == reports(text), complaint
    assert our_status == status == 0
    twins.assert_same_files()


@pytest.mark.parametrize("qemu", ["qemu10"], indirect=True)  # 7.2 has no aio_discard
def test_discard_beside_the_commands(twins: Twins) -> None:
    lines = ["aio_discard 0 4M", "aio_flush", "aio_discard 0 64k", "aio_flush", "aio_discard -q 64k 64k", "aio_flush"]
    (status, text), (our_status, our_text, complaint) = twins.run(["-f", "raw", "disk.raw"], lines)
    assert our_text == text, complaint
    assert our_status == status == 0
    twins.assert_same_files()


def test_sizes_for_people(qemu: Any, tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(seed)
    image = tmp_path / "disk.raw"
    image.touch()
    sizes = [0, 1023, 1024, 1025, 1535, 1536, 1047552, 1048575, 1048576, (1 << 60) - 1, 1 << 60, 7 << 60]
    sizes += [rng.getrandbits(rng.randrange(1, 63)) for _ in range(200)]
    sizes += [min(rng.randrange(1, 2048) << rng.randrange(52), 7 << 60) for _ in range(200)]
    words = [word for size in sizes for word in ("-c", f"alloc {size}")] + ["-f", "raw", str(image)]
    expected = qemu.io(*words).stdout
    assert main(["io", *words]) == 0
    assert capfd.readouterr().out == expected


def test_random_lines(twins: Twins, seed: int) -> None:
    """Some hundred requests of every kind, whose ranges touch, cross, and pass the end."""
    rng = random.Random(seed)
    lines = []
    for _ in range(300):
        offset, length = rng.randrange(MIB + 600), rng.choice([1, 5, 511, 512, 4096, 70000, rng.randrange(300000)])
        pattern = rng.randrange(256)
        lines.append(
            rng.choice(
                [
                    f"write -P {pattern} {offset} {length}",
                    f"write -z {offset} {length}",
                    f"write -zu {offset} {length}",
                    f"writev -P {pattern} {offset} {length} {length // 3}",
                    f"read -v {offset} {min(length, 40)}",
                    f"read -P {pattern} {offset} {length}",
                    f"readv {offset} {length} 7",
                    f"discard {offset // 4096 * 4096} {length // 4096 * 4096}",
                    f"alloc {offset} {length}",
                    "length",
                    "flush",
                ]
            )
        )
    (status, text), (our_status, our_text, complaint) = twins.run(["-f", "raw", "disk.raw"], lines)
    assert our_text == text, complaint
    assert our_status == status
    twins.assert_same_files()
