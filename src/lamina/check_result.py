"""The result of a check, for users; see `results`. (A module of its own: `lamina info` has no use for it.)"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, cast

if TYPE_CHECKING:
    from .json_forms import CheckResultJson, FindingJson


#: The kinds of findings; see `Finding`.
FindingKind: TypeAlias = Literal["error", "leak", "unreadable", "note"]


class Finding(NamedTuple):
    """One finding of a check. `kind`: "error" (a contradiction: data may be wrong, or a write may destroy data), "leak"
    (clusters are counted as allocated without a reference), "unreadable" (the check could not read a part) or "note"
    (correct, but unusual). `offset`: the byte of the image file that the finding concerns."""

    kind: FindingKind
    message: str
    offset: int | None = None

    def to_json(self) -> FindingJson:
        """Its fields; without `offset` if it is None."""
        found: FindingJson = {"kind": self.kind, "message": self.message}
        if self.offset is not None:
            found["offset"] = self.offset
        return found


class CheckResult(NamedTuple):
    """The result of a check of an image (`lamina.check`). The first findings have a text; the counters include all of them.
    Clusters are the unit of allocation of the format."""

    filename: str
    format: str
    findings: tuple[Finding, ...] = ()
    corruptions: int = 0  #: errors
    leaks: int = 0
    check_errors: int = 0  #: parts that could not be checked
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int = 0
    corruptions_fixed: int = 0  #: by a repair, and not among `corruptions`
    leaks_fixed: int = 0
    other_writers: tuple[str, ...] = ()  #: files beneath that another program had open for writing (not in the JSON)

    @property
    def clean(self) -> bool:
        """Whether the check was complete and found no error and no leak."""
        return not (self.corruptions or self.leaks or self.check_errors)

    def to_json(self) -> CheckResultJson:
        """The same under the names of `qemu-img check --output=json`, and "findings". Zero counters are omitted, as programs
        that read this form expect."""
        counts = {
            "corruptions": self.corruptions,
            "leaks": self.leaks,
            "corruptions-fixed": self.corruptions_fixed,
            "leaks-fixed": self.leaks_fixed,
            "allocated-clusters": self.allocated_clusters,
            "fragmented-clusters": self.fragmented_clusters,
            "compressed-clusters": self.compressed_clusters,
        }
        found = {
            "image-end-offset": self.image_end_offset,
            "total-clusters": self.total_clusters,
            "check-errors": self.check_errors,
            **{key: count for key, count in counts.items() if count},
            "filename": self.filename,
            "format": self.format,
            "findings": [one.to_json() for one in self.findings],
        }
        return cast("CheckResultJson", found)

    def _repr_html_(self) -> str:
        """What notebooks show: the counters, and the first findings."""
        from .picture.tables import of_check

        return of_check(self)
