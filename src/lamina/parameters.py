"""Checks the arguments of public functions by the annotations of their parameters.

A value of a wrong type would otherwise end far inside with an error about something that the caller never named, or be taken
for something else (`tls_allow="abc"` for three names, `shrink="no"` for True). Base layer: it imports none of the classes in
these annotations, and recognizes them by their names.
"""

from __future__ import annotations

import os
from ast import literal_eval
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from .errors import OptionTypeError
from .options import shown

_P = ParamSpec("_P")
_T = TypeVar("_T")

_Admits = Callable[[Any], bool]

#: Annotations that stand for longer ones.
_ALIASES = {
    "Source": "str | os.PathLike[str] | Mapping[str, Any] | Image",
    "Repair": "Literal['leaks', 'all']",
}


def checked(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The same function, which raises an OptionError that is a TypeError as well, and names the parameter, for an argument
    that the annotation of its parameter does not admit. Nothing is done then. The annotations must be text (`from __future__
    import annotations`), and consist of the words in `_WORDS`, `_CLASSES` and `_ALIASES`."""
    code, annotations = function.__code__, function.__annotations__
    names = code.co_varnames
    positional = names[: code.co_argcount]
    keywords = set(names[: code.co_argcount + code.co_kwonlyargcount])
    rest = names[len(keywords)] if code.co_flags & 0x04 else None  # the name of *arguments
    checks: dict[str, tuple[_Admits, str]] = {}

    def require(name: str, value: Any) -> None:
        if name not in checks:
            checks[name] = _check(annotations[name])
        admits, takes = checks[name]
        if not admits(value):
            raise OptionTypeError(f"{name} is {shown(value)}, not {takes}")

    @wraps(function)
    def call(*arguments: _P.args, **named: _P.kwargs) -> _T:
        for name, value in zip(positional, arguments, strict=False):
            require(name, value)
        if rest is not None:
            for value in arguments[len(positional) :]:
                require(rest, value)
        for name, value in named.items():
            if name in keywords:
                require(name, value)
        return function(*arguments, **named)

    return call


def _check(annotation: str) -> tuple[_Admits, str]:
    """Whether a value is one of this annotation, and its description."""
    parts = [_word(part) for part in _alternatives(annotation)]
    tests = [admits for admits, _ in parts]
    return lambda value: any(admits(value) for admits in tests), " or ".join(dict.fromkeys(text for _, text in parts))


def _alternatives(annotation: str) -> list[str]:
    """The parts of a union."""
    found: list[str] = []
    for part in annotation.split(" | "):
        found += _alternatives(_ALIASES[part]) if part in _ALIASES else [part]
    return found


def _word(word: str) -> tuple[_Admits, str]:
    if word.startswith("Literal["):
        choices = literal_eval(f"({word[len('Literal[') : -1]},)")
        return lambda value: isinstance(value, str) and value in choices, " or ".join(map(repr, choices))
    if word in _CLASSES:
        module = _CLASSES[word]
        example = ' (Policy.parse("same-dir"), for example)' if word == "Policy" else ""
        return lambda value: _is(value, word, module), f"a {word}{example}"
    return _WORDS[word]


def _is(value: Any, name: str, module: str) -> bool:
    return any(kind.__name__ == name and kind.__module__ == module for kind in type(value).__mro__)


def _is_int(value: Any) -> bool:
    """An integer, also one of numpy."""
    return hasattr(type(value), "__index__") and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(one, str) for one in value)


#: Classes of Lamina, by the modules that define them.
_CLASSES = {
    "Budget": "lamina.limits",
    "Graph": "lamina.root",
    "Image": "lamina.image",
    "Node": "lamina.node",
    "Policy": "lamina.policy",
    "Target": "lamina.nbd.uri",
}

_WORDS: dict[str, tuple[_Admits, str]] = {
    "Any": (lambda value: True, "anything"),
    "CancelEvent": (lambda value: callable(getattr(value, "is_set", None)), "an event with is_set()"),
    "Mapping[str, Any]": (
        lambda value: isinstance(value, Mapping) and all(isinstance(key, str) for key in value),
        "options by name",
    ),
    "None": (lambda value: value is None, "None"),
    "Progress": (callable, "a function"),
    "Sequence[str]": (_is_texts, "a list of texts"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "float": (lambda value: _is_int(value) or (isinstance(value, float) and value == value), "a number"),  # not NaN
    "int": (_is_int, "a whole number"),
    "os.PathLike[str]": (lambda value: isinstance(value, os.PathLike), "a path"),
    "str": (lambda value: isinstance(value, str), "text"),
}
