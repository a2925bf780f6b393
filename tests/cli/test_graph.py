"""`lamina graph`: the tree as text, as data, and as a picture in which no name of a file can do anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
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
    assert len([one for one in drawn.findall(f"{SVG}path") if one.attrib["class"] == "edge"]) == 5
    assert (drawn.attrib["role"], drawn.attrib["aria-labelledby"]) == ("img", "title description")
    parts = {one.attrib.get("id"): one.text or "" for one in drawn}
    assert parts["title"].startswith("Graph of qcow2#")
    assert re.fullmatch(
        r"6 nodes, 0 of them not opened. qcow2, .* \(file: file, .*top.qcow2.*; backing: .*base.raw.*\)",
        parts["description"],
    )
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
    tags = {one.tag.removeprefix(SVG) for one in drawn.iter()}
    assert tags == {"svg", "title", "desc", "style", "g", "rect", "text", "path"}
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


# -- references that were not followed

WATCHED = """
import sys
from collections.abc import Callable
opened = []
sys.addaudithook(lambda name, arguments: opened.append(str(arguments[0])) if name == "open" else None)
from lamina.cli.main import main
status = main(sys.argv[1:])
print([name for name in opened if "qcow2" in name and "lamina/" not in name], file=sys.stderr)
sys.exit(status)
"""


def tree_with_refusals(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    """What the command prints, and its error."""
    capsys.readouterr()
    assert main(["graph", *words]) == 1
    told = capsys.readouterr()
    return json.loads(told.out), told.err


def test_what_was_refused_is_a_node(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, error = tree_with_refusals(capsys, "--output=json", "--references", "none", "-f", "qcow2", chain.name)
    assert [edge["role"] for edge in found["children"]] == ["file", "backing"]
    refused = found["children"][1]["node"]
    reason = refused.pop("not-opened")
    assert refused == {"name": None, "driver": "qcow2", "filename": "middle.qcow2"}
    assert reason["type"] == "PolicyError"
    assert "no name inside an image is opened" in reason["message"]
    assert reason["hint"].startswith("to allow it, give --references list:")
    assert json.loads(error)["error"]["message"] == reason["message"]


def test_what_was_refused_is_in_the_text_and_the_picture(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["graph", "-f", "qcow2", "--references", f"list:{chain.parent}/middle.qcow2", chain.name]) == 1
    told = capsys.readouterr()
    assert told.out.splitlines()[-1].startswith(
        '   └─ backing: raw, base.raw, not opened: backing file "base.raw" is refused: '
    )
    assert 'middle.qcow2: backing file "base.raw" is refused' in told.err
    assert main(["graph", "--svg", "-f", "qcow2", "--references", "none", chain.name]) == 1
    drawn = ElementTree.fromstring(capsys.readouterr().out)
    kinds = [one.attrib["class"] for one in drawn.findall(f"{SVG}g")]
    assert sorted(kinds) == ["format", "refused", "storage"]
    (box,) = (one for one in drawn.findall(f"{SVG}g") if one.attrib["class"] == "refused")
    words = [text.text or "" for text in box.iter(f"{SVG}text")]
    assert words[:3] == ["qcow2", "middle.qcow2", "not opened"]
    assert "refused" in " ".join(words[3:])
    assert "3 nodes, 1 of them not opened." in "".join(one.text or "" for one in drawn.iter(f"{SVG}desc"))


def test_what_was_refused_is_not_opened(chain: Path) -> None:
    command = [sys.executable, "-c", WATCHED, "graph", "--references", "none", "-f", "qcow2", "top.qcow2"]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "backing: qcow2, middle.qcow2, not opened" in done.stdout
    assert done.stderr.splitlines()[-1] == "['top.qcow2']"


@pytest.mark.parametrize(
    ("break_it", "kind"),
    [
        (lambda: Path("base.raw").unlink(), "NotFound"),
        (
            lambda: main(["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "top.qcow2", "middle.qcow2"]),
            "CorruptImage",
        ),
        (lambda: main(["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "base.raw", "middle.qcow2"]), "FormatError"),
    ],
)
def test_a_broken_chain_is_shown_as_far_as_it_goes(
    chain: Path, capsys: pytest.CaptureFixture[str], break_it: Callable[[], object], kind: str
) -> None:
    break_it()
    found, error = tree_with_refusals(capsys, "--output=json", "-f", "qcow2", chain.name)
    middle = found["children"][1]["node"]
    assert middle["driver"] == "qcow2"
    assert middle["children"][1]["node"]["not-opened"]["type"] == kind
    assert json.loads(error)["error"]["type"] == kind


def test_a_missing_data_file_is_a_node_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lamina.create("a.qcow2", "qcow2", MIB, data_file="a.data")
    Path("a.data").unlink()
    found, _ = tree_with_refusals(capsys, "--output=json", "-f", "qcow2", "a.qcow2")
    roles = {edge["role"]: edge["node"] for edge in found["children"]}
    assert set(roles) == {"file", "data-file"}
    assert roles["data-file"]["driver"] == "file"
    assert roles["data-file"]["filename"] == "a.data"
    assert roles["data-file"]["not-opened"]["type"] == "NotFound"


def test_a_mistake_in_the_options_is_an_error(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "driver=qcow2,file.filename=top.qcow2,backing.nonsense=1"
    assert main(["graph", "--image-opts", options]) == 1
    told = capsys.readouterr()
    assert not told.out
    assert "nonsense" in told.err


def test_the_output_file(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--svg", "-o", "a.svg", "-f", "qcow2", chain.name) == ""
    assert ElementTree.fromstring(Path("a.svg").read_text()).tag == f"{SVG}svg"
    assert printed(capsys, "-o", "a.txt", "-f", "qcow2", chain.name) == ""
    assert "└─ backing: qcow2" in Path("a.txt").read_text()
    Path("link.svg").symlink_to("base.raw")
    assert main(["graph", "--svg", "-o", "link.svg", "-f", "qcow2", chain.name]) == 1
    assert "which would be overwritten" in capsys.readouterr().err
    Path("page.svg").symlink_to("a.svg")
    assert main(["graph", "--svg", "-o", "page.svg", "-f", "qcow2", chain.name]) == 1
    assert "symbolic links are not followed" in capsys.readouterr().err
    assert Path("base.raw").read_bytes() == bytes(MIB)


@pytest.mark.parametrize("output", ["human", "json", "svg"])
def test_nothing_but_an_older_output_is_overwritten(
    chain: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes.txt").write_text("mine")
    Path("empty").touch()
    kept = {name: Path(name).read_bytes() for name in ("base.raw", chain.name, "notes.txt")}
    for name in kept:
        assert main(["graph", "--output", output, "-o", name, "-f", "qcow2", chain.name]) == 1
        assert "overwritten" in capsys.readouterr().err
    # A file that is refused is not opened, but it is not overwritten either.
    words = ["graph", "--output", output, "--references", "none", "-o", "base.raw", "-f", "qcow2", chain.name]
    assert main(words) == 1
    assert "base.raw" in capsys.readouterr().err
    assert {name: Path(name).read_bytes() for name in kept} == kept
    for name in ("new", "new", "empty"):
        assert main(["graph", "--output", output, "-o", name, "-f", "qcow2", chain.name]) == 0
