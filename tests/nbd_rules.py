"""The rules of NBD that a server is held to, as rows of tables: what a row is, and how it is played.

Used by the conformance tests of the server. Section numbers in the rows are those of the survey of NBD implementations:
1 features, 2 rules that implementations get wrong (2.1 block sizes, 2.2 errors, 2.3 replies, 2.4 writes, 2.5 negotiation, 2.6
extended headers), 7 attacks; T1 to T15 those of the safety policy. Measured versions, where a row says what others do: QEMU
7.2, nbdkit 1.32, nbd-server 3.24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lamina
from lamina.bitmap import MemoryBitmap
from lamina.limits import MIB
from lamina.nbd import Export, Server
from lamina.nbd import wire as w

from .nbd_raw import CLIENT_FLAGS, Raw, await_server, dial, info, meta, option_bytes

SIZE = 1 * MIB
#: Exports "disk" (writable, minimum block 1), "fixed" (the same image, read-only), "blocks" (minimum block 4096), "snö".
NAMES = ("disk", "fixed", "blocks", "snö")


def rule_exports() -> list[Export]:
    disk = lamina.open({"driver": "memory", "size": SIZE}, read_only=False)
    disk.write(0, b"d" * 1024)
    blocks = lamina.open(
        {"driver": "blkdebug", "align": 4096, "image": {"driver": "memory", "size": SIZE}}, read_only=False
    )
    return [
        Export(disk, "disk", description="a disk", writable=True, bitmaps={"b0": MemoryBitmap(), "b1": MemoryBitmap()}),
        Export(disk, "fixed"),
        Export(blocks, "blocks", writable=True),
        Export(disk, "snö", description="Schnee ☃"),
    ]


@contextmanager
def rule_servers(folder: Path) -> Iterator[tuple[Path, Path]]:
    """The sockets of two servers: one with all the exports, and one with the only export "only"."""
    several, single = folder / "several", folder / "single"
    exports = rule_exports()
    with (
        lamina.open({"driver": "memory", "size": SIZE}, read_only=False) as image,
        Server(exports, unix=str(several)),
        Server([Export(image, "only", writable=True)], unix=str(single)),
    ):
        await_server(several)
        await_server(single)
        yield several, single
    for export in exports:
        export.image.close()


class Ask(NamedTuple):
    """An option and what answers it: types of replies, or (type, data); a last None: the connection ends."""

    option: int
    data: bytes = b""
    expected: tuple[Any, ...] = ()
    message: bytes = b""  #: what is sent, if not an option that is well-formed


class Case(NamedTuple):
    name: str
    rule: str  #: what the specification asks for, and where
    steps: list[Ask]
    then: str = "options"  #: or "closed", "transmission"
    check: Callable[[Raw], object] = lambda raw: None  #: asked when all steps are done
    peers: str = ""  #: where others do not follow it
    flags: int = CLIENT_FLAGS
    single: bool = False


ACK, UNSUP, INVALID, UNKNOWN = w.REP_ACK, w.REP_ERR_UNSUP, w.REP_ERR_INVALID, w.REP_ERR_UNKNOWN
POLICY, TOO_BIG, TLS_REQD = w.REP_ERR_POLICY, w.REP_ERR_TOO_BIG, w.REP_ERR_TLS_REQD
INFO, META = w.REP_INFO, w.REP_META_CONTEXT
STRUCTURED = Ask(w.OPT_STRUCTURED_REPLY, b"", (ACK,))
EXTENDED = Ask(w.OPT_EXTENDED_HEADERS, b"", (ACK,))
SET_BASE = Ask(w.OPT_SET_META_CONTEXT, meta("disk", "base:allocation"), (META, ACK))


def go(name: str, *wanted: int, more: int = 0) -> Ask:
    return Ask(w.OPT_GO, info(name, *wanted), (INFO,) * (1 + more) + (ACK,))


def export_name(name: bytes, *expected: Any, length: int | None = None) -> Ask:
    return Ask(w.OPT_EXPORT_NAME, b"", expected, option_bytes(w.OPT_EXPORT_NAME, name, length=length))


def refused(option: int, data: bytes, reply: int, name: str, rule: str, peers: str = "") -> Case:
    return Case(name, rule, [Ask(option, data, (reply,))], peers=peers)


def has(bits: int, wanted: bool = True) -> Callable[[Raw], None]:
    def check(raw: Raw) -> None:
        assert bool(raw.flags & bits) == wanted, f"transmission flags {raw.flags:#x}"

    return check


def no_status(raw: Raw) -> None:
    assert raw.ask(w.CMD_BLOCK_STATUS, 0, 4096).error == w.EINVAL


def some_status(raw: Raw) -> None:
    assert raw.block_status(0, 4096)


def play(raw: Raw, steps: list[Ask]) -> None:
    """Send each option, and hold its replies against what is expected."""
    for option, data, expected, message in steps:
        raw.stream.send(message or option_bytes(option, data))
        if expected == (None,):
            assert raw.ended()
            return
        if option == w.OPT_EXPORT_NAME:
            raw.size, raw.flags = w.EXPORT_REPLY.codec.unpack(raw.stream.recv(w.EXPORT_REPLY.size))
            if expected == ("124 zeros",):
                assert raw.stream.recv(124) == bytes(124)
            continue
        replies = raw.option_replies(option)
        if replies[-1][0] == ACK:
            raw._agreed(option, replies)
        assert len(replies) == len(expected), replies
        for found, wanted in zip(replies, expected, strict=True):
            assert found == wanted if isinstance(wanted, tuple) else found[0] == wanted, (found, wanted)


def settle(raw: Raw, then: str) -> None:
    """The conversation is where it must be, in step."""
    if then == "options":
        for data in (b"", b"in step?"):
            assert raw.option(0x4C414D49, data)[0][0] == UNSUP
        assert raw.option(w.OPT_ABORT) == [(ACK, b"")]
    elif then == "transmission":
        assert raw.size == SIZE
        assert len(raw.read(0, 8192)) == 8192
        raw.disc()
    assert raw.ended()


def run_case(case: Case, servers: tuple[Path, Path]) -> None:
    """Play a row against a running server, see that it is in step, and that the next client is served."""
    path = servers[case.single]
    with dial(path) as raw:
        assert raw.greet(case.flags) == w.FLAG_FIXED_NEWSTYLE | w.FLAG_NO_ZEROES
        play(raw, case.steps)
        if case.then == "transmission":
            case.check(raw)
        settle(raw, case.then)
    with dial(path) as other:
        other.begin("only" if case.single else "disk", "simple")
        assert len(other.read(0, 512)) == 512
