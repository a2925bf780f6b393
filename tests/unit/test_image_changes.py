"""Bitmaps and options that change in place, through `Image`, beside other users of the image."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import lamina


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "disk.qcow2"
    lamina.create(made, "qcow2", 4 << 20)
    return made


def test_bitmaps(path: Path) -> None:
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.add_bitmap("one")
        image.add_bitmap("off", 512, enabled=False)
        image.write(100_000, b"x")
        image.enable_bitmap("off")
        image.write(1 << 20, b"x")
        image.merge_bitmaps("one", [image.bitmaps["off"]])
        image.add_bitmap("gone")
        image.remove_bitmap("gone")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        found = {name: list(one.dirty(0, image.size)) for name, one in image.bitmaps.items()}
        assert found == {
            "one": [(65536, 131072), (1 << 20, (1 << 20) + 65536)],
            "off": [(1 << 20, (1 << 20) + 512)],
        }
        image.clear_bitmap("one")
        assert list(image.bitmaps["one"].dirty(0, image.size)) == []


def test_amend(path: Path) -> None:
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"kept")
        image.amend(size="8M", refcount_bits=64, lazy_refcounts=True)
        assert image.size == 8 << 20
        for wrong in ({"cluster_size": 512}, {"size": "1M", "refcount_bits": 3}):
            with pytest.raises(lamina.OptionError):
                image.amend(**wrong)
        assert image.size == 8 << 20
    found = lamina.info(path, format="qcow2").to_json()["format-specific"]["data"]
    assert (found["refcount-bits"], found["lazy-refcounts"]) == (64, True)
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 5) == b"kept\0"


def test_what_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(4096))
    with lamina.open(tmp_path / "disk.raw", format="raw", read_only=False) as image:
        for call in (lambda: image.add_bitmap("a"), lambda: image.amend(size=0)):
            with pytest.raises(lamina.UnsupportedFeature, match="raw"):
                call()
    above = {"driver": "stats", "image": {"driver": "qcow2", "file": str(path)}}
    with lamina.open(above, read_only=False) as image, pytest.raises(lamina.UnsupportedFeature, match="below"):
        image.amend(size=0)
    with lamina.open(path, format="qcow2") as image:
        for call in (lambda: image.add_bitmap("a"), lambda: image.amend(size=0)):
            with pytest.raises(lamina.ReadOnly):
                call()


def _add(image: lamina.Image, start: threading.Barrier, prefix: str, added: list[str]) -> None:
    start.wait()
    for number in range(50):
        try:
            image.add_bitmap(f"{prefix}.{number}")
        except lamina.Closed:
            return
        added.append(f"{prefix}.{number}")


def test_a_bitmap_that_was_added_beside_a_close_is_stored(path: Path) -> None:
    """A change that returned is on the disk after the close, and one that comes later is refused."""
    for turn in range(30):
        added: list[str] = []
        start = threading.Barrier(2)
        image = lamina.open(path, format="qcow2", read_only=False)
        thread = threading.Thread(target=_add, args=(image, start, str(turn), added))
        thread.start()
        start.wait()
        image.close()
        thread.join()
        with lamina.open(path, format="qcow2", read_only=False) as again:
            assert set(again.bitmaps) == set(added)
            for name in added:
                again.remove_bitmap(name)
