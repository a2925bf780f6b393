"""Internal snapshots from the library: what is refused, requests beside them, limits, and what is given back."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

import lamina
from lamina.limits import Budget

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, cluster_size=4096)
    return path


def test_a_snapshot_keeps_the_disk_of_then(path: Path) -> None:
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"then" * 1000)
        made = image.create_snapshot("before")
        assert (made.id, made.name, made.size) == ("1", "before", SIZE)
        image.write(0, b"now!" * 1000)
        image.truncate(2 * SIZE)
        image.write(SIZE, b"behind")
        assert image.read(0, 4) == b"now!"
        assert image.create_snapshot("after").id == "2"
        image.apply_snapshot("1")
        assert image.size == SIZE
        assert image.read(0, 4) == b"then"
        image.apply_snapshot("2")
        assert image.size == 2 * SIZE
        assert image.read(SIZE, 6) == b"behind"
        image.delete_snapshot("1")
        image.delete_snapshot("2")
        assert image.snapshots() == ()
        assert image.read(0, 4) == b"now!"
    assert lamina.check(path, format="qcow2") == lamina.check(path, format="qcow2")._replace(leaks=0, corruptions=0)


def test_what_is_refused(path: Path) -> None:
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.create_snapshot("one")
        for name, match in (("one", "already"), ("", "empty"), ("x" * 256, "too long"), ("a\0b", "empty")):
            with pytest.raises(lamina.OptionError, match=match):
                image.create_snapshot(name)
        for change in (image.apply_snapshot, image.delete_snapshot):
            with pytest.raises(lamina.OptionError, match="no snapshot with the id '7'"):
                change("7")
        with pytest.raises(lamina.OptionError, match="no snapshot with the name 'x'"):
            lamina.open({"driver": "qcow2", "file": str(path), "snapshot-name": "x"}, force_share=True)
        with pytest.raises(lamina.OptionError, match=r"no snapshot with the id 'a\\n\\x1b'"):
            image.delete_snapshot("a\n\x1b")
    with lamina.open(path, format="qcow2") as image, pytest.raises(lamina.ReadOnly):
        image.create_snapshot("two")
    with pytest.raises(lamina.OptionError, match="only be read"):
        lamina.open({"driver": "qcow2", "file": str(path), "snapshot-id": "1"}, read_only=False)
    raw = path.with_name("disk.raw")
    lamina.create(raw, "raw", SIZE)
    with lamina.open(raw, format="raw", read_only=False) as image:
        with pytest.raises(lamina.UnsupportedFeature, match="snapshots"):
            image.create_snapshot("one")
        with pytest.raises(lamina.UnsupportedFeature, match="snapshots"):
            image.snapshots()


def test_counts_of_one_bit_count_no_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, refcount_bits=1)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"x" * SIZE)
        image.flush()
        before = path.read_bytes()
        with pytest.raises(lamina.LimitExceeded, match="1 bits"):
            image.create_snapshot("one")
        assert path.read_bytes() == before
        image.write(0, b"y" * SIZE)
    assert lamina.check(path, format="qcow2").clean


def test_memory_is_booked_before_it_is_allocated(path: Path) -> None:
    with lamina.open(path, format="qcow2", read_only=False, budget=Budget(memory=10_000)) as image:
        with pytest.raises(lamina.LimitExceeded, match="reference counts of all clusters"):
            image.create_snapshot("one")
        image.write(0, b"x")
        assert image.snapshots() == ()


def test_writers_beside_snapshots(path: Path) -> None:
    """Each snapshot is of one moment: of two places that a writer fills one after the other, the second is never newer."""
    rounds, stop = 12, threading.Event()
    with lamina.open(path, format="qcow2", read_only=False) as image:

        def write(number: int) -> None:
            rng = random.Random(number)
            value = 0
            while not stop.is_set():
                value = value % 250 + 1
                for at in (0, 65536):
                    image.write(at + 8192 * number, bytes([value]) * rng.choice((512, 4096, 6000)))

        threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        try:
            for number in range(rounds):
                image.create_snapshot(f"s{number}")
                if number % 3 == 2:
                    image.delete_snapshot(str(number))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        kept = [one.id for one in image.snapshots()]
    assert len(kept) == rounds - rounds // 3
    assert lamina.check(path, format="qcow2").clean
    for id in kept:
        with lamina.open({"driver": "qcow2", "file": str(path), "snapshot-id": id}) as image:
            for number in range(3):
                first, second = (image.read(at + 8192 * number, 1)[0] for at in (0, 65536))
                assert first == second or first == second % 250 + 1 or second == 0


def test_space_that_only_the_snapshot_used_is_given_back(path: Path) -> None:
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"x" * SIZE)
        image.create_snapshot("one")
        image.write(0, b"y" * SIZE)
        image.flush()
        full = path.stat().st_blocks
        image.delete_snapshot("1")
        assert path.stat().st_blocks <= full - SIZE // 512 * 9 // 10
        assert image.read(0, SIZE) == b"y" * SIZE
