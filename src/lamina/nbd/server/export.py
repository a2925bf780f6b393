"""An export: an image as NBD shows it. Exact inside, rounded here, at the edge.

The minimum block is the request alignment of the image's top node, up to the 64 KiB that the protocol allows; the size is the
image's, rounded up only where that block forces it. What lies between both, the padding, reads as zero and takes no other
bytes. Every extent is rounded to the minimum block, but those of `lamina:exact`. Sections of the specification: "Size
constraints", "Metadata querying".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ...errors import BlockIOError, ReadOnly
from ...image import Image
from ...limits import MIB, align_down, align_up, is_power_of_two
from ...node import FUA, MAY_UNMAP, NO_FALLBACK, fill_zero
from ...zeros import is_zero
from .. import wire
from .contexts import CONTEXTS, DIRTY, Context, dirty_extents, pack, pack_columns

if TYPE_CHECKING:
    from ...bitmap import DirtyBitmap
    from ...extents import Extents
    from ...root import Root
    from ...status import Status

#: Extents of the image that a small question looks at: first so many, of one that wants the first extent alone, then more.
_FEW = (2, 16)
#: Extents of one context in one answer: what QEMU gives, too.
MAX_EXTENTS = 1 << 17
#: The first stretch that is looked at, in bytes; it grows. A client that wants one extent usually goes on with the next.
_FIRST, _FIRST_OF_ONE = 64 * MIB, 1 * MIB
#: After this many seconds an answer is given with what was found.
_PATIENCE = 0.5
#: As much as one CACHE reads.
_MAX_CACHED = 32 * MIB


class Export:
    """`image` under a name. `writable` only if the image is, too. `bitmaps` by name, as contexts `qemu:dirty-bitmap:NAME`;
    `depth`: offer `qemu:allocation-depth`. `write_through`: each change of a client is on stable storage before its reply, as
    with FUA. Safe for any number of threads and connections, which see one another's writes at
    once: all share the one image. While a server serves it, the export has a root of its own (`root.py`): the image may
    be closed before the server, which then closes the files."""

    def __init__(
        self,
        image: Image,
        name: str = "",
        *,
        description: str = "",
        writable: bool = False,
        bitmaps: Mapping[str, DirtyBitmap] | None = None,
        depth: bool = True,
        write_through: bool = False,
    ) -> None:
        self.image = image
        self._always = wire.CMD_FLAG_FUA if write_through else 0  # a flag of each change
        self._served: Image | None = None  # another image on the same node, while a server serves the export
        self._servers = 0
        self.name = name
        self.description = description
        self.read_only: bool = image.read_only or not writable
        limits = image.node.limits
        self.minimum: int = min(limits.request_alignment, wire.MAX_MINIMUM)
        wished = limits.optimal_transfer if is_power_of_two(limits.optimal_transfer) else 0
        self.preferred: int = max(min(wished, wire.MAX_PAYLOAD), wire.PREFERRED_BLOCK, self.minimum)
        self.maximum = wire.MAX_PAYLOAD
        self._end = image.size
        self.size: int = align_up(self._end, self.minimum)
        self._bitmaps = {wire.DIRTY_BITMAP + key: bitmap for key, bitmap in (bitmaps or {}).items()}
        #: The names of the metadata contexts.
        self.contexts: tuple[str, ...] = (
            wire.BASE_ALLOCATION,
            *((wire.ALLOCATION_DEPTH,) if depth else ()),
            wire.EXACT,
            *self._bitmaps,
        )
        self._go_straight()

    @property
    def root(self) -> Root:
        """The root that its requests use."""
        return (self._served or self.image).root

    def _go_straight(self) -> None:
        if self.size == self._end:
            # No padding: straight to the image. (It saves 0.2 us of the 4 that a read takes.)
            self.read_into = self.root.read_into  # type: ignore[method-assign]
            if not self.read_only and not self._always:
                self.write = self._write_straight  # type: ignore[method-assign]

    def begin(self) -> None:
        """A server begins to serve it. Raises Closed if the image is closed."""
        if self._served is None:
            self._served = self.image.share(read_only=self.read_only)
            self._go_straight()
        self._servers += 1

    def end(self) -> Image | None:
        """A server no longer serves it. Returns the image that the server closes, or None while another server serves it."""
        self._servers -= 1
        if self._servers:
            return None
        served, self._served = self._served, None
        vars(self).pop("read_into", None)
        return served

    def flags(self, *, structured: bool, payload: bool) -> int:
        """The transmission flags. `structured`: replies come in chunks; `payload`: BLOCK_STATUS may name contexts."""
        flags = wire.FLAG_HAS_FLAGS | wire.FLAG_SEND_FLUSH | wire.FLAG_SEND_FUA | wire.FLAG_CAN_MULTI_CONN
        flags |= wire.FLAG_SEND_CACHE
        if self.read_only:
            flags |= wire.FLAG_READ_ONLY
        else:
            flags |= wire.FLAG_SEND_TRIM | wire.FLAG_SEND_WRITE_ZEROES | wire.FLAG_SEND_FAST_ZERO
        if structured:
            flags |= wire.FLAG_SEND_DF
        if payload:
            flags |= wire.FLAG_BLOCK_STATUS_PAYLOAD
        return flags

    # -- bytes: offsets and ends are inside `size`

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`."""
        inside = self._inside(offset, len(view))
        if inside:
            self.root.read_into(offset, view[:inside])
        fill_zero(view[inside:])

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        """Make the bytes at `offset` equal to `view`. The padding has no place for anything but zeros."""
        self._need_writable()
        flags |= self._always
        inside = self._inside(offset, len(view))
        if inside < len(view) and not is_zero(view[inside:]):
            raise BlockIOError("the padding behind the end of the image takes only zeros", errno=wire.ENOSPC)
        if inside:
            self.root.write(offset, view[:inside], FUA if flags & wire.CMD_FLAG_FUA else 0)

    def _write_straight(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.root.write(offset, view, FUA if flags & wire.CMD_FLAG_FUA else 0)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Make the bytes read as zero. With FAST_ZERO raises NotSupported, touching nothing, where that is not quick."""
        self._need_writable()
        flags |= self._always
        inside = self._inside(offset, length)
        if inside:
            bits = FUA if flags & wire.CMD_FLAG_FUA else 0
            bits |= 0 if flags & wire.CMD_FLAG_NO_HOLE else MAY_UNMAP
            bits |= NO_FALLBACK if flags & wire.CMD_FLAG_FAST_ZERO else 0
            self.root.zero(offset, inside, bits)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """The bytes are no longer needed."""
        self._need_writable()
        inside = self._inside(offset, length)
        if inside:
            self.root.discard(offset, inside)
        if (flags | self._always) & wire.CMD_FLAG_FUA:
            self.flush()

    def flush(self) -> None:
        """Everything written before, through whatever connection, is on stable storage when it returns."""
        self.root.flush()

    def cache(self, offset: int, length: int, room: memoryview) -> None:
        """Read the first of these bytes into `room`, over and over, so that whatever caches below has them."""
        end = offset + min(self._inside(offset, length), _MAX_CACHED)
        while offset < end:
            part = room[: end - offset]
            self.root.read_into(offset, part)
            offset += len(part)

    def reads_zero(self, offset: int, length: int) -> bool:
        """Whether these bytes are known to read as zero without reading them."""
        return self.root.reads_zero(offset, length)

    def _need_writable(self) -> None:
        # The session has refused this before. The image below may be writable: nothing else would stop it.
        if self.read_only:
            raise ReadOnly("the export is read-only", path=self.image.filename)

    def _inside(self, offset: int, length: int) -> int:
        return max(min(length, self._end - offset), 0)

    # -- status

    def status(
        self, names: Sequence[str], offset: int, length: int, *, one: bool = False, wide: bool = False
    ) -> list[tuple[int, bytes]]:
        """For each context in `names`, how many extents from `offset` on are told, and they, packed as `wire.EXTENT` (`wide`:
        `wire.EXTENT_EXT`). At least one, at most MAX_EXTENTS, only the first if `one`; together never past the request."""
        return self.status_of_few(names, offset, length, one=one, wide=wide) or self.status_of_many(
            names, offset, length, one=one, wide=wide
        )

    def status_of_first(self, context: Context, offset: int, length: int) -> tuple[int, int] | None:
        """(length, status) in one context of the first extent, or of a part of it. As `status_of_few`, and quicker."""
        if offset + length > self._end:
            return None
        ((flags, size, depth, _, _),) = self.root.first_extents(offset, length, 1)
        if (offset | size) & (self.minimum - 1):
            return None
        return size, context.status(flags, depth)

    def unchanged(self) -> Callable[[], bool] | None:
        """A function that says whether the status of the image is still what it was when this was called. None where any
        request may change it, or asking has an effect. (Another program may fill a hole of a file: a ZERO row with a file is
        to be verified there.)"""
        root = self.root
        gate = root.gate
        changes = gate.changes
        # An edit that begins after this counts, and one before it is over.
        if gate.holders or not root.node.immutable:
            return None
        return lambda: gate.changes == changes and not root.closing

    def status_of_few(
        self, names: Sequence[str], offset: int, length: int, *, one: bool, wide: bool
    ) -> list[tuple[int, bytes]] | None:
        """As `status`, in plain Python and some microseconds, where a few extents of the image are the answer and need no
        rounding; else None."""
        end, mask = offset + length, self.minimum - 1
        if end > self._end or (offset | length) & mask:
            return None
        for most in _FEW if one else _FEW[-1:]:
            rows = self.first_rows(offset, length, most)
            answers = []
            for name in names:
                context = CONTEXTS.get(name)
                found = None if context is None else context.few(rows, length, mask, one=one)
                if found is None:
                    break
                answers.append((len(found) // 2, pack(found, wide=wide)))
            else:
                return answers
        return None

    def first_rows(self, offset: int, length: int, most: int) -> list[Status]:
        """The first `most` rows of the extents of the image, or all."""
        first_extents = self.root.first_extents
        rows = first_extents(offset, length, most)
        at, end = offset + sum([row[1] for row in rows]), offset + length
        while at < end and len(rows) < most:
            more = first_extents(at, end - at, most - len(rows))
            at += sum([row[1] for row in more])
            rows += more
        return rows

    def status_of_many(
        self, names: Sequence[str], offset: int, length: int, *, one: bool, wide: bool
    ) -> list[tuple[int, bytes]]:
        """As `status`, from columns: these take longer to begin with, and then less for each extent."""
        from ...extents import Extents

        found: dict[str, list[Extents]] = {name: [] for name in names}
        end = offset + length
        begin, stop = align_down(offset, self.minimum), align_up(end, self.minimum)
        window = _FIRST_OF_ONE if one else _FIRST
        deadline = time.monotonic() + _PATIENCE
        at = begin
        while at < stop:
            upto = min(align_up(at + window, _FIRST_OF_ONE), stop)
            exact = self._exact(at, upto)
            if exact is not None and exact.end < at + self._inside(at, upto - at):
                # The answer is as long as one may be: what is left of the last block is asked again.
                upto = align_down(exact.end, self.minimum)
                if upto == at:
                    upto = at + self.minimum
                    exact = (self._served or self.image).extents(at, self._inside(at, self.minimum))
                exact = exact.clip(at, upto)
            for name in names:
                found[name].append(self._in_context(name, exact, at, upto))
            at = upto
            window *= 4
            if one:
                found = {name: [Extents.concat(pieces).coalesce()] for name, pieces in found.items()}
                enough = all(len(pieces[0]) > 1 for pieces in found.values())
            else:
                enough = max(sum(map(len, pieces)) for pieces in found.values()) > MAX_EXTENTS
            if enough or time.monotonic() > deadline:
                break
        answers = []
        most = 1 if one else MAX_EXTENTS
        for name in names:
            told = Extents.concat(found[name]).coalesce().clip(offset, end)
            numbers = CONTEXTS.get(name, DIRTY).answers(told)[:most]
            answers.append((len(numbers), pack_columns(told.length[:most], numbers, wide=wide)))
        return answers

    def _exact(self, begin: int, end: int) -> Extents | None:
        """The exact extents of this stretch as far as the image goes; None in the padding."""
        inside = self._inside(begin, end - begin)
        return self.root.extents(begin, inside) if inside else None

    def _in_context(self, name: str, exact: Extents | None, begin: int, end: int) -> Extents:
        """What the context `name` tells of [begin, end), rounded unless it is exact."""
        from ...extents import Extents

        bitmap = self._bitmaps.get(name)
        if bitmap is not None:
            return DIRTY.reduce(dirty_extents(bitmap, begin, end).align(self.minimum, end))
        if exact is None:
            found = Extents.single(begin, end - begin, zero=True)
        elif name != wire.EXACT:
            found = exact.align(self.minimum, end)
        elif end > exact.end:
            found = Extents.concat([exact, Extents.single(exact.end, end - exact.end, zero=True)])
        else:
            found = exact
        return CONTEXTS[name].reduce(found)
