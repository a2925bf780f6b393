"""What is left after a call that an exception ended: descriptors, threads and files. For the tests of interrupts."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import workers

#: Seconds in which a thread that has nothing left to do ends.
PATIENCE = 20.0
#: The threads that wait for the next open or job of any event loop. They stay.
_STAYING = ("lamina-aio-open", "lamina-aio-work")


def descriptors() -> dict[int, str]:
    """The open descriptors of this process, each with what it is open on."""
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # that of the listing
            continue
    return {number: target for number, target in found.items() if not target.endswith("/fd")}


def threads() -> list[str]:
    """The threads that may end."""
    own = [name for name in workers.names.values() if not name.startswith(_STAYING)]
    return own + [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]


class Remains:
    """The state before a call, and what must be the same after it. `folder`: its files are compared, those named in `made`
    excepted, which the call may have made."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, made: tuple[str, ...] = ()) -> None:
        self._folder, self._made = folder, {*made}
        #: What finalizers said: a resource that was left to them is told in a warning.
        self._said: list[str] = []
        monkeypatch.setattr(sys, "unraisablehook", self._hear)
        self._before = descriptors()
        self._files = self._listed()

    def _hear(self, unraisable: Any) -> None:
        self._said.append(repr(unraisable.exc_value))

    def _listed(self) -> set[str]:
        return {*os.listdir(self._folder)} - self._made

    def require_none(self, where: str) -> None:
        """Nothing is open, runs or lies about that did not before."""
        deadline = time.monotonic() + PATIENCE
        while threads() and time.monotonic() < deadline:
            time.sleep(0.0005)  # it was told to end, and is about to
        assert threads() == [], where
        now = descriptors()
        more = {number: target for number, target in now.items() if self._before.get(number) != target}
        assert more == {}, f"{where}: still open"
        assert self._listed() == self._files, where
        assert self._said == [], where

    def await_end(self, where: str) -> None:
        """The same after a thread that nobody waits for has ended its work."""
        deadline = time.monotonic() + PATIENCE
        while (descriptors() != self._before or threads()) and time.monotonic() < deadline:
            time.sleep(0.0005)
        self.require_none(where)

    def await_finalizers(self, where: str) -> None:
        """The same for what was left to finalizers, and perhaps to the garbage collector: they close it and may say so."""
        gc.collect()
        self._said = [said for said in self._said if "ResourceWarning" not in said]
        self.await_end(where)


def require_free(*paths: Path) -> None:
    """Each image can be opened for writing at once: no lock is left."""
    for path in paths:
        with lamina.open(path, format=path.suffix[1:], read_only=False):
            pass
