"""`lamina.info`, `check`, `explain` and the others of `inspection` with an image that is open: the results are those of its
file, and the image stays open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import OptionError, UnsupportedFeature
from lamina.filters.stats import Stats
from tests.random_changes import changed_meanwhile

from .api_images import MIB, disk, overlay

FORMATS = ("qcow2", "raw")

#: What is asked, by the name of the function: of the source, with these options.
ASKED: dict[str, Callable[..., Any]] = {
    "info": lamina.info,
    "info_chain": lamina.info_chain,
    "check": lamina.check,
    "explain": lambda source, **how: lamina.explain(source, 0, 70_000, MIB, **how),
    "explain_guest": lambda source, **how: lamina.explain_guest(source, 3 * MIB + 5, **how),
    "structures": lamina.structures,
}


def outcome(ask: Callable[..., Any], source: Any, **how: Any) -> Any:
    """The result, or the kind and the text of the error."""
    try:
        return ask(source, **how)
    except lamina.LaminaError as error:
        return type(error), str(error)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ASKED)
def test_the_results_are_those_of_the_file(name: str, format: str, tmp_path: Path) -> None:
    path = disk(tmp_path / f"disk.{format}", format)
    with lamina.open(path, format=format) as image:
        expected = outcome(ASKED[name], path, format=format)
        assert outcome(ASKED[name], image) == expected
        assert not image.closed
        assert len(image.read(0, 512)) == 512


@pytest.mark.parametrize("name", ASKED)
def test_the_chain_is_that_of_the_open_image(name: str, tmp_path: Path) -> None:
    top = overlay(tmp_path / "top.qcow2", disk(tmp_path / "base.qcow2"))
    with lamina.open(top, format="qcow2") as image:
        expected = ASKED[name](top, format="qcow2")
        assert ASKED[name](image) == expected
        if name in ("info_chain", "explain_guest"):
            # 3 MiB is the overlay's own.
            assert len(expected) == (2 if name == "info_chain" else 1)
            assert len(lamina.explain_guest(image, 0)) == 2
            assert lamina.explain_guest(image, 0) == lamina.explain_guest(top, 0, format="qcow2")


def test_a_backing_file_that_was_replaced_is_the_one_that_is_open(tmp_path: Path) -> None:
    top = overlay(tmp_path / "top.qcow2", disk(tmp_path / "base.qcow2"))
    other = disk(tmp_path / "other.raw", "raw")
    spec = {"driver": "qcow2", "file": {"filename": str(top)}}
    with lamina.open({**spec, "backing": {"driver": "raw", "file": {"filename": str(other)}}}) as image:
        assert [(one.filename, one.format) for one in lamina.info_chain(image)] == [
            (str(top), "qcow2"),
            (str(other), "raw"),
        ]
    with lamina.open({**spec, "backing": None}) as image:
        assert [one.filename for one in lamina.info_chain(image)] == [str(top)]


def test_the_format_was_detected_or_given(tmp_path: Path) -> None:
    path = disk(tmp_path / "disk.qcow2")
    with lamina.open(path, format="probe") as image:
        assert lamina.info(image) == lamina.info(path)
        assert lamina.info(image).format_probed
    with lamina.open(path, format="qcow2") as image:
        assert not lamina.info(image).format_probed


def test_the_options_of_the_open_image_count(tmp_path: Path) -> None:
    path = disk(tmp_path / "disk.raw", "raw")
    spec = {"driver": "raw", "offset": MIB, "size": 2 * MIB, "file": {"driver": "file", "filename": str(path)}}
    with lamina.open(spec) as image:
        assert lamina.info(image) == lamina.info(spec)
        assert lamina.info(image).virtual_size == 2 * MIB


def test_writes_of_an_open_image_are_seen(tmp_path: Path) -> None:
    lamina.create(tmp_path / "disk.qcow2", "qcow2", 8 * MIB)
    with lamina.open(tmp_path / "disk.qcow2", format="qcow2", read_only=False) as image:
        image.write(3 * MIB, b"x" * 65536)
        (step,) = lamina.explain_guest(image, 3 * MIB)
        assert step.status == "data"
        assert step.host is not None
        (found,) = lamina.explain(image, step.host)
        assert found.parts[0].guest[0].exact == 3 * MIB
        image.create_snapshot("one")
        assert [one.name for one in lamina.info(image).snapshots] == ["one"]
        assert lamina.check(image).clean


def test_a_check_is_of_one_moment(tmp_path: Path) -> None:
    """No finding is a mixture of two states of an image that another thread writes to."""
    lamina.create(tmp_path / "disk.qcow2", "qcow2", 64 * MIB)
    with lamina.open(tmp_path / "disk.qcow2", format="qcow2", read_only=False) as image, changed_meanwhile(image):
        for _ in range(20):
            assert lamina.check(image).findings == ()


def test_an_open_image_is_repaired(tmp_path: Path) -> None:
    path = disk(tmp_path / "disk.qcow2")
    with lamina.open(path, format="qcow2") as image, pytest.raises(lamina.ReadOnly):
        lamina.check(image, repair="leaks")
    with path.open("r+b") as file:  # the refcounts of clusters past the end of what is used: a leak
        host = lamina.explain_guest(path, 0, format="qcow2")[0].parts[-1].offset
        file.seek(host)
        file.write(bytes(8))
    leaks = lamina.check(path, format="qcow2").leaks
    assert leaks
    with lamina.open(path, format="qcow2", read_only=False) as image:
        found = lamina.check(image, repair="leaks")
        assert (found.leaks, found.leaks_fixed) == (0, leaks)
        assert not image.closed
    assert lamina.check(path, format="qcow2").clean


def test_a_filter_is_seen_from_above_as_before(tmp_path: Path) -> None:
    path = disk(tmp_path / "disk.qcow2")
    spec = {"driver": "stats", "image": {"driver": "qcow2", "file": {"filename": str(path)}}}
    with lamina.open(spec) as image:
        for name, ask in ASKED.items():
            assert outcome(ask, image) == outcome(ask, spec), name
        assert lamina.info(image).format == "stats"
        assert image.find(Stats)
        with pytest.raises(UnsupportedFeature, match="no bytes of its own"):
            lamina.explain(image, 0)
        with image.share(image.node.children["image"].node) as below:
            assert lamina.check(below).clean


def test_storage_on_top_is_looked_at(tmp_path: Path) -> None:
    path = disk(tmp_path / "disk.qcow2")
    spec = {"driver": "file", "filename": str(path)}
    with lamina.open(spec) as image:
        assert lamina.info(image) == lamina.info(spec)
        assert lamina.explain(image, 0) == lamina.explain(spec, 0)
        with pytest.raises(UnsupportedFeature, match="file has no check"):
            lamina.check(image)


@pytest.mark.parametrize("name", ASKED)
def test_a_format_is_for_a_name(name: str, tmp_path: Path) -> None:
    with lamina.open(disk(tmp_path / "disk.qcow2"), format="qcow2") as image:
        refused = pytest.raises(OptionError, match="format is for an image that is not open yet")
        with refused:
            ASKED[name](image, format="qcow2")
    with pytest.raises(lamina.Closed):
        ASKED[name](image)


@pytest.mark.parametrize("name", ASKED)
def test_nothing_stays_open(name: str, tmp_path: Path) -> None:
    with lamina.open(disk(tmp_path / "disk.qcow2"), format="qcow2") as image:
        roots, nodes = len(image.graph.roots), set(image.graph.nodes)
        ASKED[name](image)
        assert (len(image.graph.roots), set(image.graph.nodes)) == (roots, nodes)
