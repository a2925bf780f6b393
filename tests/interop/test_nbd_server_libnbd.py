"""Our NBD server and libnbd's programs, old and new: nbdinfo, nbdcopy, nbddump, and nbdsh with its manners on and off."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest

from lamina.limits import KIB, MIB
from tests.conftest import NbdTools
from tests.interop.test_nbd_server_peers import DISKS, TRANSPORTS, ServedDisks, pattern, served
from tests.nbd_load import SIZE, Disk

__all__ = ["served"]  # the fixture

CONTEXTS = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0", "lamina:exact"]


def joined(rows: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """(offset, length, value), with neighbours of the same value made one."""
    out: list[tuple[int, int, int]] = []
    for offset, length, value in rows:
        if out and out[-1][2] == value:
            out[-1] = (out[-1][0], out[-1][1] + length, value)
        else:
            out.append((offset, length, value))
    return out


def context_rows(disk: Disk, context: str) -> list[tuple[int, int, int]]:
    """What a client must see of a context, from the image itself."""
    if context == "base:allocation":
        return joined([(offset, length, hole | zero << 1) for offset, length, hole, zero, _ in disk.extents()])
    if context == "qemu:allocation-depth":
        return joined([(offset, length, depth) for offset, length, _, _, depth in disk.extents()])
    if context == "qemu:dirty-bitmap:b0":
        end = len(disk.seen())
        dirty = [(0, 64 * KIB, 0), (64 * KIB, 64 * KIB, 1), (128 * KIB, end - 128 * KIB, 0)]
        return dirty if end > 128 * KIB else [(0, end, 0)]
    rows = [
        (
            row.start,
            row.length,
            (not row.data) | row.zero << 1 | row.present << 2 | row.compressed << 3 | row.depth << 8,
        )
        for row in disk.image.extents()
    ]
    if len(disk.seen()) > len(disk.content):
        rows.append((len(disk.content), len(disk.seen()) - len(disk.content), 3))
    return joined(rows)


# -- nbdinfo


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", DISKS)
def test_nbdinfo_json(
    served: ServedDisks, libnbd: NbdTools, nbd_tools_new: NbdTools, name: str, transport: str
) -> None:
    disk, uri = served.disks[name], served.uri(name, transport)
    told = json.loads(libnbd.run("nbdinfo", "--json", uri).stdout)
    assert (told["protocol"], told["TLS"], told["structured"]) == ("newstyle-fixed", False, True)
    (export,) = told["exports"]
    expected: dict[str, Any] = {
        "export-name": name,
        "description": f"the {name} disk",
        "export-size": len(disk.seen()),
        "contexts": CONTEXTS,
        "is_rotational": False,
        "is_read_only": False,
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": True,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
        "block_size_minimum": 512 if name == "odd" else 1,
        "block_size_preferred": 4096,
        "block_size_maximum": 32 * MIB,
    }
    assert {key: export[key] for key in expected} == expected
    assert libnbd.run("nbdinfo", "--size", uri).stdout == f"{len(disk.seen())}\n"
    text = libnbd.run("nbdinfo", uri).stdout
    manner = "extended" if libnbd is nbd_tools_new else "structured"
    assert f"protocol: newstyle-fixed without TLS, using {manner} packets" in text
    if libnbd is nbd_tools_new:
        assert told["extended"] is True


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", DISKS)
def test_nbdinfo_map(served: ServedDisks, libnbd: NbdTools, name: str, context: str) -> None:
    disk, uri = served.disks[name], served.uri(name)
    rows = json.loads(libnbd.run("nbdinfo", "--json", f"--map={context}", uri).stdout)
    assert joined([(row["offset"], row["length"], row["type"]) for row in rows]) == context_rows(disk, context)
    totals = json.loads(libnbd.run("nbdinfo", "--json", "--totals", f"--map={context}", uri).stdout)
    assert sum(row["size"] for row in totals) == len(disk.seen())
    if context != "lamina:exact":
        assert not [row for row in rows if row["length"] % disk.minimum]


def test_nbdinfo_list(served: ServedDisks, libnbd: NbdTools) -> None:
    for transport in TRANSPORTS:
        told = json.loads(libnbd.run("nbdinfo", "--list", "--json", served.uri("", transport)).stdout)
        listed = [(one["export-name"], one["description"], one["export-size"]) for one in told["exports"]]
        assert listed == [(name, f"the {name} disk", len(disk.seen())) for name, disk in served.disks.items()]


def test_nbdinfo_can_and_is(served: ServedDisks, libnbd: NbdTools, nbd_tools_new: NbdTools) -> None:
    can = ["cache", "connect", "df", "fast-zero", "flush", "fua", "multi-conn", "read", "structured-reply", "trim"]
    can += ["write", "zero"]
    if libnbd is nbd_tools_new:
        can.append("extended-headers")
    uri = served.uri("qcow2")
    for what in can:
        libnbd.run("nbdinfo", "--can", what, uri)
    for what in ("read-only", "rotational", "tls"):
        assert libnbd.run("nbdinfo", "--is", what, uri, check=False).returncode == 2, what


# -- nbdcopy and nbddump


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", DISKS)
def test_nbdcopy_from(served: ServedDisks, libnbd: NbdTools, name: str, transport: str, tmp_path: Path) -> None:
    disk, copy = served.disks[name], tmp_path / "copy"
    done = libnbd.run("nbdcopy", "--connections=4", "--threads=4", served.uri(name, transport), copy)
    assert not done.stderr
    assert copy.read_bytes() == disk.seen()
    if name != "odd":
        assert os.stat(copy).st_blocks * 512 < SIZE // 2, "the holes were filled"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", DISKS)
def test_nbdcopy_to(served: ServedDisks, libnbd: NbdTools, name: str, transport: str, tmp_path: Path) -> None:
    """Holes of the source are zeroes of ours, not bytes; more connections than one where there is work for them."""
    disk, source = served.disks[name], tmp_path / "source"
    content = pattern(SIZE, 2)[: len(disk.seen())]
    if name == "odd":
        content = content[: len(disk.content)].ljust(len(disk.seen()), b"\0")
    source.write_bytes(content)
    os.truncate(source, len(content))
    done = libnbd.run("nbdcopy", "--connections=4", "--threads=4", "--flush", source, served.uri(name, transport))
    assert not done.stderr
    assert disk.now() == content
    stats = served.server.stats()
    assert stats["FLUSH"]
    assert not stats["failed"]
    if name != "odd":
        assert stats["WRITE_ZEROES"]
        assert stats["bytes_written"] < SIZE
        assert stats["connections"] + stats["transmitting"] >= 4


def test_nbdcopy_from_one_export_to_another(served: ServedDisks, libnbd: NbdTools) -> None:
    libnbd.run("nbdcopy", "--connections=4", served.uri("chain"), served.uri("qcow2", "tcp"))
    assert served.disks["qcow2"].now() == served.disks["chain"].content


@pytest.mark.parametrize("name", DISKS)
def test_nbddump(served: ServedDisks, libnbd: NbdTools, name: str) -> None:
    """Its lines, put together again, are the bytes of the disk."""
    disk = served.disks[name]
    told = bytearray()
    previous = b""
    for line in libnbd.run("nbddump", served.uri(name)).stdout.splitlines():
        if line == "*":
            previous = bytes(told[-16:])
            continue
        found = re.match(r"([0-9a-f]+):?((?: +[0-9a-f]{2})*)", line)
        assert found is not None, line
        at, data = int(found[1], 16), bytes.fromhex(found[2].replace(" ", ""))
        while previous and len(told) < at:
            told += previous
        previous = b""
        assert len(told) == at
        told += data
    while previous and len(told) < len(disk.seen()):
        told += previous
    assert bytes(told) == disk.seen()


# -- nbdsh


def nbdsh(tools: NbdTools, uri: str, script: str, *options: str) -> dict[str, Any]:
    """What `script` left in `out`, after it ran in nbdsh connected to `uri`."""
    whole = f"import json\nout = {{}}\n{script}\nprint('OUT' + json.dumps(out))"
    done = tools.run("nbdsh", *options, "-u", uri, "-c", whole)
    found: dict[str, Any] = json.loads(done.stdout.rpartition("OUT")[2])
    return found


def test_nbdsh_reads_and_writes_at_any_offset(served: ServedDisks, nbd_tools: NbdTools) -> None:
    script = """
