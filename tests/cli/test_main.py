"""The command line as a whole: which command runs, how errors look, how it ends when it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from lamina.cli import signals
from lamina.cli.main import COMMANDS, main
from lamina.version import __version__

LAMINA = [sys.executable, "-m", "lamina"]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "--all"]) == 0
    told = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert f"{name} " in told
        assert summary in told


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "io"])
def test_each_command_has_help_with_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"usage: lamina {command}" in told
    assert f"  lamina {command} " in told.partition("examples:")[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lamina {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 1, "no command"),
        (["converrt"], 1, "did you mean convert?"),
        (["info"], 1, "FILE"),
        (["info", "missing.img"], 1, "missing.img: "),
        (["compare", "missing.img", "missing.img"], 2, "missing.img: "),
        (["compare", "missing.img"], 1, "FILE2"),
        (["check", "missing.img"], 1, "missing.img: "),
        (["map", "-s", "12q", "x"], 1, "12q"),
        (["info", "--references", "everything", "x"], 1, "everything"),
        (["create", "-f", "qcow3", "x", "1M"], 1, "did you mean qcow2"),
        (["create", "-f", "vmdk", "x", "1M"], 1, "vmdk"),
        (["info", "--object", "secret,id=x", "x"], 1, "the secret x needs one of file, fd, env, data"),
        (["check", "-r", "some", "x"], 1, "invalid choice: 'some'"),
        (["--trace", "x", "info", "x"], 1, "--trace: not supported"),
        (["-T", "x", "info", "x"], 1, "-T: not supported"),
        (["serve", "-c", "/dev/nbd0", "x"], 1, "-c: attaching a device needs the kernel's client: use nbd-client"),
        (["info", "--image-opts", "-f", "raw", "driver=raw"], 1, "exclude each other"),
    ],
)
def test_an_error_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("lamina: ")
    assert told.err.count("\n") == 1
    assert words in told.err
    assert os.listdir(tmp_path) == []


def test_a_name_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "\x1b]0;mine\x07"]) == 1
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert r"\x1b]0;mine\x07" in told


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        for at in range(0, 64 << 20, 8192):
            file.seek(at)
            file.write(b"x")
    process = subprocess.Popen(
        [*LAMINA, "map", "--exact", "--output=json", "-f", "raw", str(disk)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(30) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""
    process.stderr.close()


def has_begun(pid: int, folder: Path) -> bool:
    """Whether the process has a file of the folder open that has no name yet, or a temporary one."""
    opened = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            opened.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
    return any(os.path.dirname(path) == str(folder) and not path.endswith("source.raw") for path in opened)


@pytest.mark.parametrize("word", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, word: signal.Signals) -> None:
    """The source is a FIFO's worth of patience: a sparse file of data so large that copying it takes long."""
    source = tmp_path / "source.raw"
    with source.open("wb") as file:
        file.truncate(1 << 40)
    # With -S 0 all of it is written: nobody waits for that.
    process = subprocess.Popen(
        [*LAMINA, "convert", "-S", "0", "-f", "raw", "-O", "qcow2", str(source), str(tmp_path / "target.qcow2")],
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        deadline = time.monotonic() + 30
        while not has_begun(process.pid, tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(word)
        assert process.wait(30) == 128 + word
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert os.listdir(tmp_path) == ["source.raw"]


def _raise(error: BaseException) -> Callable[[list[str]], int]:
    def command(argv: list[str]) -> int:
        print("begun")
        raise error

    return command


def test_a_signal_that_other_code_turned_into_an_error_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where it strikes in the parser of options, whose clean-up then fails."""

    def command(argv: list[str]) -> int:
        monkeypatch.setattr(signals, "_received", int(signal.SIGTERM))
        try:
            raise signals.Interrupted(signal.SIGTERM)
        finally:
            raise AttributeError("no attribute")

    monkeypatch.setattr("lamina.cli.check.main", command)
    with pytest.raises(signals.Interrupted):
        main(["check", "x"])
    assert "bug" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (RecursionError("maximum recursion depth exceeded"), "a bug in lamina: RecursionError: maximum recursion"),
        (
            ZeroDivisionError("division\nby \x1b zero"),
            r"a bug in lamina: ZeroDivisionError: division by \x1b zero; ",
        ),
        (KeyError("x" * 5000), "a bug in lamina: KeyError: 'xxx"),
    ],
)
@pytest.mark.parametrize(("name", "status"), [("check", 1), ("compare", 2)])
def test_what_should_not_happen_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    words: str,
    name: str,
    status: int,
) -> None:
    monkeypatch.delenv("LAMINA_DEBUG", raising=False)
    monkeypatch.setattr(f"lamina.cli.{name}.main", _raise(error))
    assert main([name]) == status
    told = capsys.readouterr()
    assert told.out == "begun\n"
    assert told.err.startswith(f"lamina: {words}")
    assert told.err.count("\n") == 1
    assert len(told.err) < 600
    if not isinstance(error, MemoryError):
        assert "with --debug" in told.err
        with pytest.raises(type(error)):
            main(["--debug", name])
        monkeypatch.setenv("LAMINA_DEBUG", "1")
        with pytest.raises(type(error)):
            main([name])


def test_a_lack_of_memory_is_one_line(tmp_path: Path) -> None:
    """The limit is of the system: a read of 2 GiB asks for what it does not give."""
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.truncate(4 << 30)
    line = f"ulimit -v 1500000; exec {' '.join(LAMINA)} io -r -f raw -c 'read -q 0 2147483136' -c 'length' {image}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == "4 GiB\n"
    assert done.stderr.count("\n") == 1
    assert "memory" in done.stderr
