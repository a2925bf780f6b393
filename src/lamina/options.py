"""How users name a graph of nodes: names, option lists, and the typed options of each driver. Ground floor: no I/O.

Every spelling becomes one thing, the *nested options*: a dict of str to values, where a value may be such a dict or a
list. `parse_name` reads what stands where a file name can (a path, `json:{...}`, `blkdebug:CONFIG:IMAGE`, `nbd://...`),
`parse_keyval` reads `driver=qcow2,file.filename=disk.qcow2`. What a driver accepts is a `Schema`, which makes typed
values of nested options and prints `-o help`. All errors are `OptionError`; all functions may run in many threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .errors import OptionError
from .limits import MAX_SIZE

#: Options nest at most this deep; a text that describes them has at most so many characters.
MAX_DEPTH = 32
MAX_TEXT = 1 << 20

_SIZE = r"\s*\+?(?:0x([0-9a-f]+)|([0-9]*)\.?([0-9]*)([bkmgtpe]?))"
_INT = r"[+-]?(0|[1-9][0-9]{0,31}|0[xX][0-9a-fA-F]{1,32})"  # no leading zero: it means octal to some programs
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}
_SIZE_HINT = "write bytes, alone or with k, M, G, T, P or E for powers of 1024 (512, 64k, 1.5G), or hex (0x200)"
_TAKES = {"str": "text", "int": "a whole number", "size": "a size", "bool": "on or off", "node": "a name, or options"}
_ABSENT: Any = object()
_BOOLS = {"on": True, "yes": True, "true": True, "y": True, "off": False, "no": False, "false": False, "n": False}


def parse_size(text: str, *, exact: bool = True) -> int:
    """The bytes that `text` says: `512`, `10b`, `64k`, `1.5G`, `0x200`; suffixes in either case are powers of 1024.

    A fraction that is not a whole number of bytes is refused; with `exact` off it is rounded to the nearest byte, as
    the drop-in command lines must. Negative sizes and those above 2**63 - 1 are refused.
    """
    import re

    found = re.fullmatch(_SIZE, text, re.IGNORECASE | re.ASCII) if len(text) <= 64 else None
    if found is None or not (found[1] or found[2] or found[3]):
        raise OptionError(f"{_shown(text)} is not a size", hint=_SIZE_HINT)
    if found[1]:
        size = int(found[1], 16)
    else:
        unit, divisor = _UNITS[found[4].lower()], 10 ** len(found[3])
        size, rest = divmod(int(found[2] + found[3]) * unit, divisor)
        if rest and (exact or unit == 1):
            raise OptionError(f"the size {_shown(text)} is not a whole number of bytes", hint="write the bytes in full")
        size += 2 * rest >= divisor
    if size > MAX_SIZE:
        raise OptionError(f"the size {_shown(text)} is too large", hint=f"the largest is {MAX_SIZE}, or 8E - 1")
    return size


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
                raise OptionError(f"{_shown(value)} has no value", hint="write key=value; ,, is a comma in a value")
            key = implied
        implied = None
        if key in values and not last_wins:
            raise OptionError(f"{_shown(key)} is given twice", hint="give it once")
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
            raise OptionError(f"{_shown(key)} = {_shown(value)} cannot be key=value", hint="write it as json:{...}")
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
    another word before a colon, with no slash before it, is no path: such a file is named `./word:rest`.
    """
    return _parse_name(text, 1)


def _parse_name(text: str, depth: int) -> dict[str, Any]:
    if len(text) > MAX_TEXT or depth > MAX_DEPTH:
        raise OptionError("the name is too long or nested too deeply")
    prefix, colon, rest = text.partition(":")
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
            raise OptionError(f"{_shown(text)} lacks a second colon before the image", hint=f"write {hint}")
        inner = _parse_name(image, depth + 1)
        if prefix == "blkverify":
            return {"driver": prefix, "raw": _parse_name(first, depth + 1), "test": inner}
        return {"driver": prefix, "config": first, "image": inner} if first else {"driver": prefix, "image": inner}
    if prefix in ("nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix"):
        return {"driver": "nbd", "uri": text} if rest.startswith("//") else _nbd_name(text, prefix, rest)
    if prefix in ("null", "null-co", "null-aio"):
        query = rest.removeprefix("//")
        if query and not query.startswith("?size="):
            raise OptionError(f"a null device has no {_shown(rest)}", hint="write null-co:// or null:?size=1G")
        return {"driver": "null", **({"size": query.removeprefix("?size=")} if query else {})}
    hint = "for a file of that name write ./NAME or file:NAME; the format is a separate option"
    raise OptionError(f"{_shown(text)} names the protocol {_shown(prefix)}, which is not there", hint=hint)


