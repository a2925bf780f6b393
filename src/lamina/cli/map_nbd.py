"""`lamina map --context`: what an NBD server says of each byte of an export, in one metadata context or in several at once.

Several contexts go in lock-step: a row is a stretch in which none of them changes. Neighbours that say the same are one row,
however the server cut them.
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

#: (length, what each context says) of one stretch.
Stretch = tuple[int, tuple[int, ...]]

#: The most rows of a map: a server can make up as many as there are bytes. And of its totals.
MOST_ROWS, MOST_KINDS = 1 << 24, 1 << 16

#: What `--context` takes besides names: all that the server has.
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
    """Print the map of the export `name` from `begin` on, `length` bytes (None: to the end), to standard output. OptionError
    for a name or a window that cannot be; NotSupported for a context that the server does not have; those of the client."""
    if not names_export(name):
        raise OptionError("contexts are of NBD exports, and this is none", path=name, hint="leave --context out")
    target = export_target(name)
    wanted = _chosen(target, contexts, timeout)
    with Client.connect(target, contexts=wanted, request_timeout=timeout) as client:
        missing = [one for one in wanted if one not in client.contexts]
        if missing:
            raise NotSupported(
                f"the server has no metadata context {printable(missing[0])} for this export",
                path=str(target),
                hint="lamina info lists those that it has",
            )
        if begin > client.size:
            raise OptionError(f"the export ends at {client.size}, before the start {begin}", path=str(target))
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
        raise NotSupported("the server names no metadata context for this export", path=str(target))
    return list(found)


def asked(client: Client, contexts: Sequence[str], begin: int, end: int) -> Iterator[Stretch]:
    """The stretches from `begin` to `end`, each in all `contexts`; where the answer reaches further in one of them, the rest
    is asked for again together with the others."""
    while begin < end:
        answer = client.block_status(begin, end - begin, contexts=contexts)
        for length, values in lockstep([answer[name] for name in contexts]):
            yield length, values
            begin += length


def lockstep(columns: Sequence[Sequence[tuple[int, int]]]) -> Iterator[Stretch]:
    """Several lists of (length, status) from one offset on as one, as far as the shortest goes. It is cut wherever one of
    them is."""
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
    """The same with neighbours that say the same made one."""
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
                raise LimitExceeded(f"the server tells of more than {MOST_ROWS} stretches", hint=hint)
            yield held
        held = (length, values)
    if held is not None:
        yield held


def summed(stretches: Iterator[Stretch], size: int) -> list[tuple[int, float, tuple[int, ...]]]:
    """(bytes, percent of `size`, what the contexts say) for each that occurs, in the order of what they say."""
    found: dict[tuple[int, ...], int] = {}
    for length, values in stretches:
        found[values] = found.get(values, 0) + length
        if len(found) > MOST_KINDS:
            raise LimitExceeded(f"the server tells of more than {MOST_KINDS} kinds of bytes")
    return [(found[values], 100 * found[values] / size, values) for values in sorted(found)]


def meaning(context: str, status: int) -> str | None:
    """What `status` says in words; None for a context that is not known here."""
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
    """The names of the bits that are set, and the number that is left."""
    words = [word for bit, word in bits.items() if status & bit]
    rest = status & ~sum(bits)
    return ",".join([*words, *([f"unknown {rest:#x}"] if rest else [])])


# -- for programs


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
    """One context as nbdinfo tells it, with type and description; several as an object by their names."""
    from json import dumps

    told = [
        f'"type": {value}, "description": {dumps(meaning(name, value))}'
        for name, value in zip(contexts, values, strict=True)
    ]
    if len(contexts) == 1:
        return told[0]
    return '"contexts": {' + ", ".join(f"{dumps(n)}: {{{text}}}" for n, text in zip(contexts, told, strict=True)) + "}"


# -- for people


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
    """Cells beneath one another, wide enough for the name of their context."""
    widths = [max(len(printable(name)), 9) for name in contexts]
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
