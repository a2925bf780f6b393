"""The storage that fails when a test says so; and the recorder below it, as a node and as a file."""

from __future__ import annotations

import errno
import io

import pytest

from lamina.errors import BlockIOError
from lamina.image import Image
from lamina.testing.faulty import FaultyStorage
from lamina.testing.recorder import Recorder


@pytest.mark.parametrize("operation", ["read", "write", "zero", "discard", "truncate", "flush"])
def test_each_operation_fails_when_it_is_its_turn(operation: str) -> None:
    storage = FaultyStorage(bytes(4096))
    image = Image(storage)
    calls = {
        "read": lambda: image.read(0, 512),
        "write": lambda: image.write(0, b"a" * 512),
        "zero": lambda: image.zero(0, 512),
        "discard": lambda: image.discard(0, 512),
        "truncate": lambda: image.truncate(4096),
        "flush": image.flush,
    }
    storage.fail(operation, nth=2, times=2, errno=errno.ENOSPC)
    outcomes: list[tuple[str, int, str | None] | None] = []
    for _ in range(4):
        for name, call in calls.items():
            try:
                call()
            except BlockIOError as error:
                outcomes.append((name, error.errno, error.operation))
            else:
                if name == operation:
                    outcomes.append(None)
    failed = (operation, errno.ENOSPC, operation)
    assert outcomes == [None, failed, failed, None]
    assert storage.failures == 2
    assert set(storage.calls.values()) == {4}


def test_a_fault_lasts_until_it_is_healed() -> None:
    storage = FaultyStorage()
    storage.fail("write", times=None, partial=3)
    for at in (0, 10):
        with pytest.raises(OSError, match="a fault of the test"):
            storage.write(at, b"abcdef")
    storage.heal()
    storage.write(20, b"abcdef")
    assert bytes(storage.content) == b"abc" + bytes(7) + b"abc" + bytes(7) + b"abcdef"
    assert [record.length for record in storage.log] == [3, 3, 6]


def test_faults_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="no operation 'wriet'"):
        FaultyStorage().fail("wriet")
    with pytest.raises(ValueError, match="0th"):
        FaultyStorage().fail("write", nth=0)


def test_the_recorder_is_a_file() -> None:
    storage = Recorder(b"0123456789")
    file = storage.as_file()
    assert file.read(4) == b"0123"
    assert file.seek(-2, io.SEEK_END) == 8
    assert file.read() == b"89"
    file.seek(12)
    assert file.write(b"ab") == 2
    assert file.tell() == 14
    file.truncate(13)
    file.sync()
    file.seek(0)
    assert file.read() == b"0123456789\0\0a"
    assert [record.kind for record in storage.log] == ["write", "truncate", "flush_start", "flush_done"]
    buffered = io.BufferedRandom(file)
    buffered.seek(0)
    buffered.write(b"xy")
    assert len(storage.log) == 4, "it is in the buffer"
    buffered.flush()
    assert storage.read(0, 3) == b"xy2"
    with pytest.raises(ValueError, match="before the start"):
        file.seek(-1)
    with pytest.raises(io.UnsupportedOperation):
        file.fileno()
