"""The option -l: an internal snapshot of an image, opened for reading in place of its disk."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from ..operations import sources
from ..policy import Policy
from .arguments import image_source, open_image

if TYPE_CHECKING:
    from ..image import Image


def open_source(name: str, args: Namespace) -> Image:
    """As `open_image`; where the option -l names a snapshot, with its disk (see `snapshot_options`)."""
    if args.source_snapshot is None:
        return open_image(name, args, args.format)
    from ..api import open

    options, references = snapshot_options(name, args, args.format, args.source_snapshot)
    return open(options, references=references, budget=args.limits, force_share=args.force_share)


def snapshot_options(
    name: str, args: Namespace, format: str | None, wanted: str
) -> tuple[dict[str, Any], Policy | None]:
    """The options that open a snapshot of the image `name`, and the policy for its references. `wanted` is the id of the
    snapshot or its name, or `snapshot.id=ID,snapshot.name=NAME`."""
    with open_image(name, args, format) as image:
        source = image_source(name, args, format)
        return sources.snapshot_options(image, source, format, wanted, args.references)
