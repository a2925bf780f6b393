"""Answers about extents are bounded in rows, and what the pieces say together is what one whole answer says."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import LimitExceeded
from lamina.cli.main import main
from lamina.extents import Extents
from lamina.image import Image
from lamina.jobs.compare import compare
from lamina.jobs.windows import pairs, windows
from lamina.limits import Budget
from lamina.nbd import wire
from lamina.nbd.server.export import Export

KIB = 1 << 10
SIZE = 256 * KIB + 512


def filled(path: Path, dice: random.Random, size: int, **options: Any) -> Path:
    """A qcow2 image with data, zeros and nothing in turns that mean nothing."""
    lamina.create(path, "qcow2", size, cluster_size=512, **options)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for _ in range(60):
            at = dice.randrange(size)
            length = min(dice.choice([1, 512, 700, 4096]), size - at)
            if dice.random() < 0.5:
                image.write(at, b"x" * length)
            else:
                image.zero(at, length, unmap=True)
    return path


def holes(path: Path, dice: random.Random, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for at in range(0, size - 4096, 4096):
            if dice.random() < 0.5:
                file.seek(at)
                file.write(b"d" * 4096)
    return path


def qcow2(path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}


KINDS = ["raw", "chain", "offset", "truncate", "cow", "cache", "quorum", "memory"]


def graph(kind: str, folder: Path, dice: random.Random) -> dict[str, Any]:
    raw = {"driver": "raw", "file": {"driver": "file", "filename": str(holes(folder / "raw", dice, SIZE))}}
    filled(folder / "base", dice, SIZE - 64 * KIB)
    filled(folder / "middle", dice, SIZE - 32 * KIB, backing_file="base", backing_fmt="qcow2")
    chain = qcow2(filled(folder / "top", dice, SIZE, backing_file="middle", backing_fmt="qcow2"))
    other = qcow2(filled(folder / "other", dice, SIZE))
    return {
        "raw": raw,
        "chain": chain,
        "offset": {"driver": "offset", "offset": 1000, "size": SIZE - 2000, "image": chain},
        "truncate": {"driver": "truncate", "size": SIZE + 5000, "image": chain},
        "cow": {"driver": "cow", "image": chain},
        "cache": {"driver": "cache", "image": chain},
        "quorum": {"driver": "quorum", "children": [chain, other], "vote-threshold": 1},
        "memory": {"driver": "memory", "size": SIZE},
    }[kind]


def opened(kind: str, folder: Path, dice: random.Random) -> Image:
    image = lamina.open(graph(kind, folder, dice), read_only=kind not in ("cow", "cache", "memory"))
    if not image.read_only:
        for _ in range(20):
            at = dice.randrange(SIZE - 4096)
            image.write(at, b"new" * dice.choice([1, 300]))
            image.zero(dice.randrange(SIZE - 4096), 700)
    return image


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_say_what_the_whole_says(tmp_path: Path, seed: int, few_rows: Callable[[int], None], kind: str) -> None:
    dice = random.Random(f"{seed} {kind}")
    with opened(kind, tmp_path, dice) as image:
        whole = image.extents()
        for rows in (1, 2, 7, len(whole)):
            few_rows(rows)
            assert image.extents() == whole
            at = 0
            while at < image.size:
                found = image.root.extents(at, image.size - at)
                assert found.begin == at < found.end
                assert len(found) <= rows
                at = found.end
            pieces = list(image.windows())
            assert max(map(len, pieces)) <= rows
            assert Extents.concat(pieces).coalesce() == whole
            for grid in (512, 64 * KIB):
                blocks = [piece.align(grid) for piece in windows(image, 0, image.size, grid=grid)]
                assert Extents.concat(blocks).coalesce() == whole.align(grid)


def test_jobs_and_commands_say_what_they_said(
    tmp_path: Path, seed: int, few_rows: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    dice = random.Random(seed)
    graph("chain", tmp_path, dice)
    top, other = str(tmp_path / "top"), str(tmp_path / "other")

    def said() -> list[Any]:
        answers: list[Any] = []
        for words in (
            ["map", "--output=json", "-f", "qcow2", top],
            ["map", "-f", "qcow2", "--exact", top],
            ["io", "-f", "qcow2", "-c", "map", "-c", "alloc 0 256k", top],
            ["compare", "-s", "-f", "qcow2", "-F", "qcow2", top, other],
            ["convert", "-f", "qcow2", "-O", "raw", top, str(tmp_path / "out")],
            ["convert", "-n", "-f", "qcow2", "-O", "qcow2", top, str(tmp_path / "twin")],
        ):
            answers.append((main(words), capsys.readouterr().out))
        with lamina.open(tmp_path / "twin", format="qcow2") as twin, lamina.open(top, format="qcow2") as image:
            answers += [(tmp_path / "out").read_bytes(), twin.read(0, SIZE), compare(image, twin)]
            seen = list(pairs(image, twin, 0, SIZE, grid=4096))
            for side, whole in enumerate((image, twin)):
                pieces = [pair[side] for pair in seen]
                assert all(piece.end % 4096 == 0 for piece in pieces[:-1])
                assert Extents.concat(pieces).coalesce() == whole.extents()
        return answers

    filled(tmp_path / "twin", dice, SIZE)
    first = said()
    for rows in (1, 5):
        few_rows(rows)
        assert said() == first


@pytest.mark.parametrize("name", [wire.BASE_ALLOCATION, wire.EXACT, wire.ALLOCATION_DEPTH])
def test_an_nbd_server_tells_the_same(tmp_path: Path, seed: int, few_rows: Callable[[int], None], name: str) -> None:
    dice = random.Random(seed)
    with opened("chain", tmp_path, dice) as image:
        export = Export(image, "")
        first = export.status([name], 0, SIZE)
        one = export.status([name], 0, SIZE, one=True)
        for rows in (1, 2, 9):
            few_rows(rows)
            assert export.status([name], 0, SIZE) == first
            assert export.status([name], 0, SIZE, one=True) == one


def test_copy_on_read_keeps_all_that_was_read(tmp_path: Path, seed: int, few_rows: Callable[[int], None]) -> None:
    graph("chain", tmp_path, random.Random(seed))
    with lamina.open({"driver": "copy_on_read", "image": qcow2(tmp_path / "top")}, read_only=False) as image:
        few_rows(1)
        content = image.read(0, SIZE)
        assert set(image.extents().where(present=True).depth.tolist()) == {0}
        assert image.read(0, SIZE) == content


def test_more_rows_than_the_budget_has_are_refused(tmp_path: Path, seed: int, few_rows: Callable[[int], None]) -> None:
    path = filled(tmp_path / "disk", random.Random(seed), SIZE)
    few_rows(4)
    with lamina.open(path, format="qcow2", budget=Budget(rows=10)) as image:
        with pytest.raises(LimitExceeded, match=r"more than 10 extents .*windows\(\)"):
            image.extents()
        assert len(list(image.windows())) > 2