def _file(driver: str, path: str) -> dict[str, Any]:
    if not path or "\0" in path:
        raise OptionError(f"the file name {_shown(path)} is empty, or holds a NUL character", hint="name a file")
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
        raise OptionError(f"the options after json: cannot be read: {_clip(str(error))}", hint=hint) from error
    if not isinstance(options, dict):
        raise OptionError(f"after json: stands {_shown(options)}, not an object", hint='write json:{"driver": ...}')
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
        raise OptionError(f"{_shown(text)} is not the address of an NBD server", hint=hint)
    return {"driver": "nbd", "server": server, **({"export": export} if colon else {})}


class Option:
    """One option of a driver.

    `type` is one of: `str`, `int`, `size` (bytes), `bool`, `enum` (a str of `choices`), `node` (a child: nested
    options, or a str that `parse_name` reads, or null or "" for none; any other object passes as an open node), `list`
    (of `items`: an Option, or a Schema for dicts), `dict` (by the Schema `items`), `any`. Values come as JSON types, or
    as the text a user wrote. `minimum` and `maximum` (both included) and `choices` also bound numbers.
    """

    __slots__ = ("aliases", "choices", "default", "doc", "items", "maximum", "minimum", "name", "required", "type")

    def __init__(
        self,
        name: str,
        type: str,
        doc: str,
        *,
        default: Any = None,
        choices: Sequence[Any] = (),
        required: bool = False,
        minimum: int | None = None,
        maximum: int | None = None,
        aliases: Sequence[str] = (),
        items: Schema | Option | None = None,
    ) -> None:
        incomplete = (type == "enum" and not choices) or (type in ("dict", "list") and items is None)
        if incomplete or not hasattr(Option, f"_read_{type}"):
            raise ValueError(f"option {name}: the type {type!r} is unknown, or lacks its choices or items")
        self.name, self.type, self.doc, self.default = name, type, doc, default
        self.choices, self.required, self.aliases = tuple(choices), required, tuple(aliases)
        self.minimum, self.maximum, self.items = minimum, maximum, items

    def parse(self, value: Any, where: str | None = None) -> Any:
        """The typed value; OptionError with the option's dotted name (`where`), the value, and what it takes."""
        where = where or self.name
        parsed = getattr(self, f"_read_{self.type}")(value, where)
        low, high = self.minimum, self.maximum
        outside = (low is not None and parsed < low) or (high is not None and parsed > high)
        if outside or (self.choices and parsed not in self.choices):
            raise self._wrong(value, where)
        return parsed

    def takes(self) -> str:
        """What may be given, in a few words: `a size from 512 to 2M`, `one of off, metadata, full`."""
        if self.choices:
            return "one of " + ", ".join(map(self.spell, self.choices))
        text = _TAKES.get(self.type, f"a {self.type}")
        for word, bound in (("from", self.minimum), ("to", self.maximum)):
            text += "" if bound is None else f" {word} {self.spell(bound)}"
        return text

    def spell(self, value: Any) -> str:
        """A typed value as a user would write it, exactly: sizes with a suffix, bools as on and off."""
        if isinstance(value, bool):
            return "on" if value else "off"
        if self.type == "size" and isinstance(value, int) and value > 0:
            suffix = next((s for s in "EPTGMk" if value % _UNITS[s.lower()] == 0), "")
            return f"{value // _UNITS[suffix.lower()]}{suffix}"
        return str(value)

    def _wrong(self, value: Any, where: str) -> OptionError:
        return OptionError(f"{where} is {_shown(value)}", hint=f"it takes {self.takes()}")

    def _from_text(self, parser: Callable[[str], Any], text: str, where: str) -> Any:
        try:
            return parser(text)
        except OptionError as error:
            raise OptionError(f"{where}: {error.message}", hint=error.hint) from error

    def _read_str(self, value: Any, where: str) -> str:
        if isinstance(value, os.PathLike):
            return os.fsdecode(value)
        if not isinstance(value, str):
            raise self._wrong(value, where)
        return value

    _read_enum = _read_str

    def _read_any(self, value: Any, where: str) -> Any:
        return value

    def _read_int(self, value: Any, where: str) -> int:
        import re

        if isinstance(value, str) and re.fullmatch(_INT, value):
            return int(value, 0)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(value, where)
        return value

    def _read_size(self, value: Any, where: str) -> Any:
        if isinstance(value, str):
            return self._from_text(parse_size, value, where)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SIZE:
            raise self._wrong(value, where)
        return value

    def _read_bool(self, value: Any, where: str) -> bool:
        truth = _BOOLS.get(value) if isinstance(value, str) else value
        if not isinstance(truth, bool):
            raise self._wrong(value, where)
        return truth

    def _read_node(self, value: Any, where: str) -> Any:
        if value is None or value == "":
            return None
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, os.PathLike):
            return {"filename": os.fsdecode(value)}
        if isinstance(value, str):
            self._from_text(parse_name, value, where)
            return value
        if isinstance(value, int | float | bytes | Sequence):
            raise self._wrong(value, where)
        return value

    def _read_list(self, value: Any, where: str) -> list[Any]:
        if isinstance(value, str | bytes) or not isinstance(value, Sequence) or self.items is None:
            raise self._wrong(value, where)
        return [self.items.parse(item, f"{where}.{number}") for number, item in enumerate(value)]

    def _read_dict(self, value: Any, where: str) -> Any:
        return self.items.parse(value, where) if self.items else value


