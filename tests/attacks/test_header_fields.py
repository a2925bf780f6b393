"""The header of qcow2: rows 29, 30, 36, 37, 42 of the known attacks, and the limits of its fields.

Each limit is tried at its value (it works, or the file is too small for it), one above, and all ones.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lamina
from lamina import CorruptImage, FormatError, LaminaError, LimitExceeded, OptionError
from lamina.formats.qcow2 import layout as q

from .images import GIB, KIB, MIB, U32, U64, Victim, overlay, victim
from .oracle import ask, inspect, survives


def refused(found: Victim, match: str, kind: type[LaminaError] = FormatError) -> None:
    """`found` is refused by `info` and by open, for reading and for writing, with a message about `match`."""
    path = found.save()
    with pytest.raises(kind, match=match):
        inspect(path)
    for read_only in (True, False):
        with pytest.raises(kind, match=match):
            lamina.open(path, format="qcow2", read_only=read_only)
    survives(path)


def only_read(found: Victim, match: str) -> None:
    """`found` is opened for reading, within the limits of `survives`; opening it for writing is refused, about `match`."""
    path = found.save()
    inspect(path)
    with lamina.open(path, format="qcow2") as image:
        image.read(0, image.size)
    with pytest.raises(CorruptImage, match=match):
        lamina.open(path, format="qcow2", read_only=False)
    survives(path)


@pytest.mark.parametrize("l1_size", [U32, 0x7FFFFFFF, (4 << 20) + 1])
def test_row_29_cve_2014_0143_l1_size_all_ones(tmp_path: Path, l1_size: int) -> None:
    refused(victim(tmp_path).set(l1_size=l1_size), "l1_size", LimitExceeded)


def test_row_29_cve_2014_0143_l1_size_at_the_limit_in_a_small_file(tmp_path: Path) -> None:
    only_read(victim(tmp_path).set(l1_size=4 << 20), "l1_table_offset.*not inside the file")


def test_row_29_cve_2014_0143_l1_size_too_small_for_the_disk(tmp_path: Path) -> None:
    refused(victim(tmp_path).set(l1_size=0), "l1_size is 0, too small", CorruptImage)
    refused(victim(tmp_path).set(size=1 << 50), "l1_size.*too small", CorruptImage)


@pytest.mark.parametrize("value", [U32, 0x7FFFFFFF, 4096 + 8])
def test_row_30_cve_2014_0144_header_length(tmp_path: Path, value: int) -> None:
    refused(victim(tmp_path).set(header_length=value), "header_length", LimitExceeded)


@pytest.mark.parametrize("value", [0, 72, 96, 103])
def test_row_30_cve_2014_0144_header_length_too_short(tmp_path: Path, value: int) -> None:
    refused(victim(tmp_path).set(header_length=value), "header_length")


@pytest.mark.parametrize("value", [104, 105, 107, 111, 113, 160])
def test_row_30_cve_2014_0144_header_length_not_a_multiple_of_8(tmp_path: Path, value: int) -> None:
    """The specification asks for one, and other programs write, and read, any length: extensions begin where it ends."""
    found = victim(tmp_path)
    with lamina.open(found.save(), format="qcow2") as image:
        disk = image.read(0, image.size)
    extensions = bytes(found.bytes[112:256])
    found.set(header_length=value)
    found.bytes[value : value + len(extensions)] = extensions
    found.bytes[104 : min(value, 112)] = bytes(min(value, 112) - 104)
    with lamina.open(found.save(), format="qcow2", read_only=False) as image:
        assert image.read(0, image.size) == disk
        image.write(0, b"written")
    assert lamina.check(found.path, format="qcow2").clean
    survives(found.path)


def test_row_30_cve_2014_0144_header_length_past_the_end_of_the_file(tmp_path: Path) -> None:
    for length in (104, 105, 111):
        refused(victim(tmp_path).truncate(length), "header_length is 112, but the file has", CorruptImage)


@pytest.mark.parametrize("length", [0x7FFFFFFF, U32, 4096, 0x80000000])
@pytest.mark.parametrize(
    "kind", [0x12345678, q.EXT_BACKING_FORMAT, q.EXT_BITMAPS, q.EXT_ENCRYPTION, q.EXT_FEATURE_NAMES]
)
def test_row_30_cve_2014_0144_extension_length(tmp_path: Path, kind: int, length: int) -> None:
    refused(victim(tmp_path).extension(kind, b"", length), f"{kind:#010x}.*exceeds the header", CorruptImage)


@pytest.mark.parametrize("value", [U64, 1 << 63, 1 << 32, 4095, 1, 111])
def test_row_30_cve_2014_0144_backing_file_offset(tmp_path: Path, value: int) -> None:
    found = Victim(overlay(tmp_path, "base.raw"))
    size = 1 << found.header.cluster_bits
    value = size - 1 if value == 4095 else value
    refused(found.set(backing_file_offset=value), "name of the backing file is not inside", CorruptImage)


@pytest.mark.parametrize("value", [U32, 0x7FFFFFFF, 1024])
def test_row_30_cve_2014_0144_backing_file_size(tmp_path: Path, value: int) -> None:
    found = Victim(overlay(tmp_path, "base.raw"))
    refused(found.set(backing_file_size=value), "backing_file_size", LimitExceeded)


@pytest.mark.parametrize("value", [U32, 0x00020001, 2049])
def test_row_30_cve_2014_0144_refcount_table_clusters(tmp_path: Path, value: int) -> None:
    refused(victim(tmp_path).set(refcount_table_clusters=value), "refcount_table_clusters", LimitExceeded)


def test_row_30_cve_2014_0144_refcount_table_clusters_zero(tmp_path: Path) -> None:
    only_read(victim(tmp_path).set(refcount_table_clusters=0), "refcount table of 0 bytes.*not inside the file")


def test_row_30_cve_2014_0144_refcount_table_at_the_limit_in_a_small_file(tmp_path: Path) -> None:
    only_read(victim(tmp_path).set(refcount_table_clusters=2048), "refcount table.*not inside the file")


@pytest.mark.parametrize("field", ["refcount_table_offset", "l1_table_offset"])
@pytest.mark.parametrize(
    "value", [0x1234567890ABCDEF, U64, U64 - 4095, 1 << 63, (1 << 63) - 4096, 1, 0x1001, 0, 1 << 56]
)
def test_row_30_cve_2014_0144_table_offsets(tmp_path: Path, field: str, value: int) -> None:
    if field == "refcount_table_offset" and not value:
        only_read(victim(tmp_path).set(**{field: value}), "refcount table.*not inside the file")
    else:
        refused(victim(tmp_path).set(**{field: value}), field, CorruptImage)


def test_row_30_cve_2014_0144_table_offsets_past_the_end(tmp_path: Path) -> None:
    only_read(victim(tmp_path).set(refcount_table_offset=1 << 40), "refcount table.*not inside the file")
    only_read(victim(tmp_path).set(l1_table_offset=1 << 40), "l1_table_offset")


@pytest.mark.parametrize("value", [U32, 0x7FFFFFFF, 0x10001])
def test_row_30_cve_2014_0144_nb_snapshots(tmp_path: Path, value: int) -> None:
    refused(victim(tmp_path).set(nb_snapshots=value, snapshots_offset=4096), "nb_snapshots", LimitExceeded)


@pytest.mark.parametrize("value", [0x1234567890ABCDEF, U64, 0, 1, 1 << 62])
def test_row_30_cve_2014_0144_snapshots_offset(tmp_path: Path, value: int) -> None:
    refused(victim(tmp_path).set(nb_snapshots=1, snapshots_offset=value), "snapshots_offset", CorruptImage)


def test_row_30_each_field_has_an_error_of_its_own(tmp_path: Path) -> None:
    """A person can tell from the message which field is wrong."""
    messages = set()
    fields = {
        "version": U32,
        "cluster_bits": U32,
        "size": U64,
        "l1_size": U32,
        "l1_table_offset": U64,
        "refcount_table_offset": U64,
        "refcount_table_clusters": U32,
        "nb_snapshots": U32,
        "refcount_order": U32,
        "header_length": U32,
        "backing_file_offset": U64,
        "crypt_method": U32,
        "incompatible_features": U64 & ~(q.COMPRESSION_TYPE),
    }
    for name, value in fields.items():
        path = victim(tmp_path).set(**{name: value}).save()
        answer = ask(lambda path=path: lamina.open(path, format="qcow2"))
        assert answer.error, name
        messages.add(re.sub(r"\d+", "", answer.text))
        survives(path, costs=False)
    assert len(messages) == len(fields)


def test_row_36_cve_2014_0146_late_errors_free_everything(tmp_path: Path) -> None:
    """Each step of opening fails once; what the steps before it opened is closed. The oracle counts descriptors."""
    (tmp_path / "base.raw").write_bytes(bytes(64 * KIB))
    broken = victim(tmp_path, "broken.qcow2").set(l1_table_offset=U64).save()
    cases = [
        victim(tmp_path, "1.qcow2").set(nb_snapshots=1, snapshots_offset=4096),
        victim(tmp_path, "2.qcow2").set(incompatible_features=q.CORRUPT),
        Victim(overlay(tmp_path, broken.name, fmt="qcow2", name="4.qcow2")),
        Victim(overlay(tmp_path, "missing.qcow2", fmt="qcow2", name="5.qcow2")),
        Victim(overlay(tmp_path, "base.raw", fmt="qcow2", name="6.qcow2")),
    ]
    for found in cases:
        for _ in range(20):
            result = survives(found.save(), granted=[broken, tmp_path / "base.raw"], costs=False)
        assert result.errors, found.path


def test_invariant_50_failing_opens_leak_nothing(tmp_path: Path) -> None:
    top = overlay(tmp_path, "missing.raw")
    for _ in range(2000):  # the test fails if descriptors are left open; the process would run out of them as well
        with pytest.raises(LaminaError):
            lamina.open(top, format="qcow2", read_only=False)


@pytest.mark.parametrize(
    "field", ["l1_size", "nb_snapshots", "refcount_table_clusters", "cluster_bits", "refcount_order"]
)
def test_row_37_cve_2014_0147_fields_are_unsigned(tmp_path: Path, field: str) -> None:
    """What would be negative in a signed type is a large number, and above the limit."""
    for value in (0x80000000, 0x80000001, U32):
        refused(victim(tmp_path).set(**{field: value}), field, LimitExceeded)


@pytest.mark.parametrize("value", [1 << 63, U64, (1 << 63) + 512])
def test_row_42_cve_2013_4463_virtual_size_above_the_limit(tmp_path: Path, value: int) -> None:
    refused(victim(tmp_path).set(size=value), "size is", LimitExceeded)


@pytest.mark.parametrize("value", [(1 << 63) - 1, 1 << 62, 1 << 56])
def test_row_42_cve_2013_4463_virtual_size_without_tables_for_it(tmp_path: Path, value: int) -> None:
    refused(victim(tmp_path).set(size=value), "too small for a disk", CorruptImage)


def test_row_42_creating_more_than_the_format_holds(tmp_path: Path) -> None:
    path = tmp_path / "new.img"
    for size, cluster in ((1 << 63, 65536), ((1 << 63) - 1, 2 * MIB), ((32 << 20) * 64 * 512 // 8 + 512, 512)):
        with pytest.raises((LimitExceeded, OptionError)):
            lamina.create(path, "qcow2", size, cluster_size=cluster)
    for size in (1 << 63, U64, -1):
        with pytest.raises(LaminaError):
            lamina.create(path, "raw", size)
    assert list(tmp_path.iterdir()) == []


def test_row_42_creating_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "new.img"
    size = (4 << 20) * 64 * 512  # 4 Mi tables of 64 clusters
    lamina.create(path, "qcow2", size, cluster_size=512)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(size - 3, b"end")
        with pytest.raises(LimitExceeded):
            image.truncate(size + 512)
        assert image.size == size
        assert image.read(size - 3, 3) == b"end"
    assert path.stat().st_size < 40 * MIB


# -- the limits that are left: section 2, qcow2


@pytest.mark.parametrize("bits", [9, 21])
def test_limit_cluster_bits_at(tmp_path: Path, bits: int) -> None:
    found = victim(tmp_path, cluster_size=1 << bits, size=16 << bits)
    assert found.header.cluster_bits == bits
    assert survives(found.path).errors == set()


@pytest.mark.parametrize("bits", [0, 8, 22, 63, 64, U32])
def test_limit_cluster_bits_beyond(tmp_path: Path, bits: int) -> None:
    refused(victim(tmp_path).set(cluster_bits=bits), "cluster_bits")


@pytest.mark.parametrize("size", [256, 4 * MIB, 1000])
def test_limit_cluster_size_of_new_images(tmp_path: Path, size: int) -> None:
    with pytest.raises(OptionError, match="cluster_size"):
        lamina.create(tmp_path / "new.qcow2", "qcow2", MIB, cluster_size=size)


@pytest.mark.parametrize("order", range(7))
def test_limit_refcount_order_at(tmp_path: Path, order: int) -> None:
    assert survives(victim(tmp_path, refcount_bits=1 << order).path).errors == set()


@pytest.mark.parametrize("order", [7, 8, 64, U32])
def test_limit_refcount_order_beyond(tmp_path: Path, order: int) -> None:
    refused(victim(tmp_path).set(refcount_order=order), "refcount_order", LimitExceeded)


@pytest.mark.parametrize("version", [0, 1, 4, U32])
def test_limit_version(tmp_path: Path, version: int) -> None:
    refused(victim(tmp_path).set(version=version), f"version {version}")


def test_limit_backing_name_at(tmp_path: Path) -> None:
    """1023 bytes work: four directories, and a file."""
    folder = "/".join(["d" * 250] * 4)
    name = folder + "/" + "f" * (1023 - len(folder) - 1)
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / name).write_bytes(b"\x44" * 512)
    top = overlay(tmp_path, name)
    assert Victim(top).header.backing_file_size == 1023
    with lamina.open(top, format="qcow2") as image:
        assert image.read(0, 512) == b"\x44" * 512
    with pytest.raises(LimitExceeded):
        overlay(tmp_path, name + "x")


def test_limit_backing_name_inside_cluster_0(tmp_path: Path) -> None:
    with pytest.raises(LimitExceeded, match="a cluster has 512"):
        lamina.create(
            tmp_path / "top", "qcow2", MIB, cluster_size=512, backing_file="n" * 400, backing_fmt="raw",
            backing_unchecked=True,
        )  # fmt: skip


@pytest.mark.parametrize(("count", "works"), [(256, True), (257, False)])
def test_limit_extensions(tmp_path: Path, count: int, works: bool) -> None:
    found = victim(tmp_path, cluster_size=64 * KIB)
    for number in range(count):
        found.extension(0x1000 + number, b"")
    if works:
        assert survives(found.save()).errors == set()
    else:
        refused(found, "header extensions", LimitExceeded)


def test_limit_snapshots_at(tmp_path: Path) -> None:
    """65,536 entries of 40 bytes: info still answers, and the file must hold them."""
    found = victim(tmp_path).set(nb_snapshots=65536, snapshots_offset=64 * KIB)
    refused(found, "snapshots_offset.*not inside the file", CorruptImage)
    found.put(64 * KIB + 65536 * 40 - 8, 0)
    assert len(inspect(found.save())["snapshots"]) == 65536
    with lamina.open(found.path, format="qcow2") as image:
        image.read(0, image.size)
    survives(found.path)


def test_limit_chain_depth_is_the_default_of_the_library() -> None:
    assert lamina.Budget().chain_depth == 64


def test_limit_disk_that_ends_where_its_tables_end(tmp_path: Path) -> None:
    """The largest disk for the L1 table that there is, and one byte more."""
    found = victim(tmp_path, cluster_size=512, size=64 * KIB)
    entries = found.header.l1_size
    assert survives(found.set(size=entries * 64 * 512).save()).errors == set()
    refused(found.set(size=entries * 64 * 512 + 1), "too small for a disk", CorruptImage)
    assert 64 * 512 * (32 * MIB // 8) == 128 * GIB
