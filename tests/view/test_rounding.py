"""The script of the page reads what the library wrote, and rounds as the library does; and a million extents are one page."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import lamina
from lamina.extents import Extents
from lamina.viewer.collect import Model
from lamina.viewer.document import document
from lamina.viewer.page import page
from lamina.viewer.report import LIMIT
from tests.view.conftest import Opened
from tests.view.models import FILES, model_of, random_extents

MILLION = 1_000_000
TOLD = """([told, alignment]) => {
  let rows = readStatus(told);
  if (alignment) rows = align(rows, alignment);
  return [rows.start, rows.flags, rows.depth, rows.file, rows.offset].map((column) => [...column]);
}"""


def columns_of(extents: Extents) -> list[list[int]]:
    """The columns as the script has them: files by their numbers in the model."""
    numbers = [FILES.index(file) for file in extents.files]  # type: ignore[arg-type]
    file = [numbers[one] if one >= 0 else -1 for one in extents.file.tolist()]
    start = [*extents.start.tolist(), extents.end]
    return [start, extents.flags.tolist(), extents.depth.tolist(), file, extents.offset.tolist()]


def status_of(model: Model, most: int = LIMIT) -> dict[str, Any]:
    found: dict[str, Any] = document(model, most)["disks"][0]["status"]
    return found


def blank(show: Callable[..., Opened]) -> Opened:
    model = model_of(random_extents(random.Random(1), 5))
    return show(page(document(model, LIMIT), "rounding"))


def test_the_script_reads_and_rounds_as_the_library(show: Callable[..., Opened], seed: int) -> None:
    rng = random.Random(seed)
    opened = blank(show)
    for _ in range(60):
        unit = rng.choice((1, 1, 3, 512, 4096, 1 << 33))
        extents = random_extents(rng, rng.choice((2, 5, 40, 400)), unit, sequential=rng.random())
        told = status_of(model_of(extents))
        assert told["grain"] == 1
        assert opened.ask(TOLD, [told, 0]) == columns_of(extents)
        for _ in range(6):
            alignment = unit.bit_length() and 1 << rng.randrange(12) << max(unit.bit_length() - rng.randrange(9), 0)
            assert opened.ask(TOLD, [told, alignment]) == columns_of(extents.align(alignment)), alignment


def test_coarse_rows_round_to_the_same(show: Callable[..., Opened], seed: int) -> None:
    rng = random.Random(seed)
    opened = blank(show)
    extents = random_extents(rng, 60_000, 512)
    told = status_of(model_of(extents), 450_000)
    assert told["grain"] > 512
    for factor in (1, 2, 8, 1024):
        alignment = told["grain"] * factor
        assert opened.ask(TOLD, [told, alignment]) == columns_of(extents.align(alignment))


def test_a_million_extents(show: Callable[..., Opened], seed: int) -> None:
    extents = random_extents(random.Random(seed), 1_200_000, 65536)
    assert len(extents) >= MILLION
    model = model_of(extents.clip(0, int(extents.start[MILLION])))
    text = page(document(model, LIMIT), "a million")
    assert len(text.encode()) <= LIMIT
    opened = show(text)
    assert opened.ask("disks[0].rows.grain") == 1
    assert opened.ask("disks[0].rows.count") == MILLION
    row = random.Random(seed).randrange(MILLION)
    at = opened.ask("(row) => [disks[0].rows.start[row], disks[0].rows.offset[row]]", row)
    assert at == [int(extents.start[row]), int(extents.offset[row])]
    opened.ask("diskLanes.step(1), diskLanes.zoomToChosen()")
    assert not opened.complaints


def test_the_public_function_and_a_limit(show: Callable[..., Opened], tmp_path: Any, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 1 << 30, cluster_size=512)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for at in range(0, 1 << 24, 4096):
            image.write(at + 512 * rng.randrange(7), b"x" * 512)
    with lamina.open(path, format="qcow2") as image:
        opened = show(lamina.view(image, output=tmp_path / "page.html"))
        assert (tmp_path / "page.html").stat().st_size < LIMIT
        assert opened.ask(TOLD, [status_of(model_of_image(image)), 0])[0] == [
            *image.extents().start.tolist(),
            image.size,
        ]


def model_of_image(image: lamina.Image) -> Model:
    from lamina.jobs.progress import Monitor
    from lamina.viewer.collect import collect

    return collect((image,), 4096, True, Monitor())
