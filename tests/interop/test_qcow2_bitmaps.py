"""Persistent dirty bitmaps between QEMU and Lamina: each records what it writes, and reads what the other stored."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from tests.conftest import Qemu

SIZE = 3 << 20


def told(qemu: Qemu, path: Path) -> list[dict[str, Any]]:
    data = json.loads(qemu.img("info", "--output=json", "-f", "qcow2", path).stdout)["format-specific"]["data"]
    found = lamina.info(path, format="qcow2").to_json()["format-specific"]["data"]
    assert found.get("bitmaps") == data.get("bitmaps")
    return data.get("bitmaps", [])  # type: ignore[no-any-return]


def dirty(path: Path, name: str) -> list[tuple[int, int]]:
    with lamina.open(path, format="qcow2") as image:
        return list(image.node.bitmaps[name].dirty(0, image.size))


def known_to(qemu: Qemu, path: Path, name: str) -> list[tuple[int, int]]:
    """What QEMU reads of a bitmap: it merges it into one of its own."""
    granularity = next(one["granularity"] for one in told(qemu, path) if one["name"] == name)
    qemu.img("bitmap", "--add", "--disable", "-g", str(granularity), "--merge", name, path, "copy")
    try:
        return dirty(path, "copy")
    finally:
        qemu.img("bitmap", "--remove", path, "copy")


def granules(ranges: list[tuple[int, int]], granularity: int) -> list[tuple[int, int]]:
    numbers = sorted({n for begin, end in ranges for n in range(begin // granularity, -(-end // granularity))})
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number * granularity:
            found[-1] = (found[-1][0], (number + 1) * granularity)
        else:
            found.append((number * granularity, (number + 1) * granularity))
    return [(begin, min(end, SIZE)) for begin, end in found]


@pytest.mark.peers
@pytest.mark.parametrize("cluster", [512, 4096, 65_536])
def test_both_record_and_store(tmp_path: Path, qemu: Qemu, cluster: int) -> None:
    path = tmp_path / "disk.qcow2"
    rng = random.Random(cluster)
    lamina.create(path, "qcow2", SIZE, cluster_size=cluster)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.node.add_bitmap("ours", 4096)  # type: ignore[attr-defined]
    qemu.img("bitmap", "--add", "-g", "512", path, "theirs")
    qemu.img("bitmap", "--add", "--disable", "-g", "64k", path, "off")
    written: list[tuple[int, int]] = []
    for turn in range(6):
        if turn % 2:
            with lamina.open(path, format="qcow2", read_only=False) as image:
                for _ in range(6):
                    offset = rng.randrange(SIZE)
                    length = min(rng.choice((1, 512, 5000, 70_000)), SIZE - offset)
                    if rng.randrange(3):
                        image.write(offset, rng.randbytes(length))
                    else:
                        image.zero(offset, length, unmap=True)
                    written.append((offset, offset + length))
        else:
            offset, length = rng.randrange(SIZE // 512) * 512, 8192
            length = min(length, SIZE - offset)
            qemu.io("-f", "qcow2", "-c", f"write -P 7 {offset} {length}", path)
            written.append((offset, offset + length))
        qemu.img("check", path)
        assert lamina.check(path, format="qcow2").clean
        assert [one["flags"] for one in told(qemu, path)] == [["auto"], ["auto"], []]
        for name, granularity in (("ours", 4096), ("theirs", 512)):
            # A zero or a write that is not whole sectors is widened to them, and to clusters of nothing else.
            least, most = granules(written, granularity), granules(written, max(granularity, cluster))
            assert covers(dirty(path, name), least)
            assert covers(most, dirty(path, name))
            assert known_to(qemu, path, name) == dirty(path, name)
        assert dirty(path, "off") == []
    qemu.img("bitmap", "--merge", "ours", path, "off")
    assert dirty(path, "off") == granules(dirty(path, "ours"), 65_536)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        node: Any = image.node
        node.merge_bitmaps("theirs", [node.bitmaps["off"]])
        node.clear_bitmap("ours")
        node.remove_bitmap("off")
    assert known_to(qemu, path, "ours") == []
    assert covers(known_to(qemu, path, "theirs"), granules(written, 65_536))
    qemu.img("bitmap", "--remove", path, "theirs")
    qemu.img("bitmap", "--remove", path, "ours")
    assert told(qemu, path) == []
    qemu.img("check", path)
    assert lamina.check(path, format="qcow2").clean


def covers(outer: list[tuple[int, int]], inner: list[tuple[int, int]]) -> bool:
    return all(any(begin <= low and high <= end for begin, end in outer) for low, high in inner)


@pytest.mark.peers
def test_an_image_that_was_not_closed(tmp_path: Path, qemu: Qemu) -> None:
    """Bitmaps in use are inconsistent for both, and can only be removed."""
    path, crashed = tmp_path / "disk.qcow2", tmp_path / "crashed.qcow2"
    lamina.create(path, "qcow2", SIZE)
    qemu.img("bitmap", "--add", path, "one")
    qemu.img("bitmap", "--add", "--disable", path, "two")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"x")
        image.flush()
        crashed.write_bytes(path.read_bytes())
    assert [one["flags"] for one in told(qemu, crashed)] == [["in-use", "auto"], []]
    qemu.img("check", crashed)
    with lamina.open(crashed, format="qcow2", read_only=False) as image:
        node: Any = image.node
        assert list(node.bitmaps) == ["two"]
        for change in (node.clear_bitmap, lambda name: node.enable_bitmap(name, False)):
            with pytest.raises(lamina.OptionError, match="inconsistent"):
                change("one")
        with pytest.raises(lamina.OptionError, match="inconsistent"):
            image.truncate(2 * SIZE)
        image.write(512, b"y")
    assert [one["flags"] for one in told(qemu, crashed)] == [["in-use", "auto"], []]
    assert qemu.img("bitmap", "--clear", crashed, "one", check=False).returncode
    with lamina.open(crashed, format="qcow2", read_only=False) as image:
        image.node.remove_bitmap("one")  # type: ignore[attr-defined]
    assert [one["name"] for one in told(qemu, crashed)] == ["two"]
    qemu.img("check", crashed)
    assert lamina.check(crashed, format="qcow2").clean
