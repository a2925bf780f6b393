"""The negotiation of the NBD server, rule by rule: one row of a table for each, with where other servers do not follow it.

Each row is a conversation with a running server, by a client that shares no code with ours. After it the server is in step:
the next option, or the next request, is answered, and so is the next client. `nbd_rules` says what the numbers mean.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina.limits import KIB, MIB
from lamina.nbd import wire
from lamina.nbd import wire as w

from ..nbd_raw import FIXED, info, option_bytes, sized
from ..nbd_rules import (
    ACK,
    EXTENDED,
    INFO,
    INVALID,
    NAMES,
    POLICY,
    SET_BASE,
    SIZE,
    STRUCTURED,
    TOO_BIG,
    UNKNOWN,
    UNSUP,
    Ask,
    Case,
    export_name,
    go,
    has,
    refused,
    run_case,
    some_status,
)


def text(item: int, value: str) -> tuple[int, bytes]:
    return INFO, item.to_bytes(2) + value.encode()


SIZES = (INFO, w.INFO_BLOCK_SIZE_DATA.pack(minimum=4096, preferred=4096, maximum=w.MAX_PAYLOAD))
PLAIN_SIZES = (INFO, w.INFO_BLOCK_SIZE_DATA.pack(minimum=1, preferred=4096, maximum=w.MAX_PAYLOAD))
BASIC = w.FLAG_HAS_FLAGS | w.FLAG_SEND_FLUSH | w.FLAG_SEND_FUA | w.FLAG_CAN_MULTI_CONN | w.FLAG_SEND_CACHE
WRITABLE = BASIC | w.FLAG_SEND_TRIM | w.FLAG_SEND_WRITE_ZEROES | w.FLAG_SEND_FAST_ZERO
TOLD = {
    "disk": (INFO, w.INFO_EXPORT_DATA.pack(size=SIZE, flags=WRITABLE)),
    "fixed": (INFO, w.INFO_EXPORT_DATA.pack(size=SIZE, flags=BASIC | w.FLAG_READ_ONLY)),
}

HANDSHAKE = [
    Case(
        "not-fixed",
        "1a newstyle: a client without FIXED_NEWSTYLE is served with EXPORT_NAME",
        [export_name(b"disk", "124 zeros")],
        "transmission",
        peers="QEMU closes",
        flags=0,
    ),
    Case(
        "not-fixed-no-zeroes",
        "1a NO_ZEROES is a flag of its own",
        [export_name(b"disk", "no zeros")],
        "transmission",
        flags=w.FLAG_C_NO_ZEROES,
    ),
    Case(
        "not-fixed-list",
        "1a only EXPORT_NAME has a meaning without FIXED_NEWSTYLE",
        [Ask(w.OPT_LIST, b"", (None,))],
        "closed",
        flags=0,
    ),
    Case(
        "client-flag-2",
        "1a unknown client flag: MUST drop",
        [],
        "closed",
        flags=FIXED | 4,
        peers="nbd-server goes on",
    ),
    Case(
        "client-flag-31",
        "1a unknown client flag: MUST drop",
        [],
        "closed",
        flags=0x80000003,
        peers="nbd-server goes on",
    ),
    Case("all-client-flags", "1a unknown client flag: MUST drop", [], "closed", flags=0xFFFFFFFF),
    Case(
        "option-magic",
        "handshake: what is no option ends the negotiation",
        [Ask(w.OPT_LIST, b"", (None,), option_bytes(w.OPT_LIST, magic=w.OPTS_MAGIC + 1))],
        "closed",
    ),
    Case(
        "export-name",
        "1a EXPORT_NAME is kept for old clients; no zeros after NO_ZEROES",
        [export_name(b"disk", "no zeros")],
        "transmission",
        has(w.FLAG_SEND_DF, False),
    ),
    Case(
        "export-name-zeros",
        "1a 124 zeros follow unless both sides have NO_ZEROES",
        [export_name(b"disk", "124 zeros")],
        "transmission",
        flags=FIXED,
    ),
    Case("export-name-unicode", "names are UTF-8", [export_name("snö".encode(), "no zeros")], "transmission"),
    Case(
        "export-name-default",
        "the empty name is the default export, where there is one",
        [export_name(b"", "no zeros")],
        "transmission",
        single=True,
    ),
    Case(
        "export-name-structured",
        "1a EXPORT_NAME keeps what was agreed: structured replies and DF",
        [STRUCTURED, export_name(b"disk", "no zeros")],
        "transmission",
        has(w.FLAG_SEND_DF),
    ),
    Case(
        "export-name-contexts",
        "1c contexts may be used after EXPORT_NAME",
        [STRUCTURED, SET_BASE, export_name(b"disk", "no zeros")],
        "transmission",
        some_status,
    ),
    Case(
        "export-name-extended",
        "2.6 EXPORT_NAME is forbidden with extended headers",
        [EXTENDED, export_name(b"disk", None)],
        "closed",
    ),
    Case("export-name-unknown", "1a EXPORT_NAME cannot say no, but by leaving", [export_name(b"none", None)], "closed"),
    Case("export-name-no-default", "1a the same, where nothing is the default", [export_name(b"", None)], "closed"),
    Case("export-name-4096", "1a strings up to 4096 bytes", [export_name(b"x" * 4096, None)], "closed"),
    Case(
        "export-name-4097",
        "1a longer ones are refused before they are read",
        [export_name(b"", None, length=4097)],
        "closed",
    ),
    Case("export-name-not-utf8", "names are UTF-8", [export_name(b"\xff\xfe", None)], "closed"),
    Case("export-name-nul", "names have no NUL", [export_name(b"disk\0", None)], "closed"),
]

SIMPLE_OPTIONS = [
    Case(
        "abort",
        "1a ABORT: MUST be acknowledged, then closed",
        [Ask(w.OPT_ABORT, b"", (ACK,))],
        "closed",
        peers="nbd-server resets without ACK",
    ),
    Case("abort-data", "2.5 ABORT with data is still an end", [Ask(w.OPT_ABORT, b"why", (ACK,))], "closed"),
    Case(
        "list",
        "1a LIST: MUST name all exports",
        [
            Ask(
                w.OPT_LIST,
                b"",
                (
                    (w.REP_SERVER, sized("disk") + b"a disk"),
                    (w.REP_SERVER, sized("fixed")),
                    (w.REP_SERVER, sized("blocks")),
                    (w.REP_SERVER, sized("snö") + "Schnee ☃".encode()),
                    ACK,
                ),
            )
        ],
    ),
    refused(w.OPT_LIST, b"x", INVALID, "list-data", "1a LIST with payload: SHOULD ERR_INVALID"),
    refused(w.OPT_LIST, bytes(4096), INVALID, "list-much-data", "1a LIST with payload: SHOULD ERR_INVALID"),
    refused(w.OPT_PEEK_EXPORT, b"", UNSUP, "peek-export", "1a PEEK_EXPORT is withdrawn: UNSUP"),
    refused(w.OPT_PEEK_EXPORT, b"disk", UNSUP, "peek-export-data", "1a PEEK_EXPORT is withdrawn: UNSUP"),
    *(
        refused(
            number, data, UNSUP, f"option-{number:#x}-{len(data)}", "1a unknown option: MUST UNSUP and keep parsing"
        )
        for number in (0, 12, 0x7FFFFFFF, 0xFFFFFFFF)
        for data in (b"", b"some data")
    ),
    refused(99, bytes(64 * KIB), UNSUP, "unknown-64k", "1a unknown options are drained"),
    refused(99, bytes(64 * KIB + 1), UNSUP, "unknown-above-64k", "1a unknown options are drained"),
    refused(99, bytes(1 * MIB), UNSUP, "unknown-1m", "1a unknown options are drained"),
    refused(w.OPT_LIST, bytes(128 * KIB), TOO_BIG, "list-128k", "what is too long is drained, and refused"),
    refused(w.OPT_STARTTLS, b"", POLICY, "starttls", "T4 without TLS: POLICY, and the negotiation goes on"),
    refused(w.OPT_STARTTLS, b"x", INVALID, "starttls-data", "T3 STARTTLS with payload: INVALID"),
    Case("structured", "1a STRUCTURED_REPLY", [STRUCTURED, go("disk")], "transmission", has(w.FLAG_SEND_DF)),
    Case(
        "simple",
        "1b DF MUST be clear without structured replies",
        [go("disk")],
        "transmission",
        has(w.FLAG_SEND_DF, False),
    ),
    Case(
        "structured-twice",
        "2.5 agreeing twice makes no sense: INVALID",
        [STRUCTURED, Ask(w.OPT_STRUCTURED_REPLY, b"", (INVALID,)), go("disk")],
        "transmission",
        peers="nbdkit acknowledges it again",
    ),
    refused(
        w.OPT_STRUCTURED_REPLY, b"\0", INVALID, "structured-data", "an option without payload that has one: INVALID"
    ),
    Case(
        "structured-data-not-agreed",
        "what was refused was not agreed",
        [Ask(w.OPT_STRUCTURED_REPLY, b"\0", (INVALID,)), go("disk")],
        "transmission",
        has(w.FLAG_SEND_DF, False),
    ),
    Case(
        "extended",
        "2.6 EXTENDED_HEADERS brings chunks of its own, and DF",
        [EXTENDED, go("disk")],
        "transmission",
        has(w.FLAG_SEND_DF),
        peers="QEMU 7.2, nbdkit and nbd-server: UNSUP (QEMU since 8.2)",
    ),
    Case("extended-after-structured", "2.6 it takes precedence", [STRUCTURED, EXTENDED, go("disk")], "transmission"),
    Case(
        "structured-after-extended",
        "2.6 a later STRUCTURED_REPLY gets EXT_HEADER_REQD",
        [EXTENDED, Ask(w.OPT_STRUCTURED_REPLY, b"", (w.REP_ERR_EXT_HEADER_REQD,)), go("disk")],
        "transmission",
    ),
    Case(
        "extended-twice",
        "agreeing twice makes no sense: INVALID",
        [EXTENDED, Ask(w.OPT_EXTENDED_HEADERS, b"", (INVALID,)), go("disk")],
        "transmission",
    ),
    refused(w.OPT_EXTENDED_HEADERS, b"\0\0", INVALID, "extended-data", "2.6 option 11 has no payload"),
]

INFO_AND_GO = [
    case
    for option, word in ((w.OPT_INFO, "info"), (w.OPT_GO, "go"))
    for case in [
        Case(
            f"{word}-nothing-asked",
            "1a INFO_EXPORT MUST be there, and the ACK; a minimum block of 1 need not be told",
            [Ask(option, info("disk"), (TOLD["disk"], ACK))],
            "transmission" if word == "go" else "options",
        ),
        Case(
            f"{word}-read-only",
            "1b READ_ONLY is told, and no flag of a change",
            [Ask(option, info("fixed"), (TOLD["fixed"], ACK))],
            "transmission" if word == "go" else "options",
        ),
        Case(
            f"{word}-all",
            "1a NAME, DESCRIPTION and BLOCK_SIZE when asked; the sizes before the size (2.1)",
            [
                Ask(
                    option,
                    info("disk", w.INFO_NAME, w.INFO_DESCRIPTION, w.INFO_BLOCK_SIZE, w.INFO_EXPORT),
                    (PLAIN_SIZES, TOLD["disk"], text(w.INFO_NAME, "disk"), text(w.INFO_DESCRIPTION, "a disk"), ACK),
                )
            ],
            "transmission" if word == "go" else "options",
            peers="nbd-server 3.24 has none of the three",
        ),
        Case(
            f"{word}-no-description",
            "1a an item that there is not is left out",
            [Ask(option, info("fixed", w.INFO_DESCRIPTION), (TOLD["fixed"], ACK))],
            "transmission" if word == "go" else "options",
        ),
        Case(
            f"{word}-default",
            "1a the canonical name of the default export",
            [Ask(option, info("", w.INFO_NAME), (INFO, text(w.INFO_NAME, "only"), ACK))],
            "transmission" if word == "go" else "options",
            single=True,
        ),
        Case(
            f"{word}-sizes-unasked",
            "2.1 a minimum block above 1 is told to those too who did not ask, and first",
            [Ask(option, info("blocks"), (SIZES, INFO, ACK))],
            "transmission" if word == "go" else "options",
            peers="nbdkit tells EXPORT first, so that QEMU's client misjudges the size",
        ),
        Case(
            f"{word}-unknown-items",
            "2.5 ids that are not known are ignored",
            [Ask(option, info("disk", 4, 0x7FFF, 0xFFFF), (TOLD["disk"], ACK))],
            "transmission" if word == "go" else "options",
        ),
        Case(
            f"{word}-duplicates",
            "2.5 duplicates are errors of the client; each item is told once",
            [Ask(option, info("disk", *[w.INFO_NAME, w.INFO_EXPORT] * 9), (TOLD["disk"], text(1, "disk"), ACK))],
            "transmission" if word == "go" else "options",
        ),
        refused(option, info("none"), UNKNOWN, f"{word}-unknown", "1a no such export: ERR_UNKNOWN"),
        refused(option, info(""), UNKNOWN, f"{word}-no-default", "1a no default export: ERR_UNKNOWN"),
        refused(option, info("Disk"), UNKNOWN, f"{word}-case", "T13 names are compared exactly"),
        refused(option, info("dis"), UNKNOWN, f"{word}-prefix", "T13 names are compared exactly, never by prefix"),
        refused(option, info("../disk"), UNKNOWN, f"{word}-path", "T13 names have no meaning as paths"),
        refused(option, info("x" * 300), UNKNOWN, f"{word}-300", "CVE-2017-15118: names above 256 bytes"),
        refused(option, info("x" * 4096), UNKNOWN, f"{word}-4096", "1a strings up to 4096 bytes; CVE-2020-10761"),
        refused(option, info("x" * 4097), TOO_BIG, f"{word}-4097", "1a strings are at most 4096 bytes long"),
        refused(option, info(b"\xff"), INVALID, f"{word}-not-utf8", "strings are UTF-8"),
        refused(option, info(b"disk\0"), INVALID, f"{word}-nul", "strings have no NUL"),
        *(
            refused(
                option,
                data,
                INVALID,
                f"{word}-{what}",
                f"2.5 name length <= datalen - 6, and all is read: {what}",
                "nbd-server leaves it undrained, and is out of step",
            )
            for what, data in (
                ("no-data", b""),
                ("half-a-length", b"\0\0"),
                ("no-count", sized("disk")),
                ("half-a-count", sized("disk") + b"\0"),
                ("name-too-long", info("disk", length=5)),
                ("name-one-more", info("disk", length=7)),
                ("name-2^31", info("disk", length=1 << 31)),
                ("name-2^32-1", info("disk", length=0xFFFFFFFF)),
                ("name-too-short", info("disk", length=3)),
                ("count-too-large", info("disk", 1, count=2)),
                ("count-too-small", info("disk", 1, count=0)),
                ("count-65535", info("disk", 1, count=65535)),
                ("trailing-byte", info("disk") + b"\0"),
            )
        ),
        refused(
            option, info("disk") + bytes(64 * KIB), TOO_BIG, f"{word}-64k", "what is too long is drained, and refused"
        ),
    ]
] + [
    Case(
        "go-after-info",
        "2.5 GO after INFO MUST give the same answers",
        [
            Ask(w.OPT_INFO, info("blocks", 1, 2, 3), (SIZES, INFO, text(1, "blocks"), ACK)),
            Ask(w.OPT_GO, info("blocks", 1, 2, 3), (SIZES, INFO, text(1, "blocks"), ACK)),
        ],
        "transmission",
    ),
    Case(
        "go-no-zeros",
        "2.5 no 124 zeros after GO",
        [go("disk")],
        "transmission",
        flags=FIXED,
    ),
    Case(
        "go-after-refusal",
        "a refused GO leaves the negotiation where it was",
        [Ask(w.OPT_GO, info("none"), (UNKNOWN,)), Ask(w.OPT_GO, b"", (INVALID,)), go("snö")],
        "transmission",
    ),
    Case(
        "info-then-more",
        "CVE-2019-14851: options after INFO, in any order",
        [
            Ask(w.OPT_INFO, info("disk"), (INFO, ACK)),
            STRUCTURED,
            Ask(w.OPT_INFO, info("fixed"), (INFO, ACK)),
            Ask(w.OPT_LIST, b"", (w.REP_SERVER,) * len(NAMES) + (ACK,)),
            go("blocks", more=1),
        ],
        "transmission",
    ),
]

CASES = HANDSHAKE + SIMPLE_OPTIONS + INFO_AND_GO


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_rule(case: Case, servers: tuple[Path, Path]) -> None:
    run_case(case, servers)


def test_every_case_is_told_apart() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.rule for case in CASES)


def test_the_constants_are_those_of_the_specification() -> None:
    """2.6: numbers for reference."""
    errors = "UNSUP POLICY INVALID PLATFORM TLS_REQD UNKNOWN SHUTDOWN BLOCK_SIZE_REQD TOO_BIG EXT_HEADER_REQD"
    for number, name in enumerate(errors.split(), 1):
        assert getattr(wire, f"REP_ERR_{name}") == 0x80000000 + number
