"""The part of the node that makes new images; mixed into the driver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ...format_node import FormatNode
from . import create as _create

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ...bitmap import DirtyBitmap
    from ...extents import Extents
    from ...job_results import MeasureResult
    from ...node import Node
    from ...request import Child
    from ...schema import Schema


class Creatable(FormatNode):
    """A format node of whose format images can be made."""

    create_schema: ClassVar[Schema] = _create.SCHEMA
    prepare_create = staticmethod(_create.prepare)

    @classmethod
    def create(cls, storage: Child, size: int, values: Mapping[str, Any]) -> None:
        _create.create(storage, size, values)

    @classmethod
    def file_of(cls, disk: Child, values: Mapping[str, Any]) -> Node:
        from .computed import ComputedFile

        return ComputedFile(disk, values)

    @classmethod
    def measure(
        cls,
        size: int,
        values: Mapping[str, Any],
        stored: Iterable[Extents] | None = None,
        bitmaps: Mapping[str, DirtyBitmap] | None = None,
    ) -> MeasureResult:
        from .measure import measure

        return measure(size, values, stored, bitmaps)

    @classmethod
    def side_files(cls, values: Mapping[str, Any]) -> Sequence[str]:
        return [values["data_file_path"]] if values.get("data_file") and not values["data_file_keep"] else []

    @classmethod
    def options_to_open(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        return _create.options_to_open(values)
