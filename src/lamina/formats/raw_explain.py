"""What the bytes of a raw file are: those of its disk, and what lies before and behind a disk that is a range of the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import OptionError
from ..explanation import DATA, UNREFERENCED, Explainer, Explanation, Guest, Overview, Part, Step

if TYPE_CHECKING:
    from ..request import Child


class RawExplainer(Explainer):
    """The disk of `size` bytes from `start` on in `storage`."""

    def __init__(self, storage: Child, start: int, size: int) -> None:
        self._path, self._file_size = storage.node.filename, storage.node.size
        self._start, self._size = start, size

    @property
    def disk_size(self) -> int:
        return self._size

    def overview(self) -> Overview:
        return Overview((), (Part(DATA, self._start, self._size),))

    def at(self, offset: int) -> Explanation:
        if not 0 <= offset < self._file_size:
            raise OptionError(f"the file ends at {self._file_size}, before {offset}", path=self._path)
        start, end = self._start, self._start + self._size
        if start <= offset < end:
            guest = Guest(0, self._size, "data", None, offset - start)
            return Explanation(offset, (Part(DATA, start, self._size, text="data of the guest", guest=(guest,)),))
        low, high = (0, start) if offset < start else (end, self._file_size)
        return Explanation(offset, (Part(UNREFERENCED, low, high - low, text="outside of the range that is the disk"),))

    def guest(self, offset: int) -> Step:
        if not 0 <= offset < self._size:
            raise OptionError(f"the disk ends at {self._size}, before {offset}", path=self._path)
        host = self._start + offset
        return Step(0, "raw", self._path, offset, self._size - offset, "data", host=host, file=self._path)
