"""How users name a graph of nodes: names and option lists. Ground floor: no I/O.

Every spelling becomes one thing, the *nested options*: a dict of str to values, where a value may be such a dict or a
list. `parse_name` reads what stands where a file name can (a path, `json:{...}`, `blkdebug:CONFIG:IMAGE`, `nbd://...`),
`parse_keyval` reads `driver=qcow2,file.filename=disk.qcow2`. What a driver accepts of them is in its `schema.Schema`.
All errors are `OptionError`; all functions may run in many threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from os import PathLike, fspath
from typing import Any

from .errors import OptionError
from .limits import MAX_SIZE

#: Options nest at most this deep; a text that describes them has at most so many characters.
MAX_DEPTH = 32
MAX_TEXT = 1 << 20

_SIZE = r"\s*\+?(?:0x([0-9a-f]+)|([0-9]*)\.?([0-9]*)([bkmgtpe]?))"
SIZE_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}
_SIZE_HINT = "write bytes, alone or with k, M, G, T, P or E for powers of 1024 (512, 64k, 1.5G), or hex (0x200)"
_ABSENT: Any = object()


def parse_size(text: str, *, exact: bool = True) -> int:
    """The bytes that `text` says: `512`, `10b`, `64k`, `1.5G`, `0x200`; suffixes in either case are powers of 1024.

    A fraction that is not a whole number of bytes is refused; with `exact` off it is rounded to the nearest byte, as
    the drop-in command lines must. Negative sizes and those above 2**63 - 1 are refused.
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
            raise OptionError(f"the size {shown(text)} is not a whole number of bytes", hint="write the bytes in full")
        size += 2 * rest >= divisor
    if size > MAX_SIZE:
        raise OptionError(f"the size {shown(text)} is too large", hint=f"the largest is {MAX_SIZE}, or 8E - 1")
    return size


def parse_range(text: str) -> tuple[int, int]:
    """The range of bytes [start, end) that `text` says: `FROM-TO`, or `FROM-` for all from there, in sizes as `parse_size`
    reads them. A range that is empty is refused."""
    first, dash, last = text.strip().partition("-")
    start, end = parse_size(first), parse_size(last) if last else MAX_SIZE
    if not dash or start >= end:
        raise OptionError(f"{shown(text)} is not a range", hint="write FROM-TO, or FROM- for all from there: 0-1M, 8M-")
    return start, end


def format_size(size: int) -> str:
    """`size` bytes for people: `64 KiB`, `1.5 GiB`; three significant digits from 1 KiB on, exact below."""
    if size < 1024:
        return f"{size} B"
    # qemu-img's text to the letter, since scripts compare it: 1000 of a unit are 0.977 of the next.
    power = next((power for power in range(1, 6) if size / (1 << 10 * power) < 1000), 6)
    return f"{size / (1 << 10 * power):.3g} {'KMGTPE'[power - 1]}iB"


