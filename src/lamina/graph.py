"""From options to opened nodes: drivers are looked up, children opened, references inside images asked of the policy.

`open_graph` is the one way in. A driver's `open` receives an `Opener`, which opens its children and knows for what use the
graph is opened; whatever it opened is closed again if a later step fails.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from . import detect, lifecycle, references, registry
from .errors import OptionError
from .limits import DEFAULT_BUDGET, Budget, Memory
from .node import MAY_UNMAP, Node
from .options import parse_name, shown
from .policy import Policy
from .references import Reference, Trail
from .request import Child
from .root import Graph

#: Options that every node takes, besides those of its driver.
COMMON = ("node-name", "read-only", "force-share", "snapshot", "detect-zeroes", "discard")

#: The roles whose child is storage: without a driver they name a file, and are never probed.
STORAGE_ROLES = ("file", "data-file")

_NODE_NAME = re.compile(r"[A-Za-z][\w.-]{0,254}", re.ASCII)

Spec = Mapping[str, Any] | str

#: Options of storage for all graphs that this program opens, where their own options do not give them: what a command line
#: says once for all names (`--timeout`, `--connections`). Libraries leave it empty.
usual: dict[str, Any] = {}


class Opener:
    """How the nodes of one graph are opened. Given to every driver's `open`.

    `read_only`: the node is opened for reading. `force_share`: the node takes no file locks and ignores those of others.
    `probe`: a format that is not given may be detected by its magic. `no_references`: no file that the image names is opened,
    which suffices to read its tables. `fd`: an open descriptor; the storage duplicates it. `name`: what
    the user calls the node. `trail`: the images above. `taken`, `unshared`: permissions (see `storage.locks`) that the locks
    of files use, and keep from others, besides their own; not those of backing nodes. `policy`: what the user granted, None:
    nothing was said. `probed`: the format that was found by its magic. `budget`: what all images of the graph may cost
    together. `graph`: what the nodes belong to; options refer to its nodes by their names.
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
        fd: int | None = None,
        graph: Graph | None = None,
    ) -> None:
        self.graph = graph or Graph()
        self.policy = policy
        self.probed: str | None = None
        self.budget = budget
        self._memory = Memory(budget.memory, 0 if graph is None else _kept_bytes(graph))
        self.read_only = read_only
        self.force_share = force_share
        self.probe = probe
        self.no_references = no_references
        self.fd = fd
        self.name: str | None = None
        self.trail = Trail(budget.chain_depth)
        self.taken: frozenset[int] = frozenset()
        self.unshared: frozenset[int] = frozenset()
        self._opened: list[Child] = []
        self._booked = 0
        self._top = True  # what this opens is the top of a graph

    def granted(self) -> Policy:
        """The policy for names inside the image that is opened: that of the user; else the default, or `none` where the
        format was only detected. (A guest can write any header into its raw disk.)"""
        if self.policy is not None:
            return self.policy
        return Policy.default() if self.probed is None else Policy.probed(self.probed)

    @property
    def cache_bytes(self) -> int:
        """Memory for cached tables of the image that is opened: less the deeper it lies, so that the sum is bounded."""
        return self.budget.cache_bytes // (self.trail.depth + 1)

    def book(self, count: int, what: str, path: str | None = None) -> None:
        """Called by a driver before it allocates `count` bytes for `what` (tables, say), which stay allocated as long as the
        node is open. Raises LimitExceeded where the budget of the graph has less."""
        self._memory.take(count, what, path)
        self._booked += count

    def _but(self, **changes: Any) -> Opener:
        """The same, but for these attributes."""
        other = Opener.__new__(Opener)
        other.__dict__.update(self.__dict__, **changes)
        return other

    def for_parts(self, graph: Graph) -> Opener:
        """The same for nodes that become part of `graph`, whose roots close them."""
        memory = Memory(self.budget.memory, _kept_bytes(graph))
        return self._but(_top=False, graph=graph, _memory=memory)

    def permitting(self, taken: Iterable[int], unshared: Iterable[int]) -> Opener:
        """The same for the children of this node, whose files use, and keep from others, these permissions as well."""
        return self._but(taken=self.taken.union(taken), unshared=self.unshared.union(unshared))

    def open(self, spec: Spec, *, storage: bool = False) -> Node:
        """The node that `spec` describes. `storage`: without a driver it names a file, not an image to be probed."""
        options = dict(parse_name(spec) if isinstance(spec, str) else spec)
        if isinstance(spec, str) and not storage and _names_storage(spec, options):
            options = {"file": options}  # a bare name says where the image is, not what it is
        if "snapshot" in options and _switch("snapshot", options.pop("snapshot")):
            return self._snapshot(options, storage)
        zero_detected = _choice(options, "detect-zeroes", {"off": None, "on": 0, "unmap": MAY_UNMAP})
        discards = _choice(options, "discard", {"unmap": True, "on": True, "ignore": False, "off": False})
        inner = self._but(_opened=[], _booked=0, name=None, _top=False)
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
            node.kept_bytes = inner._booked
            node.zero_detected = zero_detected
            node.discards = discards is not False
            node.graph = self.graph
            if self._top:
                lifecycle.guard(node)
            return node
        except BaseException:
            self._memory.taken = booked
            inner.close()
            raise

    def _new_name(self, name: object) -> str:
        """`name` if a node may be called so, and none is."""
        if not (isinstance(name, str) and _NODE_NAME.fullmatch(name)):
            raise OptionError(
                f"node-name is {shown(name)}, not a name", hint="a letter, then letters, digits, '-', '.' and '_'"
            )
        if name in self.graph.nodes:
            raise OptionError("another node of this graph has that name", node=name, hint="choose another one")
        return name

    def _open_driver(self, options: dict[str, Any]) -> Node:
        """The node of the driver that `options` name."""
        name = options.pop("driver")
        if not isinstance(name, str):
            raise OptionError(f"driver is {shown(name)}, not a name")
        kind = registry.lookup(name)
        if "file" not in options and registry.entry(name).kind == "format" and "filename" in options:
            options["file"] = {"driver": "file", "filename": options.pop("filename")}
        values = kind.schema.parse(options)
        if usual and registry.entry(name).kind == "storage":
            kind.schema.fill(values, options, usual)
        return cast(Node, kind.open(values, self))

    def _snapshot(self, options: dict[str, Any], storage: bool) -> Node:
        """The node that `options` describe, opened for reading, under a `cow` that keeps all changes to itself."""
        node = self._but(read_only=True, _top=False).open(options, storage=storage)
        cow = registry.lookup("cow", "filter")
        top = cast(Node, cow(Child(node, "image"), read_only=self.read_only))
        top.graph = self.graph
        if self._top:
            lifecycle.guard(top)
        return top

    def child(
        self, role: str, spec: Spec | Child, *, grows: bool = False, read_only: bool = False, storage: bool = False
    ) -> Child:
        """An edge to a new child, to the node of this graph that `spec` names, or the one that is given. `grows` as in
        `request.Child`; `read_only` where the child is only ever read; `storage` as in `open`."""
        if isinstance(spec, Child):
            lifecycle.release(spec.node)
            return spec
        if isinstance(spec, str):
            shared = self.graph.edge_to(spec, role, grows=grows, writes=not (self.read_only or read_only))
            if shared is not None:
                return self.keep(shared)
        # A descriptor that the policy opened is for the storage of this very image, and for nothing else.
        fd = self.fd if role == "file" else None
        opener = self._but(read_only=self.read_only or read_only, fd=fd)
        if role == "backing":
            opener = opener.apart()
        node = opener.open(spec, storage=storage or role in STORAGE_ROLES)
        return self.keep(Child(node, role, grows=grows))

    def reference(self, image: Child, reference: Reference, given: Child | Spec | None) -> Child | None:
        """The child that `reference`, which stands inside the image in the storage `image`, leads to; None where there is
        none. `given`: what the options of the user say of it: a node, or options that name one, take its place; other
        options are added to what the image says ({}: nothing was said); None: no such child is wanted.

        Raises PolicyError where the name is not granted, NotFound, BlockIOError, CorruptImage where the file lies above
        itself, LimitExceeded, FormatError where the image does not say the format, and what opening it raises."""
        return references.follow(self, image, reference, given)

    def below(self, trail: Trail, *, read_only: bool, fd: int | None = None) -> Opener:
        """The same for what lies below the image that is opened. `fd`: its file, open already."""
        return self._but(trail=trail, read_only=read_only, fd=fd)

    def apart(self) -> Opener:
        """The same for another image: the lock permissions of this image do not apply to its files."""
        return self._but(taken=frozenset(), unshared=frozenset())

    def require_depth(self, top: Node) -> None:
        """Raise LimitExceeded where more images lie below `top` than the budget allows."""
        Trail(self.budget.chain_depth).require_room(references.chain_depth(top), top.filename)

    def close(self) -> None:
        """Close what was opened for a node that then failed to open."""
        for child in reversed(self._opened):
            self.graph.close(child)
        self._opened.clear()

    def keep(self, child: Child) -> Child:
        """Close this child, too, where the node that it is opened for cannot be opened."""
        self._opened.append(child)
        return child

    def _probe(self, options: dict[str, Any]) -> Node:
        """Open what no driver was named for: its format is found by its magic, where that is allowed."""
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
            detect.refuse_probed_raw(found, storage.node.filename)
        kind = registry.lookup(found.format, "format")
        self.probed = found.format
        return cast(Node, kind.open(kind.schema.parse({**options, "file": storage}), self))


