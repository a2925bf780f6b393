"""References: names inside images, and the files that they refer to, resolved in one place.

A backing file, a data file, an extent, a parent: each is an untrusted name with a role, an expected kind of node, and a use
(read, or read and written). A format describes it as a `Reference`, and `Opener.reference` returns the edge to the opened
node, or raises an error. The policy decides about the name (`policy.py`), the budget bounds the depth of a chain, and options
of the user have precedence over the content of the image. A format opens no file itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from . import detection, registry
from .capabilities import O_CLOEXEC, O_NONBLOCK, pread
from .descriptors import close_all
from .errors import CorruptImage, FormatError, Hint, LaminaError, LimitExceeded, OptionError, PolicyError, printable
from .node import Node, StorageNode
from .options import nest, parse_name, to_keyval
from .request import Child

if TYPE_CHECKING:
    from .graph import Opener, Spec
    from .policy import GrantedFile, Policy

#: (device, inode) of a file.
Identity = tuple[int, int]


class Reference(NamedTuple):
    """A name inside an image, and the child that the image expects.

    `name` is None if the image contains no name; then only options of the user can provide a node. `role` is the name of the
    child ("backing", "data-file", "extents.0"), and of the option by which users provide it. `what` is the description for
    messages. `kind`: the expected node, either another image, of the `format` that the image states (None: it states none,
    and Lamina does not guess), or plain storage. `writable`: the image writes to the child, if it is opened for writing.
    """

    name: str | None
    role: str
    what: str
    kind: Literal["format", "storage"] = "format"
    format: str | None = None
    writable: bool = False


class NotOpened(NamedTuple):
    """A reference that was not followed, and why."""

    reference: Reference
    error: LaminaError


#: The references that were not followed, by the node of the storage that contains the image.
Unopened: TypeAlias = dict[Node, list[NotOpened]]


class Trail(NamedTuple):
    """The images above the opened one, from the top of the graph: the identity of the file of each (None if it is not a file)
    and its name. Immutable, so siblings share their parents. `limit`: the most images above any image
    (`Budget.chain_depth`)."""

    limit: int
    above: tuple[tuple[Identity | None, str], ...] = ()

    @property
    def depth(self) -> int:
        """The depth below the top, which has 0."""
        return len(self.above)

    def below(self, identity: Identity | None, name: str) -> Trail:
        """The trail of a node directly below the image `name`. Raises LimitExceeded if that is too deep."""
        self.require_room(1, name)
        return Trail(self.limit, (*self.above, (identity, name)))

    def require_room(self, levels: int, name: str) -> None:
        """Raise LimitExceeded if `levels` more levels below the image `name` are too many."""
        if len(self.above) + levels > self.limit:
            raise LimitExceeded(
                f"the backing chain is deeper than the limit of {self.limit} files",
                path=name,
                hint=Hint(
                    "flatten the chain, or raise chain_depth in the budget",
                    command="flatten the chain, or allow more (--limits chain-depth=N)",
                ),
            )

    def require_new(self, identity: Identity, name: str) -> None:
        """Raise CorruptImage if the file with this identity, found by `name`, is above itself."""
        for level, (seen, title) in enumerate(self.above):
            if seen == identity:
                above = len(self.above) - level
                raise CorruptImage(
                    "the backing chain contains itself: this file is already open "
                    f'{above} {"level" if above == 1 else "levels"} above, as "{printable(title)}"',
                    path=name,
                    hint="give the image another backing file",
                )


def follow(opener: Opener, image: Child, reference: Reference, given: Child | Spec | None) -> Child | None:
    """The edge to the child for `reference`, a name inside the image in the storage `image`; see `Opener.reference`."""
    if given is None or opener.no_references or (not given and reference.name is None):
        return None
    host = file_of(image)
    trail = opener.trail.below(host.identity if host else None, (host and host.path) or image.node.filename)
    read_only = opener.read_only or not reference.writable
    if isinstance(given, Child | str) or reference.name is None or _names_a_node(given, reference):
        grows = reference.kind == "storage"
        child = opener.below(trail, read_only=read_only).child(reference.role, given, grows=grows, storage=grows)
        trail.require_room(chain_depth(child.node), image.node.filename)  # the node may have been open before
        return child
    try:
        return _by_name(opener, image, host, reference._replace(writable=not read_only), given, trail)
    except OptionError:  # a mistake of the user
        raise
    except LaminaError as error:
        if opener.unopened is None:
            raise
        opener.unopened.setdefault(image.node, []).append(NotOpened(reference, error))
        return None


def _names_a_node(given: Mapping[str, Any], reference: Reference) -> bool:
    """Whether the user's options name a node, rather than add to the name in the image."""
    words = ("file", "filename", "image") if reference.kind == "format" else ("driver", "filename")
    return any(word in given for word in words)


def file_of(image: Child) -> StorageNode | None:
    """The file that contains the storage `image`; None if there is no such file."""
    base = image.node.host_base
    host = base[0] if base else None
    return host if isinstance(host, StorageNode) and host.path is not None and host.identity is not None else None


