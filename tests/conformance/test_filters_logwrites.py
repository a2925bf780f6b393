"""The filter `logwrites` against the suite for filters."""

from __future__ import annotations

from lamina.filters.logwrites import LogWrites
from lamina.node import Node
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing import FilterConformance


class TestLogWrites(FilterConformance):
    def make(self, image: Child) -> Node:
        return LogWrites(image, Child(MemoryStorage(), "log", grows=True))


class TestLogWritesInLargeSectors(FilterConformance):
    def make(self, image: Child) -> Node:
        return LogWrites(image, Child(MemoryStorage(), "log", grows=True), log_sector_size=4096)


class TestLogWritesWithoutALog(FilterConformance):
    def make(self, image: Child) -> Node:
        return LogWrites(image, None)
