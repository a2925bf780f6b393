"""Folders in which names found inside images are resolved, for the tests of policies and references."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lamina.policy import Policy

INSIDE = b"granted"
OUTSIDE = b"secret"


class Folders:
    """A directory with an image and its base, and files outside of it that nobody granted."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.home = top / "home"
        self.outside = top / "outside"
        (self.home / "sub").mkdir(parents=True)
        self.outside.mkdir()
        self.image = str(self.home / "top.qcow2")
        for path in (Path(self.image), self.home / "base", self.home / "sub" / "base"):
            path.write_bytes(INSIDE)
        self.secret = self.outside / "secret"
        self.secret.write_bytes(OUTSIDE)

    def read(self, policy: Policy, name: str, **options: Any) -> bytes:
        reference = policy.open_reference(name, referrer=self.image, **options)
        try:
            assert os.path.samestat(os.fstat(reference.fd), os.stat(reference.path))
            assert os.path.realpath(reference.path) == reference.path
            return os.pread(reference.fd, 100, 0)
        finally:
            os.close(reference.fd)
