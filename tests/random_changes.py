"""Random changes of a disk, for tests that compare it before and after a job."""

from __future__ import annotations

import random

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