def _by_name(
    opener: Opener,
    image: Child,
    host: StorageNode | None,
    reference: Reference,
    options: Mapping[str, Any],
    trail: Trail,
) -> Child:
    name, what = reference.name, reference.what
    assert name is not None
    if opener.policy is not None and opener.policy.trusting:
        return _as_named(opener, host, reference, options, trail)
    if host is None:
        raise not_in_a_file(
            reference, image.node.filename, f"name it in the options ({reference.role}.file.filename=...)"
        )
    driver = "file"
    if reference.kind == "format":
        driver = options.get("driver", reference.format)
        if driver is None:
            raise FormatError(
                f"the format of the {what} {name!r} is not stored in the image, and is never guessed",
                path=host.path,
                hint=_format_hint(opener, host, reference),
            )
        # An image may choose a format only: no filter, no storage, and no driver of an installed package.
        registry.lookup(driver, "format", from_image="driver" not in options)
    fds: list[int] = []
    try:
        found = open_file(fds, reference, host, trail, opener.granted())
        shown = os.path.join(os.path.dirname(host.filename), name)  # the name in messages
        where = {"driver": "file", "filename": shown}
        below = opener.below(trail, read_only=not reference.writable, fd=found.fd)
        if reference.kind == "storage":
            node = below.open({**options, **where}, storage=True)
        else:
            node = below.apart().open({**options, "driver": driver, "file": where})
        child = opener.keep(Child(node, reference.role, grows=reference.kind == "storage"))
        child.denied = found.denied
        return child
    except LaminaError as error:
        if fds:  # else the error of `open_file` names the path
            error.path = error.path or found.path
        raise
    finally:
        for fd in fds:
            os.close(fd)  # the storage has a duplicate


def _as_named(
    opener: Opener, host: StorageNode | None, reference: Reference, options: Mapping[str, Any], trail: Trail
) -> Child:
    """The same under a policy that believes images (`Policy.unchecked`)."""
    below = opener.below(trail, read_only=not reference.writable)
    where = believed_name(reference, host.filename if host else "")
    if reference.kind == "storage":
        return opener.keep(Child(below.open({**options, **where}, storage=True), reference.role, grows=True))
    driver = options.get("driver", reference.format)
    kind = registry.entry(where["driver"]).kind if "driver" in where else None
    if kind in ("format", "filter") or (driver is None and kind is None):
        spec = {**where, **options}  # json: describes the image itself
    else:
        spec = {**options, "file": where} | ({} if driver is None else {"driver": driver})
    return opener.keep(Child(below.apart()._but(probe=True).open(spec), reference.role))


def believed_name(reference: Reference, image: str) -> dict[str, Any]:
    """The options of the node that a name inside `image` denotes as a name on a command line. A path is relative to the
    folder of the image; that of plain storage to the current folder, as the reference tools take it."""
    assert reference.name is not None
    options = parse_name(reference.name)
    path = options.get("filename")
    if options.get("driver") == "file" and isinstance(path, str) and reference.kind == "format":
        options["filename"] = os.path.join(os.path.dirname(image), path)
    return options


def not_in_a_file(reference: Reference, image: str, hint: str) -> PolicyError:
    """The error for a name inside an image that is not in a file, and so has no directory."""
    text = f"the {reference.what} {reference.name!r} is named inside an image that is not a file"
    return PolicyError(text, path=image, hint=hint)


def open_file(into: list[int], reference: Reference, host: StorageNode, trail: Trail, policy: Policy) -> GrantedFile:
    """Open the file of `reference`, a name inside the image in the file `host`, for its use. `trail`: the trail of the new
    file, which must not be above itself. The descriptor is added to `into` (see `descriptors`); the caller closes it."""
    assert host.path is not None
    assert reference.name is not None
    found = policy.open_reference(
        reference.name, referrer=host.path, what=reference.what, writable=reference.writable, fds=into
    )
    try:
        status = os.fstat(found.fd)
        trail.require_new((status.st_dev, status.st_ino), found.path)
    except BaseException:
        close_all(into)
        raise
    return found


def _format_hint(opener: Opener, host: StorageNode, reference: Reference) -> str:
    """A hint with the options that give the format of a file which the image in `host` names without a format. Only this hint
    reads the magic of that file, and only if the policy grants the file."""
    assert host.path is not None
    assert reference.name is not None
    above = opener.trail.above
    top = above[0][1] if above else host.filename
    try:
        driver = _magic_of(os.open(top, os.O_RDONLY | O_NONBLOCK | O_CLOEXEC)).format
    except (OSError, LaminaError):
        driver = "FORMAT"
    why, format = "give its format", "FORMAT"
    try:
        granted = opener.granted().open_reference(reference.name, referrer=host.path, what=reference.what)
        found = _magic_of(granted.fd)
    except (OSError, LaminaError):
        pass  # the file is not granted or not readable; a user who gives its format sees that error
    else:
        format = found.matches[0] if len(found.matches) == 1 else "FORMAT" if found.matches else "raw"
        if len(found.matches) > 1:
            why = f"its magic fits {' and '.join(found.matches)}: give the right one"
        elif found.matches and format not in registry.names("format"):
            return f"its magic is that of {format}, which has no driver yet"
        elif found.matches:
            why = f"if it is {format}, as its magic says"
        else:
            why = "if it is raw, since it has no known magic"
    spec = {"driver": driver, "file.filename": top, f"{f'{reference.role}.' * (len(above) + 1)}driver": format}
    from shlex import quote

    return Hint(f"{why}: {nest(spec)!r}", command=f"{why}: --image-opts {quote(to_keyval(spec))}")


def _magic_of(fd: int) -> detection.Detection:
    """Detect the format of the file with the descriptor `fd`, which is closed, by its magic."""
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        head = pread(fd, detection.HEAD_BYTES, 0)
        tail = pread(fd, detection.TAIL_BYTES, max(size - detection.TAIL_BYTES, 0))
    finally:
        os.close(fd)
    return detection.detect(head, tail, size)


def chain_depth(node: Node) -> int:
    """The number of images below the top image of the graph `node`, in its longest chain."""
    deepest, line = 0, [(node, 0)]
    while line:
        at, depth = line.pop()
        deepest = max(deepest, depth)
        line += [(child.node, depth + (role == "backing")) for role, child in at.children.items()]
    return deepest