import nbd
first = h.pread(1001, 333)
h.pwrite(b"unaligned", 12345)
h.pwrite(b"durable", 99, nbd.CMD_FLAG_FUA)
h.zero(777, 64 * 1024 + 1)
h.zero(100, 2 * 1024 * 1024 + 3, nbd.CMD_FLAG_NO_HOLE)
h.trim(1 << 20, 3 << 20)
h.cache(1 << 20, 0)
h.flush()
chunks = []
def chunk(buf, offset, status, err):
    chunks.append((offset, len(buf), status))
whole = h.pread_structured(65536, 0, chunk, nbd.CMD_FLAG_DF)
out = dict(first=first.hex(), chunks=chunks, whole=whole.hex())
"""
    for name in ("raw", "qcow2", "chain"):
        disk = served.disks[name]
        out = nbdsh(nbd_tools, served.uri(name), script)
        content = bytearray(disk.content)
        assert bytes.fromhex(out["first"]) == content[333:1334]
        for offset, data in ((12345, b"unaligned"), (99, b"durable"), (64 * KIB + 1, bytes(777))):
            content[offset : offset + len(data)] = data
        content[2 * MIB + 3 : 2 * MIB + 103] = bytes(100)
        assert bytes.fromhex(out["whole"]) == content[: 64 * KIB]
        assert len(out["chunks"]) == 1
        assert disk.now()[: 3 * MIB] == content[: 3 * MIB]


def test_nbdsh_fast_zero_is_fast_or_refused(served: ServedDisks, nbd_tools: NbdTools) -> None:
    """With FAST_ZERO it is done, or ENOTSUP and nothing was touched."""
    script = """
