"""Zstandard frames (RFC 8878), as disk images hold them: one piece of known length at a time."""

from __future__ import annotations

import sys

from ..errors import CorruptImage

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: The level at which images are packed if nothing else is asked for.
LEVEL = 3
#: Frames that would need a larger window than 128 MiB are refused.
_WINDOW_LOG_MAX = 27


def pack(data: bytes | bytearray | memoryview, level: int = LEVEL) -> bytes:
    """`data` as one frame. `level`: 1, fast, to 22, small."""
    return zstd.compress(data, level)


def unpack(packed: bytes | bytearray | memoryview, length: int) -> bytes:
    """The first `length` bytes (at least one) of the frame that `packed` begins with; nothing beyond is unpacked, and what
    follows the frame is ignored. CorruptImage if it is no such frame, or ends before."""
    unpacker = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})
    try:
        data: bytes = unpacker.decompress(packed, length)
    except zstd.ZstdError as error:
        raise CorruptImage("this is not Zstandard data, or asks for too large a window") from error
    if len(data) != length:
        raise CorruptImage(f"Zstandard data ends after {len(data)} of {length} bytes")
    return data
