"""Which files are left of a new image with an external data file, when something fails at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import BlockIOError

SIZE = 1 << 20


@pytest.mark.parametrize("replaces", [False, True])
def test_the_data_file_stays_if_the_image_has_its_name_when_something_fails(
    tmp_path: Path, replaces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "disk.qcow2"
    if replaces:
        lamina.create(target, "qcow2", SIZE)

    def failing(*_: Any) -> None:
        raise BlockIOError("the folder cannot be flushed")

    monkeypatch.setattr("lamina.atomic_file.sync_folder", failing)
    with pytest.raises(BlockIOError, match="cannot be flushed"):
        lamina.create(target, "qcow2", SIZE, data_file="data")
    with lamina.open(target, format="qcow2") as image:
        assert not any(image.read(0, SIZE))
        assert image.node.children["data-file"].node.size == SIZE
