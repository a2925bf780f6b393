"""Options that nobody would write end in one line that says what and why: never in another exception, never in a wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main
from lamina.errors import LaminaError
from tests import evidence

ROOT = Path(__file__).resolve().parent.parent.parent
#: How many cases of each kind; `make soak` asks for more.
ROUNDS = int(os.environ.get("LAMINA_OPTION_ROUNDS", "1000"))


@pytest.mark.parametrize("kind", ["graphs", "lines"])
def test_whatever_the_options_are(tmp_path: Path, seed: int, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.option_words", kind, str(seed), str(ROUNDS)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src"))), "LAMINA_DEBUG": "1"},
        capture_output=True,
        text=True,
        timeout=120 + ROUNDS / 20,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-3000:]}"
    evidence.count("random options and command lines", ROUNDS)


DISK = {"driver": "memory", "size": 1 << 20}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"driver": "raw", "file": DISK, "discard": {}}, "discard is {}; it takes one of unmap"),
        ({"driver": "raw", "file": DISK, "detect-zeroes": ["on"]}, "detect-zeroes is ['on']; it takes one of"),
        ({"driver": "raw", "file": DISK, "read-only": {}}, "read-only is {}, not on or off"),
        ({"driver": "raw", "file": DISK, "node-name": []}, "node-name is [], not a name"),
        ({"driver": {}}, "driver is {}, not a name"),
        ({"driver": "quorum", "children": [], "vote-threshold": 1}, "vote-threshold is 1, but there are 0 children"),
        (
            {"driver": "quorum", "children": [None], "vote-threshold": 1},
            "children.0 is None; it takes a name or options",
        ),
        ({"driver": "quorum", "children": ["", DISK], "vote-threshold": 1}, "children.0 is ''; it takes a name"),
        ({"driver": "blkdebug", "image": DISK, "config": "a\0b"}, "config is 'a\\x00b'; it takes text without NUL"),
        ({"driver": "log", "image": DISK, "log": "\0"}, "log is '\\x00'; it takes text without NUL"),
        (
            {"driver": "stats", "image": DISK, "report": "\ud800"},
            "report is '\\ud800'; it takes text without lone surrogates",
        ),
        (
            {"driver": "raw", "file": {"filename": "\ud800"}},
            "filename is '\\ud800'; it takes text without lone surrogates",
        ),
        ({"driver": "delay", "image": DISK, "read-ms": 10**400}, "read-ms is 1000"),
        ({"driver": "delay", "image": DISK, "read-ms": 86_400_001}, "it takes a whole number from 0 to 86400000"),
        ({"driver": "retry", "image": DISK, "delay": 10**18}, "it takes a whole number from 0 to 3600000"),
        ({"driver": "throttle", "image": DISK, "iops-total": 10**400}, "iops-total is 1000"),
        ({"driver": "quorum", "children": [DISK], "vote-threshold": 10**5000}, "a number with too many digits"),
        ({"driver": "faults", "image": DISK, "rules": [{"p": float("nan")}]}, "p is nan; it takes 0 to 1"),
        ({"driver": "faults", "image": DISK, "rules": [{"p": "nan"}]}, "p is nan; it takes 0 to 1"),
        ({"driver": "faults", "image": DISK, "rules": [{"p": 10**5000}]}, "p is a number with too many digits"),
        ({"driver": "faults", "image": DISK, "rules": [{"error": "9" * 5000}]}, "error is 9999"),
        (
            {"driver": "faults", "image": DISK, "rules": [{"latency": 10**18}]},
            "it takes a whole number from 0 to 86400000",
        ),
    ],
)
def test_what_an_option_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LaminaError) as caught, lamina.open(options):
        pass
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_json_on_the_command_line_holds_whole_characters(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAMINA_DEBUG", "1")
    for command in (["info"], ["create"], ["copy", __file__], ["io"], ["map"]):
        name = "json:" + json.dumps({"driver": "file", "filename": "a\ud800"})
        assert main([*command, name, *(["1M"] if command == ["create"] else [])]) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert "\\ud800" in told
    assert os.listdir(tmp_path) == []
    # Bytes that are not UTF-8 are whole: a file can be called so.
    assert main(["create", "-q", "json:" + json.dumps({"driver": "file", "filename": "a\udcff"}), "1M"]) == 0
    assert os.listdir(os.fsencode(tmp_path)) == [b"a\xff"]
