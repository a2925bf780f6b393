"""The driver `nbd`: an export of an NBD server as storage. Its client is `client`; what a user may say of the address, `uri`.

Nothing found inside an image ever leads here: such names are paths, and the policy refuses others.
"""

from __future__ import annotations

from errno import EINVAL
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn, Self

from .. import limits
from ..errors import BlockIOError, Closed, Hint, ReadOnly
from ..limits import KIB, Limits, align_down
from ..node import FUA, MAY_UNMAP, NO_FALLBACK, StorageNode, bounded
from ..pending import Done, Pending
from ..schema import Option, Schema
from . import wire
from .client.client import Client
from .uri import OPTIONS, from_options, parse_timeout

if TYPE_CHECKING:
    from ..extents import Extents
    from ..graph import Opener

#: Questions about the status of one stretch, after which the rest of it counts as data: a server that answers byte by byte
#: could be asked for ever, and data is always a safe answer.
_MAX_QUESTIONS: Final = 1 << 12


#: A longer read or write goes out in pieces of so many bytes, all at once, over all connections: a server reads or writes
#: one while another is on its way. (Measured: `convert` of 1 GiB asks for 2 MiB at a time; from and to qemu-nbd 7.2 that took
#: 0.57 and 0.58 s whole, 0.53 and 0.43 s in such pieces, 0.68 and 0.50 s in pieces of 256 KiB. And a server works on 16
#: requests of a client at once: where each waits for storage of the server's, longer ones move more.)
PIECE: Final = 512 * KIB


_OPERATIONS: Final = ("read_into", "write", "zero", "discard", "flush", "extents", "reads_zero")


