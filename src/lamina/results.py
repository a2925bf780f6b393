"""Results of the library: frozen, typed records, each with `to_json`.

This is the shape of all results that users get: a `NamedTuple` whose fields have names and types of Python, and a method
`to_json` that gives the same as a dict of JSON types under the names that the commands of this field print. The library makes
results; the command line only formats them. A field that is None was not told, or is nothing that the format has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class ImageInfo(NamedTuple):
    """What an image is, as its header says it (`lamina.info`). Sizes are in bytes. Of a format that Lamina has no driver for,
    only the name and `unsupported` are known."""

    filename: str = ""
    format: str = ""
    #: Lamina detected the format by its magic, and the user did not name it: it is a guess.
    format_probed: bool = False
    virtual_size: int | None = None  #: the length of the disk
    actual_size: int | None = None  #: what the file takes up on its device
    cluster_size: int | None = None
    dirty: bool | None = None  #: it was not closed properly
    encrypted: bool | None = None
    backing_filename: str | None = None  #: as it stands in the image
    full_backing_filename: str | None = None  #: the same as seen from here
    backing_format: str | None = None
    #: All else, as JSON shows it: {"type": "qcow2", "data": {...}}. Not to be changed.
    format_specific: Mapping[str, Any] | None = None
    #: The features that keep this version of Lamina from opening it.
    unsupported: tuple[str, ...] = ()
    #: Files beneath that another program had open for writing. (Not in the JSON.)
    other_writers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same by the names that `qemu-img info --output=json` uses; ours are "format-probed" and "unsupported"."""
        values: dict[str, Any] = {
            "filename": self.filename,
            "format": self.format,
            "virtual-size": self.virtual_size,
            "cluster-size": self.cluster_size,
            "dirty-flag": self.dirty,
            "encrypted": self.encrypted,
            "backing-filename": self.backing_filename,
            "backing-filename-format": self.backing_format,
            "format-specific": self.format_specific,
            "unsupported": list(self.unsupported) or None,
            "actual-size": self.actual_size,
        }
        found = {key: value for key, value in values.items() if value is not None}
        found.setdefault("dirty-flag", False)
        if self.full_backing_filename is not None:
            found["full-backing-filename"] = self.full_backing_filename
        if self.format_probed:
            found["format-probed"] = True
        return found


class Finding(NamedTuple):
    """One result of a check. `kind`: "error" (the image contradicts itself: data may be wrong, or writing may destroy data),
    "leak" (clusters are counted as allocated, and nothing refers to them), "unreadable" (the check could not read a part) or
    "note" (correct, but unusual). `offset`: the byte of the image file that the finding concerns."""

    kind: str
    message: str
    offset: int | None = None

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"kind": self.kind, "message": self.message}
        return found if self.offset is None else found | {"offset": self.offset}


class CheckResult(NamedTuple):
    """What a check of an image found (`lamina.check`). The first findings are kept with their text, all are counted;
    clusters are what the format allocates by."""

    filename: str
    format: str
    findings: tuple[Finding, ...] = ()
    corruptions: int = 0  #: errors
    leaks: int = 0
    check_errors: int = 0  #: parts that could not be examined
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int = 0
    other_writers: tuple[str, ...] = ()  #: files beneath that another program had open for writing (not in the JSON)

    @property
    def clean(self) -> bool:
        """Whether all was examined, and nothing is wrong."""
        return not (self.corruptions or self.leaks or self.check_errors)

    def to_json(self) -> dict[str, Any]:
        """The same by the names that `qemu-img check --output=json` uses, and "findings". Programs that read these expect
        that counts of nothing are left out."""
        counts = {
            "corruptions": self.corruptions,
            "leaks": self.leaks,
            "allocated-clusters": self.allocated_clusters,
            "fragmented-clusters": self.fragmented_clusters,
            "compressed-clusters": self.compressed_clusters,
        }
        return {
            "image-end-offset": self.image_end_offset,
            "total-clusters": self.total_clusters,
            "check-errors": self.check_errors,
            **{key: count for key, count in counts.items() if count},
            "filename": self.filename,
            "format": self.format,
            "findings": [one.to_json() for one in self.findings],
        }
