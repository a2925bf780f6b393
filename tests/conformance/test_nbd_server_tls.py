"""What may be said before TLS, and what is forgotten when it begins: rules T1 to T4 of the safety policy, 2.5 of the survey.

Played in memory, with the server's own negotiation: what it is about is state, not encryption.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lamina.limits import KIB
from lamina.nbd import Export
from lamina.nbd import wire as w

from ..nbd_memory import MemoryServer
from ..nbd_raw import Raw, info, meta
from ..nbd_rules import (
    ACK,
    EXTENDED,
    INVALID,
    NAMES,
    POLICY,
    SET_BASE,
    STRUCTURED,
    TLS_REQD,
    Ask,
    export_name,
    go,
    has,
    no_status,
    play,
    rule_exports,
    settle,
)

ALL = [
    (w.OPT_LIST, b""),
    (w.OPT_PEEK_EXPORT, b""),
    (w.OPT_INFO, info("disk")),
    (w.OPT_GO, info("disk")),
    (w.OPT_STRUCTURED_REPLY, b""),
    (w.OPT_LIST_META_CONTEXT, meta("disk")),
    (w.OPT_SET_META_CONTEXT, meta("disk", "base:allocation")),
    (w.OPT_EXTENDED_HEADERS, b""),
    (99, b"x"),
    (w.OPT_LIST, bytes(128 * KIB)),
    (w.OPT_INFO, info("none")),
    (w.OPT_GO, b"malformed"),
]


@pytest.fixture(scope="module")
def exports() -> Iterator[list[Export]]:
    found = rule_exports()
    yield found
    for export in found:
        export.image.close()


def secured(exports: list[Export], tls: str, *steps: Ask) -> Raw:
    raw = Raw(MemoryServer(exports, tls=tls))
    raw.greet()
    play(raw, [*steps, Ask(w.OPT_STARTTLS, b"", (ACK,))])
    return raw


@pytest.mark.parametrize(("option", "data"), ALL)
def test_forced_tls_refuses_everything_before_it(exports: list[Export], option: int, data: bytes) -> None:
    """T1, 2.5: FORCEDTLS answers all but STARTTLS and ABORT with TLS_REQD, and names no export."""
    raw = Raw(MemoryServer(exports, tls="require"))
    raw.greet()
    replies = raw.option(option, data)
    assert [type for type, _ in replies] == [TLS_REQD]
    assert not any(name.encode() in data for _, data in replies for name in NAMES)
    assert raw.option(w.OPT_ABORT) == [(ACK, b"")]
    assert raw.ended()


def test_forced_tls_drops_export_name(exports: list[Export]) -> None:
    """T1: EXPORT_NAME has no reply that says no."""
    raw = Raw(MemoryServer(exports, tls="require"))
    raw.greet()
    play(raw, [export_name(b"disk", None)])


@pytest.mark.parametrize("tls", ["allow", "require"])
@pytest.mark.parametrize(("option", "data"), ALL)
def test_never_tls_reqd_after_it(exports: list[Export], tls: str, option: int, data: bytes) -> None:
    """T2, 2.5."""
    raw = secured(exports, tls)
    assert raw.option(option, data)[-1][0] != TLS_REQD
    if option != w.OPT_GO or data != info("disk"):
        assert raw.option(w.OPT_STARTTLS)[0][0] == INVALID  # 2.5: a second STARTTLS
        settle(raw, "options")


@pytest.mark.parametrize("tls", ["allow", "require"])
def test_starttls_with_data(exports: list[Export], tls: str) -> None:
    """T3: INVALID, and the negotiation goes on."""
    raw = Raw(MemoryServer(exports, tls=tls))
    raw.greet()
    assert raw.option(w.OPT_STARTTLS, b"x")[0][0] == INVALID
    assert raw.option(w.OPT_STARTTLS)[0][0] == ACK


def test_tls_forgets_structured_replies(exports: list[Export]) -> None:
    """2.5, T3, CVE-2021-3716 (nbdkit kept them)."""
    raw = secured(exports, "allow", STRUCTURED)
    raw.structured = False
    play(raw, [Ask(w.OPT_SET_META_CONTEXT, meta("disk", "base:allocation"), (INVALID,)), go("disk")])
    has(w.FLAG_SEND_DF, False)(raw)
    settle(raw, "transmission")
    raw = secured(exports, "allow", STRUCTURED)
    play(raw, [STRUCTURED, go("disk")])
    settle(raw, "transmission")


def test_tls_forgets_extended_headers(exports: list[Export]) -> None:
    """2.6: STARTTLS resets them."""
    raw = secured(exports, "allow", EXTENDED)
    raw.structured = raw.extended = False
    play(raw, [export_name(b"disk", "no zeros")])
    settle(raw, "transmission")
    raw = secured(exports, "allow", EXTENDED)
    raw.extended = False
    play(raw, [STRUCTURED, go("disk")])
    settle(raw, "transmission")


def test_tls_forgets_contexts(exports: list[Export]) -> None:
    """2.5: a selection made in the clear does not last."""
    raw = secured(exports, "allow", STRUCTURED, SET_BASE)
    raw.contexts = {}
    play(raw, [STRUCTURED, go("disk")])
    no_status(raw)
    settle(raw, "transmission")


def test_without_tls_the_rest_goes_on(exports: list[Export]) -> None:
    """1a, T4: NOTLS never asks for TLS, and refuses STARTTLS by POLICY, however often."""
    raw = Raw(MemoryServer(exports))
    raw.greet()
    play(raw, [Ask(w.OPT_STARTTLS, b"", (POLICY,))] * 3 + [STRUCTURED, go("disk")])
    settle(raw, "transmission")


@pytest.mark.parametrize(("option", "data"), [case for case in ALL if len(case[1]) < 64 * KIB])
def test_a_server_that_ends_refuses_options(exports: list[Export], option: int, data: bytes) -> None:
    """2.5: ERR_SHUTDOWN, for all but ABORT."""
    server = MemoryServer(exports)
    raw = Raw(server)
    raw.greet()
    server.negotiation.shutting_down = True
    assert raw.option(option, data)[0][0] == w.REP_ERR_SHUTDOWN
    assert raw.option(w.OPT_ABORT) == [(ACK, b"")]
