"""How `lamina serve` ends: told once in good order and within a bound, told twice at once; in the background; its files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import lamina
from lamina.limits import MIB
from lamina.nbd import wire as w
from tests.nbd_raw import PATIENCE, dial

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
#: A disk whose writes never come back while the test lasts.
STUCK = (
    'json:{"driver":"delay","write-ms":600000,"image":{"driver":"raw","file":{"driver":"file","filename":"disk.raw"}}}'
)


@contextmanager
def running(
    folder: Path, *args: str, bound: float | None = None, ready: bool = True
) -> Iterator[subprocess.Popen[str]]:
    """`lamina serve -t -k s` in `folder`, with another bound for its end."""
    code = "import sys, lamina.cli.ending as ending; from lamina.cli.main import main; "
    code += f"ending.BOUND = {bound}; " if bound is not None else ""
    code += "sys.exit(main(['serve', '-t', '-k', 's', *sys.argv[1:]]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        if ready:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            assert line.startswith("ready: "), process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    return tmp_path


@pytest.mark.parametrize("number", SIGNALS)
def test_told_once_it_ends_in_good_order(folder: Path, number: signal.Signals) -> None:
    with running(folder, "-w", "-f", "raw", "disk.raw", "--pid-file", "pid", "--stats", "counters") as process:
        assert int((folder / "pid").read_text()) == process.pid
        with dial(folder / "s") as raw:
            raw.begin("")
            assert not raw.write(0, b"kept").error
            process.send_signal(number)
            assert raw.ended()
        assert process.wait(PATIENCE) == 0
    assert (folder / "disk.raw").read_bytes()[:4] == b"kept"
    assert json.loads((folder / "counters").read_text())["WRITE"] == 1
    assert sorted(os.listdir(folder)) == ["counters", "disk.raw"]


@pytest.mark.parametrize("number", SIGNALS)
def test_told_twice_it_ends_at_once(folder: Path, number: signal.Signals) -> None:
    """Also while a request is stuck in storage; the names that it made are removed."""
    with running(folder, "-w", STUCK, "--pid-file", "pid") as process, dial(folder / "s") as raw:
        raw.begin("")
        raw.stream.send(raw.write_bytes(0, b"stuck"))
        raw.request(w.CMD_READ, 0, 512)
        assert raw.collect(1)[0].data == bytes(512)  # so the write was received
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while (folder / "s").exists():
            assert time.monotonic() < deadline, "it does not begin to end"
            time.sleep(0.01)
        assert (folder / "pid").exists(), "it ended, and this tests nothing"
        process.send_signal(number)
        assert process.wait(PATIENCE) == 128 + number
    assert sorted(os.listdir(folder)) == ["disk.raw"]


def test_a_request_that_is_stuck_holds_up_its_end_no_longer_than_the_bound(folder: Path) -> None:
    with running(folder, "-w", STUCK, "--pid-file", "pid", bound=7.0) as process, dial(folder / "s") as raw:
        raw.begin("")
        raw.stream.send(raw.write_bytes(0, b"stuck"))
        raw.request(w.CMD_READ, 0, 512)
        assert raw.collect(1)[0].data == bytes(512)  # so the write was received
        process.terminate()
        assert process.wait(PATIENCE) in (0, 1)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert sorted(os.listdir(folder)) == ["disk.raw"]


def test_a_signal_that_was_ignored_stays_ignored(folder: Path) -> None:
    """nohup: the server outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with running(folder, "-f", "raw", "disk.raw") as process:
            process.send_signal(signal.SIGHUP)
            with dial(folder / "s") as raw:
                assert raw.begin("").read(0, 512) == bytes(512)
            process.terminate()
            assert process.wait(PATIENCE) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# -- in the background


def background(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lamina", "serve", "--fork", "--pid-file", "pid", "-k", "s", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_in_the_background_clients_write(folder: Path) -> None:
    """The image is opened by the process that serves it."""
    lamina.create(folder / "disk.qcow2", "qcow2", MIB)
    done = background(folder, "-t", "-w", "-f", "qcow2", "disk.qcow2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ready: ")
    pid = int((folder / "pid").read_text())
    try:
        with dial(folder / "s") as raw:
            raw.begin("")
            assert not raw.write(0, b"kept" * 1024).error
            assert not raw.ask(w.CMD_FLUSH).error
            assert raw.read(0, 4) == b"kept"
    finally:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while (folder / "pid").exists():
            assert time.monotonic() < deadline, "the pid file is still there"
            time.sleep(0.02)
    with lamina.open(folder / "disk.qcow2", format="qcow2") as image:
        assert image.read(0, 4) == b"kept"


@pytest.mark.parametrize(
    "args", [["-f", "raw", "none.raw"], ["-f", "raw", "disk.raw", "--pid-file", "link"], ["-f", "qcow2", "disk.raw"]]
)
def test_in_the_background_a_mistake_is_told(folder: Path, args: list[str]) -> None:
    (folder / "link").symlink_to("elsewhere")
    done = background(folder, *args)
    assert done.returncode == 1
    assert done.stderr.startswith("lamina: ")
    assert done.stderr.count("\n") == 1
    assert sorted(os.listdir(folder)) == ["disk.raw", "link"]


def test_counters_go_into_a_fifo(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    reader = subprocess.Popen(["cat", "fifo"], cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        with running(folder, "-f", "raw", "disk.raw", "--stats", "fifo") as process:
            process.terminate()
            assert process.wait(PATIENCE) == 0
        said, _ = reader.communicate(timeout=PATIENCE)
        assert json.loads(said)["connections"] == 0
    finally:
        reader.kill()
        reader.wait(PATIENCE)


def test_discards_are_ignored_when_told_so(folder: Path) -> None:
    (folder / "disk.raw").write_bytes(b"x" * MIB)
    for mode, byte in (("ignore", b"x"), ("unmap", b"\0")):
        with running(folder, "-w", "--discard", mode, "-f", "raw", "disk.raw") as process, dial(folder / "s") as raw:
            raw.begin("")
            assert not raw.ask(w.CMD_TRIM, 0, MIB).error
            assert raw.read(0, 1) == byte
            process.terminate()
            assert process.wait(PATIENCE) == 0
