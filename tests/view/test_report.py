"""`lamina.view` and `lamina view`: what is written, where, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main
from lamina.errors import LimitExceeded, OptionError
from lamina.file_map import Route
from lamina.jobs.progress import Monitor
from lamina.numeric import np
from lamina.results import Snapshot
from lamina.viewer import collect
from lamina.viewer.document import document
from lamina.viewer.page import SCRIPTS, escaped, page
from lamina.viewer.rows import ranges_of

MIB = 1 << 20


class Elements(HTMLParser):
    """The start tags of a page, and the text of style and script elements by their type."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            tag, attributes = self.tags[-1]
            self.texts.append((attributes.get("type") or tag, data))


def document_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(text for kind, text in Elements(text).texts if kind == "application/json"))
    return found


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    lamina.create("base.qcow2", "qcow2", 4 * MIB)
    with lamina.open("base.qcow2", format="qcow2", read_only=False) as opened:
        opened.write(MIB, b"x" * 65536)
    lamina.create("disk.qcow2", "qcow2", backing_file="base.qcow2", backing_fmt="qcow2")
    with lamina.open("disk.qcow2", format="qcow2", read_only=False) as opened:
        opened.write(0, b"y" * 65536)
        opened.create_snapshot("monday")
        opened.write(2 * MIB, b"z" * 65536)
        opened.add_bitmap("b0")
    return "disk.qcow2"


