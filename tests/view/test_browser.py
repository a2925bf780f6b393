"""The page in a real browser: it renders in both schemes, zooms, filters, compares, works by keyboard, and runs no name."""

from __future__ import annotations

import random
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main
from lamina.errors import LaminaError
from lamina.palette import BACKGROUND, CONTENT, DIFFERENCE, STRUCTURE
from tests.view.conftest import Opened

MIB = 1 << 20
#: The number of pixels of a canvas that have a colour.
PIXELS = """([selector, colour]) => {
  const canvas = document.querySelector(selector), wanted = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  const data = context.getImageData(0, 0, copy.width, copy.height).data;
  let found = 0;
  for (let at = 0; at < data.length; at += 4) found += wanted.every((one, channel) => Math.abs(data[at + channel] - one) < 3);
  return found;
}"""
DISK, FILE = "#disk canvas.map", "#file canvas.map"
#: Markup in a name, as far as a file system and an image keep it.
EVIL = "<img src=x onerror=ran=1></script><script>ran=1<\u2215script>'\"&amp;--><svg onload=ran=1>"


def pixels(page: Opened, selector: str, colour: str) -> int:
    found: int = page.ask(PIXELS, [selector, colour])
    return found


def details(page: Opened) -> str:
    return page.text("#details")


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base.qcow2 with disk.qcow2 over it, all kinds of content, a snapshot and a bitmap."""
    monkeypatch.chdir(tmp_path)
    lamina.create("base.qcow2", "qcow2", 16 * MIB)
    with lamina.open("base.qcow2", format="qcow2", read_only=False) as image:
        image.write(MIB, b"b" * MIB)
        image.write(4 * MIB, bytes(range(256)) * 4096, compress=True)
    lamina.create("disk.qcow2", "qcow2", backing_file="base.qcow2", backing_fmt="qcow2")
    with lamina.open("disk.qcow2", format="qcow2", read_only=False) as image:
        image.write(0, b"a" * 131072)
        image.zero(8 * MIB, MIB)
        image.create_snapshot("monday")
        image.add_bitmap("b0")
        image.write(12 * MIB, b"c" * MIB)
    return tmp_path / "disk.qcow2"


@pytest.fixture
def html(chain: Path) -> str:
    with lamina.open(chain, format="qcow2") as image:
        return lamina.view(image)


@pytest.fixture
def transcript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page of the two images of the tour: 512-byte clusters beneath clusters of 1 MiB."""
    monkeypatch.chdir(tmp_path)
    lamina.create("back.qcow2", "qcow2", 100 * MIB, cluster_size=512)
    with lamina.open("back.qcow2", format="qcow2", read_only=False) as image:
        image.write(0, b"\1" * 512)
        image.write(1024, b"\1" * 512)
    lamina.create("top.qcow2", "qcow2", backing_file="back.qcow2", backing_fmt="qcow2", cluster_size=MIB)
    with lamina.open("top.qcow2", format="qcow2") as image:
        return lamina.view(image)


