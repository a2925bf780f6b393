"""The NBD protocol as a table: every number and every layout that goes over the wire, in the words of the specification.

Names are those of the specification without their prefix `NBD_`. `docs/nbd-protocol.md` is generated from this file: a line
`# == TITLE` begins a group, the comment `#:` of a constant is its meaning. No other module contains a number of the
protocol. All integers are big-endian. Sections refer to the published `proto.md`; what it calls experimental (extended
headers, payloads of block status) is as QEMU 8.2 and libnbd 1.18 speak it.
"""

from __future__ import annotations

import errno
from typing import Final

from ..layout import Field, Structure
from ..limits import KIB, MIB

# == Magic numbers
INIT_MAGIC: Final = 0x4E42444D41474943  #: `NBDMAGIC`, the first bytes of every server
OPTS_MAGIC: Final = 0x49484156454F5054  #: `IHAVEOPT`: newstyle follows; also before each option
OLDSTYLE_MAGIC: Final = 0x00420281861253  #: the second number of an oldstyle server
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9  #: before each reply to an option
REQUEST_MAGIC: Final = 0x25609513  #: a request
SIMPLE_REPLY_MAGIC: Final = 0x67446698  #: a simple reply
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF  #: a chunk of a structured reply
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71  #: a request with an extended header
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C  #: a chunk of a reply with an extended header

# == Handshake flags, server to client
FLAG_FIXED_NEWSTYLE: Final = 1 << 0  #: options are answered, unknown ones too
FLAG_NO_ZEROES: Final = 1 << 1  #: the 124 zeros after EXPORT_NAME may be left out

# == Client flags
FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0  #: the client knows fixed newstyle
FLAG_C_NO_ZEROES: Final = 1 << 1  #: the client does not want the 124 zeros

# == Transmission flags
FLAG_HAS_FLAGS: Final = 1 << 0  #: always set
FLAG_READ_ONLY: Final = 1 << 1  #: changes are refused
FLAG_SEND_FLUSH: Final = 1 << 2  #: FLUSH is understood
FLAG_SEND_FUA: Final = 1 << 3  #: the command flag FUA is understood
FLAG_ROTATIONAL: Final = 1 << 4  #: the medium turns
FLAG_SEND_TRIM: Final = 1 << 5  #: TRIM is understood
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6  #: WRITE_ZEROES and the command flag NO_HOLE are understood
FLAG_SEND_DF: Final = 1 << 7  #: the command flag DF is understood; only with structured replies
FLAG_CAN_MULTI_CONN: Final = 1 << 8  #: what one connection writes and flushes, all see
FLAG_SEND_RESIZE: Final = 1 << 9  #: withdrawn
FLAG_SEND_CACHE: Final = 1 << 10  #: CACHE is understood
FLAG_SEND_FAST_ZERO: Final = 1 << 11  #: the command flag FAST_ZERO is understood
FLAG_BLOCK_STATUS_PAYLOAD: Final = 1 << 12  #: BLOCK_STATUS may name the contexts it asks for

# == Options
OPT_EXPORT_NAME: Final = 1  #: choose an export and begin transmission; has no reply that tells of an error
OPT_ABORT: Final = 2  #: end the negotiation
OPT_LIST: Final = 3  #: name all exports
OPT_PEEK_EXPORT: Final = 4  #: withdrawn
OPT_STARTTLS: Final = 5  #: go on under TLS
OPT_INFO: Final = 6  #: describe an export
OPT_GO: Final = 7  #: describe an export and begin transmission
OPT_STRUCTURED_REPLY: Final = 8  #: replies come in chunks
OPT_LIST_META_CONTEXT: Final = 9  #: name the metadata contexts of an export
OPT_SET_META_CONTEXT: Final = 10  #: select metadata contexts for BLOCK_STATUS
OPT_EXTENDED_HEADERS: Final = 11  #: requests and replies have 64-bit lengths