class NbdStorage(StorageNode):
    """One export, of a fixed size. As many requests as there are threads are on their way at once.

    What is stored where, the server's context `base:allocation` tells; without it everything counts as data. Its offsets
    count in this node, as those of all storage do: they say nothing of the server's own files.
    """

    driver: ClassVar[str] = "nbd"
    far = True
    schema: ClassVar[Schema] = Schema(
        "nbd",
        [
            *OPTIONS,
            Option(
                "connections",
                "int",
                "connections to use where the server says that several are coherent; 0: 4 over TCP, 1 over a Unix socket",
                default=1,
                minimum=0,
                maximum=16,
            ),
            Option("open-timeout", "int", "seconds to try to connect while nobody listens", default=0, minimum=0),
            Option(
                "reconnect-delay",
                "int",
                "seconds that requests wait for a lost connection to come back; 0: they fail",
                default=0,
                minimum=0,
            ),
        ],
    )

    def __init__(self, client: Client, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self.client = client
        if not read_only:
            self._require_writable_export("open")
        self.supported_flags = FUA if client.can_fua else 0
        self._context = wire.BASE_ALLOCATION in client.contexts

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        """Connects. Any LaminaError of `Client.connect`; ReadOnly for an export that cannot be written, where it should."""
        said = {option.name: options[option.name] for option in OPTIONS}
        timeout = said.pop("timeout")
        target = from_options(said)
        # Several connections hide the latency of a network. On one machine each only adds wake-ups: with two processors and
        # qemu-nbd, copying 1 GiB took 0.81 s over one connection and 0.94 over four.
        client = Client.connect(
            target,
            connections=options["connections"] or (1 if target.socket is not None else 4),
            open_timeout=options["open-timeout"],
            reconnect=options["reconnect-delay"],
            request_timeout=None if timeout is None else parse_timeout(timeout),
        )
        try:
            node = cls(client, name=opener.name, read_only=opener.read_only)
            node.reconnects = options["reconnect-delay"] > 0
            return node
        except BaseException:
            client.close()
            raise

    @property
    def size(self) -> int:
        return self.client.size

    @property
    def limits(self) -> Limits:
        """The server's block sizes. Only payloads are limited; how far other requests reach is for the client to mind."""
        block = self.client.minimum
        return Limits(
            request_alignment=block,
            max_transfer=self.client.max_transfer,
            zero_alignment=block,
            discard_alignment=block,
        )

    @property
    def filename(self) -> str:
        return str(self.client.target)

    def read_into(self, offset: int, view: memoryview) -> None:
        self.client.read_into(offset, view, piece=PIECE)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.client.write(offset, view, bool(flags & FUA), piece=PIECE)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """WRITE_ZEROES; with NO_FALLBACK as FAST_ZERO, without MAY_UNMAP as NO_HOLE."""
        self.client.zero(
            offset,
            length,
            fua=bool(flags & FUA),
            no_hole=not flags & MAY_UNMAP,
            fast=bool(flags & NO_FALLBACK),
        )

    def discard(self, offset: int, length: int) -> None:
        self.client.trim(offset, length)

    def flush(self) -> None:
        self.client.flush()

    def extents(self, offset: int, length: int) -> Extents:
        from ..extents import DATA, PRESENT, ZERO, Extents
        from ..numeric import np

        if not self._context or self.client.terse:
            return Extents.single(offset, length, data=True, present=True, file=self, offset=offset)
        lengths: list[int] = []
        states: list[int] = []
        at, end = offset, offset + length
        for _ in range(_MAX_QUESTIONS):
            for size, status in self._ask(at, end - at):
                lengths.append(size)
                states.append(status & (wire.STATE_HOLE | wire.STATE_ZERO))
                at += size
            if at == end or len(lengths) >= limits.MAX_ROWS:
                break
        else:
            lengths.append(end - at)
            states.append(0)
        # A hole that is not said to read as zeros must be read: it is data, as far as anybody can tell.
        meaning = np.array([DATA, DATA, DATA | ZERO, ZERO], np.uint8) | np.uint8(PRESENT)
        sizes = np.array(lengths, np.int64)
        start = np.cumsum(sizes) - sizes + offset
        flags = meaning[np.array(states, np.int64)]
        found = Extents.from_columns(start, sizes, flags, file=0, offset=start.copy(), files=(self,))
        return bounded(found.coalesce())

    def _ask(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, flags) of base:allocation from `offset` on. The last bytes of an export whose size is no multiple of its
        block are data where the server refuses to say: nothing asks about them in a way that is aligned."""
        try:
            return self.client.block_status(offset, length)[wire.BASE_ALLOCATION]
        except BlockIOError as error:
            self._require_untold(error, offset)
            return [(length, 0)]

    def _require_untold(self, error: BlockIOError, offset: int) -> None:
        """Raise `error`, of a question about the status from `offset` on, unless it means that the server does not say."""
        if self.client.terse:
            return  # its replies cover so few bytes each that the whole disk would take too long
        if error.errno != EINVAL or offset < align_down(self.size, self.client.minimum):
            raise error

    def reads_zero(self, offset: int, length: int) -> bool:
        if not self._context or self.client.terse:
            return False
        size, status = self.client.block_status(offset, length, one=True)[wire.BASE_ALLOCATION][0]
        return size >= length and bool(status & wire.STATE_ZERO)

    @property
    def pipelines(self) -> bool:
        return True

    # -- what goes out at once, and is waited for later

    def start_read(self, offset: int, view: memoryview) -> Pending:
        return self.client.start_read(offset, view, piece=PIECE)

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        return self.client.start_write(offset, view, bool(flags & FUA), piece=PIECE)

    def start_zero(self, offset: int, length: int, flags: int = 0) -> Pending:
        return self.client.start_zero(
            offset,
            length,
            fua=bool(flags & FUA),
            no_hole=not flags & MAY_UNMAP,
            fast=bool(flags & NO_FALLBACK),
        )

    def zero_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        found: list[tuple[int, bool]] = self.start_zero_runs(offset, length).wait()
        return found

    def start_zero_runs(self, offset: int, length: int) -> Pending:
        if not self._context or self.client.terse:
            return Done([(length, False)])
        return _ZeroRuns(self, offset, length, self.client.start_block_status(offset, length))

    def reopen(self, read_only: bool) -> None:
        """The connection stays: whether an export is writable is the server's to say, and it has said so. Raises ReadOnly for
        an export that is not, and where the flush before the change to read-only fails, its error."""
        if read_only:
            self.flush()
        else:
            self._require_writable_export("reopen")
        self.read_only = read_only

    def _require_writable_export(self, operation: str) -> None:
        if self.client.read_only:
            rest = "or let the server export it for writing, and open it again"
            hint = Hint(f"open it read-only (read_only=True), {rest}", command=f"open it read-only (-r), {rest}")
            raise ReadOnly(
                "the server exports this read-only", path=str(self.client.target), operation=operation, hint=hint
            )

    @property
    def held(self) -> bool:
        return not self.client.closed

    def close(self) -> None:
        self.client.close()

    def after_fork(self) -> None:
        """The connection is the parent's: a request of this process would take the reply to one of that."""
        super().after_fork()
        for operation in (*_OPERATIONS, "start_read", "start_write", "start_zero", "zero_runs", "start_zero_runs"):
            setattr(self, operation, partial(self._refuse_foreign, operation))

    def _refuse_foreign(self, operation: str, *_: object, **__: object) -> NoReturn:
        raise Closed(
            "another process opened it, and this one was forked from that: the connection is not its own",
            path=self.filename,
            operation=operation,
            hint="open it in this process, after the fork",
        )

    def forsake(self) -> None:
        self.client.forsake()


class _ZeroRuns:
    """A question about zeros that went out."""

    __slots__ = ("_asked", "_length", "_node", "_offset")

    def __init__(self, node: NbdStorage, offset: int, length: int, asked: Pending) -> None:
        self._node, self._offset, self._length, self._asked = node, offset, length, asked

    def wait(self) -> list[tuple[int, bool]]:
        try:
            told = self._asked.wait()[wire.BASE_ALLOCATION]
        except BlockIOError as error:
            self._node._require_untold(error, self._offset)
            return [(self._length, False)]
        return [(length, bool(status & wire.STATE_ZERO)) for length, status in told]

    def leave(self) -> None:
        self._asked.leave()
