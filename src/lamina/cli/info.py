"""`lamina info`: what an image is. Nothing is opened but the file itself, unless --backing-chain asks for more."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from .. import detect, registry
from ..errors import FormatError, OptionError, PolicyError, UnsupportedFeature, printable
from ..format import lookup_format
from ..graph import COMMON, Opener, Spec, open_graph, probe
from ..node import Node
from ..options import format_size, parse_name
from ..policy import Policy, Trail
from ..request import Child
from .arguments import Parser, image_source, tell_of_writers
from .nbd_names import names_export

_EXAMPLES = """
  lamina info disk.qcow2
  lamina info --output=json -f qcow2 disk.qcow2
  lamina info --backing-chain overlay.qcow2
  lamina info -U disk.qcow2                      while a virtual machine runs on it
  lamina info nbd://server/disk                  what an NBD server says of an export
  lamina info --list nbd://server                and of all that it has
  lamina info -f qcow2 nbd://server/disk         the image inside that export
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        "info", "Show what an image is. Opens nothing but the file, whatever the image refers to.", _EXAMPLES
    )
    parser.add_format("-f", "--format", dest="format", help="format of the image (default: found by its magic)")
    parser.add_output()
    parser.add_argument(
        "-b", "--backing-chain", action="store_true", help="also show what it is stacked on, as --references grants"
    )
    parser.add_argument("-L", "--list", action="store_true", help="show all exports of the NBD server that FILE names")
    parser.add_argument(
        "--content",
        action="store_const",
        const=True,
        help="read the ends of NBD exports to tell what they hold (default: of one export, not of a list)",
    )
    parser.add_argument("--no-content", dest="content", action="store_const", const=False, help="do not")
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the image, or with no format given an NBD export")
    args = parser.parse(argv)
    if args.list or (names_export(args.filename) and args.format is None and not args.image_opts):
        return _show_exports(args)

    source = image_source(args.filename, args, args.format)
    if args.backing_chain:
        found = list(_chain(source, args))
    else:
        found = [_describe(source, args.format, force_share=args.force_share)]
    if args.output == "json":
        import json

        sys.stdout.write(json.dumps(found if args.backing_chain else found[0], indent=4) + "\n")
    else:
        sys.stdout.write("\n".join(_human(one) for one in found))
    return 0


def _show_exports(args: Namespace) -> int:
    if args.backing_chain or args.format is not None or args.image_opts:
        raise OptionError(
            "a chain is of an image, and a list is of exports",
            hint="give the format of the image (-f) for its chain; give --list only an NBD address",
        )
    from .info_nbd import show

    content = not args.list if args.content is None else args.content
    return show(args.filename, every=args.list, content=content, json=args.output == "json", timeout=args.timeout)


def describe(filename: str, format: str | None = None) -> dict[str, Any]:
    """What `lamina info --output=json` says about an image."""
    return _describe(filename, format)


def _describe(
    source: Spec,
    format: str | None,
    *,
    force_share: bool = False,
    fd: int | None = None,
    shown: str | None = None,
    from_image: bool = False,
    in_chain: bool = False,
) -> dict[str, Any]:
    """One image. `shown`: how it is called; `fd`: its file, opened already; `from_image`: an image names its format.
    `in_chain`: more images are looked at, one after the other."""
    options = dict(parse_name(source) if isinstance(source, str) else source)
    opener = Opener(policy=Policy.none(), force_share=force_share, no_references=True)
    opener.fd = fd
    named = registry.entry(options["driver"]) if "driver" in options else None
    values: dict[str, Any] = {}
    if named is not None and named.kind == "format":
        if format is not None and registry.entry(format).name != named.name:
            raise OptionError(f"the options say driver {named.name}, and the format is given as {format}")
        format = named.name
        if "file" not in options and "filename" in options:
            options["file"] = {"filename": options.pop("filename")}
        given = {key: value for key, value in options.items() if key not in COMMON}
        values = lookup_format(format).schema.parse(given)
        options = values.pop("file")
    elif named is not None and named.kind != "storage":
        return _open_and_describe(source, format, force_share)
    storage = Child(opener.open(options, storage=True), "file")
    try:
        if in_chain and force_share:
            tell_of_writers(storage.node)
        found = _inspect(storage, format or probe(storage).format, values, shown or storage.node.filename, from_image)
        if format is None:
            found["format-probed"] = True
        return found
    finally:
        storage.close()


def _inspect(storage: Child, format: str, values: Mapping[str, Any], shown: str, from_image: bool) -> dict[str, Any]:
    """What the file in `storage` says, as `format` with the options `values`. A format without a driver has a name, and no
    more."""
    found: dict[str, Any] = {"filename": shown, "format": detect.canonical(format)}
    inspected: dict[str, Any] = {}
    try:
        kind = lookup_format(format, from_image=from_image)
    except UnsupportedFeature as error:
        inspected["unsupported"] = [error.message]
    else:
        found["format"] = kind.driver
        inspected = kind.inspect(storage, values)
    found |= inspected | _allocated(storage.node)
    found.setdefault("dirty-flag", False)
    backing = found.get("backing-filename")
    if backing is not None:
        # What is named inside an export is a path on no machine in particular.
        found["full-backing-filename"] = backing if names_export(shown) else _beside(shown, backing)
    return found


