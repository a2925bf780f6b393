"""Parsing of names and option lists, with which users describe a graph of nodes. Base layer, without I/O.

Every notation is parsed to *nested options*: a dict whose values may be dicts and lists. `parse_name` parses names in place
of a file name (a path, `json:{...}`, `blkdebug:CONFIG:IMAGE`, `nbd://...`), and `parse_keyval` parses lists such as
`driver=qcow2,file.filename=disk.qcow2`. The `schema.Schema` of a driver checks the result. All errors are `OptionError`; all
functions are thread-safe.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from operator import index
from os import PathLike, fspath
from typing import Any, SupportsIndex

from .errors import OptionError
from .limits import MAX_SIZE
from .peer_options import DRIVERS

#: The maximum nesting depth of options, and the maximum number of characters of a text that describes them.
MAX_DEPTH = 32
MAX_TEXT = 1 << 20

#: The words in a list of options that ask for the options there are.
HELP = ("help", "?")
#: Levels of nesting of options in JSON.
_DEEPEST = 100

_SIZE = r"\s*\+?(?:0x([0-9a-f]+)|([0-9]*)\.?([0-9]*)([bkmgtpe]?))"
SIZE_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}
_SIZE_HINT = "write bytes, alone or with k, M, G, T, P or E for powers of 1024 (512, 64k, 1.5G), or hex (0x200)"
_MAX_SECONDS = 100_000
_ABSENT: Any = object()


def parse_size(text: str, *, exact: bool = True) -> int:
    """Parse a size in bytes: `512`, `10b`, `64k`, `1.5G`, `0x200`. Suffixes, in either case, are powers of 1024.

    A fractional number of bytes is refused. Without `exact` it is rounded to the nearest byte, as qemu-io does. Negative
    sizes and sizes above 2**63 - 1 are refused.
    """
    import re

    found = re.fullmatch(_SIZE, text, re.IGNORECASE | re.ASCII) if len(text) <= 64 else None
    if found is None or not (found[1] or found[2] or found[3]):
        raise OptionError(f"{shown(text)} is not a size", hint=_SIZE_HINT)
    if found[1]:
        size = int(found[1], 16)
    else:
        unit, divisor = SIZE_UNITS[found[4].lower()], 10 ** len(found[3])
        size, rest = divmod(int(found[2] + found[3]) * unit, divisor)
        if rest and (exact or unit == 1):
            raise OptionError(f"the size {shown(text)} is not a whole number of bytes", hint="write the size in bytes")
        size += 2 * rest >= divisor
    if size > MAX_SIZE:
        raise OptionError(f"the size {shown(text)} is too large", hint=f"the largest is {MAX_SIZE}, or 8E - 1")
    return size


def size_of(value: SupportsIndex | str, what: str = "the size") -> int:
    """A size that a program gives: a number of bytes, or text as for `parse_size` ("10G"). `what`: the name of the
    option, for the OptionError."""
    if isinstance(value, str):
        return parse_size(value)
    try:
        number = index(value)  # an integer of numpy, too: from the columns of Extents
    except TypeError:
        number = -1
    if isinstance(value, bool) or not 0 <= number <= MAX_SIZE:
        raise OptionError(f"{what} is {shown(value)}", hint=_SIZE_HINT)
    return number


def parse_range(text: str) -> tuple[int, int]:
    """Parse a range of bytes [start, end): `FROM-TO`, or `FROM-` without an upper bound, in sizes as `parse_size` reads them.
    An empty range is refused."""
    first, dash, last = text.strip().partition("-")
    start, end = parse_size(first), parse_size(last) if last else MAX_SIZE
    if not dash or start >= end:
        raise OptionError(f"{shown(text)} is not a range", hint="write FROM-TO, or FROM- without an end: 0-1M, 8M-")
    return start, end


def parse_seconds(value: object, what: str) -> float:
    """Parse a number of seconds, as a number or text, with up to six digits of a fraction, up to `_MAX_SECONDS`. `what`: the
    name of the option, for the OptionError."""
    text = str(value)
    whole, _, fraction = text.partition(".")
    digits = (whole + fraction).isascii() and (whole + fraction).isdigit() and whole != "" and len(whole) <= 6
    if not digits or len(fraction) > 6 or float(text) > _MAX_SECONDS or isinstance(value, bool):
        hint = f"it is a number of seconds, such as 5 or 0.5, up to {_MAX_SECONDS}; 0: no limit"
        raise OptionError(f"{what} is {shown(text)}", hint=hint)
    return float(text)


def format_size(size: int) -> str:
    """A readable size: `64 KiB`, `1.5 GiB`. Sizes below 1 KiB are exact, others have three significant digits."""
    if size < 1024:
        return f"{size} B"
    # Exactly the text of qemu-img, since scripts compare it: 1000 KiB is written as 0.977 MiB.
    power = next((power for power in range(1, 6) if size / (1 << 10 * power) < 1000), 6)
    return f"{size / (1 << 10 * power):.3g} {'KMGTPE'[power - 1]}iB"


def flatten(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert nested options to one level of dotted keys: `{"file": {"filename": "x"}}` -> `{"file.filename": "x"}`.

    Items of lists get numbers (`children.0`); an empty dict or list stays a value. `nest` is the inverse.
    """
    return {".".join(path): value for path, value in _leaves(options)}


