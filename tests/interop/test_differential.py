"""Random operations on random geometries, ours and QEMU's: equal bytes, clean images, equal exact maps.

`LAMINA_TWINS` sets how many sequences each QEMU gets; `LAMINA_SEED` repeats a run.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests import evidence

from .twins import Geometry, Twins, draw_operations

SEQUENCES = int(os.environ.get("LAMINA_TWINS", "300"))
#: Sequences of one test: small enough to spread over workers, large enough to cost little each.
BATCH = 10


@pytest.mark.parametrize("batch", range(SEQUENCES // BATCH))
def test_twins_stay_equal(qemu: Any, tmp_path: Path, seed: int, batch: int) -> None:
    for number in range(batch * BATCH, (batch + 1) * BATCH):
        rng = random.Random(f"{seed}/{number}")
        folder = tmp_path / str(number)
        folder.mkdir()
        geometry = Geometry.draw(rng)
        print(f"sequence {number}: {geometry}")
        twins = Twins(qemu, folder, geometry)
        twins.run(draw_operations(rng, geometry, rng.randrange(1, 25)))
        twins.compare()
        for leftover in folder.iterdir():
            leftover.unlink()
    evidence.count("sequences on twin images, ours and QEMU's", BATCH)
