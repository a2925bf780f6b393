"""The JSON of the command line against its schemas, and docs/json.md against both.

Each output is validated by the package `jsonschema`, which knows nothing of Lamina. The schemas admit no key that they do not
name, so a new key without a schema fails here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest

import lamina
from lamina import json_forms as forms
from lamina import json_forms_nbd as nbd_forms
from lamina.bitmap import MemoryBitmap
from lamina.cli.main import main
from lamina.explanation import Overview, Step
from lamina.jobs.diff import Range
from lamina.nbd import Export, Server
from lamina.registry import names

ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 1 << 20

Printed = Callable[..., Any]


def require(kind: Any, value: Any) -> None:
    """Raise ValidationError unless `value` is what the schema of `kind` says."""
    schema = lamina.json_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """Runs a command with `--output json`, and returns what it prints."""

    def run(*words: str, status: int = 0) -> Any:
        capsys.readouterr()
        assert main([*words, "--output", "json"]) == status
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images of many kinds, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.raw").write_bytes(b"b" * MIB + bytes(MIB))
    lamina.create("plain.qcow2", "qcow2", 4 * MIB, cluster_size=4096)
    lamina.create("old.qcow2", "qcow2", MIB, compat="0.10")
    lamina.create("subclusters.qcow2", "qcow2", 4 * MIB, extended_l2=True, lazy_refcounts=True, compression_type="zstd")
    lamina.create("external.qcow2", "qcow2", MIB, data_file="external.raw", data_file_raw=True)
    lamina.create("middle.qcow2", "qcow2", 3 * MIB, backing_file="base.raw", backing_fmt="raw")
    lamina.create("top.qcow2", "qcow2", 4 * MIB, backing_file="middle.qcow2", backing_fmt="qcow2")
    for name in ("plain.qcow2", "old.qcow2", "subclusters.qcow2", "top.qcow2"):
        with lamina.open(name, format="qcow2", read_only=False) as image:
            image.write(65536, b"x" * 100_000)
            image.write(524288, b"compressed" * 13107, compress=True)
            image.create_snapshot("first", b"state" * 100)
            image.write(0, b"y" * 70_000)
            image.zero(200_000, 70_000)
            if name != "old.qcow2":
                image.add_bitmap("dirty")
                image.write(300_000, b"z")
    damage("plain.qcow2", "damaged.qcow2")
    (tmp_path / "noise").write_bytes(os.urandom(100_000))
    return tmp_path


def damage(name: str, new: str) -> None:
    """A copy of a qcow2 image with wrong reference counts."""
    data = bytearray(Path(name).read_bytes())
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    data[block + 6 : block + 12] = bytes((0, 0, 0, 5, 0, 1))
    Path(new).write_bytes(data)


IMAGES = ["base.raw", "plain.qcow2", "old.qcow2", "subclusters.qcow2", "external.qcow2", "top.qcow2", "damaged.qcow2"]


def format_of(name: str) -> str:
    return "raw" if name.endswith(".raw") else "qcow2"


@pytest.mark.parametrize("name", [*IMAGES, "noise"])
@pytest.mark.parametrize("given", [True, False], ids=["format given", "format detected"])
def test_info(folder: Path, printed: Printed, name: str, given: bool) -> None:
    format = "raw" if name == "noise" else format_of(name)
    found = printed("info", *(["-f", format] if given else []), name)
    require("ImageInfo", found)
    assert found == lamina.info(name, format=format if given else "probe").to_json()
    assert ("format-probed" in found) is not given


def test_info_of_a_chain_and_of_a_filter(folder: Path, printed: Printed) -> None:
    found = printed("info", "--backing-chain", "-f", "qcow2", "top.qcow2")
    require(list[lamina.ImageInfo], found)
    assert [one["format"] for one in found] == ["qcow2", "qcow2", "raw"]
    require(
        lamina.ImageInfo, printed("info", "--image-opts", "driver=stats,image.driver=raw,image.file.filename=base.raw")
    )


def test_info_of_an_encrypted_image(folder: Path, printed: Printed) -> None:
    pytest.importorskip("cryptography", reason="an extra")
    Path("secret").write_text("passphrase")
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    secret = ["--object", "secret,id=s,file=secret"]
    assert main(["create", "-q", "-f", "qcow2", *secret, "-o", options, "secret.qcow2", "1M"]) == 0
    found = printed("info", "-f", "qcow2", "secret.qcow2")
    require("ImageInfo", found)
    assert found["encrypted"] is True


@pytest.mark.parametrize("name", IMAGES)
def test_check(folder: Path, printed: Printed, name: str) -> None:
    if name == "base.raw":
        assert main(["check", "-f", "raw", "--output", "json", name]) == 63
        return
    found = printed("check", "-f", "qcow2", name, status=2 if name == "damaged.qcow2" else 0)
    require("CheckResult", found)
    assert found == lamina.check(name, format="qcow2").to_json()
    assert bool(found["findings"]) is (name == "damaged.qcow2")


def test_a_repair(folder: Path, printed: Printed) -> None:
    found = printed("check", "-f", "qcow2", "-r", "all", "damaged.qcow2")
    require("CheckResult", found)
    assert found["corruptions-fixed"] > 0


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounded"])
def test_map(folder: Path, printed: Printed, name: str, exact: bool) -> None:
    words = ["map", "-f", format_of(name), *(["--exact"] if exact else []), name]
    found = printed(*words)
    require(list[lamina.Extent], found)
    require("Extents", found)
    with lamina.open(name, format=format_of(name)) as image:
        rows = image.extents()
        assert found == (rows if exact else rows.align(image.alignment)).coalesce().to_json()


@pytest.mark.parametrize("name", IMAGES)
def test_explain(folder: Path, printed: Printed, name: str) -> None:
    format = format_of(name)
    size = Path(name).stat().st_size
    offsets = sorted({0, 50, *range(0, size, max(size // 40, 1)), size - 1})
    found = printed("explain", "-f", format, name, *map(str, offsets))
    require(list[lamina.Explanation], found)
    assert found == [one.to_json() for one in lamina.explain(name, *offsets, format=format)]
    found = printed("explain", "-f", format, name)
    require(Overview, found)
    assert found == lamina.structures(name, format=format).to_json()


def test_explain_the_guest(folder: Path, printed: Printed) -> None:
    offsets = ("0", "100000", "530000", "900000", "2000000", "3500000")
    for name in ("top.qcow2", "subclusters.qcow2", "external.qcow2", "damaged.qcow2"):
        asked = [
            word for offset in offsets if int(offset) < MIB or name != "external.qcow2" for word in ("--guest", offset)
        ]
        found = printed("explain", "-f", "qcow2", name, *asked)
        require(list[forms.GuestPathJson], found)
        for path in found:
            require(list[Step], path["layers"])
            steps = lamina.explain_guest(name, path["guest-offset"], format="qcow2")
            assert path["layers"] == [step.to_json() for step in steps]


@pytest.mark.parametrize("name", [*IMAGES, "noise"])
def test_inspect(folder: Path, printed: Printed, name: str) -> None:
    verdict = lamina.inspect(name)
    found = printed("inspect", name, status=0 if verdict.safe else 1)
    require("Verdict", found)
    assert found == verdict.to_json()


def test_diff(folder: Path, printed: Printed) -> None:
    for words in (
        ["-f", "qcow2", "-F", "qcow2", "plain.qcow2", "top.qcow2"],
        ["-f", "qcow2", "-F", "qcow2", "top.qcow2", "top.qcow2"],
        ["-f", "qcow2", "--bitmap", "dirty", "plain.qcow2"],
    ):
        require(forms.DiffJson, printed("diff", *words))
    with lamina.open("plain.qcow2", format="qcow2") as first, lamina.open("top.qcow2", format="qcow2") as second:
        ranges = [one.to_json() for one in lamina.diff(first, second)]
    assert ranges
    assert printed("diff", "-f", "qcow2", "-F", "qcow2", "plain.qcow2", "top.qcow2")["block_metadata"] == ranges
    require(list[Range], ranges)


@pytest.mark.parametrize("name", IMAGES)
def test_graph(folder: Path, printed: Printed, name: str) -> None:
    require(forms.NodeJson, printed("graph", "-f", format_of(name), name))


def test_graph_of_filters_and_of_shared_nodes(folder: Path, printed: Printed) -> None:
    image = {"driver": "raw", "node-name": "shared", "file": {"driver": "file", "filename": "base.raw"}}
    memory = {"driver": "memory", "size": 2 * MIB}
    for spec in (
        {"driver": "throttle", "bps-read": MIB, "detect-zeroes": "unmap", "discard": "ignore", "image": image},
        {"driver": "concat", "children": [image, memory, "shared"]},
    ):
        found = printed("graph", "json:" + json.dumps(spec))
        require(forms.NodeJson, found)
    assert found["children"][2]["node"] == {"name": "shared", "driver": "raw", "shared": True}


def test_graph_of_a_chain_that_is_incomplete(folder: Path, printed: Printed) -> None:
    Path("base.raw").unlink()
    found = printed("graph", "-f", "qcow2", "top.qcow2", status=1)
    require(forms.NodeJson, found)
    assert "not-opened" in str(found)


def test_measure(folder: Path, printed: Printed) -> None:
    for words in (
        ["--size", "1G", "-O", "qcow2"],
        ["-f", "qcow2", "-O", "qcow2", "plain.qcow2"],
        ["-f", "raw", "base.raw"],
    ):
        require(lamina.MeasureResult, printed("measure", *words))


def test_snapshots(folder: Path, printed: Printed) -> None:
    for name in ("plain.qcow2", "subclusters.qcow2", "middle.qcow2"):
        found = printed("snapshot", "-l", "-f", "qcow2", name)
        require(list[lamina.Snapshot], found)
        assert bool(found) is (name != "middle.qcow2")


def test_compact_copy_and_bench(folder: Path, printed: Printed) -> None:
    require(forms.CompactResultJson, printed("compact", "-f", "qcow2", "middle.qcow2"))
    require(lamina.CopyResult, printed("copy", "base.raw", "copied.raw"))
    require(forms.BenchResultJson, printed("bench", "-f", "raw", "-c", "10", "base.raw"))
    require(
        forms.BenchResultJson,
        printed("bench", "-w", "-f", "raw", "-c", "10", "-d", "2", "--flush-interval", "5", "base.raw"),
    )


def test_drivers(folder: Path, printed: Printed) -> None:
    require(list[forms.DriverJson], printed("drivers"))
    for name in names():
        require(forms.DriverJson, printed("drivers", name))


def test_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["info", "missing"],
        ["map", "-f", "qcow2", "noise"],
        ["map", "-f", "qcow2", "-s", "1G", "plain.qcow2"],
    ):
        capsys.readouterr()
        assert main([*words, "--output", "json"]) == 1
        require(forms.ErrorJson, json.loads(capsys.readouterr().err))


# NBD


@pytest.fixture
def exported(folder: Path) -> Iterator[str]:
    """The address of a server with two exports."""
    path = str(folder / "s")
    with (
        lamina.open({"driver": "memory", "size": 3 * MIB}, read_only=False) as disk,
        lamina.open("base.raw", format="raw") as file,
    ):
        disk.write(MIB, b"data")
        bitmaps = {"b0": MemoryBitmap()}
        exports = [Export(disk, "disk", description="a disk", writable=True, bitmaps=bitmaps), Export(file, "raw")]
        with Server(exports, unix=path):
            yield f"nbd+unix:///disk?socket={path}"


def test_info_of_a_server(exported: str, printed: Printed) -> None:
    require(nbd_forms.ExportsJson, printed("info", exported))
    found = printed("info", "--list", exported)
    require(nbd_forms.ExportsJson, found)
    assert len(found["exports"]) == 2


def test_map_of_contexts(exported: str, printed: Printed) -> None:
    for contexts in (["base:allocation"], ["lamina:exact", "qemu:dirty-bitmap:b0"], ["all"]):
        words = [word for one in contexts for word in ("--context", one)]
        require(list[nbd_forms.ContextRangeJson], printed("map", *words, exported))
        require(list[nbd_forms.ContextTotalJson], printed("map", "--totals", *words, exported))


@pytest.mark.parametrize("folder_of", [True, False], ids=["folder", "file"])
def test_serve(folder: Path, folder_of: bool) -> None:
    what = ["--folder", "."] if folder_of else ["-f", "raw", "base.raw"]
    command = [sys.executable, "-m", "lamina", "serve", "--output=json", "--socket", "s", *what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    found = json.loads(line)
    require(nbd_forms.ServingJson, found)
    assert ("folder" in found) is folder_of


# The page


@pytest.fixture
def json_page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("json_page", ROOT / "docs" / "json_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_schemas(json_page: ModuleType) -> None:
    assert (ROOT / "docs" / "json.md").read_text() == json_page.page(), "run make docs"


def test_every_key_has_a_meaning(json_page: ModuleType) -> None:
    for output in json_page.OUTPUTS:
        schema = lamina.json_schema(output.kind)
        jsonschema.Draft202012Validator.check_schema(schema)
        for one in ([schema] if schema.get("type") == "object" else []) + list(schema.get("$defs", {}).values()):
            assert one["description"]
            missing = [key for key, value in one["properties"].items() if not value.get("description")]
            assert not missing, f"{output.command}: no description of {', '.join(missing)}"


def test_every_form_is_on_the_page(json_page: ModuleType) -> None:
    page = json_page.page()
    for name in [*vars(forms), *vars(nbd_forms)]:
        if name.endswith("Json"):
            assert f"### {name.removesuffix('Json')}\n" in page
