"""Damaged reference counts and flags are mended: clean for both checks afterwards, not a byte of the guest changed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from lamina.formats.qcow2 import layout as q
from tests.conftest import Qemu
from tests.damaged_counts import EXTENDED, damaged, made, word

SIZE = 1 << 20
GEOMETRIES = [(512, 16), (512, 64), (512, 2), (4096, 8), (4096, 16), (EXTENDED, 16)]


@pytest.mark.peers
@pytest.mark.parametrize(("cluster", "bits"), GEOMETRIES)
def test_what_is_damaged_is_mended(tmp_path: Path, qemu: Qemu, cluster: int, bits: int) -> None:
    path = tmp_path / "disk.qcow2"
    mended = 0
    for number in range(6):
        rng = random.Random(f"{cluster} {bits} {number}")
        disk = made(path, rng, cluster, bits)
        path.write_bytes(damaged(path.read_bytes(), rng, cluster))
        before = lamina.check(path, format="qcow2")
        found = lamina.check(path, format="qcow2", repair="all")
        assert found.clean
        assert found.corruptions_fixed == before.corruptions
        mended += not before.clean
        qemu.img("check", path)
        content = path.read_bytes()
        assert lamina.check(path, format="qcow2", repair="all").clean
        assert path.read_bytes() == content, "a second repair changes something"
        with lamina.open(path, format="qcow2", read_only=False) as image:
            assert image.read(0, SIZE) == disk
            image.write(0, b"on we go")
        qemu.img("check", path)
    assert mended > 2


@pytest.mark.peers
def test_leaks_alone(tmp_path: Path, qemu: Qemu, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.qcow2"
    disk = made(path, random.Random(1), 4096, 16)
    raw = bytearray(path.read_bytes())
    header = q.HEADER_V3.unpack(raw)
    block = word(raw, header.refcount_table_offset)
    used = [at for at in range(block, block + 4096, 2) if any(raw[at : at + 2])]
    raw += bytes(-len(raw) % 4096 + 3 * 4096)
    for at in (used[-1] + 2, used[-1] + 4):
        raw[at : at + 2] = b"\0\1"
    raw[used[-1] : used[-1] + 2] = b"\0\0"
    path.write_bytes(raw)
    assert main(["check", "-q", "-f", "qcow2", str(path)]) == 2
    assert main(["check", "-f", "qcow2", "-r", "leaks", "--output=json", str(path)]) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["leaks-fixed"], told["corruptions"]) == (2, 2)  # a count, and a flag that contradicts it
    assert "leaks" not in told
    assert main(["check", "-f", "qcow2", "-r", "all", str(path)]) == 0
    assert "    0 leaked clusters\n    2 corruptions\n" in capsys.readouterr().out
    qemu.img("check", path)
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, SIZE) == disk


@pytest.mark.peers
@pytest.mark.parametrize("table", ["l1_table_offset", "snapshots_offset"])
def test_leaks_alone_where_a_table_is_counted_as_free(tmp_path: Path, qemu: Qemu, table: str) -> None:
    """The new table takes other clusters, and the count of the old ones does not fall; the image is not marked corrupt."""
    path = tmp_path / "disk.qcow2"
    disk = made(path, random.Random(1), 4096, 16)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.create_snapshot("another")
    raw = bytearray(path.read_bytes())
    header = q.HEADER_V3.unpack(raw)
    block = word(raw, header.refcount_table_offset)
    lost = block + 2 * (getattr(header, table) >> 12)
    leaked = block + 2 * len(raw) // 4096
    assert not any(raw[leaked : leaked + 2])
    raw[lost : lost + 2], raw[leaked : leaked + 2] = b"\0\0", b"\0\1"
    path.write_bytes(raw + bytes(4096))
    report = lamina.check(path, format="qcow2", repair="leaks")
    assert (report.leaks, report.leaks_fixed, report.corruptions) == (0, 1, 0)
    assert not lamina.info(path, format="qcow2").to_json()["format-specific"]["data"]["corrupt"]
    assert lamina.check(path, format="qcow2", repair="all").clean
    qemu.img("check", path)
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, SIZE) == disk


@pytest.mark.peers
def test_an_image_that_was_not_closed_is_repaired_when_it_is_opened(tmp_path: Path, qemu: Qemu) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4096", path, "1M")
    qemu.io("-f", "qcow2", "-c", "write -P 7 0 100k", "-c", "flush", "-c", "abort", path, check=False)
    assert lamina.info(path, format="qcow2").dirty
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 102_400) == b"\x07" * 102_400
    assert lamina.info(path, format="qcow2").dirty
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(200_000, b"written")
    assert not lamina.info(path, format="qcow2").dirty
    qemu.img("check", path)
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 102_400) == b"\x07" * 102_400
        assert image.read(200_000, 7) == b"written"


@pytest.mark.peers
def test_a_mark_of_corruption_goes_with_what_it_was_for(tmp_path: Path, qemu: Qemu) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, random.Random(2), 4096, 16)
    with path.open("r+b") as file:
        file.seek(q.HEADER_V3["incompatible_features"].offset)
        file.write((q.CORRUPT).to_bytes(8, "big"))
    with pytest.raises(lamina.CorruptImage):
        lamina.open(path, format="qcow2", read_only=False)
    assert lamina.check(path, format="qcow2", repair="leaks").clean
    assert lamina.info(path, format="qcow2").to_json()["format-specific"]["data"]["corrupt"]
    assert lamina.check(path, format="qcow2", repair="all").clean
    lamina.open(path, format="qcow2", read_only=False).close()
    qemu.img("check", path)
