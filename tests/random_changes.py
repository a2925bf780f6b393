"""Changes of a disk, for tests of jobs: random ones before the job, and those of another thread meanwhile."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lamina.image import Image
from lamina.limits import KIB


def change(image: Image, dice: random.Random, times: int) -> None:
    """So many writes, zeros that are stored, zeros that are not, and discards, at random places."""
    for _ in range(times):
        at = dice.randrange(image.size)
        length = min(dice.choice([1, 512, 700, 4 * KIB, 20 * KIB, 64 * KIB, 300 * KIB]), image.size - at)
        what = dice.randrange(6)
        if what == 0:
            image.zero(at, length, unmap=dice.random() < 0.5)
        elif what in (1, 2):
            image.write(at, bytes(length))
        elif what == 3:
            image.discard(at, length)
        else:
            image.write(at, dice.randbytes(1) * length)


@contextmanager
def changed_meanwhile(image: Image) -> Iterator[None]:
    """Another thread writes to each cluster of `image` and discards it again, over and over."""
    done = threading.Event()

    def change() -> None:
        at = 0
        while not done.is_set():
            image.write(at, b"x" * 512)
            image.discard(at, 65536)
            at = (at + 65536) % image.size

    changer = threading.Thread(target=change)
    changer.start()
    try:
        yield
    finally:
        done.set()
        changer.join()