@pytest.mark.parametrize("width", [1300, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_in_both_schemes(html: str, show: Callable[..., Opened], scheme: str, width: int) -> None:
    page = show(html, scheme=scheme, width=width)
    for name in ("data", "compressed", "zero", "hole"):
        assert pixels(page, DISK, getattr(CONTENT[name], scheme)) > 20, name
    for name in ("header", "mapping tables", "reference counts", "snapshots", "data"):
        assert pixels(page, FILE, getattr(STRUCTURE[name], scheme)) > 20, name
    body = page.ask("getComputedStyle(document.body).backgroundColor")
    wanted = getattr(BACKGROUND, scheme)
    assert body == "rgb({}, {}, {})".format(*(int(wanted[at : at + 2], 16) for at in (1, 3, 5)))
    assert page.ask("document.documentElement.scrollWidth <= window.innerWidth")
    assert "disk.qcow2" in page.text("#head")
    assert "monday" in page.text("#chain")
    assert "b0" in page.text("#chain")
    assert not page.complaints


def test_the_switch_of_the_theme(html: str, show: Callable[..., Opened]) -> None:
    page = show(html)
    page.tab.get_by_role("button", name="Dark").click()
    assert pixels(page, DISK, CONTENT["data"].dark) > 20
    assert page.ask("getComputedStyle(document.querySelector('.swatch')).backgroundColor") != page.ask(
        "(setTheme('light'), getComputedStyle(document.querySelector('.swatch')).backgroundColor)"
    )
    assert pixels(page, DISK, CONTENT["data"].light) > 20
    page.tab.emulate_media(color_scheme="dark")
    page.tab.get_by_role("button", name="Auto").click()
    assert pixels(page, DISK, CONTENT["data"].dark) > 20


def test_zoom_by_mouse_and_by_buttons(html: str, show: Callable[..., Opened]) -> None:
    page = show(html)
    canvas = page.tab.locator(DISK)
    before = page.ask("diskLanes.at(500, 100).position")
    page.tab.keyboard.down("Control")
    canvas.hover(position={"x": 500, "y": 100})
    page.tab.mouse.wheel(0, -120)
    page.tab.keyboard.up("Control")
    page.until("diskLanes.span === diskLength / 2")
    after = page.ask("diskLanes.at(500, 100).position")
    assert abs(after - before) <= 16 * MIB // 64  # the view begins at a round offset
    page.tab.get_by_role("toolbar", name="View of Map of the disk").get_by_role("button", name="Zoom in").click()
    assert page.ask("diskLanes.span") == 4 * MIB
    low = page.ask("diskLanes.low")
    box = canvas.bounding_box()
    page.tab.mouse.move(box["x"] + 500, box["y"] + 200)
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] + 500, box["y"] + 100, steps=4)
    page.tab.mouse.up()
    assert page.ask("diskLanes.low") > low
    assert page.ask("diskLanes.chosen") is None  # a drag chooses nothing
    page.tab.locator("#disk canvas.overview").click(position={"x": 1, "y": 8})
    assert page.ask("diskLanes.low") == 0
    page.tab.get_by_role("toolbar", name="View of Map of the disk").get_by_role("button", name="All").click()
    assert page.ask("[diskLanes.low, diskLanes.span]") == [0, 16 * MIB]


def test_the_keyboard_is_enough(html: str, show: Callable[..., Opened]) -> None:
    page = show(html)
    for _ in range(40):
        page.tab.keyboard.press("Tab")
        if page.ask("document.activeElement === diskLanes.canvas"):
            break
    else:
        pytest.fail("Tab does not reach the map")
    page.tab.keyboard.press("ArrowRight")
    assert "0x0 \u2013 0x20000" in details(page)
    page.tab.keyboard.press("ArrowRight")
    page.tab.keyboard.press("ArrowRight")
    assert "Stored" in details(page)
    assert "0x100000 \u2013 0x200000" in details(page)
    assert "1: base.qcow2 (qcow2)" in details(page)
    page.tab.keyboard.press("Enter")
    assert page.ask("diskLanes.span") == 4 * MIB
    page.tab.keyboard.press("-")
    assert page.ask("diskLanes.span") == 8 * MIB
    low = page.ask("diskLanes.low")
    page.tab.keyboard.press("PageDown")
    assert page.ask("diskLanes.low") > low
    page.tab.keyboard.press("ArrowLeft")
    assert "Hole" in details(page)
    page.tab.keyboard.press("Home")
    assert page.ask("diskLanes.span") == 16 * MIB
    page.tab.keyboard.press("Escape")
    assert page.ask("diskLanes.chosen") is None


def test_labels_for_screen_readers(html: str, show: Callable[..., Opened]) -> None:
    page = show(html)
    unnamed = page.ask("""[...document.querySelectorAll("button, canvas, select, input, [role=region], [role=group]")]
        .filter((one) => !one.getAttribute("aria-label") && !one.textContent.trim())
        .filter((one) => !document.querySelector(`label[for="${one.id}"]`))
        .map((one) => one.outerHTML)""")
    assert unnamed == []
    assert page.ask("document.documentElement.lang") == "en"
    for name in ("The disk", "The files", "The chain", "Details", "Extents in view"):
        assert page.tab.get_by_role("region", name=name, exact=True).count() == 1
    assert page.tab.locator("#details [aria-live=polite], #disk [aria-live=polite]").count() >= 1
    rows = page.tab.locator("#rows tbody tr")
    with lamina.open("disk.qcow2", format="qcow2") as image:
        extents = image.extents()
    assert rows.count() == len(extents)
    for number, extent in enumerate(extents):
        assert rows.nth(number).locator("th").inner_text() == hex(extent.start)


def test_the_legend_filters(html: str, show: Callable[..., Opened]) -> None:
    page = show(html)
    before = pixels(page, DISK, CONTENT["data"].light)
    entry = page.tab.locator("#disk .legend").get_by_role("button", name="Stored")
    entry.click()
    assert entry.get_attribute("aria-pressed") == "false"
    assert before > 0 == pixels(page, DISK, CONTENT["data"].light)
    assert pixels(page, DISK, CONTENT["compressed"].light) > 20
    entry.click()
    assert pixels(page, DISK, CONTENT["data"].light) == before


