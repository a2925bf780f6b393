"""JSON Schemas of results, made from their types: `lamina.json_schema`.

What `to_json` of a result returns is described by its annotation: a `TypedDict` of `json_forms`, or a list of them. A result
without one (a `NamedTuple` or a frozen dataclass) has its fields in the JSON, with hyphens in their names, and without those
that are None. Descriptions are the texts in `Annotated`, docstrings, and the comments `#:` at fields.
"""

from __future__ import annotations

import re
import types
from collections.abc import Hashable, Mapping, Sequence
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from . import json_forms
from .errors import OptionError, OptionTypeError

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SIMPLE: dict[Any, str] = {str: "string", int: "integer", bool: "boolean", float: "number", type(None): "null"}
_COMMENT = re.compile(r"\s*#: ?(.*)")


def json_schema(of: str | Any) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what `to_json` of a result returns, and the command line prints with
    `--output json`: `json_schema(lamina.ImageInfo)`, `json_schema("ImageInfo")`, `json_schema(list[lamina.ImageInfo])`.

    `of`: the class of a result, its public name, or a type made of such classes and of types that JSON has. Descriptions of
    fields need the source of Lamina, and are missing without it. The schema names every key, and admits no other: a later
    version may have more. Raises OptionError for a name that is not a result, and for a type that JSON
    does not have one that is a TypeError as well.
    """
    kind = _named(of) if isinstance(of, str) else of
    if not isinstance(kind, Hashable):  # no class, and no type
        raise OptionTypeError(f"JSON has nothing for {kind!r}")
    maker = _Maker()
    found = maker.schema(kind)
    name = found.get("$ref", "").removeprefix("#/$defs/")
    title = name or (of if isinstance(of, str) else str(getattr(of, "__name__", of)))
    if name and not maker.refers_to(name):
        found = maker.definitions.pop(name)
    head = {"$schema": _DIALECT, "title": title}
    return head | found | ({"$defs": maker.definitions} if maker.definitions else {})


def _named(name: str) -> Any:
    from importlib import import_module

    kind = getattr(import_module(__package__), name, None)
    if not (isinstance(kind, type) and hasattr(kind, "to_json")):
        raise OptionError(f"{name!r} is not the name of a result", hint='for example "ImageInfo" or "CheckResult"')
    return kind


class _Maker:
    """Makes the schema of a type. Each object that has a name is defined once, in `definitions`."""

    def __init__(self) -> None:
        self.definitions: dict[str, dict[str, Any]] = {}

    def refers_to(self, name: str) -> bool:
        """Whether a definition contains a reference to this one."""
        return f"'#/$defs/{name}'" in str(self.definitions)

    def schema(self, kind: Any) -> dict[str, Any]:
        if kind is Any or kind is object:
            return {}
        if kind in _SIMPLE:
            return {"type": _SIMPLE[kind]}
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Annotated:
            return self.schema(arguments[0]) | {"description": arguments[1]}
        if origin in (Required, NotRequired):
            return self.schema(arguments[0])
        if origin is Literal:
            return {"const": arguments[0]} if len(arguments) == 1 else {"enum": list(arguments)}
        if origin in (Union, types.UnionType):
            return _either([self.schema(one) for one in arguments])
        if origin is tuple and arguments[-1] is not Ellipsis:
            count = len(arguments)
            members = [self.schema(one) for one in arguments]
            return {"type": "array", "prefixItems": members, "minItems": count, "maxItems": count}
        if isinstance(origin, type) and issubclass(origin, Sequence):
            return {"type": "array", "items": self.schema(arguments[0])}
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return {"type": "object", "additionalProperties": self.schema(arguments[1])}
        if kind in (dict, Mapping):
            return {"type": "object"}
        if is_typeddict(kind):
            return self._reference(kind.__name__.removesuffix("Json"), kind, kind.__doc__)
        if isinstance(kind, type) and (hasattr(kind, "_fields") or hasattr(kind, "__dataclass_fields__")):
            form = _form(kind)
            if form is None:
                return self._reference(kind.__name__, kind, kind.__doc__)
            if is_typeddict(form):
                return self._reference(kind.__name__, form, form.__doc__ or kind.__doc__)
            return self.schema(form)
        raise OptionTypeError(f"JSON has nothing for {kind!r}")

    def _reference(self, name: str, kind: Any, text: str | None) -> dict[str, Any]:
        if name not in self.definitions:
            self.definitions[name] = {}  # it may refer to itself
            description = {} if text is None else {"description": " ".join(text.split())}
            self.definitions[name] = description | (self._form(kind) if is_typeddict(kind) else self._fields(kind))
        return {"$ref": f"#/$defs/{name}"}

    def _form(self, form: Any) -> dict[str, Any]:
        keys = get_type_hints(form, include_extras=True)
        return _object(
            {key: self.schema(kind) for key, kind in keys.items()}, [key for key in keys if _required(keys[key])]
        )

    def _fields(self, kind: type) -> dict[str, Any]:
        texts, keys, required = _comments(kind), {}, []
        hints = get_type_hints(kind, include_extras=True)
        for name in getattr(kind, "_fields", None) or vars(kind)["__dataclass_fields__"]:
            key = name.replace("_", "-")
            members = [one for one in get_args(hints[name]) if one is not type(None)]
            optional = get_origin(hints[name]) in (Union, types.UnionType) and len(members) < len(get_args(hints[name]))
            found = _either([self.schema(one) for one in members]) if optional else self.schema(hints[name])
            keys[key] = found | ({"description": texts[name]} if name in texts else {})
            required += [] if optional else [key]
        return _object(keys, required)


def _form(kind: type) -> Any:
    """What the annotation of `to_json` says that it returns, if that is more than some dict."""
    method = getattr(kind, "to_json", None)
    if method is None:
        return None
    found = get_type_hints(method, None, vars(json_forms), include_extras=True).get("return")
    return None if found is None or found is dict or get_origin(found) is dict else found


def _object(keys: dict[str, dict[str, Any]], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": keys, "required": required, "additionalProperties": False}


def _required(kind: Any) -> bool:
    return get_origin(kind) is not NotRequired and (get_origin(kind) is not Annotated or _required(get_args(kind)[0]))


def _either(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if len(schemas) == 1:
        return schemas[0]
    if all(set(one) == {"type"} for one in schemas):
        return {"type": [one["type"] for one in schemas]}
    return {"anyOf": schemas}


def _comments(kind: type) -> dict[str, str]:
    """The comment `#:` of each field of a class: above the field, or behind it. None without the source."""
    import ast
    import inspect
    import textwrap

    try:
        lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
    except OSError:
        return {}
    found = {}
    (body,) = ast.parse("\n".join(lines)).body
    assert isinstance(body, ast.ClassDef)
    for field in body.body:
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        last = field.end_lineno or field.lineno
        behind = _COMMENT.match(lines[last - 1][field.end_col_offset :])
        texts = [behind[1]] if behind else []
        above = field.lineno - 2
        while not behind and (comment := _COMMENT.fullmatch(lines[above])):
            texts.insert(0, comment[1])
            above -= 1
        if texts:
            found[field.target.id] = " ".join(texts)
    return found
