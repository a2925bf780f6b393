"""The image to open: its name or options, format, cache mode and discard mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import registry
from ...errors import OptionError, UnsupportedFeature
from ...limits import DEFAULT_BUDGET, Budget
from ...options import parse_name

if TYPE_CHECKING:
    from ...image import Image
    from ...node import Node
    from ...policy import Policy


class Cache(NamedTuple):
    """A cache mode: whether requests bypass the page cache, whether each write is a FUA write, and whether the command
    `flush` is ignored."""

    direct: bool = False
    stable: bool = False
    unsafe: bool = False


CACHE_MODES = {
    "writeback": Cache(),
    "none": Cache(direct=True),
    "off": Cache(direct=True),
    "writethrough": Cache(stable=True),
    "directsync": Cache(direct=True, stable=True),
    "unsafe": Cache(unsafe=True),
}
#: Whether discards are executed.
DISCARD_MODES = {"unmap": True, "on": True, "ignore": False, "off": False}
#: Modes of qemu-io for submitting requests. Lamina always uses threads, so they make no difference.
AIO_MODES = {"threads": None, "native": None, "io_uring": None}


def choose(modes: Mapping[str, Any], what: str, name: str) -> str:
    """Return `name`, or raise OptionError if it is not one of `modes`."""
    if name not in modes:
        raise OptionError(f"there is no {what} mode {name!r}", hint="use " + ", ".join(modes))
    return name


@dataclass(frozen=True)
class Target:
    """The options for opening an image. `name` is a name for `parse_name`; nested `options` take precedence over it."""

    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    format: str | None = None
    read_only: bool = False
    cache: str = "writethrough"
    discard: str = "unmap"
    force_share: bool = False
    snapshot: bool = False
    copy_on_read: bool = False
    references: Policy | None = None
    budget: Budget = DEFAULT_BUDGET

    @property
    def caching(self) -> Cache:
        return CACHE_MODES[self.cache]

    @property
    def discards(self) -> bool:
        return DISCARD_MODES[self.discard]

    def open(self) -> Image:
        """Open the image. Without a format it is detected; an image whose format was only guessed to be raw is not opened for
        writing."""
        from ...api import open

        if self.force_share and not self.read_only:
            raise OptionError("-U (without locks) needs -r (read-only)", path=self.name, hint="add -r")
        if self.copy_on_read and self.read_only:
            raise OptionError("-C (copy on read) needs a writable image", path=self.name, hint="omit -C or -r")
        # "probe" detects the format, unless the options contain a driver.
        image = open(
            self.spec(),
            format=self.format or "probe",
            read_only=self.read_only,
            references=self.references,
            budget=self.budget,
            force_share=self.force_share,
            snapshot=self.snapshot,
        )
        try:
            if self.copy_on_read:
                with image.edit() as edit:
                    edit.insert("copy_on_read")
        except BaseException:
            image.close()
            raise
        return image

    def spec(self) -> dict[str, Any]:
        """The nested options of the graph, without the format."""
        spec = _deep_copy(self.options)
        if self.name is not None:
            named = parse_name(self.name)
            driver = spec.get("driver", self.format)
            kind = "format" if driver is None else registry.entry(driver).kind
            if self.name.startswith("json:") or kind == "storage":
                spec = {**named, **spec}
            else:
                spec.setdefault("file" if kind == "format" else "image", named)
        if self.caching.direct:
            _go_direct(spec)
        return spec

    @staticmethod
    def require_durable(node: Node) -> None:
        """Raise UnsupportedFeature for a graph with a node in memory, whose data would be lost by a close."""
        if node.driver == "memory":
            raise UnsupportedFeature(
                "a node in memory cannot be opened again, since its data would be lost", node=node.name
            )
        for child in node.children.values():
            Target.require_durable(child.node)


def _deep_copy(options: Mapping[str, Any]) -> dict[str, Any]:
    def copied(value: Any) -> Any:
        return _deep_copy(value) if isinstance(value, Mapping) else value

    return {
        key: [copied(each) for each in value] if isinstance(value, list) else copied(value)
        for key, value in options.items()
    }


def merged(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with `changes`, both nested."""
    result = _deep_copy(options)
    for key, value in changes.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def _go_direct(spec: dict[str, Any]) -> None:
    """Set `cache.direct` for every file in the options that has no `cache.direct` of its own."""
    driver = spec.get("driver", "file")
    if "filename" in spec and driver in ("file", "host_device"):
        spec["cache"] = {"direct": True, **spec.get("cache", {})}
    elif "filename" in spec and "file" not in spec:
        spec["file"] = {"driver": "file", "filename": spec.pop("filename")}
    for value in spec.values():
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, dict) and child is not spec.get("cache"):
                _go_direct(child)
