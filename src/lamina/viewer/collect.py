"""From opened images to the model of a picture: disks, layers, files and differences, as records and columns.

The columns come from the exact status, window by window; the maps of files from `Explainer.file_map`. Names of files become
printable text here, and names and texts from inside images in `document`, which bounds them; the page treats them as text
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import LaminaError, LimitExceeded, UnsupportedFeature, printable
from ..file_map import FileMap, Route
from ..format import Format
from ..jobs.diff import diff
from ..layers import chain_nodes
from ..node import Node, StorageNode, is_faithful
from ..numeric import np
from ..results import ImageInfo
from .rows import Ranges, Rows, ranges_of, rows_of

if TYPE_CHECKING:
    from ..explanation import Overview
    from ..image import Image
    from ..jobs.progress import Monitor

#: The longest disk or file that a page shows: numbers of JavaScript are exact up to there.
LONGEST = 1 << 53


class File(NamedTuple):
    """The file of a layer. `map`: None if nobody can say what its parts are. `header`: its fields, (offset, length, name,
    text). `words`: what `lamina explain` calls it, empty if a shell cannot say it."""

    name: str
    format: str
    size: int
    allocated: int | None
    words: tuple[str, ...] = ()
    map: FileMap | None = None
    header: tuple[tuple[int, int, str, str], ...] = ()
    problems: tuple[str, ...] = ()


class Layer(NamedTuple):
    """A layer of a chain. `file`: the number of its file in `Model.files`, None if it is not in a file. `owned`: the bytes
    of the disk that this layer stores. `route`: how a reader finds a byte of its disk."""

    name: str
    format: str
    size: int
    file: int | None
    owned: int
    info: ImageInfo
    bitmaps: tuple[str, ...] = ()
    route: Route | None = None


class Disk(NamedTuple):
    """One image, or one moment of it. `places`: the numbers in `Model.files` of `rows.extents.files`. `words`: as for `File`.
    `direct`: whether each byte has the same offset in all layers. `problems`: what could not be read of the bitmaps."""

    title: str
    words: tuple[str, ...]
    direct: bool
    format: str
    size: int
    alignment: int
    rows: Rows
    places: tuple[int, ...]
    layers: tuple[Layer, ...]
    bitmaps: Mapping[str, tuple[int, Ranges]]
    problems: tuple[str, ...] = ()


class Model(NamedTuple):
    """All that a page shows. `difference`: where the second disk differs from the first; `compared` says in what blocks, and
    whether by content."""

    disks: tuple[Disk, ...]
    files: tuple[File, ...]
    difference: Ranges | None = None
    compared: tuple[int, bool] = (0, True)


def collect(images: Sequence[Image], granularity: int, content: bool, monitor: Monitor) -> Model:
    """The model of one image, or of two with their differences. Raises the errors of reading, and LimitExceeded for a disk or
    file that is too long for a page."""
    files = _Files()
    disks = tuple(_disk(image, files, monitor) for image in images)
    if len(images) < 2:
        return Model(disks, tuple(files.found))
    found = ranges_of(diff(*images, granularity=granularity, content=content, monitor=monitor))
    return Model(disks, tuple(files.found), found, (granularity, content))


def _nodes(top: Node) -> Iterator[Node]:
    """The layers, and the filters above and between them."""
    node = top
    while True:
        yield node
        filters = not isinstance(node, Format | StorageNode) and "image" in node.children
        child = node.children.get("image" if filters else "backing")
        if child is None:
            return
        node = child.node


def _keeps_offsets(node: Node) -> bool:
    """Whether this node leaves bytes at their offsets. (A snapshot of an image is not `faithful`, but does.)"""
    return isinstance(node, StorageNode) or is_faithful(node) or _moment(node) is not None


def _moment(node: Node) -> str | None:
    """The internal snapshot that is open in place of the disk of now."""
    return node.given.get("snapshot-id") or node.given.get("snapshot-name")


def _words(node: Node) -> tuple[str, ...]:
    """What `lamina explain --guest` calls this disk; empty if it has no such name."""
    storage = _storage(node)
    if not isinstance(node, Format) or storage is None or storage.path is None:
        return ()
    words = ("-f", node.driver, _argument(storage.path))
    if id := node.given.get("snapshot-id"):
        path = storage.path.replace(",", ",,")
        words = "--image-opts", "", f"driver={node.driver},file.filename={path},snapshot-id={id}"
    elif _moment(node):
        return ()
    return tuple(filter(None, words)) if all(map(str.isprintable, words)) else ()


def _argument(name: str) -> str:
    """A name as an argument of a command, where a dash would begin an option."""
    return f"./{name}" if name.startswith("-") else name


def _route(node: Node) -> Route | None:
    child = node.children.get("file")
    if not isinstance(node, Format) or child is None:
        return None
    named = {key: node.given[key] for key in ("snapshot-id", "snapshot-name") if key in node.given}
    try:
        return type(node).explain(child, named).route()
    except LaminaError:
        return None  # as for a file without a map


def _disk(image: Image, files: _Files, monitor: Monitor) -> Disk:
    _check_size(image.size, "disk", image.filename)
    rows, owned = rows_of(image, monitor)
    layers = []
    for depth, node in enumerate(chain_nodes(image.node)):
        number = files.of_layer(node)
        layers.append(
            Layer(
                printable(node.filename),
                node.driver,
                node.size,
                number,
                owned.get(depth, 0),
                _info(node),
                _names_of_bitmaps(node),
                _route(node),
            )
        )
    places = tuple(files.of_host(host) for host in rows.extents.files)
    bitmaps, problems = _bitmaps(image)
    moment = _moment(image.node)
    title = printable(image.filename) + (f", snapshot {printable(moment)}" if moment else "")
    return Disk(
        title,
        _words(image.node),
        all(_keeps_offsets(node) for node in _nodes(image.node)),
        image.format,
        image.size,
        image.alignment,
        rows,
        places,
        tuple(layers),
        bitmaps,
        problems,
    )


def _names_of_bitmaps(node: Node) -> tuple[str, ...]:
    try:
        return tuple(node.bitmaps)
    except LaminaError:
        return ()  # `_bitmaps` tells it of the top layer, and the map of the file of all


def _bitmaps(image: Image) -> tuple[dict[str, tuple[int, Ranges]], tuple[str, ...]]:
    """What the dirty bitmaps of the disk have recorded, and what could not be read: damage there leaves the disk as it is."""
    found: dict[str, tuple[int, Ranges]] = {}
    problems: list[str] = []
    try:
        for name, one in image.bitmaps.items():
            try:
                found[name] = one.granularity, ranges_of((lo, hi - lo) for lo, hi in one.dirty(0, image.size))
            except LaminaError as error:
                problems.append(error.message)
    except LaminaError as error:
        problems.append(error.message)
    return found, tuple(problems)


class _Files:
    """The files of all layers, each once."""

    def __init__(self) -> None:
        self.found: list[File] = []
        self._numbers: dict[Any, int] = {}

    def of_layer(self, node: Node) -> int | None:
        """The number of the file of this layer, with its map."""
        storage = _storage(node)
        if storage is None:
            return None
        key = _key(storage)
        if key not in self._numbers:
            self._numbers[key] = len(self.found)
            self.found.append(_file(node, storage))
        return self._numbers[key]

    def of_host(self, host: Any) -> int:
        """The number of a file to which extents refer: that of a layer, or one without a map (data files)."""
        key = _key(host)
        if key not in self._numbers:
            self._numbers[key] = len(self.found)
            size, allocated = (host.size, host.allocated) if isinstance(host, Node) else (0, None)
            self.found.append(File(printable(host.filename), "", size, allocated))
        return self._numbers[key]


def _key(host: Any) -> Any:
    return host.identity if isinstance(host, StorageNode) and host.identity is not None else id(host)


def _storage(node: Node) -> StorageNode | None:
    """The storage of the file of a layer, beneath filters that leave its bytes alone."""
    below = node if isinstance(node, StorageNode) else None
    child = node.children.get("file")
    while child is not None and below is None:
        below = child.node if isinstance(child.node, StorageNode) else None
        child = child.node.children.get("image")
    return below


def _file(node: Node, storage: StorageNode) -> File:
    words = ("-f", node.driver, _argument(storage.filename))
    known = words if isinstance(node, Format) and all(map(str.isprintable, words)) else ()
    named = printable(storage.filename), node.driver, storage.size, storage.allocated, known
    _check_size(storage.size, "file", storage.filename)
    child = node.children.get("file")
    if not isinstance(node, Format) or child is None or child.node is not storage:
        return File(*named)
    try:
        explainer = type(node).explain(child, {})
        overview = explainer.overview()
        found = explainer.file_map(storage.size) if storage.size else None
    except UnsupportedFeature:
        return File(*named)
    except LaminaError as error:
        return File(*named, problems=(error.message,))
    problems = dict.fromkeys((*overview.problems, *(found.problems if found is not None else ())))
    return File(*named, found, _fields(overview), tuple(problems))


def _fields(overview: Overview) -> tuple[tuple[int, int, str, str], ...]:
    return tuple((part.offset, part.length, part.field or "", part.text) for part in overview.header)


def _info(node: Node) -> ImageInfo:
    """What the header of a layer says; little for a layer without one."""
    child = node.children.get("file")
    if isinstance(node, Format) and child is not None:
        with suppress(LaminaError):
            return type(node).inspect(child, {})
    return ImageInfo(node.filename, node.driver, virtual_size=node.size)


def _check_size(size: int, what: str, path: str) -> None:
    if size >= LONGEST:
        raise LimitExceeded(
            f"the {what} has {size} bytes, and a page can show {LONGEST}",
            path=path,
            hint="use lamina map, or show a part of the disk (the filters offset and truncate)",
        )


def place_columns(disk: Disk) -> tuple[Any, Any]:
    """For each row the number of its file in `Model.files` plus one, 0 for none, and its offset there."""
    extents = disk.rows.extents
    numbers = np.array([*disk.places, -1], np.int64)
    return numbers[extents.file] + 1, extents.offset
