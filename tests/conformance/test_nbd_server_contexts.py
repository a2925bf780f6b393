"""Metadata contexts in the negotiation of the NBD server, rule by rule, as in `test_nbd_server_negotiation`."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina.nbd import wire as w

from ..nbd_raw import info, meta, sized
from ..nbd_rules import (
    ACK,
    EXTENDED,
    INVALID,
    META,
    SET_BASE,
    STRUCTURED,
    TOO_BIG,
    UNKNOWN,
    Ask,
    Case,
    go,
    has,
    no_status,
    run_case,
    some_status,
)

CONTEXTS = ("base:allocation", "qemu:allocation-depth", "lamina:exact", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1")


def named(number: int, *names: str, zero: bool = False) -> tuple[tuple[int, bytes], ...]:
    """The replies that name these contexts, numbered from `number` on."""
    return tuple((META, (0 if zero else at).to_bytes(4) + name.encode()) for at, name in enumerate(names, number))


def listing(query: tuple[str, ...], found: tuple[str, ...], name: str, rule: str) -> Case:
    step = Ask(w.OPT_LIST_META_CONTEXT, meta("disk", *query), (*named(0, *found, zero=True), ACK))
    return Case(name, rule, [STRUCTURED, step])


def setting(query: tuple[str, ...], found: tuple[str, ...], name: str, rule: str) -> Case:
    step = Ask(w.OPT_SET_META_CONTEXT, meta("disk", *query), (*named(1, *found), ACK))
    return Case(name, rule, [STRUCTURED, step, go("disk")], "transmission")


MALFORMED_META = [
    ("no-data", b""),
    ("no-count", sized("disk")),
    ("half-a-count", sized("disk") + b"\0\0\0"),
    ("name-too-long", meta("disk", length=5)),
    ("name-2^31", meta("disk", length=1 << 31)),
    ("name-2^32-1", meta("disk", length=0xFFFFFFFF)),
    ("count-too-large", meta("disk", "base:allocation", count=2)),
    ("count-too-small", meta("disk", "base:allocation", count=0)),
    ("count-2^31", meta("disk", "base:allocation", count=1 << 31)),
    ("count-2^32-1", meta("disk", "base:allocation", count=0xFFFFFFFF)),
    ("query-too-long", sized("disk") + (1).to_bytes(4) + sized("base:allocation", 16)),
    ("query-2^32-1", sized("disk") + (1).to_bytes(4) + sized("base:allocation", 0xFFFFFFFF)),
    ("query-too-short", sized("disk") + (1).to_bytes(4) + sized("base:allocation", 14)),
    ("trailing-bytes", meta("disk", "base:allocation") + bytes(4)),
    ("not-utf8", meta("disk", b"base:\xff")),
    ("nul", meta("disk", "base:allocation\0")),
    ("no-namespace", meta("disk", "allocation")),
    ("empty-query", meta("disk", "")),
]

META_CONTEXTS = [
    *(
        Case(f"{word}-before-structured", rule, [Ask(option, meta("disk", "base:allocation"), (INVALID,))], peers=peers)
        for option, word, rule, peers in (
            (w.OPT_LIST_META_CONTEXT, "list-meta", "1a structured replies come first", "QEMU answers"),
            (w.OPT_SET_META_CONTEXT, "set-meta", "1a needs structured replies first: SHOULD INVALID", ""),
        )
    ),
    listing((), (*CONTEXTS[:2], *CONTEXTS[3:], CONTEXTS[2]), "list-meta-all", "2.5 LIST with no queries: everything"),
    listing(("base:",), CONTEXTS[:1], "list-meta-base", "2.5 `base:` lists all of base"),
    listing(("base:allocation",), CONTEXTS[:1], "list-meta-leaf", "2.5 a name lists itself"),
    listing(("qemu:",), (CONTEXTS[1], *CONTEXTS[3:]), "list-meta-qemu", "1c the contexts of the vendor's namespace"),
    listing(("qemu:dirty-bitmap:",), CONTEXTS[3:], "list-meta-bitmaps", "1c all bitmaps"),
    listing(("lamina:",), CONTEXTS[2:3], "list-meta-lamina", "1c our own namespace"),
    listing(("other:", "x:y"), (), "list-meta-unknown", "2.5 unknown namespaces are ignored"),
    listing(("base:none",), (), "list-meta-unknown-leaf", "2.5 what is not there is not listed"),
    listing(("base:", "base:allocation", "base:"), CONTEXTS[:1], "list-meta-twice", "each context is listed once"),
    setting((), (), "set-meta-nothing", "2.5 zero queries select nothing"),
    setting(("base:",), (), "set-meta-namespace", "2.5 `base:` selects nothing in SET"),
    setting(("qemu:dirty-bitmap:",), (), "set-meta-bitmaps", "2.5 the beginning of a name selects nothing in SET"),
    setting(("base:allocation",), CONTEXTS[:1], "set-meta-one", "1c base:allocation"),
    setting(CONTEXTS, CONTEXTS, "set-meta-all", "1c several contexts, each with an id of its own"),
    setting(("other:x", "base:allocation", "base:x"), CONTEXTS[:1], "set-meta-some", "2.5 unknown ones are ignored"),
    setting(("base:allocation",) * 3, CONTEXTS[:1], "set-meta-twice", "a context is selected once"),
    *(
        Case(
            f"{word}-{what}",
            "2.5, section 7: nested lengths that contradict the outer one, and strings that are none: INVALID",
            [STRUCTURED, Ask(option, data, (INVALID,))],
        )
        for option, word in ((w.OPT_LIST_META_CONTEXT, "list-meta"), (w.OPT_SET_META_CONTEXT, "set-meta"))
        for what, data in MALFORMED_META
    ),
    *(
        Case(f"{word}-{what}", rule, [STRUCTURED, Ask(option, data, (reply,))])
        for option, word in ((w.OPT_LIST_META_CONTEXT, "list-meta"), (w.OPT_SET_META_CONTEXT, "set-meta"))
        for what, data, reply, rule in (
            ("unknown-export", meta("none", "base:allocation"), UNKNOWN, "1a no such export: ERR_UNKNOWN"),
            ("long-query", meta("disk", "base:" + "x" * 4096), TOO_BIG, "1a strings are at most 4096 bytes long"),
            ("long-name", meta("x" * 4097, "base:allocation"), TOO_BIG, "1a strings are at most 4096 bytes long"),
            ("64k", meta("disk", *["x:" + "y" * 4000] * 20), TOO_BIG, "what is too long is drained, and refused"),
        )
    ),
    Case(
        "set-meta-again",
        "2.5 SET replaces the selection",
        [STRUCTURED, SET_BASE, Ask(w.OPT_SET_META_CONTEXT, meta("disk", CONTEXTS[2]), (META, ACK)), go("disk")],
        "transmission",
        some_status,
    ),
    *(
        Case(
            f"set-meta-fails-{what}",
            "2.5 SET replaces the selection even if it fails",
            [STRUCTURED, SET_BASE, Ask(w.OPT_SET_META_CONTEXT, data, (reply,)), go("disk")],
            "transmission",
            no_status,
        )
        for what, data, reply in (
            ("unknown", meta("none", "base:allocation"), UNKNOWN),
            ("invalid", meta("disk", count=9), INVALID),
            ("empty", b"", INVALID),
            ("too-big", meta("disk", *["x:" + "y" * 4000] * 20), TOO_BIG),
        )
    ),
    Case(
        "set-meta-selects-none",
        "2.5 a SET that finds nothing selects nothing",
        [STRUCTURED, SET_BASE, Ask(w.OPT_SET_META_CONTEXT, meta("disk", "x:y"), (ACK,)), go("disk")],
        "transmission",
        no_status,
    ),
    Case(
        "list-meta-keeps",
        "LIST_META_CONTEXT changes nothing",
        [STRUCTURED, SET_BASE, Ask(w.OPT_LIST_META_CONTEXT, meta("fixed"), (*[META] * 3, ACK)), go("disk")],
        "transmission",
        some_status,
    ),
    Case(
        "set-meta-other-name",
        "2.5 contexts bind to the export's name: with another one in GO there are none",
        [STRUCTURED, SET_BASE, go("fixed")],
        "transmission",
        no_status,
    ),
    Case(
        "set-meta-other-name-back",
        "2.5 GO for another name that fails does not unbind them",
        [STRUCTURED, SET_BASE, Ask(w.OPT_GO, info("none"), (UNKNOWN,)), go("disk")],
        "transmission",
        some_status,
    ),
    Case(
        "payload-flag",
        "2.6 BLOCK_STATUS_PAYLOAD is told with extended headers and selected contexts",
        [EXTENDED, SET_BASE, go("disk")],
        "transmission",
        has(w.FLAG_BLOCK_STATUS_PAYLOAD),
    ),
    Case(
        "payload-flag-no-contexts",
        "2.6 and not without contexts",
        [EXTENDED, go("disk")],
        "transmission",
        has(w.FLAG_BLOCK_STATUS_PAYLOAD, False),
    ),
    Case(
        "payload-flag-structured",
        "2.6 and not without extended headers",
        [STRUCTURED, SET_BASE, go("disk")],
        "transmission",
        has(w.FLAG_BLOCK_STATUS_PAYLOAD, False),
    ),
]

CASES = META_CONTEXTS


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_rule(case: Case, servers: tuple[Path, Path]) -> None:
    run_case(case, servers)


def test_every_case_is_told_apart() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.rule for case in CASES)
