"""The dirty bitmaps of a converted image: the new image gets those of the source.

They are added, without recording, before any byte is copied, so that a target that cannot have them is refused at once; what
the source has recorded follows at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Literal

from ..errors import Hint, LaminaError, OptionError, UnsupportedFeature, printable
from ..format import Format
from ..node import FilterNode, Node

if TYPE_CHECKING:
    from ..image import Image


#: Which bitmaps are copied: none, all, or those that are not inconsistent.
Chosen = Literal["", "all", "usable"]


@contextmanager
def copied(source: Image, target: Image, chosen: Chosen) -> Iterator[None]:
    """While the block runs, the disk of `source` is copied to `target`, which has its chosen bitmaps afterwards, with the
    same names, granularities and states. If the block fails, `target` has none of them.

    UnsupportedFeature where one of the formats has no bitmaps; OptionError for a name that the target has already, and for
    an inconsistent bitmap if all are chosen."""
    if not chosen:
        yield
        return
    names = _names(source, chosen)
    new, alone = _with_bitmaps(target, "target"), partial(target.root.alone, "copies bitmaps")
    added: list[str] = []
    try:
        for name in names:
            alone(partial(new.add_bitmap, enabled=False), name, source.bitmaps[name].granularity)
            added.append(name)
        yield
        for name in added:
            bitmap = source.bitmaps[name]
            alone(new.merge_bitmaps, name, [bitmap])
            if bitmap.enabled:
                alone(new.enable_bitmap, name, True)
    except BaseException:
        for name in added:
            with suppress(LaminaError):
                alone(new.remove_bitmap, name)
        raise


def require_bitmaps(source: Image, kind: type[Format], chosen: Chosen) -> None:
    """Raise the errors of `copied` that are known before a target of the format `kind` exists."""
    if not chosen:
        return
    _names(source, chosen)
    if not kind.keeps_bitmaps:
        raise UnsupportedFeature(
            f"images of the format {kind.driver} have no bitmaps",
            hint=Hint("choose qcow2", command="choose qcow2 (-O qcow2)"),
        )


def _names(source: Image, chosen: Chosen) -> list[str]:
    """The names of the chosen bitmaps."""
    broken = _with_bitmaps(source, "source").inconsistent_bitmaps
    if broken and chosen == "all":
        raise OptionError(
            f"the bitmap {printable(broken[0])} is inconsistent, and cannot be copied",
            path=source.filename,
            hint=Hint(
                'remove it, or skip such bitmaps: bitmaps="usable"',
                command="remove it, or skip such bitmaps (--skip-broken-bitmaps)",
            ),
        )
    return list(source.bitmaps)


def _with_bitmaps(image: Image, what: str) -> Format:
    """The format whose bitmaps the image shows."""
    node: Node = image.node
    while isinstance(node, FilterNode):
        node = node.image.node
    if not isinstance(node, Format) or not node.keeps_bitmaps:
        raise UnsupportedFeature(f"the {what} has no bitmaps: {node.driver} does not support them", path=image.filename)
    return node