def test_colours_by_layer_and_by_place(html: str, show: Callable[..., Opened]) -> None:
    page = show(html)
    group = page.tab.get_by_role("group", name="Colours of the disk")
    group.get_by_role("button", name="Layer").click()
    assert "1: base.qcow2" in page.text("#disk .legend")
    assert pixels(page, DISK, page.ask("MODEL.palette.layers[1][0]")) > 20
    group.get_by_role("button", name="Place in the file").click()
    assert "Not stored at one place" in page.text("#disk .legend")
    page.tab.get_by_role("group", name="Colours of the file").get_by_role("button", name="Place on the disk").click()
    assert "Not data of the disk" in page.text("#file .legend")


def test_a_dirty_bitmap(html: str, show: Callable[..., Opened]) -> None:
    page = show(html)
    page.tab.get_by_label("Dirty bitmap").select_option(label="b0")
    assert "dirty in b0" in page.text("#disk .legend")
    page.ask("diskLanes.choose({ track: 1, position: 12 * 2 ** 20 })")
    assert "Dirty" in details(page)
    assert "0xc00000 \u2013 0xd00000" in details(page)


def test_exact_and_rounded(transcript: str, show: Callable[..., Opened]) -> None:
    page = show(transcript, fragment="#start=0&length=16384")
    assert page.ask("[diskLanes.low, diskLanes.span]") == [0, 16384]
    assert "Exact" in page.text("#disk")
    slider = page.tab.get_by_label("Rounding")
    slider.focus()
    for _ in range(4):
        page.tab.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "4 KiB"
    assert "2 extents in place of 4; 4 KiB to read, 3 KiB more than exactly" in page.text("#disk")
    tables = [page.tab.locator("#rows table").nth(number).locator("tbody tr") for number in range(2)]
    assert [table.count() for table in tables] == [4, 2]
    assert tables[0].nth(0).locator("td").all_inner_texts() == ["512 B", "Stored", "1", "back.qcow2 at 0x6c00"]
    assert tables[1].nth(0).locator("td").all_inner_texts() == ["4 KiB", "Stored", "1", "\u2013"]
    assert tables[1].nth(1).locator("td").all_inner_texts()[1:] == ["Hole", "\u2013", "\u2013"]
    page.until("location.hash.includes('round=4096')")


def test_the_parts_of_a_file(html: str, show: Callable[..., Opened]) -> None:
    page = show(html)
    page.ask("fileLanes.choose({ track: 0, position: 100 })")
    assert "Header" in details(page)
    assert "refcount_table_offset" in details(page)
    with lamina.open("disk.qcow2", format="qcow2") as image:
        host = image.extents().at(12 * MIB).offset
    page.ask("(host) => fileLanes.choose({ track: 0, position: host })", host)
    link = page.tab.locator("#details").get_by_role("button", name="0xc00000")
    assert "lamina explain -f qcow2" in details(page)
    link.click()
    assert "Range\n0xc00000 \u2013" in details(page)
    tabs = page.tab.get_by_role("tab")
    tabs.first.focus()
    page.tab.keyboard.press("ArrowRight")
    assert tabs.nth(1).get_attribute("aria-selected") == "true"
    assert "base.qcow2" in page.ask("fileLanes.name")


def test_what_is_said_is_what_explain_says(chain: Path, html: str, show: Callable[..., Opened]) -> None:
    page = show(html)
    with lamina.open(chain, format="qcow2") as image:
        extents = list(image.extents())
    for extent in extents:
        page.ask("(at) => diskLanes.choose({ track: 0, position: at })", extent.start)
        said = details(page)
        for step in lamina.explain_guest(chain, extent.start, format="qcow2"):
            assert Path(step.filename).name in said
            for part in step.parts:
                assert f"{part.structure}, {part.field} at {part.offset:#x}" in said
            if step.host is not None:
                assert f"at {step.host:#x} of" in said
    for path in ("disk.qcow2", "base.qcow2"):
        page.tab.get_by_role("tab", name=path).click()
        for row in range(page.ask("files[fileState.number].parts.count")):
            page.ask("(row) => fileLanes.choose({ track: 0, position: files[fileState.number].parts.start[row] })", row)
            start = page.ask("(row) => files[fileState.number].parts.start[row]", row)
            found = lamina.explain(path, start, format="qcow2")[0]
            said = details(page)
            assert hex(start) in said
            assert f"References\n{found.refcount} " in said
            for guest in (one for part in found.parts for one in part.guest if one.exact is not None):
                if guest.snapshot is None and guest.status == "data":
                    assert hex(guest.exact or 0) in said


