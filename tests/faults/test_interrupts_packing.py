"""An interrupt while threads pack clusters: the image packs on, as do all others of the process.

The points are calls inside the standard library too, as far as they run on behalf of a write: locks that are written in
Python there (those of executors, futures, conditions) stay taken where an exception strikes between two of their steps.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lamina
from lamina.formats.qcow2 import compression, packers
from lamina.testing.image_checks import check_whole

_STANDARD = tuple(
    os.path.join(os.path.dirname(os.__file__), name) for name in ("threading.py", "queue.py", "concurrent" + os.sep)
)
_FILES = (*_STANDARD, compression.__file__, packers.__file__)
PATIENCE = 20.0
SIZE = 512 * 1024
DATA = b"lamina" * (SIZE // 6)


class Interrupt:
    def __init__(self, number: int) -> None:
        self.left = number
        self.struck: str | None = None

    def look(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "c_return") or not code.co_filename.startswith(_FILES):
            return
        self.left -= 1
        if self.left < 0:
            self.struck = f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_qualname} ({event})"
            sys.setprofile(None)
            raise KeyboardInterrupt


def test_an_interrupt_anywhere_lets_the_image_pack_on(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    number = 0
    while True:
        path = str(tmp_path / f"disk{number}")
        lamina.create(path, "qcow2", SIZE)
        image = lamina.open(path, format="qcow2", read_only=False)
        interrupt = Interrupt(number)
        sys.setprofile(interrupt.look)
        try:
            image.write(0, DATA, compress=True)
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        ended: list[bool] = []

        def go_on(image: lamina.Image = image, ended: list[bool] = ended) -> None:
            image.write(0, DATA, compress=True)
            image.close()
            ended.append(True)

        thread = threading.Thread(target=go_on, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert ended, f"after an interrupt at {interrupt.struck} nothing is packed any more"
        with lamina.open(path, format="qcow2") as again:
            assert again.read(0, len(DATA)) == DATA
            check_whole(again, repairable=True)
        Path(path).unlink()
        if interrupt.struck is None:
            break
        number += 1
    assert number > 20


def test_an_error_of_a_packing_thread_is_raised() -> None:
    def fail(_: memoryview) -> list[bytes]:
        raise MemoryError

    threads = packers.Packers(2)
    try:
        parts = [memoryview(b"a"), memoryview(b"b"), memoryview(b"c")]
        assert threads.run(lambda part: [bytes(part)], parts) == [[b"a"], [b"b"], [b"c"]]
        try:
            threads.run(fail, parts)
        except MemoryError:
            return
        raise AssertionError("the error was lost")
    finally:
        threads.close()
