"""The typed options of a driver: names, types, bounds, defaults and help texts. Base layer, without I/O.

A `Schema` converts nested options (see `options.py`) to typed values and provides the rows of `-o help`. An option that is
unknown, missing or of the wrong type raises `OptionError`, which names the option, its value and the accepted values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .errors import OptionError, UnsupportedFeature
from .limits import MAX_SIZE
from .options import SIZE_UNITS, clip, is_encodable, nest, parse_name, parse_size, shown
from .peer_options import find

_INT = r"[+-]?(0|[1-9][0-9]{0,31}|0[xX][0-9a-fA-F]{1,32})"  # no leading zero: some programs read it as octal
#: What `Schema.help` says in place of a default.
REQUIRED = "required"
_TAKES = {"str": "text", "int": "a whole number", "size": "a size", "bool": "on or off", "node": "a name or options"}
_BOOLS = {"on": True, "yes": True, "true": True, "y": True, "off": False, "no": False, "false": False, "n": False}


class Option:
    """One option of a driver.

    `type` is one of: `str`, `int`, `size` (bytes), `bool`, `enum` (one of the strings `choices`), `node` (a child: nested
    options, a string for `parse_name`, null or "" for no child, or any other object, which is taken as an open node),
    `list` (of `items`: an Option, or a Schema for dicts), `dict` (its Schema is `items`), `any`. Values are JSON types or
    text as users write it. `minimum` and `maximum` (both inclusive) and `choices` also restrict numbers.
    """

    __slots__ = ("aliases", "choices", "default", "doc", "items", "maximum", "minimum", "name", "required", "type")

    aliases: tuple[str, ...]
    choices: tuple[Any, ...]
    default: Any
    doc: str
    items: Schema | Option | None
    maximum: int | None
    minimum: int | None
    name: str
    required: bool
    type: str

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
            raise ValueError(f"option {name}: the type {type!r} is unknown, or its choices or items are missing")
        self.name, self.type, self.doc, self.default = name, type, doc, default
        self.choices, self.required, self.aliases = tuple(choices), required, tuple(aliases)
        self.minimum, self.maximum, self.items = minimum, maximum, items

    def parse(self, value: Any, where: str | None = None) -> Any:
        """Convert `value` to the type of the option. `where`: the dotted name for errors. Raises OptionError."""
        where = where or self.name
        parsed = getattr(self, f"_read_{self.type}")(value, where)
        low, high = self.minimum, self.maximum
        outside = (low is not None and parsed < low) or (high is not None and parsed > high)
        if outside or (self.choices and parsed not in self.choices):
            raise self._wrong(value, where)
        return parsed

    def takes(self) -> str:
        """A description of the accepted values: `a size from 512 to 2M`, `one of off, metadata, full`."""
        if self.choices:
            return "one of " + ", ".join(map(self.spell, self.choices))
        text = _TAKES.get(self.type, f"a {self.type}")
        for word, bound in (("from", self.minimum), ("to", self.maximum)):
            text += "" if bound is None else f" {word} {self.spell(bound)}"
        return text

    def spell(self, value: Any) -> str:
        """The exact text of a typed value as users write it: sizes with a suffix, bools as on and off."""
        if isinstance(value, bool):
            return "on" if value else "off"
        if self.type == "size" and isinstance(value, int) and value > 0:
            suffix = next((s for s in "EPTGMk" if value % SIZE_UNITS[s.lower()] == 0), "")
            return f"{value // SIZE_UNITS[suffix.lower()]}{suffix}"
        return str(value)

    def to_json(self) -> dict[str, Any]:
        """The option as a dict of JSON types. Absent: what it does not have."""
        found: dict[str, Any] = {"name": self.name, "type": self.type, "doc": self.doc, "required": self.required}
        bounds = {"default": self.default, "minimum": self.minimum, "maximum": self.maximum}
        found |= {key: value for key, value in bounds.items() if value is not None}
        found |= {key: list(words) for key, words in (("choices", self.choices), ("aliases", self.aliases)) if words}
        if self.items is not None:
            found["items"] = self.items.to_json()
        return found

    def _wrong(self, value: Any, where: str) -> OptionError:
        return OptionError(f"{where} is {shown(value)}", hint=f"it takes {self.takes()}")

    def _from_text(self, parser: Callable[[str], Any], text: str, where: str) -> Any:
        try:
            return parser(text)
        except OptionError as error:
            raise OptionError(f"{where}: {error.message}", hint=error.hint) from error

    def _read_str(self, value: Any, where: str) -> str:
        if isinstance(value, os.PathLike):
            value = os.fsdecode(value)
        if not isinstance(value, str):
            raise self._wrong(value, where)
        # Most texts are names of files or exports, which contain neither NUL characters nor lone surrogates.
        if "\0" in value:
            raise OptionError(f"{where} is {shown(value)}", hint="it takes text without NUL characters")
        if not is_encodable(value):
            raise OptionError(f"{where} is {shown(value)}", hint="it takes text without lone surrogates")
        return value

    _read_enum = _read_str

    def _read_any(self, value: Any, where: str) -> Any:
        return value

    def _read_int(self, value: Any, where: str) -> int:
        import re

        number = int(value, 0) if isinstance(value, str) and re.fullmatch(_INT, value) else value
        if not isinstance(number, int) or isinstance(number, bool):
            raise self._wrong(value, where)
        if abs(number) > MAX_SIZE:
            raise OptionError(f"{where} is {shown(value)}", hint=f"numbers are at most {MAX_SIZE}")
        return number

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
        items = [self.items.parse(item, f"{where}.{number}") for number, item in enumerate(value)]
        if None in items and isinstance(self.items, Option) and self.items.type == "node":
            number = items.index(None)
            hint = f"it takes {self.items.takes()}"
            raise OptionError(f"{where}.{number} is {shown(value[number])}", hint=hint)
        return items

    def _read_dict(self, value: Any, where: str) -> Any:
        return self.items.parse(value, where) if self.items else value


class Schema:
    """The options that a driver, or one group of its options, accepts. Their order is that of the help."""

    __slots__ = ("_by_name", "driver", "options")

    def __init__(self, driver: str, options: Iterable[Option]) -> None:
        self.driver: str = driver
        self.options: tuple[Option, ...] = tuple(options)
        self._by_name: dict[str, Option] = {}
        for option in self.options:
            for name in (option.name, *option.aliases):
                if "." in name or self._by_name.setdefault(name, option) is not option:
                    raise ValueError(f"{driver}: the option name {name!r} is a duplicate or contains a dot")

    def extend(self, driver: str, options: Iterable[Option]) -> Schema:
        """A schema for `driver` with `options`, followed by the options of this schema."""
        return Schema(driver, (*options, *self.options))

    def __getitem__(self, name: str) -> Option:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def parse(self, options: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """Convert `options`, which may contain dotted keys, to typed values by the names of the options (never an alias).

        The result contains every option. An absent or null option has its default; a list without a default is empty.
        Nodes differ, since null means "no child": null stays None, and an absent node without a default is left out. A key
        `driver` may repeat the driver's name. Raises OptionError for an option that is unknown, missing, duplicate or of
        the wrong type.
        """
        if not isinstance(options, Mapping):
            raise OptionError(f"{where or self.driver} is {shown(options)}", hint="it takes a group of options")
        if any(isinstance(key, str) and "." in key for key in options):
            options = nest(options)
        prefix = where and f"{where}."
        given: dict[str, Any] = {}
        for key, value in options.items():
            option = self._by_name.get(key)
            if option is None:
                if (key == "driver" and value == self.driver) or self._is_ignored(key, value, where):
                    continue
                raise self._unknown(key, where)
            if option.name in given:
                raise OptionError(f"{prefix}{option.name} is given twice, once as {shown(key)}", hint="give it once")
            if value is not None or option.type in ("node", "any"):
                given[option.name] = option.parse(value, prefix + option.name)
        result: dict[str, Any] = {}
        for option in self.options:
            if option.required and given.get(option.name) is None:
                raise OptionError(f"{prefix}{option.name} is missing", hint=f"set it to {option.takes()}")
            if option.name in given:
                result[option.name] = given[option.name]
            elif option.type == "list":
                result[option.name] = list(option.default or ())
            elif option.type != "node" or option.default is not None:
                result[option.name] = option.default
        return result

    def fill(self, values: dict[str, Any], options: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
        """Set the options in `usual` in `values`, the result of `parse(options)`, unless `options` contains them or the
        driver does not have them."""
        for name, value in usual.items():
            option = self._by_name.get(name)
            if option is not None and not any(word in options for word in (option.name, *option.aliases)):
                values[option.name] = option.parse(value, option.name)

    def told(self, values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
        """The options among `values`, a result of `parse`, that differ from their defaults, as text by dotted names. Children
        and secrets (options that take any object) are left out."""
        found: dict[str, str] = {}
        for option in self.options:
            value = values.get(option.name)
            if value is None or value == option.default or option.type in ("node", "any"):
                continue
            if isinstance(option.items, Schema):
                parts = enumerate(value) if option.type == "list" else (("", value),)
                for number, part in parts:
                    found |= option.items.told(part, f"{prefix}{option.name}.{number}{'.' if number != '' else ''}")
            elif option.items is None:
                found[prefix + option.name] = option.spell(value)
            elif option.items.type != "node" and value:
                found[prefix + option.name] = ",".join(map(option.items.spell, value))
        return found

    def help(self, prefix: str = "") -> list[tuple[str, str, str, str]]:
        """Rows for documentation and `-o help`: dotted name, type, default (or REQUIRED), description."""
        rows = []
        for option in self.options:
            kind = "|".join(map(option.spell, option.choices)) or {"bool": "on|off"}.get(option.type, option.type)
            default = "" if option.default is None else option.spell(option.default)
            rows.append((prefix + option.name, kind, REQUIRED if option.required else default, option.doc))
            if isinstance(option.items, Schema):
                rows += option.items.help(f"{prefix}{option.name}.{'N.' if option.type == 'list' else ''}")
        return rows

    def _is_ignored(self, key: Any, value: Any, where: str) -> bool:
        """Whether this option of the reference tools has no effect here. Raises UnsupportedFeature if it is not supported."""
        found = None if where else find(self.driver, str(key))
        if found is None:
            return False
        if found.type is None:
            raise UnsupportedFeature(f"the option {key} of {self.driver} is not supported", hint=found.why)
        Option(key, found.type, found.why, choices=found.choices).parse(value)
        return True

    def to_json(self) -> list[dict[str, Any]]:
        """All options, as `Option.to_json` gives them."""
        return [option.to_json() for option in self.options]

    def _unknown(self, key: Any, where: str) -> OptionError:
        from difflib import get_close_matches

        near = [f"did you mean {name}? " for name in get_close_matches(clip(str(key)), self._by_name, 1)]
        hint = "".join(near) + "it takes: " + (", ".join(option.name for option in self.options) or "no options")
        inside = f" in {where}" if where else ""
        return OptionError(f"{self.driver} has no option {shown(key)}{inside}", hint=hint)


#: The child of a filter.
IMAGE = Option("image", "node", "the child node", required=True)