# == Replies to options
REP_ACK: Final = 1  #: done
REP_SERVER: Final = 2  #: one export, in answer to LIST
REP_INFO: Final = 3  #: one item about an export
REP_META_CONTEXT: Final = 4  #: one metadata context
REP_FLAG_ERROR: Final = 1 << 31  #: set in all that follow
REP_ERR_UNSUP: Final = REP_FLAG_ERROR + 1  #: the option is not known
REP_ERR_POLICY: Final = REP_FLAG_ERROR + 2  #: the option is known and forbidden
REP_ERR_INVALID: Final = REP_FLAG_ERROR + 3  #: the option is malformed, or makes no sense now
REP_ERR_PLATFORM: Final = REP_FLAG_ERROR + 4  #: the platform of the server lacks it
REP_ERR_TLS_REQD: Final = REP_FLAG_ERROR + 5  #: STARTTLS must come first
REP_ERR_UNKNOWN: Final = REP_FLAG_ERROR + 6  #: there is no such export
REP_ERR_SHUTDOWN: Final = REP_FLAG_ERROR + 7  #: the server is about to end
REP_ERR_BLOCK_SIZE_REQD: Final = REP_FLAG_ERROR + 8  #: the client must ask for the block sizes and keep to them
REP_ERR_TOO_BIG: Final = REP_FLAG_ERROR + 9  #: the option's data is too long
REP_ERR_EXT_HEADER_REQD: Final = REP_FLAG_ERROR + 10  #: it makes no sense once extended headers are agreed

# == Items of information
INFO_EXPORT: Final = 0  #: size and transmission flags
INFO_NAME: Final = 1  #: the canonical name
INFO_DESCRIPTION: Final = 2  #: a line for people
INFO_BLOCK_SIZE: Final = 3  #: minimum and preferred block, maximum payload

# == Commands
CMD_READ: Final = 0  #: read bytes
CMD_WRITE: Final = 1  #: write the bytes that follow
CMD_DISC: Final = 2  #: the client leaves; has no reply
CMD_FLUSH: Final = 3  #: what was answered before goes to stable storage
CMD_TRIM: Final = 4  #: bytes are no longer needed
CMD_CACHE: Final = 5  #: bytes will be read soon
CMD_WRITE_ZEROES: Final = 6  #: make bytes read as zero
CMD_BLOCK_STATUS: Final = 7  #: ask for the status of bytes, in the contexts that were selected
CMD_RESIZE: Final = 8  #: withdrawn

# == Command flags
CMD_FLAG_FUA: Final = 1 << 0  #: the reply comes when the bytes are on stable storage
CMD_FLAG_NO_HOLE: Final = 1 << 1  #: WRITE_ZEROES: the space must stay allocated
CMD_FLAG_DF: Final = 1 << 2  #: READ: at most one content chunk
CMD_FLAG_REQ_ONE: Final = 1 << 3  #: BLOCK_STATUS: only the first extent of each context
CMD_FLAG_FAST_ZERO: Final = 1 << 4  #: WRITE_ZEROES: quickly, or ENOTSUP with nothing touched
CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5  #: the length is that of the payload; only with extended headers

# == Flags of reply chunks
REPLY_FLAG_DONE: Final = 1 << 0  #: the last chunk of the reply

# == Types of reply chunks
REPLY_TYPE_NONE: Final = 0  #: no more to say
REPLY_TYPE_OFFSET_DATA: Final = 1  #: bytes
REPLY_TYPE_OFFSET_HOLE: Final = 2  #: zeros, not sent
REPLY_TYPE_BLOCK_STATUS: Final = 5  #: extents of one context, 32 bits
REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6  #: extents of one context, 64 bits; only with extended headers
REPLY_TYPE_ERROR_BIT: Final = 1 << 15  #: set in all types that tell of errors
REPLY_TYPE_ERROR: Final = (1 << 15) + 1  #: the request failed
REPLY_TYPE_ERROR_OFFSET: Final = (1 << 15) + 2  #: the request failed at an offset

# == Flags of the context base:allocation
STATE_HOLE: Final = 1 << 0  #: no space is allocated, so a write may fail with ENOSPC
STATE_ZERO: Final = 1 << 1  #: the bytes read as zero

# == Flags of the context qemu:dirty-bitmap:NAME
STATE_DIRTY: Final = 1 << 0  #: written since the bitmap was made

# == Flags of the context lamina:exact, whose extents are not rounded to the minimum block
EXACT_HOLE: Final = 1 << 0  #: as in base:allocation
EXACT_ZERO: Final = 1 << 1  #: as in base:allocation
EXACT_PRESENT: Final = 1 << 2  #: a layer of the image owns the bytes
EXACT_COMPRESSED: Final = 1 << 3  #: they are stored packed
EXACT_DEPTH_SHIFT: Final = 8  #: from this bit on: the layer that decides, 0 is the top

