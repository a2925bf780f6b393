"""What the examination of a file results in, and the record in which its judges collect it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..json_forms import NamedFileJson, VerdictJson


class NamedFile(NamedTuple):
    """A file that the examined one names: `role` is what it is to be ("backing file"), `name` what is stored, never looked
    up."""

    role: str
    name: str

    def to_json(self) -> NamedFileJson:
        """Its fields."""
        return {"role": self.role, "name": self.name}


class Verdict(NamedTuple):
    """The result of `lamina.inspect`. `safe`: nothing speaks against handing the file on as an image of `format`; otherwise
    `reasons` has a sentence for each thing that does."""

    format: str
    #: The formats whose signatures the file has, and the contents of a raw disk: "gpt", "mbr", "iso9660", "udf".
    matches: tuple[str, ...] = ()
    references: tuple[NamedFile, ...] = ()
    #: What the image has or uses, in words.
    features: tuple[str, ...] = ()
    #: The limits that a number in the file exceeds. Each is a reason as well.
    limits_hit: tuple[str, ...] = ()
    safe: bool = False
    reasons: tuple[str, ...] = ()
    #: The size of the disk in bytes; None if it is not known. (Not in the JSON.)
    virtual_size: int | None = None

    def to_json(self) -> VerdictJson:
        """Its fields under their names, but for `virtual_size`."""
        return {
            "format": self.format,
            "matches": list(self.matches),
            "references": [one.to_json() for one in self.references],
            "features": list(self.features),
            "limits_hit": list(self.limits_hit),
            "safe": self.safe,
            "reasons": list(self.reasons),
        }


class Findings:
    """What the judges of a file have found so far."""

    def __init__(self) -> None:
        self.references: list[NamedFile] = []
        self.features: list[str] = []
        self.limits_hit: list[str] = []
        self.reasons: list[str] = []
        self.virtual_size: int | None = None

    def refuse(self, reason: str) -> None:
        """The file is not safe."""
        if reason not in self.reasons:
            self.reasons.append(reason)

    def refer(self, role: str, name: str) -> None:
        """The file names another one, so it is not safe."""
        self.references.append(NamedFile(role, name))
        self.refuse(f"it names another file: {role}")

    def exceed(self, limit: str) -> None:
        """A number in the file exceeds a limit, so it is not safe."""
        self.limits_hit.append(limit)
        self.refuse(limit)

    def result(self, format: str, matches: tuple[str, ...]) -> Verdict:
        return Verdict(
            format,
            matches,
            tuple(self.references),
            tuple(self.features),
            tuple(self.limits_hit),
            not self.reasons,
            tuple(self.reasons),
            self.virtual_size,
        )
