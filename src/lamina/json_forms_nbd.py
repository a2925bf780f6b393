"""As `json_forms`, for what commands print about NBD servers and their exports."""

from __future__ import annotations

from typing import Annotated, NotRequired, TypedDict


class StatusJson(TypedDict):
    """What one metadata context says of a range."""

    type: Annotated[int, "the number that the server told"]
    description: Annotated[str | None, "its meaning in words; null for a context that Lamina does not know"]


class ContextRangeJson(TypedDict):
    """A range of an export. With one context it has `type` and `description`, with several `contexts`."""

    offset: Annotated[int, "its first byte"]
    length: Annotated[int, "its bytes"]
    type: NotRequired[Annotated[int, "the number that the server told"]]
    description: NotRequired[
        Annotated[str | None, "its meaning in words; null for a context that Lamina does not know"]
    ]
    contexts: NotRequired[Annotated[dict[str, StatusJson], "by the name of the context"]]


class ContextTotalJson(TypedDict):
    """The bytes of an export with one status. With one context it has `type` and `description`, with several `contexts`."""

    size: Annotated[int, "how many bytes have the status"]
    percent: Annotated[float, "the same in percent of the range"]
    type: NotRequired[Annotated[int, "the number that the server told"]]
    description: NotRequired[
        Annotated[str | None, "its meaning in words; null for a context that Lamina does not know"]
    ]
    contexts: NotRequired[Annotated[dict[str, StatusJson], "by the name of the context"]]


ExportJson = TypedDict(
    "ExportJson",
    {
        "export-name": Annotated[str, "its name"],
        "description": NotRequired[Annotated[str, "what the server says about it"]],
        "content": NotRequired[Annotated[str, "the format that the magic at its ends says"]],
        "uri": NotRequired[Annotated[str, "its address, if the name alone cannot be asked for"]],
        "contexts": NotRequired[Annotated[list[str], "the metadata contexts that the server names"]],
        "is_rotational": NotRequired[Annotated[bool, "whether it is on a rotating disk"]],
        "is_read_only": NotRequired[Annotated[bool, "whether it refuses writes"]],
        "can_block_status_payload": NotRequired[Annotated[bool, "whether block status may be asked for some contexts"]],
        "can_cache": NotRequired[Annotated[bool, "whether it takes cache requests"]],
        "can_df": NotRequired[Annotated[bool, "whether it reads in one part if asked to"]],
        "can_fast_zero": NotRequired[Annotated[bool, "whether it takes zero requests that fail rather than be slow"]],
        "can_flush": NotRequired[Annotated[bool, "whether it takes flushes"]],
        "can_fua": NotRequired[Annotated[bool, "whether it takes writes that are to be on stable storage"]],
        "can_multi_conn": NotRequired[Annotated[bool, "whether several connections see the same bytes"]],
        "can_trim": NotRequired[Annotated[bool, "whether it takes discards"]],
        "can_zero": NotRequired[Annotated[bool, "whether it takes zero requests"]],
        "block_size_minimum": NotRequired[Annotated[int, "the unit of requests in bytes"]],
        "block_size_preferred": NotRequired[Annotated[int, "the unit of fast requests in bytes"]],
        "block_size_maximum": NotRequired[Annotated[int, "the longest request in bytes"]],
        "export-size": NotRequired[Annotated[int, "its length in bytes"]],
        "export-size-str": NotRequired[Annotated[str, "the same for people: 64M"]],
        "error": NotRequired[Annotated[str, "why the server did not describe the export"]],
    },
)
ExportJson.__doc__ = (
    """An export of an NBD server, by the names of nbdinfo. What the server did not tell is left out."""
)


class ExportsJson(TypedDict):
    """Exports of an NBD server, by the names of nbdinfo. What the server did not tell is left out."""

    protocol: NotRequired[Annotated[str, "how both agreed on options: oldstyle, newstyle, newstyle-fixed"]]
    TLS: NotRequired[Annotated[bool, "whether the connection is encrypted"]]
    structured: NotRequired[Annotated[bool, "whether its replies may have several parts"]]
    extended: NotRequired[Annotated[bool, "whether requests may be longer than 32 bits"]]
    exports: Annotated[list[ExportJson], "one export, or all of the server"]


ServedJson = TypedDict(
    "ServedJson",
    {
        "name": Annotated[str, "its name"],
        "size": Annotated[int, "its length in bytes"],
        "read-only": Annotated[bool, "whether it refuses writes"],
        "description": Annotated[str, "its description for clients"],
    },
)
ServedJson.__doc__ = """An export that this server offers."""


class ServingJson(TypedDict):
    """The line that `lamina serve` prints when clients can connect."""

    uri: Annotated[str | None, "the first of uris; null if a descriptor was inherited"]
    uris: Annotated[list[str], "the addresses"]
    pid: Annotated[int, "the process that serves"]
    exports: Annotated[list[ServedJson], "what clients can connect to"]
    folder: NotRequired[Annotated[str, "the folder whose files are exports"]]