def test_a_moment_is_explained_and_the_commands_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, show: Callable[..., Opened], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "-it's, a disk.qcow2"
    lamina.create(tmp_path / name, "qcow2", 16 * MIB)
    with lamina.open(Path(name), format="qcow2", read_only=False) as image:
        image.write(0, b"x" * 65536)
        image.create_snapshot("monday")
        image.write(0, b"y" * 65536)
    options = {"driver": "qcow2", "file": {"driver": "file", "filename": name}, "snapshot-id": "1"}
    with lamina.open(options) as then, lamina.open(Path(name), format="qcow2") as now:
        page = show(lamina.view(then, now))
    for track, source in enumerate((options, Path(name))):
        page.ask("(track) => diskLanes.choose({ track, position: 0 })", track)
        step = lamina.explain_guest(source, 0, format="qcow2")[0]
        said = details(page)
        assert f"at {step.host:#x} of" in said
        for part in step.parts:
            assert f"{part.structure}, {part.field} at {part.offset:#x}" in said
        assert main(shlex.split(page.text("#details .command"))[1:]) == 0
        assert f"at offset {step.host} " in capsys.readouterr().out
    page.ask("fileLanes.choose({ track: 0, position: 0 })")
    assert main(shlex.split(page.text("#details .command"))[1:]) == 0
    assert "magic" in capsys.readouterr().out


def test_an_image_behind_a_filter_that_shifts(chain: Path, show: Callable[..., Opened]) -> None:
    options = {"driver": "offset", "offset": MIB, "image": {"driver": "qcow2", "file": str(chain), "backing": None}}
    with lamina.open(options) as image:
        page = show(lamina.view(image))
    page.ask("diskLanes.choose({ track: 0, position: 11 * 2 ** 20 })")
    said = details(page)
    assert "In the file" in said
    assert "How a reader finds it" not in said
    assert "lamina explain" not in said


def test_two_side_by_side(chain: Path, show: Callable[..., Opened]) -> None:
    Path("after.qcow2").write_bytes(chain.read_bytes())
    with lamina.open("after.qcow2", format="qcow2", read_only=False) as image:
        image.write(6 * MIB, b"new" * 100_000)
    with lamina.open(chain, format="qcow2") as first, lamina.open("after.qcow2", format="qcow2") as second:
        html = lamina.view(first, second)
    page = show(html)
    assert "differ from the first" in page.text("#head")
    assert pixels(page, DISK, DIFFERENCE.light) > 10
    assert page.ask("diskTracks().length") == 3
    page.ask("diskLanes.choose({ track: 2, position: 6 * 2 ** 20 })")
    assert "Different" in details(page)
    assert "0x600000 \u2013 0x64a000" in details(page)
    page.ask("diskLanes.choose({ track: 1, position: 6 * 2 ** 20 })")
    assert "after.qcow2" in details(page)
    with lamina.open(chain, format="qcow2") as first:
        page = show(lamina.view(first, first))
    assert "No difference" in page.text("#head")


def test_names_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, show: Callable[..., Opened]) -> None:
    monkeypatch.chdir(tmp_path)
    name = EVIL.replace("/", "\u2215") + ".qcow2"
    base = "base-" + name
    lamina.create(base, "qcow2", MIB)
    lamina.create(name, "qcow2", backing_file=base, backing_fmt="qcow2")
    with lamina.open(name, format="qcow2", read_only=False) as image:
        image.write(0, b"x" * 65536)
        image.create_snapshot(EVIL)
        image.write(0, b"y" * 65536)
        image.add_bitmap(EVIL)
    with lamina.open(name, format="qcow2") as image:
        html = lamina.view(image, image)
    assert EVIL not in html
    page = show(html)
    page.ask("[0, 1].forEach((track) => diskLanes.choose({ track, position: 0 }))")
    page.ask("[...document.querySelectorAll('button, .link')].forEach((one) => one.click())")
    page.ask("""(() => { const one = document.querySelector("#bitmap"); one.selectedIndex = 1;
        one.dispatchEvent(new Event("change")); diskLanes.choose({ track: 1, position: 0 }); })()""")
    page.tab.wait_for_timeout(100)
    assert page.ask("typeof ran") == "undefined"
    assert page.ask("document.querySelectorAll('img, svg, iframe').length") == 0
    assert page.ask("document.scripts.length") == 2
    assert EVIL in page.text("#chain")
    assert name in page.text("#head")
    assert page.tab.title().startswith(name)
    assert not page.complaints
    # And what would run, if it were there, may not.
    page.ask("document.body.append(Object.assign(document.createElement('script'), { textContent: 'ran = 1' }))")
    assert page.ask("typeof ran") == "undefined"
    page.tab.wait_for_timeout(50)
    assert any("Content Security Policy" in one for one in page.complaints)


