"""`lamina map --context`: the status of an NBD export in one or several metadata contexts.

A row is a range in which the status of all contexts stays the same. Equal adjacent rows are merged, whatever the boundaries
of the replies of the server.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import LimitExceeded, NotSupported, OptionError, printable
from ..nbd import Client, wire
from .nbd_names import export_target, names_export

if TYPE_CHECKING:
    from ..nbd.uri import Target

#: (length, the status in each context) of one range.
Stretch = tuple[int, tuple[int, ...]]

#: The most rows of a map, since a server can report as many as there are bytes; and the most rows of its totals.
MOST_ROWS, MOST_KINDS = 1 << 24, 1 << 16

#: The word for all contexts of the server, instead of names.
ALL = "all"


def show(
    name: str,
    contexts: Sequence[str],
    *,
    begin: int,
    length: int | None,
    totals: bool,
    json: bool,
    timeout: float | None,
) -> None:
    """Print the map of the export `name` from `begin`, `length` bytes long (None: up to the end), to standard output. Raises
    OptionError for an invalid name or range, NotSupported for a context that the server does not have, and the errors of the
    client."""
    if not names_export(name):
        raise OptionError("only NBD exports have metadata contexts", path=name, hint="omit --context")
    target = export_target(name)
    wanted = _chosen(target, contexts, timeout)
    with Client.connect(target, contexts=wanted, request_timeout=timeout) as client:
        missing = [one for one in wanted if one not in client.contexts]
        if missing:
            raise NotSupported(
                f"the server has no metadata context {printable(missing[0])} for this export",
                path=str(target),
                hint="lamina info lists the contexts of the export",
            )
        if begin > client.size:
            raise OptionError(
                f"the start offset {begin} is past the end of the export at {client.size}", path=str(target)
            )
        end = client.size if length is None else min(begin + length, client.size)
        stretches = joined(asked(client, wanted, begin, end))
        if totals:
            rows = summed(stretches, end - begin)
            text = _totals_json(rows, wanted) if json else _totals_table(rows, wanted)
        else:
            text = _json(stretches, wanted, begin) if json else _table(stretches, wanted, begin)
        for piece in text:
            sys.stdout.write(piece)


def _chosen(target: Target, contexts: Sequence[str], timeout: float | None) -> list[str]:
    """The names of `contexts`, each once; `all` stands for those that the server lists for this export."""
    if ALL not in contexts:
        return list(dict.fromkeys(contexts))
    from ..nbd.inspect import inspect

    (one,) = inspect(target, timeout=timeout)
    found = one.details.available if one.details is not None else ()
    if not found:
        raise NotSupported("the server has no metadata context for this export", path=str(target))
    return list(found)


def asked(client: Client, contexts: Sequence[str], begin: int, end: int) -> Iterator[Stretch]:
    """The ranges from `begin` to `end`, each with the status in all `contexts`. If a reply is longer for one context, the
    rest is queried again together with the others."""
    while begin < end:
        answer = client.block_status(begin, end - begin, contexts=contexts)
        for length, values in lockstep([answer[name] for name in contexts]):
            yield length, values
            begin += length


def lockstep(columns: Sequence[Sequence[tuple[int, int]]]) -> Iterator[Stretch]:
    """Several lists of (length, status) from one offset, merged into one, up to the end of the shortest. It has a boundary
    wherever one of the lists has one."""
    iterators = [iter(column) for column in columns]
    heads = [next(iterator, (0, 0)) for iterator in iterators]
    left = [length for length, _ in heads]
    while True:
        length = min(left)
        if not length:
            return
        yield length, tuple(status for _, status in heads)
        for number, iterator in enumerate(iterators):
            left[number] -= length
            if not left[number]:
                heads[number] = next(iterator, (0, 0))
                left[number] = heads[number][0]


def joined(stretches: Iterator[Stretch]) -> Iterator[Stretch]:
    """The same with equal adjacent rows merged."""
    held: Stretch | None = None
    rows = 0
    for length, values in stretches:
        if held is not None and held[1] == values:
            held = (held[0] + length, values)
            continue
        if held is not None:
            rows += 1
            if rows > MOST_ROWS:
                hint = "map a part of the export: --start-offset, --max-length"
                raise LimitExceeded(f"the server reports more than {MOST_ROWS} ranges", hint=hint)
            yield held
        held = (length, values)
    if held is not None:
        yield held


def summed(stretches: Iterator[Stretch], size: int) -> list[tuple[int, float, tuple[int, ...]]]:
    """(bytes, percent of `size`, status in each context) for each status that occurs, in the order of the status."""
    found: dict[tuple[int, ...], int] = {}
    for length, values in stretches:
        found[values] = found.get(values, 0) + length
        if len(found) > MOST_KINDS:
            raise LimitExceeded(f"the server reports more than {MOST_KINDS} different statuses")
    return [(found[values], 100 * found[values] / size, values) for values in sorted(found)]


def meaning(context: str, status: int) -> str | None:
    """A description of `status`; None for an unknown context."""
    if context == wire.BASE_ALLOCATION:
        return _words(status, {wire.STATE_HOLE: "hole", wire.STATE_ZERO: "zero"}) or "data"
    if context.startswith(wire.DIRTY_BITMAP):
        return _words(status, {wire.STATE_DIRTY: "dirty"}) or "clean"
    if context == wire.ALLOCATION_DEPTH:
        return "absent" if not status else "local" if status == 1 else f"backing depth {status}"
    if context == wire.EXACT:
        low = status & ((1 << wire.EXACT_DEPTH_SHIFT) - 1)
        bits = {wire.EXACT_HOLE: "hole", wire.EXACT_ZERO: "zero", wire.EXACT_PRESENT: "present"}
        words = _words(low, bits | {wire.EXACT_COMPRESSED: "compressed"})
        kind = words if low & (wire.EXACT_HOLE | wire.EXACT_ZERO) else f"data,{words}" if words else "data"
        return f"{kind},layer {status >> wire.EXACT_DEPTH_SHIFT}"
    return None


def _words(status: int, bits: Mapping[int, str]) -> str:
    """The names of the set bits, and the remaining number."""
    words = [word for bit, word in bits.items() if status & bit]
    rest = status & ~sum(bits)
    return ",".join([*words, *([f"unknown {rest:#x}"] if rest else [])])


# -- JSON


def _json(stretches: Iterator[Stretch], contexts: Sequence[str], begin: int) -> Iterator[str]:
    before = "["
    for length, values in stretches:
        yield f'{before}\n{{ "offset": {begin}, "length": {length}, {_said(contexts, values)}}}'
        begin += length
        before = ","
    yield "[]\n" if before == "[" else "\n]\n"


def _totals_json(rows: list[tuple[int, float, tuple[int, ...]]], contexts: Sequence[str]) -> Iterator[str]:
    before = "["
    for size, percent, values in rows:
        yield f'{before}\n{{ "size": {size}, "percent": {percent:.6g}, {_said(contexts, values)}}}'
        before = ","
    yield "[]\n" if before == "[" else "\n]\n"


def _said(contexts: Sequence[str], values: tuple[int, ...]) -> str:
    """One context in the notation of nbdinfo, with type and description; several contexts as an object, by name."""
    from json import dumps

    told = [
        f'"type": {value}, "description": {dumps(meaning(name, value))}'
        for name, value in zip(contexts, values, strict=True)
    ]
    if len(contexts) == 1:
        return told[0]
    return '"contexts": {' + ", ".join(f"{dumps(n)}: {{{text}}}" for n, text in zip(contexts, told, strict=True)) + "}"


# -- tables


def _table(stretches: Iterator[Stretch], contexts: Sequence[str], begin: int) -> Iterator[str]:
    if len(contexts) > 1:
        yield f"{'Offset':>10}  {'Length':>10}  {_row([printable(name) for name in contexts], contexts)}\n"
    for length, values in stretches:
        yield f"{begin:10}  {length:10}  {_cells(contexts, values)}\n"
        begin += length


def _totals_table(rows: list[tuple[int, float, tuple[int, ...]]], contexts: Sequence[str]) -> Iterator[str]:
    if len(contexts) > 1:
        yield f"{'Size':>10}  Percent  {_row([printable(name) for name in contexts], contexts)}\n"
    for size, percent, values in rows:
        yield f"{size:10}  {percent:6.1f}%  {_cells(contexts, values)}\n"


def _cells(contexts: Sequence[str], values: tuple[int, ...]) -> str:
    if len(contexts) == 1:
        return f"{values[0]:3}  {meaning(contexts[0], values[0]) or ''}".rstrip()
    told = [meaning(name, value) for name, value in zip(contexts, values, strict=True)]
    return _row([str(value) if text is None else text for text, value in zip(told, values, strict=True)], contexts)


def _row(cells: Sequence[str], contexts: Sequence[str]) -> str:
    """The cells of a row, as wide as the names of their contexts."""
    widths = [max(len(printable(name)), 9) for name in contexts]
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
