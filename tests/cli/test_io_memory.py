"""`lamina io` asks for no memory for a request that is not inside the disk."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 1 << 30


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("read 0 1900M", "read failed: Input/output error"),
        ("read -P 0 63M 1900M", "read failed: Input/output error"),
        ("readv 0 900M 900M", "readv failed: Input/output error"),
        ("write 0 1900M", "write failed: Input/output error"),
        ("write -P 7 0 1900M", "write failed: Input/output error"),
    ],
)
def test_requests_outside_the_disk(tmp_path: Path, command: str, said: str) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    done = subprocess.run(
        [sys.executable, "-m", "lamina", "io", "-f", "raw", "-c", command, path],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
    )
    assert said in done.stdout, done.stderr
    assert "is outside the 67108864 bytes" in done.stderr
    assert "Traceback" not in done.stderr
