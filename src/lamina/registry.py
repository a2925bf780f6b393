"""Drivers by name.

A table from the name of a storage, format or filter to the class that implements it, as text: "module:Class". A driver is
imported when it is looked up, so a command loads only the drivers that it uses. Base layer; storage, formats and filters
never import one another, and find each other through `lookup`.

Users add drivers with `register`, or by installing a package with an entry point in the group "lamina.drivers" whose name is
the kind, a dot and the name of the driver:

    [project.entry-points."lamina.drivers"]
    "filter.slow" = "example.slow:Slow"
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from . import detection
from .errors import OptionError, UnsupportedFeature, printable
from .options import shown
from .peer_options import DRIVERS

#: What a driver may be, as a type and as values.
Kind = Literal["storage", "format", "filter"]
KINDS: tuple[Kind, ...] = ("storage", "format", "filter")
#: The group of entry points in which packages name their drivers.
ENTRY_POINTS = "lamina.drivers"

_FROM_PACKAGE = "from an installed package"
# Distributions whose name differs from that of their module.
_DISTRIBUTIONS = {"backports": "backports.zstd", "zlib_ng": "zlib-ng"}


class Entry(NamedTuple):
    """One driver: its name, its kind, its class ("module:Class"), a description of one line, and its aliases."""

    name: str
    kind: Kind
    target: str
    summary: str
    aliases: tuple[str, ...] = ()

    @property
    def probed(self) -> bool:
        """Whether `detect` can detect it in a file."""
        return self.name in detection.FORMATS


_TABLE = (
    Entry("file", "storage", "lamina.storage.file:FileStorage", "a file or block device", ("host_device",)),
    Entry("memory", "storage", "lamina.storage.memory:MemoryStorage", "a disk in memory, discarded at close"),
    Entry(
        "null", "storage", "lamina.storage.null:NullStorage", "stores nothing, reads as zeros", ("null-co", "null-aio")
    ),
    Entry("nbd", "storage", "lamina.nbd.node:NbdStorage", "an export of an NBD server"),
    Entry("raw", "format", "lamina.formats.raw:Raw", "raw bytes"),
    Entry("qcow2", "format", "lamina.formats.qcow2.driver:Qcow2", "QEMU copy-on-write, versions 2 and 3"),
    Entry("blkdebug", "filter", "lamina.filters.blkdebug:Blkdebug", "injects errors at events"),
    Entry("blkverify", "filter", "lamina.filters.blkverify:Blkverify", "compares every read with another image"),
    Entry("cache", "filter", "lamina.filters.cache:Cache", "a bounded cache of blocks"),
    Entry("compress", "filter", "lamina.filters.compress:Compress", "stores written data compressed"),
    Entry("concat", "filter", "lamina.filters.concat:Concat", "several disks, one after the other"),
    Entry(
        "copy_on_read",
        "filter",
        "lamina.filters.copy_on_read:CopyOnRead",
        "copies data read from a backing image",
        ("copy-on-read",),
    ),
    Entry("cow", "filter", "lamina.filters.cow:Cow", "keeps changes in memory (copy-on-write)"),
    Entry("delay", "filter", "lamina.filters.delay:Delay", "adds latency to operations"),
    Entry("faults", "filter", "lamina.filters.faults:Faults", "injects faults by rules and a seed"),
    Entry("log", "filter", "lamina.filters.log:Log", "logs every request in a line"),
    Entry(
        "logwrites",
        "filter",
        "lamina.filters.logwrites:LogWrites",
        "logs every write for replay",
        ("blklogwrites",),
    ),
    Entry("noextents", "filter", "lamina.filters.noextents:NoExtents", "reports everything as data"),
    Entry("nodiscard", "filter", "lamina.filters.nodiscard:NoDiscard", "refuses discards"),
    Entry("nozero", "filter", "lamina.filters.nozero:NoZero", "writes zeros as data"),
    Entry("blocksize", "filter", "lamina.filters.blocksize:BlockSize", "sets a block size"),
    Entry("offset", "filter", "lamina.filters.offset:Offset", "a range of another node"),
    Entry("partition", "filter", "lamina.filters.partition:Partition", "one partition of a disk"),
    Entry("preallocate", "filter", "lamina.filters.preallocate:Preallocate", "extends files in large steps"),
    Entry("protect", "filter", "lamina.filters.protect:Protect", "refuses writes to given ranges"),
    Entry("quorum", "filter", "lamina.filters.quorum:Quorum", "several copies with a vote"),
    Entry("readonly", "filter", "lamina.filters.readonly:ReadOnlyFilter", "refuses every change"),
    Entry("retry", "filter", "lamina.filters.retry:Retry", "repeats failed requests"),
    Entry("stats", "filter", "lamina.filters.stats:Stats", "counts and times requests"),
    Entry("throttle", "filter", "lamina.filters.throttle:Throttle", "limits operations and bytes per second"),
    Entry("truncate", "filter", "lamina.filters.truncate:Truncate", "another size, fixed or rounded"),
)

_entries: dict[str, Entry] = {entry.name: entry for entry in _TABLE}
_aliases: dict[str, str] = {alias: entry.name for entry in _TABLE for alias in entry.aliases}


def names(kind: Kind | None = None) -> tuple[str, ...]:
    """The names of all drivers in the table, or of one kind, in its order and without aliases."""
    return tuple(name for name, entry in _entries.items() if kind is None or entry.kind == kind)


def add_installed() -> None:
    """Add the drivers of installed packages to the table, as `entry` does when it looks for one. None is imported. A name
    that several packages have, or that is taken, is left out: `entry` reports it to those who use it."""
    offers: dict[str, set[tuple[Kind, str]]] = {}
    for point, target in _installed_points():
        kind, _, name = point.partition(".")
        if kind in KINDS:
            offers.setdefault(name, set()).add((kind, target))
    for name, found in offers.items():
        if len(found) == 1 and name not in _entries and name not in _aliases:
            ((kind, target),) = found
            with suppress(OptionError):  # its values are malformed
                register(name, kind, target, _FROM_PACKAGE)


def entry(name: str, kind: Kind | None = None, *, from_image: bool = False) -> Entry:
    """The entry for `name`, which may be an alias; the driver is not imported.

    `kind`: the required kind. A caller that got `name` from an image sets it, so that the image cannot choose a filter.
    `from_image`: the name comes from an image, so only drivers of Lamina are found: an image cannot choose which installed
    package is imported. Raises UnsupportedFeature for a known format without a driver, OptionError for any other name.
    """
    if not isinstance(name, str):  # of options that a program gives
        raise OptionError(f"driver is {shown(name)}, not a name")
    found = _entries.get(_aliases.get(name, name))
    if from_image and found is not None and found not in _TABLE:
        found = None
    if found is None and not from_image:
        found = _installed(name)
    if found is None:
        raise _unknown(name, kind)
    if kind is not None and found.kind != kind:
        raise OptionError(f'"{printable(name)}" is a {found.kind}, and a {kind} is needed here')
    return found


def lookup(name: str, kind: Kind | None = None, *, from_image: bool = False) -> type[Any]:
    """Import the class of the driver `name`, which may be an alias. `from_image` as in `entry`.

    Raises the errors of `entry`, and UnsupportedFeature if a package that the driver needs is not installed.
    """
    return _load(entry(name, kind, from_image=from_image))


def register(name: str, kind: Kind, target: str, summary: str, aliases: tuple[str, ...] = ()) -> Entry:
    """Add a driver; `target` is "module:Class". Raises OptionError if the name is taken or a value is malformed.

    A second registration with the same values has no effect. A driver cannot replace another one: a name has one meaning in
    the whole process.
    """
    new = Entry(name, kind, target, summary, tuple(aliases))
    if _entries.get(name) == new:
        return new
    if kind not in KINDS:
        raise OptionError(f'"{printable(str(kind))}" is not a kind of driver', hint=f"use one of {', '.join(KINDS)}")
    module, _, attribute = target.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise OptionError(f'"{printable(target)}" does not name a class', hint="write it as package.module:Class")
    for word in (name, *new.aliases):
        if not word or not word.isprintable() or any(mark in word for mark in " .,:=/"):
            raise OptionError(f'"{printable(word)}" is not a valid name of a driver')
        if word in _entries or word in _aliases:
            raise OptionError(f'there is already a driver with the name "{word}"')
    _entries[name] = new
    _aliases.update(dict.fromkeys(new.aliases, name))
    return new


def _load(found: Entry) -> type[Any]:
    from importlib import import_module

    module, _, attribute = found.target.partition(":")
    try:
        driver = getattr(import_module(module), attribute, None)
    except ImportError as error:
        raise _not_importable(found, module, error) from error
    if not isinstance(driver, type):
        raise OptionError(f'the {found.kind} driver "{found.name}" is not a class: {found.target}')
    return driver


def _not_importable(found: Entry, module: str, error: ImportError) -> UnsupportedFeature:
    title = f'the {found.kind} driver "{found.name}"'
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if not missing:
        return UnsupportedFeature(f"{title} cannot be imported: {printable(str(error))}")
    if module == missing or module.startswith(missing + "."):
        return UnsupportedFeature(f"{title} is not part of this installation: there is no module {missing}")
    top = missing.partition(".")[0]
    return UnsupportedFeature(
        f"{title} needs the Python module {missing}, which is not installed",
        hint=f"install it, for example: python -m pip install {_DISTRIBUTIONS.get(top, top)}",
    )


def _installed(name: str) -> Entry | None:
    """Add the driver `name` of an installed package to the table; None if no package has one."""
    offers = {(kind, value) for point, value in _installed_points() for kind in KINDS if point == f"{kind}.{name}"}
    if not offers:
        return None
    if len(offers) > 1:
        targets = ", ".join(sorted(target for _, target in offers))
        raise OptionError(f'several installed packages have a driver with the name "{printable(name)}": {targets}')
    ((kind, target),) = offers
    return register(name, kind, target, _FROM_PACKAGE)


def _installed_points() -> Iterator[tuple[str, str]]:
    """(name, target) of every entry point of our group. The current directory does not count: Python searches it first after
    `python -m` and `python -c`, and any user who can write there could add a driver."""
    from importlib.metadata import distributions

    seen: set[str] = set()
    for package in distributions(path=_search_path()):
        # If a package is found twice, the first one counts, as for imports.
        name = str(package.metadata["Name"]).lower().replace("-", "_")
        if name not in seen:
            seen.add(name)
            yield from ((point.name, point.value) for point in package.entry_points.select(group=ENTRY_POINTS))


def _search_path() -> list[str]:
    """`sys.path` without the current directory, which Python itself added as its first item."""
    first, *rest = sys.path or [""]
    try:
        here = not sys.flags.safe_path and os.path.samefile(first or ".", ".")
    except OSError:  # one of them no longer exists
        here = False
    return [path for path in ([] if here else [first]) + rest if path]


def _unknown(name: str, kind: Kind | None) -> OptionError | UnsupportedFeature:
    known = detection.canonical(name)
    if known in detection.FORMATS and kind in (None, "format"):
        return UnsupportedFeature(
            f"the format {known} ({detection.FORMATS[known].summary}) has no driver",
            hint=f"formats with a driver: {', '.join(names('format'))}",
        )
    if name in DRIVERS and kind != "filter":
        return UnsupportedFeature(f"the driver {name} of the reference tools is not supported", hint=DRIVERS[name])
    from difflib import get_close_matches

    choices = [*names(kind), *(alias for alias, of in _aliases.items() if kind in (None, _entries[of].kind))]
    near = get_close_matches(name[:64], choices, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names(kind))}"
    return OptionError(f'there is no {kind or "driver"} with the name "{printable(name[:64])}"', hint=hint)
