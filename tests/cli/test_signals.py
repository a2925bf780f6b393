"""What signals do to a command: the first ends the work at a safe point, the second at once, SIGUSR1 tells how far it is."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.nbd import wire
from tests.nbd_fake_server import answer, exactly, greeting, requests, shake, starting

LAMINA = [sys.executable, "-m", "lamina"]
ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

#: A command in a module of its own, put in the place of `check`, and run as the installed program runs it.
PROGRAM = """
import sys, time, types
import lamina.cli.main as program
command = types.ModuleType("lamina.cli.check")
exec(sys.argv[1], command.__dict__)
sys.modules["lamina.cli.check"] = command
sys.argv[1:] = ["check"]
program.run()
"""


@contextlib.contextmanager
def started(*command: str, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is under way; killed at the end, if it has not ended."""
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    with subprocess.Popen(command, **settings) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error, once it ends."""
    out, err = process.communicate(timeout=20)
    return process.returncode, (out or b"").decode(), (err or b"").decode()


def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """An image whose every byte is worked on for longer than any test takes."""
    source = tmp_path / "endless.raw"
    with source.open("wb") as file:
        file.truncate(1 << 42)
    return source


def said(word: signal.Signals) -> str:
    return "lamina: interrupted" + ("" if word == signal.SIGINT else f" by {word.name}")


@pytest.mark.parametrize("word", ENDING)
@pytest.mark.parametrize("command", ["convert", "copy"])
def test_a_new_target_is_not_there_after_a_signal(
    tmp_path: Path, endless: Path, command: str, word: signal.Signals
) -> None:
    folder = tmp_path / "to"
    folder.mkdir()
    options = ["-S", "0", "-f", "raw", "-O", "qcow2"] if command == "convert" else ["-S", "0", "--no-extents"]
    with started(*LAMINA, command, "-p", *options, str(endless), str(folder / "target")) as process:
        assert process.stdout is not None
        process.stdout.read(24)
        process.send_signal(word)
        status, _, told = ended(process)
    assert status == 128 + word
    assert told == f"{said(word)}; nothing was changed at {folder / 'target'}\n"
    assert os.listdir(folder) == []


def test_what_is_written_in_place_is_told_after_a_signal(tmp_path: Path, endless: Path) -> None:
    target, journal = tmp_path / "target", tmp_path / "journal"
    with target.open("wb") as file:
        file.truncate(1 << 42)
    convert = ["convert", "-n", "-p", "-S", "0", "-f", "raw", "-O", "raw", str(endless), str(target)]
    copy = ["copy", "-p", "-S", "0", "--no-extents", str(endless), "--resume-file", str(journal), str(tmp_path / "new")]
    for command, words in (
        (convert, f"; {target} is partly overwritten"),
        (copy, r"; the same command resumes at \d+ \([\w. ]+\)"),
    ):
        with started(*LAMINA, *command) as process:
            assert process.stdout is not None
            process.stdout.read(24)
            process.send_signal(signal.SIGTERM)
            status, _, told = ended(process)
        assert status == 128 + signal.SIGTERM
        assert re.fullmatch(f"{said(signal.SIGTERM)}{words}\n", told), told
    assert journal.exists()


@pytest.mark.parametrize("word", ENDING)
def test_commands_without_a_target_end_in_one_line(tmp_path: Path, endless: Path, word: signal.Signals) -> None:
    other = tmp_path / "other.raw"
    # A twin with one byte of data at its end: it takes a walk over all of both to find it.
    with other.open("wb") as file:
        file.truncate(1 << 42)
    compare = [*LAMINA, "compare", "-p", "-f", "raw", "-F", "raw", "--image-opts"]
    names = [f"driver=noextents,image.driver=raw,image.file.filename={path}" for path in (endless, other)]
    command = [word for word in compare if word not in ("-f", "-F", "raw")]
    with started(*command, *names) as process:
        assert process.stdout is not None
        process.stdout.read(24)
        process.send_signal(word)
        status, _, told = ended(process)
    assert (status, told) == (128 + word, f"{said(word)}\n")


@pytest.mark.parametrize("word", ENDING)
def test_a_signal_ends_the_commands_of_io_and_closes_the_image(tmp_path: Path, word: signal.Signals) -> None:
    image = tmp_path / "disk.qcow2"
    subprocess.run([*LAMINA, "create", "-q", "-f", "qcow2", str(image), "64M"], check=True)
    with started(*LAMINA, "io", "-t", "writeback", str(image), stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"write -P 5 0 1M\nsleep 100000\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith(b"wrote 1048576")
        process.stdout.readline()
        process.send_signal(word)
        status, _, told = ended(process)
    assert (status, told) == (128 + word, f"{said(word)}\n")
    assert subprocess.run([*LAMINA, "check", "-q", str(image)]).returncode == 0
    read = [*LAMINA, "io", "-r", "-c", "read -P 5 0 1M", str(image)]
    assert subprocess.run(read, stdout=subprocess.DEVNULL).returncode == 0


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(tmp_path: Path) -> None:
    program = f"trap '' HUP; exec {sys.executable} -m lamina io"
    with started("sh", "-c", program, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"help quit\n")
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        process.stdin.write(b"help quit\n")
        process.stdin.flush()
        process.stdout.readline()
        status, _, told = ended(process)
    assert (status, told) == (0, "")


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[tuple[str, threading.Event]]:
    """The URI of an export of 64 MiB whose server answers questions of status, and nothing else; and what is set once it was
    asked for anything else."""
    asked = threading.Event()

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, 64 << 20)
        for one in requests(sock):
            if one.command == wire.CMD_BLOCK_STATUS:
                sock.sendall(answer(bytearray(64 << 20), one))
            else:
                asked.set()

    with starting(tmp_path) as serve:
        yield serve(behave).uri, asked


SILENT = [
    ["convert", "-f", "raw", "-O", "qcow2", "URI", "DIR/target"],
    ["convert", "-m", "8", "-f", "raw", "-O", "raw", "URI", "DIR/target"],
    ["copy", "URI", "DIR/target"],
    ["copy", "--reconnect", "0", "URI", "DIR/target"],
    ["compare", "-f", "raw", "-F", "raw", "URI", "URI"],
    ["io", "-f", "raw", "-c", "read 0 4k", "URI"],
    ["io", "-f", "raw", "-c", "aio_read 0 4k", "-c", "aio_flush", "URI"],
    ["io", "-f", "raw", "-c", "write 0 4k", "URI"],
    ["info", "-f", "qcow2", "URI"],
]


@pytest.mark.parametrize("command", SILENT, ids=" ".join)
def test_a_silent_server_does_not_hold_up_the_end(
    tmp_path: Path, silent: tuple[str, threading.Event], command: list[str]
) -> None:
    folder = tmp_path / "to"
    folder.mkdir()
    uri, asked = silent
    words = [word.replace("URI", uri).replace("DIR", str(folder)) for word in command]
    with started(*LAMINA, *words) as process:
        assert asked.wait(20)
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        status, _, told = ended(process)
        assert time.monotonic() - begun < 15
    assert status == 128 + signal.SIGTERM
    # A request that runs beside the commands of io fails in a line of its own.
    assert told.splitlines()[-1].startswith(said(signal.SIGTERM)), told
    assert told.count("\n") <= 1 + ("aio_read 0 4k" in command), told
    assert os.listdir(folder) == []


def test_a_handshake_that_does_not_go_on_does_not_hold_up_the_end(tmp_path: Path) -> None:
    asked = threading.Event()

    def behave(sock: socket.socket, number: int) -> None:
        sock.sendall(greeting())
        exactly(sock, 4)
        asked.set()
        exactly(sock, 1 << 20)

    with starting(tmp_path) as serve, started(*LAMINA, "map", "-f", "raw", serve(behave).uri) as process:
        assert asked.wait(20)
        process.send_signal(signal.SIGINT)
        assert ended(process) == (130, "", "lamina: interrupted\n")


def test_the_second_signal_ends_the_process_at_once() -> None:
    """The command unwinds for ever, in what counts as local storage: only the second signal ends that."""
    body = """
