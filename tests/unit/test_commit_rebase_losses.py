"""commit and rebase: what must not be lost, whatever the layers are, and whoever else uses the graph."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.creation import create
from lamina.errors import OptionError, ReadOnly
from lamina.image import Image
from lamina.jobs.beneath import Backing, layers_above
from lamina.jobs.commit import commit
from lamina.jobs.convert_plan import Plan
from lamina.jobs.diff import diff
from lamina.jobs.progress import Monitor
from lamina.jobs.rebase import rebase

from .test_commit_rebase import KIB, MIB, content
from .test_commit_rebase_users import chain

__all__ = ["chain"]


def test_nobody_becomes_a_writer_or_edits_meanwhile(chain: Path) -> None:
    """A write that was accepted would be lost with what the overlay gives up, and an edit would move the layers."""
    create(chain / "above", "qcow2", MIB)
    above = {"driver": "qcow2", "file": {"driver": "file", "filename": str(chain / "above")}}
    with (
        lamina.open(chain / "top", format="qcow2", read_only=False) as image,
        image.share(read_only=True) as other,
    ):

        def stack() -> None:
            with other.edit() as edit:
                edit.overlay(above)

        tries = [
            lambda: image.reopen(read_only=False),
            lambda: other.reopen(read_only=False),
            lambda: Image(image.node),
            lambda: commit(image),
            stack,
        ]
        refused = 0

        def report(done: int, total: int) -> None:
            nonlocal refused
            for attempt in tries:
                with pytest.raises((OptionError, ReadOnly)):
                    attempt()
                refused += 1
            with other.share() as reader:
                reader.read(0, 512)
            with pytest.raises(ReadOnly):
                image.write(0, b"x")

        expected = image.read(0, MIB)
        commit(image, monitor=Monitor(report))
        rebase(image, "new", "raw", monitor=Monitor(report))
        assert refused
        assert image.read(0, MIB) == expected
        image.write(0, b"x")
        stack()


def test_a_second_job_that_is_refused_leaves_the_first_one_alone(chain: Path) -> None:
    with lamina.open(chain / "top", format="qcow2", read_only=False) as image:
        begun, shared = threading.Event(), threading.Event()
        wrong: list[BaseException | None] = []

        class Late(Image):
            """Its jobs go on, from their first steps, when the other job has begun."""

            def share(self, *arguments: Any, **options: Any) -> Image:
                shared.set()
                begun.wait()
                return super().share(*arguments, **options)

        late = Late.__new__(Late)
        late.__dict__.update(image.__dict__)

        def second() -> None:
            try:
                commit(late)
            except OptionError:
                wrong.append(None)
            except BaseException as error:  # noqa: BLE001 - raised in the thread of the test
                wrong.append(error)

        thread = threading.Thread(target=second)
        thread.start()
        shared.wait()

        def report(done: int, total: int) -> None:
            begun.set()
            thread.join()
            with pytest.raises(ReadOnly):
                image.write(0, b"x")

        commit(image, monitor=Monitor(report))
        assert wrong == [None]
        image.write(0, b"x")


@pytest.mark.parametrize("how", ["snapshot", "cow", "memory", "null"])
def test_nothing_is_committed_to_what_forgets_it(chain: Path, how: str) -> None:
    expected = content((chain / "top", "qcow2"))
    mid = {"driver": "qcow2", "file": {"driver": "file", "filename": str(chain / "mid")}}
    backing: dict[str, Any] = {
        "snapshot": mid | {"snapshot": True},
        "cow": {"driver": "throttle", "image": {"driver": "cow", "image": mid}},
        "memory": {"driver": "raw", "file": {"driver": "memory", "size": MIB}},
        "null": {"driver": "raw", "file": {"driver": "null", "size": MIB}},
    }[how]
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(chain / "top")}, "backing": backing}
    for options in {}, {"empty": False}:
        with lamina.open(spec, read_only=False) as image, pytest.raises(OptionError, match="discarded"):
            commit(image, **options)
    assert content((chain / "top", "qcow2")) == expected


def test_a_name_of_two_backing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One relative to the image, one relative to the working directory: nobody knows which of them is meant."""
    for folder in "here", "there":
        (tmp_path / folder).mkdir()
    here, there = tmp_path / "here" / "base", tmp_path / "there" / "base"
    create(there, "qcow2", MIB)
    create(here, "qcow2", backing_file="../there/base", backing_fmt="qcow2")
    create(tmp_path / "here" / "top", "qcow2", backing_file="base", backing_fmt="qcow2")
    granted = lamina.Policy.beneath(tmp_path)
    with lamina.open(tmp_path / "here" / "top", format="qcow2", read_only=False, references=granted) as image:
        image.write(0, b"t" * 512)
        monkeypatch.chdir(there.parent)
        with pytest.raises(OptionError, match="relative"):
            commit(image, "base")
        commit(image, there)
    assert content((there, "qcow2"))[:1] == b"t"