def flatten(options: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options as one level of dotted keys: `{"file": {"filename": "x"}}` -> `{"file.filename": "x"}`.

    Lists become numbers (`children.0`); an empty dict or list stays as it is. `nest` is the inverse.
    """
    return {".".join(path): value for path, value in _leaves(options)}


def nest(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with dotted keys, at any level, as nested options; below the top, keys 0, 1, 2, ... make a list.

    OptionError if a key is given twice, is both a value and a group, has an empty part, or if a number is left out.
    """
    return _build(_leaves(options))


def parse_keyval(text: str, *, implied: str | None = None, last_wins: bool = False) -> dict[str, Any]:
    """Nested options from `key=value,key=value`, all values str. Dots in keys nest, `,,` is a comma inside a value.

    `implied`: the key of a first item that has no `=`, as in `secret,id=s0`. Every other item without `=` is refused,
    and so is a key that is given twice, unless `last_wins`. Errors as `nest`.
    """
    values: dict[str, str] = {}
    for key, value in _items(text):
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
    """Whether an option list holds the bare word `help` or `?`, which asks what could be given."""
    return any(key is None and word in ("help", "?") for key, word in _items(text))


def to_keyval(options: Mapping[str, Any]) -> str:
    """Nested options as `key=value,...`, which `parse_keyval` reads; OptionError for what that spelling cannot say."""
    words = []
    for path, value in _leaves(options):
        key = ".".join(path)
        if isinstance(value, int):
            value = str(value) if not isinstance(value, bool) else "on" if value else "off"
        if not isinstance(value, str) or "," in key or "=" in key:
            raise OptionError(f"{shown(key)} = {shown(value)} cannot be key=value", hint="write it as json:{...}")
        words.append(f"{key}={value.replace(',', ',,')}")
    return ",".join(words)


def to_json_name(options: Mapping[str, Any]) -> str:
    """Nested options as the name `json:{...}`, ASCII only, which `parse_name` reads."""
    import json

    try:
        return "json:" + json.dumps(options, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError("these options cannot be written as JSON", hint=str(error)) from error


def parse_name(text: str) -> dict[str, Any]:
    """Nested options for the node that a name stands for. A plain path gives its storage, `{"driver": "file", ...}`.

    Known prefixes: `json:`, `blkdebug:CONFIG:IMAGE`, `blkverify:RAW:IMAGE`, `nbd:unix:PATH[:exportname=NAME]`,
    `nbd:HOST:PORT[:exportname=NAME]`, NBD URIs (`nbd://`, `nbds://`, `nbd+unix://`, ...: passed on as `uri`),
    `file:PATH`, `host_device:PATH`, `null:` and `null-co://`, both with `?size=SIZE`. As in the programs people know,
    another word before a colon, with no slash before it, is no path: such a file is named `./word:rest`. `-` is standard
    input or output, and refused here: a command that can stream asks before (a file of that name is `./-`).
    """
    return _parse_name(text, 1)


def path_in(name: str | PathLike[str], *, what: str = "a new image") -> str:
    """The path of the file that `name` stands for, where nothing but a file will do. In a str a prefix means what it means
    to `parse_name`; a `PathLike` is a path, whatever it looks like. `what`, for messages: what the file is to be."""
    if not isinstance(name, str):
        return fspath(name)
    options = parse_name(name)
    path = options.pop("filename", None)
    if options.pop("driver", "file") not in ("file", "host_device") or options or not isinstance(path, str):
        raise OptionError(f"{shown(name)} is not the name of a file, and cannot be {what}", hint="name a path")
    if not is_whole(path):
        raise OptionError(f"the file name {shown(path)} has half a character in it", hint="write whole characters")
    return path


def is_whole(text: str) -> bool:
    """Whether the system and peers can be given `text`: no lone surrogate, but for those that stand for bytes of names that
    are not UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def stored_name(name: str) -> str:
    """What an image stores for the file that `name` stands for: its path, and never a text that is read as anything else."""
    path = path_in(name, what="stored in an image as that of its backing file")
    word, colon, _ = path.partition(":")
    return f"./{path}" if colon and "/" not in word else path


def _parse_name(text: str, depth: int) -> dict[str, Any]:
    if len(text) > MAX_TEXT or depth > MAX_DEPTH:
        raise OptionError("the name is too long or nested too deeply")
    prefix, colon, rest = text.partition(":")
    if text == "-":
        hint = "name a file; one of that name is ./-"
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
            raise OptionError(f"{shown(text)} lacks a second colon before the image", hint=f"write {hint}")
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
            raise OptionError(f"a null device has no {shown(rest)}", hint="write null-co:// or null:?size=1G")
        return {"driver": "null", **({"size": query.removeprefix("?size=")} if query else {})}
    hint = "for a file of that name write ./NAME or file:NAME; the format is a separate option"
    raise OptionError(f"{shown(text)} names the protocol {shown(prefix)}, which is not there", hint=hint)


def _file(driver: str, path: str) -> dict[str, Any]:
    if not path or "\0" in path:
        raise OptionError(f"the file name {shown(path)} is empty, or holds a NUL character", hint="name a file")
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
        options = json.loads(text, object_pairs_hook=unique, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        hint = "strings are written in double quotes" if "'" in text else "write json:{...}, one JSON object"
        raise OptionError(f"the options after json: cannot be read: {clip(str(error))}", hint=hint) from error
    if not isinstance(options, dict):
        raise OptionError(f"after json: stands {shown(options)}, not an object", hint='write json:{"driver": ...}')
    return nest(options)


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
        hint = "write nbd:unix:PATH or nbd:HOST:PORT, either with :exportname=NAME after it, or a URI such as nbd://HOST/NAME"
        raise OptionError(f"{shown(text)} is not the address of an NBD server", hint=hint)
    return {"driver": "nbd", "server": server, **({"export": export} if colon else {})}


def _items(text: str) -> Iterator[tuple[str | None, str]]:
    """The items of an option list as (key, value); the key is None where there is no `=`."""
    if len(text) > MAX_TEXT:
        raise OptionError(f"the option list has {len(text)} characters", hint=f"at most {MAX_TEXT} are read")
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
        raise OptionError(f"the option name {shown(key)} has an empty part, or too many", hint="write file.filename")
    return parts


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is not a group, with its path; dots in keys count as levels. Empty groups are values."""
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
        there = group.get(path[-1], _ABSENT)
        if isinstance(there, dict) and isinstance(value, Mapping):
            continue
        if there is not _ABSENT:
            raise _conflict(path, path[-1])
        group[path[-1]] = {} if isinstance(value, Mapping) else value
    return {name: _with_lists(value, (name,)) for name, value in root.items()}


def _with_lists(value: Any, path: tuple[str, ...]) -> Any:
    """`value` with every group whose keys all are 0, 1, 2, ... turned into a list."""
    if not isinstance(value, dict) or not value:
        return value
    group = {name: _with_lists(item, (*path, name)) for name, item in value.items()}
    if not all(name.isdecimal() for name in group):
        return group
    items = [group.get(str(number), _ABSENT) for number in range(len(group))]
    if _ABSENT in items:
        missing = f"{shown('.'.join(path))} has no item {items.index(_ABSENT)}"
        raise OptionError(f"the list {missing}", hint="items are numbered 0, 1, 2, ...")
    return items


def _conflict(path: tuple[str, ...], part: str) -> OptionError:
    where, name = shown(".".join(path)), shown(part)
    return OptionError(f"{where} is given twice, or {name} is both a value and a group", hint="give each option once")


def clip(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def shown(value: Any) -> str:
    """`value` for an error message: quoted, control characters escaped, short."""
    try:
        return clip(repr(value[:100] if isinstance(value, str) else value))
    except ValueError:  # Python does not write out numbers of thousands of digits
        return "a number that is too long to be shown"