# == Errors
EPERM: Final = 1  #: not permitted: the export is read-only
EIO: Final = 5  #: the storage failed
ENOMEM: Final = 12  #: no memory
EINVAL: Final = 22  #: the request makes no sense
ENOSPC: Final = 28  #: no space is left, or the range ends past the end of the export
EOVERFLOW: Final = 75  #: too long to be answered in one chunk, or at all
ENOTSUP: Final = 95  #: this cannot be zeroed quickly
ESHUTDOWN: Final = 108  #: the server is about to end

# == Limits
MAX_STRING: Final = 4 * KIB  #: the longest string: names, messages, queries
MAX_PAYLOAD: Final = 32 * MIB  #: the largest read or write that every peer takes
MIN_BLOCK: Final = 1  #: what a client may assume without INFO_BLOCK_SIZE: minimum,
PREFERRED_BLOCK: Final = 4 * KIB  #: and preferred block
MAX_MINIMUM: Final = 64 * KIB  #: the largest minimum block; also the length up to which DF must be honoured
PORT: Final = 10809  #: where a server listens unless told otherwise

# == Metadata contexts
BASE_ALLOCATION: Final = "base:allocation"  #: what is stored, and what reads as zero
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"  #: the layer that owns the bytes, from 1; 0: none
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"  #: and the name of a bitmap: what was written since it was made
EXACT: Final = "lamina:exact"  #: what is stored, zero, compressed, and in which layer, to the byte

# == Layouts
GREETING: Final = Structure(
    "greeting",
    ">",
    [
        Field("magic", "u64", "INIT_MAGIC", default=INIT_MAGIC),
        Field("style", "u64", "OPTS_MAGIC", default=OPTS_MAGIC),
        Field("flags", "u16", "handshake flags"),
    ],
    doc="the first message of a newstyle server",
)
CLIENT_FLAGS: Final = Structure("client flags", ">", [Field("flags", "u32", "client flags")], doc="the client's answer")
OPTION: Final = Structure(
    "option",
    ">",
    [
        Field("magic", "u64", "OPTS_MAGIC", default=OPTS_MAGIC),
        Field("option", "u32", "which one"),
        Field("length", "u32", "bytes of data that follow"),
    ],
    doc="before the data of an option",
)
OPTION_REPLY: Final = Structure(
    "option reply",
    ">",
    [
        Field("magic", "u64", "OPTION_REPLY_MAGIC", default=OPTION_REPLY_MAGIC),
        Field("option", "u32", "the option that is answered"),
        Field("type", "u32", "kind of reply"),
        Field("length", "u32", "bytes of data that follow"),
    ],
    doc="before the data of a reply to an option",
)
EXPORT_REPLY: Final = Structure(
    "answer to EXPORT_NAME",
    ">",
    [Field("size", "u64", "bytes"), Field("flags", "u16", "transmission flags")],
    doc="the only answer to EXPORT_NAME; 124 zeros follow unless both sides have NO_ZEROES",
)
EXPORT_REPLY_ZEROES: Final = 124
INFO_EXPORT_DATA: Final = Structure(
    "INFO_EXPORT",
    ">",
    [
        Field("type", "u16", "INFO_EXPORT", default=INFO_EXPORT),
        Field("size", "u64", "bytes"),
        Field("flags", "u16", "transmission flags"),
    ],
)
INFO_BLOCK_SIZE_DATA: Final = Structure(
    "INFO_BLOCK_SIZE",
    ">",
    [
        Field("type", "u16", "INFO_BLOCK_SIZE", default=INFO_BLOCK_SIZE),
        Field("minimum", "u32", "requests are multiples of it"),
        Field("preferred", "u32", "works best"),
        Field("maximum", "u32", "the largest payload"),
    ],
)
REQUEST: Final = Structure(
    "request",
    ">",
    [
        Field("magic", "u32", "REQUEST_MAGIC", default=REQUEST_MAGIC),
        Field("flags", "u16", "command flags"),
        Field("type", "u16", "command"),
        Field("cookie", "u64", "chosen by the client, repeated in the reply"),
        Field("offset", "u64", "bytes"),
        Field("length", "u32", "bytes"),
    ],
    doc="before the payload of a WRITE, or alone",
)
EXTENDED_REQUEST: Final = Structure(
    "extended request",
    ">",
    [
        Field("magic", "u32", "EXTENDED_REQUEST_MAGIC", default=EXTENDED_REQUEST_MAGIC),
        Field("flags", "u16", "command flags"),
        Field("type", "u16", "command"),
        Field("cookie", "u64", "chosen by the client, repeated in the reply"),
        Field("offset", "u64", "bytes"),
        Field("length", "u64", "bytes: of the payload with PAYLOAD_LEN, else of the effect"),
    ],
)
SIMPLE_REPLY: Final = Structure(
    "simple reply",
    ">",
    [
        Field("magic", "u32", "SIMPLE_REPLY_MAGIC", default=SIMPLE_REPLY_MAGIC),
        Field("error", "u32", "0 or an error"),
        Field("cookie", "u64", "of the request"),
    ],
    doc="followed by the bytes of a READ that did not fail",
)
STRUCTURED_REPLY: Final = Structure(
    "structured reply chunk",
    ">",
    [
        Field("magic", "u32", "STRUCTURED_REPLY_MAGIC", default=STRUCTURED_REPLY_MAGIC),
        Field("flags", "u16", "flags of the chunk"),
        Field("type", "u16", "type of the chunk"),
        Field("cookie", "u64", "of the request"),
        Field("length", "u32", "bytes of payload that follow"),
    ],
)
EXTENDED_REPLY: Final = Structure(
    "extended reply chunk",
    ">",
    [
        Field("magic", "u32", "EXTENDED_REPLY_MAGIC", default=EXTENDED_REPLY_MAGIC),
        Field("flags", "u16", "flags of the chunk"),
        Field("type", "u16", "type of the chunk"),
        Field("cookie", "u64", "of the request"),
        Field("offset", "u64", "of the request"),
        Field("length", "u64", "bytes of payload that follow"),
    ],
)
HOLE: Final = Structure(
    "OFFSET_HOLE", ">", [Field("offset", "u64", "where the zeros begin"), Field("length", "u32", "how many, not 0")]
)
ERROR: Final = Structure(
    "ERROR",
    ">",
    [Field("error", "u32", "which, not 0"), Field("length", "u16", "bytes of text that follow")],
    doc="the payload of ERROR; with ERROR_OFFSET the offset (u64) follows the text",
)
EXTENT: Final = Structure("block status", ">", [Field("length", "u32", "not 0"), Field("status", "u32", "flags")])
EXTENT_EXT: Final = Structure(
    "block status, extended", ">", [Field("length", "u64", "not 0"), Field("status", "u64", "flags")]
)
STATUS_EXT: Final = Structure(
    "BLOCK_STATUS_EXT",
    ">",
    [Field("context", "u32", "identifies the context"), Field("count", "u32", "extents that follow, not 0")],
)

