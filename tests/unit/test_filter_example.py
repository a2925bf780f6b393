"""The filter that CONTRIBUTING.md shows is a whole filter: its text is taken from there, and run."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import lamina
from lamina import registry

PAGE = Path(__file__).resolve().parent.parent.parent / "CONTRIBUTING.md"


@pytest.fixture
def example(own_drivers: None) -> Iterator[types.ModuleType]:
    found = re.search(r"```python\n(.*?class Slow.*?)```", PAGE.read_text(), re.DOTALL)
    assert found, "CONTRIBUTING.md shows a filter"
    module = types.ModuleType("slow_example")
    exec(compile(found[1], str(PAGE), "exec"), module.__dict__)
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def test_the_example_filters(example: types.ModuleType, tmp_path: Path) -> None:
    registry.register("slow", "filter", "slow_example:Slow", "delays every read")
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 1 << 20)
    spec = {"driver": "slow", "milliseconds": 1, "image": {"driver": "qcow2", "file": {"filename": str(path)}}}
    with lamina.open(spec, read_only=False) as image:
        image.write(1000, b"seen through it")
        assert image.read(1000, 15) == b"seen through it"
        assert image.extents().totals().data == 65536
