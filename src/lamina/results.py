"""Results of the library: immutable typed records, each with `to_json`.

All results for users have this form: a `NamedTuple` with Python names and types, and a method `to_json` that returns the same
as a dict of JSON types, under the names that the reference tools print. The library creates results; the command line formats
them. A field is None if its value is unknown, or if the format has no such property.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from .json_forms import ImageInfoJson, SnapshotJson


class Snapshot(NamedTuple):
    """One internal snapshot: an earlier state of the disk that the image keeps. `size` is the size of the disk at that time,
    and `vm_state` the length of a saved machine state, both in bytes; `date` is in seconds since 1970, plus `date_nsec`
    nanoseconds; `vm_clock`, how long the guest had run, in nanoseconds; `icount` counts the instructions of the guest."""

    id: str
    name: str
    size: int
    vm_state: int = 0
    date: int = 0
    date_nsec: int = 0
    vm_clock: int = 0
    icount: int | None = None

    def to_json(self) -> SnapshotJson:
        """The same by the names that `qemu-img info --output=json` uses, and "disk-size"."""
        found: SnapshotJson = {
            "id": self.id,
            "name": self.name,
            "vm-state-size": self.vm_state,
            "date-sec": self.date,
            "date-nsec": self.date_nsec,
            "vm-clock-sec": self.vm_clock // 1_000_000_000,
            "vm-clock-nsec": self.vm_clock % 1_000_000_000,
            "disk-size": self.size,
        }
        if self.icount is not None:
            found["icount"] = self.icount
        return found


class ImageInfo(NamedTuple):
    """A description of an image from its header (`lamina.info`). Sizes are in bytes. For a format without a driver, only the
    name and `unsupported` are known."""

    filename: str = ""
    format: str = ""
    #: Whether Lamina detected the format by its magic, which is a guess, because the user named none.
    format_probed: bool = False
    virtual_size: int | None = None  #: the length of the disk
    actual_size: int | None = None  #: the allocated bytes of the file
    file_size: int | None = None  #: the length of the file, if the image is in a file (not in the JSON)
    cluster_size: int | None = None
    dirty: bool | None = None  #: whether it was not closed properly
    encrypted: bool | None = None
    backing_filename: str | None = None  #: the name in the image
    full_backing_filename: str | None = None  #: the same relative to the current directory
    backing_format: str | None = None
    #: Other properties in their JSON form: {"type": "qcow2", "data": {...}}. Not to be changed.
    format_specific: Mapping[str, Any] | None = None
    snapshots: tuple[Snapshot, ...] = ()  #: the internal snapshots, in the order of the image
    #: The features that prevent this version of Lamina from opening it.
    unsupported: tuple[str, ...] = ()
    #: Files beneath that another program had open for writing. (Not in the JSON.)
    other_writers: tuple[str, ...] = ()

    def to_json(self) -> ImageInfoJson:
        """The same under the names of `qemu-img info --output=json`, and "format-probed" and "unsupported"."""
        values: dict[str, Any] = {
            "filename": self.filename,
            "format": self.format,
            "virtual-size": self.virtual_size,
            "cluster-size": self.cluster_size,
            "dirty-flag": self.dirty,
            "encrypted": self.encrypted,
            "backing-filename": self.backing_filename,
            "backing-filename-format": self.backing_format,
            "snapshots": [one.to_json() for one in self.snapshots] or None,
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
        return cast("ImageInfoJson", found)

    def _repr_html_(self) -> str:
        """What notebooks show: a table."""
        from .picture.tables import of_info

        return of_info(self)
