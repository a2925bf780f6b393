"""`lamina info` of NBD exports: everything that nbdinfo says, from our own server and from others."""

from __future__ import annotations

import json
import socket as socket_module
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.bitmap import MemoryBitmap
from lamina.cli.main import main
from lamina.nbd import Export, Server, wire
from lamina.nbd.inspect import list_exports
from tests.conftest import NbdTools, Qemu
from tests.nbd_fake_server import FakeServer, exactly
from tests.nbd_peers import nbdkit, program, running
from tests.nbd_scripts import export, greeting, info_export, option, refusal

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
    contexts = {"base:allocation", "qemu:allocation-depth", "lamina:exact", "qemu:dirty-bitmap:b0"}
    assert set(export.pop("contexts")) == contexts
    assert export == {
        "export-name": "disk",
        "description": "a disk\\x1b[2J",
        "content": "raw",
        "uri": uri(socket, "disk"),
        "is_rotational": False,
        "is_read_only": False,
        "can_block_status_payload": True,
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
        (["--list", "disk.raw"], "only NBD servers have"),
        (["--list", "-f", "raw", "nbd://localhost"], "concern an image"),
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
    "options",
    [
        (),
        ("--no-sr",),
        ("--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-maximum=1M"),
        ("--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-maximum=4294967295"),
    ],
)
def test_the_same_as_nbdinfo_of_other_servers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    flags, settings = [o for o in options if o.startswith("-")], [o for o in options if not o.startswith("-")]
    with nbdkit(tmp_path, *flags, "memory", "10M", *settings) as address:
        ours = as_json(capsys, address)
        nbdinfo = program("nbdinfo", "libnbd-bin")
        peers = json.loads(subprocess.run([nbdinfo, "--json", address], capture_output=True, check=True).stdout)
    for one in (ours["exports"][0], peers["exports"][0]):
        one.pop("content")  # nbdinfo asks file(1)
    # Which nbdinfo this is decides what it knows of extended headers.
    peers.setdefault("extended", ours["extended"])
    peers["exports"][0] = {"contexts": [], "can_block_status_payload": False} | peers["exports"][0]
    assert ours == peers


def test_the_same_as_the_newer_nbdinfo_of_the_newer_qemu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], qemu10: Qemu, nbd_tools_new: NbdTools
) -> None:
    """Extended headers: BLOCK_STATUS_PAYLOAD, which is told only once contexts are selected, among what is compared."""
    image, path = tmp_path / "disk.qcow2", tmp_path / "qemu.sock"
    qemu10.img("create", "-f", "qcow2", image, "10M")
    qemu10.img("bitmap", "--add", image, "b0")
    program = str(Path(qemu10.peer.qemu_img).with_name("qemu-nbd"))
    command = [program, "-f", "qcow2", "-r", "-t", "-A", "-B", "b0", "-x", "disk", "-D", "one", "-k", str(path)]
    with running([*command, str(image)], path):
        address = uri(str(path), "disk")
        peers = json.loads(nbd_tools_new.run("nbdinfo", "--json", address).stdout)
        ours = as_json(capsys, address)
        assert list(ours["exports"][0]) == list(peers["exports"][0]), "in the same order"
        for one in (ours["exports"][0], peers["exports"][0]):
            one.pop("content")
        assert ours == peers
        assert ours["exports"][0]["can_block_status_payload"]


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[str]:
    """A server whose second export has a name that is no UTF-8; the name of its third would drive a terminal."""

    def behave(sock: socket_module.socket, number: int) -> None:
        sock.sendall(greeting())
        exactly(sock, 4)
        while True:
            head = wire.OPTION.unpack(exactly(sock, wire.OPTION.size))
            data = exactly(sock, head.length)
            if head.option == wire.OPT_LIST:
                sock.sendall(export(b"a") + export(b"b\xff\x1b", b"odd") + export(b"\x1b[2J") + option(wire.OPT_LIST))
            elif head.option == wire.OPT_INFO:
                assert b"\xff" not in data
                sock.sendall(info_export(3 * MIB, number=wire.OPT_INFO) + option(wire.OPT_INFO))
            elif head.option == wire.OPT_ABORT:
                sock.sendall(option(wire.OPT_ABORT))
                return
            else:
                sock.sendall(refusal(head.option))

    server = FakeServer(tmp_path / "odd", behave)
    yield server.uri
    server.close()
    assert not server.failures, server.failures


def test_a_name_that_is_no_text_spoils_only_itself(odd: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "--list", odd, status=1)
    assert [one["export-name"] for one in found["exports"]] == ["a", "b\\xff\x1b", "\x1b[2J"]
    assert [one.get("export-size") for one in found["exports"]] == [3 * MIB, None, 3 * MIB]
    assert ["uri" in one for one in found["exports"]] == [True, False, True]
    assert found["exports"][1]["description"] == "odd"
    assert "cannot be asked for" in found["exports"][1]["error"]
    text = told(capsys, "--list", odd, status=1)
    assert 'export="b\\xff\\x1b":' in text
    assert text.replace("\n", "").replace("\t", "").isprintable()
    assert [one.name for one in list_exports(odd)] == ["a", "b\\xff\x1b", "\x1b[2J"]


def test_an_error_while_the_content_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with nbdkit(tmp_path, "--filter=error", "memory", "1M", "error-pread-rate=100%") as address:
        assert main(["info", address]) == 1
        assert "read" in capsys.readouterr().err
        assert as_json(capsys, "--no-content", address)["exports"][0]["export-size"] == MIB