#: Options and commands by number, for messages.
OPTION_NAMES: Final = {
    value: name[4:] for name, value in list(globals().items()) if name.startswith("OPT_") and isinstance(value, int)
}
COMMAND_NAMES: Final = {
    value: name[4:]
    for name, value in list(globals().items())
    if name.startswith("CMD_") and not name.startswith("CMD_FLAG")
}
REP_ERROR_NAMES: Final = {value: name[8:] for name, value in list(globals().items()) if name.startswith("REP_ERR_")}

#: What may stand for an error on the wire; the others of the system become one of these, mostly EIO.
WIRE_ERRORS: Final = {EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN}
_TO_WIRE: Final = {
    errno.EPERM: EPERM,
    errno.EACCES: EPERM,
    errno.EROFS: EPERM,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.ESHUTDOWN: ESHUTDOWN,
}
_FROM_WIRE: Final = {
    EPERM: errno.EPERM,
    EIO: errno.EIO,
    ENOMEM: errno.ENOMEM,
    EINVAL: errno.EINVAL,
    ENOSPC: errno.ENOSPC,
    EOVERFLOW: errno.EOVERFLOW,
    ENOTSUP: errno.ENOTSUP,
    ESHUTDOWN: errno.ESHUTDOWN,
}


def to_wire(number: int | None) -> int:
    """The error on the wire for an errno of this system. ENOMEM is never sent (it SHOULD NOT be), and ENOTSUP and EOVERFLOW
    have meanings of their own: the callers that mean those handle them."""
    return _TO_WIRE.get(number or errno.EIO, EIO)


def from_wire(error: int) -> int:
    """The errno of this system for an error on the wire; EINVAL for one that is not known."""
    return _FROM_WIRE.get(error, errno.EINVAL)
