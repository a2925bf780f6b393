"""The structures of a qcow2 image, as tables: header, header extensions, and the bits of table entries.

After the published specification "Qcow2 Image File Format". All numbers are big-endian, all offsets are bytes in the image
file.
"""

from __future__ import annotations

from typing import Final

from ...layout import Field, Flags, Structure

MAGIC: Final = b"QFI\xfb"

INCOMPATIBLE = Flags(
    {
        0: ("dirty", "reference counts may be inconsistent"),
        1: ("corrupt", "a structure is corrupt: not to be written to"),
        2: ("external data file", "guest data lies in another file"),
        3: ("compression type", "compressed clusters are not deflate"),
        4: ("extended L2 entries", "clusters are allocated in 32 subclusters"),
    },
)
COMPATIBLE = Flags({0: ("lazy refcounts", "reference counts may be updated late")})
AUTOCLEAR = Flags(
    {
        0: ("bitmaps", "the bitmaps extension is consistent"),
        1: ("raw external data", "the external data file can be read as a raw image"),
    },
)

CRYPT_METHODS: Final = {0: "none", 1: "aes", 2: "luks"}

HEADER_V2 = Structure(
    "qcow2 header, version 2",
    ">",
    [
        Field("magic", "4s", 'the bytes "QFI\\xfb"', default=MAGIC),
        Field("version", "u32", "2 or 3"),
        Field(
            "backing_file_offset", "u64", "where the name of the backing file is stored; 0: there is none", default=0
        ),
        Field("backing_file_size", "u32", "length of that name in bytes, at most 1023", default=0),
        Field("cluster_bits", "u32", "a cluster is 1 << cluster_bits bytes"),
        Field("size", "u64", "size of the virtual disk in bytes"),
        Field("crypt_method", "u32", "how guest data is encrypted", default=0, values=CRYPT_METHODS),
        Field("l1_size", "u32", "entries of the active L1 table"),
        Field("l1_table_offset", "u64", "where the active L1 table starts"),
        Field("refcount_table_offset", "u64", "where the refcount table starts"),
        Field("refcount_table_clusters", "u32", "clusters that the refcount table occupies"),
        Field("nb_snapshots", "u32", "internal snapshots in the image", default=0),
        Field("snapshots_offset", "u64", "where the snapshot table starts", default=0),
    ],
    doc="The first 72 bytes of every image, and all of the header in version 2.",
)

HEADER_V3 = HEADER_V2.extend(
    "qcow2 header, version 3",
    [
        Field(
            "incompatible_features",
            "u64",
            "bits that a reader must know, or refuse the image",
            default=0,
            flags=INCOMPATIBLE,
        ),
        Field("compatible_features", "u64", "bits that a reader may ignore", default=0, flags=COMPATIBLE),
        Field(
            "autoclear_features",
            "u64",
            "bits that a writer which does not know them must clear",
            default=0,
            flags=AUTOCLEAR,
        ),
        Field("refcount_order", "u32", "a reference count is 1 << refcount_order bits wide", default=4),
        Field("header_length", "u32", "bytes of the header, a multiple of 8", default=104),
    ],
    doc="Version 3 adds feature bits and the width of reference counts.",
)

#: The offset of the byte compression_type, which exists if header_length exceeds it.
COMPRESSION_TYPE_OFFSET: Final = 104
#: What the extension of an encrypted image says.
ENCRYPTION_POINTER = Structure(
    "full disk encryption header pointer",
    ">",
    [
        Field("offset", "u64", "where the encryption header starts"),
        Field("length", "u64", "its length in bytes"),
    ],
)

SNAPSHOT = Structure(
    "snapshot table entry",
    ">",
    [
        Field("l1_table_offset", "u64", "where the L1 table of the snapshot starts"),
        Field("l1_size", "u32", "its entries"),
        Field("id_size", "u16", "length of the unique identifier"),
        Field("name_size", "u16", "length of the name"),
        Field("date_sec", "u32", "when it was taken: seconds since 1970"),
        Field("date_nsec", "u32", "and nanoseconds"),
        Field("vm_clock_nsec", "u64", "for how long the guest had run"),
        Field("vm_state_size", "u32", "bytes of state of the machine"),
        Field("extra_data_size", "u32", "bytes of extra data that follow"),
    ],
    doc="Followed by extra data, identifier and name, and padding to a multiple of 8.",
)

