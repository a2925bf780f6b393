"""Descriptions and checks of images: `info`, `info_chain`, `check`, `explain`, `structures` and `explain_guest`, the public
functions behind the commands.

Each opens only the file of the image itself, `info_chain` and `explain_guest` excepted, and changes no byte. Of an image that
is open, they look at the files that are open, while no request runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from . import detection, registry
from .descriptors import opening
from .errors import FormatError, Hint, OptionError, UnsupportedFeature, printable
from .explanation import Step
from .format import Format, Repair, lookup_format
from .graph import COMMON, Opener, Spec, named, open_graph, probe, usual
from .limits import DEFAULT_BUDGET, Budget
from .node import Node, StorageNode
from .options import parse_name
from .parameters import checked
from .policy import Policy
from .references import Reference, Trail, believed_name, file_of, not_in_a_file, open_file
from .request import Child
from .results import ImageInfo

if TYPE_CHECKING:
    from .check_result import CheckResult
    from .explanation import Explanation, Overview
    from .image import Image

#: What a caller wants of the file of an image while it is open: by the driver, the edge to the file and the options.
_Look = Callable[[type[Format], Child, Mapping[str, Any]], Any]
#: An image: a path, a name with a prefix or nested options, as for `lamina.open`, or an image that is open.
Source: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Image"
_Result = TypeVar("_Result")


@checked
def info(
    source: Source, *, format: str = "probe", budget: Budget = DEFAULT_BUDGET, force_share: bool = False
) -> ImageInfo:
    """Describe the image from its header. Only its own file is opened, so `info` works for images that `open` refuses.
    `source` is a path, a name or nested options as for `lamina.open`; or an open image, which stays open. What was written to
    it is flushed first, requests of other threads wait meanwhile, and the other arguments are omitted.

    `format`: the default "probe" detects the format by its magic. The result is a guess (`ImageInfo.format_probed`): a guest
    can write any magic into its raw disk. `budget` bounds the images below a filter. `force_share`: take no file locks, and
    ignore those of other programs.

    Raises OptionError, NotFound, BlockIOError, Locked, LimitExceeded, and FormatError if the file has no header of that
    format.
    """
    return _describe(source, format, budget, force_share, lambda where: _info(where)[0])


@checked
def info_chain(
    source: Source,
    *,
    format: str = "probe",
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
) -> tuple[ImageInfo, ...]:
    """Describe the image and each image below it, from top to bottom. `source` as for `info`. `references` decides which
    files may be opened; the default is that of `lamina.open`. Below an open image are the images that are open. Raises the
    errors of `info`, PolicyError, LimitExceeded if the chain is longer than `budget.chain_depth`, CorruptImage if it contains
    itself, and FormatError if an image does not state the format below."""
    return _describe(
        source, format, budget, force_share, lambda where: tuple(map(itemgetter(0), _chain(where, references)))
    )


@checked
def check(
    source: Source,
    *,
    format: str = "probe",
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
    repair: Repair | None = None,
) -> CheckResult:
    """Compare the structures of an image with one another without a change. The result contains all findings, however damaged
    the image is. Only its own file is opened. `source`, `format` and `force_share` as for `info`; while another program
    writes to the image, the findings may mix several of its states.

    `repair`: "leaks" frees clusters that nothing refers to, and "all" mends contradictions as well; the result then has what
    is left, and how much was mended. No byte that can be read changes, and a power cut leaves the old image, or the repaired
    one. An open image must be writable for that.

    Raises UnsupportedFeature if the format has no check, or if the image has a feature that would make every finding wrong;
    and the errors of opening.
    """
    image = _open_image(source, format)
    if image is not None:
        if repair is not None:
            image.root.edge.require_writable("repair")
        return image.root.alone("checks the image", _check, image.node, repair, force_share)
    with opening(
        open_graph,
        named(source),  # type: ignore[arg-type]  # no open image
        format=format,
        budget=budget,
        force_share=force_share,
        no_references=True,
        read_only=repair is None,
        repair=repair is not None,
        # No file is opened by a name, and a disk without a known format has no check, and is not written.
        policy=Policy.unchecked() if format == "probe" else None,
    ) as node:
        return _check(node, repair, force_share)


def _check(node: Node, repair: Repair | None, force_share: bool) -> CheckResult:
    if not isinstance(node, Format):
        raise UnsupportedFeature(f"the driver {node.driver} has no check", path=node.filename)
    if repair is not None:
        before = node.repair(repair)
        after = node.check().result(node.filename, node.driver)
        return after._replace(
            corruptions_fixed=max(before.corruptions - after.corruptions, 0),
            leaks_fixed=max(before.leaks - after.leaks, 0),
        )
    writers = other_writers(node) if force_share else ()
    return node.check().result(node.filename, node.driver)._replace(other_writers=writers)


def _beside(storage: Child, force_share: bool) -> Iterator[str]:
    """What an explanation says of another program that writes to the file meanwhile."""
    for name in other_writers(storage.node) if force_share else ():
        yield f"another program has {printable(name)} open for writing: this may be a mixture of old and new bytes"


def _chain(where: _Where, references: Policy | None, look: _Look | None = None) -> Iterator[tuple[ImageInfo, Any]]:
    """The description of the image, and of each image below it, with the result of `look`. Raises as `info_chain`."""
    found, host, seen = _info(where, look)
    yield found, seen
    if where.node is not None:
        yield from _chain_below(where.node, where, look)
        return
    policy = references or (Policy.probed(found.format) if found.format_probed else Policy.default())
    budget, force_share = where.budget, where.force_share
    trail = Trail(budget.chain_depth)
    while found.backing_filename is not None:
        reference = Reference(found.backing_filename, "backing", "backing file", format=found.backing_format)
        if policy.trusting:
            trail = trail.below(None, found.filename)
            named_below = believed_name(reference, found.filename)
            below = _Where(named_below, reference.format, budget, force_share, None, found.full_backing_filename)
            found, host, seen = _info(below, look)
            yield found, seen
            continue
        if host is None or host.path is None:
            raise not_in_a_file(reference, found.filename, "run info for that file alone")
        if reference.format is None:
            raise FormatError(
                f"the format of the backing file {reference.name!r} is not stored in the image, and is never guessed",
                path=host.path,
                hint=Hint("describe that file alone", command="omit --backing-chain, or run info for that file alone"),
            )
        trail = trail.below(host.identity, host.path)
        fds: list[int] = []
        try:
            file = open_file(fds, reference, host, trail, policy)
            spec = {"driver": "file", "filename": file.path}
            below = _Where(spec, reference.format, budget, force_share, file.fd, found.full_backing_filename, True)
            found, host, seen = _info(below, look)
        finally:
            for fd in fds:
                os.close(fd)
        yield found, seen


def _chain_below(node: Node, where: _Where, look: _Look | None) -> Iterator[tuple[ImageInfo, Any]]:
    """The same of each image below `node`, which is open."""
    while (below := node.children.get("backing")) is not None:
        node = below.node
        found, _, seen = _info(_Where(None, None, where.budget, where.force_share, node=node), look)
        yield found, seen


@checked
def explain(
    source: Source,
    *offsets: int,
    format: str = "probe",
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
) -> tuple[Explanation, ...]:
    """What the bytes at these offsets of the image file are: header fields, entries of tables, guest data, free space; and
    which bytes of the guest they serve. Only its own file is opened. Damaged images are explained as far as they can be
    read. `source`, `format` and `force_share` as for `info`. Raises OptionError for an offset past the end of the file,
    UnsupportedFeature for formats that explain nothing, and the errors of `info` except those about a damaged header."""

    def look(kind: type[Format], storage: Child, values: Mapping[str, Any]) -> tuple[Explanation, ...]:
        explainer = kind.explain(storage, values)
        found = tuple(explainer.at(offset) for offset in offsets)
        return tuple(one._replace(problems=(*one.problems, *_beside(storage, force_share))) for one in found)

    found: tuple[Explanation, ...] = _describe(source, format, budget, force_share, lambda where: _info(where, look)[2])
    return found


@checked
def structures(
    source: Source, *, format: str = "probe", budget: Budget = DEFAULT_BUDGET, force_share: bool = False
) -> Overview:
    """The fields of the header of an image file, and the structures to which it leads. Raises the errors of `explain`."""

    def look(kind: type[Format], storage: Child, values: Mapping[str, Any]) -> Overview:
        seen = kind.explain(storage, values).overview()
        return seen._replace(problems=(*seen.problems, *_beside(storage, force_share)))

    found: Overview = _describe(source, format, budget, force_share, lambda where: _info(where, look)[2])
    return found


@checked
def explain_guest(
    source: Source,
    offset: int,
    *,
    format: str = "probe",
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
) -> tuple[Step, ...]:
    """Where the byte at `offset` of the disk is stored: a step for the image, and one for each image below it, up to the
    one that decides. If the last step is "unallocated", the byte reads as zero. `references` as for `info_chain`. Raises
    OptionError if the disk ends before it, and the errors of `info_chain` and `explain`."""

    def path_of_byte(where: _Where) -> tuple[Step, ...]:
        return _guest_path(where, references, offset)

    return _describe(source, format, budget, force_share, path_of_byte)


def _guest_path(where: _Where, references: Policy | None, offset: int) -> tuple[Step, ...]:
    steps: list[Step] = []

    def look(kind: type[Format], storage: Child, values: Mapping[str, Any]) -> Step:
        explainer = kind.explain(storage, values)
        if steps and offset >= explainer.disk_size:
            rest = steps[-1].length
            return Step(
                0, kind.driver, storage.node.filename, offset, rest, "past the end of the disk, which reads as zero"
            )
        found = explainer.guest(offset)
        return found._replace(problems=(*found.problems, *_beside(storage, where.force_share)))

    for found, step in _chain(where, references, look):
        file = found.filename if step.file == step.filename else step.file
        steps.append(step._replace(depth=len(steps), filename=found.filename, file=file))
        if not step.below:
            break
    return tuple(steps)


def other_writers(top: Node) -> tuple[str, ...]:
    """The files beneath `top` that another program has open for writing now, each once."""
    found = {top.filename: None} if top.has_other_writer else {}
    for child in top.children.values():
        found |= dict.fromkeys(other_writers(child.node))
    return tuple(found)


def _open_image(source: Source, format: str | None) -> Image | None:
    """`source` if it is an open image, which needs no `format`; None if it names one."""
    if isinstance(source, str | os.PathLike | Mapping):
        return None
    from .image import Image

    if not isinstance(source, Image):
        return None  # `named` says what it is not
    if format not in (None, "probe"):
        raise OptionError(
            "format is for an image that is not open yet",
            path=source.filename,
            hint="omit it, or give the name of the image",
        )
    source.root.require_open()
    return source


def _describe(
    source: Source, format: str | None, budget: Budget, force_share: bool, work: Callable[[_Where], _Result]
) -> _Result:
    """The result of `work` for `source`. Of an open image, no request runs meanwhile."""
    image = _open_image(source, format)
    if image is None:
        spec = named(source)  # type: ignore[arg-type]  # no open image
        return work(_Where(spec, None if format == "probe" else format, budget, force_share))

    def describe() -> _Result:
        if not image.read_only:
            image.root.edge.flush()  # what it keeps in memory is in no file yet
        return work(_Where(None, None, budget, force_share, node=image.node))

    return image.root.alone("describes the image", describe)


class _Where:
    """The image to describe: the name `source`, or `node`, if it is open. `fd`: the descriptor of its file, if it is open;
    `shown`: its name in messages; `from_image`: whether another image names its format."""

    __slots__ = ("budget", "fd", "force_share", "format", "from_image", "node", "shown", "source")

    def __init__(
        self,
        source: Spec | None,
        format: str | None,
        budget: Budget,
        force_share: bool,
        fd: int | None = None,
        shown: str | None = None,
        from_image: bool = False,
        node: Node | None = None,
    ) -> None:
        self.source = source
        self.format = format
        self.budget = budget
        self.force_share = force_share
        self.fd = fd
        self.shown = shown
        self.from_image = from_image
        self.node = node


def _info(where: _Where, look: _Look | None = None) -> tuple[ImageInfo, StorageNode | None, Any]:
    """The description of the image, its file, which is closed again unless it was open (None if it is not in a file), and the
    result of `look`."""
    if where.node is not None:
        return _info_of(where.node, where, look)
    assert where.source is not None
    options = dict(parse_name(where.source) if isinstance(where.source, str) else where.source)
    format = where.format
    driver = registry.entry(options["driver"]) if "driver" in options else None
    values: dict[str, Any] = {}
    file: Any = options
    if driver is not None and driver.kind == "format":
        if format is not None and registry.entry(format).name != driver.name:
            raise OptionError(
                f"the options name the driver {driver.name}, but the format is given as {format}",
                hint="give one of them",
            )
        format = driver.name
        if "file" not in options and "filename" in options:
            options["file"] = {"filename": options.pop("filename")}
        values = lookup_format(format).schema.parse({key: options[key] for key in options if key not in COMMON})
        file = values.pop("file")
    elif driver is not None and driver.kind != "storage":
        if look is not None:
            raise _no_bytes(driver)
        return *_seen_from_above(where), None
    elif driver is None and "file" in options:
        file = options.pop("file")
    opener = Opener(
        policy=Policy.none(), budget=where.budget, force_share=where.force_share, no_references=True, fd=where.fd
    )
    with opening(opener.child, "file", file, grows=True) as storage:
        probed = format or probe(storage).format
        found, seen = _seen(storage, probed, values, where, look)
        return found._replace(format_probed=format is None), file_of(storage), seen


def _info_of(node: Node, where: _Where, look: _Look | None) -> tuple[ImageInfo, StorageNode | None, Any]:
    """The same of an image that is open."""
    if isinstance(node, Format) and "file" in node.children:
        storage = node.children["file"]
        values = node.schema.parse({**node.given, "file": storage})
        del values["file"]
        found, seen = _seen(storage, node.driver, values, where, look)
        return found._replace(format_probed=node.probed), file_of(storage), seen
    if not isinstance(node, StorageNode):
        if look is not None:
            raise _no_bytes(registry.entry(node.driver))
        return _from_above(node), None, None
    storage = Child(node, "file", read_only=True)
    try:
        format = probe(storage).format
        found, seen = _seen(storage, format, {}, where, look)
        return found._replace(format_probed=True), file_of(storage), seen
    finally:
        storage.give_up()


def _seen(
    storage: Child, format: str, values: Mapping[str, Any], where: _Where, look: _Look | None
) -> tuple[ImageInfo, Any]:
    """The description of the file in `storage` as `format`, and the result of `look`."""
    seen = None if look is None else look(lookup_format(format, from_image=where.from_image), storage, values)
    try:
        return _described(storage, format, values, where), seen
    except FormatError:
        if look is None:
            raise
        return ImageInfo(storage.node.filename, format), seen  # `look` may say something of what is no image any more


def _no_bytes(driver: registry.Entry) -> UnsupportedFeature:
    return UnsupportedFeature(f"the {driver.kind} {driver.name} has no bytes of its own in a file")


def _described(storage: Child, format: str, values: Mapping[str, Any], where: _Where) -> ImageInfo:
    """The description of the file in `storage` as `format`. A format without a driver has a name only."""
    try:
        kind = lookup_format(format, from_image=where.from_image)
    except UnsupportedFeature as error:
        found = ImageInfo(format=detection.canonical(format), unsupported=(error.message,))
    else:
        filled = dict(values)
        kind.schema.fill(filled, values, usual)
        found = kind.inspect(storage, filled)._replace(format=kind.driver)
    name = where.shown or storage.node.filename
    below = found.backing_filename
    file = file_of(storage)
    return found._replace(
        filename=name,
        file_size=file.size if file is not None and file is storage.node else None,
        actual_size=_allocated(storage.node),
        # A name inside an image that is not in a file belongs to no known directory.
        full_backing_filename=_relative(name, below) if below is not None and file else below,
        other_writers=other_writers(storage.node) if where.force_share else (),
    )


def _seen_from_above(where: _Where) -> tuple[ImageInfo, StorageNode | None]:
    """The description of a filter over an image: its driver and size."""
    assert where.source is not None
    with opening(
        open_graph,
        where.source,
        format=where.format or "probe",
        budget=where.budget,
        force_share=where.force_share,
        no_references=True,
    ) as node:
        return _from_above(node), None


def _from_above(node: Node) -> ImageInfo:
    return ImageInfo(node.filename, node.driver, virtual_size=node.size, dirty=False, actual_size=_allocated(node))


def _allocated(node: Node) -> int | None:
    """The allocated bytes of the file beneath, if there is one."""
    while node.children:
        node = next(iter(node.children.values())).node
    return node.allocated


def _relative(image: str, name: str) -> str:
    """`name` as a path relative to the current directory: an image names it relative to its own."""
    prefix, colon, _ = name.partition(":")
    if colon and "/" not in prefix:
        return name
    return os.path.join(os.path.dirname(image), name)
