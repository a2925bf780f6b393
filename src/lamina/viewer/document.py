"""The model of a picture as JSON, with columns as text, made coarser until it is short enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any, TypeVar

from ..errors import printable
from ..file_map import KINDS, FileMap, Route
from ..numeric import np
from ..picture.markup import shortened
from ..results import Snapshot
from .collect import Disk, File, Layer, Model, place_columns
from .encode import text_of, zigzag
from .page import json_in_html
from .rows import Ranges, Rows, coarsened, coarser_file

#: Bytes of the page without a document: the script and the style. At least so many are kept for all that is not columns.
_EMPTY, _OTHERS = 100_000, 300_000
#: Bytes of the lists of names and texts from inside images, of which there may be any number; of one of them, the characters.
_TEXTS, _LONGEST = 150_000, 400
#: The part of a page that the routes to the L2 tables may take; and the bytes that are always left for the columns.
_ROUTES, _FEWEST = 1 / 8, 20_000


def document(model: Model, most: int) -> dict[str, Any]:
    """The model as JSON types, of about `most` bytes as text. The longest columns become coarser until all fit."""
    parts: list[_Columns] = []
    room = _Room(int(most * _ROUTES))
    disks = [_disk(disk, parts, room) for disk in model.disks]
    files = [_file(file, parts, room) for file in model.files]
    difference = None
    if model.difference is not None:
        granularity, content = model.compared
        columns = _Columns(model.difference, _ranges, Ranges.coarser)
        parts.append(columns)
        difference = {"ranges": columns, "granularity": granularity, "content": content}
    found = {"disks": disks, "files": files, "difference": difference}
    others = len(json_in_html(_told(found))) - sum(len(part.text) for part in parts)
    space = max(most - max(_EMPTY + others, _OTHERS), _FEWEST)
    while sum(len(part.text) for part in parts) > space:
        longest = max(parts, key=lambda part: len(part.text))
        if not longest.make_coarser():
            break
    told: dict[str, Any] = _told(found)
    return told


_Item = TypeVar("_Item")


class _Room:
    """What is left of the page for lists that an image can make as long as it likes."""

    def __init__(self, routes: int) -> None:
        self._texts, self._routes = _TEXTS, routes

    def first(self, items: Iterable[_Item]) -> list[_Item]:
        """The first items, as far as there is room for them and 100 bytes more for each."""
        return list(takewhile(self._takes, items))

    def _takes(self, item: Any) -> bool:
        self._texts -= len(json_in_html(item)) + 100
        return self._texts >= 0

    def has_route(self, told: dict[str, Any]) -> bool:
        fits = len(told["columns"]) <= self._routes
        self._routes -= len(told["columns"]) if fits else 0
        return fits


def _text(text: str) -> str:
    """A name or a text from inside an image, for people."""
    return printable(shortened(text, _LONGEST))


def _told(value: Any) -> Any:
    """`value` with the columns as JSON types."""
    if isinstance(value, _Columns):
        return value.json
    if isinstance(value, dict):
        return {key: _told(one) for key, one in value.items()}
    return [_told(one) for one in value] if isinstance(value, list) else value


class _Columns:
    """Columns that may become coarser: `told` makes JSON types of them, with the text under "columns"."""

    def __init__(self, value: Any, told: Callable[[Any], dict[str, Any]], coarser: Callable[[Any, int], Any]) -> None:
        self._value, self._tell, self._coarser = value, told, coarser
        self._grain = 1
        self.json = told(value) | {"grain": value.grain if isinstance(value, Rows | Ranges) else 1}

    @property
    def text(self) -> str:
        return str(self.json["columns"])

    def make_coarser(self) -> bool:
        """Double the grain until there are fewer rows. False if nothing can be left out any more."""
        before = self.json["rows"]
        while self.json["rows"] >= before:
            self._grain = max(2 * self._grain, 2 * self.json["unit"])
            if self._grain >= 1 << 52:
                return False
            self._value = self._coarser(self._value, self._grain)
            if _length(self._value) < before:
                self.json = self._tell(self._value) | {"grain": self._grain}
        return True


def _length(value: Any) -> int:
    return len(value.extents) if isinstance(value, Rows) else len(value.start)


def _rows(disk: Disk, rows: Any) -> dict[str, Any]:
    disk = disk._replace(rows=rows)
    extents, unit = rows.extents, rows.unit()
    file, offset = place_columns(disk)
    stored = np.flatnonzero(file)
    # The distance from where the bytes would lie if they followed those of the row before in the same file.
    at, size = offset[stored], extents.length[stored]
    before = np.concatenate(([0], at[:-1] + size[:-1])) if len(stored) else at
    jump = at - before
    fine = int(np.bitwise_or.reduce(np.abs(jump))) if len(jump) else 0
    step = fine & -fine or 1
    code = extents.depth.astype(np.int64) << 4 | extents.flags
    columns = [extents.length // unit, code, file, zigzag(jump // step)]
    if rows.grain > 1:
        columns += [rows.begins, *rows.counts]
    return {
        "rows": len(extents), "unit": unit, "step": step, "stored": len(stored),
        "totals": rows.totals(), "columns": text_of(*columns),
    }  # fmt: skip


def _ranges(ranges: Ranges) -> dict[str, Any]:
    unit = ranges.unit()
    end = ranges.start + ranges.length
    gap = ranges.start - np.concatenate(([0], end[:-1])) if len(end) else ranges.start
    return {
        "rows": len(end), "unit": unit, "total": ranges.total,
        "columns": text_of(gap // unit, ranges.length // unit),
    }  # fmt: skip


def _map(found: FileMap) -> dict[str, Any]:
    length = found.length
    bits = int(np.bitwise_or.reduce(found.start)) if len(found.start) else 0
    unit = bits & -bits or 1
    # The last part may end within a unit.
    return {
        "rows": len(length), "unit": unit,
        "columns": text_of(np.diff(found.start) // unit, found.kind.astype(np.int64), found.references + 1),
    }  # fmt: skip


def _disk(disk: Disk, parts: list[_Columns], room: _Room) -> dict[str, Any]:
    found = _Columns(disk.rows, lambda rows: _rows(disk, rows), coarsened)
    parts.append(found)
    bitmaps = []
    for name, (granularity, ranges) in zip(room.first(map(_text, disk.bitmaps)), disk.bitmaps.values(), strict=False):
        columns = _Columns(ranges, _ranges, Ranges.coarser)
        parts.append(columns)
        bitmaps.append({"name": name, "granularity": granularity, "ranges": columns})
    layers = [_layer(one, room) for one in disk.layers]
    problems = room.first(map(_text, disk.problems))
    return {
        "title": disk.title, "words": list(disk.words), "direct": disk.direct, "format": disk.format, "size": disk.size,
        "alignment": disk.alignment, "status": found, "bitmaps": bitmaps, "layers": layers, "problems": problems,
    }  # fmt: skip


def _layer(layer: Layer, room: _Room) -> dict[str, Any]:
    info = layer.info
    snapshots, bitmaps = room.first(map(_snapshot, info.snapshots)), room.first(map(_text, layer.bitmaps))
    route = None if layer.route is None else _route(layer.route)
    return {
        "name": layer.name, "format": layer.format, "size": layer.size, "file": layer.file, "owned": layer.owned,
        "cluster": info.cluster_size, "encrypted": bool(info.encrypted), "dirty": bool(info.dirty),
        "bitmaps": bitmaps, "snapshots": snapshots,
        "omitted": len(info.snapshots) + len(layer.bitmaps) - len(snapshots) - len(bitmaps),
        "route": route if route is not None and room.has_route(route) else None,
    }  # fmt: skip


def _route(route: Route) -> dict[str, Any]:
    return {
        "l1": route.l1, "span": route.span, "unit": route.unit, "width": route.width, "rows": len(route.entry),
        "columns": text_of(np.diff(route.entry, prepend=0), route.table),
    }  # fmt: skip


def _snapshot(one: Snapshot) -> dict[str, Any]:
    return {"id": _text(one.id), "name": _text(one.name), "size": one.size, "state": one.vm_state, "date": one.date}


def _file(file: File, parts: list[_Columns], room: _Room) -> dict[str, Any]:
    header = room.first([at, length, _text(name), _text(text)] for at, length, name, text in file.header)
    problems = room.first(map(_text, file.problems))
    told: dict[str, Any] = {
        "name": file.name, "format": file.format, "size": file.size, "allocated": file.allocated,
        "words": list(file.words), "header": header, "problems": problems,
        "omitted": len(file.header) + len(file.problems) - len(header) - len(problems),
    }  # fmt: skip
    if file.map is None:
        return told
    columns = _Columns(file.map, _map, coarser_file)
    parts.append(columns)
    kinds = [name for name, _, _ in KINDS]
    totals = [[kinds.index(name), total] for name, total in file.map.bytes_of().items()]
    return told | {"map": columns, "cluster": file.map.cluster, "totals": totals}
