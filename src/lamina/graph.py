"""From options to opened nodes: drivers are looked up, children opened, references inside images asked of the policy.

`open_graph` is the one way in. A driver's `open` receives an `Opener`, which opens its children and knows for what use the
graph is opened; whatever it opened is closed again if a later step fails.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from . import detect, lifecycle, registry
from .errors import FormatError, LaminaError, OptionError, PolicyError
from .limits import DEFAULT_BUDGET, Account, Budget
from .node import MAY_UNMAP, Node, StorageNode
from .options import parse_name, shown, to_keyval
from .policy import Policy, Trail
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

    `read_only`: the node is opened for reading. `force_share`: no locks are taken, and others' are ignored. `probe`: where
    no format is given, it may be found by its magic. `no_references`: nothing that is named inside the image is opened,
    which is enough to look at its tables. `fd`: a descriptor that is open already; storage takes a copy of it. `name`: what
    the user calls the node. `trail`: the files on the way from the top of the chain. `taken`, `unshared`: permissions (see
    `storage.locks`) that the locks of files use, and keep from others, besides their own; not those of backing nodes.
    `policy`: what the user granted, None: nothing was said. `probed`: the format that was found by its magic. `account`: the
    memory that the whole graph may take. `graph`: what the nodes belong to; options refer to its nodes by their names.
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
        self.account = Account(budget.memory)
        self.read_only = read_only
        self.force_share = force_share
        self.probe = probe
        self.no_references = no_references
        self.fd = fd
        self.name: str | None = None
        self.trail: Trail | None = None
        self.taken: frozenset[int] = frozenset()
        self.unshared: frozenset[int] = frozenset()
        self._opened: list[Child] = []
        self._top = True  # what this opens is the top of a graph

    def granted(self) -> Policy:
        """The rule for names inside the image that is opened: what the user gave; else the default, or nothing at all where
        nobody named the format. (A guest can write any header into its raw disk.)"""
        if self.policy is not None:
            return self.policy
        return Policy.default() if self.probed is None else Policy.probed(self.probed)

    @property
    def cache_bytes(self) -> int:
        """Memory for cached tables of the image that is opened: less the deeper it lies, so that the sum is bounded."""
        depth = len(self.trail.visited) if self.trail else 1
        return self.budget.cache_bytes // max(depth, 1)

    def _but(self, **changes: Any) -> Opener:
        """The same, but for these attributes."""
        other = Opener.__new__(Opener)
        other.__dict__.update(self.__dict__, **changes)
        return other

    def for_parts(self, graph: Graph) -> Opener:
        """The same for nodes that become part of `graph`, which somebody else closes."""
        return self._but(_top=False, graph=graph)

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
        inner = self._but(_opened=[], name=None, _top=False)
        for key, value in [(key, options.pop(key)) for key in COMMON if key in options]:
            if key == "node-name":
                inner.name = self._new_name(value)
            elif _switch(key, value):
                setattr(inner, key.replace("-", "_"), True)
        try:
            if "driver" not in options and storage:
                options["driver"] = "file"
            node = inner._open_driver(options) if "driver" in options else inner._probe(options)
            node.zero_detected = zero_detected
            node.discards = discards is not False
            node.graph = self.graph
            if self._top:
                lifecycle.guard(node)
            return node
        except BaseException:
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

    def child(self, role: str, spec: Spec | Child, *, grows: bool = False, read_only: bool = False) -> Child:
        """An edge to a new child, to the node of this graph that `spec` names, or the one that is given. `grows` as in
        `request.Child`; `read_only` where the child is only ever read."""
        if isinstance(spec, Child):
            lifecycle.release(spec.node)
            return spec
        if isinstance(spec, str):
            shared = self.graph.edge_to(spec, role, grows=grows, writes=not (self.read_only or read_only))
            if shared is not None:
                return self._keep(shared)
        # A descriptor that the policy opened is for the storage of this very image, and for nothing else.
        fd = self.fd if role == "file" else None
        opener = self._but(read_only=self.read_only or read_only, fd=fd)
        if role == "backing":
            opener.taken = opener.unshared = frozenset()
        node = opener.open(spec, storage=role in STORAGE_ROLES)
        return self._keep(Child(node, role, grows=grows))

    def reference(self, image: Child, name: str, *, what: str, format: str | None, options: Mapping[str, Any]) -> Child:
        """The child that `name`, found inside the image in `image`, refers to, if the policy grants it. `format`: what the
        image says its format is; `options`: what the user gave for it, which wins."""
        base = image.node.host_base
        host = base[0] if base else None
        if not isinstance(host, StorageNode) or host.path is None or host.identity is None:
            raise PolicyError(
                f"the {what} {name!r} is named inside an image that is not a file",
                path=image.node.filename,
                hint="name it in the options (backing.file.filename=...)",
            )
        path = host.path
        driver = options.get("driver", format)
        if driver is None:
            raise FormatError(
                f"the format of the {what} {name!r} is not stored in the image, and is never guessed",
                path=path,
                hint=self._format_hint(host, name, what, option="backing" if what == "backing file" else what),
            )
        # An image may ask for a format only: never for a filter, nor for storage of its own choice; and for none of an
        # installed package.
        registry.lookup(driver, "format", from_image="driver" not in options)
        trail = self.trail or Trail(self.budget.chain_depth).enter(*host.identity, path)
        found = self.granted().open_reference(name, referrer=path, what=what)
        fd = found.fd
        try:
            status = os.fstat(fd)
            step = trail.enter(status.st_dev, status.st_ino, found.path)
            inner = self._but(read_only=True, trail=step, fd=fd, taken=frozenset(), unshared=frozenset())
            shown = os.path.join(os.path.dirname(host.filename), name)  # as a person would name it
            spec = {**options, "driver": driver, "file": {"driver": "file", "filename": shown}}
            node = inner.open(spec)
        except LaminaError as error:
            error.path = error.path or found.path
            raise
        finally:
            os.close(fd)  # the storage has a copy
        return self._keep(Child(node, "backing"))

    def _format_hint(self, host: StorageNode, name: str, what: str, *, option: str) -> str:
        """How to give the format of the file `name`, which the image in `host` names without one. The magic of that file is
        looked at for this text alone, and only where the policy grants the file."""
        assert host.path is not None
        visited = self.trail.visited if self.trail else ()
        top = visited[0][2] if len(visited) > 1 else host.filename
        try:
            driver = _magic_of(os.open(top, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)).format
        except (OSError, LaminaError):
            driver = "FORMAT"
        why, format = "give its format", "FORMAT"
        try:
            found = _magic_of(self.granted().open_reference(name, referrer=host.path, what=what).fd)
        except (OSError, LaminaError):
            pass  # not granted, or not to be read: whoever names its format will hear of that
        else:
            format = found.matches[0] if len(found.matches) == 1 else "FORMAT" if found.matches else "raw"
            if len(found.matches) > 1:
                why = f"its magic is that of {' and of '.join(found.matches)}: give the right one"
            elif found.matches and format not in registry.names("format"):
                return f"its magic is that of {format}, and there is no driver for that yet"
            elif found.matches:
                why = f"if it is {format}, as its magic says"
            else:
                why = "if it is raw, since it has the magic of no format"
        spec = {"driver": driver, "file.filename": top, f"{f'{option}.' * max(len(visited), 1)}driver": format}
        from shlex import quote

        return f"{why}: --image-opts {quote(to_keyval(spec))}"

    def close(self) -> None:
        """Close what was opened for a node that then failed to open."""
        for child in reversed(self._opened):
            self.graph.close(child)
        self._opened.clear()

    def _keep(self, child: Child) -> Child:
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


def probe(storage: Child) -> detect.Detection:
    """What lies in `storage`, by its magic: the first and last bytes are read, and nothing is opened."""
    size = storage.node.size
    head = bytearray(min(size, detect.HEAD_BYTES))
    tail = bytearray(min(size, detect.TAIL_BYTES))
    storage.read_into(0, memoryview(head))
    storage.read_into(size - len(tail), memoryview(tail))
    return detect.detect(bytes(head), bytes(tail), size, path=storage.node.filename)


def _magic_of(fd: int) -> detect.Detection:
    """What lies in the file behind the descriptor `fd`, which is closed, by its magic."""
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        head = os.pread(fd, detect.HEAD_BYTES, 0)
        tail = os.pread(fd, detect.TAIL_BYTES, max(size - detect.TAIL_BYTES, 0))
    finally:
        os.close(fd)
    return detect.detect(head, tail, size)


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
