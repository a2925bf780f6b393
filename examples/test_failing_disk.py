"""Fault injection for code of your own: `append` must not leave half a line when the disk fails."""

import io

import pytest

from lamina.testing import FaultyStorage


def append(log: io.RawIOBase, line: bytes) -> None:
    end = log.seek(0, io.SEEK_END)
    try:
        log.write(line + b"\n")
    except OSError:
        log.truncate(end)
        raise


def test_a_failing_disk_leaves_no_half_line(lamina_faulty: FaultyStorage) -> None:
    log = lamina_faulty.as_file()
    append(log, b"first")
    lamina_faulty.fail("write", partial=3)
    with pytest.raises(OSError, match="a fault of the test"):
        append(log, b"second")
    lamina_faulty.heal()
    assert lamina_faulty.read(0, lamina_faulty.size) == b"first\n"
