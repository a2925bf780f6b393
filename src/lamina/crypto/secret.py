"""Secrets: passphrases that no message, log or repr shows, and the objects by which a command line names them."""

from __future__ import annotations

import base64
import binascii
import os
from typing import NoReturn

from ..errors import BlockIOError, Hint, OptionError, printable
from ..limits import KIB
from ..named_file import read_named
from ..options import parse_keyval, shown

#: The longest secret, in bytes, and what it may take in a file (base64, with line breaks).
MAX_BYTES = 64 * KIB
_MAX_FILE = 2 * MAX_BYTES
_SOURCES = ("file", "fd", "env", "data")


#: The secrets that options may name by their id, of all images of this program: a command line fills it (`--object`).
#: Libraries leave it empty, and give options the `Secret` itself.
named: dict[str, Secret] = {}


class Secret:
    """Bytes that only `reveal` shows: not `repr`, not a message, not a pickle."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes | str) -> None:
        self._value = value.encode() if isinstance(value, str) else bytes(value)
        if len(self._value) > MAX_BYTES:
            raise OptionError(f"a secret of {len(self._value)} bytes is longer than the limit of {MAX_BYTES}")

    def reveal(self) -> bytes:
        """The bytes."""
        return self._value

    def __repr__(self) -> str:
        return "<Secret>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not written to a pickle")


def reveal(given: object) -> bytes:
    """The bytes of a secret that an option gives: the secret itself, or the id of one in `named`. OptionError if neither."""
    if isinstance(given, Secret):
        return given.reveal()
    if isinstance(given, str) and given in named:
        return named[given].reveal()
    if isinstance(given, str):
        raise OptionError(f"there is no secret with the id {shown(given)}", hint=_HINT)
    raise OptionError("a passphrase is needed, and no secret is named", hint=_HINT)


def parse_object(text: str) -> tuple[str, Secret, bool]:
    """An object as `--object` names it: `secret,id=NAME,file=PATH` (or `fd=NUMBER`, `env=VARIABLE`, `data=TEXT`, and
    `format=base64`). Its id, the secret, and whether other users of the machine can see it in the list of processes (`data`).
    OptionError for anything else, BlockIOError where the file cannot be read; neither shows the secret."""
    try:
        given = parse_keyval(text, implied="qom-type")
    except OptionError as error:
        # The parser's messages quote what they do not understand.
        raise OptionError("an object cannot be understood", hint=_HINT) from (error if "data=" not in text else None)
    kind, name, coding = (given.pop(key, None) for key in ("qom-type", "id", "format"))
    if kind != "secret":
        raise OptionError("an object is of a kind that is not known here", hint=_HINT)
    if not isinstance(name, str) or not name:
        raise OptionError("a secret has no id", hint=_HINT)
    title = printable(name)
    unknown = sorted(map(printable, set(given) - set(_SOURCES)))
    if unknown:
        raise OptionError(f"the secret {title} has options that are not known here: {', '.join(unknown)}", hint=_HINT)
    if len(given) != 1:
        raise OptionError(f"the secret {title} needs one of {', '.join(_SOURCES)}", hint=_HINT)
    if coding not in (None, "raw", "base64"):
        raise OptionError(f"the format of the secret {title} is neither raw nor base64")
    ((source, value),) = given.items()
    raw = _read(title, source, str(value))
    return name, Secret(_decoded(title, raw) if coding == "base64" else raw), source == "data"


_HINT = Hint(
    "give a lamina.Secret in its place",
    command="name it with --object secret,id=NAME,file=PATH (or fd=NUMBER, env=VARIABLE; format=base64)",
)


def _read(name: str, source: str, value: str) -> bytes:
    if source == "data":
        return value.encode("utf-8", "surrogateescape")
    if source == "env":
        found = os.environb.get(os.fsencode(value))
        if found is None:
            raise OptionError(f"the variable {value!r} of the secret {name} is not in the environment")
        return found
    if source == "file":
        found = read_named(value, _MAX_FILE + 1, failure=f"the secret {name} cannot be read")[0]
        return _bounded(name, found)
    if not value.isascii() or not value.isdecimal() or len(value) > 9:
        raise OptionError(f"the descriptor of the secret {name} is not a number")
    try:
        with open(int(value), "rb", closefd=False) as file:
            found = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise BlockIOError.from_os(error, f"the secret {name} cannot be read from descriptor {value}") from error
    return _bounded(name, found)


def _bounded(name: str, found: bytes) -> bytes:
    if len(found) > _MAX_FILE:
        raise OptionError(f"the secret {name} is longer than the limit of {MAX_BYTES} bytes")
    return found


def _decoded(name: str, raw: bytes) -> bytes:
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except binascii.Error:
        raise OptionError(f"the secret {name} is not base64") from None
