"""Runs the code blocks of a page as a reader would: from top to bottom, in one folder.

| block | what happens |
|---|---|
| `console` | the lines behind `$ ` are commands; what stands below one is compared with its output |
| `sh` | a script, which must succeed |
| `python` | is executed; all blocks of a page share their names. A comment behind `print(...)` is what that prints |
| `python title="x.py"` | becomes this file; pytest runs `test_x.py` at the end of the page |
| `json`, `toml` | must parse |
| `text` | under a comment `output`: what the Python block above prints |

Comments in the page, which readers do not see, say what a block needs:

- `setup:` and lines of a script: prepares files for the blocks below;
- `server: COMMAND`: starts a server for the blocks below;
- `not run: REASON`: the block below cannot run here;
- `exit status N`: commands of the block below end with 0 or N (otherwise with 0, or what `$ echo $?` shows);
- `figures vary`: any number stands for any other in the output of the block below.

In an output, `...` stands for any text, and as a line of its own for any lines. A server is a command that ends with `&`: the
runner waits until it is ready, and stops it at the end of the page.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.docs.markdown import ROOT, Block

LANGUAGES = ("console", "sh", "python", "json", "toml", "text", "setup", "server")
_PRINT = re.compile(r"^\s*print\(.*\)  # (.*)$")


class Runner:
    """Runs blocks in `folder`, which becomes the current folder. A wrong result is an AssertionError that names the line."""

    def __init__(self, folder: Path, programs: Path, page: str) -> None:
        self.folder = folder
        self.page = page
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.environment = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": f"{ROOT / 'src'}",
            "HOME": str(folder),
            "XDG_CONFIG_HOME": str(folder / "none"),
            "LC_ALL": "C.UTF-8",
            "COLUMNS": "80",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "-p lamina.testing.plugin -p no:cacheprovider",
        }
        self.printed = ""
        self.tests: list[str] = []
        self._status = 0
        self._servers: list[Server] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in reversed(self._servers):
            server.stop()

    def run(self, block: Block) -> None:
        if any(note.startswith("not run:") for note in block.notes):
            return
        getattr(self, f"_{block.language}")(block)

    def finish(self) -> None:
        """Run the tests that the page has written."""
        if self.tests:
            words = [sys.executable, "-m", "pytest", "-q", *self.tests]
            done = subprocess.run(
                words, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{self.page}: {done.stdout}{done.stderr}"

    def _setup(self, block: Block) -> None:
        self._sh(block)

    def _server(self, block: Block) -> None:
        self._start(block.text.strip()).wait(1)

    def _start(self, command: str) -> Server:
        self._servers.append(Server(command, self.folder, self.environment))
        return self._servers[-1]

    def _sh(self, block: Block) -> None:
        status, output = self._command(f"set -e\n{block.text}")
        assert status in _allowed(block), f"{self.page}:{block.line}: status {status}\n{output}"

    def _console(self, block: Block) -> None:
        allowed = _allowed(block)
        commands = list(console(block.text))
        for number, (command, expected) in enumerate(commands):
            where = f"{self.page}:{block.line}: $ {command}"
            if command.endswith("&"):
                output = self._start(command[:-1]).wait(max(1, len(expected.splitlines())))
            else:
                self._status, output = self._command(f"(exit {self._status})\n{command}")
                asked = commands[number + 1][0] == "echo $?" if number + 1 < len(commands) else False
                assert asked or self._status in allowed, f"{where}: status {self._status}\n{output}"
            if expected:
                vary = "figures vary" in block.notes
                assert matches(expected, output, vary), f"{where} printed\n{output}\nand the page shows\n{expected}"

    def _python(self, block: Block) -> None:
        if block.title:
            (self.folder / block.title).write_text(block.text)
            if block.title.startswith("test_"):
                self.tests.append(block.title)
            return
        seen: dict[int, list[str]] = {}

        def tell(*values: Any, **options: Any) -> None:
            text = io.StringIO()
            builtins.print(*values, **{**options, "file": text})
            seen.setdefault(sys._getframe(1).f_lineno, []).append(text.getvalue().rstrip("\n"))
            builtins.print(*values, **options)

        code = compile("\n" * block.line + block.text, self.page, "exec", dont_inherit=True)
        self.names["print"] = tell
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(code, self.names)
        self.printed = output.getvalue()
        for number, line in enumerate(block.text.splitlines(), block.line + 1):
            if found := _PRINT.match(line):
                told = seen.get(number, ["nothing"])
                assert any(matches(found[1], text, False) for text in told), f"{self.page}:{number} printed {told}"

    def _json(self, block: Block) -> None:
        json.loads(block.text)

    def _toml(self, block: Block) -> None:
        tomllib.loads(block.text)

    def _text(self, block: Block) -> None:
        if "output" in block.notes:
            vary = "figures vary" in block.notes
            assert matches(block.text, self.printed, vary), f"{self.page}:{block.line}: printed\n{self.printed}"

    def _command(self, command: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=120,
        )
        return done.returncode, done.stdout


class Server:
    """A command in the background, in a session of its own."""

    def __init__(self, command: str, folder: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait(self, lines: int) -> str:
        """The first lines of the output; after the first the server is ready. Fails if it ends before."""
        assert self._process.stdout is not None
        watch = threading.Timer(60, self._process.kill)
        watch.start()
        told = "".join(self._process.stdout.readline() for _ in range(lines))
        watch.cancel()
        assert told, "the server ended without a word"
        return told

    def stop(self) -> None:
        assert self._process.stdout is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._process.stdout.close()
        self._process.wait(30)


def _allowed(block: Block) -> set[int]:
    """The exit statuses with which commands of a block may end."""
    return {0} | {int(found[1]) for note in block.notes if (found := re.fullmatch(r"exit status (\d+)", note))}


def console(text: str) -> Iterator[tuple[str, str]]:
    """(command, the output that is shown) of a console block."""
    command: str | None = None
    shown: list[str] = []
    open_ended = False
    for line in text.splitlines():
        if open_ended:
            command = f"{command}\n{line}"
        elif line.startswith("$ "):
            if command is not None:
                yield command, "\n".join(shown).strip("\n")
            command, shown = line[2:], []
        else:
            shown.append(line)
            continue
        open_ended = line.endswith("\\")
    assert command is not None, "a console block has a line that begins with `$ `"
    yield command, "\n".join(shown).strip("\n")


def matches(expected: str, output: str, vary: bool) -> bool:
    """Whether `output` is what `expected` shows."""
    rows = []
    for line in expected.strip("\n").splitlines():
        if line.strip() == "...":
            rows.append(r"(?:[^\n]*\n)*?")
            continue
        # Three dots, not more: pictures consist of dots.
        parts = re.split(r"(?<!\.)\.\.\.(?!\.)", line.rstrip())
        row = "[^\n]*".join(map(re.escape, parts))
        if vary:
            row = re.sub(
                r"(?:\\ )*\d[\d,]*(?:\\\.\d+)?", lambda _: r"\\ *\d[\d,]*(?:\.\d+)?".replace("\\\\", "\\"), row
            )
        rows.append(row + "[ ]*\n")
    told = "".join(f"{line.rstrip()}\n" for line in output.strip("\n").splitlines())
    return re.fullmatch("".join(rows), told) is not None


def write_programs(folder: Path) -> None:
    """Programs that pages call: `lamina` and `python` of these tests."""
    folder.mkdir()
    for name, words in ("lamina", "-P -c 'from lamina.cli.entry import run; run()'"), ("python", ""):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
