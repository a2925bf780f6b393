"""What notebooks show: pictures that are whole, escaped and bounded, of any image, and no exception."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lamina
from lamina.check_result import CheckResult, Finding
from lamina.errors import printable
from lamina.extents import Extent, Extents
from lamina.picture import notebook
from lamina.picture.cells import Cells, exact_size
from lamina.picture.status_svg import _parts, sized, svg
from lamina.picture.tables import guarded
from lamina.results import ImageInfo

KIB, MIB = 1 << 10, 1 << 20
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "</text></svg><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"' onload='alert(1)'",
    "]]>&#0;&amp;",
    "\x1b]0;x\x07\n<b>",
    "\udc80\u202eabc",
    "long" * 500,
]
#: Every element that may be in the output.
TAGS = {"svg", "title", "style", "rect", "path", "text"}
TAGS_OF_PAGE = TAGS | {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td"}


def page(text: str) -> ElementTree.Element:
    """The HTML of a value, which is XML as well. It has known elements, and nothing that could run or load anything."""
    found = ElementTree.fromstring(f"<div>{text}</div>".encode())
    assert {one.tag.removeprefix(SVG) for one in found.iter()} <= TAGS_OF_PAGE
    for one in found.iter():
        assert not any(name.startswith("on") or "href" in name or name in ("src", "id") for name in one.attrib)
    assert not re.search(r"url\(|@import|expression", "".join(one.text or "" for one in found.iter(f"{SVG}style")))
    return found


def cells_of(*rows: Extent, size: int = 1024) -> Cells:
    extents = Extents.from_extents(rows)
    cells = Cells(extents.begin, extents.end, size)
    cells.add(extents)
    return cells


def shapes(found: ElementTree.Element, name: str) -> list[tuple[float, ...]]:
    """(left, top, width, height) of each part of the path with this class."""
    paths = [one.attrib["d"] for one in found.iter(f"{SVG}path") if one.attrib["class"] == name]
    assert len(paths) <= 1
    parts = re.findall(r"M([\d.]+) ([\d.]+)h(\d+)v([\d.]+)h-\d+z", "".join(paths))
    assert "".join(f"M{a} {b}h{c}v{d}h-{c}z" for a, b, c, d in parts) == "".join(paths)
    return [tuple(map(float, part)) for part in parts]


def rows_of(found: ElementTree.Element) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in found.iter("tr")]


def test_the_drawing_of_a_small_disk() -> None:
    cells = cells_of(
        Extent(0, 1024, data=True, present=True),
        Extent(1024, 1024, zero=True),
        Extent(2048, 256, data=True, present=True, depth=1),
        Extent(2304, 768, zero=True),
    )
    found = ElementTree.fromstring(svg(cells, "a disk", ["top", "base"]))
    assert shapes(found, "data") == [(86, 10, 10, 18), (106, 22.5, 10, 5.5)]
    assert shapes(found, "hole") == [(96, 10, 10, 18), (106, 10, 10, 12.5)]
    assert shapes(found, "layer0") == [(86, 29, 10, 4)]
    assert shapes(found, "layer1") == [(106, 29, 10, 4)]
    assert [one.text for one in found.iter(f"{SVG}text")] == [
        "0 B",
        "data 1.25 KiB",
        "hole 1.75 KiB",
        "0 top",
        "1 base",
        "one cell is 1 KiB; the end is at 3 KiB; a cell of several kinds is divided by their shares",
    ]
    assert [one.text for one in found.iter(f"{SVG}title")] == [
        "a disk",
        "0 B to 1 KiB: data 1 KiB; layer 0",
        "1 KiB to 2 KiB: hole 1 KiB",
        "2 KiB to 3 KiB: data 256 B, hole 768 B; layer 1",
    ]
    assert (found.attrib["role"], found.attrib["aria-label"]) == ("img", "a disk")


def test_a_kind_with_a_single_byte_is_seen() -> None:
    cells = cells_of(
        Extent(0, (1 << 40) - 1, zero=True), Extent((1 << 40) - 1, 1, data=True, present=True), size=1 << 40
    )
    found = ElementTree.fromstring(svg(cells, "x"))
    assert shapes(found, "data") == [(86, 26, 10, 2)]
    assert shapes(found, "hole") == [(86, 10, 10, 16)]


ROWS = st.lists(
    st.tuples(st.just(0) | st.integers(0, 1 << 30), st.integers(1, 1 << 40), st.integers(0, 15), st.integers(0, 150)),
    min_size=1,
    max_size=20,
)


@given(st.integers(0, 1 << 50), ROWS)
def test_every_cell_is_whole(begin: int, rows: list[tuple[int, int, int, int]]) -> None:
    starts, at = [], begin
    for gap, length, _, _ in rows:
        starts.append(at + gap)
        at += gap + length
    extents = Extents.from_columns(
        starts, [row[1] for row in rows], [row[2] for row in rows], depth=[row[3] for row in rows]
    )
    text = extents._repr_html_()
    page(text)
    cells = sized(extents.begin, extents.end)
    cells.add(extents)
    assert len(cells) <= 512
    for cell in cells.cells():
        bottom = 18.0
        for name, height, top in _parts(cell):
            assert name in cell.amounts or (name == "unknown" and not cell.amounts)
            assert height >= (2 if cell.amounts else 1)
            assert abs(top + height - bottom) < 0.02
            bottom = top
        if cell.amounts and not cell.unknown:
            assert abs(bottom) < 0.02
    assert len(text) < 200_000


def test_style_rules_stay_inside_the_picture() -> None:
    found = ElementTree.fromstring(svg(cells_of(Extent(0, 1024, zero=True)), "x"))
    (style,) = (one.text or "" for one in found.iter(f"{SVG}style"))
    rules = re.fullmatch(r"@media \(prefers-color-scheme:dark\)\{(.*)\}", style)
    assert rules is not None
    selectors = [rule.partition("{")[0] for rule in rules[1].split("}") if rule]
    assert selectors
    assert all(selector.startswith(".lamina-status ") and "," not in selector for selector in selectors)
    dark = {one.attrib["class"] for one in found.iter() if one.tag != f"{SVG}svg" and "class" in one.attrib}
    assert dark <= {selector.rpartition(".")[2] for selector in selectors}


# -- images


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[lamina.Image]:
    """top.qcow2 over base.qcow2 of the specification of block status."""
    monkeypatch.chdir(tmp_path)
    lamina.create("back.qcow2", "qcow2", 100 * MIB, cluster_size=512)
    with lamina.open("back.qcow2", format="qcow2", read_only=False) as image:
        for at in (0, 1024):
            image.write(at, b"\x01" * 512)
    lamina.create("top.qcow2", "qcow2", backing_file="back.qcow2", backing_fmt="qcow2", cluster_size=MIB)
    with lamina.open("top.qcow2", format="qcow2") as image:
        yield image


def test_an_image(chain: lamina.Image) -> None:
    found = page(chain._repr_html_())
    assert "".join(next(found.iter("p")).itertext()) == "top.qcow2: qcow2, 100 MiB (104857600 bytes), read-only"
    assert rows_of(found) == [
        ["layer", "format", "file", "size"],
        ["0", "qcow2", "top.qcow2", "100 MiB"],
        ["1", "qcow2", "back.qcow2", "100 MiB"],
    ]
    tips = [one.text for one in found.iter(f"{SVG}title")]
    assert tips[:3] == [
        "Status of top.qcow2",
        "0 B to 256 KiB: data 1 KiB, hole 255 KiB; layer 1",
        "256 KiB to 16 MiB: hole 15.75 MiB",
    ]
    assert "The picture ends" not in chain._repr_html_()


def test_layers_are_found_below_filters(chain: lamina.Image) -> None:
    options: dict[str, Any] = {"driver": "blkdebug", "align": 4096}
    options["image"] = {"driver": "qcow2", "file": {"driver": "file", "filename": "top.qcow2"}}
    with lamina.open(options) as image:
        assert [row[2] for row in rows_of(page(image._repr_html_()))][1:] == ["top.qcow2", "back.qcow2"]
    with lamina.open(
        {"driver": "quorum", "vote-threshold": 1, "children": [{"driver": "null", "size": 512}] * 2}
    ) as image:
        assert not rows_of(page(image._repr_html_()))


def test_a_closed_image_says_so(chain: lamina.Image) -> None:
    image = chain.share()
    image.close()
    assert image._repr_html_() == "<p>this image was closed</p>"


def test_an_empty_image(tmp_path: Path) -> None:
    (tmp_path / "a.raw").touch()
    with lamina.open(tmp_path / "a.raw", format="raw") as image:
        found = page(image._repr_html_())
    assert not list(found.iter(f"{SVG}svg"))
    assert rows_of(found)[1][3] == "0 B"


@pytest.mark.parametrize("error", [RuntimeError("<b>no</b>"), lamina.BlockIOError("failed", path="<b>")])
def test_an_error_is_shown(chain: lamina.Image, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> Iterator[Extents]:
        raise error

    monkeypatch.setattr(type(chain), "windows", fail)
    found = page(chain._repr_html_())
    assert str(error) in "".join(found.itertext())


def test_an_interrupt_is_no_error() -> None:
    def interrupt() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded(interrupt)


@pytest.fixture
def striped(tmp_path: Path) -> Iterator[lamina.Image]:
    """256 MiB with data in every other MiB."""
    path = tmp_path / "striped.qcow2"
    lamina.create(path, "qcow2", 256 * MIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for at in range(0, 256 * MIB, 2 * MIB):
            image.write(at, b"x" * 65536)
        yield image


@pytest.mark.parametrize(("name", "value"), [("MOST_EXTENTS", 20), ("PATIENCE", -1.0)])
def test_a_picture_is_bounded(striped: lamina.Image, monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    whole = page(striped._repr_html_())
    assert not [one for one in whole.iter(f"{SVG}path") if one.attrib["class"] == "unknown"]
    monkeypatch.setattr(notebook, name, value)
    monkeypatch.setattr(notebook, "_FIRST", 64 * MIB)
    cells = sized(0, striped.size)
    known = notebook.add_bounded(cells, striped)
    assert known == 64 * MIB
    found = page(striped._repr_html_())
    told = "".join(one.text or "" for one in found.iter("p"))
    assert told.startswith(
        f"The picture ends at {exact_size(known)}, since the rest would take longer; image.windows()"
    )
    assert len(shapes(found, "unknown")) == 384
    assert "unknown 192 MiB" in {one.text for one in found.iter(f"{SVG}text")}


def test_the_status_is_that_of_the_image_however_it_is_asked_for(
    striped: lamina.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sized(0, striped.size)
    whole.add(striped.extents())
    monkeypatch.setattr(notebook, "PATIENCE", 1e9)
    for first in (MIB, 3 * MIB, 1 << 40):
        monkeypatch.setattr(notebook, "_FIRST", first)
        cells = sized(0, striped.size)
        assert notebook.add_bounded(cells, striped) == striped.size
        assert cells.cells() == whole.cells()


# -- extents


def test_extents(chain: lamina.Image) -> None:
    found = page(chain.extents(0, 4096)._repr_html_())
    assert rows_of(found) == [
        ["start", "length", "content", "layer", "file", "offset"],
        ["0", "512", "data", "1", "back.qcow2", "27648"],
        ["512", "512", "hole", "", "", ""],
        ["1024", "512", "data", "1", "back.qcow2", "28160"],
        ["1536", "2560", "hole", "", "", ""],
    ]
    gaps = page(chain.extents(0, 4096).where(data=True)._repr_html_())
    assert next(gaps.iter("p")).text == "2 extents from 0 to 1536, with gaps"
    assert Extents.empty(7)._repr_html_() == "<p>0 extents from 7 to 7</p>"


def test_many_extents(striped: lamina.Image) -> None:
    extents = striped.extents()
    found = page(extents._repr_html_())
    assert len(extents) == 256
    assert len(rows_of(found)) == 51
    assert [one.text for one in found.iter("p")][-1] == "and 206 more"


class _File:
    def __init__(self, filename: str) -> None:
        self.filename = filename


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_gets_out(name: str, tmp_path: Path) -> None:
    extents = Extents.single(0, 1024, data=True, present=True, depth=1, file=_File(name), offset=0)
    told = "".join(page(extents._repr_html_()).itertext())
    assert printable(name)[:50] in told
    cells = sized(0, 1024)
    cells.add(extents)
    drawn = ElementTree.fromstring(svg(cells, name, [name, name]))
    assert {one.tag.removeprefix(SVG) for one in drawn.iter()} <= TAGS
    info = ImageInfo(name, name, backing_filename=name, backing_format=name, unsupported=(name,))
    assert printable(name)[:50] in "".join(page(info._repr_html_()).itertext())
    check = CheckResult(name, name, (Finding("error", name, 5),), corruptions=1)
    assert printable(name)[:50] in "".join(page(check._repr_html_()).itertext())
    path = tmp_path / name.replace("/", "\u2044")[:60]
    path.write_bytes(bytes(512))
    with lamina.open(path, format="raw") as image:
        page(image._repr_html_())


# -- results


def test_a_description(chain: lamina.Image) -> None:
    found = dict(rows_of(page(lamina.info("top.qcow2")._repr_html_()))[1:])
    assert found["format"] == "qcow2 (probed)"
    assert found["virtual size"] == "100 MiB (104857600 bytes)"
    assert found["backing file"] == "back.qcow2"
    assert set(found) == {
        "format",
        "virtual size",
        "disk size",
        "file size",
        "cluster size",
        "backing file",
        "backing file format",
    }


def test_a_check(chain: lamina.Image) -> None:
    result = lamina.check("back.qcow2", format="qcow2")
    found = page(result._repr_html_())
    assert "".join(next(found.iter("p")).itertext()) == "back.qcow2: qcow2 image, no errors"
    assert rows_of(found)[1:4] == [["errors", "0"], ["leaks", "0"], ["parts that could not be checked", "0"]]
    many = CheckResult("a", "qcow2", tuple(Finding("leak", "x", at) for at in range(60)), leaks=60)
    told = page(many._repr_html_())
    assert "has errors or leaks" in "".join(told.itertext())
    assert [one.text for one in told.iter("p")][-1] == "and 10 more"
    assert ["leak", "0x31", "x"] in rows_of(told)


def test_a_description_needs_no_columns(chain: lamina.Image) -> None:
    program = "import lamina, sys; lamina.info('top.qcow2')._repr_html_(); print('numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
    )
    assert done.stdout == "False\n"
