"""The exit statuses that pages and manuals list are those with which commands end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import lamina
from lamina.cli.described import statuses_of
from lamina.cli.main import COMMANDS, main

#: What each of these commands ends with, for the statuses that have no signal as their cause. `serve` has tests of its own
#: (tests/cli/test_serve.py, test_serve_ends.py), and so have signals (tests/cli/test_signals.py).
LINES: dict[str, dict[str, list[str]]] = {
    "create": {"0": ["create", "-q", "new.raw", "1M"], "1": ["create", "-q", "new.raw"]},
    "info": {"0": ["info", "disk.qcow2"], "1": ["info", "none"]},
    "inspect": {"0": ["inspect", "disk.qcow2"], "1": ["inspect", "overlay.qcow2"], "2": ["inspect", "none"]},
    "map": {"0": ["map", "disk.qcow2"], "1": ["map", "none"]},
    "check": {
        "0": ["check", "disk.qcow2"],
        "1": ["check", "none"],
        "2": ["check", "wrong.qcow2"],
        "3": ["check", "leaks.qcow2"],
        "63": ["check", "-f", "raw", "disk.raw"],
    },
    "resize": {"0": ["resize", "-q", "disk.qcow2", "2M"], "1": ["resize", "disk.qcow2", "512"]},
    "snapshot": {"0": ["snapshot", "disk.qcow2"], "1": ["snapshot", "-d", "none", "disk.qcow2"]},
    "bitmap": {"0": ["bitmap", "--add", "disk.qcow2", "b"], "1": ["bitmap", "--clear", "disk.qcow2", "none"]},
    "amend": {"0": ["amend", "-o", "lazy_refcounts=on", "disk.qcow2"], "1": ["amend", "-o", "none=1", "disk.qcow2"]},
    "measure": {"0": ["measure", "--size", "1M"], "1": ["measure", "none"]},
    "compare": {
        "0": ["compare", "disk.qcow2", "disk.qcow2"],
        "1": ["compare", "-f", "qcow2", "-F", "raw", "disk.qcow2", "disk.raw"],
        "2": ["compare", "disk.qcow2", "none"],
    },
    "diff": {"0": ["diff", "disk.qcow2", "disk.qcow2"], "1": ["diff", "disk.qcow2", "none"]},
    "commit": {"0": ["commit", "-q", "-f", "qcow2", "overlay.qcow2"], "1": ["commit", "disk.qcow2"]},
    "rebase": {"0": ["rebase", "-f", "qcow2", "-b", "", "overlay.qcow2"], "1": ["rebase", "none"]},
    "convert": {"0": ["convert", "-O", "raw", "disk.qcow2", "new.raw"], "1": ["convert", "none", "new.raw"]},
    "flatten": {"0": ["flatten", "-f", "qcow2", "overlay.qcow2"], "1": ["flatten", "none"]},
    "compact": {"0": ["compact", "-f", "qcow2", "disk.qcow2"], "1": ["compact", "none"]},
    "dd": {"0": ["dd", "if=disk.qcow2", "of=new.raw"], "1": ["dd", "if=none", "of=new.raw"]},
    "bench": {"0": ["bench", "-q", "-c", "10", "disk.qcow2"], "1": ["bench", "none"]},
    "copy": {"0": ["copy", "-q", "disk.qcow2", "copy.qcow2"], "1": ["copy", "none", "copy.qcow2"]},
    "shims": {"0": ["shims", "-q", "programs"], "1": ["shims", "-q", "disk.raw"]},
    "explain": {"0": ["explain", "disk.qcow2", "0"], "1": ["explain", "none", "0"]},
    "view": {"0": ["view", "-q", "-o", "page.html", "disk.qcow2"], "1": ["view", "-o", "page.html", "none"]},
    "graph": {"0": ["graph", "disk.qcow2"], "1": ["graph", "none"]},
    "drivers": {"0": ["drivers"], "1": ["drivers", "none"]},
    "completion": {"0": ["completion", "bash"], "1": ["completion", "none"]},
    "io": {
        "0": ["io", "-c", "read -q 0 512", "disk.qcow2"],
        "1": ["io", "-c", "read -q 8M 512", "-c", "read -q 0 512", "disk.qcow2"],
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image, one that differs, an overlay, an image with a leak, and one with an error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.raw").write_bytes(b"x" * (1 << 20))
    for name in "disk", "leaks", "wrong":
        lamina.create(f"{name}.qcow2", "qcow2", 1 << 20)
        with lamina.open(f"{name}.qcow2", format="qcow2", read_only=False) as image:
            image.write(0, b"some bytes")
    lamina.create("overlay.qcow2", "qcow2", backing_file="disk.qcow2", backing_fmt="qcow2")
    _edit("leaks.qcow2", lambda data: data + bytes(65536), count=1)
    _edit("wrong.qcow2", lambda data: data, count=0)
    return tmp_path


def _edit(name: str, change: Callable[[bytes], bytes], count: int) -> None:
    """Change the file, and set the count of its last cluster. The refcount block is the third cluster of a new image."""
    data = bytearray(change(Path(name).read_bytes()))
    last = (len(data) - 1) // 65536
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    data[block + 2 * last : block + 2 * last + 2] = count.to_bytes(2, "big")
    Path(name).write_bytes(data)


def test_each_status_of_each_command_has_a_line() -> None:
    assert set(LINES) == set(COMMANDS) - {"serve"}
    for command, lines in LINES.items():
        assert list(lines) == [status for status, _ in statuses_of(command) if status != "128 + N"]


@pytest.mark.parametrize("command", LINES)
def test_the_statuses_of_a_command(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for status, words in LINES[command].items():
        found = main(words)
        assert found == int(status), capsys.readouterr()
    assert os.listdir(folder)
