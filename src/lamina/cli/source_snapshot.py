"""The option -l: an internal snapshot of an image, opened for reading in place of its disk."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import registry
from ..errors import OptionError
from ..options import parse_keyval, parse_name, shown
from ..policy import Policy
from .arguments import image_source, open_image

if TYPE_CHECKING:
    from ..image import Image
    from ..results import Snapshot


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
        driver = image.node.driver
        id = find(image.snapshots(), wanted, image.filename).id
    source = image_source(name, args, format)
    options: dict[str, Any] = dict(parse_name(source) if isinstance(source, str) else source)
    described = not isinstance(source, str) or source.startswith("json:")  # else the name is the location of the bytes
    given = options.get("driver") if described or format is not None else None
    if described and given is None:
        options["driver"] = driver
    elif given is None or registry.entry(given).name != driver:
        options = {"driver": driver, "file": options}
    references = args.references
    if references is None and format is None and given is None:
        references = Policy.probed(driver)  # the format was only detected
    return {**options, "snapshot-id": id}, references


def find(snapshots: Sequence[Snapshot], wanted: str, path: str, *, certain: bool = False) -> Snapshot:
    """The snapshot that `wanted` names. `certain`: a word that is the id of one snapshot and the name of another names none
    (else the one with that id)."""
    if wanted.startswith(("snapshot.id=", "snapshot.name=")):
        given = parse_keyval(wanted).get("snapshot", {})
        if not isinstance(given, dict) or not given.keys() <= {"id", "name"}:
            raise OptionError(
                f"{shown(wanted)} names no snapshot", hint="write snapshot.id=ID,snapshot.name=NAME, or one"
            )
        found = [
            one for one in snapshots if {"id": one.id, "name": one.name, **given} == {"id": one.id, "name": one.name}
        ]
    else:
        found = [one for one in snapshots if wanted in ((one.id, one.name) if certain else (one.id,))]
        found = found or [one for one in snapshots if one.name == wanted]
    if len(found) != 1:
        number = f"{len(found)} snapshots" if found else "no snapshot"
        hint = "give snapshot.id=ID" if found else "lamina snapshot lists them"
        raise OptionError(f"the image has {number} {shown(wanted)}", path=path, hint=hint)
    return found[0]
