"""The sources of a conversion: one image, or several whose disks are joined, one after the other."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack

from ..image import Image
from ..request import Child
from .source_snapshot import open_source


def open_sources(names: Sequence[str], args: Namespace) -> Image:
    """Open the images `names`, as one disk if there are several (the filter `concat`)."""
    if len(names) == 1:
        return open_source(names[0], args)
    from ..filters.concat import Concat

    with ExitStack() as opened:
        disks: list[Child] = []
        for number, name in enumerate(names):
            with open_source(name, args) as image:
                disks.append(Child(image.node, f"children.{number}", read_only=True))
                opened.callback(disks[-1].close)
        image = Image(Concat(disks, read_only=True), budget=args.limits)
        opened.pop_all()  # the filter closes them
    return image
