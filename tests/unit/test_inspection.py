"""`lamina.info`, `lamina.info_chain` and `lamina.check`: typed, frozen results, which the commands print as they are."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import (
    Budget,
    CheckResult,
    FormatError,
    ImageInfo,
    LimitExceeded,
    OptionError,
    Policy,
    PolicyError,
    UnsupportedFeature,
)
from lamina.cli.main import main
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

MIB = 1 << 20


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    for name, below, format in (("middle.qcow2", "base.raw", "raw"), ("top.qcow2", "middle.qcow2", "qcow2")):
        lamina.create(tmp_path / name, "qcow2", backing_file=below, backing_fmt=format, cluster_size=4096)
    return tmp_path / "top.qcow2"


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    main(list(words))
    return json.loads(capsys.readouterr().out)


def test_what_an_image_is(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = lamina.info(top)
    assert isinstance(found, ImageInfo)
    assert found.filename == str(top)
    assert (found.format, found.format_probed) == ("qcow2", True)
    assert (found.virtual_size, found.cluster_size, found.dirty) == (MIB, 4096, False)
    assert (found.backing_filename, found.backing_format) == ("middle.qcow2", "qcow2")
    assert found.full_backing_filename == str(top.parent / "middle.qcow2")
    assert found.actual_size is not None
    assert found.format_specific is not None
    assert found.format_specific["data"]["compat"] == "1.1"
    assert found.unsupported == found.other_writers == ()
    assert found.to_json() == printed(capsys, "info", "--output=json", str(top))
    assert lamina.info(top, format="qcow2") == found._replace(format_probed=False)
    assert lamina.info({"driver": "qcow2", "file": {"filename": str(top)}}) == found._replace(format_probed=False)


def test_results_are_frozen_and_travel(top: Path) -> None:
    for found in (lamina.info(top), lamina.check(top)):
        with pytest.raises(AttributeError):
            found.filename = "another"  # type: ignore[misc]
        assert pickle.loads(pickle.dumps(found)) == found
        assert json.loads(json.dumps(found.to_json())) == found.to_json()


def test_every_field_is_in_the_json() -> None:
    """But for `other_writers`, which is about this moment and not about the image, and `file_size`, which only the output of
    a reference tool has."""
    empty: Any
    for empty in (ImageInfo(), CheckResult("", "")):
        for name, value in zip(empty._fields, empty, strict=True):
            other: Any = (
                (lamina.Finding("note", "x"),)
                if name == "findings"
                else (lamina.Snapshot("1", "x", 512),)
                if name == "snapshots"
                else ("x",)
                if value == ()
                else 7
            )
            changed = empty._replace(**{name: other}).to_json() != empty.to_json()
            assert changed == (name not in ("other_writers", "file_size")), name


def test_a_chain_is_told_from_top_to_bottom(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = lamina.info_chain(top, format="qcow2")
    assert [Path(one.filename).name for one in chain] == ["top.qcow2", "middle.qcow2", "base.raw"]
    assert [one.format for one in chain] == ["qcow2", "qcow2", "raw"]
    told = printed(capsys, "info", "--backing-chain", "-f", "qcow2", "--output=json", str(top))
    assert [one.to_json() for one in chain] == told
    with pytest.raises(PolicyError, match="only detected"):
        lamina.info_chain(top)
    assert lamina.info_chain(top, references=Policy.beneath())[1:] == chain[1:]
    with pytest.raises(PolicyError, match="no name inside"):
        lamina.info_chain(top, format="qcow2", references=Policy.none())
    with pytest.raises(LimitExceeded, match="limit of 1 files"):
        lamina.info_chain(top, format="qcow2", budget=Budget(chain_depth=1))
    assert lamina.info_chain(top.parent / "base.raw", format="raw") == (
        lamina.info(top.parent / "base.raw", format="raw"),
    )


def test_what_lies_in_no_file_names_no_file(top: Path) -> None:
    def spec() -> dict[str, Any]:
        memory = MemoryStorage()
        memory.write(0, memoryview(top.read_bytes()))
        return {"driver": "qcow2", "file": Child(memory, "file")}

    found = lamina.info(spec())
    assert found.backing_filename == found.full_backing_filename == "middle.qcow2"
    with pytest.raises(PolicyError, match="not a file"):
        lamina.info_chain(spec(), references=Policy.any())


def test_a_filter_is_seen_from_above(top: Path) -> None:
    image = {"driver": "qcow2", "file": {"filename": str(top)}}
    found = lamina.info({"driver": "stats", "image": image})
    assert (found.format, found.virtual_size, found.backing_filename) == ("stats", MIB, None)


def test_a_format_without_a_driver_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"KDMV" + bytes(600))
    found = lamina.info(tmp_path / "a")
    assert found.format == "vmdk"
    assert found.virtual_size is None
    assert "vmdk" in found.unsupported[0]
    with pytest.raises(FormatError):
        lamina.info(tmp_path / "a", format="qcow2")


def test_options_of_the_driver_are_looked_at(top: Path) -> None:
    with pytest.raises(OptionError, match="no option"):
        lamina.info({"driver": "qcow2", "file": {"filename": str(top)}, "windows": 3})
    window = {"driver": "raw", "offset": 100, "size": 7, "file": {"filename": str(top)}}
    assert lamina.info(window).virtual_size == 7
    assert lamina.info({**window, "read-only": True}).virtual_size == 7
    with pytest.raises(OptionError, match="options name the driver raw"):
        lamina.info(window, format="qcow2")


def test_a_check_is_a_result(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = lamina.check(top)
    assert isinstance(found, CheckResult)
    assert found.clean
    assert (found.filename, found.format) == (str(top), "qcow2")
    assert found.to_json() == printed(capsys, "check", "--output=json", str(top))
    content = bytearray(top.read_bytes())
    content += bytes(-len(content) % 4096)
    counts = int.from_bytes(content[4096:4104], "big")  # the first refcount block, that the table names
    last = len(content) // 4096
    content[counts + 2 * last : counts + 2 * last + 2] = b"\0\1"
    content += bytes(4096)
    top.write_bytes(content)
    found = lamina.check(top, format="qcow2")
    assert (found.leaks, found.corruptions, found.check_errors) == (1, 0, 0)
    assert not found.clean
    assert found.findings[0].kind == "leak"
    assert found.to_json() == printed(capsys, "check", "--output=json", str(top))


def test_what_has_nothing_to_check_is_refused(top: Path) -> None:
    with pytest.raises(UnsupportedFeature, match="the format raw has nothing to check"):
        lamina.check(top.parent / "base.raw", format="raw")
    image = {"driver": "qcow2", "file": {"filename": str(top)}}
    with pytest.raises(UnsupportedFeature, match="the driver stats has no check"):
        lamina.check({"driver": "stats", "image": image})
    with pytest.raises(LimitExceeded, match="memory in the budget"):
        lamina.check(top, format="qcow2", budget=Budget(memory=0))
