"""Requests and replies of the NBD server, rule by rule: one row of a table for each, with where others do not follow it.

Each row is one request, to a running server, with simple, structured and extended replies wherever it has a meaning there.
The client holds every byte of the replies against the rules (`nbd_raw`): chunks cover a READ exactly and do not overlap,
errors are those of the protocol, cookies are answered once. After it the stream is in step, and the disk holds what it must.
`nbd_rules` says what the numbers of the rules mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from lamina.limits import GIB, KIB, MIB
from lamina.nbd import wire as w

from ..nbd_disks import BIG, CHUNKS, MODES, SIZE, Disks, serve_disks
from ..nbd_raw import Raw, Reply, dial

FUA, NO_HOLE, DF = w.CMD_FLAG_FUA, w.CMD_FLAG_NO_HOLE, w.CMD_FLAG_DF
REQ_ONE, FAST_ZERO, PAYLOAD_LEN = w.CMD_FLAG_REQ_ONE, w.CMD_FLAG_FAST_ZERO, w.CMD_FLAG_PAYLOAD_LEN
READ, WRITE, FLUSH, TRIM, CACHE, ZERO, STATUS = (
    w.CMD_READ,
    w.CMD_WRITE,
    w.CMD_FLUSH,
    w.CMD_TRIM,
    w.CMD_CACHE,
    w.CMD_WRITE_ZEROES,
    w.CMD_BLOCK_STATUS,
)
BASE = ("base:allocation",)


class Row(NamedTuple):
    name: str
    rule: str  #: what the specification asks for, and where
    type: int
    offset: int = 0
    length: int = 0
    error: int = 0
    flags: int = 0
    payload: bytes | None = None
    peers: str = ""  #: where others do not follow it
    modes: tuple[str, ...] = MODES
    export: str = "disk"
    contexts: tuple[str, ...] = ()
    asked: bool = True  #: the client asked for the block sizes, and so keeps to them
    announced: bool = True  #: a WRITE has the flag PAYLOAD_LEN, with extended headers
    effect: int | None = None  #: of a BLOCK_STATUS with a payload: the length that it names


def write(name: str, rule: str, offset: int, payload: bytes, error: int = 0, **more: Any) -> Row:
    return Row(name, rule, WRITE, offset, len(payload), error, payload=payload, **more)


def select(name: str, rule: str, length: int, *ids: int, error: int = 0, tail: bytes = b"") -> Row:
    """BLOCK_STATUS with a payload that names contexts."""
    payload = length.to_bytes(8) + b"".join(number.to_bytes(4) for number in ids) + tail
    flags, contexts = PAYLOAD_LEN, ("base:allocation", "lamina:exact")
    return Row(
        name, rule, STATUS, 0, len(payload), error, flags, payload, "", MODES[2:], contexts=contexts, effect=length
    )


READS = [
    Row("read", "1c READ", READ, 0, 4096),
    Row("read-hole", "2.3 zeros may be a hole", READ, 256 * KIB, 64 * KIB, peers="nbdkit never sends holes"),
    Row("read-mixed", "2.3 several chunks cover it exactly, without overlap", READ, 100 * KIB, 600 * KIB + 7),
    Row("read-all", "2.3 the same, to the last byte", READ, 0, SIZE),
    Row("read-last-byte", "1c READ up to the end", READ, SIZE - 1, 1),
    Row("read-odd", "2.1 a minimum block of 1 is one", READ, 12345, 54321),
    Row("read-fua", "2.2 FUA on any command: MUST accept", READ, 0, 512, flags=FUA),
    Row("read-nothing", "1c zero-length READ SHOULD NOT disconnect", READ, 0, 0, peers="nbdkit: EINVAL"),
    Row("read-nothing-at-end", "1c zero-length READ at the end", READ, SIZE, 0, peers="nbdkit: EINVAL"),
    Row("read-nothing-outside", "2.2 past the end: SHOULD EINVAL", READ, SIZE + 1, 0, w.EINVAL),
    Row("read-past-end", "2.2 past the end: SHOULD EINVAL", READ, SIZE - 1, 2, w.EINVAL),
    Row("read-at-end", "2.2 past the end: SHOULD EINVAL", READ, SIZE, 1, w.EINVAL),
    Row("read-2^63", "2.2 past the end: SHOULD EINVAL", READ, 1 << 63, 512, w.EINVAL),
    Row("read-last-offset", "2.2 offset 2^64-1: as past the end", READ, (1 << 64) - 1, 1, w.EINVAL),
    Row("read-overflow", "2.2 offset + length over 2^64: as past the end", READ, (1 << 64) - 512, 1024, w.EINVAL),
    Row("read-overflow-0", "2.2 offset + length is 2^64", READ, (1 << 64) - 512, 512, w.EINVAL),
    Row("read-32m", "1c 32 MiB is the portable figure", READ, 0, 32 * MIB, export="big"),
    Row(
        "read-above",
        "2.1, 2.2 above the maximum: EINVAL, never ENOMEM",
        *(READ, 0, 32 * MIB + 1, w.EINVAL),
        export="big",
        peers="nbdkit: ENOMEM above 64 MiB; nbd-server serves it",
    ),
    Row("read-2^32-1", "2.2 above the maximum", READ, 0, 0xFFFFFFFF, w.EINVAL, export="big"),
    Row("read-2^32", "2.6 64 bits of length", READ, 0, (1 << 32) + 512, w.EINVAL, export="big", modes=MODES[2:]),
    Row("read-2^64-1", "2.6 64 bits of length", READ, 0, (1 << 64) - 1, w.EINVAL, export="big", modes=MODES[2:]),
    Row("read-df", "2.3 DF: one chunk of content", READ, 100 * KIB, 64 * KIB, flags=DF, modes=CHUNKS),
    Row("read-df-hole", "2.3 DF over a hole", READ, 256 * KIB, 64 * KIB, flags=DF, modes=CHUNKS),
    Row("read-df-1", "2.3 DF MUST be honoured up to 64 KiB", READ, SIZE - 1, 1, flags=DF, modes=CHUNKS),
    Row("read-df-simple", "2.2 DF without structured replies", READ, 0, 512, w.EINVAL, DF, modes=MODES[:1]),
    Row("read-no-hole", "2.2 inapplicable flag", READ, 0, 512, w.EINVAL, NO_HOLE, peers="nbd-server accepts it"),
    Row("read-req-one", "2.2 inapplicable flag: SHOULD EINVAL", READ, 0, 512, w.EINVAL, REQ_ONE),
    Row("read-fast-zero", "2.2 inapplicable flag: SHOULD EINVAL", READ, 0, 512, w.EINVAL, FAST_ZERO),
    Row("read-flag-6", "2.2 unknown flag: SHOULD EINVAL", READ, 0, 512, w.EINVAL, 1 << 6),
    Row("read-flag-15", "2.2 unknown flag: SHOULD EINVAL", READ, 0, 512, w.EINVAL, 1 << 15),
    Row("read-payload-flag", "2.6 it has no meaning here", READ, 0, 512, w.EINVAL, PAYLOAD_LEN, modes=MODES[:2]),
    Row("read-fixed", "1b READ_ONLY: reads go on", READ, 0, 512, export="fixed"),
    Row("read-aligned", "2.1 requests are multiples of the minimum block", READ, 4096, 8192, export="blocks"),
    Row(
        "read-misaligned",
        "2.1 misaligned: SHOULD EINVAL",
        READ,
        512,
        4096,
        w.EINVAL,
        export="blocks",
        peers="QEMU serves it",
    ),
    Row("read-short", "2.1 misaligned: SHOULD EINVAL", READ, 0, 512, w.EINVAL, export="blocks", peers="QEMU serves it"),
    Row(
        "read-unconstrained",
        "2.1 who did not ask is let in, and served",
        READ,
        511,
        777,
        export="blocks",
        asked=False,
    ),
    Row("read-padding", "2.1 (b): the tail of a rounded size reads as zeros", READ, 512, 512, export="odd"),
    Row("read-odd-all", "2.3 chunks keep to the minimum block", READ, 0, 1024, export="odd", peers="QEMU: 1000 + 24"),
    Row("read-past-padding", "2.2 past the end: SHOULD EINVAL", READ, 512, 1024, w.EINVAL, export="odd"),
]

WRITES = [
    write("write", "1c WRITE", 4096, b"w" * 4096),
    write("write-odd", "2.1 a minimum block of 1 is one", 12345, b"w" * 777),
    write("write-fua", "2.4 FUA", 0, b"w" * 512, flags=FUA),
    write("write-all", "1c WRITE of a mebibyte", 0, b"wx" * (SIZE // 2)),
    write("write-zeros", "1c zeros are data like any", 0, bytes(64 * KIB)),
    write("write-last-byte", "1c WRITE up to the end", SIZE - 1, b"w"),
    write("write-nothing", "1c zero-length WRITE SHOULD NOT disconnect", 0, b"", peers="nbdkit: ENOSPC"),
    write("write-nothing-at-end", "1c zero-length WRITE at the end", SIZE, b"", peers="nbdkit: ENOSPC"),
    write(
        "write-past-end", "2.2 SHOULD ENOSPC, invariant 45: drained", SIZE - 1, b"ww", w.ENOSPC, peers="QEMU: EINVAL"
    ),
    write("write-at-end", "2.2 past the end: SHOULD ENOSPC", SIZE, b"w" * 512, w.ENOSPC, peers="QEMU: EINVAL"),
    write("write-outside", "2.2 past the end, nothing of it is written", SIZE - MIB // 2, b"w" * MIB, w.ENOSPC),
    write("write-overflow", "2.2 offset + length over 2^64", (1 << 64) - 512, b"w" * 1024, w.ENOSPC),
    write(
        "write-read-only", "2.2 SHOULD EPERM, drained", 0, b"w" * 4096, w.EPERM, export="fixed", peers="QEMU: EINVAL"
    ),
    write("write-read-only-long", "2.2 SHOULD EPERM, drained", 0, b"w" * SIZE, w.EPERM, export="fixed"),
    write("write-read-only-nothing", "2.2 SHOULD EPERM", 0, b"", w.EPERM, export="fixed"),
    write("write-df", "2.2 inapplicable flag, drained", 0, b"w" * 512, w.EINVAL, flags=DF),
    write("write-no-hole", "2.2 inapplicable flag, drained", 0, b"w" * 512, w.EINVAL, flags=NO_HOLE),
    write("write-flag-7", "2.2 unknown flag, drained", 0, b"w" * 70000, w.EINVAL, flags=1 << 7),
    write("write-32m", "1c 32 MiB is the portable figure", 0, b"wxyz" * (8 * MIB), export="big"),
    write("write-misaligned", "2.1 SHOULD EINVAL", 512, b"w" * 4096, w.EINVAL, export="blocks", peers="QEMU serves it"),
    write("write-unconstrained", "2.1 MUST not corrupt: RMW", 4000, b"w" * 200, export="blocks", asked=False),
    write("write-padding", "2.1 (b) the padding takes zeros", 512, b"w" * 488 + bytes(24), export="odd"),
    write("write-into-padding", "2.1 (b) and has no room for more", 512, b"w" * 512, w.ENOSPC, export="odd"),
    write(
        "write-unannounced",
        "2.6 WRITE must set PAYLOAD_LEN; its payload comes all the same, and it is served",
        *(0, b"w" * 512),
        modes=MODES[2:],
        announced=False,
        peers="QEMU 10's client leaves the flag out",
    ),
    Row("zero", "1c WRITE_ZEROES", ZERO, 4096, 64 * KIB),
    Row("zero-odd", "1c WRITE_ZEROES of any bytes", ZERO, 999, 77),
    Row("zero-fua", "2.4 FUA", ZERO, 0, 512, flags=FUA),
    Row("zero-no-hole", "2.4 NO_HOLE must be supported with WRITE_ZEROES", ZERO, 0, 4096, flags=NO_HOLE),
    Row(
        "zero-fast", "1b FAST_ZERO", ZERO, 0, 64 * KIB, flags=FAST_ZERO, peers="nbdkit dies, where it is not advertised"
    ),
    Row("zero-flags", "1b all of them together", ZERO, 0, 64 * KIB, flags=FUA | NO_HOLE | FAST_ZERO),
    Row("zero-nothing", "1c zero-length SHOULD NOT disconnect", ZERO, 0, 0, peers="nbdkit: ENOSPC"),
    Row("zero-past-end", "2.2 past the end: SHOULD ENOSPC", ZERO, SIZE - 1, 2, w.ENOSPC, peers="QEMU: EINVAL"),
    Row("zero-overflow", "2.2 offset + length over 2^64", ZERO, (1 << 64) - 1, 2, w.ENOSPC),
    Row("zero-read-only", "2.2 SHOULD EPERM", ZERO, 0, 512, w.EPERM, export="fixed", peers="QEMU: EINVAL"),
    Row("zero-df", "2.2 inapplicable flag: SHOULD EINVAL", ZERO, 0, 512, w.EINVAL, DF),
    Row("zero-payload-flag", "2.6 it has no meaning here", ZERO, 0, 512, w.EINVAL, PAYLOAD_LEN, modes=MODES[:2]),
    Row("zero-64m", "2.1 the maximum payload is none for effects", ZERO, 0, 64 * MIB, export="big"),
    Row("zero-2^32-1", "2.4 no EOVERFLOW with FAST_ZERO", ZERO, 0, 0xFFFFFFFF, flags=FAST_ZERO, export="big"),
    Row("zero-8g", "2.6 64 bits of length", ZERO, 0, 8 * GIB, export="big", modes=MODES[2:]),
    Row("zero-misaligned", "2.1 SHOULD EINVAL", ZERO, 512, 4096, w.EINVAL, export="blocks"),
    Row("zero-unconstrained", "2.1 MUST not corrupt: RMW", ZERO, 4000, 200, export="blocks", asked=False),
    Row("zero-padding", "2.1 (b) up to the rounded end", ZERO, 512, 512, export="odd"),
]

OTHERS = [
    Row("trim", "1c TRIM", TRIM, 0, 4096),
    Row("trim-fua", "2.4 FUA", TRIM, 0, 4096, flags=FUA),
    Row("trim-nothing", "1c zero-length SHOULD NOT disconnect", TRIM, 0, 0, peers="nbdkit: EINVAL"),
    Row("trim-past-end", "2.2 past the end: SHOULD EINVAL", TRIM, SIZE - 1, 2, w.EINVAL),
    Row("trim-overflow", "2.2 offset + length over 2^64", TRIM, (1 << 64) - 512, 1024, w.EINVAL),
    Row("trim-read-only", "2.2 SHOULD EPERM", TRIM, 0, 512, w.EPERM, export="fixed", peers="QEMU: EINVAL"),
    Row("trim-64m", "2.1 the maximum payload is none for effects", TRIM, 0, 64 * MIB, export="big"),
    Row("trim-2^32-1", "2.1 the same", TRIM, 0, 0xFFFFFFFF, export="big"),
    Row("trim-8g", "2.6 64 bits of length", TRIM, 0, 8 * GIB, export="big", modes=MODES[2:]),
    Row("trim-fast-zero", "2.2 inapplicable flag: SHOULD EINVAL", TRIM, 0, 512, w.EINVAL, FAST_ZERO),
    Row("trim-misaligned", "2.1 SHOULD EINVAL", TRIM, 0, 512, w.EINVAL, export="blocks"),
    Row("trim-padding", "2.1 (b) up to the rounded end", TRIM, 512, 512, export="odd"),
    Row("cache", "1b CACHE", CACHE, 0, 64 * KIB),
    Row("cache-fua", "2.2 FUA on any command: MUST accept", CACHE, 0, 512, flags=FUA),
    Row("cache-nothing", "1c zero-length SHOULD NOT disconnect", CACHE, 0, 0),
    Row(
        "cache-64m",
        "2.1 the maximum payload is none for effects",
        CACHE,
        0,
        64 * MIB,
        export="big",
        peers="QEMU: EINVAL",
    ),
    Row("cache-past-end", "2.2 past the end: SHOULD EINVAL", CACHE, SIZE, 512, w.EINVAL),
    Row("cache-no-hole", "2.4 unknown flags must be refused", CACHE, 0, 512, w.EINVAL, NO_HOLE),
    Row("cache-read-only", "1b a read-only export may be cached", CACHE, 0, 512, export="fixed"),
    Row("cache-padding", "2.1 (b) up to the rounded end", CACHE, 0, 1024, export="odd"),
    Row("flush", "1c FLUSH", FLUSH),
    Row("flush-fua", "2.2 FUA on any command: MUST accept", FLUSH, flags=FUA),
    Row("flush-read-only", "1b told for a read-only export, too", FLUSH, export="fixed"),
    Row("flush-offset", "2.2 offset MUST be 0", FLUSH, 512, 0, w.EINVAL, peers="QEMU and nbd-server accept it"),
    Row("flush-length", "2.2 length MUST be 0", FLUSH, 0, 512, w.EINVAL, peers="QEMU and nbd-server accept it"),
    Row("flush-df", "2.2 inapplicable flag: SHOULD EINVAL", FLUSH, 0, 0, w.EINVAL, DF),
    *(
        Row(f"command-{number:#x}", "2.2 unknown command, RESIZE: SHOULD EINVAL", number, 0, length, w.EINVAL)
        for number, length in ((w.CMD_RESIZE, 512), (9, 0), (0x7FFF, 512), (0xFFFF, 0xFFFFFFFF))
    ),
]

STATUSES = [
    Row("status", "1c base:allocation", STATUS, 0, SIZE, contexts=BASE, modes=CHUNKS),
    Row("status-byte", "1c of one byte", STATUS, SIZE - 1, 1, contexts=BASE, modes=CHUNKS),
    Row("status-fua", "2.2 FUA on any command: MUST accept", STATUS, 0, 512, 0, FUA, contexts=BASE, modes=CHUNKS),
    Row(
        "status-one",
        "2.3 one extent, no longer than asked",
        STATUS,
        0,
        SIZE,
        0,
        REQ_ONE,
        contexts=BASE,
        modes=CHUNKS,
    ),
    Row("status-none-simple", "2.2 no context selected: SHOULD EINVAL", STATUS, 0, 512, w.EINVAL),
    Row("status-nothing", "1c zero-length: answered, EINVAL", STATUS, 0, 0, w.EINVAL, contexts=BASE, modes=CHUNKS),
    Row(
        "status-past-end",
        "2.2 past the end: SHOULD EINVAL",
        STATUS,
        SIZE - 512,
        1024,
        w.EINVAL,
        contexts=BASE,
        modes=CHUNKS,
    ),
    Row("status-overflow", "2.2 over 2^64", STATUS, (1 << 64) - 512, 1024, w.EINVAL, contexts=BASE, modes=CHUNKS),
    Row("status-df", "2.2 inapplicable flag", STATUS, 0, 512, w.EINVAL, DF, contexts=BASE, modes=CHUNKS),
    Row(
        "status-2^32-1",
        "CVE-2025-47711: a length that rounds to 2^32",
        *(STATUS, 0, 0xFFFFFFFF),
        contexts=BASE,
        modes=CHUNKS,
        export="big",
        peers="nbdkit 1.32 dies",
    ),
    Row("status-16g", "2.6 one extent of 64 bits", STATUS, 0, BIG, contexts=BASE, modes=MODES[2:], export="big"),
    Row(
        "status-misaligned", "2.1 SHOULD EINVAL", STATUS, 0, 512, w.EINVAL, contexts=BASE, modes=CHUNKS, export="blocks"
    ),
    select("select-one", "2.6 answered for those contexts alone", SIZE, 2),
    select("select-both", "2.6 in whatever order", SIZE, 2, 1),
    select("select-none", "2.6 no context: EINVAL", SIZE, error=w.EINVAL),
    select("select-twice", "2.6 duplicate ids: consume, EINVAL", SIZE, 1, 1, error=w.EINVAL),
    select("select-unknown", "2.6 unknown ids: consume, EINVAL", SIZE, 1, 3, error=w.EINVAL),
    select("select-zero", "2.6 unknown ids: consume, EINVAL", SIZE, 0, error=w.EINVAL),
    select("select-many", "2.6 many ids: consume, EINVAL", SIZE, *range(5000), error=w.EINVAL),
    select("select-nothing", "1c zero-length: EINVAL", 0, 1, error=w.EINVAL),
    select("select-past-end", "2.2 past the end: SHOULD EINVAL", SIZE + 1, 1, error=w.EINVAL),
    select("select-2^64-1", "2.2 past the end: SHOULD EINVAL", (1 << 64) - 1, 1, error=w.EINVAL),
    select("select-part", "2.6 half an id: consume, EINVAL", SIZE, 1, error=w.EINVAL, tail=b"\0\0"),
    Row(
        "select-no-length",
        "2.6 consume, EINVAL",
        STATUS,
        0,
        4,
        w.EINVAL,
        PAYLOAD_LEN,
        b"four",
        "",
        MODES[2:],
        contexts=BASE,
    ),
    Row("select-no-payload", "2.6 EINVAL", STATUS, 0, 0, w.EINVAL, PAYLOAD_LEN, b"", "", MODES[2:], contexts=BASE),
    Row(
        "select-without",
        "2.6 not advertised",
        STATUS,
        0,
        12,
        w.EINVAL,
        PAYLOAD_LEN,
        bytes(12),
        "",
        MODES[2:],
    ),
    *(
        Row(
            f"payload-{word}-{length}",
            "2.6 a payload where none is meant: consume it, then EINVAL",
            *(number, 0, length, w.EINVAL, PAYLOAD_LEN, bytes(length)),
            modes=MODES[2:],
        )
        for number, word in (
            (READ, "read"),
            (TRIM, "trim"),
            (ZERO, "zero"),
            (CACHE, "cache"),
            (FLUSH, "flush"),
            (77, "77"),
        )
        for length in (1, 512, 2 * MIB)
    ),
    Row(
        "payload-32m",
        "2.6 the longest payload is consumed",
        *(READ, 0, 32 * MIB, w.EINVAL, PAYLOAD_LEN, bytes(32 * MIB)),
        modes=MODES[2:],
    ),
]

ROWS = READS + WRITES + OTHERS + STATUSES


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disks]:
    with serve_disks(tmp_path_factory.mktemp("nbd")) as disks:
        yield disks


def expected(row: Row, before: bytes) -> bytes | None:
    """What the disk holds after a row (None: it may hold several things); as far as `before` goes."""
    length = min(row.length, len(before) - row.offset)
    if row.error or length <= 0 or row.type not in (WRITE, ZERO, TRIM):
        return before
    if row.type == TRIM:
        return None
    part = row.payload[:length] if row.payload is not None else bytes(length)
    return before[: row.offset] + part + before[row.offset + length :]


CASES = [pytest.param(row, mode, id=f"{row.name}-{mode}") for row in ROWS for mode in row.modes]


@pytest.mark.parametrize(("row", "mode"), CASES)
def test_rule(row: Row, mode: str, disks: Disks) -> None:
    disks.reset()
    before = disks.content(row.export)
    with dial(disks.path) as raw:
        raw.begin(row.export, mode, row.contexts, block_sizes=row.asked)
        if not row.asked:
            raw.minimum = 1
        flags = row.flags | (PAYLOAD_LEN if row.type == WRITE and mode == "extended" and row.announced else 0)
        raw.request(row.type, row.offset, row.length, flags=flags, payload=row.payload or b"", effect=row.effect)
        # It is in step: what comes behind the request is the next one, and both are answered.
        raw.request(READ, 0, raw.minimum)
        judge(row, before, raw, raw.collect())
        raw.disc()
        assert raw.ended()
    wanted = expected(row, before)
    assert wanted is None or disks.content(row.export) == wanted


def judge(row: Row, before: bytes, raw: Raw, replies: list[Reply]) -> None:
    (reply,) = [one for one in replies if one.cookie == raw._cookie - 1]
    (other,) = [one for one in replies if one.cookie == raw._cookie]
    assert not other.error
    assert reply.error == row.error, reply.text
    assert not row.error or reply.simple or reply.text, "errors say what is wrong: nbdkit's text is empty"
    if row.type == READ and not row.error:
        padded = before + bytes(raw.size - len(before)) if row.export != "big" else bytes(row.length)
        assert reply.data == padded[row.offset : row.offset + row.length]
    if row.type == STATUS and row.payload is not None and not row.error:
        asked = [int.from_bytes(row.payload[at : at + 4]) for at in range(8, len(row.payload), 4)]
        assert list(reply.status) == asked


def test_there_are_rules_enough() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 150
    assert all(row.rule for row in ROWS)
