"""How `lamina io` speaks: lines that never interleave, and the fixed texts that scripts parse.

The lines on standard output are, to the letter, those that scripts written for qemu-io expect; complaints in words of our
own go to standard error. Requests that run beside one another each write all their lines at once.
"""

from __future__ import annotations

import os
import sys
import threading
from errno import EIO
from typing import TextIO

from ...errors import LaminaError, OutOfRange, printable

#: What a hex dump shows for a byte: letters and digits of ASCII, a dot for all others.
_SHOWN = bytes(byte if byte < 128 and chr(byte).isalnum() else ord(".") for byte in range(256))


class Output:
    """Standard output and error. Safe for any number of threads."""

    def __init__(self, program: str, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.program = program
        self._out = sys.stdout if out is None else out
        self._err = sys.stderr if err is None else err
        self._mutex = threading.Lock()

    def say(self, *lines: str) -> None:
        """Results: these lines, together."""
        with self._mutex:
            self._out.write("\n".join((*lines, "")))

    def complain(self, words: str) -> None:
        """What went wrong, after all that was said before it."""
        with self._mutex:
            self._out.flush()
            self._err.write(f"{self.program}: {printable(words)}\n")
            self._err.flush()

    def failure(self, operation: str, error: LaminaError) -> None:
        """A request that failed: the line that scripts know, and on standard error what exactly happened."""
        # A request outside the disk has been an input/output error to every script so far.
        number = EIO if isinstance(error, OutOfRange) else error.errno or EIO
        self.say(f"{operation} failed: {os.strerror(number)}")
        self.complain(str(error))

    def flush(self) -> None:
        with self._mutex:
            self._out.flush()


def human_size(size: float) -> str:
    """`size` bytes as `512 bytes`, `64 KiB`, `1.500 MiB`: three decimals, or none where they would be zeros."""
    value, unit = float(size), "bytes"
    for prefix in "KMGTPE":
        if value < 1024:
            break
        value /= 1024
        unit = f"{prefix}iB"
    digits = 6 if unit == "bytes" else 3
    return f"{value:.{digits}f}".removesuffix("." + "0" * digits) + " " + unit


def clock(seconds: float, *, full: bool = False) -> str:
    """`00.12 sec` below a minute, else (or with `full`) `0:01:05.12`."""
    hundredths = int(seconds * 100)
    if not full and hundredths < 6000:
        return f"{hundredths // 100:02d}.{hundredths % 100:02d} sec"
    minutes, rest = divmod(hundredths, 6000)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest // 100:02d}.{rest % 100:02d}"


def statistics(verb: str, offset: int, length: int, seconds: float) -> list[str]:
    """The two lines that tell of a request that was done."""
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
    """16 bytes a line: offset in the disk, the bytes in hex, and the letters and digits among them."""
    lines = []
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        lines.append(f"{offset + at:08x}:  {row.hex(' ')}  {row.translate(_SHOWN).decode('ascii')}")
    return lines
