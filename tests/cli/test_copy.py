"""`lamina copy`: every kind of end, holes, blocks, errors that leave no half file, and connections that are cut."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main
from lamina.jobs import copy as job
from tests.nbd_peers import Served, Wire, nbdkit, qemu_nbd

MIB = 1 << 20
SIZE = 8 * MIB + 512


@pytest.fixture
def content(seed: int) -> bytes:
    """Bytes with zeros of all sizes between them, and no whole number of blocks."""
    dice = random.Random(seed)
    disk = bytearray(SIZE)
    for _ in range(40):
        at = dice.randrange(SIZE)
        piece = dice.randbytes(dice.choice([1, 511, 4096, 70_000, 300_000]))[: SIZE - at]
        disk[at : at + len(piece)] = piece
    disk[-1] = 1
    return bytes(disk)


@pytest.fixture
def dense(seed: int) -> bytes:
    """Bytes without zeros: as many go over the wire as there are."""
    return bytes(byte or 1 for byte in random.Random(seed).randbytes(1 << 16)) * (SIZE >> 16) + b"e" * (
        SIZE % (1 << 16)
    )


@pytest.fixture
def source(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> str:
    """source.raw, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("source.raw").write_bytes(content)
    return "source.raw"


@pytest.fixture
def served(source: str) -> Iterator[Served]:
    with Served("disk.sock", SIZE) as there:
        yield there


