"""`flatten`: the image reads as before, needs no backing file any more, and holds no more than it must."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina import Policy
from lamina.errors import BlockIOError, Cancelled, LaminaError, LimitExceeded, OptionError, ReadOnly, UnsupportedFeature
from lamina.image import Image
from lamina.jobs.flatten import flatten
from lamina.jobs.progress import Monitor
from lamina.storage.memory import MemoryStorage
from tests.random_changes import change

KIB, MIB = 1 << 10, 1 << 20


def chain(folder: Path, dice: random.Random) -> Path:
    """A chain of two to four files of different sizes and geometries; the top is the last."""
    below: dict[str, Any] = {}
    path = folder
    for number in range(dice.randrange(2, 5)):
        path = folder / f"{number}"
        size = dice.choice([64, 100, 300, 1000]) * KIB + dice.choice([0, 0, 512])
        options: dict[str, Any] = {"cluster_size": dice.choice([512, 4 * KIB, 64 * KIB])}
        if dice.random() < 0.3:
            options = {"extended_l2": True, "cluster_size": 64 * KIB}
        elif dice.random() < 0.2:
            options["compat"] = "0.10"
        if not number and dice.random() < 0.3:
            lamina.create(path, "raw", size + dice.choice([0, 1, 300]))
        else:
            lamina.create(path, "qcow2", size, **options, **below)
        format = "raw" if path.read_bytes()[:4] != b"QFI\xfb" else "qcow2"
        with lamina.open(path, format=format, read_only=False) as image:
            change(image, dice, dice.randrange(8))
        below = {"backing_file": path.name, "backing_fmt": format}
    return path


@settings(max_examples=25)
@given(st.integers(0, 1 << 60), st.booleans())
def test_the_disk_stays_and_stands_alone(tmp_path_factory: pytest.TempPathFactory, seed: int, small: bool) -> None:
    dice = random.Random(seed)
    path = chain(tmp_path_factory.mktemp("flatten"), dice)
    with pytest.MonkeyPatch.context() as patch, lamina.open(path, format="qcow2", read_only=False) as image:
        if small:
            patch.setattr("lamina.jobs.convert_transfer.BUFFER", 64 * KIB)
        before = image.read(0, image.size)
        wanted = [(row.start, row.end) for row in image.extents() if row.depth > 0 and not row.zero]
        written = flatten(image).written
        assert image.read(0, image.size) == before
        assert image.extents().depth.max() == 0
        unit = max(image.node.limits.zero_alignment, 512)
        assert written <= sum(-(-hi // unit) * unit - lo // unit * unit for lo, hi in wanted)
        assert image.node.check().clean  # type: ignore[attr-defined]
        assert flatten(image).written == 0
    for other in path.parent.iterdir():
        if other != path:
            other.unlink()
    with lamina.open(path, format="qcow2", references=Policy.none()) as image:
        assert image.read(0, image.size) == before
        assert image.node.check().clean  # type: ignore[attr-defined]
    assert lamina.info(path, format="qcow2").backing_filename is None


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """2 MiB over a base of 4 MiB, which has data in its first 3 MiB but for zeros in the second."""
    lamina.create(tmp_path / "base", "qcow2", 4 * MIB)
    with lamina.open(tmp_path / "base", format="qcow2", read_only=False) as image:
        image.write(0, b"a" * MIB)
        image.write(MIB, bytes(MIB))
        image.write(2 * MIB, b"c" * MIB)
    lamina.create(tmp_path / "top", "qcow2", 2 * MIB, backing_file="base", backing_fmt="qcow2")
    with lamina.open(tmp_path / "top", format="qcow2", read_only=False) as image:
        image.write(64 * KIB, b"t" * 64 * KIB)
    return tmp_path / "top"


def test_what_nobody_sees_is_not_copied(overlay: Path) -> None:
    with lamina.open(overlay, format="qcow2", read_only=False) as image:
        image.zero(256 * KIB, 64 * KIB)
        assert flatten(image).written == MIB - 128 * KIB
    assert overlay.stat().st_size < 2 * MIB
    with lamina.open(overlay, format="qcow2", read_only=False) as image:
        image.truncate(4 * MIB)
        assert image.read(MIB, 3 * MIB) == bytes(3 * MIB)


def test_bitmaps_record_nothing(overlay: Path) -> None:
    with lamina.open(overlay, format="qcow2", read_only=False) as image:
        image.add_bitmap("b")
        flatten(image)
        assert list(image.bitmaps["b"].dirty(0, image.size)) == []
        image.write(0, b"x")
        assert list(image.bitmaps["b"].dirty(0, image.size)) == [(0, 64 * KIB)]


def test_an_image_without_a_backing_file_is_left_alone(overlay: Path) -> None:
    base = overlay.with_name("base")
    before = base.read_bytes()
    with lamina.open(base, format="qcow2", read_only=False) as image:
        assert flatten(image).written == 0
    assert base.read_bytes() == before


def test_a_reader_may_not(overlay: Path) -> None:
    with lamina.open(overlay, format="qcow2") as image, pytest.raises(ReadOnly):
        flatten(image)


def test_what_cannot_be_flattened(overlay: Path) -> None:
    base = overlay.with_name("base")
    with lamina.open(base, format="raw", read_only=False) as image, pytest.raises(UnsupportedFeature, match="raw"):
        flatten(image)
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(overlay)}, "backing": None}
    with lamina.open(spec, read_only=False) as image, pytest.raises(OptionError, match="not open"):
        flatten(image)
    with lamina.open(overlay, format="qcow2", read_only=False) as image:
        image.create_snapshot("s")
        with pytest.raises(OptionError, match="snapshots"):
            flatten(image)
    assert lamina.info(overlay, format="qcow2").backing_filename == "base"


@pytest.mark.parametrize("what", ["read", "write", "flush", "stop"])
def test_after_a_failure_the_disk_is_as_before_and_the_next_call_goes_on(
    overlay: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("lamina.jobs.convert_transfer.BUFFER", 64 * KIB)
    top: dict[str, Any] = {"driver": "file", "filename": str(overlay)}
    base: dict[str, Any] = {"driver": "file", "filename": str(overlay.with_name("base"))}
    faults = {"driver": "faults", "image": base if what == "read" else top}
    spec = {"driver": "qcow2", "file": faults if what in ("write", "flush") else top}
    spec["backing"] = {"driver": "qcow2", "file": faults if what == "read" else base}
    monitor = Monitor()
    with lamina.open(spec, read_only=False) as image:
        before = image.read(0, image.size)
        node: Any = image.node
        below = node.backing.node.file.node if what == "read" else node.file.node
        if what != "stop":
            below.add(kind=what, after=1 if what != "flush" else 0)
        else:
            monkeypatch.setattr(monitor, "update", lambda *_: monitor.cancel() if not monitor.cancelled else _stop())
        with pytest.raises(BlockIOError if what != "stop" else Cancelled):
            flatten(image, monitor=monitor)
        if what != "stop":
            below.clear()
        assert lamina.info(overlay, format="qcow2", force_share=True).backing_filename == "base"
        assert image.read(0, image.size) == before
    with lamina.open(overlay, format="qcow2", read_only=False) as image:
        assert image.read(0, image.size) == before
        left = flatten(image).written
        assert left < MIB
        assert image.read(0, image.size) == before
        assert image.node.check().clean  # type: ignore[attr-defined]


def _stop() -> None:
    raise Cancelled("stopped")


def test_more_than_allowed_is_not_written(overlay: Path) -> None:
    with lamina.open(overlay, format="qcow2", read_only=False) as image, pytest.raises(LimitExceeded):
        flatten(image, max_output=MIB // 2)
    assert lamina.info(overlay, format="qcow2").backing_filename == "base"
    with lamina.open(overlay, format="qcow2", read_only=False) as image:
        flatten(image, max_output=MIB)


def test_nobody_writes_meanwhile(overlay: Path) -> None:
    with lamina.open(overlay, format="qcow2", read_only=False) as image:
        with image.share(), pytest.raises(OptionError, match="writes to this graph"):
            flatten(image)
        errors: list[BaseException] = []

        def between(done: int, total: int) -> None:
            try:
                image.write(0, b"x")
            except LaminaError as error:
                errors.append(error)

        flatten(image, monitor=Monitor(between))
        assert isinstance(errors[0], ReadOnly)
        image.write(0, b"x")


def test_of_a_disk_in_memory() -> None:
    with Image(MemoryStorage(512)) as image, pytest.raises(UnsupportedFeature):
        flatten(image)
