"""Files of rules for `blkdebug`: what can be written, and what is refused with the line it stands in."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina.errors import BlockIOError, FormatError, LimitExceeded, NotFound, OptionError
from lamina.filters.blkdebug import Blkdebug, config
from lamina.filters.blkdebug.rules import Injection, Transition
from lamina.graph import Opener
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

READ = Injection("read_aio")

GOOD = [
    ("", []),
    ("\n\n   \n# only a comment\n", []),
    ('[inject-error]\nevent = "read_aio"\n', [READ]),
    ('[inject-error]\nevent = "read_aio"', [READ]),
    ('[inject-error]\r\nevent = "read_aio"\r\n', [READ]),
    ('  [inject-error]  # the first\n\tevent\t=\t"read_aio"  # always\n', [READ]),
    ('[inject-error]\nevent="read_aio"\n', [READ]),
    ('[inject-error]\nevent = "write_aio"\nevent = "read_aio"\n', [READ]),
    ('[inject-error "a"]\nevent = "read_aio"\n[inject-error "b"]\nevent = "read_aio"\n', [READ, READ]),
    (
        '[inject-error]\nevent = "l2_load"\niotype = "write-zeroes"\nerrno = "0x1c"\nsector = "8"\nonce = "on"\n'
        'immediately = "yes"\nstate = "3"\n',
        [Injection("l2_load", 3, ("write-zeroes",), 28, 8, True, True)],
    ),
    ('[inject-error]\nevent = "none"\nsector = "-1"\nerrno = "0"\n', [Injection("none", errno=0)]),
    ('[set-state]\nevent = "none"\nnew_state = "2"\nstate = "1"\n', [Transition("none", 1, 2)]),
    ('[set-state]\nevent = "none"\n', [Transition("none", 0, 0)]),
    (
        '[set-state]\nevent = "none"\nnew_state = "4"\n[inject-error]\nevent = "read_aio"\n',
        [Transition("none", 0, 4), READ],
    ),
]


@pytest.mark.parametrize(("text", "rules"), GOOD)
def test_read(text: str, rules: list[Injection | Transition]) -> None:
    assert config.parse(text) == rules


BAD = [
    ('event = "read_aio"\n', "f:1: .*before the first rule"),
    ("[bogus]\n", "f:1: unknown kind of rule '\\[bogus\\]'.*inject-error or set-state"),
    ("[inject-error]\n", "f:1: event is missing"),
    ('\n[inject-error]\nerrno = "5"\n', "f:2: event is missing"),
    ("[inject-error]\nevent = read_aio\n", "f:2: syntax error: 'event = read_aio'"),
    ("[inject-error]\nevent = 'read_aio'\n", "f:2: syntax error"),
    ('[inject-error]\nevent = "read_aio" junk\n', "f:2: syntax error"),
    ('[inject-error] junk\nevent = "read_aio"\n', "f:1: syntax error"),
    ('[inject-error]\nevent = "read_aio\n', "f:2: syntax error"),
    ('[inject-error\nevent = "read_aio"\n', "f:1: syntax error"),
    ("[]\n", "f:1: syntax error"),
    ('[inject-error]\nevent = "read_aio"\n\0\n', "f:3: syntax error"),
    ('[inject-error]\nevent = "read_aio"\nbogus = "1"\n', "f:1: inject-error has no option 'bogus'"),
    ('[set-state]\nevent = "read_aio"\nerrno = "1"\n', "f:1: set-state has no option 'errno'"),
    ('[inject-error]\nevent = "none"\nerrno = "ENOSPC"\n', "f:1: errno is 'ENOSPC'"),
    ('[inject-error]\nevent = "none"\nerrno = "-5"\n', "f:1: errno is '-5'"),
    ('[inject-error]\nevent = "none"\nerrno = "99999999999"\n', "f:1: errno is"),
    ('[inject-error]\nevent = "none"\nonce = "maybe"\n', "f:1: once is 'maybe'"),
    ('[inject-error]\nevent = "none"\niotype = ""\n', "f:1: iotype is ''"),
    ('[inject-error "a"]\nevent = "none"\n[inject-error "a"]\nevent = "none"\n', "f:3: duplicate rule"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_refused(text: str, words: str) -> None:
    with pytest.raises((FormatError, OptionError), match=f"^{words}"):
        config.parse(text, "f")


def opened(**options: object) -> Blkdebug:
    image = Child(MemoryStorage(1 << 20), "image", grows=True)
    return Blkdebug.open(Blkdebug.schema.parse({"image": image, **options}), Opener(read_only=False))


def test_a_file_and_options_add_up(tmp_path: Path) -> None:
    path = tmp_path / "rules"
    path.write_text('[inject-error]\nevent = "read_aio"\nerrno = "28"\n')
    node = opened(**{"config": str(path), "inject-error": [{"event": "read_aio", "errno": 5}]})
    node.event("read_aio")
    assert [rule.errno for rule in node.rules.active] == [28, 5]


def test_unknown_event_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rules"
    path.write_text('[inject-error]\nevent = "reed_aio"\n')
    with pytest.raises(OptionError, match="did you mean read_aio"):
        opened(config=str(path))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="absent: the rules of blkdebug cannot be read: No such file"):
        opened(config=str(tmp_path / "absent"))
    with pytest.raises(BlockIOError, match="Is a directory"):
        opened(config=str(tmp_path))
    (tmp_path / "long").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(LimitExceeded):
        opened(config=str(tmp_path / "long"))


def test_bytes_that_are_no_text_may_stand_in_comments(tmp_path: Path) -> None:
    path = tmp_path / "rules"
    path.write_bytes(b'# \xe9\n[inject-error]\nevent = "read_aio"\n')
    assert config.from_file(str(path)) == [READ]
