"""`lamina.inspect`: the verdict on an untrusted file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Final

from .. import detection
from ..errors import FormatError, LimitExceeded, OptionError, printable
from ..limits import DEFAULT_BUDGET, Budget
from ..options import shown
from ..parameters import checked
from . import raw
from .content import Content
from .result import Findings, Verdict

#: The largest number that a descriptor can have in the interface of the system.
_MOST: Final = (1 << 31) - 1
#: The source that stands for standard input.
STANDARD_INPUT: Final = "-"
#: Other names of formats that users of other inspectors declare.
_ALIASES: Final = {"iso": "raw", "gpt": "raw", "img": "raw", "ami": "raw", "aki": "raw", "ari": "raw"}

#: The modules with the judges of formats.
_JUDGES: Final = {
    "luks": "luks",
    "qcow2": "qcow2",
    "vdi": "vdi",
    "vhdx": "vhdx",
    "vmdk": "vmdk",
    "vpc": "virtual_pc",
}


@checked
def inspect(
    source: str | os.PathLike[str] | int,
    *,
    format: str | None = None,
    budget: Budget = DEFAULT_BUDGET,
    max_size: int | None = None,
) -> Verdict:
    """Whether the file at the path `source` may be handed on to programs that open images, without a look at any other file.
    A descriptor stands for what it leads to, which may be a pipe: it is read to its end, and stays open. An open image is
    refused: the verdict is about a file that nobody has opened as an image yet.

    The file is safe if it has the signature of one format, or of none (a raw disk); if all of its data is in itself; if it
    needs no feature that is unknown here; and if no number in its headers exceeds a limit. `format`: the format that
    somebody declared, which must be the one that is found. `budget`: its member `memory` bounds the tables that a program
    would load. `max_size`: the largest size of the disk in bytes.

    No name inside the file is opened or looked up, and the memory is bounded by 5 MiB, whatever the file says. The tables
    behind the headers are not looked at: `lamina.check` does that. Another program that changes the file meanwhile, or
    later, changes what the verdict is about. Thread-safe.

    Raises OptionError for a format that is not known and for a folder or device, NotFound, BlockIOError.
    """
    if format is not None:
        format = _declared(format)
    if isinstance(source, int):
        if not 0 <= source <= _MOST:
            raise OptionError(f"no file has the descriptor {shown(source)}", hint="give a path, or one that is open")
        return _verdict(Content.of(f"descriptor {source}", source, _wanted), format, budget, max_size)
    with Content.open(os.fspath(source), _wanted) as content:
        return _verdict(content, format, budget, max_size)


def _declared(format: str) -> str:
    name = _ALIASES.get(format, detection.canonical(format))
    if name not in detection.FORMATS and name != "raw":
        raise OptionError(
            f'there is no format "{printable(format[:64])}"', hint=f"known: raw, {', '.join(detection.FORMATS)}"
        )
    return name


def _wanted(head: memoryview) -> Iterator[tuple[int, int]]:
    """The parts of a pipe that the judge of the format needs, by the first bytes."""
    format = {b"QFI\xfb": "qcow2", b"vhdx": "vhdx"}.get(bytes(head[:4]))
    return iter(_judge(format).wanted(head) if format else ())


def _judge(format: str) -> Any:
    """The module with the judge of this format. Only that of the examined file is imported."""
    return import_module(f".{_JUDGES[format]}", __package__)


def _verdict(content: Content, declared: str | None, budget: Budget, max_size: int | None) -> Verdict:
    found = Findings()
    head = content.read(0, detection.HEAD_BYTES)
    tail = content.read(max(content.size - detection.TAIL_BYTES, 0), detection.TAIL_BYTES)
    formats = list(detection.detect(head, tail, content.size).matches)
    if not formats and raw.is_text_descriptor(head):
        formats = ["vmdk"]
    on_disk = raw.contents(head)
    format = formats[0] if formats else "raw"
    # The disk of a fixed VHD begins with the file; only a footer follows it.
    begins_with_disk = format == "raw" or (formats == ["vpc"] and not head.startswith(b"conectix"))
    if len(formats) > 1 or len(on_disk) > 1 or (on_disk and not begins_with_disk):
        found.refuse(f"it can be taken for several things: {', '.join([*formats, *on_disk])}")
    raw.judge(head, found)
    del head
    if format == "raw":
        found.virtual_size = content.size
    for name in formats:
        _apply(name, content, found, budget)
    found.features += [f"contains {one}" for one in on_disk if begins_with_disk]
    if declared is not None and [declared] != (formats or ["raw"]):
        found.refuse(f"it was declared as {declared}, and is {' and '.join(formats) or 'raw'}")
    if max_size is not None and found.virtual_size is not None and found.virtual_size > max_size:
        found.exceed(f"its disk has {found.virtual_size} bytes, above the limit of {max_size}")
    return found.result(format, tuple(sorted([*formats, *on_disk])))


def _apply(format: str, content: Content, found: Findings, budget: Budget) -> None:
    if format not in _JUDGES:
        found.refuse(f"images of the format {format} are never safe here")
        return
    try:
        _judge(format).judge(content, found, budget)
    except LimitExceeded as error:
        found.exceed(error.message)
    except FormatError as error:
        found.refuse(error.message)
