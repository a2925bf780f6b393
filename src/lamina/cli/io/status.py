"""The commands for the whole image: flush, truncate, length, info, map, alloc."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ... import registry
from ...errors import LaminaError, OptionError, UnsupportedFeature
from ...format import Format
from ...limits import align_up
from ...node import Node, require_writable
from ...results import ImageInfo
from . import grammar
from .output import human_size
from .session import Session

if TYPE_CHECKING:
    from ...image import Image

Flags = dict[str, list[str]]

PREALLOCATION = ("off", "metadata", "falloc", "full")


def flush(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    image = session.image
    if session.opened_as.caching.unsafe:
        return True
    try:
        image.flush()
    except LaminaError as error:
        session.output.failure("flush", error)
        return False
    return True


def truncate(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    image = session.image
    mode = flags.get("m", ["off"])[-1]
    if mode not in PREALLOCATION:
        raise OptionError(f"there is no preallocation mode {mode!r}", hint="use " + ", ".join(PREALLOCATION))
    if mode != "off":
        raise UnsupportedFeature(f"preallocation {mode} by truncate is not there yet", hint="omit -m")
    size = grammar.size(operands[0])
    require_writable(image.node, "truncate")
    session.drain()
    image.truncate(size)
    return True


def length(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    session.output.say(human_size(session.image.size))
    return True


def info(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    node = session.image.node
    if session.opened_as.copy_on_read:
        node = node.children["image"].node  # the option inserted a filter above the image
    lines = [f"format name: {node.driver}"]
    kind = registry.entry(node.driver).kind
    if kind != "format":
        # qemu-io prints the name of a driver that is also a protocol twice, and scripts expect that.
        lines *= 2
    base = node
    while registry.entry(base.driver).kind == "filter":
        base = base.children["image"].node
    described = _described(base)
    cluster = described.cluster_size or 0
    specific = (described.format_specific or {}).get("data", {})
    lines.append(f"cluster size: {human_size(cluster)}")
    lines.append(f"vm state offset: {human_size(_state_offset(base.size, cluster, specific))}")
    if base is node and specific:
        lines.append("Format specific information:")
        lines += _properties(specific, 1)
    session.output.say(*lines)
    return True


def map_allocation(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    image = session.image
    for start, count, allocated in _runs(image, 0, image.size):
        word = "    allocated" if allocated else "not allocated"
        session.output.say(
            f"{human_size(count)} (0x{count:x}) bytes {word} at offset {human_size(start)} (0x{start:x})"
        )
    return True


def alloc(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    image = session.image
    offset = grammar.size(operands[0])
    asked = grammar.size(operands[1]) if len(operands) > 1 else 512
    count = max(min(asked, image.size - offset), 0)
    found = sum(run for _, run, allocated in _runs(image, offset, count) if allocated)
    session.output.say(f"{found}/{count} bytes allocated at offset {human_size(offset)}")
    return True


def _runs(image: Image, offset: int, count: int) -> Iterator[tuple[int, int, bool]]:
    """Alternating rows (start, length, allocated). Allocated bytes are those that the top layer owns, including zeros."""
    from ...jobs.windows import windows

    end = offset + count
    start, state = offset, None
    for piece in windows(image, offset, end):
        for extent in piece:
            mine = extent.present and extent.depth == 0
            if state is None:
                state = mine
            elif mine != state:
                yield start, extent.start - start, state
                start, state = extent.start, mine
    if state is not None:
        yield start, end - start, state


def _described(node: Node) -> ImageInfo:
    return node.inspect(node.children["file"], {}) if isinstance(node, Format) else ImageInfo()


def _state_offset(size: int, cluster: int, specific: dict[str, Any]) -> int:
    """The offset of the saved state of a virtual machine: past the disk, at the start of the next L2 table."""
    entry = 16 if specific.get("extended-l2") else 8
    return align_up(size, cluster * cluster // entry) if cluster else 0


def _properties(values: dict[str, Any], depth: int) -> Iterator[str]:
    for key, value in values.items():
        name = f"{'    ' * depth}{key.replace('-', ' ')}:"
        if isinstance(value, dict):
            yield name
            yield from _properties(value, depth + 1)
        else:
            yield f"{name} {str(value).lower() if isinstance(value, bool) else value}"
