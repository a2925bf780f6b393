"""Command lines of `convert` that both programs run in twin folders: equal exit codes, equal disks, and equal headers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lamina.cli.main import main
from tests.conftest import Qemu

MIB = 1 << 20

#: The target of each line is "out", which is missing before it, or with -n one of the images.
LINES = """
convert a.raw out
convert -f raw -O raw a.raw out
convert -O qcow2 a.raw out
convert -O qcow2 -p a.raw out
convert -p -q -O qcow2 a.raw out
convert -f raw -O qcow2 -o cluster_size=4k,refcount_bits=8 a.raw out
convert -f raw -O qcow2 -o cluster_size=2M -o lazy_refcounts=on a.raw out
convert -f raw -O qcow2 -o compat=0.10 a.raw out
convert -f raw -O qcow2 -o extended_l2=on,cluster_size=128k a.raw out
convert -f raw -O qcow2 -o preallocation=metadata a.raw out
convert -f raw -O qcow2 -o preallocation=falloc a.raw out
convert -f raw -O qcow2 -o preallocation=full a.raw out
convert -f raw -O qcow2 -o preallocation=some a.raw out
convert -f raw -O qcow2 -o nosuch=1 a.raw out
convert -f raw -O qcow2 -o cluster_size=3k a.raw out
convert -f raw -O nosuch a.raw out
convert -f nosuch -O raw a.raw out
convert -f qcow2 -O raw a.raw out
convert -O qcow2 -c a.raw out
convert -O qcow2 -c -o compression_type=zstd a.raw out
convert -O raw -c a.raw out
convert -O qcow2 -c -S 0 a.raw out
convert -O raw -S 0 a.raw out
convert -O qcow2 -S 0 a.raw out
convert -O qcow2 -S 8k a.raw out
convert -O qcow2 -S 1M a.raw out
convert -O qcow2 -S 513 a.raw out
convert -O qcow2 -S x a.raw out
convert -O raw -C a.raw out
convert -O qcow2 -C a.qcow2 out
convert -O raw -C -S 4k a.raw out
convert -O qcow2 -C -c a.raw out
convert -O raw -m 1 a.qcow2 out
convert -O raw -m 16 -W a.qcow2 out
convert -O raw -m 17 a.qcow2 out
convert -O raw -W a.qcow2 out
convert -O qcow2 -W -c a.raw out
convert -O raw -r 1G a.qcow2 out
convert -O raw -r 0 a.qcow2 out
convert -O raw -r -5 a.qcow2 out
convert -O raw -t none -T none a.raw out
convert -O raw -t writethrough -T directsync a.raw out
convert -O raw -t nosuch a.raw out
convert -O raw --salvage a.qcow2 out
convert -O raw --salvage -C a.qcow2 out
convert -O qcow2 --salvage -c a.raw out
convert -O raw -U a.qcow2 out
convert -O raw a.raw a.qcow2 out
convert -O qcow2 -c a.raw a.qcow2 a.raw out
convert -O qcow2 -l first a.raw a.qcow2 out
convert -O qcow2 -B base -F raw a.raw a.qcow2 out
convert -O raw -l first a.qcow2 out
convert -O raw -l snapshot.name=first a.qcow2 out
convert -O raw -l snapshot.id=1 a.qcow2 out
convert -O raw -l snapshot.id=9 a.qcow2 out
convert -O raw -l none a.qcow2 out
convert -O raw -l first a.raw out
convert -f qcow2 -O raw over out
convert -f qcow2 -O qcow2 -B base -F raw over out
convert -f qcow2 -O qcow2 -o backing_file=base,backing_fmt=raw over out
convert -O qcow2 -B base -F raw a.raw out
convert -O qcow2 -B base -F raw -c a.raw out
convert -O qcow2 -B base -F raw -S 0 a.raw out
convert -O qcow2 -B none -F raw a.raw out
convert -O qcow2 -B base -F qcow2 a.raw out
convert -O raw -B base -F raw a.raw out
convert -O qcow2 --bitmaps bits out
convert -O qcow2 --bitmaps a.raw out
convert -O raw --bitmaps bits out
convert -O qcow2 --skip-broken-bitmaps bits out
convert -O qcow2 --bitmaps -o compat=0.10 bits out
convert -n -f raw -O raw a.raw large.raw
convert -n -f raw -O qcow2 a.raw large.qcow2
convert -n -f raw -O qcow2 -c a.raw large.qcow2
convert -n -f raw -O raw a.raw small.raw
convert -n -f raw -O raw --target-is-zero a.raw large.raw
convert -n -f raw -O raw a.raw none
convert -n -f raw --target-image-opts a.raw driver=raw,file.driver=file,file.filename=large.raw
convert --target-image-opts -O raw a.raw driver=raw,file.filename=large.raw
convert -n -f raw -O raw -o size=1M a.raw large.raw
convert --image-opts -O raw driver=qcow2,file.driver=file,file.filename=a.qcow2 out
convert --image-opts -f qcow2 -O raw driver=qcow2,file.filename=a.qcow2 out
convert --image-opts -O raw driver=raw,offset=512,file.filename=a.raw out
convert -O raw json:{"driver":"qcow2","file.filename":"a.qcow2"} out
convert -O qcow2 a.raw a.raw
convert a.raw none/out
convert none out
convert a.raw
convert
convert -X a.raw out
convert --nosuch a.raw out
convert -O qcow2 out -f raw a.raw
convert a.raw out -O qcow2
""".strip().splitlines()

#: Lines that QEMU refuses, and Lamina carries out, with the reason.
MORE = {
    "convert -n -f raw -O qcow2 -c a.raw large.qcow2": "QEMU does not compress into clusters that are allocated already",
    "convert -O qcow2 -S 513 a.raw out": "QEMU takes multiples of 512",
}


def folder_of(folder: Path, seed: int, qemu: Qemu) -> None:
    folder.mkdir()
    dice = random.Random(seed)
    for name, size in (("a.raw", 3 * MIB), ("base", 3 * MIB), ("large.raw", 4 * MIB), ("small.raw", MIB)):
        with (folder / name).open("wb") as file:
            file.truncate(size)
            for _ in range(6):
                file.seek(dice.randrange(size // 512) * 512)
                file.write(dice.randbytes(min(dice.choice([512, 9000, 200_000]) // 512 * 512, size - file.tell())))
    qemu.img("create", "-q", "-f", "qcow2", folder / "a.qcow2", "5M")
    qemu.io("-f", "qcow2", "-c", "write -P 1 1M 100k", folder / "a.qcow2")
    qemu.img("snapshot", "-c", "first", folder / "a.qcow2")
    qemu.io("-f", "qcow2", "-c", "write -P 2 1M 64k", "-c", "write -z 2M 128k", folder / "a.qcow2")
    qemu.img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", folder / "over")
    qemu.io("-f", "qcow2", "-c", "write -P 3 64k 1000k", "-c", "write -z 2M 64k", folder / "over")
    qemu.img("create", "-q", "-f", "qcow2", folder / "bits", "2M")
    qemu.img("bitmap", "--add", folder / "bits", "b0")
    qemu.io("-f", "qcow2", "-c", "write -P 4 0 64k", folder / "bits")
    qemu.img("create", "-q", "-f", "qcow2", folder / "large.qcow2", "4M")
    qemu.io("-f", "qcow2", "-c", "write -P 5 0 4M", folder / "large.qcow2")


def header(qemu: Qemu, path: Path) -> Any:
    told = json.loads(qemu.img("info", "--output=json", path).stdout)
    for name in "filename", "actual-size", "full-backing-filename", "children":
        told.pop(name, None)
    for one in told.get("format-specific", {}).get("data", {}).get("bitmaps", []):
        one["flags"].sort()
    return told


@pytest.mark.peers
@pytest.mark.parametrize("part", range(6))
def test_the_same_lines(
    tmp_path: Path,
    qemu: Qemu,
    part: int,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder_of(folder, seed, qemu)
    failures = []
    for line in LINES[part::6]:
        words = line.split()
        capfd.readouterr()
        monkeypatch.chdir(theirs)
        peer = qemu.img(*words, check=False)
        monkeypatch.chdir(ours)
        status = main(words)
        said = capfd.readouterr()
        about = f"{line}: {status} and {peer.returncode}: {said.err} {peer.stderr}"
        if line in MORE:
            assert (status, peer.returncode) == (0, 1), about
        elif status != peer.returncode:
            failures.append(about)
        elif status == 0:
            name = words[-1] if "-n" in words and "." in words[-1] else "out"
            name = "large.raw" if "," in name else name
            found = [header(qemu, folder / name) for folder in (ours, theirs)]
            if found[0] != found[1]:
                failures.append(f"{about}\n{found[0]}\n{found[1]}")
            same = qemu.img("compare", ours / name, theirs / name, check=False)
            if same.returncode:
                failures.append(f"{about}{same.stdout}")
            if "-p" not in words and said.out != peer.stdout:
                failures.append(f"{about}{said.out!r} {peer.stdout!r}")
        for folder in (ours, theirs):
            (folder / "out").unlink(missing_ok=True)
    assert not failures, "\n".join(failures)