import nbd, errno
for at, length in ((0, 65536), (5, 100), (3 << 20, 1 << 20)):
    before = h.pread(length, at)
    try:
        h.zero(length, at, nbd.CMD_FLAG_FAST_ZERO)
        out[at] = "zero" if not any(h.pread(length, at)) else "left"
    except nbd.Error as error:
        out[at] = "refused" if error.errnum == errno.ENOTSUP and before == h.pread(length, at) else str(error)
"""
    for name in ("raw", "qcow2", "chain"):
        out = nbdsh(nbd_tools, served.uri(name), script)
        assert set(out.values()) <= {"zero", "refused"}, out
    assert nbdsh(nbd_tools, served.uri("qcow2"), script)["0"] == "zero", "whole clusters of a qcow2 are quickly zeroed"


def test_nbdsh_block_status_of_all_contexts_at_once(served: ServedDisks, nbd_tools: NbdTools) -> None:
    script = """
import nbd
def extent(name, offset, entries, error):
    out.setdefault(name, []).append((offset, entries))
end = h.get_size()
h.block_status(end, 0, extent)
one = {}
def single(name, offset, entries, error):
    one[name] = entries
h.block_status(end, 0, single, nbd.CMD_FLAG_REQ_ONE)
out["one"] = one
"""
    options = [word for name in CONTEXTS for word in ("-c", f"h.add_meta_context({name!r})")]
    for name, disk in served.disks.items():
        # The contexts are asked for before the connection is made, so without -u.
        whole = "\n".join(["import json", "out = {}", f"h.connect_uri({served.uri(name)!r})", script])
        done = nbd_tools.run("nbdsh", *options, "-c", whole, "-c", "print('OUT' + json.dumps(out))")
        out = json.loads(done.stdout.rpartition("OUT")[2])
        one = out.pop("one")
        assert set(out) == set(one) == set(CONTEXTS)
        for context, answers in out.items():
            (answer,) = answers
            rows, at = [], 0
            for length, value in zip(answer[1][::2], answer[1][1::2], strict=True):
                rows.append((at, length, value))
                at += length
            assert rows == context_rows(disk, context)
            assert one[context] == list(rows[0][1:])


def test_nbdsh_without_manners(served: ServedDisks, nbd_tools: NbdTools, caplog: pytest.LogCaptureFixture) -> None:
    """Illegal requests are refused with the error of the specification, and the connection is as good as before."""
    caplog.set_level(logging.INFO, "lamina.nbd")
    script = """
