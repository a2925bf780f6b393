"""The Nth write to a file fails while an image is committed or rebased: an error says so, the overlay reads the same at once
and from its files, no check finds a corruption, and the job can be started again."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import BlockIOError, LaminaError
from lamina.image import Image
from lamina.jobs.commit import commit
from lamina.jobs.rebase import rebase
from lamina.testing.image_checks import check_whole
from lamina.testing.persistence import Record
from lamina.testing.recorder import Recorder
from tests import evidence
from tests.crash.test_commit_rebase_power_loss import GEOMETRIES, Files, content_of, overlay
from tests.unit.test_convert_backing import fill

#: The number of images for each geometry; `make soak` sets more.
IMAGES = 20 if os.environ.get("LAMINA_INTERRUPTS") == "all" else 3
CHANGES = ("write", "zero", "discard", "truncate", "flush_start")


class Failing(Recorder):
    """Storage whose operation number `nth` that changes or flushes it fails, and with `lasting` each one after it."""

    def __init__(self, content: bytes, nth: int, lasting: bool) -> None:
        super().__init__(content)
        self.nth, self.lasting, self.done = nth, lasting, 0

    def note(self, record: Record) -> None:
        if record.kind in CHANGES:
            self.done += 1
            if self.done == self.nth or (self.lasting and 0 < self.nth < self.done):
                raise BlockIOError("it fails here", errno=errno.ENOSPC if self.nth % 2 else errno.EIO)
        super().note(record)


def run(
    files: Files, job: Callable[[Image], object], which: str, nth: int, lasting: bool
) -> tuple[int, tuple[bytes, bytes], bool]:
    """(operations on the file `which`, both files afterwards, whether the job failed)"""
    top, base = (
        Failing(content, nth if name == which else 0, lasting)
        for name, content in (("top", files.top), ("base", files.base))
    )
    failed = False
    image = overlay(top, base, read_only=False)
    try:
        try:
            job(image)
        except LaminaError:
            failed = True
        if not failed or not lasting:
            assert content_of(image) == files.disk
        left = bytes(top.content), bytes(base.content)
        if failed and not lasting:  # the next try succeeds
            job(image)
            assert content_of(image) == files.disk
    finally:
        if failed:
            with suppress(LaminaError):
                image.close()
        image.close()
    return {"top": top, "base": base}[which].done, left, failed


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("options", GEOMETRIES, ids=lambda options: ",".join(map(str, options.values())))
@pytest.mark.parametrize("name", ["commit", "rebase", "rebase-to-none"])
def test_each_operation_fails_in_its_turn(
    tmp_path: Path, seed: int, name: str, options: dict[str, Any], lasting: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    points = 0
    for number in range(IMAGES):
        dice = random.Random(f"{seed}/{options}/{number}")
        files = Files(dice, options)
        new = Recorder(files.base)
        with overlay(new, None, read_only=False) as image:
            fill(image, dice, 6)
        (tmp_path / "new").write_bytes(new.content)
        jobs: dict[str, Callable[[Image], object]] = {
            "commit": commit,
            "rebase": lambda image: rebase(image, str(tmp_path / "new"), "qcow2"),
            "rebase-to-none": lambda image: rebase(image, None),
        }
        for which in ("top", "base") if name == "commit" else ("top",):
            count, _, failed = run(files, jobs[name], which, 0, lasting)
            assert not failed
            for nth in range(1, count + 1):
                print(f"LAMINA_SEED={seed}: operation {nth} of {count} on {which}, image {number}")
                _, (top, base), failed = run(files, jobs[name], which, nth, lasting)
                points += 1
                header_names_it = name == "commit" or not replaced(top)
                below: bytes | None = base
                if not header_names_it:
                    below = bytes(new.content) if name == "rebase" else None
                files.require_same(top, below)
                with overlay(Recorder(base), None, read_only=True) as image:
                    check_whole(image)
                if header_names_it:
                    run_again(files, top, base, jobs[name])
    evidence.count("points (operation, request that fails, fault)", points)
    with capsys.disabled():
        print(f"\n{name}, {options}: {points} points")


def replaced(top: bytes) -> bool:
    """Whether the image names another backing file than at first."""
    from lamina.formats.qcow2.header import Header
    from lamina.request import Child

    return Header.read(Child(Recorder(top), "file")).backing_file != "base"


def run_again(files: Files, top: bytes, base: bytes, job: Callable[[Image], object]) -> None:
    with overlay(Recorder(top), Recorder(base), read_only=False) as image:
        job(image)
        assert content_of(image) == files.disk