def test_the_address_is_hostile_too(html: str, show: Callable[..., Opened]) -> None:
    fragment = "#start=-5&length=NaN&round=3&colours=<script>&theme=x&start=1e400"
    page = show(html, fragment=fragment)
    assert page.ask("[diskLanes.low, diskLanes.span, diskState.round, diskState.by]") == [0, 16 * MIB, 1, "content"]


def test_damage_is_seen(tmp_path: Path, show: Callable[..., Opened]) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", MIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"x" * 131072)
        first = image.extents().at(0).offset
    at = lamina.explain_guest(path, 0, format="qcow2")[0].parts[1].offset
    raw = bytearray(path.read_bytes())
    raw[at + 8 : at + 16] = raw[at : at + 8]
    path.write_bytes(raw)
    with lamina.open(path, format="qcow2") as image:
        page = show(lamina.view(image))
    assert pixels(page, FILE, STRUCTURE["overlap"].light) > 20
    assert pixels(page, FILE, STRUCTURE["leaked"].light) > 20
    page.ask("(at) => fileLanes.choose({ track: 0, position: at })", first)
    assert "In conflict" in details(page)


def test_damaged_bitmaps_leave_the_page_whole(tmp_path: Path, show: Callable[..., Opened]) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", MIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.add_bitmap("b0")
        image.write(0, b"x" * 131072)
    directory = next(one for one in lamina.structures(path, format="qcow2").regions if "directory" in one.structure)
    raw = bytearray(path.read_bytes())
    raw[directory.offset] = 0xFF  # the offset of the table
    path.write_bytes(raw)
    with lamina.open(path, format="qcow2") as image:
        page = show(lamina.view(image))
    assert "the table of bitmap b0" in page.ask("() => document.querySelector('#disk .problem').textContent")
    assert pixels(page, DISK, CONTENT["data"].light) > 20


def test_odd_disks(tmp_path: Path, show: Callable[..., Opened], seed: int) -> None:
    rng = random.Random(seed)
    for size in (0, 1, 100, 511, 1000, 70_001):
        path = tmp_path / "odd.raw"
        path.write_bytes(rng.randbytes(size))
        with lamina.open(path, format="raw") as image:
            page = show(lamina.view(image))
        for action in ("step(1)", "zoom(0.1)", "zoom(9)", "show(-5, 1e9)", "zoomToChosen()"):
            page.ask(f"diskLanes.{action}")
        assert page.ask("[diskLanes.low >= 0, diskLanes.low + diskLanes.span <= Math.max(diskLength, 1)]") == [
            True,
            True,
        ]
        assert not page.complaints


def test_a_long_chain_and_long_names_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, show: Callable[..., Opened]
) -> None:
    monkeypatch.chdir(tmp_path)
    lamina.create("0.qcow2", "qcow2", MIB)
    for number in range(1, 64):
        lamina.create(f"{number}.qcow2", "qcow2", backing_file=f"{number - 1}.qcow2", backing_fmt="qcow2")
    with lamina.open("63.qcow2", format="qcow2", read_only=False) as image:
        image.create_snapshot("a name " * 30)
    for width in (1300, 400):
        page = show(lamina.view("63.qcow2", first_format="qcow2"), width=width)
        assert page.ask("document.documentElement.scrollWidth") == width
        # Words are beside one another, not letter below letter.
        assert page.ask("Math.max(...Array.from(document.querySelectorAll('.badge'), (one) => one.offsetHeight))") < 40
        assert page.ask("Math.min(...Array.from(document.querySelectorAll('.layer'), (one) => one.offsetWidth))") > 200


def test_a_page_of_an_image_of_another_size(chain: Path, show: Callable[..., Opened]) -> None:
    lamina.create("short.qcow2", "qcow2", 3 * MIB)
    for images in (("short.qcow2", chain), (chain, "short.qcow2")):
        opened: list[Any] = [lamina.open(one, format="qcow2") for one in images]
        try:
            page = show(lamina.view(*opened))
        except LaminaError as error:
            pytest.fail(str(error))
        finally:
            for image in opened:
                image.close()
        page.ask("diskLanes.choose({ track: 0, position: diskLength - 1 })")
        page.ask("diskLanes.choose({ track: 2, position: diskLength - 1 })")
        assert not page.complaints