def test_rebase_compares_the_file_that_it_names(chain: Path) -> None:
    """`file:` is a prefix on a command line, and part of a path inside an image."""
    with lamina.open(chain / "new", format="raw", read_only=False) as image:
        image.write(0, b"n" * 512)
    create(chain / "file:new", "raw", MIB)
    expected = content((chain / "top", "qcow2"))
    with lamina.open(chain / "top", format="qcow2", read_only=False) as image:
        rebase(image, "file:new", "raw")
    assert lamina.info(chain / "top", format="qcow2").backing_filename == "new"
    assert content((chain / "top", "qcow2")) == expected


def test_a_backing_file_that_is_not_open_is_not_forgotten(chain: Path) -> None:
    expected = content((chain / "top", "qcow2"))
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(chain / "top")}, "backing": None}
    for new in (None, None), ("new", "raw"):
        with lamina.open(spec, read_only=False) as image, pytest.raises(OptionError, match="not open"):
            rebase(image, *new)
    assert content((chain / "top", "qcow2")) == expected


@pytest.mark.parametrize(("kind", "depth"), [("data file", 1), ("data file", 2), ("encrypted", 2), ("both", 1)])
def test_layers_of_all_kinds_show_what_they_own(chain: Path, kind: str, depth: int) -> None:
    """`mid` or `top` is an image with an external data file, or an encrypted one."""
    which = "top" if depth == 1 else "mid"
    spec: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(chain / which)}}
    options: dict[str, Any] = {"backing_file": "mid" if which == "top" else "base", "backing_fmt": "qcow2"}
    if kind != "encrypted":
        options["data_file"] = "data"
    if kind != "data file":
        secret = lamina.Secret(b"word")
        options["encrypt"] = {"format": "luks", "key-secret": secret, "iter-time": 10}
        spec["encrypt"] = {"key-secret": secret}
    create(chain / which, "qcow2", **options)
    granted = lamina.Policy.beneath(chain)
    with lamina.open(spec, read_only=False, references=granted) as image:
        image.write(300 * KIB, b"e" * 50 * KIB)
        image.zero(64 * KIB, 30 * KIB)
    if which == "mid":
        spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(chain / "top")}, "backing": spec}
    with lamina.open(spec, read_only=False, references=granted) as image:
        expected = image.read(0, MIB)
        below = chain / ("mid" if depth == 1 else "base")
        with lamina.open(below, format="qcow2", references=granted) as base:
            assert layers_above(image.node, base.node) == depth
        commit(image, below)
        assert image.read(0, MIB) == expected
    with lamina.open(below, format="qcow2", references=granted) as base:
        assert base.read(0, MIB) == expected
    with lamina.open(spec, read_only=False, references=granted) as image:
        rebase(image, "base", "qcow2", references=granted)
        image.write(300 * KIB, b"f")  # where the data file still has bytes of before
        expected = expected[: 300 * KIB] + b"f" + expected[300 * KIB + 1 :]
        rebase(image, None)
        assert image.read(0, MIB) == expected


@pytest.mark.parametrize("job", ["convert", "diff"])
def test_an_overlay_that_is_stacked_meanwhile_hides_no_layer(
    chain: Path, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    """All depths are larger afterwards by one."""
    monkeypatch.setattr(lamina.limits, "MAX_ROWS", 4)  # so that the job queries the status part by part
    create(chain / "above", "qcow2", MIB)
    above = {"driver": "qcow2", "file": {"driver": "file", "filename": str(chain / "above")}}
    with lamina.open(chain / "top", format="qcow2", read_only=False) as image:
        offsets = range(0, MIB, 128 * KIB)
        for offset in offsets:
            image.write(offset + 7 * KIB, b"t" * KIB)
        owned = {at // (64 * KIB) for lo, hi in stored(image) for at in range(lo, hi, 64 * KIB)}
        with lamina.open(chain / "mid", format="qcow2") as mid, image.share() as own:
            if job == "convert":
                plan = Plan(own, mid, blank=True, smallest_hole=4096, below=Backing(depth=1), offload="")
                found = ((start, start + length) for _, start, length in plan.ranges())
            else:
                found = ((at, at + length) for at, length in diff(mid, own, granularity=64 * KIB, content=False))
            ranges = [next(found)]
            with image.edit() as edit:
                edit.overlay(above)
            ranges += found
    assert {at // (64 * KIB) for lo, hi in ranges for at in range(lo, hi, 64 * KIB)} == owned
    assert len(ranges) > 2


def stored(image: Image) -> list[tuple[int, int]]:
    """The ranges of data of the top layer."""
    found = [row for rows in image.root.windows(0, image.size) for row in rows]
    return [(row.start, row.end) for row in found if row.depth == 0 and not row.zero]
