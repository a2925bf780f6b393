"""An interrupt while threads pack clusters: the image packs on, as do all others of the process.

The points are calls inside the standard library too, as far as they run on behalf of a write: locks that are written in
Python there (those of executors, futures, conditions) stay taken where an exception strikes between two of their steps.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lamina
from lamina import workers
from lamina.formats.qcow2 import compression
from lamina.testing.image_checks import check_whole
from lamina.testing.interrupts import in_another_thread, interrupted_at_call

_STANDARD = tuple(
    os.path.join(os.path.dirname(os.__file__), name) for name in ("threading.py", "queue.py", "concurrent" + os.sep)
)
_FILES = (*_STANDARD, compression.__file__, workers.__file__)
SIZE = 512 * 1024
DATA = b"lamina" * (SIZE // 6)


def test_an_interrupt_anywhere_lets_the_image_pack_on(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    number, interrupted = 0, True
    while interrupted:
        number += 1
        path = str(tmp_path / f"disk{number}")
        lamina.create(path, "qcow2", SIZE)
        image = lamina.open(path, format="qcow2", read_only=False)
        with interrupted_at_call(number, lambda code: code.co_filename.startswith(_FILES)):
            try:
                image.write(0, DATA, compress=True)
                interrupted = False
            except KeyboardInterrupt:
                pass

        def go_on(image: lamina.Image = image) -> None:
            image.write(0, DATA, compress=True)
            image.close()

        in_another_thread(go_on)
        with lamina.open(path, format="qcow2") as again:
            assert again.read(0, len(DATA)) == DATA
            check_whole(again, repairable=True)
        Path(path).unlink()
    assert number > 20
