"""The small filters against `FilterConformance`. Where a filter breaks a law by design, its class says what holds instead."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina import registry
from lamina.errors import OutOfRange, ReadOnly
from lamina.filters.readonly import ReadOnlyFilter
from lamina.graph import Opener
from lamina.image import Image
from lamina.node import Node
from lamina.request import Child
from lamina.testing import Disk, FilterConformance, check_status
from lamina.testing.disk import LAW, Operation, operations, refused
from lamina.testing.formats import KeptMemory
from lamina.testing.model import check_disk


class Filtered(FilterConformance):
    """A filter opened by name, with options as a user would write them."""

    driver: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}

    def make(self, image: Child) -> Node:
        return Opener(read_only=False).open({"driver": self.driver, "image": image, **self.options})


class TestReadOnly(Filtered):
    """What is written below is seen through it; what is asked of the filter itself is refused."""

    driver = "readonly"
    resizes = False
    # Its writes all come from below, where the order of overlapping ones is not its matter.
    test_overlapping_writes_of_many_threads_have_an_order = None

    def reopened(self, node: Node, *, read_only: bool = False) -> Node:
        again = super().reopened(node, read_only=read_only)
        again.read_only = True  # as it is without the suite
        return again

    def apply(self, image: Image, disk: Disk, operation: Operation) -> Image:
        if isinstance(image.node, ReadOnlyFilter) and operation[0] != "reopen":
            if operation[0] != "flush":
                refused(ReadOnly, image.write, operation[1], bytes(operation[2]))
                refused(ReadOnly, image.zero, operation[1], operation[2])
                refused(ReadOnly, image.discard, operation[1], operation[2])
            super().apply(Image(image.node.image.node), disk, operation)
            return image
        return super().apply(image, disk, operation)

    def test_an_empty_request_does_nothing(self) -> None:
        with self.image() as image:
            for offset in (0, 1, image.size):
                assert image.read(offset, 0) == b""
                assert len(image.extents(offset, 0)) == 0

    def test_requests_outside_the_disk_are_refused(self) -> None:
        with self.image() as image:
            for offset, length in ((image.size, 1), (0, image.size + 1), (-1, 2)):
                refused(OutOfRange, image.read, offset, length)
                refused(OutOfRange, image.extents, offset, length)


class TestNoExtents(Filtered):
    """Bytes are those of the child; the status is one extent of data."""

    driver = "noextents"

    def test_the_exact_status_is_that_of_the_bare_node(self) -> None:
        with self.image() as image:
            self.apply(image, self.model(image), ("write", 100, 70_000, 3))
            for offset, length in ((0, image.size), (1, 1), (77, 66_000)):
                (row,) = image.extents(offset, length)
                assert (row.start, row.length, row.data, row.zero, row.present) == (offset, length, True, False, True)
                assert (row.depth, row.compressed, row.file, row.offset) == (0, False, None, None)
                assert not image.root.reads_zero(offset, length)

    @LAW
    @given(st.data())
    def test_what_is_done_through_it_is_there_without_it(self, data: st.DataObject) -> None:
        below = KeptMemory(self.size)
        seen, bare = Image(self.make(Child(below, "image", grows=True))), Image(below)
        disk = self.model(bare)
        for operation in data.draw(operations(self.size, self.unit)):
            if operation[0] != "reopen":
                self.apply(seen, disk, operation)
        content = check_disk(seen, disk)
        assert content == check_disk(bare, disk)
        check_status(seen.extents(), 0, content)


class TestNoZero(Filtered):
    driver = "nozero"


class TestNoDiscard(Filtered):
    driver = "nodiscard"


class TestDelay(Filtered):
    driver = "delay"
    options = {"flush-ms": 1, "extents-ms": 1, "discard-ms": 1}


class TestProtect(Filtered):
    """It protects what is past the end of every disk here."""

    driver = "protect"
    options = {"ranges": "1G-2G,4G-"}


class TestBlockSize(Filtered):
    driver = "blocksize"
    options = {"minimum": 4096, "maximum": 8192}


class TestBlockSize64k(Filtered):
    driver = "blocksize"
    options = {"minimum": "64k"}


class TestBlockSizeTransfers(Filtered):
    driver = "blocksize"
    options = {"maximum": 1000}


class TestLog(Filtered):
    driver = "log"  # on standard error: the suite leaves nodes open


class TestStats(Filtered):
    driver = "stats"


class TestThrottle(Filtered):
    driver = "throttle"
    options = {"bps-total": "8T", "iops-total": 10**9, "iops-write": 10**6, "iops-write-max": 10**9}


class TestRetry(Filtered):
    driver = "retry"
    options = {"retries": 2, "delay": 0}


PAGES = Path(__file__).resolve().parent.parent.parent / "docs" / "filters"
NAMES = sorted({kind.driver for kind in Filtered.__subclasses__()})


@pytest.mark.parametrize("name", NAMES)
def test_the_page_lists_the_options(name: str) -> None:
    """With their defaults and meanings, in the order of the schema. (`tests/docs/test_generated.py` has the whole table.)"""
    page = (PAGES / f"{name}.md").read_text()
    found = re.findall(r"^\| `([^`]+)` \| [^|]+ \| (.*?) ?\| (.+) \|$", page, re.MULTILINE)
    driver: Any = registry.lookup(name, "filter")
    said = [
        (option, f"`{default}`" if default not in ("", "required") else default, doc)
        for option, _, default, doc in driver.schema.help()
    ]
    assert found == said


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_the_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And prints what its comments say."""
    monkeypatch.chdir(tmp_path)
    page = PAGES / f"{name}.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    output = io.StringIO()
    with redirect_stdout(output):
        exec(compile(example, str(page), "exec"), {"__name__": name})
    for said in re.findall(r"print\(.*\)  # (.*)", example):
        assert said in output.getvalue().splitlines()
