"""Output of `lamina io`: lines of several threads never interleave, and results have the fixed texts of qemu-io.

Lines on standard output are exactly those that scripts for qemu-io expect; error messages in Lamina's own words go to
standard error. A request writes all its lines at once.
"""

from __future__ import annotations

import os
import sys
import threading
from errno import EIO
from typing import TextIO

from ...errors import LaminaError, OutOfRange, printable

#: The characters of a hex dump: ASCII letters and digits, and a dot for all other bytes.
_SHOWN = bytes(byte if byte < 128 and chr(byte).isalnum() else ord(".") for byte in range(256))


class Output:
    """Standard output and error. Thread-safe."""

    def __init__(self, program: str, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.program = program
        self._out = sys.stdout if out is None else out
        self._err = sys.stderr if err is None else err
        self._mutex = threading.Lock()

    def say(self, *lines: str) -> None:
        """Write lines of results, together."""
        with self._mutex:
            self._out.write("\n".join((*lines, "")))

    def write(self, text: str) -> None:
        """Write text of a line that is not complete, at once."""
        with self._mutex:
            self._out.write(text)
            self._out.flush()

    def print_error(self, text: str) -> None:
        """Write an error message to standard error, after flushing standard output."""
        with self._mutex:
            self._out.flush()
            self._err.write(f"{self.program}: {printable(text)}\n")
            self._err.flush()

    def failure(self, operation: str, error: LaminaError) -> None:
        """Report a failed request: the line of qemu-io, and the error message on standard error."""
        # qemu-io reports a request outside the disk as an input/output error.
        number = EIO if isinstance(error, OutOfRange) else error.errno or EIO
        self.say(f"{operation} failed: {os.strerror(number)}")
        self.print_error(error.command_text())

    def flush(self) -> None:
        with self._mutex:
            self._out.flush()


def human_size(size: float) -> str:
    """A readable size: `512 bytes`, `64 KiB`, `1.500 MiB`; three decimals, unless all of them are zeros."""
    value, unit = float(size), "bytes"
    for prefix in "KMGTPE":
        if value < 1024:
            break
        value /= 1024
        unit = f"{prefix}iB"
    digits = 6 if unit == "bytes" else 3
    return f"{value:.{digits}f}".removesuffix("." + "0" * digits) + " " + unit


def clock(seconds: float, *, full: bool = False) -> str:
    """A duration: `00.12 sec` below a minute, otherwise (or with `full`) `0:01:05.12`."""
    hundredths = int(seconds * 100)
    if not full and hundredths < 6000:
        return f"{hundredths // 100:02d}.{hundredths % 100:02d} sec"
    minutes, rest = divmod(hundredths, 6000)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest // 100:02d}.{rest % 100:02d}"


def statistics(verb: str, offset: int, length: int, seconds: float) -> list[str]:
    """The two lines that report a completed request."""
    rate = 1 / max(seconds, 1e-9)
    return [
        f"{verb} {length}/{length} bytes at offset {offset}",
        f"{human_size(length)}, 1 ops; {clock(seconds)} ({human_size(length * rate)}/sec and {rate:.4f} ops/sec)",
    ]


def machine_statistics(length: int, seconds: float) -> str:
    """The same for programs: bytes, operations, time, bytes per second, operations per second."""
    rate = 1 / max(seconds, 1e-9)
    return f"{length},1,{clock(seconds, full=True)},{length * rate:.3f},{rate:.3f}"


def hex_dump(offset: int, data: bytes | bytearray) -> list[str]:
    """Lines of 16 bytes: the offset in the disk, the bytes in hex, and their letters and digits."""
    lines = []
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        lines.append(f"{offset + at:08x}:  {row.hex(' ')}  {row.translate(_SHOWN).decode('ascii')}")
    return lines