__name__ = "lamina.storage.slow"
def main(argv):
    try:
        print("ready", flush=True)
        time.sleep(100)
    finally:
        print("unwinding", flush=True)
        while True:
            time.sleep(0.01)
import time
"""
    with started(sys.executable, "-c", PROGRAM, body) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"unwinding\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        process.send_signal(signal.SIGTERM)
        status, _, told = ended(process)
    assert (status, told) == (128 + signal.SIGTERM, "")


def test_an_end_that_waits_for_nobody_knows_what_is_cut_off() -> None:
    body = """
import threading
def main(argv):
    try:
        print("ready", flush=True)
        threading.Event().wait()
    finally:
        threading.Event().wait()
"""
    with started(sys.executable, "-c", PROGRAM, body) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (128 + signal.SIGTERM, "", "")


def test_an_error_on_the_way_out_does_not_hide_the_signal() -> None:
    body = """
from lamina.errors import BlockIOError
def main(argv):
    try:
        print("ready", flush=True)
        import time
        time.sleep(100)
    finally:
        raise BlockIOError("it cannot be closed")
"""
    with started(sys.executable, "-c", PROGRAM, body) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        told = "lamina: it cannot be closed\nlamina: interrupted by SIGHUP\n"
        assert ended(process) == (128 + signal.SIGHUP, "", told)


def test_a_signal_whose_exception_is_lost_in_a_finalizer_counts() -> None:
    body = """
