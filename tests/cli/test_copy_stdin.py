"""`copy -` where standard input is the target itself: what would be read is not emptied first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COPY = [sys.executable, "-m", "lamina", "copy", "-"]


@pytest.mark.parametrize("alias", ["same", "link", "name"])
def test_a_target_that_is_standard_input_is_refused(tmp_path: Path, alias: str) -> None:
    """A file of two names is written in place: it was empty, and the status 0."""
    source = tmp_path / "same"
    source.write_bytes(b"content" * 1000)
    os.link(source, tmp_path / "name")
    (tmp_path / "link").symlink_to("same")
    with source.open("rb") as given:
        run = subprocess.run([*COPY, alias], stdin=given, cwd=tmp_path, capture_output=True, timeout=60)
    assert run.returncode == 1
    assert b"this is the source itself" in run.stderr
    assert source.read_bytes() == b"content" * 1000


def test_a_file_that_is_both_streams_is_refused(tmp_path: Path) -> None:
    """A copy of a file to its own end would never come to an end."""
    source = tmp_path / "same"
    source.write_bytes(b"content" * 1000)
    with source.open("rb") as given, source.open("ab") as taken:
        run = subprocess.run([*COPY, "-"], stdin=given, stdout=taken, stderr=subprocess.PIPE, timeout=60)
    assert run.returncode == 1
    assert b"this is the source itself" in run.stderr
    assert source.read_bytes() == b"content" * 1000
