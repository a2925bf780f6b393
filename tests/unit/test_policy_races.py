"""Files that change while a name is judged, and names that nobody thought of: neither opens what is not granted."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lamina import policy as policy_module
from lamina.errors import (
    LaminaError,
    NotFound,
    PolicyError,
)
from lamina.policy import Policy

from .reference_folders import INSIDE, OUTSIDE, Folders


def after(monkeypatch: pytest.MonkeyPatch, method: str, action: Any) -> None:
    """Let `action` happen once, right after the policy's own `method` was satisfied."""
    original = getattr(policy_module._Check, method)
    done: list[bool] = []

    def wrapper(self: Any, *arguments: Any) -> Any:
        result = original(self, *arguments)
        if not done:
            done.append(True)
            action()
        return result

    monkeypatch.setattr(policy_module._Check, method, wrapper)


@pytest.mark.parametrize("step", ["check_path", "check_type"])
def test_a_file_swapped_for_a_link_is_not_followed(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def swap() -> None:
        (folders.home / "base").unlink()
        (folders.home / "base").symlink_to(folders.secret)

    after(monkeypatch, step, swap)
    with pytest.raises(PolicyError, match="changed"):
        folders.read(Policy.beneath(), "base")


@pytest.mark.parametrize("depth", ["sub", "deep/er"])
def test_a_directory_swapped_for_a_link_is_not_followed(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, depth: str
) -> None:
    directory = folders.home / depth
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "secret").write_bytes(INSIDE)

    def swap() -> None:
        first = folders.home / depth.split("/")[0]
        first.rename(folders.home / "away")
        if depth != "sub":
            (folders.outside / "er").mkdir()
            (folders.outside / "er" / "secret").write_bytes(OUTSIDE)
        first.symlink_to(folders.outside)

    after(monkeypatch, "check_path", swap)
    with pytest.raises(LaminaError):
        folders.read(Policy.beneath(), f"{depth}/secret")


@pytest.mark.parametrize("step", ["check_path", "check_type"])
def test_a_file_swapped_for_a_fifo_does_not_block(folders: Folders, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def swap() -> None:
        (folders.home / "base").unlink()
        os.mkfifo(folders.home / "base")

    after(monkeypatch, step, swap)
    with pytest.raises(PolicyError, match="FIFO"):
        folders.read(Policy.beneath(), "base")


def test_a_file_removed_in_between_is_not_found(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    after(monkeypatch, "check_type", lambda: (folders.home / "base").unlink())
    with pytest.raises(NotFound):
        folders.read(Policy.beneath(), "base")


def test_swapping_for_real_never_wins(folders: Folders) -> None:
    """One thread turns a file and a directory into links to the outside and back, as fast as it can."""
    stop = threading.Event()
    (folders.outside / "base").write_bytes(OUTSIDE)
    for name in ("base", "sub"):
        (folders.home / f"good-{name}").symlink_to(f"real-{name}")
        (folders.home / name).rename(folders.home / f"real-{name}")
    plans = [("base", "real-base", folders.secret), ("sub", "real-sub", folders.outside)]

    def flip() -> None:
        while not stop.is_set():
            for name, good, bad in plans:
                for target in (good, bad):
                    fresh = folders.home / "fresh"
                    fresh.symlink_to(target)
                    fresh.rename(folders.home / name)
            # A real file in the place of the link, which is what the check before the open sees.
            os.link(folders.home / "real-base", folders.home / "fresh")
            (folders.home / "fresh").rename(folders.home / "base")

    thread = threading.Thread(target=flip)
    thread.start()
    opened = refused = 0
    try:
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            for name in ("base", "sub/base"):
                try:
                    fd = Policy.beneath().open_reference(name, referrer=folders.image).fd
                except LaminaError:
                    refused += 1
                    continue
                opened += 1
                content = os.pread(fd, 100, 0)
                os.close(fd)
                assert content == INSIDE
    finally:
        stop.set()
        thread.join()
    assert opened
    assert refused


# --- any name at all


@given(
    st.lists(
        st.sampled_from(["..", ".", "", "sub", "base", "link", "up", "home", "outside", "secret", "proc", "etc", "x:"]),
        max_size=8,
    ).map("/".join)
    | st.text(max_size=30)
)
@example("/proc/self/cwd/../outside/secret")
@example("up/../../outside/secret")
def test_no_name_escapes_and_no_other_error_appears(name: str) -> None:
    with tempfile.TemporaryDirectory() as top:
        folders = Folders(Path(os.path.realpath(top)))
        (folders.home / "link").symlink_to("../outside")
        (folders.home / "sub" / "up").symlink_to("..")
        with contextlib.suppress(LaminaError):
            assert folders.read(Policy.beneath(), name) == INSIDE