def _open_and_describe(source: Spec, format: str | None, force_share: bool) -> dict[str, Any]:
    """A filter: what can be seen from above."""
    node = open_graph(source, format=format or "probe", force_share=force_share, no_references=True)
    try:
        found = {"filename": node.filename, "format": node.driver, "virtual-size": node.size, "dirty-flag": False}
        return found | _allocated(node)
    finally:
        node.close()


def _allocated(node: Node) -> dict[str, int]:
    """What the file beneath takes up, where there is one."""
    while node.children:
        node = next(iter(node.children.values())).node
    return {} if node.allocated is None else {"actual-size": node.allocated}


def _chain(source: Spec, args: Namespace) -> Iterator[dict[str, Any]]:
    """The image and what it is stacked on, from top to bottom, as far as the policy grants."""
    one = _describe(source, args.format, force_share=args.force_share, in_chain=True)
    if names_export(one["filename"]):
        yield one
        if "backing-filename" in one:
            raise PolicyError(
                f"the backing file {one['backing-filename']!r} is named inside an image that is not a file",
                path=one["filename"],
                hint="look at that file by itself",
            )
        return
    path, identity = _place(source, one["filename"])
    trail = Trail(args.limits.chain_depth).enter(*identity, path)
    yield one
    if args.references is not None:
        policy: Policy = args.references
    else:
        policy = Policy.probed(one["format"]) if one.get("format-probed") else Policy.default()
    while "backing-filename" in one:
        name, format = one["backing-filename"], one.get("backing-filename-format")
        if format is None:
            raise FormatError(
                f"the format of the backing file {name!r} is not stored in the image, and is never guessed",
                path=path,
                hint="leave --backing-chain out, or look at that file by itself",
            )
        reference = policy.open_reference(name, referrer=path)
        try:
            trail = _enter(trail, reference.fd, reference.path)
            shown = one["full-backing-filename"]
            spec = {"driver": "file", "filename": reference.path}
            how: dict[str, Any] = {"shown": shown, "from_image": True, "in_chain": True}
            one = _describe(spec, format, force_share=args.force_share, fd=reference.fd, **how)
        finally:
            os.close(reference.fd)
        path = reference.path
        yield one


def _enter(trail: Trail, fd: int, path: str) -> Trail:
    status = os.fstat(fd)
    return trail.enter(status.st_dev, status.st_ino, path)


def _place(source: Spec, filename: str) -> tuple[str, tuple[int, int]]:
    """The real path and the identity of the image on top, which need not have been named by a path."""
    path = os.path.realpath(filename)
    status = os.stat(path)
    return path, (status.st_dev, status.st_ino)


def _beside(image: str, name: str) -> str:
    """`name` as seen from here, where it is a path: relative to the directory of `image`."""
    prefix, colon, _ = name.partition(":")
    if colon and "/" not in prefix:
        return name
    return os.path.join(os.path.dirname(image), name)


# -- for people


def _human(found: dict[str, Any]) -> str:
    lines = [f"image: {printable(found['filename'])}", f"file format: {_format(found)}"]
    if "virtual-size" in found:
        lines.append(f"virtual size: {format_size(found['virtual-size'])} ({found['virtual-size']} bytes)")
    lines.append(f"disk size: {format_size(found['actual-size']) if 'actual-size' in found else 'unavailable'}")
    if found.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in found:
        lines.append(f"cluster_size: {found['cluster-size']}")
    if found["dirty-flag"]:
        lines.append("cleanly shut down: no")
    if "backing-filename" in found:
        name, full = found["backing-filename"], found["full-backing-filename"]
        actual = f" (actual path: {printable(full)})" if full != name else ""
        lines.append(f"backing file: {printable(name)}{actual}")
    if "backing-filename-format" in found:
        lines.append(f"backing file format: {printable(found['backing-filename-format'])}")
    data = found.get("format-specific", {}).get("data")
    if data:
        lines.append("Format specific information:")
        lines += _nested(data, 1)
    for feature in found.get("unsupported", ()):
        lines.append(f"not supported here: {printable(feature)}")
    return "".join(f"{line}\n" for line in lines)


def _format(found: dict[str, Any]) -> str:
    """The format, and whether it is only what the first bytes look like."""
    return printable(found["format"]) + (" (probed)" if found.get("format-probed") else "")


def _nested(value: Any, level: int) -> Iterator[str]:
    """Nested values, one a line, indented."""
    rows = value.items() if isinstance(value, dict) else ((f"[{number}]", item) for number, item in enumerate(value))
    for key, item in rows:
        label = f"{'    ' * level}{str(key).replace('-', ' ')}:"
        if isinstance(item, dict | list):
            yield label
            yield from _nested(item, level + 1)
        else:
            yield f"{label} {str(item).lower() if isinstance(item, bool) else printable(str(item))}"
