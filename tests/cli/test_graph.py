"""`lamina graph`: the tree as text, as data, and as a picture in which no name of a file can do anything."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import lamina
from lamina.cli.graph_picture import picture
from lamina.cli.main import main
from lamina.errors import printable
from lamina.options import format_size

MIB = 1 << 20
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """top.qcow2 over middle.qcow2 over base.raw, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    for name, below, format in (("middle.qcow2", "base.raw", "raw"), ("top.qcow2", "middle.qcow2", "qcow2")):
        lamina.create(name, "qcow2", backing_file=below, backing_fmt=format, cluster_size=4096)
    return tmp_path / "top.qcow2"


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["graph", *words]) == 0
    return capsys.readouterr().out


def test_the_text(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = re.sub(r"#\d+|[\d.]+ [KM]iB allocated", "", printed(capsys, "-f", "qcow2", chain.name))
    middle = format_size(Path("middle.qcow2").stat().st_size)
    assert told.splitlines() == [
        "qcow2, 1 MiB, read-only",
        f"├─ file: file, top.qcow2, {format_size(chain.stat().st_size)}, , read-only",
        "└─ backing: qcow2, 1 MiB, read-only",
        f"   ├─ file: file, middle.qcow2, {middle}, , read-only",
        "   └─ backing: raw, 1 MiB, read-only",
        "      └─ file: file, base.raw, 1 MiB, , read-only",
    ]


def nodes(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [found, *(below for edge in found["children"] for below in nodes(edge["node"]))]


def test_the_data(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, "--output=json", "-f", "qcow2", chain.name))
    assert [edge["role"] for edge in found["children"]] == ["file", "backing"]
    assert [one["driver"] for one in nodes(found)] == ["qcow2", "file", "qcow2", "file", "raw", "file"]
    assert [one["kind"] for one in nodes(found)] == ["format", "storage"] * 3
    files = [one["filename"] for one in nodes(found) if "filename" in one]
    assert files == ["top.qcow2", "middle.qcow2", "base.raw"]
    for one in nodes(found):
        assert one["read-only"] is True
        if "filename" in one:
            status = Path(one["filename"]).stat()
            assert (one["size"], one["allocated"]) == (status.st_size, status.st_blocks * 512)
        else:
            assert one["size"] == MIB
    assert not any(edge["writes"] for one in nodes(found) for edge in one["children"])


def test_the_options_that_matter_and_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    secret = lamina.Secret(b"hunter2")
    lamina.create(path, "qcow2", MIB, encrypt={"format": "luks", "key-secret": secret, "iter-time": 1})
    spec = {
        "driver": "throttle",
        "node-name": "slow",
        "bps-total": "1M",
        "iops-total": 0,
        "image": {
            "driver": "qcow2",
            "detect-zeroes": "unmap",
            "discard": "ignore",
            "encrypt": {"key-secret": secret},
            "file": {"filename": str(path), "cache": {"direct": False}, "locking": "off"},
        },
    }
    with lamina.open(spec, read_only=False) as image:
        found = lamina.tree(image)
        assert found == lamina.tree(image.node)
        assert found["name"] == "slow"
        assert found["options"] == {"bps-total": "1M"}
        (edge,) = found["children"]
        assert (edge["role"], edge["writes"]) == ("image", True)
        assert edge["node"]["options"] == {"detect-zeroes": "unmap", "discard": "ignore"}
        assert edge["node"]["children"][0]["node"]["options"] == {"locking": "off"}
        assert "hunter2" not in json.dumps(found)


def test_a_node_with_two_parents_is_described_once() -> None:
    with lamina.open({"driver": "null", "size": MIB, "node-name": "base"}) as base:
        both = {"driver": "quorum", "vote-threshold": 2, "children": ["base", "base"]}
        with lamina.open(both, graph=base.graph) as image:
            found = lamina.tree(image)
    first, second = (edge["node"] for edge in found["children"])
    assert first["size"] == MIB
    assert second == {"name": "base", "driver": "null", "shared": True}
    drawn = ElementTree.fromstring(picture(found))
    assert len(drawn.findall(f"{SVG}g")) == 3


def test_a_closed_image_has_no_tree(tmp_path: Path) -> None:
    image = lamina.open({"driver": "null", "size": MIB})
    image.close()
    with pytest.raises(lamina.Closed):
        lamina.tree(image)


def test_the_picture(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(capsys, "--output=svg", "-f", "qcow2", chain.name)
    drawn = ElementTree.fromstring(told)
    assert drawn.tag == f"{SVG}svg"
    words = [text.text for text in drawn.iter(f"{SVG}text")]
    assert {"qcow2", "raw", "file", "backing", "top.qcow2", "middle.qcow2", "base.raw"} <= set(words)
    assert len(drawn.findall(f"{SVG}g")) == 6
    assert len(drawn.findall(f"{SVG}path")) == 5
    assert "prefers-color-scheme: dark" in told
    assert not re.search(r"href|url\(|@import|<script|http(?!://www.w3.org/2000/svg)", told)
    _, _, width, height = map(float, drawn.attrib["viewBox"].split())
    boxes = [{key: float(one.attrib[key]) for key in ("x", "y", "width", "height")} for one in drawn.iter(f"{SVG}rect")]
    for number, box in enumerate(boxes):
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width
        assert 0 <= box["y"] <= box["y"] + box["height"] <= height
        for other in boxes[:number]:
            apart = (
                box["x"] >= other["x"] + other["width"]
                or other["x"] >= box["x"] + box["width"]
                or box["y"] >= other["y"] + other["height"]
                or other["y"] >= box["y"] + box["height"]
            )
            assert apart, "two boxes overlap"


@pytest.mark.parametrize(
    "name",
    ["</text><script>alert(1)</script>", "\x1b]0;x\x07\n<", '"&<>', "]]>&#0;", "\udc80" * 30, "long" * 60, "\u202eabc"],
)
def test_no_name_gets_out_of_the_output(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    path = folder / name.replace("/", "\u2044")
    path.write_bytes(bytes(512))
    with lamina.open(path, format="raw") as image:
        found = lamina.tree(image)
    drawn = ElementTree.fromstring(picture(found).encode())
    assert {one.tag.removeprefix(SVG) for one in drawn.iter()} == {"svg", "title", "style", "g", "rect", "text", "path"}
    whole = "".join(one.text or "" for one in drawn.iter(f"{SVG}title"))
    assert printable(str(path)) in whole
    for output in ("human", "svg"):
        told = printed(capsys, "--output", output, "-f", "raw", f"file:{path}")
        assert all(line.isprintable() for line in told.replace("\n", ""))


def test_a_terminal_without_lines_gets_ascii(chain: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lamina", "graph", "-f", "qcow2", "top.qcow2"],
        capture_output=True,
        check=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.isascii()
    assert b"`- backing: " in done.stdout


def test_what_may_not_be_opened_is_refused(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", chain.name]) == 1
    assert "backing file" in capsys.readouterr().err
    assert main(["graph", "--references", "none", "-f", "qcow2", chain.name]) == 1