import os, signal, time
from .terminal import Meter
class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
def main(argv):
    last = Last()
    with Meter("work", asked=False) as meter:
        del last
        while True:
            meter.report(1, 2)
"""
    setup = 'import sys; sys.unraisablehook = lambda *_: None; __package__ = "lamina.cli"\n'
    with started(sys.executable, "-c", PROGRAM, setup + body) as process:
        assert ended(process) == (128 + signal.SIGTERM, "", "lamina: interrupted by SIGTERM\n")


# -- progress


@pytest.mark.parametrize("command", ["convert", "copy", "compare"])
def test_sigusr1_tells_how_far_the_work_is(tmp_path: Path, endless: Path, command: str) -> None:
    words = {
        "convert": ["convert", "-q", "-S", "0", "-f", "raw", "-O", "raw", str(endless), str(tmp_path / "target")],
        "copy": ["copy", "-q", "-S", "0", "--no-extents", str(endless), str(tmp_path / "target")],
        "compare": [
            "compare",
            "-q",
            "--image-opts",
            *[f"driver=noextents,image.driver=raw,image.file.filename={endless}"] * 2,
        ],
    }[command]
    with started(*LAMINA, *words) as process:
        assert process.stderr is not None
        until(lambda: _handled(process, signal.SIGUSR1))
        told = b""
        os.set_blocking(process.stderr.fileno(), False)
        deadline = time.monotonic() + 20
        while not told:
            assert time.monotonic() < deadline
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
            told = process.stderr.read() or b""
        os.set_blocking(process.stderr.fileno(), True)
        assert re.match(rb"    \(\d+\.\d\d/100%\)\n", told), told
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 130


def test_sigusr1_is_harmless_where_there_is_no_progress() -> None:
    with started(*LAMINA, "io", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        until(lambda: _handled(process, signal.SIGUSR1))
        process.send_signal(signal.SIGUSR1)
        process.stdin.write(b"help quit\n")
        assert ended(process) == (0, "quit\n  end the program\n  short: q\n", "")


def _handled(process: subprocess.Popen[bytes], word: signal.Signals) -> bool:
    """Whether the process has a handler of its own for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (word - 1) & 1)