def nest(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert options with dotted keys, at any level, to nested options. Groups with the keys 0, 1, 2, ... become lists.

    Raises OptionError for a duplicate key, a key that is both a value and a group, an empty part of a key, and a missing
    number of a list.
    """
    return _build(_leaves(options))


def parse_keyval(
    text: str, *, implied: str | None = None, last_wins: bool = False, skip: Collection[str] = ()
) -> dict[str, Any]:
    """Parse `key=value,key=value` to nested options with string values. Keys may be dotted; `,,` is a comma in a value.

    `implied`: the key of a first item without `=`, as in `secret,id=s0`. Items without `=` that are in `skip` are left out,
    others are refused. With `last_wins` the last of several equal keys counts; otherwise duplicate keys are refused. Raises
    as `nest` does.
    """
    values: dict[str, str] = {}
    for key, value in _items(text):
        if key is None and value in skip:
            continue
        if key is None:
            if implied is None:
                raise OptionError(f"{shown(value)} has no value", hint="write key=value; ,, is a comma in a value")
            key = implied
        implied = None
        if key in values and not last_wins:
            raise OptionError(f"{shown(key)} is given twice", hint="give it once")
        values[key] = value
    return _build((_split(key), value) for key, value in values.items())


def asks_for_help(text: str) -> bool:
    """Whether an option list contains the word `help` or `?`, a request for the list of options."""
    return any(key is None and word in HELP for key, word in _items(text))


def to_keyval(options: Mapping[str, Any]) -> str:
    """Format nested options as `key=value,...` for `parse_keyval`. Raises OptionError for values without such a form."""
    words = []
    for path, value in _leaves(options):
        key = ".".join(path)
        if isinstance(value, int):
            value = str(value) if not isinstance(value, bool) else "on" if value else "off"
        if not isinstance(value, str) or "," in key or "=" in key:
            raise OptionError(f"{shown(key)} = {shown(value)} cannot be written as key=value", hint="write json:{...}")
        words.append(f"{key}={value.replace(',', ',,')}")
    return ",".join(words)


def to_json_name(options: Mapping[str, Any]) -> str:
    """Format nested options as the name `json:{...}`, in ASCII, for `parse_name`."""
    import json

    try:
        return "json:" + json.dumps(options, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError("these options cannot be written as JSON", hint=str(error)) from error


def parse_name(text: str) -> dict[str, Any]:
    """Parse the name of a node to nested options. A plain path gives a storage node, `{"driver": "file", ...}`.

    Known prefixes: `json:`, `blkdebug:CONFIG:IMAGE`, `blkverify:RAW:IMAGE`, `nbd:unix:PATH[:exportname=NAME]`,
    `nbd:HOST:PORT[:exportname=NAME]`, NBD URIs (`nbd://`, `nbds://`, `nbd+unix://`, ...: passed on as `uri`),
    `file:PATH`, `host_device:PATH`, `null:` and `null-co://`, both with `?size=SIZE`. As in QEMU, any other word before a
    colon and before the first slash is an unknown protocol; a file of such a name is written `./word:rest`. `-` means
    standard input or output and is refused here, since commands that stream handle it before (the file is `./-`).
    """
    return _parse_name(text, 1)


def path_in(name: str | PathLike[str], *, what: str = "a new image") -> str:
    """The path of the file that `name` denotes. Raises OptionError for every other kind of node. A string may have a prefix
    of `parse_name`; a `PathLike` is always a path. `what`: the purpose of the file, for messages."""
    if not isinstance(name, str):
        return file_path(name)
    options = parse_name(name)
    path = options.pop("filename", None)
    if options.pop("driver", "file") not in ("file", "host_device") or options or not isinstance(path, str):
        raise OptionError(f"{shown(name)} is not the name of a file, and cannot be {what}", hint="name a path")
    return file_path(path)


def file_path(name: str | PathLike[str]) -> str:
    """`name`, the path of a file, as text. Raises OptionError if no file can have it: before a system call, which would raise
    ValueError."""
    path = fspath(name) if isinstance(name, PathLike) else name
    if not isinstance(path, str):
        raise OptionError(f"{shown(name)} is no path", hint="give text, or a path object of text (os.fsdecode)")
    if not path or "\0" in path:
        raise OptionError(f"the file name {shown(path)} is empty or contains a NUL character", hint="name a file")
    if not is_encodable(path):
        raise OptionError(f"the file name {shown(path)} contains a lone surrogate", hint="write the whole character")
    return path


def is_encodable(text: str) -> bool:
    """Whether `text` has a form in bytes, for system calls and NBD peers. Lone surrogates have none, except those with which
    Python represents the bytes of file names that are not UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def stored_name(name: str) -> str:
    """The text by which an image refers to the file `name`: its path, with `./` before it if a prefix could be read in it."""
    path = path_in(name, what="stored as the name of a backing file")
    word, colon, _ = path.partition(":")
    return f"./{path}" if colon and "/" not in word else path


def join_paths(paths: Iterable[str]) -> str:
    r"""The paths with colons between them, for `split_paths`: `\:` and `\\` are a colon and a backslash inside one."""
    return ":".join(path.replace("\\", r"\\").replace(":", r"\:") for path in paths)


def split_paths(text: str) -> list[str]:
    r"""`text` split at its colons; `\:` and `\\` stand for a colon and a backslash. The inverse of `join_paths`."""
    paths = [""]
    letters = iter(text)
    for letter in letters:
        if letter == "\\":
            following = next(letters, "")
            paths[-1] += following if following in (":", "\\") else letter + following
        elif letter == ":":
            paths.append("")
        else:
            paths[-1] += letter
    return paths


def _parse_name(text: str, depth: int) -> dict[str, Any]:
    if len(text) > MAX_TEXT or depth > MAX_DEPTH:
        raise OptionError("the name is too long or nested too deeply")
    prefix, colon, rest = text.partition(":")
    if text == "-":
        hint = "name a file; write ./- for a file named -"
        raise OptionError('"-" is standard input or output, which cannot be used here', hint=hint)
    if not colon or "/" in prefix:
        return _file("file", text)
    if prefix == "json":
        return _json_name(rest)
    if prefix in ("file", "host_device"):
        return _file(prefix, rest)
    if prefix in ("blkdebug", "blkverify"):
        first, colon, image = rest.partition(":")
        if not colon:
            hint = "blkdebug:CONFIG:IMAGE, where CONFIG may be empty" if prefix == "blkdebug" else "blkverify:RAW:IMAGE"
            raise OptionError(f"{shown(text)} has no second colon before the image", hint=f"write {hint}")
        inner = _parse_name(image, depth + 1)
        if prefix == "blkverify":
            return {"driver": prefix, "raw": _parse_name(first, depth + 1), "test": inner}
        return {"driver": prefix, "config": first, "image": inner} if first else {"driver": prefix, "image": inner}
    scheme = prefix.lower()  # of a URI
    if scheme in ("nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix"):
        return {"driver": "nbd", "uri": text} if rest.startswith("//") else _nbd_name(text, scheme, rest)
    if prefix in ("null", "null-co", "null-aio"):
        query = rest.removeprefix("//")
        if query and not query.startswith("?size="):
            raise OptionError(f"a null device has no option {shown(rest)}", hint="write null-co:// or null:?size=1G")
        return {"driver": "null", **({"size": query.removeprefix("?size=")} if query else {})}
    if scheme in DRIVERS:
        text = f"{shown(text)} names the protocol {prefix}, which is not supported"
        raise OptionError(text, hint=f"{DRIVERS[scheme]}; a file of that name is ./NAME")
    hint = "for a file of that name write ./NAME or file:NAME; the format is a separate option"
    raise OptionError(f"{shown(text)} names the protocol {shown(prefix)}, which is unknown", hint=hint)


def _file(driver: str, path: str) -> dict[str, Any]:
    if not path or "\0" in path:
        raise OptionError(f"the file name {shown(path)} is empty or contains a NUL character", hint="name a file")
    return {"driver": driver, "filename": path}


def _json_name(text: str) -> dict[str, Any]:
    import json

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is given twice in one object")
        return found

    def finite(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        _require_flat(text)
        options = json.loads(text, object_pairs_hook=unique, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        hint = "strings are written in double quotes" if "'" in text else "write json:{...}, one JSON object"
        raise OptionError(f"the options after json: cannot be read: {clip(str(error))}", hint=hint) from error
    if not isinstance(options, dict):
        raise OptionError(f"the text after json: is {shown(options)}, not an object", hint='write json:{"driver": ...}')
    return nest(options)


def _require_flat(text: str) -> None:
    """Raise ValueError if this JSON is nested more than `_DEEPEST` levels deep. (Near the limit of recursion Python's own
    callbacks fail, and say so on standard error.)"""
    import re

    depth = 0
    for mark in re.findall(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text, re.DOTALL):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark, 0)
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} levels deep")


def _nbd_name(text: str, prefix: str, rest: str) -> dict[str, Any]:
    address, colon, export = rest.partition(":exportname=")
    kind, _, path = address.partition(":")
    if kind == "unix":
        server = {"type": "unix", "path": path}
    elif address.startswith("["):
        host, _, port = address[1:].partition("]:")
        server = {"type": "inet", "host": host, "port": port}
    else:
        server = {"type": "inet", "host": kind, "port": path}
    if prefix != "nbd" or not all(server.values()) or ":" in server.get("port", ""):
        hint = (
            "write nbd:unix:PATH or nbd:HOST:PORT, optionally with :exportname=NAME, or a URI such as nbd://HOST/NAME"
        )
        raise OptionError(f"{shown(text)} is not the address of an NBD server", hint=hint)
    return {"driver": "nbd", "server": server, **({"export": export} if colon else {})}


def _items(text: str) -> Iterator[tuple[str | None, str]]:
    """The items of an option list as (key, value); the key of an item without `=` is None."""
    if len(text) > MAX_TEXT:
        raise OptionError(f"the option list has {len(text)} characters", hint=f"the limit is {MAX_TEXT}")
    at = 0
    while at < len(text):
        comma = text.find(",", at)
        equal = text.find("=", at, comma if comma >= 0 else len(text))
        key = None if equal < 0 else text[at:equal]
        at = at if key is None else equal + 1
        parts = []
        while True:
            comma = text.find(",", at)
            comma = len(text) if comma < 0 else comma
            doubled = text.startswith(",,", comma)
            parts.append(text[at : comma + doubled])
            at = comma + 1 + doubled
            if not doubled:
                break
        yield key, "".join(parts)


def _split(key: Any) -> tuple[str, ...]:
    parts = tuple(key.split(".", MAX_DEPTH)) if isinstance(key, str) else ("",)
    if not all(parts) or len(parts) > MAX_DEPTH:
        raise OptionError(
            f"the option name {shown(key)} has an empty part or too many parts", hint="write file.filename"
        )
    return parts


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each value that is not a group, with its path. Dots in keys separate levels; an empty group is a value."""
    if len(path) > MAX_DEPTH:
        raise OptionError(f"{shown('.'.join(path))} is nested too deeply", hint=f"the limit is {MAX_DEPTH} levels")
    if isinstance(value, Mapping) and (value or not path):
        for key, item in value.items():
            yield from _leaves(item, path + _split(key))
    elif isinstance(value, list | tuple) and value:
        for number, item in enumerate(value):
            yield from _leaves(item, (*path, str(number)))
    else:
        yield path, value


def _build(leaves: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, value in leaves:
        group: Any = root
        for part in path[:-1]:
            group = group.setdefault(part, {})
            if not isinstance(group, dict):
                raise _conflict(path, part)
        earlier = group.get(path[-1], _ABSENT)
        if isinstance(earlier, dict) and isinstance(value, Mapping):
            continue
        if earlier is not _ABSENT:
            raise _conflict(path, path[-1])
        group[path[-1]] = {} if isinstance(value, Mapping) else value
    return {name: _with_lists(value, (name,)) for name, value in root.items()}


def _with_lists(value: Any, path: tuple[str, ...]) -> Any:
    """`value` with a list in place of every group whose keys are 0, 1, 2, ..."""
    if not isinstance(value, dict) or not value:
        return value
    group = {name: _with_lists(item, (*path, name)) for name, item in value.items()}
    if not all(name.isdecimal() for name in group):
        return group
    items = [group.get(str(number), _ABSENT) for number in range(len(group))]
    if _ABSENT in items:
        missing = f"{shown('.'.join(path))} has no item {items.index(_ABSENT)}"
        raise OptionError(f"the list {missing}", hint="number the items 0, 1, 2, ...")
    return items


def _conflict(path: tuple[str, ...], part: str) -> OptionError:
    where, name = shown(".".join(path)), shown(part)
    return OptionError(f"{where} is given twice, or {name} is both a value and a group", hint="give each option once")


def clip(text: str) -> str:
    """`text`, shortened to 100 characters."""
    return text if len(text) <= 100 else f"{text[:97]}..."


def shown(value: Any) -> str:
    """`value` for an error message: quoted, with escaped control characters, and shortened."""
    try:
        return clip(repr(value[:100] if isinstance(value, str) else value))
    except ValueError:  # Python refuses to format integers of thousands of digits
        return "a number with too many digits"
