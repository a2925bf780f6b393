"""JSON as the reference tools print it: their order of keys, which depends on the key alone, and their layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

#: Observed orders of keys, joined: no two outputs contradict one another.
_ORDER = (
    *("children", "icount", "vm-clock-nsec", "snapshots", "backing-filename-format", "image-end-offset"),
    *("compressed-clusters", "flags", "name", "info", "date-sec", "date-nsec", "vm-clock-sec", "virtual-size"),
    *("total-clusters", "corruptions", "corruptions-fixed", "check-errors", "leaks", "leaks-fixed"),
    *("allocated-clusters", "filename", "cluster-size", "format", "actual-size", "fragmented-clusters"),
    *("format-specific", "full-backing-filename", "encrypted", "backing-filename", "dirty-flag"),
)
_RANK = {key: number for number, key in enumerate(_ORDER)}
#: The orders of objects of one kind, recognised by a key.
_KINDS = {
    "compat": """compat compression-type lazy-refcounts bitmaps refcount-bits encrypt data-file data-file-raw corrupt
        extended-l2""",
    "cipher-alg": """ivgen-alg detached-header hash-alg cipher-alg uuid ivgen-hash-alg format cipher-mode slots payload-offset
        master-key-iters""",
    "key-offset": "active iters key-offset stripes",
    "vm-state-size": "icount vm-clock-nsec name date-sec date-nsec vm-clock-sec id vm-state-size",
    "granularity": "flags name granularity",
    "type": "type data",
    "required": "bitmaps required fully-allocated",
}


def ordered(value: Any) -> Any:
    """`value` with the keys of all objects in the order of the tools."""
    if isinstance(value, Mapping):
        kind = next((order.split() for key, order in _KINDS.items() if key in value), None)
        rank = _RANK if kind is None else {key: number for number, key in enumerate(kind)}
        return {key: ordered(value[key]) for key in sorted(value, key=lambda key: rank.get(key, len(rank)))}
    if isinstance(value, list | tuple):
        return [ordered(item) for item in value]
    return value


def dump(value: Any) -> str:
    """`value` as a text, with a line end."""
    return _laid_out(ordered(value), 0) + "\n"


def _laid_out(value: Any, level: int) -> str:
    if not isinstance(value, dict | list):
        return json.dumps(value)
    margin = "    " * level
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_laid_out(item, level + 1)}" for key, item in value.items()]
    else:
        items = [_laid_out(item, level + 1) for item in value]
    rows = ",".join(f"\n{margin}    {item}" for item in items)
    return f"{opening}{rows}\n{margin}{closing}"