def summary(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["copy", "--output", "json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["copy", *arguments]) == 1
    told = capsys.readouterr().err
    if told.startswith("{"):
        error = json.loads(told)["error"]
        return f"lamina: {error['message']}; {error.get('hint', '')}"
    assert told.count("\n") == 1
    return told


OPTIONS = [
    [],
    ["-C", "3", "-R", "2", "--request-size", "4k"],
    ["-R", "1", "-S", "0"],
    ["--no-extents", "-S", "64k", "--request-size", "1M"],
    ["--allocated", "--flush"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_file_to_export_and_back(served: Served, content: bytes, options: list[str]) -> None:
    served.image.write(0, b"old" * (SIZE // 3))  # zeros must be written over it
    assert main(["copy", *options, "source.raw", served.uri]) == 0
    assert served.image.read(0, SIZE) == content
    assert main(["copy", *options, served.uri, "back.raw"]) == 0
    assert Path("back.raw").read_bytes() == content
    assert sorted(os.listdir()) == ["back.raw", "disk.sock", "source.raw"]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_export_to_export(served: Served, content: bytes, options: list[str]) -> None:
    served.image.write(0, content)
    with Served("other.sock", SIZE + 5) as other:
        other.image.write(0, b"\xff" * (SIZE + 5))
        assert main(["copy", *options, served.uri, other.uri]) == 0
        assert other.image.read(0, SIZE + 5) == content + b"\xff" * 5


@pytest.mark.parametrize("size", [SIZE, SIZE + 3584, SIZE + 7 * 4096])
def test_a_target_of_large_blocks(source: str, content: bytes, size: int) -> None:
    """The source ends inside a block of 4096 bytes: the rest of that block stays, unless it is only padding."""
    with Served("blocks.sock", size, b"\xff" * size, align=4096) as there:
        assert main(["copy", "source.raw", there.uri]) == 0
        assert there.image.read(0, SIZE) == content
        assert there.image.read(SIZE, size - SIZE) == b"\xff" * (size - SIZE)


def test_holes_are_neither_read_nor_written(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("sparse.raw").open("wb") as file:
        file.truncate(SIZE)
        file.seek(4 * MIB)
        file.write(b"x" * MIB + bytes(MIB))
    there = summary(capsys, "--destination-is-zero", "sparse.raw", served.uri)
    assert (there["size"], there["read"], there["written"], there["zeroed"]) == (SIZE, 2 * MIB, MIB, 0)
    back = summary(capsys, served.uri, "back.raw")
    assert (back["read"], back["written"], back["skipped"]) == (MIB, MIB, SIZE - MIB)
    assert os.stat("back.raw").st_blocks * 512 < MIB + 65536
    assert Path("back.raw").read_bytes() == Path("sparse.raw").read_bytes()
    full = summary(capsys, "--no-extents", "-S", "0", served.uri, "full.raw")
    assert (full["read"], full["written"]) == (SIZE, SIZE)
    assert os.stat("full.raw").st_blocks * 512 >= SIZE
    over = summary(capsys, "sparse.raw", served.uri)
    assert (over["written"], over["zeroed"], over["skipped"]) == (MIB, 0, SIZE - MIB)


def test_pipes(served: Served, content: bytes) -> None:
    def run(*arguments: str, given: bytes = b"") -> bytes:
        command = [sys.executable, "-m", "lamina", "copy", *arguments]
        return subprocess.run(command, input=given, capture_output=True, check=True, timeout=60).stdout

    assert run("-", served.uri, given=content) == b""
    assert served.image.read(0, SIZE) == content
    assert run("-p", served.uri, "-") == content
    run("-", "piped.raw", given=content)
    assert Path("piped.raw").read_bytes() == content
    zeros = bytes(3 * MIB)
    run("-", "zeros.raw", given=zeros)
    assert Path("zeros.raw").read_bytes() == zeros
    assert os.stat("zeros.raw").st_blocks == 0
    assert run("-", "-", given=content) == content
    assert run("-", "-") == b""


def test_a_pipe_too_long_for_its_target(served: Served, content: bytes) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lamina", "copy", "-", served.uri],
        input=content + b"more",
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert b"the first 8388608 bytes (8 MiB) are copied" in done.stderr


def test_files_to_files(source: str, content: bytes) -> None:
    Path("there.raw").write_bytes(b"older and longer" * MIB)
    os.chmod("there.raw", 0o640)
    assert main(["copy", "source.raw", "there.raw"]) == 0
    assert Path("there.raw").read_bytes() == content
    assert os.stat("there.raw").st_mode & 0o777 == 0o640
    Path("empty.raw").touch()
    assert main(["copy", "empty.raw", "there.raw"]) == 0
    assert os.path.getsize("there.raw") == 0
    assert main(["copy", "source.raw", "null-co://"]) == 0
    assert main(["copy", "file:source.raw", "host_device:named.raw"]) == 0
    assert Path("named.raw").read_bytes() == content


def test_a_target_that_is_too_small(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Served("small.sock", SIZE - 1) as there:
        assert "large enough" in complaint(capsys, "source.raw", there.uri)
        assert there.image.read(0, 4096) == bytes(4096)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.raw", "x.raw"], "missing.raw"),
        (["source.raw", "nodir/x.raw"], "nodir"),
        (["source.raw", "."], "directory"),
        (["-R", "0", "source.raw", "x.raw"], "1 to 1024"),
        (["--request-size", "5000", "source.raw", "x.raw"], "power of two"),
        (["-C", "99", "source.raw", "nbd+unix:///?socket=none"], "1 to 16"),
        (["source.raw", "nbd+unix:///?socket=none"], "none"),
        (["source.raw", "blkdebug::x.raw"], "cannot be the target"),
        (["--resume-file", "j", "-", "x.raw"], "--resume-file"),
        (["--output=json", "source.raw", "-"], "standard output"),
        (["--flush", "source.raw", "-"], "standard output"),
    ],
)
def test_refusals(source: str, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in complaint(capsys, *arguments)
    assert os.listdir() == ["source.raw"]


# Errors


@pytest.mark.parametrize("options", [[], ["-R", "1"], ["-S", "0", "--no-extents"]], ids=" ".join)
def test_a_read_error_of_an_export_fails_the_copy(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """CVE-2022-0485: a copy that ignored errors of reads which it had not waited for wrote garbage, and said all was well."""
    filters = ["--filter=error", "--filter=delay"]
    with nbdkit(tmp_path, *filters, "pattern", "32M", "error-pread-rate=20%", "delay-read=1ms") as address:
        assert "read" in complaint(capsys, *options, address, "there.raw")
    assert os.listdir() == ["source.raw"]


def test_a_read_error_of_a_file_fails_the_copy(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("kept.raw").write_bytes(b"what was there")
    failing = {"driver": "faults", "rules": [{"kind": "read", "nth": 9}], "image": {}}
    failing["image"] = {"driver": "file", "filename": "source.raw"}
    assert "read" in complaint(capsys, "--no-extents", f"json:{json.dumps(failing)}", "kept.raw")
    assert Path("kept.raw").read_bytes() == b"what was there"
    assert sorted(os.listdir()) == ["kept.raw", "source.raw"]


def test_a_write_error_tells_how_far_it_came(
    source: str, dense: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The target cannot be replaced: what is before the place that the error names is there, as it was read back."""
    Path(source).write_bytes(dense)
    with nbdkit(tmp_path, "--filter=protect", "memory", "16M", "protect=5242880-5242881") as address:
        told = complaint(capsys, "-S", "0", "--no-extents", "source.raw", address)
        position = int(told.partition("the first ")[2].split()[0])
        assert position == 5 * MIB
        assert main(["copy", address, "back.raw"]) == 0
    assert Path("back.raw").read_bytes()[:position] == dense[:position]


# Connections that are cut


@pytest.mark.parametrize("budget", [400, 1 << 20, 3_333_333])
def test_a_source_whose_connection_is_cut_comes_back(served: Served, dense: bytes, tmp_path: Path, budget: int) -> None:
    served.image.write(0, dense)
    with Wire(tmp_path / "wire", tmp_path / "disk.sock", budget=budget) as wire:
        assert main(["copy", "--no-extents", wire.uri, "back.raw"]) == 0
        assert wire.cuts == 1
    assert Path("back.raw").read_bytes() == dense


@pytest.mark.parametrize("budget", [300, 1 << 20, 2_222_222])
def test_a_target_whose_connection_is_cut_comes_back(
    served: Served, content: bytes, tmp_path: Path, budget: int
) -> None:
    with Wire(tmp_path / "wire", tmp_path / "disk.sock", budget=budget, upward=True) as wire:
        assert main(["copy", "-S", "0", "--no-extents", "source.raw", wire.uri]) == 0
        assert wire.cuts == 1
    assert served.image.read(0, SIZE) == content


def test_what_a_restarted_server_forgot_is_written_again(
    source: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers writes, is gone before anybody flushed, and another with an empty disk takes its place."""
    first = Served("first.sock", SIZE)
    with first, Wire(tmp_path / "wire", tmp_path / "first.sock", budget=4 * MIB, upward=True) as wire:
        second = Served("second.sock", SIZE)
        with second:
            cut = wire.cut

            def cut_and_restart() -> None:
                wire._to = str(tmp_path / "second.sock")
                cut()

            monkeypatch.setattr(wire, "cut", cut_and_restart)
            assert main(["copy", "-S", "0", "--no-extents", "source.raw", wire.uri]) == 0
            assert second.image.read(0, SIZE) == content


def test_without_reconnect_a_cut_is_an_error(
    served: Served, dense: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served.image.write(0, dense)
    with Wire(tmp_path / "wire", tmp_path / "disk.sock", budget=1 << 20) as wire:
        assert "connection" in complaint(capsys, "--reconnect", "0", "--no-extents", wire.uri, "back.raw")
    assert not Path("back.raw").exists()
    assert not [name for name in os.listdir() if name.startswith(".lamina")]


# Journals


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every part."""
    monkeypatch.setattr(job, "_BETWEEN", 0.0)


def test_a_copy_to_a_file_is_taken_up_again(
    often: None, served: Served, dense: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served.image.write(0, dense)
    arguments = ["--reconnect", "0", "--resume-file", "journal", "--no-extents"]
    with Wire(tmp_path / "wire", tmp_path / "disk.sock", budget=5 * MIB) as wire:
        told = complaint(capsys, *arguments, wire.uri, "back.raw")
        position = json.loads(Path("journal").read_text())["position"]
        assert f"resumes at {position}" in told
        assert 0 < position < SIZE
        partial = Path("back.raw.partial").read_bytes()
        assert partial[:position] == dense[:position]
        assert not Path("back.raw").exists()
        done = summary(capsys, *arguments, wire.uri, "back.raw")
    assert (done["resumed"], done["read"], done["flushed"]) == (position, SIZE - position, True)
    assert Path("back.raw").read_bytes() == dense
    assert not Path("journal").exists()
    assert not Path("back.raw.partial").exists()


def test_a_copy_to_an_export_is_taken_up_again(
    often: None, served: Served, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--reconnect", "0", "--resume-file", "journal", "--no-extents", "-S", "0", "source.raw"]
    with Wire(tmp_path / "wire", tmp_path / "disk.sock", budget=5 * MIB, upward=True) as wire:
        told = complaint(capsys, *arguments, wire.uri)
        position = json.loads(Path("journal").read_text())["position"]
        assert 0 < position <= 5 * MIB
        assert served.image.read(0, position) == content[:position]
        assert "are copied" in told
        done = summary(capsys, *arguments, wire.uri)
    assert (done["resumed"], done["written"]) == (position, SIZE - position)
    assert served.image.read(0, SIZE) == content


def test_a_journal_holds_only_what_was_flushed(
    often: None, source: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third flush fails, and so do both that follow: what the second covered is in the journal, and no more."""
    resume = ["--resume-file", "journal", "--no-extents", "-S", "0", "--request-size", "1M", "-R", "1", "source.raw"]
    with Served("broken.sock", SIZE, rules=[{"kind": "flush", "after": 2, "times": 3}]) as there:
        told = complaint(capsys, *resume, there.uri)
        position = json.loads(Path("journal").read_text())["position"]
        assert "flush" in told
        assert f"resumes at {position}" in told
        assert 0 < position < SIZE
        assert main(["copy", *resume, there.uri]) == 0
        assert there.image.read(0, SIZE) == content
    assert not Path("journal").exists()


def test_a_copy_that_was_killed_is_taken_up_again(source: str, tmp_path: Path) -> None:
    """Nothing can be recorded any more when a process is killed: the journal says what it said before."""
    arguments = ["--resume-file", "journal", "--no-extents", "-R", "2"]
    # A server for each: nbdkit 1.32 sometimes ends by an assertion of its own when a client dies.
    slow = ("--filter=delay", "pattern", "16M", "delay-read=50ms")
    with nbdkit(tmp_path, *slow) as address:
        process = subprocess.Popen([sys.executable, "-m", "lamina", "copy", *arguments, address, "there.raw"])
        try:
            deadline = time.monotonic() + 30
            while not Path("there.raw.partial").exists() or os.stat("there.raw.partial").st_blocks < 2048:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
    assert json.loads(Path("journal").read_text())["position"] == 0
    with nbdkit(tmp_path, *slow) as address:
        assert main(["copy", *arguments, "-R", "64", address, "there.raw"]) == 0
    whole = b"".join(at.to_bytes(8, "big") for at in range(0, 16 * MIB, 8))
    assert Path("there.raw").read_bytes() == whole
    assert sorted(os.listdir()) == ["source.raw", "there.raw"]


def test_a_journal_that_cannot_be_written_leaves_nothing(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in complaint(capsys, "--resume-file", "nowhere/journal", "source.raw", "there.raw")
    assert os.listdir() == ["source.raw"]


@pytest.fixture
def journal(often: None, served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """A journal of a copy of source.raw to the wire's export, which stopped; the URI."""
    with Wire(tmp_path / "wire", tmp_path / "disk.sock", budget=3 * MIB, upward=True) as wire:
        options = ["--reconnect", "0", "--no-extents", "-S", "0", "--resume-file", "journal"]
        complaint(capsys, *options, "source.raw", wire.uri)
    (tmp_path / "wire").unlink()
    os.symlink("disk.sock", "wire")
    return wire.uri


def test_a_journal_is_of_one_copy(journal: str, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.raw").write_bytes(content)
    resume = ["--resume-file", "journal"]
    assert "another copy" in complaint(capsys, *resume, "other.raw", journal)
    assert "another copy" in complaint(capsys, *resume, "source.raw", "file.raw")
    Path("source.raw").write_bytes(content[::-1])
    assert "another copy" in complaint(capsys, *resume, "source.raw", journal)


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b"\xff", b'{"lamina-copy": 1, "facts": {}, "position": -1}', b"[" * 100_000]
)
def test_what_is_no_journal_is_refused(source: str, capsys: pytest.CaptureFixture[str], text: bytes) -> None:
    Path("journal").write_bytes(text)
    assert "no journal" in complaint(capsys, "--resume-file", "journal", "source.raw", "there.raw")
    assert Path("journal").read_bytes() == text


def test_what_is_in_the_way_of_a_partial_file_stays(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("there.raw.partial").write_text("mine")
    assert "in the way" in complaint(capsys, "--resume-file", "journal", "source.raw", "there.raw")
    assert Path("there.raw.partial").read_text() == "mine"


# Other programs


def test_with_qemu_nbd_both_ways(source: str, content: bytes, tmp_path: Path) -> None:
    with Path("there.raw").open("wb") as file:
        file.truncate(SIZE)
    with qemu_nbd(tmp_path, "-e", "4", "-f", "raw", "there.raw") as address:
        assert main(["copy", "--flush", "-C", "4", "source.raw", address]) == 0
        assert main(["copy", "-C", "4", address, "back.raw"]) == 0
    assert Path("there.raw").read_bytes()[:SIZE] == content
    assert Path("back.raw").read_bytes()[:SIZE] == content


@pytest.mark.parametrize(
    "faults",
    [
        ["--no-sr"],
        ["-o"],
        [
            "--filter=blocksize-policy",
            "blocksize-minimum=4096",
            "blocksize-maximum=64k",
            "blocksize-error-policy=error",
        ],
        ["--filter=nozero"],
        ["--filter=noextents", "--filter=delay", "delay-read=2ms"],
    ],
    ids=" ".join,
)
def test_with_servers_that_can_less(source: str, content: bytes, tmp_path: Path, faults: list[str]) -> None:
    flags, settings = [f for f in faults if f.startswith("-")], [f for f in faults if not f.startswith("-")]
    # After an old handshake nbdkit 1.32 offers zeroes and flushes, and refuses every one.
    without = ["--destination-is-zero", "--reconnect", "0"] if "-o" in flags else []
    with nbdkit(tmp_path, *flags, "memory", "16M", *settings) as address:
        assert main(["copy", *without, "source.raw", address]) == 0
        assert main(["copy", address, "back.raw"]) == 0
    assert Path("back.raw").read_bytes() == content + bytes(16 * MIB - SIZE)


def test_a_server_that_verifies_what_it_is_sent(source: str, tmp_path: Path) -> None:
    """nbdkit's sparse-random makes a disk from a seed, and fails a write of anything else."""
    with nbdkit(tmp_path, "sparse-random", "64M", "seed=7") as address:
        assert main(["copy", address, "disk.raw"]) == 0
        assert main(["copy", "--destination-is-zero", "disk.raw", address]) == 0
    assert os.path.getsize("disk.raw") == 64 * MIB


# Conversion over NBD


def test_convert_from_and_to_exports(served: Served, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "-n", "--connections", "3", "-f", "raw", "-O", "raw", "source.raw", served.uri]) == 0
    assert served.image.read(0, SIZE) == content
    assert main(["convert", "--connections", "3", "-f", "raw", "-O", "qcow2", served.uri, "disk.qcow2"]) == 0
    with lamina.open("disk.qcow2", format="qcow2") as image:
        assert image.read(0, SIZE) == content
    assert main(["convert", "-O", "raw", "source.raw", served.uri]) == 1
    assert "add -n" in capsys.readouterr().err
    assert "nbd+unix:" not in os.listdir()
