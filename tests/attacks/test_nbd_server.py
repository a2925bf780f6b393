"""Hostile clients of the NBD server: the published attacks, and the classes of them, each with the bytes that provoke it.

Rows are those of the list of known attacks, with their CVE numbers. What holds after each: that client alone is refused or
dropped, and the next one is served as if nothing had been. No wait is for a timeout of the server's, unless it is about one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import lamina
from lamina.limits import MIB
from lamina.nbd import Export, Server
from lamina.nbd import wire as w

from ..nbd_raw import CLIENT_FLAGS, Gone, SocketStream, dial, info, meta, sized
from .nbd_victim import SIZE, conversation, finish, served, victim

OPTIONS = [*range(12), 99, 0xFFFFFFFF]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with victim(tmp_path_factory.mktemp("nbd")) as path:
        yield path


@pytest.fixture(autouse=True)
def the_next_client_is_served(path: Path) -> Iterator[None]:
    yield
    served(path)


# -- whoever leaves, and whoever talks nonsense


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_closed_at_each_byte(path: Path, mode: str) -> None:
    """Row 62, CVE-2013-7441, CVE-2017-9524: a client that is gone, at any moment."""
    said = conversation(mode)
    for length in range(len(said)):
        stream = SocketStream(str(path))
        stream.send(said[:length])
        stream.close()
        if length % 64 == 0:
            served(path)


def test_ended_at_each_byte(path: Path) -> None:
    """The same, with the replies read: what was complete is answered, and then the server closes."""
    said = conversation("structured")
    lengths = []
    for length in range(0, len(said), 3):
        with dial(path) as raw:
            raw.stream.send(said[:length])
            lengths.append(len(finish(raw)))
    assert lengths == sorted(lengths)


def test_reset_with_replies_unread(path: Path) -> None:
    """Row 63, CVE-2017-10664: writing to a client that is gone ends nothing (SIGPIPE)."""
    for _ in range(20):
        with dial(path) as raw:
            raw.begin("disk", "simple")
            raw.stream.send(b"".join(raw.request(w.CMD_READ, 0, MIB, send=False) for _ in range(8)))


def test_random_bytes_after_the_greeting(path: Path, seed: int) -> None:
    """Row 63, CVE-2017-7539."""
    source = random.Random(seed)
    for number in range(150):
        with dial(path) as raw:
            raw.greet(CLIENT_FLAGS if number % 2 else None)
            try:
                raw.stream.send(source.randbytes(source.randrange(1, 4000)))
            except Gone:
                continue
            finish(raw)


def test_random_requests(path: Path, seed: int) -> None:
    """Row 63, in transmission: anything behind a magic that is right."""
    source = random.Random(seed)
    for number in range(100):
        with dial(path) as raw:
            raw.begin(
                "disk", ("simple", "structured", "extended")[number % 3], ("base:allocation",) if number % 3 else ()
            )
            magic = w.EXTENDED_REQUEST_MAGIC if raw.extended else w.REQUEST_MAGIC
            size = w.EXTENDED_REQUEST.size if raw.extended else w.REQUEST.size
            message = b"".join(
                magic.to_bytes(4) + source.choice([b"\0\0\0", b"\0\1\0"]) + source.randbytes(size - 7)
                for _ in range(20)
            )
            try:
                raw.stream.send(message)
            except Gone:
                continue
            finish(raw)


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_mutated_conversations(path: Path, mode: str, seed: int) -> None:
    """Section 7: bytes changed, lost and added anywhere."""
    source = random.Random(seed)
    said = conversation(mode)
    for _ in range(100):
        mutant = bytearray(said)
        for _ in range(source.randrange(1, 4)):
            at = source.randrange(len(mutant))
            kind = source.randrange(3)
            if kind == 0:
                mutant[at] = source.choice([0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)])
            elif kind == 1:
                del mutant[at : at + source.randrange(1, 9)]
            else:
                mutant[at:at] = source.randbytes(source.randrange(1, 9))
        with dial(path) as raw:
            try:
                raw.stream.send(bytes(mutant))
            except Gone:
                continue
            finish(raw)


# -- lengths


@pytest.mark.parametrize("length", [(32 << 20) + 1, 1 << 31, 0xFFFFFFF0, 0xFFFFFFFF])
@pytest.mark.parametrize("option", OPTIONS)
def test_huge_options_are_dropped(path: Path, option: int, length: int) -> None:
    """Rows 66 and 77, CVE-2017-15119, CVE-2022-26495: nobody waits for so much, nor makes room for it."""
    with dial(path) as raw:
        raw.greet()
        raw.send_option(option, b"", length=length)
        assert raw.ended()


@pytest.mark.parametrize("data", [b"", b"\0", bytes(5), b"\xff" * 5, b"\xff" * 64])
@pytest.mark.parametrize("option", OPTIONS)
def test_short_and_senseless_options(path: Path, option: int, data: bytes) -> None:
    """Section 7: lengths 0, 1 and others for every option; the server stays in step, or leaves."""
    with dial(path) as raw:
        raw.greet()
        raw.option(w.OPT_STRUCTURED_REPLY)
        raw.send_option(option, data)
        if option == w.OPT_EXPORT_NAME:
            assert raw.ended()
            return
        replies = raw.option_replies(option)
        assert replies
        if option != w.OPT_ABORT:
            assert raw.option(0x4C414D49)[0][0] == w.REP_ERR_UNSUP


@pytest.mark.parametrize("inner", [0, 1, 3, 5, 1 << 31, 0xFFFFFFFF])
@pytest.mark.parametrize("option", [w.OPT_INFO, w.OPT_GO, w.OPT_LIST_META_CONTEXT, w.OPT_SET_META_CONTEXT])
def test_nested_lengths(path: Path, option: int, inner: int) -> None:
    """Rows 66 and 77, CVE-2022-26495/26496: a name's length that contradicts the option's."""
    data = sized("disk", inner) + (bytes(2) if option in (w.OPT_INFO, w.OPT_GO) else bytes(4))
    with dial(path) as raw:
        raw.greet()
        raw.option(w.OPT_STRUCTURED_REPLY)
        (reply,) = raw.option(option, data)
        assert reply[0] == w.REP_ERR_INVALID
        assert raw.option(0x4C414D49)[0][0] == w.REP_ERR_UNSUP


@pytest.mark.parametrize("length", [257, 1024, 3000, 4095, 4096, 4097, 8192, 65000])
@pytest.mark.parametrize("option", [w.OPT_INFO, w.OPT_GO, w.OPT_LIST_META_CONTEXT, w.OPT_SET_META_CONTEXT])
def test_long_names(path: Path, option: int, length: int) -> None:
    """Rows 65 and 67, CVE-2017-15118, CVE-2020-10761: the answer is an error, whose text is a string like any."""
    name = "é" * (length // 2) + "x" * (length % 2)
    with dial(path) as raw:
        raw.greet()
        raw.option(w.OPT_STRUCTURED_REPLY)
        replies = raw.option(option, info(name) if option in (w.OPT_INFO, w.OPT_GO) else meta(name, "base:allocation"))
        assert replies[0][0] == (w.REP_ERR_UNKNOWN if length <= w.MAX_STRING else w.REP_ERR_TOO_BIG)
        assert len(replies[0][1]) < 1000


@pytest.mark.parametrize(
    "name", ["\x1b[2J\x1b]0;owned\x07", "a\nb", "\x7f", "\u202egnp.elif", "%s%n", "../../etc/passwd"]
)
def test_names_that_drive_a_terminal(path: Path, name: str) -> None:
    """Section 7, control characters: what is repeated is printable. (`Raw` holds every text against that.)"""
    with dial(path) as raw:
        raw.greet()
        assert raw.option(w.OPT_INFO, info(name))[0][0] == w.REP_ERR_UNKNOWN


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_offsets_and_lengths_that_overflow(path: Path, mode: str) -> None:
    """Section 7, CVE-2025-47711/47712 (row 71): offset + length over 2^63 and 2^64, and lengths that round up to 2^32."""
    offsets = [0, 1, SIZE - 1, SIZE, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 512, (1 << 64) - 1]
    lengths = [1, 511, (1 << 31) + 1, (1 << 32) - 511, (1 << 32) - 1]
    if mode == "extended":
        lengths += [1 << 32, 1 << 63, (1 << 64) - 1]
    with dial(path) as raw:
        raw.begin("disk", mode, ("base:allocation", "lamina:exact") if mode != "simple" else ())
        for command in (w.CMD_READ, w.CMD_TRIM, w.CMD_CACHE, w.CMD_BLOCK_STATUS):
            for offset in offsets:
                for length in lengths:
                    wrong = offset > SIZE or length > SIZE - offset
                    wrong |= command == w.CMD_READ and length > w.MAX_PAYLOAD
                    wrong |= command == w.CMD_BLOCK_STATUS and mode == "simple"
                    assert bool(raw.ask(command, offset, length).error) == wrong, (command, offset, length)


@pytest.mark.parametrize("align", [4096, 65536])
def test_lengths_that_round_up_to_2_32(tmp_path: Path, align: int) -> None:
    """Row 71, CVE-2025-47712: a minimum block, and a client that does not keep to it."""
    options = {"driver": "blkdebug", "align": align, "image": {"driver": "memory", "size": SIZE}}
    with lamina.open(options, read_only=False) as image:
        here = tmp_path / "socket"
        with Server([Export(image, "")], unix=str(here)), dial(here) as raw:
            raw.begin("", "structured", ("base:allocation",), block_sizes=False)
            raw.minimum = 1
            for offset in (0, 1, align - 1):
                extents = raw.block_status(offset, 0xFFFFFFFF)["base:allocation"]
                assert 0 < sum(length for length, _ in extents) <= 0xFFFFFFFF
