"""Checks of an image after a power cut, beyond the bytes of its disk: the image is consistent and usable.

The assertions A1, A3 and A6 of the power-loss design, for images of any format that has a `check`. `opened` is always a
function that opens a new copy of the image in a crash state, for reading or for writing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..image import Image
from ..report import CheckReport

#: Opens the image of a crash state; `read_only` as in `lamina.open`.
Opened = Callable[..., Image]


class Verdict(NamedTuple):
    """The result of a check by another program."""

    corruptions: int
    leaks: int


def check_whole(image: Image, *, repairable: bool = False) -> CheckReport:
    """A1: the check of the format is complete and finds no corruption. Leaks are allowed. `repairable`: the image declares
    that it needs a repair first (lazy reference counts), so its counts are not checked."""
    node: Any = image.node
    report: CheckReport = node.check()
    first = "; ".join(finding.message for finding in report.findings[:3])
    assert not report.check_errors, f"the check failed for {report.check_errors} parts: {first}"
    assert repairable or not report.corruptions, f"{report.corruptions} corruptions: {first}"
    return report


def check_agrees(report: CheckReport, verdict: Verdict) -> None:
    """A3: another program counts the same corruptions and leaks."""
    ours = Verdict(report.corruptions, report.leaks)
    assert ours == verdict, f"our check found {ours}, but the other program {verdict}"


def check_recovers(opened: Opened) -> None:
    """A6: the image opens for writing, accepts a write at both ends, keeps it after a flush and a close, and is consistent
    then. All other bytes stay unchanged. (The number of leaks may grow: clusters past the end of the file do not count until
    the file grows over them.)"""
    with opened(read_only=True) as image:
        before = image.read(0, image.size)
    length = min(700, len(before) // 2)
    expected = bytearray(before)
    with opened(read_only=False) as image:
        for offset in (0, len(before) - length):
            expected[offset : offset + length] = b"\xa6" * length
            image.write(offset, b"\xa6" * length)
        image.flush()
    with opened(read_only=True) as image:
        check_whole(image)
        assert image.read(0, image.size) == expected, "after a power cut, a write changed other bytes, or is lost"
