"""One budget for a whole graph: what all its files make us keep, counted by what they store and not by what they say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import Budget, LimitExceeded
from lamina.cli.main import main
from lamina.image import Image

from .images import GIB, KIB, MIB, Victim


def chain(folder: Path, count: int, size: int, *, l1_bytes: int = 0, stored: bool = False, **options: Any) -> Path:
    """A chain of `count` images, each over the one before. `l1_bytes`: the length of their L1 tables, which lie in a hole at
    the end, or with `stored` are zeros that are written out."""
    below: dict[str, Any] = {}
    for index in range(count):
        path = folder / f"{index}.qcow2"
        lamina.create(path, "qcow2", size, **options, **below)
        if l1_bytes:
            found = Victim(path)
            at = -(-len(found.bytes) // found.cluster_size) * found.cluster_size
            found.set(l1_table_offset=at, l1_size=l1_bytes // 8, size=l1_bytes // 8 * found.cluster_size**2 // 8).save()
            os.truncate(path, at + l1_bytes)
            if stored:
                with path.open("r+b") as file:
                    file.seek(at)
                    file.write(bytes(l1_bytes))
        below = {"backing_file": path.name, "backing_fmt": "qcow2"}
    return path


def resident() -> int:
    """Memory of this process that is really there."""
    with open("/proc/self/status") as status:
        return sum(int(line.split()[1]) * KIB for line in status if line.startswith("RssAnon"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here")
def test_tables_in_holes_take_no_memory(tmp_path: Path) -> None:
    """33 files of 12 KiB, each with an L1 table of 32 MiB that is a hole."""
    top = chain(tmp_path, 33, MIB, cluster_size=512, l1_bytes=32 * MIB)
    assert top.stat().st_blocks * 512 < 64 * KIB
    assert top.stat().st_size > 30 * MIB
    before = resident()
    with lamina.open(top, format="qcow2") as image:
        assert image.read(64 * GIB, 512) == bytes(512)
        assert len(image.extents()) == 1
        assert resident() - before < 64 * MIB


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here")
def test_cached_tables_in_holes_take_no_memory(tmp_path: Path) -> None:
    """33 images with clusters of 2 MiB, each with four L2 tables that are holes."""
    cluster, below = 2 * MIB, {}
    for index in range(33):
        path = tmp_path / f"{index}.qcow2"
        lamina.create(path, "qcow2", MIB, cluster_size=cluster, **below)
        with path.open("rb") as file:
            found = Victim.__new__(Victim)
            found.path, found.bytes = path, bytearray(file.read(4096))
            header = found.header
        end = -(-path.stat().st_size // cluster) * cluster
        found.set(size=4 * cluster**2 // 8, l1_size=4)
        with path.open("r+b") as file:
            file.write(found.bytes)
            file.seek(header.l1_table_offset)
            file.write(b"".join((end + table * cluster).to_bytes(8, "big") for table in range(4)))
            file.truncate(end + 4 * cluster)
        below = {"backing_file": path.name, "backing_fmt": "qcow2"}
    before = resident()
    with lamina.open(path, format="qcow2") as image:
        for table in range(4):
            assert image.read(table * cluster**2 // 8, 512) == bytes(512)
        assert resident() - before < 128 * MIB


def test_tables_that_are_stored_count_together(tmp_path: Path) -> None:
    top = chain(tmp_path, 5, MIB, cluster_size=512, l1_bytes=512 * KIB, stored=True)
    lamina.open(top, format="qcow2", budget=Budget(memory=5 * 512 * KIB)).close()
    with pytest.raises(LimitExceeded, match="the L1 table needs 524288 bytes"):
        lamina.open(top, format="qcow2", budget=Budget(memory=5 * 512 * KIB - 1))
    # Two images at once are two budgets.
    with lamina.open(top, format="qcow2", budget=Budget(memory=5 * 512 * KIB)) as image:
        lamina.open(top, format="qcow2", budget=Budget(memory=5 * 512 * KIB)).close()
        assert image.size == 2 * GIB


def test_a_table_in_a_hole_is_written_like_any_other(tmp_path: Path) -> None:
    """What is not stored is zeros; writing into it, growing it and reading it back changes nothing of that."""
    path = chain(tmp_path, 1, 8 * GIB, cluster_size=512)  # 2 MiB of L1 table
    content = path.read_bytes()
    with path.open("wb") as file:
        file.truncate(len(content))
        for at in range(0, len(content), 4096):
            if any(content[at : at + 4096]):
                file.seek(at)
                file.write(content[at : at + 4096])
    assert path.stat().st_blocks * 512 < MIB
    places = [0, 4 * GIB, 8 * GIB - 512]
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for place in places:
            image.write(place, b"x" * 512)
        image.truncate(9 * GIB)
        image.write(9 * GIB - 512, b"y" * 512)
        image.flush()
        assert len(image.extents().where(data=True)) == 4
    with lamina.open(path, format="qcow2") as image:
        assert [image.read(place, 512) for place in places] == [b"x" * 512] * 3
        assert image.read(9 * GIB - 512, 512) == b"y" * 512
    assert main(["check", "-q", "-f", "qcow2", str(path)]) == 0


def test_members_are_enforced_and_can_be_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = str(chain(tmp_path, 5, MIB))

    def opened(**members: int) -> Image:
        return lamina.open(top, format="qcow2", budget=Budget(**members))

    opened(chain_depth=4).close()
    with pytest.raises(LimitExceeded, match="limit of 3 files"):
        opened(chain_depth=3)
    with pytest.raises(LimitExceeded, match="limit of 1 files"):
        opened(chain_depth=1)
    with pytest.raises(LimitExceeded, match="memory"):
        opened(memory=7)
    for command in (["map"], ["info", "--backing-chain"], ["compare", top]):
        more = ["-F", "qcow2"] if command[0] == "compare" else []
        assert main([*command, "-f", "qcow2", *more, "--limits", "chain-depth=4", top]) == 0
        assert main([*command, "-f", "qcow2", *more, "--limits", "chain-depth=3", top]) != 0
        assert "limit of 3 files" in capsys.readouterr().err
    assert main(["io", "-r", "-f", "qcow2", "--limits", "memory=7", "-c", "length", top]) == 1
    assert "--limits memory=" in capsys.readouterr().err
    for wrong, words in (
        ("chain-depth=151", "the deepest possible chain"),
        ("depth=1", "the limits are chain-depth"),
        ("max-output=1G", "use --max-output"),
        ("memory=-1", "-1"),
        ("memory", "memory"),
    ):
        assert main(["map", "-f", "qcow2", "--limits", wrong, top]) == 1
        assert words in capsys.readouterr().err


def test_deep_images_cache_less(tmp_path: Path) -> None:
    top = chain(tmp_path, 4, MIB)
    with lamina.open(top, format="qcow2", budget=Budget(cache_bytes=MIB)) as image:
        found, node = [], image.node
        while True:
            found.append(sum(node._caches))  # type: ignore[attr-defined]
            if "backing" not in node.children:
                break
            node = node.children["backing"].node
    assert found == [MIB, MIB // 2, MIB // 3, MIB // 4]