class Schema:
    """The options that a driver (or one group inside its options) accepts, in the order of their help."""

    __slots__ = ("_by_name", "driver", "options")

    def __init__(self, driver: str, options: Iterable[Option]) -> None:
        self.driver = driver
        self.options = tuple(options)
        self._by_name: dict[str, Option] = {}
        for option in self.options:
            for name in (option.name, *option.aliases):
                if "." in name or self._by_name.setdefault(name, option) is not option:
                    raise ValueError(f"{driver}: the option name {name!r} is taken, or has a dot")

    def extend(self, driver: str, options: Iterable[Option]) -> Schema:
        """The schema of `driver` that takes these options and those of this schema after them."""
        return Schema(driver, (*options, *self.options))

    def __getitem__(self, name: str) -> Option:
        return self._by_name[name]

    def parse(self, options: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """Typed values by the options' own names (never an alias); dotted keys nest first.

        The result has every option: one that is absent, or null, has its default, and a list without one is empty. Only
        nodes differ, since "no child" is not "not said": an absent node without a default is left out, null stays None.
        A key `driver` may repeat the driver's name. OptionError: unknown, missing, given twice or ill-typed.
        """
        if not isinstance(options, Mapping):
            raise OptionError(f"{where or self.driver} is {_shown(options)}", hint="it takes a group of options")
        if any(isinstance(key, str) and "." in key for key in options):
            options = nest(options)
        prefix = where and f"{where}."
        given: dict[str, Any] = {}
        for key, value in options.items():
            option = self._by_name.get(key)
            if option is None:
                if key == "driver" and value == self.driver:
                    continue
                raise self._unknown(key, where)
            if option.name in given:
                raise OptionError(f"{prefix}{option.name} is given twice, once as {_shown(key)}", hint="give it once")
            if value is not None or option.type in ("node", "any"):
                given[option.name] = option.parse(value, prefix + option.name)
        result: dict[str, Any] = {}
        for option in self.options:
            if option.required and given.get(option.name) is None:
                raise OptionError(f"{prefix}{option.name} is missing", hint=f"give it: {option.takes()}")
            if option.name in given:
                result[option.name] = given[option.name]
            elif option.type == "list":
                result[option.name] = list(option.default or ())
            elif option.type != "node" or option.default is not None:
                result[option.name] = option.default
        return result

    def help(self, prefix: str = "") -> list[tuple[str, str, str, str]]:
        """Rows for documentation and `-o help`: dotted name, type, default (`required` if there is none), meaning."""
        rows = []
        for option in self.options:
            kind = "|".join(map(option.spell, option.choices)) or {"bool": "on|off"}.get(option.type, option.type)
            default = "" if option.default is None else option.spell(option.default)
            rows.append((prefix + option.name, kind, "required" if option.required else default, option.doc))
            if isinstance(option.items, Schema):
                rows += option.items.help(f"{prefix}{option.name}.{'N.' if option.type == 'list' else ''}")
        return rows

    def _unknown(self, key: Any, where: str) -> OptionError:
        from difflib import get_close_matches

        near = [f"did you mean {name}? " for name in get_close_matches(_clip(str(key)), self._by_name, 1)]
        hint = "".join(near) + "it takes: " + (", ".join(option.name for option in self.options) or "no options")
        inside = f" in {where}" if where else ""
        return OptionError(f"{self.driver} has no option {_shown(key)}{inside}", hint=hint)


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
        raise OptionError(f"the option name {_shown(key)} has an empty part, or too many", hint="write file.filename")
    return parts


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is not a group, with its path; dots in keys count as levels. Empty groups are values."""
    if len(path) > MAX_DEPTH:
        raise OptionError(f"{_shown('.'.join(path))} is nested too deeply", hint=f"the limit is {MAX_DEPTH} levels")
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
        missing = f"{_shown('.'.join(path))} has no item {items.index(_ABSENT)}"
        raise OptionError(f"the list {missing}", hint="items are numbered 0, 1, 2, ...")
    return items


def _conflict(path: tuple[str, ...], part: str) -> OptionError:
    where, name = _shown(".".join(path)), _shown(part)
    return OptionError(f"{where} is given twice, or {name} is both a value and a group", hint="give each option once")


def _clip(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def _shown(value: Any) -> str:
    """`value` for an error message: quoted, control characters escaped, short."""
    return _clip(repr(value[:100] if isinstance(value, str) else value))