def test_the_page_is_whole_and_allows_itself_alone(image: str) -> None:
    with lamina.open(image, format="qcow2") as opened:
        text = lamina.view(opened)
    found = Elements(text)
    assert text.startswith("<!doctype html>")
    assert not any(set(attributes) & {"src", "href", "style", "onclick"} for _, attributes in found.tags)
    policy = next(one["content"] for _, one in found.tags if one.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind, content in found.texts:
        if kind != "application/json":
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?://|//\w+\.\w+/", re.sub(r"<script type=.*?</script>", "", text, flags=re.DOTALL))
    assert "{{" not in text.partition("<script")[0]


def test_the_document(image: str) -> None:
    with lamina.open(image, format="qcow2") as opened:
        found = document_of(lamina.view(opened))
    disk = found["disks"][0]
    assert disk["size"] == 4 * MIB
    assert disk["status"]["rows"] == 6
    assert disk["status"]["totals"] == [3 * 65536, 0, 0, 0, 4 * MIB - 3 * 65536]
    assert [layer["owned"] for layer in disk["layers"]] == [2 * 65536, 65536]
    assert [one["name"] for one in disk["layers"][0]["snapshots"]] == ["monday"]
    assert [one["name"] for one in disk["bitmaps"]] == ["b0"]
    assert [Path(one["name"]).name for one in found["files"]] == ["disk.qcow2", "base.qcow2"]
    assert found["files"][0]["header"][0][2] == "magic"
    assert found["difference"] is None


def test_two_moments_of_one_file(image: str, tmp_path: Path) -> None:
    assert main(["view", "-q", "-o", "page.html", "-l", "monday", "-f", "qcow2", image]) == 0
    found = document_of((tmp_path / "page.html").read_text())
    assert [disk["title"] for disk in found["disks"]] == ["disk.qcow2, snapshot 1", "disk.qcow2"]
    assert found["difference"]["ranges"]["total"] == 65536
    assert len(found["files"]) == 2


def test_two_images_and_how_they_are_compared(image: str) -> None:
    words = ["view", "-q", "-o", "page.html", "-f", "qcow2", "-F", "qcow2", "-g", "512", "base.qcow2", image]
    assert main(words) == 0
    found = document_of(Path("page.html").read_text())["difference"]
    assert (found["granularity"], found["content"]) == (512, True)
    assert found["ranges"]["total"] == 2 * 65536
    assert main([*words[:-2], "--allocation", image, image]) == 0
    assert document_of(Path("page.html").read_text())["difference"]["ranges"]["rows"] == 0


def test_a_filter_on_top_and_a_raw_file(image: str) -> None:
    options = f"driver=blkdebug,align=4k,image.driver=qcow2,image.file.filename={image}"
    assert main(["view", "-q", "-o", "page.html", "--image-opts", options]) == 0
    found = document_of(Path("page.html").read_text())
    assert [layer["format"] for layer in found["disks"][0]["layers"]] == ["qcow2", "qcow2"]
    assert found["disks"][0]["alignment"] == 4096
    Path("disk.raw").write_bytes(b"x" * 1000)
    assert main(["view", "-q", "-o", "page.html", "-f", "raw", "disk.raw"]) == 0
    found = document_of(Path("page.html").read_text())
    assert found["files"][0]["totals"] == [[10, 1000]]
    Path("none.raw").write_bytes(b"")
    assert main(["view", "-q", "-o", "page.html", "-f", "raw", "none.raw"]) == 0


def test_nothing_but_a_page_is_overwritten(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = Path(image).read_bytes()
    for target in (image, "base.qcow2"):
        assert main(["view", "-o", target, "-f", "qcow2", image]) == 1
        assert "which would be overwritten" in capsys.readouterr().err
    os.link(image, "link.html")
    assert main(["view", "-o", "link.html", "-f", "qcow2", image]) == 1
    Path("notes.txt").write_text("mine")
    assert main(["view", "-o", "notes.txt", "-f", "qcow2", image]) == 1
    assert "is no HTML page" in capsys.readouterr().err
    assert Path("notes.txt").read_text() == "mine"
    assert Path(image).read_bytes() == content
    capsys.readouterr()
    assert main(["view", "-q", "-o", "-", "-f", "qcow2", image]) == 0
    assert capsys.readouterr().out.startswith("<!doctype html>")
    assert not Path("-").exists()
    Path("page.html").write_text("")
    for _ in range(2):
        assert main(["view", "-o", "page.html", "-f", "qcow2", image]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "b", "c"], "one image is needed, or two"),
        (["-l", "x", "a", "b"], "one image is needed, or two"),
        (["-g", "3000", "base.qcow2"], "is not a power of two"),
        (["none.qcow2"], "cannot be opened"),
    ],
)
def test_what_is_refused(image: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", "-o", "page.html", *words]) == 1
    assert said in capsys.readouterr().err
    assert not Path("page.html").exists()


def test_what_the_library_refuses(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="there is no second image"):
        lamina.view(image, first_format="qcow2", second_format="raw")
    with lamina.open(image, format="qcow2") as opened:
        with pytest.raises(OptionError, match="is for an image that is not open yet"):
            lamina.view(opened, first_format="qcow2")
        with pytest.raises(OptionError, match="too little for a page"):
            lamina.view(opened, limit=1000)
        monkeypatch.setattr(collect, "LONGEST", MIB)
        with pytest.raises(LimitExceeded, match="a page can show"):
            lamina.view(opened)


def test_names_are_opened_and_a_page_is_cancelled(image: str, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    with lamina.open(image, format="qcow2") as opened:
        expected = lamina.view(opened, opened)
    assert lamina.view(image, image, first_format="qcow2", second_format="qcow2", output=target) == expected
    assert target.read_text() == expected
    stop = threading.Event()
    stop.set()
    with lamina.open(image, format="qcow2") as opened:
        with pytest.raises(lamina.Cancelled):
            lamina.view(opened, opened, cancel=stop, output=target)
        assert opened.read(0, 1)  # it stays open
    assert target.read_text() == expected


def test_names_are_text() -> None:
    assert escaped("<b title='\"'>&\x1b[0m") == "&lt;b title=&#39;&quot;&#39;&gt;&amp;\\x1b[0m"


def test_every_part_of_the_page_is_used() -> None:
    folder = resources.files("lamina.viewer").joinpath("page")
    names = {one.name for one in folder.iterdir()}
    assert names == {*SCRIPTS, "page.html", "page.css"}
    for name in names:
        text = folder.joinpath(name).read_text("utf-8")
        assert len(text.splitlines()) <= 500
        assert "</script" not in text or name == "page.html"
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", text), name


def test_names_and_routes_of_any_number_do_not_make_a_page_longer(image: str) -> None:
    with lamina.open(image, format="qcow2") as opened:
        model = collect.collect([opened], 4096, True, Monitor())
    snapshot = Snapshot("1", "\x01<\ud800" * 20_000, MIB)
    [disk], [file, *others] = model.disks, model.files
    info = disk.layers[0].info._replace(snapshots=(snapshot,) * 5000)
    many = np.arange(400_000, dtype=np.int64)
    route = Route(0, 1 << 15, 512, 8, many, many * 7919 % (1 << 30) << 9)
    layer = disk.layers[0]._replace(info=info, bitmaps=("b" * 1023,) * 5000, route=route)
    header = ((0, 8, "&" * 60_000, "<" * 60_000),) * 5000
    hostile = model._replace(
        disks=(disk._replace(layers=(layer, *disk.layers[1:])),),
        files=(file._replace(header=header, problems=("&" * 60_000,) * 5000), *others),
    )
    told = document(hostile, 500_000)
    assert len(page(told, "title")) < 500_000
    found = told["disks"][0]["layers"][0]
    assert found["route"] is None
    assert len(found["snapshots"]) + len(found["bitmaps"]) + found["omitted"] == 10_000
    assert found["snapshots"][0]["name"].startswith("\\x01<\\ud800")
    assert len(told["files"][0]["header"]) + len(told["files"][0]["problems"]) + told["files"][0]["omitted"] == 10_000
    # Two names that look alike are two bitmaps.
    alike = {"a\n": (65536, ranges_of(())), "a\\n": (65536, ranges_of(()))}
    told = document(model._replace(disks=(disk._replace(bitmaps=alike),)), 500_000)
    assert len(told["disks"][0]["bitmaps"]) == 2
