"""`convert - out` and `convert in -`: exact bytes, sound images, and nothing left where the pipe ends too early."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from tests.cli.test_signals import LAMINA, ended, started, until
from tests.conftest import Qemu

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Path:
    """a.raw: data and holes, and a length that is no multiple of 512."""
    monkeypatch.chdir(tmp_path)
    dice = random.Random(seed)
    with (tmp_path / "a.raw").open("wb") as file:
        file.truncate(6 * MIB + 77)
        for _ in range(20):
            file.seek(dice.randrange(5 * MIB))
            file.write(dice.randbytes(dice.choice([1, 4096, 70_000, 300_000])))
    return tmp_path


def run(*words: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*LAMINA, "convert", *words], input=input, capture_output=True, timeout=60)


def good(*words: str, input: bytes = b"") -> bytes:
    done = run(*words, input=input)
    assert done.returncode == 0, done.stderr
    return done.stdout


def disk(path: str | Path, format: str) -> bytes:
    with lamina.open(path, format=format) as image:
        return image.read(0, image.size)


def test_raw_through_both_pipes(folder: Path) -> None:
    content = Path("a.raw").read_bytes()
    assert good("-f", "raw", "a.raw", "-") == content
    assert good("--size", str(len(content)), "-", "-", input=content) == content
    good("-f", "raw", f"--size={len(content)}", "-", "b.raw", input=content)
    assert Path("b.raw").read_bytes() == content


@pytest.mark.parametrize(
    "options",
    [[], ["-c"], ["-S", "0"], ["-m", "8", "-W"], ["-o", "cluster_size=2M"], ["-p"], ["--flush"], ["-r", "1G"]],
)
def test_a_pipe_becomes_an_image(qemu: Qemu, folder: Path, options: list[str]) -> None:
    content = Path("a.raw").read_bytes()
    good(*options, "-O", "qcow2", "--size", str(len(content)), "-", "b.qcow2", input=content)
    assert qemu.check("b.qcow2")[0] == 0
    assert disk("b.qcow2", "qcow2")[: len(content)] == content


def test_a_pipe_over_a_base_and_into_a_target(folder: Path) -> None:
    content = Path("a.raw").read_bytes()
    content = content[: len(content) // 512 * 512]
    base = bytearray(content)
    base[MIB : 2 * MIB] = b"\x55" * MIB
    Path("base").write_bytes(base)
    good("-O", "qcow2", "-B", "base", "-F", "raw", "--size", str(len(content)), "-", "over.qcow2", input=content)
    assert disk("over.qcow2", "qcow2") == content
    assert Path("over.qcow2").stat().st_size < 2 * MIB
    good("-n", "-O", "raw", "--size", str(len(content)), "-", "base", input=content)
    assert Path("base").read_bytes() == content


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=2M,refcount_bits=64",
        "compat=0.10",
        "extended_l2=on",
        "lazy_refcounts=on,compression_type=zstd",
        "size=100M",
    ],
)
def test_an_image_to_a_pipe_is_sound(qemu: Qemu, folder: Path, options: str) -> None:
    content = Path("a.raw").read_bytes()
    made = good("-f", "raw", "-O", "qcow2", "-o", options, "a.raw", "-")
    Path("b.qcow2").write_bytes(made)
    assert qemu.check("b.qcow2")[0] == 0
    assert qemu.img("compare", "-f", "qcow2", "-F", "raw", "b.qcow2", "a.raw").returncode == 0
    assert main(["check", "b.qcow2"]) == 0
    assert disk("b.qcow2", "qcow2").rstrip(b"\0") == content.rstrip(b"\0")
    # What is in the header is what a file of these options says.
    assert main(["convert", "-f", "raw", "-O", "qcow2", "-o", options, "a.raw", "c.qcow2"]) == 0
    ours, theirs = lamina.info("b.qcow2", format="qcow2"), lamina.info("c.qcow2", format="qcow2")
    assert (ours.virtual_size, ours.cluster_size) == (theirs.virtual_size, theirs.cluster_size)
    assert ours.format_specific == theirs.format_specific
    # And it can be written to as any other.
    qemu.io("-f", "qcow2", "-c", "write -P 5 0 3M", "b.qcow2")
    assert qemu.check("b.qcow2")[0] == 0


@pytest.mark.parametrize("size", [0, 513])
def test_small_disks(qemu: Qemu, folder: Path, size: int) -> None:
    content = os.urandom(size)
    Path("s").write_bytes(content)
    Path("b.qcow2").write_bytes(good("-f", "raw", "-O", "qcow2", "s", "-"))
    assert qemu.check("b.qcow2")[0] == 0
    assert disk("b.qcow2", "qcow2") == content + bytes(-size % 512)
    assert good("--size", str(size), "-", "-", input=content) == content
    good("-O", "qcow2", "--size", str(size), "-", "c.qcow2", input=content)
    assert disk("c.qcow2", "qcow2") == content + bytes(-size % 512)


def test_all_is_allocated_if_asked_for(qemu: Qemu, folder: Path) -> None:
    Path("b.qcow2").write_bytes(good("-S", "0", "-f", "raw", "-O", "qcow2", "a.raw", "-"))
    assert qemu.check("b.qcow2")[0] == 0
    rows = qemu.map("b.qcow2", "qcow2")
    assert [row["data"] for row in rows] == [True]
    assert qemu.img("compare", "-f", "qcow2", "-F", "raw", "b.qcow2", "a.raw").returncode == 0


def test_from_a_chain_a_snapshot_and_several(qemu: Qemu, folder: Path) -> None:
    content = Path("a.raw").read_bytes()
    content += bytes(-len(content) % 512)
    qemu.img("convert", "-f", "raw", "-O", "qcow2", "-c", "a.raw", "base.qcow2")
    qemu.img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "over.qcow2")
    qemu.img("snapshot", "-c", "first", "over.qcow2")
    qemu.io("-f", "qcow2", "-c", "write -P 9 1M 100k", "over.qcow2")
    now = content[:MIB] + b"\x09" * (100 * KIB) + content[MIB + 100 * KIB :]
    assert good("-f", "qcow2", "over.qcow2", "-") == now
    assert good("-f", "qcow2", "-l", "first", "over.qcow2", "-") == content
    Path("b.qcow2").write_bytes(good("-f", "qcow2", "-O", "qcow2", "over.qcow2", "base.qcow2", "-"))
    assert qemu.check("b.qcow2")[0] == 0
    assert disk("b.qcow2", "qcow2") == now + content


def test_a_file_as_standard_input_needs_no_size(folder: Path) -> None:
    content = Path("a.raw").read_bytes()
    with Path("a.raw").open("rb") as file:
        file.seek(1000)
        subprocess.run([*LAMINA, "convert", "-", "b.raw"], stdin=file, check=True, timeout=60)
    assert Path("b.raw").read_bytes() == content[1000:]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-c", "-O", "qcow2", "a.raw", "-"], "excludes -c"),
        (["-n", "-O", "raw", "a.raw", "-"], "excludes -n"),
        (["-O", "qcow2", "-B", "a.raw", "-F", "raw", "a.raw", "-"], "excludes -B"),
        (["-O", "qcow2", "-o", "backing_file=a.raw,backing_fmt=raw", "a.raw", "-"], "excludes -B"),
        (["-O", "qcow2", "-o", "preallocation=full", "a.raw", "-"], "not made in one pass"),
        (["-C", "a.raw", "-"], "excludes -C"),
        (["--target-is-zero", "a.raw", "-"], "excludes --target-is-zero"),
        (["--target-image-opts", "a.raw", "-"], "excludes --target-image-opts"),
        (["-t", "directsync", "a.raw", "-"], "-t directsync"),
        (["--bitmaps", "-O", "qcow2", "a.raw", "-"], "excludes --bitmaps"),
        (["--flush", "a.raw", "-"], "excludes --flush"),
        (["-W", "a.raw", "-"], "excludes -W"),
        (["-f", "qcow2", "-", "b"], "excludes -f"),
        (["--image-opts", "-", "b"], "excludes --image-opts"),
        (["-l", "x", "-", "b"], "excludes -l"),
        (["--salvage", "--size=1", "-", "b"], "excludes --salvage"),
        (["-C", "--size=1", "-", "b"], "excludes -C"),
        (["-", "b"], "--size"),
        (["--size=1M", "a.raw", "b"], "--size"),
        (["--size=1M", "-", "a.raw", "b"], "not joined"),
        (["-O", "raw", "-o", "size=1M", "a.raw", "-"], "1048576 bytes and the source"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    with open(reader) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert main(["convert", *words]) == 1
    out, err = capfd.readouterr()
    assert said in err
    assert not out
    assert os.listdir() == ["a.raw"]


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize(("announced", "said"), [(6 * MIB, "more than"), (7 * MIB, "ended after"), (0, "more than")])
def test_another_length_than_announced(folder: Path, format: str, announced: int, said: str) -> None:
    content = Path("a.raw").read_bytes()
    Path("b").write_bytes(b"as before")
    done = run("-O", format, "--size", str(announced), "-", "b", input=content)
    assert done.returncode == 1
    assert said in done.stderr.decode()
    assert Path("b").read_bytes() == b"as before"
    assert sorted(os.listdir()) == ["a.raw", "b"]


def test_an_image_is_not_taken_for_raw_bytes(folder: Path) -> None:
    made = good("-f", "raw", "-O", "qcow2", "a.raw", "-")
    done = run("--size", str(len(made)), "-", "b", input=made)
    assert done.returncode == 1
    assert "looks like an image of the format qcow2" in done.stderr.decode()
    assert os.listdir() == ["a.raw"]
    good("-f", "raw", "--size", str(len(made)), "-", "b", input=made)
    assert Path("b").read_bytes() == made


def test_standard_input_is_not_the_target(folder: Path) -> None:
    before = Path("a.raw").read_bytes()
    for target in ("a.raw", "file:a.raw"):
        with Path("a.raw").open("rb") as file:
            done = subprocess.run([*LAMINA, "convert", "-", target], stdin=file, capture_output=True, timeout=60)
        assert done.returncode == 1
        assert b"source itself" in done.stderr
    with Path("a.raw").open("r+b") as file:
        done = subprocess.run([*LAMINA, "convert", "a.raw", "-"], stdout=file, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert b"source itself" in done.stderr
    assert Path("a.raw").read_bytes() == before


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_reader_that_ends(folder: Path, format: str) -> None:
    with started(*LAMINA, "convert", "-f", "raw", "-O", format, "a.raw", "-") as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        status, _, err = ended(process)
    assert status == 128 + signal.SIGPIPE
    assert all("is rounded up" in line for line in err.splitlines())


@pytest.mark.parametrize("target", ["b", "-"])
def test_ctrl_c_while_nothing_comes(folder: Path, target: str) -> None:
    reader, writer = os.pipe()
    try:
        with started(*LAMINA, "convert", "--size", "8M", "-O", "qcow2", "-", target, stdin=reader) as process:
            os.write(writer, bytes(60_000))
            until(lambda: _empty(reader))
            process.send_signal(signal.SIGINT)
            status, _, err = ended(process)
    finally:
        os.close(reader)
        os.close(writer)
    assert status == 128 + signal.SIGINT, err
    assert os.listdir() == ["a.raw"]


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_ctrl_c_while_nobody_reads(folder: Path, format: str) -> None:
    with started(*LAMINA, "convert", "-f", "raw", "-O", format, "a.raw", "-") as process:
        assert process.stdout is not None
        process.stdout.read(1)  # the rest does not fit into the pipe
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 128 + signal.SIGINT


def _empty(fd: int) -> bool:
    import select

    return not select.select([fd], [], [], 0)[0]


def test_a_full_disk(folder: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*LAMINA, "convert", "a.raw", "-"], stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert b"standard output" in done.stderr


def test_closed_streams(folder: Path) -> None:
    for redirection, words in (("<&-", "--size 1M - b"), (">&-", "a.raw -")):
        command = f"{' '.join(LAMINA)} convert {words} {redirection}"
        done = subprocess.run(command, shell=True, capture_output=True, timeout=60)
        assert done.returncode == 1
        assert b"Bad file descriptor" in done.stderr
    assert os.listdir() == ["a.raw"]


def test_salvage_to_a_pipe(folder: Path) -> None:
    with Path("a.raw").open("r+b") as file:
        file.seek(50_000)
        file.write(b"data" * 1000)
    content = bytearray(Path("a.raw").read_bytes())
    Path("rules").write_text('[inject-error]\nevent = "read_aio"\nerrno = "5"\nsector = "100"\n')
    done = run("--salvage", "blkdebug:rules:a.raw", "-")
    assert done.returncode == 0
    content[51200:51712] = bytes(512)
    assert done.stdout == content
    assert b"512 bytes of blkdebug:rules:a.raw could not be read" in done.stderr
    assert run("blkdebug:rules:a.raw", "-").returncode == 1


def test_the_output_is_limited(folder: Path) -> None:
    assert run("--max-output", "100k", "a.raw", "-").returncode == 1
    assert run("--max-output", "100k", "-O", "qcow2", "a.raw", "-").returncode == 1
