"""`lamina convert` when the connection to a server is lost: it goes on over a new one, or fails and leaves no target."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from tests.nbd_peers import Served, Wire

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def dense(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The content of source.raw, without zeros: as many bytes go over the wire as there are."""
    monkeypatch.chdir(tmp_path)
    piece = bytes(byte or 1 for byte in random.Random(seed).randbytes(1 << 16))
    Path("source.raw").write_bytes(piece * (SIZE >> 16))
    return piece * (SIZE >> 16)


@pytest.fixture
def served(dense: bytes) -> Iterator[Served]:
    with Served("disk.sock", SIZE) as there:
        yield there


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["convert", *words]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def read(path: str) -> bytes:
    with lamina.open(path, format="qcow2") as image:
        return image.read(0, SIZE)


@pytest.mark.parametrize("budget", [400, MIB, 3_333_333])
def test_a_source_whose_connection_is_cut_comes_back(served: Served, dense: bytes, tmp_path: Path, budget: int) -> None:
    served.image.write(0, dense)
    with Wire(tmp_path / "wire", tmp_path / "disk.sock", budget=budget) as wire:
        assert main(["convert", "-f", "raw", "-O", "qcow2", wire.uri, "back.qcow2"]) == 0
        assert wire.cuts == 1
    assert read("back.qcow2") == dense


@pytest.mark.parametrize("budget", [300, MIB, 7 * MIB])
def test_a_target_whose_connection_is_cut_comes_back(served: Served, dense: bytes, tmp_path: Path, budget: int) -> None:
    with Wire(tmp_path / "wire", tmp_path / "disk.sock", budget=budget, upward=True) as wire:
        assert main(["convert", "-n", "-f", "raw", "-O", "raw", "source.raw", wire.uri]) == 0
        assert wire.cuts == 1
    assert served.image.read(0, SIZE) == dense


def test_what_a_restarted_server_forgot_is_written_again(
    served: Served, dense: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server acknowledged writes, and ended before a flush; one with an empty disk takes its place."""
    wire = Wire(tmp_path / "wire", tmp_path / "disk.sock", budget=4 * MIB, upward=True)
    with wire, Served("second.sock", SIZE) as second:
        cut = wire.cut

        def cut_and_restart() -> None:
            wire._to = str(tmp_path / "second.sock")
            cut()

        monkeypatch.setattr(wire, "cut", cut_and_restart)
        assert main(["convert", "-n", "-f", "raw", "-O", "raw", "source.raw", wire.uri]) == 0
        assert second.image.read(0, SIZE) == dense


def test_a_format_over_a_server_that_may_have_forgotten_is_an_error(
    dense: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tables may be lost in part, so that no second pass makes the image whole."""
    with Served("large.sock", 2 * SIZE) as served:
        with lamina.open("source.raw", format="raw") as image:
            lamina.create("empty.qcow2", "qcow2", size=image.size)
        served.image.write(0, Path("empty.qcow2").read_bytes())
        with Wire(tmp_path / "wire", tmp_path / "large.sock", budget=4 * MIB, upward=True) as wire:
            told = complaint(capsys, "-n", "-f", "raw", "-O", "qcow2", "source.raw", wire.uri)
    assert "the server may have restarted" in told


@pytest.mark.parametrize("words", [["--reconnect", "0"], ["--reconnect", "0", "-W"]], ids=" ".join)
def test_without_reconnect_a_cut_is_an_error_and_leaves_no_target(
    served: Served, dense: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    served.image.write(0, dense)
    before = sorted(os.listdir())
    with Wire(tmp_path / "wire", tmp_path / "disk.sock", budget=MIB) as wire:
        assert "connection" in complaint(capsys, *words, "-f", "raw", "-O", "qcow2", wire.uri, "back.qcow2")
    assert sorted(set(os.listdir()) - {"wire"}) == before


def test_a_server_that_stays_away_is_an_error_and_the_old_target_stays(
    served: Served, dense: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served.image.write(0, dense)
    Path("back.qcow2").write_bytes(b"what was there")
    with Wire(tmp_path / "wire", tmp_path / "disk.sock", budget=MIB) as wire:
        cut = wire.cut

        def cut_for_good() -> None:
            (tmp_path / "wire").unlink(missing_ok=True)
            cut()

        monkeypatch.setattr(wire, "cut", cut_for_good)
        told = complaint(capsys, "--reconnect", "1", "-f", "raw", "-O", "qcow2", wire.uri, "back.qcow2")
    assert "connection" in told or "wire" in told
    assert Path("back.qcow2").read_bytes() == b"what was there"
    assert not [name for name in os.listdir() if name.startswith(".lamina")]
