"""What an image must be after a power cut, beyond the bytes of its disk: whole, and of use again.

The assertions A1, A3 and A6 of the power-loss design, for images of any format that has a `check`. `opened` is always a
function that gives the image in a crash state anew, open for reading or for writing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..image import Image
from ..report import CheckReport

#: Opens the image of a crash state; `read_only` as in `lamina.open`.
Opened = Callable[..., Image]


class Verdict(NamedTuple):
    """What another program's check says of an image."""

    corruptions: int
    leaks: int


def check_whole(image: Image, *, repairable: bool = False) -> CheckReport:
    """A1: the check of the format finds no corruption, and could examine all. Leaks are allowed. `repairable`: the image
    says itself that it must be repaired first (lazy reference counts), and nothing is asked of its counts."""
    node: Any = image.node
    report: CheckReport = node.check()
    first = "; ".join(finding.message for finding in report.findings[:3])
    assert not report.check_errors, f"the check failed at {report.check_errors} places: {first}"
    assert repairable or not report.corruptions, f"{report.corruptions} corruptions: {first}"
    return report


def check_agrees(report: CheckReport, verdict: Verdict) -> None:
    """A3: another program counts the same corruptions and leaks."""
    ours = Verdict(report.corruptions, report.leaks)
    assert ours == verdict, f"our check found {ours}, the other one {verdict}"


def check_recovers(opened: Opened) -> None:
    """A6: the image opens for writing, takes a write at both ends, keeps it over flush and close, and is whole then. What the
    writes did not touch stays as it was. (Leaks may seem more: what is counted behind the end of the file is none until
    the file grows over it.)"""
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
        assert image.read(0, image.size) == expected, (
            "after a power cut, a write changed more than it should, or is lost"
        )
