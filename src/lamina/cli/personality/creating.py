"""The line of `qemu-img create` about a new image."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ...creation import create_driver
from ...errors import LaminaError, OptionError
from ...inspection import info
from ...limits import align_up
from ...options import flatten, parse_size, path_in
from ...own_files import is_same_file
from .tool import SECTOR

#: The order of the options of a new image in the line. Observed.
_ORDER = (
    *("encryption", "encrypt.format", "encrypt.key-secret", "encrypt.cipher-alg", "encrypt.cipher-mode"),
    *("encrypt.ivgen-alg", "encrypt.ivgen-hash-alg", "encrypt.hash-alg", "encrypt.iter-time"),
    *("cluster_size", "extended_l2", "preallocation", "compression_type", "size", "compat"),
    *("backing_file", "backing_fmt", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits"),
    *("nocow", "extent_size_hint"),
)
_ORDER_OF_RAW = ("size", "nocow", "preallocation", "extent_size_hint")
#: The types of options that the formats here do not have.
_OTHER_TYPES = {"encryption": "on|off", "nocow": "on|off", "extent_size_hint": "size"}
#: The words for on and off.
_SWITCHES = ("on", "off", "yes", "no", "true", "false", "y", "n")
#: Options that the line shows even if nobody gave them.
_ALWAYS = {
    "qcow2": ("cluster_size", "extended_l2", "compression_type", "size", "lazy_refcounts", "refcount_bits"),
    "raw": ("size",),
}


def as_theirs(filename: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """`options` for a disk of whole sectors, whose data file may exist."""
    found = dict(options)
    if found.get("encryption") == "off":
        del found["encryption"]
    if (size := found.get("size")) is not None:
        found["size"] = align_up(size if isinstance(size, int) else parse_size(size), SECTOR)
    if (data := found.get("data_file")) and size is not None:
        path = os.path.join(os.path.dirname(os.path.realpath(path_in(filename))), data)
        if os.path.isfile(path) and not is_same_file(filename, path):
            # The tool empties a data file that exists.
            os.truncate(path, 0)
            os.truncate(path, found["size"])
            found["data_file_keep"] = True
    return found


def formatting(filename: str, format: str, options: Mapping[str, Any]) -> str:
    """The line for the new image `filename` to be made with `options`. Nothing for an error that the tool reports before it
    writes the line."""
    schema = create_driver(format).creation_schema()
    shown = {key: value for key, value in flatten(options).items() if key != "backing_unchecked"}
    types = {name: kind for name, kind, *_ in schema.help()} | _OTHER_TYPES
    try:
        path_in(filename)
        if "backing_file" in shown and "backing_unchecked" not in options:
            # The size is that of the backing file, which must be there.
            below = os.path.join(os.path.dirname(filename), path_in(shown["backing_file"]))
            shown.setdefault("size", info(below, format=shown["backing_fmt"], force_share=True).virtual_size)
        if not shown.keys() <= types.keys() or shown.get("size") is None:
            return ""
        for name in _ALWAYS.get(format, ()):
            shown.setdefault(name, schema[name].default)
        words = [f"{key}={_text(types[key], shown[key])}" for key in _sorted(shown, format)]
    except (LaminaError, KeyError):
        return ""  # `create` reports the error
    return f"Formatting '{filename}', fmt={format} {' '.join(words)}\n"


def _sorted(keys: Iterable[str], format: str) -> list[str]:
    order = _ORDER_OF_RAW if format == "raw" else _ORDER
    return sorted(keys, key=lambda key: order.index(key) if key in order else len(order))


def _text(type: str, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if type == "size" and isinstance(value, str):
        return str(parse_size(value))
    if type == "on|off" and value not in _SWITCHES:
        raise OptionError(f"{value!r} is not on or off")
    return str(value)