BITMAPS = Structure(
    "bitmaps extension",
    ">",
    [
        Field("nb_bitmaps", "u32", "bitmaps in the image"),
        Field("reserved", "4x", "must be 0"),
        Field("bitmap_directory_size", "u64", "its length in bytes"),
        Field("bitmap_directory_offset", "u64", "where the bitmap directory starts"),
    ],
)

BITMAP_ENTRY = Structure(
    "bitmap directory entry",
    ">",
    [
        Field("bitmap_table_offset", "u64", "where the bitmap table starts"),
        Field("bitmap_table_size", "u32", "its entries"),
        Field(
            "flags",
            "u32",
            "state of the bitmap",
            flags=Flags(
                {
                    0: ("in_use", "it was not saved since it was last changed"),
                    1: ("auto", "it records all writes"),
                    2: ("extra_data_compatible", "it may be used though its extra data is unknown"),
                }
            ),
        ),
        Field("type", "u8", "kind of bitmap", values={1: "dirty tracking"}),
        Field("granularity_bits", "u8", "a bit stands for 1 << granularity_bits bytes"),
        Field("name_size", "u16", "length of the name"),
        Field("extra_data_size", "u32", "bytes of extra data that follow"),
    ],
    doc="Followed by extra data and name, and padding to a multiple of 8.",
)

COMPRESSION_TYPES: Final = {0: "zlib", 1: "zstd"}

DIRTY: Final = 1 << 0
CORRUPT: Final = 1 << 1
DATA_FILE: Final = 1 << 2
COMPRESSION_TYPE: Final = 1 << 3
EXTENDED_L2: Final = 1 << 4

LAZY_REFCOUNTS: Final = 1 << 0

EXTENSION = Structure(
    "header extension",
    ">",
    [
        Field("type", "u32", "what the extension is; 0 ends the list"),
        Field("length", "u32", "bytes of data that follow, padded to a multiple of 8"),
    ],
    doc="Follows the header, any number of times.",
)

EXT_END: Final = 0
EXT_BACKING_FORMAT: Final = 0xE2792ACA
EXT_FEATURE_NAMES: Final = 0x6803F857
EXT_BITMAPS: Final = 0x23852875
EXT_ENCRYPTION: Final = 0x0537BE77
EXT_DATA_FILE: Final = 0x44415441
BITMAP_TABLE_MASK: Final = 0x00FF_FFFF_FFFF_FE00  #: of an entry of a bitmap table: bits 9 to 55
EXT_UNUSED: Final = 0x554E5553  #: unknown to all: an extension that was removed from the middle of the list

#: Size of one entry of the feature name table: type, bit, name.
FEATURE_NAME_SIZE: Final = 48

# Entries of L1 tables, which only `l1_table` reads and makes, and of L2 tables: see `l2_entry`.
COPIED: Final = 1 << 63  #: the reference count of what is pointed to is exactly one
COMPRESSED: Final = 1 << 62  #: L2 only
ZERO: Final = 1  #: L2 only: the cluster reads as zeros
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00  #: bits 9 to 55

#: Entries of the refcount table: bits 9 to 63.
REFBLOCK_MASK: Final = 0xFFFF_FFFF_FFFF_FE00

#: The size of a disk is a multiple of this number of bytes in QEMU. Images with other sizes exist.
SECTOR: Final = 512

# Limits. Those of the format's reference implementation, so that each opens what the other makes.
MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
#: Extended L2 entries need clusters of 16 KiB or more, so that a subcluster is a sector or more.
MIN_EXTENDED_CLUSTER_BITS: Final = 14
MAX_L1_BYTES: Final = 32 << 20
MAX_REFTABLE_BYTES: Final = 8 << 20
MAX_REFCOUNT_ORDER: Final = 6
MAX_SNAPSHOTS: Final = 65536
#: Bytes of extra data of a snapshot. There are 24 today; QEMU refuses more than this.
MAX_SNAPSHOT_EXTRA: Final = 1024
MAX_BACKING_NAME: Final = 1023
MAX_EXTENSIONS: Final = 256
MAX_HOST_OFFSET: Final = 1 << 56
