"""`lamina explain`: bytes of a file in words and as JSON, the way from a byte of the disk through a chain, and the
overview."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """top.qcow2 over middle.qcow2 over base.raw, which is shorter, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.raw").write_bytes(b"base" * (128 * KIB))
    lamina.create("middle.qcow2", "qcow2", MIB, backing_file="base.raw", backing_fmt="raw", cluster_size=4096)
    lamina.create("top.qcow2", "qcow2", MIB, backing_file="middle.qcow2", backing_fmt="qcow2", cluster_size=4096)
    with lamina.open("middle.qcow2", format="qcow2", read_only=False) as image:
        image.write(64 * KIB, b"middle" * 1000)
    with lamina.open("top.qcow2", format="qcow2", read_only=False) as image:
        image.write(128 * KIB, b"top" * 5000)
        image.zero(256 * KIB, 4096)
        image.write(8 * KIB, b"x" * 4096, compress=True)
        image.create_snapshot("first")
        image.add_bitmap("b0", 65536)
    return tmp_path / "top.qcow2"


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["explain", *words]) == 0
    return capsys.readouterr().out


def data(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(printed(capsys, "--output=json", *words))


def test_from_the_disk_to_the_file_and_back(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offset = 128 * KIB + 777
    (found,) = data(capsys, "-f", "qcow2", "--guest", str(offset), chain.name)
    assert found["guest-offset"] == offset
    (layer,) = found["layers"]
    assert (layer["filename"], layer["status"], layer["depth"]) == ("top.qcow2", "data", 0)
    host = layer["host"]
    content = chain.read_bytes()
    assert content[host : host + 3] == (b"top" * 5000)[777:780]
    for part in layer["parts"]:
        assert int.from_bytes(content[part["offset"] : part["offset"] + part["length"]]) == part["value"]
    (back,) = data(capsys, "-f", "qcow2", chain.name, str(host))
    assert back["parts"][0]["structure"] == "guest data"
    assert {(one["snapshot"], one["exact"]) for one in back["parts"][0]["guest"]} == {(None, offset), ("1", offset)}
    assert back["refcount"] == 2


def test_through_the_layers_of_a_chain(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def layers(offset: int) -> list[tuple[str, str, int | None]]:
        (found,) = data(capsys, "-f", "qcow2", "--guest", str(offset), "top.qcow2")
        assert [one["depth"] for one in found["layers"]] == list(range(len(found["layers"])))
        return [(one["filename"], one["status"], one["host"]) for one in found["layers"]]

    (_, below), (name, status, host) = (layers(64 * KIB + 5)[0][:2], layers(64 * KIB + 5)[1])
    assert (below, name, status) == ("unallocated", "middle.qcow2", "data")
    assert host is not None
    assert Path(name).read_bytes()[host : host + 6] == (b"middle" * 2)[5:11]
    assert layers(100)[1:] == [("middle.qcow2", "unallocated", None), ("base.raw", "data", 100)]
    assert layers(900 * KIB)[2] == ("base.raw", "past the end of the disk, which reads as zero", None)
    assert layers(256 * KIB) == [("top.qcow2", "zero", None)]
    ((_, status, _),) = layers(8 * KIB)
    assert status == "compressed"


def test_the_text(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(capsys, "-f", "qcow2", chain.name, "24", "0x68")
    assert told.splitlines() == [
        "offset 24 (0x18), cluster 0, refcount 1",
        "  header, size: 8 bytes at 24 (0x18)",
        "    value 0x100000",
        "    1048576 (0x100000); size of the virtual disk in bytes",
        "offset 104 (0x68), cluster 0, refcount 1",
        "  header, compression_type: 1 bytes at 104 (0x68)",
        "    value 0x0",
        "    0 (zlib); how clusters are compressed",
    ]
    told = printed(capsys, "-f", "qcow2", "--guest", "100", "top.qcow2")
    assert "  layer 0: top.qcow2 (qcow2): unallocated" in told
    assert "    L1 table, entry 0 at " in told
    assert "    at offset 100 (0x64) of base.raw" in told


def test_the_overview(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(capsys, "-f", "qcow2", chain.name)
    for word in (
        "l1_table_offset",
        "refcount table",
        "snapshot table",
        "of snapshot 1",
        "bitmap directory",
        "backing_file",
    ):
        assert word in told
    found = data(capsys, "-f", "qcow2", chain.name)
    content = chain.read_bytes()
    for field in found["header"]:
        if isinstance(field.get("value"), int):
            assert int.from_bytes(content[field["offset"] : field["offset"] + field["length"]]) == field["value"]
    assert {one["structure"] for one in found["regions"]} == {
        "header", "L1 table", "L1 table of a snapshot", "refcount table", "snapshot table", "bitmap directory",
        "bitmap table",
    }  # fmt: skip
    for region in found["regions"]:
        (one,) = data(capsys, "-f", "qcow2", chain.name, str(region["offset"]))
        assert one["parts"][0]["structure"] == region["structure"]


def test_a_snapshot_is_a_disk_of_its_own(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lamina.open(chain, format="qcow2", read_only=False) as image:
        image.write(128 * KIB, b"new" * 100)
    at = str(128 * KIB)
    (now,) = data(capsys, "-f", "qcow2", "--guest", at, "top.qcow2")
    spec = "driver=qcow2,file.filename=top.qcow2,snapshot-id=1"
    (then,) = data(capsys, "--image-opts", "--guest", at, spec)
    content = chain.read_bytes()
    hosts = [one["layers"][0]["host"] for one in (now, then)]
    assert [content[host : host + 3] for host in hosts] == [b"new", b"top"]


def test_a_raw_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(10000))
    (found,) = data(capsys, "-f", "raw", str(path), "1234")
    assert found["parts"][0]["guest"] == [
        {"offset": 0, "length": 10000, "status": "data", "snapshot": None, "exact": 1234}
    ]
    spec = f"driver=raw,offset=1k,size=2k,file.filename={path}"
    first, inside, last = data(capsys, "--image-opts", spec, "0", "1500", "5000")
    assert [one["parts"][0]["structure"] for one in (first, inside, last)] == [
        "unreferenced",
        "guest data",
        "unreferenced",
    ]
    assert inside["parts"][0]["guest"][0]["exact"] == 476
    (found,) = data(capsys, "--image-opts", "--guest", "476", spec)
    assert found["layers"][0]["host"] == 1500


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-f", "qcow2", "top.qcow2", "1T"], "the file ends at"),
        (["-f", "qcow2", "--guest", "1T", "top.qcow2"], "the disk ends at"),
        (["-f", "qcow2", "--guest", "0", "top.qcow2", "0"], "exclude each other"),
        (["-f", "qcow2", "top.qcow2", "twelve"], "twelve"),
        (["--image-opts", "driver=throttle,image.driver=raw,image.file.filename=top.qcow2"], "no bytes of its own"),
        (["-f", "vmdk", "top.qcow2", "0"], "vmdk"),
        (["--guest", "100", "top.qcow2"], "is refused"),
        (["missing", "0"], "missing"),
    ],
)
def test_errors(chain: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    assert main(["explain", *words]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_an_external_data_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAMINA_REFERENCES", "same-dir")
    lamina.create("a.qcow2", "qcow2", MIB, data_file="a.data", cluster_size=4096)
    with lamina.open("a.qcow2", format="qcow2", read_only=False) as image:
        image.write(8192, b"outside" * 100)
    (found,) = data(capsys, "-f", "qcow2", "--guest", "8199", "a.qcow2")
    (layer,) = found["layers"]
    assert (layer["status"], layer["file"], layer["host"]) == ("data", "a.data", 8199)
    table = layer["parts"][1]["offset"]
    (back,) = data(capsys, "-f", "qcow2", "a.qcow2", str(table))
    assert back["parts"][0]["guest"][0]["offset"] == 8192
    assert "of the data file" in back["parts"][0]["text"]


def test_beside_a_writer(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lamina.open(chain, format="qcow2", read_only=False):
        assert main(["explain", "-f", "qcow2", "top.qcow2", "24"]) == 1
        assert "open to write" in capsys.readouterr().err
        for words in (["top.qcow2", "24"], ["top.qcow2"], ["--guest", "0", "top.qcow2"]):
            told = printed(capsys, "-U", "-f", "qcow2", *words)
            assert "note: another program has top.qcow2 open for writing" in told


def test_names_cannot_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.qcow2"
    lamina.create(path, "qcow2", MIB, cluster_size=4096)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.create_snapshot("\x1b]0;x\x07")
    told = printed(capsys, "-f", "qcow2", str(path), *map(str, range(0, path.stat().st_size, 8)))
    assert all(line.isprintable() for line in told.splitlines())
    assert "x1b" in told
