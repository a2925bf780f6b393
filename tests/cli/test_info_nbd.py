"""`lamina info` of NBD exports: everything that nbdinfo says, from our own server and from others."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.nbd_peers import nbdkit

import lamina
from lamina.bitmap import MemoryBitmap
from lamina.cli.main import main
from lamina.nbd import Export, Server

MIB = 1 << 20


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[str]:
    """Our server with the exports "disk" (3 MiB, writable, described, a bitmap) and "q" (a qcow2 file, read-only)."""
    lamina.create(tmp_path / "q.qcow2", "qcow2", 1 * MIB)
    path = str(tmp_path / "s")
    with (
        lamina.open({"driver": "memory", "size": 3 * MIB}, read_only=False) as disk,
        lamina.open(str(tmp_path / "q.qcow2"), format="raw") as file,
    ):
        exports = [
            Export(disk, "disk", description="a disk\x1b[2J", writable=True, bitmaps={"b0": MemoryBitmap()}),
            Export(file, "q"),
        ]
        with Server(exports, unix=path):
            yield path


def uri(socket: str, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={socket}"


def told(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    capsys.readouterr()
    assert main(["info", *arguments]) == status
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(told(capsys, "--output", "json", *arguments, status=status))
    return found


def test_the_keys_are_those_of_nbdinfo(socket: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, uri(socket, "disk"))
    (export,) = found.pop("exports")
    assert found == {"protocol": "newstyle-fixed", "TLS": False, "structured": True, "extended": True}
    # Whether a status may have a payload depends on contexts that were selected, which asking does not do.
    assert isinstance(export.pop("can_block_status_payload"), bool)
    contexts = {"base:allocation", "qemu:allocation-depth", "lamina:exact", "qemu:dirty-bitmap:b0"}
    assert set(export.pop("contexts")) == contexts
    assert export == {
        "export-name": "disk",
        "description": "a disk\\x1b[2J",
        "content": "raw",
        "uri": uri(socket, "disk"),
        "is_rotational": False,
        "is_read_only": False,
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": True,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
        "block_size_minimum": 1,
        "block_size_preferred": export["block_size_preferred"],
        "block_size_maximum": 32 * MIB,
        "export-size": 3 * MIB,
        "export-size-str": "3M",
    }


def test_for_people(socket: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, uri(socket, "disk"))
    lines = text.splitlines()
    assert lines[0] == "protocol: newstyle-fixed without TLS, using extended packets"
    assert lines[1] == 'export="disk":'
    assert "\texport-size: 3145728 (3 MiB)" in lines
    assert "\tdescription: a disk\\x1b[2J" in lines  # what a server says cannot drive a terminal
    assert "\t\tqemu:dirty-bitmap:b0" in lines
    assert "\tcan_trim: true" in lines
    assert "\tblock_size_minimum: 1 (1 B)" in lines


def test_all_exports(socket: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "--list", uri(socket))
    assert [export["export-name"] for export in found["exports"]] == ["disk", "q"]
    assert [export["is_read_only"] for export in found["exports"]] == [False, True]
    assert not any("content" in export for export in found["exports"])
    found = as_json(capsys, "-L", "--content", uri(socket))
    assert [export["content"] for export in found["exports"]] == ["raw", "qcow2"]
    assert told(capsys, "-L", uri(socket)).count("export=") == 2
    assert "content" not in as_json(capsys, "--no-content", uri(socket, "q"))["exports"][0]


def test_the_image_in_an_export(socket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "-f", "qcow2", uri(socket, "q"))
    assert (found["format"], found["virtual-size"]) == ("qcow2", 1 * MIB)
    options = f"driver=qcow2,file.driver=nbd,file.path={socket},file.export=q"
    assert as_json(capsys, "--image-opts", options)["virtual-size"] == 1 * MIB
    chain = told(capsys, "--backing-chain", "--output", "json", "-f", "qcow2", uri(socket, "q"))
    assert len(json.loads(chain)) == 1


def test_a_backing_file_named_in_an_export_is_not_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lamina.create("base.qcow2", "qcow2", MIB)
    lamina.create("top.qcow2", "qcow2", MIB, backing_file="base.qcow2", backing_fmt="qcow2")
    with lamina.open("top.qcow2", format="raw") as file, Server([Export(file)], unix="s"):
        found = as_json(capsys, "-f", "qcow2", uri("s"))
        assert found["full-backing-filename"] == "base.qcow2"
        assert main(["info", "--backing-chain", "-f", "qcow2", uri("s")]) == 1
        assert "not a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--list", "disk.raw"], "only servers have a list"),
        (["--list", "-f", "raw", "nbd://localhost"], "a list is of exports"),
        (["--backing-chain", "nbd://localhost"], "give the format"),
        (["nbd://-oRun=x/"], "host"),
        (["nbd+unix:///x?socket=absent"], "absent"),
    ],
)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["info", *arguments]) == 1
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert words in complaint


def test_an_export_that_is_not_there(socket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", uri(socket, "missing")]) == 1
    assert "missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [(), ("--no-sr",), ("--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-maximum=1M")]
)
def test_the_same_as_nbdinfo_of_other_servers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    flags, settings = [o for o in options if o.startswith("-")], [o for o in options if not o.startswith("-")]
    with nbdkit(tmp_path, *flags, "memory", "10M", *settings) as address:
        ours = as_json(capsys, address)
        if not shutil.which("nbdinfo"):
            pytest.skip("install libnbd-bin to compare with nbdinfo")
        peers = json.loads(subprocess.run(["nbdinfo", "--json", address], capture_output=True, check=True).stdout)
    for one in (ours["exports"][0], peers["exports"][0]):
        one.pop("content")  # nbdinfo asks file(1)
    # Which nbdinfo this is decides what it knows of extended headers.
    peers.setdefault("extended", ours["extended"])
    peers["exports"][0] = {"contexts": [], "can_block_status_payload": False} | peers["exports"][0]
    assert ours == peers


def test_an_error_while_the_content_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with nbdkit(tmp_path, "--filter=error", "memory", "1M", "error-pread-rate=100%") as address:
        assert main(["info", address]) == 1
        assert "read" in capsys.readouterr().err
        assert as_json(capsys, "--no-content", address)["exports"][0]["export-size"] == MIB