def _kept_bytes(graph: Graph) -> int:
    """Bytes of memory that the nodes of this graph have booked."""
    return sum(node.kept_bytes for node in graph.nodes.values())


def probe(storage: Child) -> detect.Detection:
    """What lies in `storage`, by its magic: the first and last bytes are read, and nothing is opened."""
    size = storage.node.size
    head = bytearray(min(size, detect.HEAD_BYTES))
    tail = bytearray(min(size, detect.TAIL_BYTES))
    storage.read_into(0, memoryview(head))
    storage.read_into(size - len(tail), memoryview(tail))
    return detect.detect(bytes(head), bytes(tail), size, path=storage.node.filename)


def open_graph(
    source: Spec,
    *,
    format: str | None = None,
    read_only: bool = True,
    policy: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
    no_references: bool = False,
    snapshot: bool = False,
    fd: int | None = None,
    graph: Graph | None = None,
) -> Node:
    """Open the graph that `source` names: a path, a prefixed name (`json:{...}`, `blkdebug::x`), or nested options.

    `format`: the driver that lies over it, or "probe" to find it by its magic (refused for writing where that finds
    nothing). It may be left out where the options name a driver. `policy` decides about names inside images; the default
    is `Policy.default()`, and nothing where the format was found by a probe. `snapshot`: the image is opened for reading,
    and changes are kept in memory above it. `fd`: a descriptor of the image's file, open already: its storage takes a copy
    of it, and no file is opened by its name. `graph`: what the nodes become part of. The caller closes the node.
    """
    options = parse_name(source) if isinstance(source, str) else dict(source)
    # A plain or prefixed name says where the bytes are; json: and nested options say what the node is.
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
                f"the options say driver {driver}, and the format is given as {format}", hint="say it once"
            )
        options = {"driver": format, "file": options}
    opener = Opener(
        policy=policy,
        budget=budget,
        read_only=read_only,
        force_share=force_share,
        probe=format == "probe",
        no_references=no_references,
        fd=fd,
        graph=graph,
    )
    return opener.open({**options, "snapshot": True} if snapshot else options)


def named(source: str | os.PathLike[str] | Mapping[str, Any]) -> Spec:
    """What users call an image: a path object is a name that means that path, whatever it looks like (`parse_name`)."""
    return f"file:{os.fspath(source)}" if isinstance(source, os.PathLike) else source


def _is_json(name: str) -> bool:
    return name.startswith("json:")


def _names_storage(name: str, options: dict[str, Any]) -> bool:
    return not _is_json(name) and registry.entry(options["driver"]).kind == "storage"


def _format_missing(where: str | None) -> OptionError:
    return OptionError(
        "the format is not given, and is not guessed",
        path=where,
        hint='give it (format="qcow2", driver=..., -f), or ask for a guess with format="probe"',
    )


def _choice(options: dict[str, Any], key: str, meanings: dict[str, Any]) -> Any:
    """Take a common option out of `options`: what its word means, None where it is absent."""
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
