"""Two signals that arrive together: CPython raises the second exception at the first call behind the first one.

Whatever an operation does twice, so that an interrupt which strikes the first attempt finds the second, both can strike.
Signals that are sent while the thread blocks them, and then unblocked by a call that does not look for them, are raised so.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import lamina
from lamina import edit as edit_module
from lamina import ranges as ranges_module
from lamina.errors import Closed
from lamina.image import Image
from lamina.node import Node
from lamina.testing.image_checks import check_whole

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
FILES = {edit_module.__file__, ranges_module.__file__}
SIZE = 256 * 1024
PATIENCE = 20.0


@contextmanager
def raising() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = [signal.signal(number, interrupt) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


class Both:
    """Both signals at point number `number`, counted from 0, of what runs in the files above."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.struck: str | None = None

    def look(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "c_return") or code.co_filename not in FILES or code.co_name == "__del__":
            return
        self.left -= 1
        if self.left >= 0:
            return
        self.struck = f"{code.co_qualname}:{frame.f_lineno} ({event})"
        sys.setprofile(None)
        send_both()


def send_both() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.pthread_kill(threading.get_ident(), number)
    mask = (ctypes.c_ulong * (128 // ctypes.sizeof(ctypes.c_ulong)))()
    for number in SIGNALS:
        mask[0] |= 1 << (number - 1)
    ctypes.PyDLL(None).pthread_sigmask(int(signal.SIG_UNBLOCK), ctypes.byref(mask), None)


def work_profiled(both: Both, work: Callable[[], object]) -> None:
    sys.setprofile(both.look)
    try:
        work()
    finally:
        sys.setprofile(None)


def strike(both: Both, work: Callable[[], object]) -> None:
    for attempt in range(4):  # the second one may come anywhere behind the first, also outside the work
        try:
            if not attempt:
                work_profiled(both, work)
            for _ in range(8):
                continue
        except KeyboardInterrupt:
            continue


def insert(image: Image) -> None:
    with image.edit() as edit:
        edit.insert("stats")


def exchange_backing(image: Image) -> None:
    with image.edit() as edit:
        edit.set_backing(bottom(image), {"driver": "raw", "file": {"filename": bottom(image).filename + ".base"}})


def bottom(image: Image) -> Node:
    node = image.node
    while "image" in node.children:
        node = node.children["image"].node
    return node


OPERATIONS: dict[str, Callable[[Image], object]] = {
    "write": lambda image: image.write(100, b"new" * 3000),
    "truncate": lambda image: image.truncate(2 * SIZE),
    "insert": insert,
    "exchange the backing file": exchange_backing,
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the second one may strike a finalizer
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_image_is_of_use_after_two_interrupts(tmp_path: Path, name: str) -> None:
    path, base = str(tmp_path / "disk"), str(tmp_path / "disk.base")
    Path(base).write_bytes(b"b" * SIZE)
    number = 0
    with raising():
        while True:
            Path(path).unlink(missing_ok=True)
            lamina.create(path, "qcow2", SIZE, cluster_size=4096, backing_file=base, backing_fmt="raw")
            references = lamina.Policy.beneath(tmp_path)
            image = lamina.open(path, format="qcow2", read_only=False, references=references)
            image.write(SIZE // 2, b"acknowledged")
            both = Both(number)
            strike(both, lambda image=image: OPERATIONS[name](image))  # type: ignore[misc]
            go_on(image, path, both.struck)
            if both.struck is None:
                break
            number += 1
    close_left_open(base)


def close_left_open(path: str) -> None:
    """Interrupts may leave descriptors of a layer open that was on its way in or out: no request reaches it."""
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}") == path:
                os.close(int(fd))
        except FileNotFoundError:  # what listed them
            continue


def go_on(image: Image, path: str, struck: str | None) -> None:
    """In a thread, so that a hang is noticed: the image takes requests, and is closed; nothing is lost."""
    ended: list[bool] = []

    def use() -> None:
        with suppress(Closed):
            image.write(0, b"on")
        image.close()
        ended.append(True)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert ended, f"after {struck} the image cannot be used"
    with lamina.open(path, format="qcow2", references=lamina.Policy.beneath(Path(path).parent)) as again:
        assert again.read(SIZE // 2, 13) == b"acknowledgedb", struck
        assert again.read(0, 3) == b"onb", struck
        check_whole(again, repairable=True)


def test_a_request_inside_a_change_of_the_tables_is_refused(tmp_path: Path) -> None:
    """A signal handler that writes while a write of the same thread is half done: two disks' worth of clusters became one."""
    path = str(tmp_path / "disk")
    lamina.create(path, "qcow2", SIZE, cluster_size=512)
    refused: list[str] = []
    with lamina.open(path, format="qcow2", read_only=False) as image:
        expected = bytearray(SIZE)

        def handler(*_: object) -> None:
            try:
                image.write(SIZE // 2, b"from the handler")
                expected[SIZE // 2 : SIZE // 2 + 16] = b"from the handler"
            except lamina.LaminaError as error:
                refused.append(str(error))

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            for number in range(0, 400, 3):
                at = number * 512
                if at + 512 > SIZE // 2:
                    break
                fired = Once(number, handler)
                sys.setprofile(fired.look)
                try:
                    image.write(at, b"x" * 512)
                finally:
                    sys.setprofile(None)
                expected[at : at + 512] = b"x" * 512
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert image.read(0, SIZE) == expected
    assert any("inside a request of this image" in text for text in refused)
    with lamina.open(path, format="qcow2") as again:
        assert again.read(0, SIZE) == expected
        check_whole(again)


class Once:
    """Calls the handler at call number `number` inside the tables of qcow2."""

    def __init__(self, number: int, handler: Callable[[], object]) -> None:
        self.left = number % 40
        self.handler = handler

    def look(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or "qcow2" not in frame.f_code.co_filename:
            return
        self.left -= 1
        if self.left < 0:
            sys.setprofile(None)
            self.handler()
