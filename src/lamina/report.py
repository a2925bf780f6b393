"""The report of a check of an image: its findings, which are never raised as errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from .check_result import CheckResult, Finding, FindingKind

#: The number of findings with a text; the counters include all findings.
MAX_FINDINGS = 1000

ERROR: Final = "error"  #: a contradiction: data may be wrong, or a write may destroy data
LEAK: Final = "leak"  #: clusters are counted as allocated without a reference; harmless
UNREADABLE: Final = "unreadable"  #: a part could not be checked
NOTE: Final = "note"  #: correct, but unusual; not counted


@dataclass
class CheckReport:
    """The findings and counters of a check in progress; users get them as a `CheckResult` with the same fields."""

    findings: list[Finding] = field(default_factory=list)
    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int = 0

    @property
    def clean(self) -> bool:
        """Whether there is no error and no leak, and all could be checked."""
        return not (self.corruptions or self.leaks or self.check_errors)

    def add(self, kind: FindingKind, message: str, offset: int | None = None, count: int = 1) -> None:
        """Count `count` findings of `kind`, and keep their text, up to MAX_FINDINGS."""
        if kind == LEAK:
            self.leaks += count
        elif kind == ERROR:
            self.corruptions += count
        elif kind == UNREADABLE:
            self.check_errors += count
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(Finding(kind, message, offset))

    def result(self, filename: str, format: str) -> CheckResult:
        """The present findings as an immutable result."""
        return CheckResult(
            filename,
            format,
            tuple(self.findings),
            corruptions=self.corruptions,
            leaks=self.leaks,
            check_errors=self.check_errors,
            total_clusters=self.total_clusters,
            allocated_clusters=self.allocated_clusters,
            fragmented_clusters=self.fragmented_clusters,
            compressed_clusters=self.compressed_clusters,
            image_end_offset=self.image_end_offset,
        )
