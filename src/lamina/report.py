"""What a check of an image found: findings are returned, never raised, however broken the image is."""

from __future__ import annotations

from dataclasses import dataclass, field

from .results import CheckResult, Finding

#: At most this many findings are kept with their text; all are counted.
MAX_FINDINGS = 1000

ERROR = "error"  #: the image contradicts itself: data may be wrong, or may be lost by writing
LEAK = "leak"  #: clusters are counted as allocated, and nothing refers to them; harmless
UNREADABLE = "unreadable"  #: a part could not be examined
NOTE = "note"  #: correct, but unusual; not counted


@dataclass
class CheckReport:
    """What a driver collects while it checks an image; users get it as a `CheckResult`, whose fields these are."""

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
        return not (self.corruptions or self.leaks or self.check_errors)

    def add(self, kind: str, message: str, offset: int | None = None, count: int = 1) -> None:
        """Count `count` findings of `kind` and keep their text, up to MAX_FINDINGS."""
        if kind == LEAK:
            self.leaks += count
        elif kind == ERROR:
            self.corruptions += count
        elif kind == UNREADABLE:
            self.check_errors += count
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(Finding(kind, message, offset))

    def result(self, filename: str, format: str) -> CheckResult:
        """The findings of now, frozen."""
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
