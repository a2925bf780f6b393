"""Random operations on a disk over NBD, as fsx does them on a file: each read, and in the end the whole image, is what a
model of the disk says.

Our client uses our server (all three modes of replies, blocks of one byte and of 4 KiB) and both qemu-nbd; both qemu-io
use our server. The disk is a qcow2 image, which is checked in the end. `LAMINA_NBD_OPERATIONS` is the number of
operations of each pair, `LAMINA_SEED` repeats a run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import lamina
from lamina.image import Image
from lamina.limits import KIB, MIB, align_down
from lamina.nbd import Export, Server
from lamina.nbd.client import Client
from lamina.nbd.node import NbdStorage
from lamina.testing.image_checks import check_whole
from tests import evidence
from tests.conftest import Qemu
from tests.nbd_load import nothing_left
from tests.nbd_peers import running

OPERATIONS = int(os.environ.get("LAMINA_NBD_OPERATIONS", "400"))
SIZE = 2 * MIB
SECTOR = 512
#: Operations after which the client leaves and another one comes.
REOPENED_EVERY = 150
#: Commands of one process of qemu-io.
BATCH = 50

KINDS = ["read", "write", "zero", "unmap", "discard", "flush", "extents"]
WEIGHTS = [6, 6, 2, 2, 2, 1, 1]


class Operation(NamedTuple):
    """One operation, on `length` bytes from `offset`; `value` is the byte that a write repeats."""

    kind: str
    offset: int
    length: int
    value: int


def drawn(rng: random.Random, unit: int) -> Operation:
    """Like fsx: anywhere, of any length, in multiples of `unit`; often where the disk ends."""
    length = max(align_down(rng.choice([1, 511, 512, 4096, 5000, 70_000]) + rng.randrange(3000), unit), unit)
    at = SIZE - length if rng.random() < 0.05 else rng.randrange(SIZE - length)
    return Operation(rng.choices(KINDS, WEIGHTS)[0], align_down(at, unit), length, rng.randrange(1, 256))


def drawn_content(rng: random.Random) -> bytearray:
    content = bytearray(SIZE)
    content[: SIZE // 2] = rng.randbytes(SIZE // 2)
    return content


def may_have_discarded(before: bytes, after: bytes) -> bool:
    """Whether each sector reads as before or as zero."""
    pieces = range(0, len(before), SECTOR)
    return all(
        after[at : at + SECTOR] in (before[at : at + SECTOR], bytes(len(before[at : at + SECTOR]))) for at in pieces
    )


def do(image: Image, model: bytearray, one: Operation) -> None:
    """Do it on both, and compare what there is to compare."""
    offset, end = one.offset, one.offset + one.length
    if one.kind == "read":
        same = image.read(offset, one.length) == model[offset:end]  # see `judged`
        assert same, f"{one} reads other bytes"
    elif one.kind == "write":
        data = bytes([one.value, one.value ^ 85]) * (one.length // 2 + 1)
        image.write(offset, data[: one.length])
        model[offset:end] = data[: one.length]
    elif one.kind in ("zero", "unmap"):
        image.zero(offset, one.length, unmap=one.kind == "unmap")
        model[offset:end] = bytes(one.length)
    elif one.kind == "discard":
        image.discard(offset, one.length)
        after = image.read(offset, one.length)
        first = align_down(offset, SECTOR)  # what lies outside of the range in its first sector stays
        before = bytes(model[first:end])
        model[offset:end] = after
        assert may_have_discarded(before, bytes(model[first:end]))
    elif one.kind == "flush":
        image.flush()
    else:
        for extent in image.extents(offset, one.length):
            assert not extent.zero or not any(model[extent.start : extent.start + extent.length])


@contextmanager
def ours(path: Path, socket: Path, unit: int) -> Iterator[None]:
    """Our server, with the image in `path`."""
    options: dict[str, Any] = {"driver": "qcow2", "file": str(path)}
    if unit > 1:
        options = {"driver": "blkdebug", "align": unit, "image": options}
    with (
        nothing_left(),
        lamina.open(options, read_only=False) as image,
        Server([Export(image, "", writable=True)], unix=str(socket)),
    ):
        yield


@contextmanager
def theirs(qemu: Qemu, path: Path, socket: Path) -> Iterator[None]:
    """qemu-nbd of that version."""
    program = Path(qemu.peer.qemu_img).with_name("qemu-nbd")
    words = ["-f", "qcow2", "--discard=unmap", "-t", "-e", "8", "-k", str(socket)]
    with running([str(program), *words, str(path)], socket):
        yield


def created(path: Path, rng: random.Random) -> bytearray:
    """A new image and what is on its disk."""
    lamina.create(path, "qcow2", SIZE, cluster_size=rng.choice([512, 4 * KIB, 64 * KIB]))
    model = drawn_content(rng)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, model[: SIZE // 2])
    return model


def judged(path: Path, model: bytearray, qemu: Qemu) -> None:
    """The image holds what the model says, and both checks find it clean."""
    with lamina.open(path, format="qcow2") as image:
        same = image.read(0, SIZE) == model  # not in the assertion: pytest would write the difference of two disks
        assert same, "the image and the model differ"
        check_whole(image)
    status, said = qemu.check(path)
    assert status in (0, 3), said


SERVERS = ["simple", "structured", "extended", "extended, blocks of 4 KiB", "qemu7", "qemu10"]


@pytest.mark.parametrize("server", SERVERS)
def test_our_client(request: pytest.FixtureRequest, tmp_path: Path, seed: int, qemu7: Qemu, server: str) -> None:
    rng = random.Random(f"{seed}/{server}")
    path, socket = tmp_path / "disk.qcow2", tmp_path / "socket"
    model = created(path, rng)
    unit = 4 * KIB if "4 KiB" in server else 1
    mode = server.partition(",")[0]
    done: list[Operation] = []
    with ExitStack() as stack:
        if server.startswith("qemu"):
            stack.enter_context(theirs(request.getfixturevalue(server), path, socket))
        else:
            stack.enter_context(ours(path, socket, unit))
        while len(done) < OPERATIONS:
            client = Client.connect(
                f"nbd+unix:///?socket={socket}",
                structured=mode != "simple",
                extended=mode not in ("simple", "structured"),
                connections=rng.choice([1, 2]),
            )
            assert mode in (client.mode, "qemu7", "qemu10")
            with Image(NbdStorage(client)) as image:
                assert image.size == SIZE
                for _ in range(min(REOPENED_EVERY, OPERATIONS - len(done))):
                    done.append(drawn(rng, 1))  # the request path fits it to the blocks of the export
                    try:
                        do(image, model, done[-1])
                    except BaseException as error:
                        error.add_note(f"operation {len(done)} of LAMINA_SEED={seed}; the last ones: {done[-8:]}")
                        raise
                assert image.read(0, SIZE) == model
                image.flush()
    judged(path, model, qemu7)
    evidence.count("random operations over NBD", len(done))


def command(model: bytearray, one: Operation) -> str:
    """The command of qemu-io, or "" if there is none: it compares with a pattern, so what is read must be one byte again and
    again. The model is changed as the command changes the disk."""
    offset, end = one.offset, one.offset + one.length
    if one.kind == "read":
        value = model[offset]
        same = offset
        while same < end and model[same] == value:
            same += 1
        return f"read -q -P {value} {offset} {same - offset}"
    if one.kind == "write":
        model[offset:end] = bytes([one.value]) * one.length
        return f"write -q -P {one.value} {offset} {one.length}"
    if one.kind in ("zero", "unmap"):
        model[offset:end] = bytes(one.length)
        return f"write -q -z {'-u ' if one.kind == 'unmap' else ''}{offset} {one.length}"
    return "flush" if one.kind == "flush" else ""


def test_qemu_io(tmp_path: Path, seed: int, qemu: Qemu) -> None:
    rng = random.Random(f"{seed}/{qemu}")
    path, socket = tmp_path / "disk.qcow2", tmp_path / "socket"
    model = created(path, rng)
    done = 0
    with ours(path, socket, 1):
        while done < OPERATIONS:
            commands = [command(model, drawn(rng, 1)) for _ in range(BATCH)]
            commands = [one for one in commands if one]
            said = qemu.io("-f", "raw", f"nbd+unix:///?socket={socket}", input="\n".join([*commands, "quit", ""]))
            print(f"operations {done} to {done + len(commands)}: {commands}")
            assert "failed" not in said.stdout + said.stderr, said.stdout + said.stderr
            done += len(commands)
    judged(path, model, qemu)
    evidence.count("random operations over NBD", done)


def test_a_wrong_byte_is_noticed(tmp_path: Path, seed: int, qemu7: Qemu) -> None:
    """The checker can fail: by a read, in the end, and after a discard."""
    rng = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    model = created(path, rng)
    judged(path, model, qemu7)
    with lamina.open(path, format="qcow2") as image:
        lost = Operation("read", 1000, 4096, 0)
        do(image, model, lost)
        model[1001] ^= 1
        with pytest.raises(AssertionError):
            do(image, model, lost)
    with pytest.raises(AssertionError):
        judged(path, model, qemu7)
    assert may_have_discarded(b"a" * 1024, b"a" * 512 + bytes(512))
    assert not may_have_discarded(b"a" * 1024, b"a" * 500 + bytes(524))
