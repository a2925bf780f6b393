"""`measure` beside qemu-img: the same figures, and the files that are made are as long."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main
from lamina.jobs.convert import convert_to_file
from tests.conftest import Qemu

OPTIONS = [
    "cluster_size=64k",
    "cluster_size=512",
    "cluster_size=2M",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=4k,refcount_bits=64",
    "compat=0.10",
    "extended_l2=on",
    "preallocation=metadata",
    "preallocation=full",
    "lazy_refcounts=on",
]


@pytest.mark.peers
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", ["0", "1", "512", "1M", "100M", "10G", "3T", "5000000000"])
def test_an_empty_disk(qemu: Qemu, options: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    for output in ["human"], ["json"]:
        words = ["measure", f"--output={output[0]}", "-O", "qcow2", "-o", options, "--size", size]
        theirs = qemu.img(*words, check=False)
        ours = main(words)
        said = capsys.readouterr()
        if theirs.returncode:  # an L1 table that is too long
            assert ours == 1, said
            continue
        assert ours == 0, said.err
        if output == ["json"]:
            assert json.loads(said.out) == json.loads(theirs.stdout)
        else:
            assert said.out == theirs.stdout


@pytest.mark.peers
@pytest.mark.parametrize("options", OPTIONS)
def test_a_disk_with_data(
    tmp_path: Path, qemu: Qemu, options: str, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    path, size = tmp_path / "disk.qcow2", 30 << 20
    lamina.create(path, "qcow2", size)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for _ in range(12):
            image.write(rng.randrange(size - 200_000), b"data" * rng.choice((1, 10_000, 40_000)))
        image.zero(5 << 20, 3 << 20)
        for name, granularity in ("fine", 512), ("coarse", 1 << 20):
            image.add_bitmap(name, granularity)
    words = ["measure", "-f", "qcow2", "-O", "qcow2", "-o", options, str(path)]
    theirs = qemu.img(*words).stdout
    assert main(words) == 0
    assert capsys.readouterr().out == theirs
    if "preallocation" not in options:
        given: dict[str, Any] = dict(pair.split("=") for pair in options.split(","))
        with lamina.open(path, format="qcow2") as image:
            convert_to_file(image, tmp_path / "new", "qcow2", given)
        required = int(theirs.split()[2])
        assert (tmp_path / "new").stat().st_size <= required  # tables that nothing needs yet are counted too
    assert main(["measure", "-f", "qcow2", "-O", "raw", str(path)]) == 0
    assert capsys.readouterr().out == qemu.img("measure", "-f", "qcow2", "-O", "raw", path).stdout


@pytest.mark.peers
def test_wrong_words(tmp_path: Path, qemu: Qemu, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    for words in (
        ["measure"],
        ["measure", "-O", "qcow2", "--size", "1G", str(tmp_path / "disk")],
        ["measure", "-O", "nosuch", "--size", "1G"],
        ["measure", "-O", "qcow2", "-o", "cluster_size=3k", "--size", "1G"],
        ["measure", "-O", "qcow2", "--size", "x"],
        ["measure", "-O", "qcow2", str(tmp_path / "none")],
    ):
        assert main(words) == qemu.img(*words, check=False).returncode == 1, words
        assert capsys.readouterr().err
