"""Encrypted qcow2 images: what the file holds, what is refused, what can be done without the passphrase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.crypto.luks1 import HEADER_BYTES, MAX_BYTES
from lamina.crypto.secret import Secret
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.header import Header
from lamina.jobs.convert import convert_to_file

SECRET = Secret(b"hunter2")
LUKS = {"format": "luks", "key-secret": SECRET, "iter-time": 1}


def spec(path: Path, **encrypt: Any) -> dict[str, Any]:
    return {"driver": "qcow2", "file": {"filename": str(path)}, "encrypt": encrypt or {"key-secret": SECRET}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 1 << 20, cluster_size=4096, encrypt=LUKS)
    return path


def test_what_is_written_is_not_in_the_file(path: Path) -> None:
    with lamina.open(spec(path), read_only=False) as image:
        image.write(4096, b"plain text " * 1000)
        image.write(65536, b"plain text " * 1000)
        image.zero(65536, 4096)
        found = image.extents()
        assert found.where(data=True).totals().length >= 12288
        assert all(row.offset is None for row in found if row.data), "encrypted bytes are not those of the disk"
        assert not found.where(data=True).zero.any()
    raw = path.read_bytes()
    assert b"plain text" not in raw
    assert b"hunter2" not in raw
    with lamina.open(spec(path)) as image:
        assert image.read(4096, 11000) == b"plain text " * 1000


def test_equal_sectors_differ_in_the_file(path: Path) -> None:
    with lamina.open(spec(path), read_only=False) as image:
        image.write(0, b"x" * 65536)
    clusters = [path.read_bytes()[at : at + 512] for at in range(0, path.stat().st_size, 512)]
    stored = [sector for sector in clusters if sector.count(0) < 64]
    assert len(stored) == len(set(stored))


@pytest.mark.parametrize(
    ("encrypt", "match"),
    [
        ({"key-secret": Secret(b"wrong")}, "no key slot opens"),
        ({"format": "luks"}, "no passphrase is given"),
        ({"format": "aes", "key-secret": SECRET}, "encrypted with luks, not with aes"),
        ({"key-secret": "s9"}, "no secret with the id"),
        ({"key-secret": 5}, "no secret is named"),
    ],
)
def test_it_is_not_opened_with_anything_else(path: Path, encrypt: dict[str, Any], match: str) -> None:
    with pytest.raises(lamina.OptionError, match=match):
        lamina.open(spec(path, **encrypt))


def test_the_tables_need_no_passphrase(path: Path) -> None:
    assert lamina.check(path, format="qcow2").clean
    info = lamina.info(path, format="qcow2")
    assert info.encrypted
    assert info.format_specific is not None
    encrypt = info.format_specific["data"]["encrypt"]
    assert (encrypt["format"], encrypt["cipher-alg"], encrypt["cipher-mode"]) == ("luks", "aes-256", "xts")
    assert [slot["active"] for slot in encrypt["slots"]] == [True] + [False] * 7


def test_an_image_that_is_not_encrypted_takes_no_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "plain.qcow2"
    lamina.create(path, "qcow2", 1 << 20)
    with pytest.raises(lamina.OptionError, match="not encrypted"):
        lamina.open(spec(path))
    assert lamina.info(path, format="qcow2").encrypted is None


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"format": "aes"}, lamina.OptionError, "legacy AES"),
        ({"cipher-alg": "serpent-256"}, lamina.UnsupportedFeature, "serpent"),
        ({"cipher-alg": "aes-999"}, lamina.OptionError, "no keys of that length"),
        ({"hash-alg": "md9"}, lamina.UnsupportedFeature, "no hash md9"),
        ({"key-secret": None}, lamina.OptionError, "no secret is named"),
    ],
)
def test_what_cannot_be_made_leaves_nothing(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        lamina.create(tmp_path / "new.qcow2", "qcow2", 1 << 20, encrypt={**LUKS, **change})
    assert list(tmp_path.iterdir()) == []


def test_compressed_clusters_are_refused(path: Path, tmp_path: Path) -> None:
    with lamina.open(spec(path)) as image, pytest.raises(lamina.LaminaError, match="compression"):
        convert_to_file(image, tmp_path / "new.qcow2", "qcow2", {"encrypt": LUKS}, compress=True)
    assert not (tmp_path / "new.qcow2").exists()


def pointer(path: Path, offset: int, length: int) -> None:
    """Change where the header says that its encryption header lies."""
    with path.open("r+b") as file:
        at = file.read(4096).index(q.EXT_ENCRYPTION.to_bytes(4, "big")) + 8
        file.seek(at)
        file.write(q.ENCRYPTION_POINTER.pack(offset=offset, length=length))


@pytest.mark.parametrize(
    ("offset", "length", "error"),
    [
        (0, HEADER_BYTES, lamina.CorruptImage),
        (4096 + 512, HEADER_BYTES, lamina.CorruptImage),
        (1 << 62, 1 << 62, lamina.CorruptImage),
        (4096, 10, lamina.CorruptImage),
        (4096, 1 << 20, lamina.FormatError),
    ],
)
def test_a_pointer_to_no_header(path: Path, offset: int, length: int, error: type[Exception]) -> None:
    pointer(path, offset, length)
    for read_only in (True, False):
        with pytest.raises(error):
            lamina.open(spec(path), read_only=read_only)
    with pytest.raises(error):
        lamina.info(path, format="qcow2")


def test_a_pointer_that_claims_much_of_a_sparse_file(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 42)
    pointer(path, 1 << 20, 1 << 41)
    with pytest.raises(lamina.LimitExceeded, match=str(MAX_BYTES)):
        lamina.open(spec(path), read_only=False)


def test_its_clusters_are_never_written_as_data(path: Path) -> None:
    """An L2 entry that names a cluster of the LUKS header: a write through it would destroy every passphrase."""
    with lamina.open(spec(path), read_only=False) as image:
        image.write(0, b"x" * 4096)
        header: Header = image.node.header  # type: ignore[attr-defined]
        place = header.encryption_header
        assert place is not None
        l1_offset = header.l1_table_offset
    raw = bytearray(path.read_bytes())
    l2 = int.from_bytes(raw[l1_offset : l1_offset + 8], "big") & q.OFFSET_MASK
    raw[l2 : l2 + 8] = (place[0] | q.COPIED).to_bytes(8, "big")
    path.write_bytes(raw)
    with pytest.raises(lamina.CorruptImage), lamina.open(spec(path), read_only=False) as image:
        image.write(0, b"y" * 4096)
    after = path.read_bytes()
    assert after[place[0] : sum(place)] == raw[place[0] : sum(place)]


def test_a_disk_that_ended_inside_a_sector_grows_by_zeros(tmp_path: Path) -> None:
    """The sector is encrypted as a whole."""
    secret = lamina.Secret(b"word")
    path = tmp_path / "disk"
    lamina.create(
        path, "qcow2", 70_144, cluster_size=4096, encrypt={"format": "luks", "key-secret": secret, "iter-time": 1}
    )
    raw = bytearray(path.read_bytes())
    raw[24:32] = (70_000).to_bytes(8, "big")
    path.write_bytes(raw)
    spec = {"driver": "qcow2", "file": str(path), "encrypt": {"key-secret": secret}}
    with lamina.open(spec, read_only=False) as image:
        image.write(0, b"x" * 69_633)
        image.write(69_990, b"end")
        image.truncate(80_384)
        expected = (b"x" * 69_633).ljust(69_990, b"\0") + b"end"
        assert image.read(0, image.size) == expected.ljust(80_384, b"\0")