import nbd, errno
h.set_strict_mode(0)
end = h.get_size()
calls = {
    "read past the end": lambda: h.pread(512, end),
    "read over the end": lambda: h.pread(1024, end - 512),
    "read at 2^63": lambda: h.pread(512, (1 << 63) - 512),
    "read too much": lambda: h.pread((32 << 20) + 512, 0),
    "read with a wrong flag": lambda: h.pread(512, 0, nbd.CMD_FLAG_NO_HOLE),
    "write past the end": lambda: h.pwrite(bytes(512), end),
    "write with a wrong flag": lambda: h.pwrite(bytes(512), 0, nbd.CMD_FLAG_DF),
    "zero over the end": lambda: h.zero(1024, end - 512),
    "zero with a wrong flag": lambda: h.zero(512, 0, nbd.CMD_FLAG_REQ_ONE),
    "trim over the end": lambda: h.trim(1024, end - 512),
    "cache over the end": lambda: h.cache(1024, end - 512),
    "status past the end": lambda: h.block_status(512, end, lambda *_: 0),
    "status of nothing": lambda: h.block_status(0, 0, lambda *_: 0),
    "unknown flag": lambda: h.trim(512, 0, 0x8000),
}
for name, call in calls.items():
    try:
        call()
        out[name] = "done"
    except nbd.Error as error:
        out[name] = errno.errorcode.get(error.errnum, str(error))
    assert h.aio_is_ready(), name
    assert len(h.pread(512, 0)) == 512
h.shutdown()
"""
    for name in ("raw", "qcow2", "chain", "odd"):
        out = nbdsh(nbd_tools, served.uri(name), script, "--base-allocation")
        late = {"write past the end", "zero over the end"}
        assert out == {key: "ENOSPC" if key in late else "EINVAL" for key in out}
        assert len(out) == 14
        assert served.disks[name].now() == served.disks[name].seen()
    assert not [record for record in caplog.records if "dropped" in record.getMessage()]


def test_nbdsh_that_promised_alignment_is_held_to_it(served: ServedDisks, nbd_tools: NbdTools) -> None:
    """libnbd asks for the block sizes: after that, what is not aligned to 512 is EINVAL."""
    script = """
import nbd, errno
h.set_strict_mode(0)
for at, length in ((1, 512), (0, 511), (512, 1)):
    for name, call in (("read", lambda: h.pread(length, at)), ("write", lambda: h.pwrite(bytes(length), at))):
        try:
            call()
        except nbd.Error as error:
            out[f"{name} {at} {length}"] = errno.errorcode[error.errnum]
out["data"] = h.pread(1024, 0).hex()
"""
    disk = served.disks["odd"]
    out = nbdsh(nbd_tools, served.uri("odd"), script)
    assert bytes.fromhex(out.pop("data")) == disk.seen()
    assert out == dict.fromkeys(out, "EINVAL")
    assert len(out) == 6


def test_nbdsh_finds_a_read_only_export_closed(tmp_path: Path, nbd_tools: NbdTools) -> None:
    from lamina.nbd import Server
    from tests.nbd_load import disks, exports_of

    script = """
import nbd, errno
h.set_strict_mode(0)
for name, call in (
    ("write", lambda: h.pwrite(bytes(512), 0)), ("zero", lambda: h.zero(512, 0)), ("trim", lambda: h.trim(512, 0))
):
    try:
        call()
        out[name] = "done"
    except nbd.Error as error:
        out[name] = errno.errorcode[error.errnum]
out["flush"] = h.flush() is None
"""
    with disks(tmp_path) as found, Server(exports_of(found, writable=False), unix=str(tmp_path / "s")) as server:
        out = nbdsh(nbd_tools, server.uri, script)
    assert out == {"write": "EPERM", "zero": "EPERM", "trim": "EPERM", "flush": True}
