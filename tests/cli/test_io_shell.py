"""`lamina io` by itself: lines from a pipe and from a terminal, what ends it, and what it says when something fails."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lamina
from lamina.cli import program
from lamina.cli.io import shell
from lamina.cli.io.output import Output
from lamina.cli.io.session import Session
from lamina.cli.io.target import Target
from lamina.cli.main import main
from lamina.errors import BlockIOError
from lamina.node import FUA
from lamina.storage.file import FileStorage

PROMPT = program.Program.prompt

MIB = 1 << 20
COMMAND = [sys.executable, "-m", "lamina", "io"]
#: The programs that are started find the same Lamina as these tests, wherever they run.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(lamina.__file__).parent.parent), "PYTHONUNBUFFERED": ""}


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    return path


def run(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], input=given, capture_output=True, text=True, timeout=60, env=ENVIRONMENT
    )


def test_lines_from_a_pipe(disk: Path) -> None:
    done = run("-f", "raw", "disk.raw", given="length\n\nbogus\n  write -q -P 7 0 4\r\nread -v 0 4")
    first, second, *_ = done.stdout.splitlines()
    assert (first, second) == ("1 MiB", "00000000:  07 07 07 07  ....")
    assert "bogus" in done.stderr
    assert done.returncode == 1


def test_quit_ends_the_lines(disk: Path) -> None:
    done = run("-f", "raw", "disk.raw", given="length\nq\nlength\n")
    assert (done.stdout, done.returncode) == ("1 MiB\n", 0)


def test_each_line_is_answered_before_the_next_one_is_needed(disk: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "-f", "raw", "disk.raw"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line, answer in (("length", "1 MiB"), ("alloc 0", "512/512 bytes allocated at offset 0 bytes")):
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            assert select.select([process.stdout], [], [], 30)[0], f"no answer to {line}"
            assert process.stdout.readline() == f"{answer}\n"
        process.stdin.close()
        assert process.wait(timeout=30) == 0


def test_at_the_end_it_waits_for_what_is_under_way(disk: Path) -> None:
    done = run("-f", "raw", "-c", "aio_write -P 9 0 1M", "-c", "aio_write -q -P 9 0 10", "disk.raw")
    assert done.stdout.startswith("wrote 1048576/1048576 bytes at offset 0\n")
    assert disk.read_bytes() == bytes([9]) * MIB


@pytest.mark.parametrize("close", ["close", "reopen", "truncate 1M"])
def test_what_is_under_way_ends_before_the_image_changes(
    disk: Path, close: str, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [word for n in range(50) for word in ("-c", f"aio_write -q -P 3 {n * 4096} 4096")]
    assert main(["io", "-f", "raw", *lines, "-c", close, "disk.raw"]) == 0
    assert capfd.readouterr().err == ""
    assert disk.read_bytes()[: 50 * 4096] == bytes([3]) * 50 * 4096


def test_a_flush_that_fails_is_told_and_counts(
    disk: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FileStorage) -> None:
        raise BlockIOError("the disk is on fire", errno=5)

    monkeypatch.setattr(FileStorage, "flush", fail)
    assert main(["io", "-f", "raw", "-c", "flush", "-c", "length", "disk.raw"]) == 1
    said = capfd.readouterr()
    assert said.out == "flush failed: Input/output error\n1 MiB\n"
    assert "the disk is on fire" in said.err
    assert main(["io", "-f", "raw", "-t", "unsafe", "-c", "flush", "disk.raw"]) == 0


@pytest.mark.parametrize(
    ("options", "line", "kept"),
    [
        ([], "write -z 0 1M", True),
        ([], "write -zu 0 1M", False),
        ([], "discard 0 1M", False),
        (["-d", "ignore"], "write -zu 0 1M", True),
        (["-d", "off"], "discard 0 1M", True),
        (["-d", "unmap"], "aio_write -zu 0 1M", False),
    ],
)
def test_what_gives_storage_back(disk: Path, options: list[str], line: str, kept: bool) -> None:
    disk.write_bytes(b"x" * MIB)
    os.sync()
    assert main(["io", "-f", "raw", *options, "-c", line, "disk.raw"]) == 0
    assert (disk.stat().st_blocks * 512 >= MIB) == kept


@pytest.mark.parametrize(
    ("options", "line", "stable"),
    [
        ([], "write 0 512", True),
        ([], "aio_write 0 512", True),
        (["-t", "writeback"], "write 0 512", False),
        (["-t", "writeback"], "write -f 0 512", True),
        (["-t", "writeback"], "writev -f 0 512", True),
        (["-t", "writethrough"], "write 0 512", True),
        (["-t", "directsync"], "aio_write 0 512", True),
        (["-t", "none"], "write 0 512", False),
    ],
)
def test_which_writes_are_stable(
    disk: Path, options: list[str], line: str, stable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    write = FileStorage.write

    def record(self: FileStorage, offset: int, view: memoryview, flags: int = 0) -> None:
        seen.append(flags)
        write(self, offset, view, flags)

    monkeypatch.setattr(FileStorage, "write", record)
    assert main(["io", "-f", "raw", *options, "-c", line, "disk.raw"]) == 0
    assert seen == [FUA if stable else 0]


def test_errors_tell_where(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["io", "-f", "raw", "-c", "read 1M 512", "disk.raw"]) == 1
    said = capfd.readouterr()
    assert said.out == "read failed: Input/output error\n"
    assert "disk.raw" in said.err
    assert "1048576" in said.err


def test_a_name_cannot_drive_the_terminal(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["io", "-f", "raw", "-c", "open \x1b[31m.raw", "-c", "\x1b[31m"]) == 1
    assert "\x1b" not in capfd.readouterr().err


def test_without_a_format_raw_is_read_and_not_written(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["io", "-r", "-c", "read 0 512", "disk.raw"]) == 0
    assert main(["io", "-c", "write 0 512", "disk.raw"]) == 1
    assert "-f raw" in capfd.readouterr().err
    assert not any(disk.read_bytes())


def test_read_only_holds_for_open(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["io", "-r", "-c", "open -o driver=raw disk.raw", "-c", "write 0 1"]) == 1
    assert not any(disk.read_bytes())


def test_a_reopen_that_fails_leaves_the_image_open(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["-c", "reopen -o offset=2M", "-c", "write -P 4 0 4", "-c", "reopen -o offset=512", "-c", "length"]
    assert main(["io", "-f", "raw", *arguments, "disk.raw"]) == 1
    said = capfd.readouterr()
    assert said.out.startswith("wrote 4/4")
    assert said.out.endswith("1023.500 KiB\n")
    assert disk.read_bytes()[:5] == b"\4\4\4\4\0"


def test_memory_is_reopened_in_place(capfd: pytest.CaptureFixture[str]) -> None:
    lines = [
        "open -o driver=raw,file.driver=memory,file.size=1M",
        "write -q -P 4 0 4",
        "reopen -r",
        "read -qP 4 0 4",
        "length",
    ]
    assert main(["io", *(word for line in lines for word in ("-c", line))]) == 0
    assert capfd.readouterr() == ("1 MiB\n", "")


@pytest.fixture
def overlay(disk: Path) -> Path:
    """An empty qcow2 of 64 KiB clusters over the disk, which holds threes."""
    disk.write_bytes(b"\3" * MIB)
    top = disk.with_name("top.qcow2")
    lamina.create(top, "qcow2", MIB, backing_file="disk.raw", backing_fmt="raw")
    return top


@pytest.mark.parametrize(
    "words",
    [
        ["-C", "--references", "same-dir", "-c", "READ", "-c", "alloc 0 1M", "top.qcow2"],
        ["--copy-on-read", "-f", "qcow2", "-c", "READ", "-c", "alloc 0 1M", "top.qcow2"],
        ["-c", "open -C -o driver=qcow2 top.qcow2", "-c", "READ", "-c", "alloc 0 1M"],
        ["-C", "-c", "open -o driver=qcow2 top.qcow2", "-c", "READ", "-c", "alloc 0 1M"],
    ],
)
def test_copy_on_read_keeps_what_is_read(overlay: Path, words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["io", *(word.replace("READ", "read -q -P 3 100k 1k") for word in words)]) == 0
    assert capfd.readouterr().out == "65536/1048576 bytes allocated at offset 0 bytes\n"
    with lamina.open(overlay, format="qcow2") as image:
        assert [(row.start, row.length) for row in image.extents() if row.depth == 0] == [(65536, 65536)]


def test_copy_on_read_over_a_snapshot_changes_nothing(overlay: Path) -> None:
    before = overlay.read_bytes()
    assert main(["io", "-C", "-s", "-f", "qcow2", "-c", "read -q -P 3 0 1M", "top.qcow2"]) == 0
    assert overlay.read_bytes() == before


def test_copy_on_read_needs_an_image_that_is_writable(overlay: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = overlay.read_bytes()
    assert main(["io", "-C", "-r", "-f", "qcow2", "-c", "read 0 1", "top.qcow2"]) == 1
    assert overlay.read_bytes() == before
    assert (
        main(["io", "-C", "-f", "qcow2", "-c", "reopen -r", "-c", "read -q -P 3 0 1", "-c", "close", "top.qcow2"]) == 1
    )
    assert capfd.readouterr().err.count("-C or -r") == 2
    assert main(["io", "-c", "open -C -r -o driver=qcow2 top.qcow2", "-c", "read 0 1"]) == 1


def test_compressed_and_saved_state_are_unsupported(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["io", "-f", "raw", "-c", "write -c 0 64k", "-c", "write -b 0 1", "-c", "read -b 0 1", "disk.raw"]) == 1
    failed = "failed: Operation not supported\n"
    assert capfd.readouterr().out == f"write {failed}write {failed}read {failed}"
    assert not any(disk.read_bytes())


def test_signals(disk: Path) -> None:
    killed = run("-f", "raw", "-c", "length", "-c", "sigraise 9", "-c", "length", "disk.raw")
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "1 MiB\n")
    aborted = run("-f", "raw", "-c", "length", "-c", "abort", "-c", "length", "disk.raw")
    assert (aborted.returncode, aborted.stdout) == (-signal.SIGABRT, "1 MiB\n")
    assert run("-c", "sigraise 12345").returncode == 1


def test_help_knows_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["io", "-c", "help"]) == 0
    listed = [row.split()[0] for row in capfd.readouterr().out.splitlines()[:-2]]
    for name in listed:
        assert main(["io", "-c", f"help {name}"]) == 0
        assert capfd.readouterr().out.split()[0] == name
    assert main(["io", "-c", "?"]) == 0


def test_reading_and_writing_do_not_import_numpy(disk: Path) -> None:
    program = (
        "import sys; from lamina.cli.main import main\n"
        "assert main(['io', '-f', 'raw', '-c', 'write 0 1k', '-c', 'read -v 0 16', '-c', 'write -z 0 5', "
        "'-c', 'aio_read 0 1', '-c', 'length', '-c', 'info', '-c', 'discard 0 4k', '-c', 'flush', 'disk.raw']) == 0\n"
        "assert not {'numpy', 'asyncio', 'rich', 'readline'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


# -- on a terminal


class Terminal:
    """`lamina io` on a pseudo-terminal."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.at_first = self.settings()
        environment = ENVIRONMENT | {"XDG_STATE_HOME": str(folder / "state"), "TERM": "dumb", "INPUTRC": "/dev/null"}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment, start_new_session=True,
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, text: str) -> str:
        """What was shown up to `text`, which is taken off."""
        end = time.monotonic() + 30
        while text not in self.seen:
            ready, _, _ = select.select([self._master], [], [], max(end - time.monotonic(), 0))
            assert ready, f"{text!r} did not come: {self.seen!r}"
            self.seen += os.read(self._master, 4096).decode()
        before, _, self.seen = self.seen.partition(text)
        return before

    def settings(self) -> list[object]:
        import termios

        return list(termios.tcgetattr(self._master))

    def end(self) -> int:
        return self.process.wait(timeout=30)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(disk: Path, tmp_path: Path) -> Iterator[Terminal]:
    """The shell on disk.raw, after its first prompt."""
    opened = Terminal(tmp_path, "-f", "raw", "disk.raw")
    try:
        opened.wait_for(PROMPT)
        yield opened
    finally:
        opened.close()


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal_has_a_prompt_completion_and_history(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type("leng\t\r")
    terminal.wait_for("1 MiB")
    terminal.wait_for(PROMPT)
    terminal.type("bogus\r")
    terminal.wait_for("no command 'bogus'")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.end() == 1
    assert (tmp_path / "state" / "lamina" / "io_history").read_text().split() == ["length", "bogus"]


def test_interrupt_ends_the_line_or_the_command_and_not_the_shell(terminal: Terminal) -> None:
    terminal.type("garbage")
    terminal.wait_for("garbage")
    time.sleep(0.3)  # Python notices a signal only while it waits for the next key
    terminal.type("\x03")
    terminal.wait_for(PROMPT)
    terminal.type("sleep 60000\r")
    terminal.wait_for("sleep 60000")
    time.sleep(0.3)
    terminal.type("\x03")
    terminal.wait_for(PROMPT)
    terminal.type("length\r")
    assert "garbage" not in terminal.wait_for("1 MiB")
    terminal.type("quit\r")
    assert terminal.end() == 0


@pytest.mark.parametrize("word", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_the_shell_and_leave_the_terminal_as_it_was(
    terminal: Terminal, tmp_path: Path, word: signal.Signals
) -> None:
    terminal.type("length\r")
    terminal.wait_for("1 MiB")
    terminal.wait_for(PROMPT)
    time.sleep(0.3)  # as above
    terminal.process.send_signal(word)
    terminal.wait_for(f"lamina: interrupted by {word.name}")
    assert terminal.end() == 128 + word
    assert terminal.settings() == terminal.at_first
    assert (tmp_path / "state" / "lamina" / "io_history").read_text().split() == ["length"]


def test_the_second_interrupt_of_one_command_ends_the_shell(disk: Path, tmp_path: Path) -> None:
    """What is under way beside the commands does not end by itself: a request that hangs."""
    options = "driver=faults,rules.0.kind=read,rules.0.hang=tag,image.driver=raw,image.file.filename=disk.raw"
    terminal = Terminal(tmp_path, "--image-opts", options)
    try:
        terminal.wait_for(PROMPT)
        terminal.type("aio_read 0 512\r")
        terminal.wait_for(PROMPT)
        terminal.type("close\r")
        terminal.wait_for("close")
        time.sleep(0.3)
        terminal.type("\x03")
        time.sleep(0.3)
        terminal.type("\x03")
        assert terminal.end() == 130
        assert terminal.settings() == terminal.at_first
    finally:
        terminal.close()


def test_a_request_beside_the_commands_that_breaks_keeps_no_image_open(disk: Path) -> None:
    session = Session(Output("lamina"), Target())
    session.open(Target("disk.raw", format="raw"))
    done: list[None] = []

    def fails() -> None:
        raise MemoryError

    def late() -> None:
        time.sleep(0.1)
        done.append(None)

    session.submit(fails)
    session.submit(late)
    with pytest.raises(MemoryError):
        session.end()
    assert done == [None]
    assert not session.is_open


def test_completion(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (disk.parent / "folder").mkdir()
    assert shell.complete("", "")[0] == "abort "
    assert shell.complete("rea", "rea") == ["read ", "readv "]
    assert shell.complete("help tr", "tr") == ["truncate "]
    assert "-P " in shell.complete("read -", "-")
    assert shell.complete("flush -", "-") == []
    assert shell.complete("open di", "di") == ["disk.raw "]
    assert shell.complete("open fo", "fo") == ["folder/"]
    assert shell.complete("write -s di", "di") == ["disk.raw "]
    assert shell.complete("open absent/x", "absent/x") == []


def test_history_that_cannot_be_kept_is_told(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (disk.parent / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(disk.parent / "file"))
    monkeypatch.setattr("builtins.input", lambda prompt: "quit")
    monkeypatch.setattr(sys, "stdin", type("Typed", (io.StringIO,), {"isatty": lambda self: True})())
    assert main(["io", "-f", "raw", "disk.raw"]) == 0
    assert "cannot save the history" in capsys.readouterr().err


def test_compressed_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Whole clusters are stored packed, parts of them as they are; both read back."""
    monkeypatch.chdir(tmp_path)
    assert main(["create", "-q", "-f", "qcow2", "disk.qcow2", "1M"]) == 0
    commands = ["write -q -c -P 5 0 128k", "write -q -c -P 6 256k 512", "read -q -P 5 0 128k", "read -q -P 6 256k 512"]
    assert main(["io", "-f", "qcow2", *(word for one in commands for word in ("-c", one)), "disk.qcow2"]) == 0
    with lamina.open("disk.qcow2", format="qcow2") as image:
        packed = [(row.start, row.length) for row in image.extents() if row.compressed]
    assert packed == [(0, 128 << 10)]
    capfd.readouterr()
