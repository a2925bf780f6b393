"""The base installation, without the packages of any extra: what works, and what an error says to install.

Each test runs Python in a process of its own, which cannot import the packages of the extras.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lamina
from lamina.codecs import deflate

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: What the extras install, as modules. `setuptools` and the tools of `dev` are imported nowhere.
OF_EXTRAS = ("rich", "isal", "deflate", "cryptography", "hypothesis", "pytest", "_pytest", "fsspec")

START = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "src")!r}]
from tests.systems.withheld import withhold
withhold(*{OF_EXTRAS!r})
"""


def run(code: str, *arguments: object, folder: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `code` with these arguments in `folder`, in a process without the extras."""
    done = subprocess.run(
        [sys.executable, "-c", START + code, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == status, f"{done.stdout}{done.stderr}"
    return done


def command(*arguments: object, folder: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """`lamina ARGUMENTS` without the extras."""
    return run("from lamina.cli.entry import run; run()", *arguments, folder=folder, status=status)


def content(seed: int) -> bytes:
    """A disk that compresses to half its size, in pieces of different kinds."""
    rng = random.Random(seed)
    pieces = [bytes(70_000), rng.randbytes(50_000), b"".join(rng.randbytes(9) * 3 + b"text" for _ in range(8_000))]
    return b"".join(pieces).ljust(1 << 20, b"\x11")


def test_the_extras_are_declared() -> None:
    assert {"cli", "crypto", "fast", "testing"} <= set(PROJECT["optional-dependencies"])
    base = {re.split(r"[^\w.-]", each)[0].lower() for each in PROJECT["dependencies"]}
    assert base == {"numpy", "backports.zstd"}


def test_the_commands_work(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(content(1))
    command("create", "-f", "qcow2", "new.qcow2", "1G", folder=tmp_path)
    command("convert", "-c", "-p", "-f", "raw", "-O", "qcow2", "disk.raw", "packed.qcow2", folder=tmp_path)
    command("check", "-f", "qcow2", "packed.qcow2", folder=tmp_path)
    assert "compressed" in command("map", "--output=json", "-f", "qcow2", "packed.qcow2", folder=tmp_path).stdout
    for arguments in (["info"], ["explain", "-f", "qcow2"], ["inspect"]):
        command(*arguments, "packed.qcow2", folder=tmp_path)
    command("compare", "-f", "raw", "-F", "qcow2", "disk.raw", "packed.qcow2", folder=tmp_path)


@pytest.mark.parametrize("level", [1, 3, 6, 9])
@pytest.mark.parametrize("seed", [1, 2])
def test_deflate_reads_the_same_with_and_without_the_fast_libraries(tmp_path: Path, level: int, seed: int) -> None:
    disk = content(seed)
    (tmp_path / "disk").write_bytes(disk)
    fast = deflate.compress(disk, level)
    (tmp_path / "fast").write_bytes(fast)
    code = """
from lamina.codecs import deflate
import lamina, pathlib, sys
assert deflate._isal is None and deflate._libdeflate is None
level = int(sys.argv[1])
disk, fast = pathlib.Path("disk").read_bytes(), pathlib.Path("fast").read_bytes()
assert deflate.decompress(fast, len(disk)) == disk
assert deflate.decompress(memoryview(fast + b"after the stream"), len(disk)) == disk
assert deflate.decompress(fast, 100) == disk[:100]
for bad, length in ((fast[:len(fast) // 2], len(disk)), (fast, len(disk) + 1), (b"\\xff" * 20, 5), (b"", 5)):
    try:
        deflate.decompress(bad, length)
    except lamina.CorruptImage as error:
        print(error)
    else:
        sys.exit(f"{length} bytes came from {bad[:20]}")
pathlib.Path("slow").write_bytes(deflate.compress(disk, level))
"""
    told = run(code, level, folder=tmp_path).stdout.splitlines()
    assert deflate.decompress((tmp_path / "slow").read_bytes(), len(disk)) == disk
    for line, (bad, length) in zip(
        told, ((fast[: len(fast) // 2], len(disk)), (fast, len(disk) + 1), (b"\xff" * 20, 5), (b"", 5)), strict=True
    ):
        with pytest.raises(lamina.CorruptImage) as caught:
            deflate.decompress(bad, length)
        assert re.sub(r"\d+", "N", line) == re.sub(r"\d+", "N", str(caught.value))


def test_an_image_written_without_the_fast_libraries_is_read_with_them(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(content(3))
    command("convert", "-c", "-f", "raw", "-O", "qcow2", "disk.raw", "slow.qcow2", folder=tmp_path)
    fast = [sys.executable, "-m", "lamina", "convert", "-c", "-f", "raw", "-O", "qcow2", "disk.raw", "fast.qcow2"]
    subprocess.run(fast, cwd=tmp_path, check=True)
    for name in ("slow.qcow2", "fast.qcow2"):
        with lamina.open(tmp_path / name, format="qcow2") as image:
            assert image.read(0, image.size) == content(3)
        command("compare", "-f", "raw", "-F", "qcow2", "disk.raw", name, folder=tmp_path)


def test_a_terminal_shows_the_percentage_without_rich(tmp_path: Path) -> None:
    code = """
import io, sys
from lamina.cli.terminal import Meter
class Terminal(io.StringIO):
    def isatty(self): return True
sys.stderr = shown = Terminal()
with Meter("copying", asked=True) as meter:
    for done in range(5):
        meter.report(done, 4)
assert "rich" not in sys.modules
print(repr(shown.getvalue()))
"""
    shown = run(code, folder=tmp_path).stdout
    assert "copying    (25.00/100%)" in shown
    assert shown.count("%") == 1  # the others came too soon after it
    assert shown.rstrip("\n").endswith(r" \r'")  # and the line is empty again


def test_what_crypto_installs_is_named(tmp_path: Path) -> None:
    secret = ("--object", "secret,id=key,data=word")
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    new = ("create", *secret, "-f", "qcow2", "-o", options, "locked.qcow2", "1M")
    failed = command(*new, folder=tmp_path, status=1)
    assert "lamina[crypto]" in failed.stderr
    assert not (tmp_path / "locked.qcow2").exists()
    subprocess.run([sys.executable, "-m", "lamina", *new], cwd=tmp_path, check=True, capture_output=True)
    found = json.loads(command("info", "--output=json", "locked.qcow2", folder=tmp_path).stdout)
    assert found["encrypted"]  # what the header says needs no cipher
    opened = f"driver=qcow2,encrypt.key-secret=key,file.filename={tmp_path / 'locked.qcow2'}"
    failed = command("map", *secret, "--image-opts", opened, folder=tmp_path, status=1)
    assert "lamina[crypto]" in failed.stderr


def test_what_testing_installs_is_named(tmp_path: Path) -> None:
    code = """
import lamina.testing
try:
    lamina.testing.FilterConformance
except ModuleNotFoundError as error:
    print(error)
lamina.testing.FaultyStorage(), lamina.testing.cut_power, lamina.testing.Disk
"""
    assert run(code, folder=tmp_path).stdout.count("lamina[testing]") == 1
