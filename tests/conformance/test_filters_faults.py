"""The filter `faults` without a rule that takes part leaves no trace: the whole of `FilterConformance`."""

from __future__ import annotations

from typing import Any, ClassVar

from lamina.filters.faults import Faults
from lamina.graph import Opener
from lamina.node import Node
from lamina.request import Child
from lamina.testing import FilterConformance


class TestFaults(FilterConformance):
    options: ClassVar[dict[str, Any]] = {}

    def make(self, image: Child) -> Node:
        return Faults.open(Faults.schema.parse({"image": image, **self.options}), Opener(read_only=False))


class TestFaultsThatNeverCome(TestFaults):
    options = {"rules": [{"p": 0}, {"kind": "write", "after": 1 << 40, "torn": "subset"}], "space": 1 << 40}


class TestFaultsThatRememberChanges(TestFaults):
    options = {"undo": True}
