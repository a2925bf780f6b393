"""Conformance suites for those who write storage, formats or filters: subclass one, and pytest runs its laws.

    from lamina.testing import FilterConformance

    class TestSlow(FilterConformance):
        def make(self, image):
            return Slow(image)

`StorageConformance`, `FormatConformance` and `FilterConformance` hold a driver to what `lamina.node` promises; `model.Disk`
is the flat disk they compare it with. They need hypothesis and are run by pytest (the extra `dev`), which nothing else in
Lamina imports. For readable failures, let pytest rewrite the assertions in here, before importing it:
`pytest.register_assert_rewrite("lamina.testing")`.
"""

from __future__ import annotations

from .filters import FilterConformance
from .formats import FormatConformance
from .model import Disk, check_status
from .storage import StorageConformance

__all__ = ["Disk", "FilterConformance", "FormatConformance", "StorageConformance", "check_status"]
