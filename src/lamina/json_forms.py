"""The JSON that Lamina prints and `to_json` returns, as types: one `TypedDict` for each kind of object.

`result_schema` makes JSON Schemas of them, and docs/json.md comes from those. Only results whose JSON differs from their
fields are here; the others have their fields with hyphens in the names, without those that are None. Type checkers import
this module; programs need it for schemas alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

SnapshotJson = TypedDict(
    "SnapshotJson",
    {
        "id": Annotated[str, "its number in the image, as text"],
        "name": Annotated[str, "the name that the user gave it"],
        "vm-state-size": Annotated[int, "the bytes of the saved machine state; 0 if there is none"],
        "date-sec": Annotated[int, "when it was taken, in seconds since 1970"],
        "date-nsec": Annotated[int, "the nanoseconds to add to date-sec"],
        "vm-clock-sec": Annotated[int, "how long the guest had run, in seconds"],
        "vm-clock-nsec": Annotated[int, "the nanoseconds to add to vm-clock-sec"],
        "disk-size": Annotated[int, "the length of the disk at that time in bytes"],
        "icount": NotRequired[Annotated[int, "how many instructions the guest had executed"]],
    },
)
SnapshotJson.__doc__ = """An internal snapshot, by the names of `qemu-img info --output=json`, and `disk-size`."""


class SpecificJson(TypedDict):
    """What only images of one format have."""

    type: Annotated[str, "the format"]
    data: Annotated[dict[str, Any], "its properties by name; for qcow2 those that `qemu-img info` prints"]


ImageInfoJson = TypedDict(
    "ImageInfoJson",
    {
        "filename": Annotated[str, "the name under which it was opened"],
        "format": Annotated[str, "the name of the format"],
        "virtual-size": NotRequired[Annotated[int, "the length of the disk in bytes"]],
        "cluster-size": NotRequired[Annotated[int, "the unit of allocation in bytes"]],
        "dirty-flag": Annotated[bool, "whether the image was not closed properly"],
        "encrypted": NotRequired[Annotated[bool, "whether the disk is encrypted"]],
        "backing-filename": NotRequired[Annotated[str, "the name of the backing file that is stored in the image"]],
        "backing-filename-format": NotRequired[Annotated[str, "the format of the backing file, if the image names it"]],
        "snapshots": NotRequired[Annotated[list[SnapshotJson], "the internal snapshots, in the order of the image"]],
        "format-specific": NotRequired[Annotated[SpecificJson, "what only images of this format have"]],
        "unsupported": NotRequired[Annotated[list[str], "the features that prevent this version from opening it"]],
        "actual-size": NotRequired[Annotated[int, "the bytes that the file takes up"]],
        "full-backing-filename": NotRequired[Annotated[str, "the same name relative to the current folder"]],
        "format-probed": NotRequired[Annotated[bool, "true if the format was detected, since the user named none"]],
    },
)
ImageInfoJson.__doc__ = """An image, by the names of `qemu-img info --output=json`. A property that is unknown, or that the
format does not have, is left out; so are the children of the node, which that program lists from version 8 on."""


CheckResultJson = TypedDict(
    "CheckResultJson",
    {
        "image-end-offset": Annotated[int, "the end of the last cluster in use, in bytes"],
        "total-clusters": Annotated[int, "the clusters of the disk"],
        "check-errors": Annotated[int, "parts that could not be checked"],
        "corruptions": NotRequired[Annotated[int, "errors that are left"]],
        "leaks": NotRequired[Annotated[int, "leaks that are left"]],
        "corruptions-fixed": NotRequired[Annotated[int, "errors that a repair mended"]],
        "leaks-fixed": NotRequired[Annotated[int, "leaks that a repair freed"]],
        "allocated-clusters": NotRequired[Annotated[int, "clusters of the disk that are stored"]],
        "fragmented-clusters": NotRequired[
            Annotated[int, "of these, those that do not follow the one before in the file"]
        ],
        "compressed-clusters": NotRequired[Annotated[int, "of these, the compressed ones"]],
        "filename": Annotated[str, "the name of the image"],
        "format": Annotated[str, "the name of the format"],
        "findings": Annotated["list[FindingJson]", "the first findings; the counters include all"],
    },
)
CheckResultJson.__doc__ = """The result of a check, by the names of `qemu-img check --output=json`, and `findings`. Counters
that are 0 are left out."""


class FindingJson(TypedDict):
    """One finding of a check."""

    kind: Annotated[
        Literal["error", "leak", "unreadable", "note"],
        "error: data may be wrong, or a write may destroy data; leak: clusters count as allocated without a reference; "
        "unreadable: the check could not read a part; note: correct, but unusual",
    ]
    message: Annotated[str, "a sentence about it"]
    offset: NotRequired[Annotated[int, "the byte of the image file that it concerns"]]


class ExtentJson(TypedDict):
    """A range of the disk with one status."""

    start: Annotated[int, "the first byte, as its offset on the disk"]
    length: Annotated[int, "the number of bytes"]
    depth: Annotated[int, "the number of layers above the one that decides; 0 is the top"]
    present: Annotated[bool, "whether a layer of the chain owns the bytes, so that no deeper layer matters"]
    zero: Annotated[bool, "whether they are known to read as zeros"]
    data: Annotated[bool, "whether they are stored"]
    compressed: Annotated[bool, "whether they are stored compressed"]
    offset: NotRequired[
        Annotated[int, "where the bytes are in the file of that layer; absent if they are not stored as they are"]
    ]


class GuestJson(TypedDict):
    """A range of the disk that a part of the file serves."""

    offset: Annotated[int, "its first byte on the disk"]
    length: Annotated[int, "its bytes"]
    status: Annotated[
        str,
        "data, zero, unallocated (the layer below decides), compressed, recorded (by a bitmap), machine state (then offset "
        "is one in that state), or past the end of the disk",
    ]
    snapshot: Annotated[str | None, "the id of an internal snapshot; null: the disk of now"]
    exact: Annotated[int | None, "the offset of the asked byte; null if no single byte of the disk corresponds to it"]


PartJson = TypedDict(
    "PartJson",
    {
        "structure": Annotated[str, "what they belong to"],
        "offset": Annotated[int, "the first byte in the file"],
        "length": Annotated[int, "the number of bytes"],
        "owner": NotRequired[Annotated[str, "to which one, if there are several: snapshot 1, bitmap b0"]],
        "field": NotRequired[Annotated[str, "the field or the entry"]],
        "value": NotRequired[Annotated[int | str, "its number in the file, or its text"]],
        "text": NotRequired[Annotated[str, "what that means"]],
        "details": NotRequired[Annotated[dict[str, Any], "the same for programs"]],
        "guest": Annotated[list[GuestJson], "the ranges of the disk that it serves"],
        "more-guest-ranges": NotRequired[Annotated[int, "how many further ranges are left out of guest"]],
    },
)
PartJson.__doc__ = """What some bytes of an image file are."""


class ExplanationJson(TypedDict):
    """What one byte of an image file is."""

    offset: Annotated[int, "the byte of the file"]
    parts: Annotated[list[PartJson], "what it is; several members if structures of a damaged image overlap"]
    cluster: Annotated[int | None, "the number of its cluster; null if the format has none"]
    refcount: Annotated[int | None, "how many references the image counts; null if it does not count"]
    problems: Annotated[list[str], "what could not be read, so that more may be there"]


class StoredJson(TypedDict):
    """The compressed data that has a byte of the disk."""

    offset: Annotated[int, "where the data begins in the file"]
    length: Annotated[int, "its bytes in the file"]


class StepJson(TypedDict):
    """Where one layer of a chain has a byte of the disk."""

    depth: Annotated[int, "the number of layers above"]
    format: Annotated[str, "the name of the format"]
    filename: Annotated[str, "the image"]
    offset: Annotated[int, "the byte of its disk"]
    length: Annotated[int, "the bytes from there on of which the same holds"]
    status: Annotated[str, "as in guest ranges; unallocated: the layer below decides"]
    parts: Annotated[list[PartJson], "the fields and entries that say so, in the order in which a reader follows them"]
    host: Annotated[int | None, "where the byte is in file; null if it is stored nowhere, or compressed"]
    file: Annotated[str | None, "the file that has it"]
    stored: Annotated[StoredJson | None, "the compressed data; null if it is not compressed"]
    problems: Annotated[list[str], "what could not be read"]


GuestPathJson = TypedDict(
    "GuestPathJson",
    {
        "guest-offset": Annotated[int, "the byte of the disk"],
        "layers": Annotated[list[StepJson], "from the image down to the layer that decides"],
    },
)
GuestPathJson.__doc__ = """The way from a byte of the disk to its place."""


class OverviewJson(TypedDict):
    """The structures of an image file."""

    header: Annotated[list[PartJson], "the fields of the header"]
    regions: Annotated[list[PartJson], "the structures to which it leads"]
    problems: Annotated[list[str], "what could not be read"]


class NamedFileJson(TypedDict):
    """A file that the examined one names."""

    role: Annotated[str, "what it is to be: backing file, ..."]
    name: Annotated[str, "the name that is stored, never looked up"]


class VerdictJson(TypedDict):
    """Whether a file is safe to be handed on as an image."""

    format: Annotated[str, "the format as which the file was examined"]
    matches: Annotated[
        list[str], "the formats whose signatures the file has, and what a raw disk contains: gpt, mbr, iso9660, udf"
    ]
    references: Annotated[list[NamedFileJson], "the files that it names"]
    features: Annotated[list[str], "what the image has or uses, in words"]
    limits_hit: Annotated[list[str], "the limits that a number in the file exceeds; each is a reason as well"]
    safe: Annotated[bool, "whether nothing speaks against handing the file on as an image of this format"]
    reasons: Annotated[list[str], "a sentence for each thing that does"]


class RangeJson(TypedDict):
    """A range of the disk."""

    byte_offset: Annotated[int, "its first byte"]
    size_bytes: Annotated[int, "its bytes"]


class DiffJson(TypedDict):
    """The ranges that differ, by the names of the container storage interface (GetMetadataDeltaResponse)."""

    block_metadata_type: Annotated[Literal["VARIABLE_LENGTH"], "always this: ranges have any length"]
    volume_capacity_bytes: Annotated[int, "the length of the second disk"]
    block_metadata: Annotated[list[RangeJson], "the ranges, in order and not adjacent"]


class SharedNodeJson(TypedDict):
    """A node that was described above, where another edge leads to it."""

    name: Annotated[str, "its node-name"]
    driver: Annotated[str, "the name of its driver"]
    shared: Annotated[Literal[True], "always true"]


NodeJson = TypedDict(
    "NodeJson",
    {
        "name": Annotated[str, "its node-name"],
        "driver": Annotated[str, "the name of its driver"],
        "kind": Annotated[Literal["storage", "format", "filter"], "what it is"],
        "size": Annotated[int, "the length of its disk in bytes"],
        "read-only": Annotated[bool, "whether it refuses writes"],
        "filename": NotRequired[Annotated[str | None, "storage only: its name; null if it has none"]],
        "allocated": NotRequired[Annotated[int | None, "storage only: the bytes that take up space; null if unknown"]],
        "options": Annotated[dict[str, str], "the options that differ from their defaults, without secrets"],
        "children": Annotated["list[EdgeJson]", "the edges to the nodes below it"],
    },
)
NodeJson.__doc__ = """A node of an opened graph, with all nodes below it."""


class NotOpenedJson(TypedDict):
    """Why a file that an image names was not opened."""

    type: Annotated[str, "the class of the exception in Python"]
    message: Annotated[str, "what went wrong"]
    hint: Annotated[str | None, "what to do now; null if nothing is known"]


UnopenedNodeJson = TypedDict(
    "UnopenedNodeJson",
    {
        "name": Annotated[None, "always null"],
        "driver": Annotated[str | None, "the format that the image states; null if it states none"],
        "filename": Annotated[str, "the name in the image"],
        "not-opened": Annotated[NotOpenedJson, "why"],
    },
)
UnopenedNodeJson.__doc__ = """A file that an image names, and that `lamina graph` could not open."""


class EdgeJson(TypedDict):
    """An edge from a node to one below it."""

    role: Annotated[str, "what the lower node is to the upper one: file, backing, image, ..."]
    writes: Annotated[bool, "whether requests through the edge may change the lower node"]
    node: Annotated[NodeJson | SharedNodeJson | UnopenedNodeJson, "the lower node"]


class BeforeAfterJson(TypedDict):
    """A number of bytes before and after."""

    before: Annotated[int | None, "before the command"]
    after: Annotated[int | None, "after it"]


CompactResultJson = TypedDict(
    "CompactResultJson",
    {
        "filename": Annotated[str, "the image"],
        "given-back": Annotated[int, "the bytes that its files take up less, or by which they are shorter"],
        "freed-leaks": Annotated[int, "the number of leaked clusters that were freed"],
        "freed-zeros": Annotated[int, "the bytes of the disk that were zeros, and whose storage was freed"],
        "length": Annotated[BeforeAfterJson, "the length of its files"],
        "allocated": Annotated[BeforeAfterJson, "the bytes that they take up; null if unknown"],
    },
)
CompactResultJson.__doc__ = """What `lamina compact` gave back."""


class DetectionJson(TypedDict):
    """The formats whose signature a file has."""

    filename: NotRequired[Annotated[str, "the name of the file"]]
    format: NotRequired[Annotated[str, "the only match, or raw if there is none; absent if several formats match"]]
    matches: Annotated[list[str], "the formats whose signature was found"]
    contents: Annotated[list[str], "what a raw disk contains: iso9660"]


class LatencyJson(TypedDict):
    """How long single requests took, in nanoseconds."""

    minimum: Annotated[int, "the shortest"]
    mean: Annotated[int, "the mean"]
    maximum: Annotated[int, "the longest"]
    percentiles: Annotated[dict[str, int], "the time within which so many percent of the requests ended"]


BenchResultJson = TypedDict(
    "BenchResultJson",
    {
        "filename": Annotated[str, "the image"],
        "operation": Annotated[Literal["read", "write"], "what the requests were"],
        "count": Annotated[int, "the number of requests"],
        "depth": Annotated[int, "how many were in flight at once"],
        "buffer-size": Annotated[int, "the bytes of each"],
        "offset": Annotated[int, "where the first one was"],
        "step-size": Annotated[int, "the bytes from one to the next"],
        "flushes": Annotated[int, "the number of flushes"],
        "seconds": Annotated[float, "the time of all, with the flushes"],
        "requests-per-second": Annotated[float, "the rate of requests"],
        "bytes-per-second": Annotated[int, "the rate of bytes"],
        "latency-ns": Annotated[LatencyJson, "how long single requests took"],
    },
)
BenchResultJson.__doc__ = """The result of `lamina bench`."""


class OptionJson(TypedDict):
    """An option of a driver."""

    name: Annotated[str, "its name"]
    type: Annotated[str, "what it takes: str, int, size, bool, enum, node, list, ..."]
    doc: Annotated[str, "what it does"]
    required: Annotated[bool, "whether it must be given"]
    default: NotRequired[Annotated[Any, "its value if it is not given"]]
    minimum: NotRequired[Annotated[int, "the least number that it takes"]]
    maximum: NotRequired[Annotated[int, "the greatest number that it takes"]]
    choices: NotRequired[Annotated[list[str | int], "the words that it takes"]]
    aliases: NotRequired[Annotated[list[str], "its other names"]]
    items: NotRequired[
        Annotated[OptionJson | list[OptionJson], "what each member of a list is, or the options of a group"]
    ]


DriverJson = TypedDict(
    "DriverJson",
    {
        "name": Annotated[str, "its name"],
        "kind": Annotated[Literal["storage", "format", "filter"], "what it is"],
        "summary": Annotated[str, "what it is, in a few words"],
        "aliases": Annotated[list[str], "its other names"],
        "options": NotRequired[Annotated[list[OptionJson], "the options with which it opens"]],
        "create-options": NotRequired[Annotated[list[OptionJson], "the options of a new image"]],
        "amend-options": NotRequired[Annotated[list[OptionJson], "the options that can be changed later"]],
        "common-options": NotRequired[Annotated[list[OptionJson], "the options of every node"]],
    },
)
DriverJson.__doc__ = """A driver. The lists of options are printed for one driver alone."""


class FailureJson(TypedDict):
    """An error."""

    type: Annotated[str, "the class of the exception in Python"]
    message: Annotated[str, "what went wrong"]
    errno: NotRequired[Annotated[str, "the name of the error number, such as ENOENT"]]
    path: NotRequired[Annotated[str, "the file or the URI that it concerns"]]
    node: NotRequired[Annotated[str, "the node that it concerns"]]
    operation: NotRequired[Annotated[str, "what was being done: read, write, ..."]]
    offset: NotRequired[Annotated[int, "where it was, in bytes"]]
    length: NotRequired[Annotated[int, "how many bytes it concerned"]]
    hint: NotRequired[Annotated[str, "what to do now"]]


class ErrorJson(TypedDict):
    """What a command prints on standard error where its output is JSON and it fails."""

    error: Annotated[FailureJson, "the error that ended the command"]
