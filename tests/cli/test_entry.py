"""The first moments of the program: a signal that strikes while it is still importing its modules."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

STRIKE = """
import os, signal, sys
class Strike:
    def find_spec(self, name, path=None, target=None):
        if name == "lamina.cli.main":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Strike())
"""


@pytest.mark.parametrize("ignored", [False, True], ids=["", "ignored"])
def test_an_interrupt_during_imports_prints_no_traceback(tmp_path: Path, ignored: bool) -> None:
    (tmp_path / "sitecustomize.py").write_text(STRIKE)
    done = subprocess.run(
        [sys.executable, "-m", "lamina", "--version"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL) and None,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    if ignored:
        assert (done.returncode, done.stdout[:7]) == (0, "lamina ")
    else:
        assert (done.returncode, done.stdout) == (-signal.SIGINT, "")
