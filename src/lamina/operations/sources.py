"""What the functions take as images: names and options, which they open and close, or open images, which stay open."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import registry
from ..api import open as open_image
from ..descriptors import opening
from ..errors import Hint, Locked, OptionError
from ..graph import Spec, named
from ..image import Image
from ..limits import DEFAULT_BUDGET, Budget
from ..options import parse_keyval, parse_name, shown
from ..own_files import refuse_own
from ..policy import Policy

if TYPE_CHECKING:
    from ..results import Snapshot

#: An image: a path, a name with a prefix or nested options, as for `lamina.open`, or an image that is open.
Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | Image


@contextmanager
def opened(
    source: Source,
    format: str | None,
    *,
    read_only: bool = True,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
    snapshot: str | None = None,
) -> Iterator[Image]:
    """The image `source`, as a context manager that closes what it opened: an image that was open stays open. `format` and
    the other options as for `lamina.open`; `snapshot`: an internal snapshot, by its id or name, in place of the disk."""
    if isinstance(source, Image):
        for word, given in (("format", format), ("source_snapshot", snapshot)):
            if given is not None:
                hint = "omit it, or give the name of the image"
                raise OptionError(f"{word} is for an image that is not open yet", path=source.filename, hint=hint)
        source.root.require_open()
        yield source
        return
    how: dict[str, Any] = {"references": references, "budget": budget, "force_share": force_share}
    if snapshot is None:
        how |= {"format": format, "read_only": read_only}
    else:
        spec = named(source)
        with opening(open_image, spec, format=format, **how) as image:
            source, how["references"] = snapshot_options(image, spec, format, snapshot, references)
    with opening(open_image, source, **how) as image:
        yield image


def open_target(
    spec: Spec, format: str | None, source: Image, *, references: Policy | None, budget: Budget = DEFAULT_BUDGET
) -> Image:
    """An existing image, for a job that overwrites it with `source`. OptionError if the source is in the same file."""
    try:
        return open_image(spec, format=format, read_only=False, references=references, budget=budget)
    except Locked as error:
        if error.path is not None:
            refuse_own(source.node, error.path)  # this process itself holds the lock
        raise


def snapshot_options(
    image: Image, source: Spec, format: str | None, wanted: str, references: Policy | None
) -> tuple[dict[str, Any], Policy | None]:
    """The options that open a snapshot of `image`, which was opened as `source` with `format` (None and "probe": its options
    tell, or it was detected), and the policy for its references. `wanted` as for `find_snapshot`."""
    format = None if format == "probe" else format
    driver = image.node.driver
    id = find_snapshot(image.snapshots(), wanted, image.filename).id
    options: dict[str, Any] = dict(parse_name(source) if isinstance(source, str) else source)
    described = not isinstance(source, str) or source.startswith("json:")  # else the name is the location of the bytes
    given = options.get("driver") if described or format is not None else None
    if described and given is None:
        options["driver"] = driver
    elif given is None or registry.entry(given).name != driver:
        options = {"driver": driver, "file": options}
    if references is None and format is None and given is None:
        references = Policy.probed(driver)  # the format was only detected
    return {**options, "snapshot-id": id}, references


def find_snapshot(snapshots: Sequence[Snapshot], wanted: str, path: str, *, certain: bool = False) -> Snapshot:
    """The snapshot that `wanted` names: its id or its name, or `snapshot.id=ID,snapshot.name=NAME`. `certain`: a word that is
    the id of one snapshot and the name of another names none (else the one with that id)."""
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
        listed = Hint("image.snapshots() lists them", command="lamina snapshot lists them")
        hint = "give snapshot.id=ID" if found else listed
        raise OptionError(f"the image has {number} {shown(wanted)}", path=path, hint=hint)
    return found[0]
