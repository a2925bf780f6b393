"""The client's handshake with servers that are right, odd or hostile: every case is heard whole and byte by byte."""

from __future__ import annotations

import struct
from typing import NamedTuple

import pytest

from lamina.errors import LaminaError
from lamina.nbd import wire
from lamina.nbd.client.details import ExportDetails, HandshakeOptions, Listed
from lamina.nbd.client.negotiation import MAX_REPLIES, Negotiation, Task

from ..nbd_scripts import (
    ALL_FLAGS,
    FIXED,
    GO,
    SIZE,
    STRUCTURED,
    Cut,
    context,
    export,
    greeting,
    info_export,
    info_sizes,
    negotiate,
    option,
    refusal,
)

STEPS = [1 << 30, 1, 7]
OPEN = HandshakeOptions("x")
TLS = HandshakeOptions("x", "require")
MAYBE = HandshakeOptions("x", "allow")
PLAIN = HandshakeOptions("x", structured=False, extended=False, contexts=())
OLD = wire.INIT_MAGIC.to_bytes(8, "big") + wire.OLDSTYLE_MAGIC.to_bytes(8, "big")
NUL = bytes(124)
TEXT = b"no\x1b[2Jpe\0"
A, B = b"a" * 2048, b"b" * 2048


class Hello(NamedTuple):
    """A handshake: what the server says, and the error that this is, or None if it is none."""

    name: str
    script: bytes
    error: str | None = None
    wanted: HandshakeOptions = OPEN
    task: Task = "enter"
    errno: int = 71
    farewell: bytes = b""


ABORT = wire.OPTION.pack(option=wire.OPT_ABORT, length=0)
DISC = wire.REQUEST.pack(flags=0, type=wire.CMD_DISC, cookie=0, offset=0, length=0)

