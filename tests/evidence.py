"""What the long suites did, counted by the tests themselves, for `docs/evidence.md` (see `benchmarks/evidence.py`).

A test calls `count("crash states", 120)` for what it has done and found right. Without the environment variable
`LAMINA_EVIDENCE`, which names a file, nothing happens; with it the file gets a line, JSON with the test, the words and the
number.
"""

from __future__ import annotations

import json
import os

VARIABLE = "LAMINA_EVIDENCE"


def count(what: str, number: int = 1) -> None:
    """`number` more of `what` were examined, and all were right. Several processes may write to one file."""
    path = os.environ.get(VARIABLE)
    if not path or not number:
        return
    # "tests/crash/test_nbd_kill.py::test_name[0] (call)"
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    line = json.dumps({"test": test, "what": what, "count": number}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
