"""From options to opened nodes: the modules here look up drivers, open children, and check references inside images.

`open_graph` is the entry point. The `open` of a driver receives an `Opener`, which opens its children and knows the purpose
of the graph; if a later step fails, everything that was opened is closed again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from . import detection, lifecycle, references, registry
from .descriptors import close_all
from .errors import Hint, OptionError
from .limits import DEFAULT_BUDGET, Budget, Memory
from .node import MAY_UNMAP, Node
from .options import file_path, parse_name, shown
from .policy import Policy
from .references import Reference, Trail, Unopened
from .request import Child
from .root import Graph, Root
from .schema import Option, Schema

if TYPE_CHECKING:
    from .format import Format

#: Values of the options `detect-zeroes` and `discard`, and what they mean for a node.
_ZEROES = {"off": None, "on": 0, "unmap": MAY_UNMAP}
_DISCARDS = {"unmap": True, "on": True, "ignore": False, "off": False}
#: Options of every node, besides those of its driver.
COMMON_SCHEMA = Schema(
    "every node",
    [
        Option("node-name", "str", "the name of the node in its graph (default: one that Lamina makes)"),
        Option("read-only", "bool", "open the node and what is below it for reading only", default=False),
        Option("force-share", "bool", "take no file locks, and ignore those of other programs", default=False),
        Option("snapshot", "bool", "keep all changes in memory, and discard them at the end", default=False),
        Option(
            "detect-zeroes",
            "enum",
            "whether writes of zeros become requests for zeros; unmap also gives storage back",
            default="off",
            choices=tuple(_ZEROES),
        ),
        Option(
            "discard",
            "enum",
            "whether the driver gets discards",
            default="unmap",
            choices=tuple(_DISCARDS),
        ),
    ],
)
COMMON = tuple(option.name for option in COMMON_SCHEMA.options)

#: The roles whose child is storage: without a driver their options name a file, and its format is never detected.
STORAGE_ROLES = ("file", "data-file")

_NODE_NAME = re.compile(r"[A-Za-z][\w.-]{0,254}", re.ASCII)

#: What names a node: nested options, or a name for `parse_name`.
Spec = Mapping[str, Any] | str

#: Defaults for options of storage and formats in all graphs that this program opens: a command line sets an option once for
#: all names (`--timeout`, `--connections`). Libraries leave it empty.
usual: dict[str, Any] = {}


class Opener:
    """The environment in which the nodes of one graph are opened. The `open` of every driver receives it.

    `read_only`: the node is opened for reading. `force_share`: the node takes no file locks and ignores those of others.
    `probe`: a missing format may be detected by its magic. `no_references`: files that the image names are not opened, which
    suffices to read its tables. `repair`: the image is opened to be repaired: in any state, and opening changes nothing.
    `fd`: an open descriptor, which the storage duplicates. `name`: the name that the user gave the node. `trail`: the
    images above. `taken`, `unshared`: permissions (see `storage.locks`) that the file locks take and refuse to other
    programs, besides their own; not those of backing nodes. `policy`: the grants of the user; None: there are none.
    `probed`: the format that was detected. `budget`: the limit for the cost of all images of the graph together. `graph`:
    the graph to which the nodes belong; options refer to its nodes by name. `unopened`: if given, a reference inside an
    image that cannot be followed is an entry here, and no error; what is opened then serves to be described only.
    """

    def __init__(
        self,
        *,
        policy: Policy | None = None,
        budget: Budget = DEFAULT_BUDGET,
        read_only: bool = True,
        force_share: bool = False,
        probe: bool = False,
        no_references: bool = False,
        repair: bool = False,
        fd: int | None = None,
        graph: Graph | None = None,
        unopened: Unopened | None = None,
    ) -> None:
        if not isinstance(policy, Policy | None):
            raise OptionError("references is not a Policy", hint='write Policy.parse("none"), for example')
        self.graph: Graph = graph or Graph()
        self.unopened = unopened
        self.policy = policy
        self.probed: str | None = None
        self.budget = budget
        self._memory = Memory(budget.memory, 0 if graph is None else _kept_bytes(graph))
        self.read_only = read_only
        self.force_share = force_share
        self.probe = probe
        self.no_references = no_references
        self.repair = repair
        self.fd = fd
        self.name: str | None = None
        self.trail: Trail = Trail(budget.chain_depth)
        self.taken: frozenset[int] = frozenset()
        self.unshared: frozenset[int] = frozenset()
        self._opened: list[Child] = []
        self._booked = 0
        self._top = True  # the next node is the top of a graph
        self._descriptors: list[list[int]] | None = None  # see `descriptors`; None: nothing is being opened

    def granted(self) -> Policy:
        """The policy for names inside the opened image: that of the user; otherwise the default, or `none` if the format was
        only detected. (A guest can write any header to its raw disk.)"""
        if self.policy is not None:
            return self.policy
        return Policy.default() if self.probed is None else Policy.probed(self.probed)

    @property
    def cache_bytes(self) -> int:
        """Bytes for cached tables of the opened image. Deeper images get less, so the sum is bounded."""
        return self.budget.cache_bytes // (self.trail.depth + 1)

    def book(self, count: int, what: str, path: str | None = None) -> None:
        """Called by a driver before it allocates `count` bytes for `what` (for example tables), which stay allocated while
        the node is open. Raises LimitExceeded if the budget of the graph has fewer left."""
        self._memory.take(count, what, path)
        self._booked += count

    def descriptors(self) -> list[int]:
        """A new list for the descriptor of a file (see `descriptors`), which the node of that file owns. If the graph cannot
        be opened, the descriptor is closed, also if an interrupt lost the node before an edge led to it."""
        fds: list[int] = []
        if self._descriptors is not None:
            self._descriptors.append(fds)
        return fds

    def _but(self, **changes: Any) -> Opener:
        """A copy with these attributes changed."""
        other = Opener.__new__(Opener)
        other.__dict__.update(self.__dict__, **changes)
        return other

    def for_parts(self, graph: Graph) -> Opener:
        """A copy for nodes that become part of `graph`, whose roots close them."""
        memory = Memory(self.budget.memory, _kept_bytes(graph))
        return self._but(_top=False, graph=graph, _memory=memory)

    def permitting(self, taken: Iterable[int], unshared: Iterable[int]) -> Opener:
        """A copy for the children of this node, whose file locks take and refuse these permissions as well."""
        return self._but(taken=self.taken.union(taken), unshared=self.unshared.union(unshared))

    def open(self, spec: Spec, *, storage: bool = False) -> Node:
        """The node that `spec` describes. `storage`: without a driver it names a file, and no format is detected."""
        options = dict(parse_name(spec) if isinstance(spec, str) else spec)
        if isinstance(spec, str) and not storage and _names_storage(spec, options):
            options = {"file": options}  # a bare name is the location of the image, not its format
        if "snapshot" in options and _switch("snapshot", options.pop("snapshot")):
            return self._snapshot(options, storage)
        zero_detected = _choice(options, "detect-zeroes", _ZEROES)
        discards = _choice(options, "discard", _DISCARDS)
        outermost = self._descriptors is None
        descriptors: list[list[int]] = [] if self._descriptors is None else self._descriptors
        inner = self._but(_opened=[], _booked=0, name=None, _top=False, _descriptors=descriptors)
        booked = self._memory.taken
        for key, value in [(key, options.pop(key)) for key in COMMON if key in options]:
            if key == "node-name":
                inner.name = self._new_name(value)
            elif _switch(key, value):
                setattr(inner, key.replace("-", "_"), True)
        try:
            if "driver" not in options and storage:
                options["driver"] = "file"
            node = inner._open_driver(options) if "driver" in options else inner._probe(options)
            node.kept_bytes, node.memory_limit = inner._booked, self.budget.memory
            node.zero_detected = zero_detected
            node.discards = discards is not False
            self.graph.add(node)
            if self._top:
                lifecycle.guard(node)
            return node
        except BaseException:
            self._memory.taken = booked
            try:
                inner.close()
            finally:
                for fds in descriptors if outermost else ():
                    close_all(fds)
            raise

    def _new_name(self, name: object) -> str:
        """`name`, if it is a valid name that no node has."""
        if not (isinstance(name, str) and _NODE_NAME.fullmatch(name)):
            raise OptionError(
                f"node-name is {shown(name)}, not a name", hint="a letter, then letters, digits, '-', '.' and '_'"
            )
        if name in self.graph.nodes:
            raise OptionError("another node of this graph has that name", node=name, hint="choose another one")
        return name

    def _open_driver(self, options: dict[str, Any]) -> Node:
        """The node of the driver in `options`."""
        name = options.pop("driver")
        if not isinstance(name, str):
            raise OptionError(f"driver is {shown(name)}, not a name")
        kind = registry.lookup(name)
        if "file" not in options and registry.entry(name).kind == "format" and "filename" in options:
            options["file"] = {"driver": "file", "filename": options.pop("filename")}
        _pass_cache(options, registry.entry(name).kind)
        values = kind.schema.parse(options)
        if registry.entry(name).kind != "filter":
            kind.schema.fill(values, options, usual)
        # A chain of backing files is opened by recursion, so no level has a frame more than it needs.
        node = cast(Node, kind.open(values, self))
        node.given = kind.schema.told(values)
        return node

    def _snapshot(self, options: dict[str, Any], storage: bool) -> Node:
        """The node that `options` describe, opened for reading, under a `cow` filter that keeps all changes in memory."""
        node = self._but(read_only=True, _top=False).open(options, storage=storage)
        try:
            cow = registry.lookup("cow", "filter")
            top = cast(Node, cow(Child(node, "image"), read_only=self.read_only))
            self.graph.add(top)
            if self._top:
                lifecycle.guard(top)
            return top
        except BaseException:
            node.close()
            raise

    def child(
        self, role: str, spec: Spec | Child, *, grows: bool = False, read_only: bool = False, storage: bool = False
    ) -> Child:
        """An edge to a child: to a new node, to the node of this graph that `spec` names, or to the given node. `grows` as in
        `request.Child`; `read_only` if the driver only reads the child; `storage` as in `open`."""
        if isinstance(spec, Child):
            return spec
        if isinstance(spec, str):
            shared = self.graph.edge_to(spec, role, grows=grows, writes=not (self.read_only or read_only))
            if shared is not None:
                return self.keep(shared)
        # A descriptor that the policy opened is for the storage of this image only.
        fd = self.fd if role == "file" else None
        opener = self._but(read_only=self.read_only or read_only, fd=fd)
        if role == "backing":
            opener = opener.apart()
        node = opener.open(spec, storage=storage or role in STORAGE_ROLES)
        try:
            return self.keep(Child(node, role, grows=grows))
        except BaseException:
            node.close()
            raise

    def reference(self, image: Child, reference: Reference, given: Child | Spec | None) -> Child | None:
        """The child for `reference`, a name inside the image in the storage `image`; None if there is no child. `given`: the
        user's options for it. A node, or options that name one, replace the name in the image; other options are added to
        those of the image ({}: there are none); None: the user wants no such child.

        Raises PolicyError if the name is not granted, NotFound, BlockIOError, CorruptImage if the file is above itself in the
        chain, LimitExceeded, FormatError if the image does not state the format, and the errors of opening it."""
        return references.follow(self, image, reference, given)

    def below(self, trail: Trail, *, read_only: bool, fd: int | None = None) -> Opener:
        """A copy for the nodes below the opened image. `fd`: the descriptor of their file, if it is open."""
        return self._but(trail=trail, read_only=read_only, fd=fd)

    def apart(self) -> Opener:
        """A copy for another image: the lock permissions of this image do not apply to its files."""
        return self._but(taken=frozenset(), unshared=frozenset())

    def require_depth(self, top: Node) -> None:
        """Raise LimitExceeded if more images are below `top` than the budget allows."""
        Trail(self.budget.chain_depth).require_room(references.chain_depth(top), top.filename)

    def close(self) -> None:
        """Close the children of a node that could not be opened."""
        for child in reversed(self._opened):
            self.graph.close(child)
        self._opened.clear()

    def keep(self, child: Child) -> Child:
        """Register this child to be closed if its node cannot be opened."""
        self._opened.append(child)
        return child

    def _probe(self, options: dict[str, Any]) -> Node:
        """Open a node without a driver: its format is detected by its magic, if that is allowed."""
        where = options.get("filename") or options.get("file")
        if not self.probe:
            raise _format_missing(where if isinstance(where, str) else None)
        file = options.pop("file", None)
        if file is None:
            file = {
                key: options.pop(key) for key in list(options) if key.split(".")[0] in ("filename", "locking", "cache")
            }
        storage = self.child("file", file, grows=True)
        found = probe(storage)
        if not self.read_only:
            if self.policy is None or not self.policy.trusting:
                detection.refuse_probed_raw(found, storage.node.filename)
            elif found.format == "raw":
                options["guessed"] = True
        kind = registry.lookup(found.format, "format")
        self.probed = found.format
        values = kind.schema.parse({**options, "file": storage})
        kind.schema.fill(values, options, usual)
        node = cast("Format", kind.open(values, self))
        node.probed = True
        node.given = kind.schema.told(values)
        return node


def _pass_cache(options: dict[str, Any], kind: str) -> None:
    """Move the option `cache` of a format or a filter to its child: it concerns the file beneath."""
    role = {"format": "file", "filter": "image"}.get(kind)
    if role is None or not isinstance(options.get("cache"), dict) or role not in options:
        return
    child = options[role]
    child = dict(parse_name(child)) if isinstance(child, str) else child
    if not isinstance(child, dict):
        raise OptionError("cache concerns a file, and this node is over an open one", hint="set it on that node")
    given = options.pop("cache")
    options[role] = {**child, "cache": {**given, **child.get("cache", {})}}


def rebook(node: Node, count: int, what: str) -> None:
    """Called by a driver before `what` (for example tables), which stays allocated while `node` is open, grows or shrinks to
    `count` bytes in total. Raises LimitExceeded, without effect, if the budget of the graph has fewer left."""
    kept = node.kept_bytes if node.graph is None else _kept_bytes(node.graph)
    Memory(node.memory_limit, kept).take(count - node.kept_bytes, what, node.filename)
    node.kept_bytes = count


def _kept_bytes(graph: Graph) -> int:
    """The bytes of memory that the nodes of this graph have booked."""
    return sum(node.kept_bytes for node in graph.nodes.values())


def probe(storage: Child | Root) -> detection.Detection:
    """Detect the format in `storage` by its magic: read the first and last bytes, and open nothing."""
    size = storage.node.size
    head = bytearray(min(size, detection.HEAD_BYTES))
    tail = bytearray(min(size, detection.TAIL_BYTES))
    storage.read_into(0, memoryview(head))
    storage.read_into(size - len(tail), memoryview(tail))
    return detection.detect(bytes(head), bytes(tail), size, path=storage.node.filename)


def open_graph(
    source: Spec,
    *,
    format: str | None = None,
    read_only: bool = True,
    policy: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
    no_references: bool = False,
    repair: bool = False,
    snapshot: bool = False,
    fd: int | None = None,
    graph: Graph | None = None,
    unopened: Unopened | None = None,
) -> Node:
    """Open the graph that `source` names: a path, a prefixed name (`json:{...}`, `blkdebug::x`), or nested options.

    `format`: the driver for a plain name, or "probe" to detect it by its magic (refused for writing if no magic is found). It
    may be omitted if the options name a driver. `policy` decides about names inside images; the default is
    `Policy.default()`, and `Policy.none()` for a detected format. `snapshot`: the image is opened for reading, and changes
    are kept in memory above it. `fd`: an open descriptor of the image file; the storage duplicates it, and no file is opened
    by name. `graph`: the graph of the nodes. `unopened` as for `Opener`. The caller closes the node.
    """
    options = parse_name(source) if isinstance(source, str) else dict(source)
    # A plain or prefixed name is the location of the bytes; json: and nested options describe the node.
    named = isinstance(source, str) and not _is_json(source)
    driver = options.get("driver")
    if format is None or format == "probe":
        if named and format is None and driver is not None:
            raise _format_missing(str(source))
        if named:
            options = {"file": options}
    elif driver is None:
        options["driver"] = format
    elif registry.entry(driver).name != registry.entry(format).name:
        if registry.entry(driver).kind == "format":
            raise OptionError(
                f"the options name the driver {driver}, but the format is given as {format}", hint="give one of them"
            )
        options = {"driver": format, "file": options}
    opener = Opener(
        policy=policy,
        budget=budget,
        read_only=read_only,
        force_share=force_share,
        probe=format == "probe",
        no_references=no_references,
        repair=repair,
        fd=fd,
        graph=graph,
        unopened=unopened,
    )
    return opener.open({**options, "snapshot": True} if snapshot else options)


def named(source: str | os.PathLike[str] | Mapping[str, Any]) -> Spec:
    """The name of an image as a string; a path object becomes a name for exactly that path (`parse_name`)."""
    if isinstance(source, os.PathLike):
        return f"file:{file_path(source)}"
    if not isinstance(source, str | Mapping):
        raise OptionError(f"{shown(source)} names no image", hint="give a path, a name or nested options")
    return source


def _is_json(name: str) -> bool:
    return name.startswith("json:")


def _names_storage(name: str, options: dict[str, Any]) -> bool:
    return not _is_json(name) and registry.entry(options["driver"]).kind == "storage"


def _format_missing(where: str | None) -> OptionError:
    return OptionError(
        "the format is not given, and is not guessed",
        path=where,
        hint=Hint(
            'give it (format="qcow2"), or ask for detection with format="probe"',
            command="give it (-f, or driver=... among the options)",
        ),
    )


def _choice(options: dict[str, Any], key: str, meanings: dict[str, Any]) -> Any:
    """Remove a common option from `options` and return its meaning; None if it is absent."""
    word = options.pop(key, None)
    if word is not None and not (isinstance(word, str) and word in meanings):
        raise OptionError(f"{key} is {shown(word)}", hint=f"it takes one of {', '.join(meanings)}")
    return meanings.get(word) if word is not None else None


def _switch(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if value in ("on", "off"):
        return bool(value == "on")
    raise OptionError(f"{key} is {shown(value)}, not on or off")