HELLOS = [
    Hello("another protocol", b"HTTP/1.1 400 Bad", "NBDMAGIC"),
    Hello("unknown style", OLD[:8] + b"\xff" * 8, "style"),
    Hello("oldstyle", OLD + struct.pack(">QI", SIZE, ALL_FLAGS) + NUL, wanted=HandshakeOptions("")),
    Hello("oldstyle has no names", OLD + struct.pack(">QI", SIZE, 1) + NUL, "oldstyle", errno=2),
    Hello("oldstyle under TLS", OLD, "TLS is required", TLS, errno=1),
    Hello(
        "oldstyle, size 2**64-1", OLD + struct.pack(">QI", (1 << 64) - 1, 1) + NUL, "2\\*\\*63", HandshakeOptions("")
    ),
    Hello("oldstyle lists nothing", OLD, "cannot list", task="list", errno=95),
    Hello("newstyle that is not fixed", greeting(0) + struct.pack(">QH", SIZE, 1) + NUL),
    Hello("newstyle, without zeros", greeting(wire.FLAG_NO_ZEROES) + struct.pack(">QH", SIZE, 1)),
    Hello("newstyle that is not fixed, under TLS", greeting(0), "TLS is required", TLS, errno=1),
    Hello("newstyle, size 2**63", greeting(2) + struct.pack(">QH", 1 << 63, 1), "2\\*\\*63", farewell=DISC),
    Hello("unknown handshake flags", greeting(0xFFFF) + STRUCTURED[18:] + info_export() + GO),
    Hello("all that there is", STRUCTURED + info_export() + GO),
    Hello(
        "STARTTLS refused",
        greeting() + refusal(wire.OPT_STARTTLS, wire.REP_ERR_POLICY, TEXT),
        r"TLS is required.*no\\x1b\[2Jpe",
        TLS,
        errno=1,
        farewell=ABORT,
    ),
    Hello("STARTTLS unknown", greeting() + refusal(wire.OPT_STARTTLS), "TLS is req", TLS, errno=1, farewell=ABORT),
    Hello(
        "STARTTLS refused, where it may be",
        greeting() + refusal(5) + STRUCTURED[18:] + info_export() + GO,
        wanted=MAYBE,
    ),
    Hello(
        "STARTTLS, shutdown",
        greeting() + refusal(5, wire.REP_ERR_SHUTDOWN),
        "shutting",
        MAYBE,
        errno=108,
        farewell=ABORT,
    ),
    Hello("STARTTLS with data in its ACK", greeting() + option(5, data=b"x"), "ACK with 1", TLS),
    Hello("under TLS", greeting() + option(5) + STRUCTURED[18:] + info_export() + GO, wanted=TLS),
    Hello("TLS demanded", greeting() + refusal(11, wire.REP_ERR_TLS_REQD), "demands TLS", errno=1, farewell=ABORT),
    Hello(
        "shutdown",
        greeting() + refusal(11, wire.REP_ERR_SHUTDOWN, b"bye"),
        "shutting down: bye",
        errno=108,
        farewell=ABORT,
    ),
    Hello("another magic in a reply", greeting() + b"\0" * 20, "begins with"),
    Hello("a reply to another option", greeting() + option(wire.OPT_LIST), "option 3"),
    Hello("a reply of 4 GiB", greeting() + option(11, length=0xFFFFFFFF), "4294967295 bytes"),
    Hello("a message of 4097 bytes", greeting() + option(11, wire.REP_ERR_UNSUP, length=4097), "4097 bytes"),
    Hello("a reply that is too long", greeting() + option(11, wire.REP_SERVER, length=8197), "8197 bytes"),
    Hello("an unexpected type", greeting() + option(11, wire.REP_SERVER), "type 2"),
    Hello("a type that does not exist", greeting() + option(11, 0x7FFFFFFF), "type 2147483647"),
    Hello("no such export", STRUCTURED + refusal(7, wire.REP_ERR_UNKNOWN, TEXT), '"x"', errno=2, farewell=ABORT),
    Hello("an unknown error", STRUCTURED + refusal(7, 0x80001234), "error 4660", errno=22, farewell=ABORT),
    Hello("forbidden", STRUCTURED + refusal(7, wire.REP_ERR_POLICY), "POLICY", errno=1, farewell=ABORT),
    Hello(
        "block sizes demanded, though asked for",
        STRUCTURED + refusal(7, wire.REP_ERR_BLOCK_SIZE_REQD),
        "BLOCK_SIZE",
        errno=22,
        farewell=ABORT,
    ),
    Hello("GO unknown: EXPORT_NAME", STRUCTURED + refusal(7) + struct.pack(">QH", SIZE, 1)),
    Hello("GO unknown, with zeros", greeting(1) + STRUCTURED[18:] + refusal(7) + struct.pack(">QH", SIZE, 1) + NUL),
    Hello(
        "GO unknown with extended headers",
        greeting() + option(11) + option(10) + refusal(7),
        "GO",
        errno=95,
        farewell=ABORT,
    ),
    Hello("GO without a size", STRUCTURED + GO, "no size", farewell=DISC),
    Hello(
        "GO with a short size",
        STRUCTURED + option(7, wire.REP_INFO, b"\0\0" + bytes(9)) + GO,
        "wrong length",
        farewell=DISC,
    ),
    Hello("an item without a number", STRUCTURED + option(7, wire.REP_INFO, b"\0") + GO, "in 1 bytes", farewell=DISC),
    Hello("an unknown item", STRUCTURED + info_export() + option(7, wire.REP_INFO, b"\0\x63abc") + GO),
    Hello("a maximum that is no power of two", STRUCTURED + info_export() + info_sizes(512, 4096, 1_000_001) + GO),
    Hello("maximum below minimum", STRUCTURED + info_export() + info_sizes(4096, 4096, 0) + GO, "max", farewell=DISC),
    Hello("TLS for this export", STRUCTURED + refusal(7, wire.REP_ERR_TLS_REQD), "TLS", errno=1, farewell=ABORT),
    Hello("TLS for the list", greeting() + refusal(3, wire.REP_ERR_TLS_REQD), "TLS", OPEN, "list", 1, ABORT),
    Hello("extended headers demanded", STRUCTURED + refusal(7, 0x8000000A), "EXT_HEADER", errno=22, farewell=ABORT),
    Hello("contexts for no export", STRUCTURED[:58] + refusal(10, wire.REP_ERR_UNKNOWN) + info_export() + GO),
    Hello("too many contexts", STRUCTURED[:58] + refusal(10, wire.REP_ERR_TOO_BIG) + info_export() + GO),
    Hello("TLS for contexts", STRUCTURED[:58] + refusal(10, wire.REP_ERR_TLS_REQD), "TLS", errno=1, farewell=ABORT),
    Hello("two sizes", STRUCTURED + info_export() + info_export(SIZE - 1) + GO, "two different", farewell=DISC),
    Hello("the same size twice", STRUCTURED + info_export() + info_export() + GO),
    Hello("size 2**63", STRUCTURED + info_export(1 << 63) + GO, "2\\*\\*63", farewell=DISC),
    Hello("size 2**63-1", STRUCTURED + info_export((1 << 63) - 1) + GO),
    Hello("no flags at all", STRUCTURED + info_export(flags=0) + GO),
    Hello("minimum 0", STRUCTURED + info_export() + info_sizes(0, 4096, 1 << 25) + GO, "minimum 0", farewell=DISC),
    Hello("minimum 3", STRUCTURED + info_export() + info_sizes(3, 4096, 1 << 25) + GO, "minimum 3", farewell=DISC),
    Hello(
        "minimum 128 KiB",
        STRUCTURED + info_export() + info_sizes(1 << 17, 1 << 17, 1 << 25) + GO,
        "minimum",
        farewell=DISC,
    ),
    Hello(
        "preferred 5000",
        STRUCTURED + info_export() + info_sizes(1, 5000, 1 << 25) + GO,
        "preferred 5000",
        farewell=DISC,
    ),
    Hello(
        "preferred below minimum",
        STRUCTURED + info_export() + info_sizes(4096, 512, 1 << 25) + GO,
        "preferred",
        farewell=DISC,
    ),
    Hello(
        "maximum below preferred",
        STRUCTURED + info_export() + info_sizes(1, 4096, 512) + GO,
        "maximum 512",
        farewell=DISC,
    ),
    Hello(
        "short block sizes",
        STRUCTURED + info_export() + option(7, 3, b"\0\3" + bytes(8)) + GO,
        "block sizes in",
        farewell=DISC,
    ),
    Hello("size 1000, minimum 512", STRUCTURED + info_export(1000) + info_sizes(512, 4096, 1 << 25) + GO),
    Hello("the same, the other way round", STRUCTURED + info_sizes(512, 4096, 1 << 25) + info_export(1000) + GO),
    Hello("no limit to payloads", STRUCTURED + info_export() + info_sizes(1, 4096, 0xFFFFFFFF) + GO),
    Hello(
        "a context without a name",
        greeting() + refusal(11) + option(8) + context(b"") + option(10),
        "in 4 bytes",
        farewell=ABORT,
    ),
    Hello(
        "a context twice",
        greeting() + refusal(11) + option(8) + context() + context(number=2) + option(10),
        "twice",
        farewell=ABORT,
    ),
    Hello(
        "two contexts of one number",
        greeting() + refusal(11) + option(8) + context() + context(b"a:b") + option(10),
        "twice",
        farewell=ABORT,
    ),
    Hello(
        "a context of 4097 bytes",
        greeting() + refusal(11) + option(8) + context(b"x" * 4097) + option(10),
        "4101 bytes",
        farewell=ABORT,
    ),
    Hello(
        "a context nobody asked for",
        greeting() + refusal(11) + option(8) + context(b"a:b") + option(10) + info_export() + GO,
    ),
    Hello("contexts refused", greeting() + refusal(11) + option(8) + refusal(10) + info_export() + GO),
    Hello("structured replies refused", greeting() + refusal(11) + refusal(8) + info_export() + GO),
    Hello("nothing asked for", greeting() + info_export() + GO, wanted=PLAIN),
    Hello("replies without end", greeting() + refusal(11) + option(8) + info_export(number=10), "type 3"),
    Hello("a list", greeting() + export(b"a") + export(b"", b"default") + option(3), task="list"),
    Hello(
        "a list refused", greeting() + refusal(3, wire.REP_ERR_POLICY), "POLICY", task="list", errno=1, farewell=ABORT
    ),
    Hello(
        "a name longer than its reply",
        greeting() + option(3, 2, struct.pack(">I", 99) + b"ab") + option(3),
        "99 bytes",
        task="list",
        farewell=ABORT,
    ),
    Hello(
        "a name of 2**32-1 bytes",
        greeting() + option(3, 2, b"\xff" * 6) + option(3),
        "4294967295",
        task="list",
        farewell=ABORT,
    ),
    Hello(
        "an export in two bytes", greeting() + option(3, 2, b"ab") + option(3), "name of 2", task="list", farewell=ABORT
    ),
    Hello(
        "a name of 4097 bytes", greeting() + export(b"x" * 4097) + option(3), "4097 bytes", task="list", farewell=ABORT
    ),
    Hello(
        "a description of 4097 bytes",
        greeting() + export(b"x", b"d" * 4097) + option(3),
        "name of 1",
        task="list",
        farewell=ABORT,
    ),
    Hello("more exports than anybody has", greeting() + export(b"a") * (MAX_REPLIES + 1), "more than", task="list"),
    Hello("8 MiB of names", greeting() + export(b"n" * 4096, b"d" * 4096) * 1030, "more than", task="list"),
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", HELLOS, ids=lambda case: case.name)
def test_handshake(case: Hello, step: int) -> None:
    machine: list[Negotiation] = []
    if step == 1 and len(case.script) > 1 << 16:
        step = 1000  # byte by byte adds nothing but time

    def hear() -> Negotiation:
        # `negotiate` makes the machine; after an error it is needed for its farewell.
        heard = Negotiation(case.wanted, case.task)
        machine.append(heard)
        at = 0
        while not heard.done:
            if heard.wants_tls:
                assert heard.farewell() == b"", "nothing may be said in the clear any more"
                heard.tls_started()
                continue
            room = heard.buffer()
            assert 0 < len(room) <= 8200
            part = case.script[at : at + min(len(room), step)]
            if not part:
                raise Cut
            room[: len(part)] = part
            at += len(part)
            heard.received(len(part))
        assert at == len(case.script)
        return heard

    if case.error is None:
        assert hear().result is not None
        return
    with pytest.raises(LaminaError, match=case.error) as raised:
        hear()
    assert raised.value.errno == case.errno
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000
    assert machine[0].farewell() == case.farewell


def result(script: bytes, wanted: HandshakeOptions = OPEN) -> ExportDetails:
    found = negotiate(script, wanted).result
    assert isinstance(found, ExportDetails)
    return found


def test_what_is_agreed() -> None:
    named = option(7, 3, struct.pack(">H", wire.INFO_NAME) + b"real") + option(7, 3, b"\0\2dis\x07k")
    found = result(STRUCTURED + named + info_sizes(512, 4096, 1 << 20) + info_export(1000) + GO)
    assert (found.name, found.description) == ("real", "dis\\x07k")
    assert (found.size, found.mode, found.handshake, found.tls) == (1000, "structured", "newstyle-fixed", False)
    assert (found.minimum, found.preferred, found.maximum, found.block_sizes_known) == (512, 4096, 1 << 20, True)
    unlimited = result(STRUCTURED + info_sizes(512, 4096, 0xFFFFFFFF) + info_export() + GO)
    assert (unlimited.maximum, unlimited.maximum_told) == (0xFFFFFE00, 0xFFFFFFFF)
    assert found.contexts == {"base:allocation": 1}
    assert found.flags & wire.FLAG_SEND_DF
    assert not found.flags & wire.FLAG_BLOCK_STATUS_PAYLOAD, "it belongs to extended headers"


def test_what_may_be_assumed() -> None:
    found = result(greeting() + info_export() + GO, PLAIN)
    assert (found.minimum, found.preferred, found.maximum, found.block_sizes_known) == (1, 4096, 32 << 20, False)
    assert found.mode == "simple"
    assert not found.flags & wire.FLAG_SEND_DF, "it belongs to structured replies"


def test_extended_headers_come_first_and_structured_replies_are_not_asked_for() -> None:
    machine = negotiate(greeting() + option(11) + context() + option(10) + info_export() + GO)
    sent = b"".join(machine.to_send())
    head = sent[4 : 4 + wire.OPTION.size]
    assert wire.OPTION.unpack(head).option == wire.OPT_EXTENDED_HEADERS
    assert wire.OPTION.pack(option=wire.OPT_STRUCTURED_REPLY, length=0) not in sent
    assert isinstance(machine.result, ExportDetails)
    assert machine.result.mode == "extended"
    assert machine.result.flags & wire.FLAG_BLOCK_STATUS_PAYLOAD


def test_client_flags_are_only_what_the_server_has() -> None:
    for flags, sent in ((FIXED, 3), (1, 1), (0xFFFD, 1), (2, 2), (0, 0)):
        machine = Negotiation(PLAIN)
        for byte in greeting(flags):
            machine.buffer()[:1] = bytes([byte])
            machine.received(1)
        assert machine.to_send()[0] == struct.pack(">I", sent)


def test_starttls_is_the_first_option_and_nothing_follows_it_in_the_clear() -> None:
    machine = Negotiation(TLS)
    script = greeting() + option(wire.OPT_STARTTLS)
    while script:
        room = machine.buffer()
        room[:] = script[: len(room)]
        script = script[len(room) :]
        machine.received(len(room))
    assert machine.wants_tls
    assert b"".join(machine.to_send())[4:] == wire.OPTION.pack(option=wire.OPT_STARTTLS, length=0)
    machine.tls_started()
    assert wire.OPTION.unpack(machine.to_send()[0]).option == wire.OPT_EXTENDED_HEADERS


def test_no_plaintext_behind_starttls_is_ever_taken() -> None:
    """CVE-2021-3716 from the client's side: the machine asks for no byte that could have been injected."""
    machine = Negotiation(TLS)
    script = greeting() + option(wire.OPT_STARTTLS) + refusal(11)
    at = 0
    while not machine.wants_tls:
        room = machine.buffer()
        room[:] = script[at : at + len(room)]
        at += len(room)
        machine.received(len(room))
    assert script[at:] == refusal(11)


def test_exports_are_listed_with_their_descriptions() -> None:
    machine = negotiate(greeting() + export(b"a", b"one\n") + export(b"\xff", b"") + option(3), OPEN, "list")
    assert machine.result == (Listed("a", "one"), Listed("\udcff"))


def test_all_exports_are_described() -> None:
    listing = wire.OPT_LIST_META_CONTEXT
    machine = negotiate(
        greeting()
        + option(11)
        + export(b"a")
        + export(b"b")
        + option(3)
        + context(of=listing, number=0)
        + context(b"q:w", 0, listing)
        + option(listing)
        + context()
        + option(10)
        + info_export(number=6)
        + option(6)
        + option(listing)
        + refusal(6, wire.REP_ERR_POLICY, b"not for you"),
        None,
        "describe",
    )
    assert machine.result is not None
    assert not isinstance(machine.result, ExportDetails)
    first, second = machine.result
    assert first.details is not None
    assert first.details.available == ("base:allocation", "q:w")
    assert first.details.flags & wire.FLAG_BLOCK_STATUS_PAYLOAD
    assert second.details is None
    assert "not for you" in str(second.error)


@pytest.mark.parametrize(
    ("named", "selects"),
    [((b"base:allocation",), True), ((b"q:w", b"base:allocation"), True), ((b"q:\xff",), True), ((), False)],
)
def test_what_is_true_only_with_contexts_is_asked_with_contexts(named: tuple[bytes, ...], selects: bool) -> None:
    """A server tells BLOCK_STATUS_PAYLOAD once contexts are selected: `describe` selects one of those that it has."""
    listing = wire.OPT_LIST_META_CONTEXT
    contexts = b"".join(context(name, 0, listing) for name in named) + option(listing)
    chosen = b"base:allocation" if b"base:allocation" in named else b"".join(named[:1])
    for flags, taken in ((ALL_FLAGS, True), (ALL_FLAGS & ~wire.FLAG_BLOCK_STATUS_PAYLOAD, True), (ALL_FLAGS, False)):
        answer = ((context(chosen, 5) if taken else b"") + option(10)) if selects else b""
        script = greeting() + option(11) + contexts + answer + info_export(flags=flags, number=6) + option(6)
        machine = negotiate(script, OPEN, "describe")
        assert machine.result is not None
        assert not isinstance(machine.result, ExportDetails)
        (found,) = machine.result
        assert found.details is not None
        told = bool(flags & wire.FLAG_BLOCK_STATUS_PAYLOAD)
        assert bool(found.details.flags & wire.FLAG_BLOCK_STATUS_PAYLOAD) == (told and selects and taken)
        sent = b"".join(machine.to_send())
        assert (chosen in sent and chosen != b"") == selects
    # With structured replies there is no such flag, and nothing to select.
    script = greeting() + refusal(11) + option(8) + contexts + info_export(number=6) + option(6)
    negotiate(script, OPEN, "describe")


@pytest.mark.parametrize("name", [b"\xff", b"a\0b", b"ok\xed\xa0\x80"])
def test_a_listed_name_that_cannot_be_asked_for_spoils_only_itself(name: bytes) -> None:
    script = greeting() + refusal(11) + refusal(8) + export(b"a") + export(name, b"odd") + export(b"b") + option(3)
    machine = negotiate(script + 2 * (info_export(number=6) + option(6)), None, "describe")
    assert machine.result is not None
    assert not isinstance(machine.result, ExportDetails)
    first, odd, last = machine.result
    assert first.details is not None
    assert last.details is not None
    assert (odd.details, odd.description) == (None, "odd")
    assert "cannot be asked for" in str(odd.error)


@pytest.mark.parametrize("name", ["x" * 4097, "a\0b", "\udcff"])
def test_a_name_that_cannot_be_is_not_sent(name: str) -> None:
    with pytest.raises(LaminaError, match="name"):
        negotiate(STRUCTURED, HandshakeOptions(name))
