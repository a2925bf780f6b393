"""Images with fields at the edges of intervals: each field of each structure in `layout`, in images of all kinds.

Each image is described, read, checked and written in memory. No call raises anything but a `LaminaError`, or takes more than
its time and memory. If the check finds no error in an image, none of this makes one, and no other byte of the disk or of a
snapshot changes. For a sample, QEMU's tools read the same bytes.

The seed is printed; LAMINA_SEED repeats a run. LAMINA_LAYOUT_IMAGES is the number of images, LAMINA_LAYOUT_PEERS of how many
one is given to QEMU.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lamina.crypto import luks1
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.driver import Qcow2
from lamina.layout import Structure
from lamina.limits import MAX_SIZE
from lamina.request import Child
from lamina.testing.model import check_status
from tests import evidence
from tests.conftest import Qemu

from .layout_images import BACKING, Kept, content_of, open_on, originals, storage_of
from .oracle import MAX_MEMORY, MAX_SECONDS, Answer, ask, measure, no_hang, spans

IMAGES = int(os.environ.get("LAMINA_LAYOUT_IMAGES", "3000"))
PEERS_EVERY = int(os.environ.get("LAMINA_LAYOUT_PEERS", "200"))
#: Tracing memory is slow.
TRACED_EVERY = 100
#: Disks up to this length are read whole.
SMALL = 1 << 20
_SPAN = 64 << 10
_WINDOW = 64 << 20
#: Bytes that the file of an image may grow by in the few operations here.
_GROWTH = 24 << 20


class Look(NamedTuple):
    """What the image says of itself. `disk` and `snapshots` are None where something cannot be read, or is too long."""

    info: Answer
    opened: Answer
    size: int = -1
    disk: bytes | None = None
    snapshots: dict[str, bytes | None] | None = None
    cluster_size: int = 1
    backing: str = ""  #: the name of the backing file
    sound: bool = False  #: the check found nothing but leaks
    said: tuple[str, ...] = ()  #: messages of errors


def look(storage: Kept, backing: bool) -> Look:
    """Everything that only reads."""
    info = ask(lambda: Qcow2.inspect(Child(storage, "file"), {}).to_json())
    if info.error is None:
        json.dumps(info.value)
    opened = ask(lambda: open_on(storage, read_only=True, backing=backing))
    if opened.error:
        return Look(info, opened)
    said = []
    with opened.value as image:
        header, size, whole = image.node.header, image.size, []
        cluster, named = header.cluster_size, header.backing_file or ""
        for at, length in spans(image.size, _SPAN if image.size > SMALL else SMALL):
            found = ask(lambda at=at, length=length: image.read(at, length))
            whole.append(found)
            # The last bytes of a disk of many TiB: 64 MiB of it.
            status = ask(lambda at=at, length=length: image.extents(at, length))
            if found.error is None and status.error is None and not header.crypt_method:
                check_status(status.value, at, found.value)
            said += [found.text, status.text]
        ask(lambda: list(image.extents(0, min(_WINDOW, size)).flags))
        report = ask(image.node.check)
        said.append(report.text)
        sound = report.error is None and not (report.value.corruptions or report.value.check_errors)
        listed = ask(image.snapshots)
        bitmaps = ask(lambda: [list(one.dirty(0, size)) for one in image.bitmaps.values()])
        said += [listed.text, bitmaps.text]
        ids = [one.id for one in listed.value or ()][:4]
    disk = whole[0].value if len(whole) == 1 else b"" if not whole else None
    kept = {id: _snapshot(storage, backing, id) for id in ids}
    return Look(info, opened, size, disk, kept, cluster, named, sound, tuple(filter(None, said)))


def _snapshot(storage: Kept, backing: bool, id: str) -> bytes | None:
    opened = ask(lambda: open_on(storage, read_only=True, backing=backing, snapshot=id))
    if opened.error:
        return None
    with opened.value as image:
        if image.size > SMALL:
            ask(lambda: image.read(image.size - 512, 512))
            return None
        found: bytes | None = ask(lambda: image.read(0, image.size)).value
        return found


class Change(NamedTuple):
    """How an image was changed. `disk`: what it reads as now, None if that is not known."""

    opened: Answer
    answers: list[Answer]
    disk: bytes | None


def change(rng: random.Random, storage: Kept, before: Look, backing: bool) -> Change:
    """A small write and a flush; sometimes more."""
    opened = ask(lambda: open_on(storage, read_only=False, backing=backing))
    if opened.error:
        return Change(opened, [], None)
    disk = None if before.disk is None else bytearray(before.disk)
    image, answers = opened.value, []
    try:
        length = min(rng.choice((1, 300, 512, 5000)), image.size)
        offset = rng.choice((0, rng.randrange(max(min(image.size, SMALL) - length, 0) + 1), image.size - length))
        data = b"\xa5" * length
        answers.append(ask(lambda: image.write(offset, data)))
        if not answers[-1].error:
            found = ask(lambda: image.read(offset, length))
            # Tables that are not sound may map two clusters to one.
            single = offset // before.cluster_size == (offset + length - 1) // before.cluster_size
            assert found.error or found.value == data or not (single or before.sound), "a write reads otherwise"
            if disk is not None:
                disk[offset : offset + length] = data
        else:
            disk = None
        answers.append(ask(image.flush))
        if rng.randrange(3) == 0:
            answers.append(ask(lambda: _more(rng, image)))
            disk = None
    finally:
        answers.append(ask(image.close))
    return Change(opened, answers, None if disk is None else bytes(disk))


def _more(rng: random.Random, image: Any) -> None:
    """Another operation, which changes tables."""
    node, kind = image.node, rng.randrange(9)
    if kind == 0:
        image.create_snapshot("another")
    elif kind == 1 and (found := image.snapshots()):
        (image.apply_snapshot if rng.randrange(2) else image.delete_snapshot)(rng.choice(found).id)
    elif kind == 2:
        node.amend(node.amend_schema.parse({"refcount_bits": rng.choice((1, 2, 8, 16, 64))}))
    elif kind == 3:
        node.repair(rng.choice(("leaks", "all")))
    elif kind == 4 and image.size <= MAX_SIZE - SMALL:
        image.truncate(image.size + rng.choice((512, 64 << 10)))
    elif kind == 5:
        image.truncate(max(image.size - rng.choice((512, 64 << 10)), 512))
    elif kind == 6:
        image.add_bitmap("another", 1 << 16)
    elif kind == 7 and (bitmaps := list(image.bitmaps)):
        name = rng.choice(bitmaps)
        (image.remove_bitmap if rng.randrange(2) else image.clear_bitmap)(name)
    else:
        length = min(image.size, 8192)
        image.discard(0, length)
        image.zero(image.size - length, length, unmap=True)


def examine(rng: random.Random, content: bytes, backing: bool) -> tuple[Look, Change]:
    """Hold all rules over one image."""
    storage = storage_of(content)
    before = look(storage, backing)
    assert storage.size == len(content), "an image that was only read has changed"
    assert content_of(storage) == content, "an image that was only read has changed"
    changed = change(rng, storage, before, backing)
    assert storage.allocated < len(content) + _GROWTH, f"{storage.allocated} bytes after small writes"
    if changed.opened.error:
        return before, changed
    after = look(storage, backing)
    if before.sound and not before.opened.error:
        assert not after.opened.error, f"the image was sound, and does not open after writes: {after.opened.text}"
        assert after.sound or not (found := _findings(storage, backing)), f"sound before writes, not after: {found}"
        if changed.disk is not None and after.disk is not None:
            assert after.disk == changed.disk, "a write has changed other bytes"
        for id, disk in (before.snapshots or {}).items():
            now = (after.snapshots or {}).get(id)
            assert disk is None or now is None or disk == now, f"snapshot {id} has changed"
    return before, changed


def _findings(storage: Kept, backing: bool) -> list[str]:
    """What the check says. A cluster that two entries of the disk mapped, with a count of 2, has a count of 1 once one of
    them is written, and no entry is looked for that then lacks the flag COPIED: it is a hint."""
    with open_on(storage, read_only=True, backing=backing) as image:
        found = [finding.message for finding in image.node.check().findings]
    return [message for message in found if not message.startswith("COPIED is clear in an entry for the guest data")]


# -- QEMU


class Peers:
    """Compares images with what QEMU's tools say of them: where both open one, its size and its bytes.

    Which images are opened, and which tables are read, differs, and is counted (LAMINA_LAYOUT_TELL=1 prints each). QEMU opens
    an image whose refcount table is not inside the file, and reads such an L2 table as zeros. It opens none with bitmaps or
    snapshots that are broken, and reads no flag ZERO in version 2."""

    def __init__(self, folder: Path, peers: list[Qemu]) -> None:
        self.folder, self.peers = folder, peers
        (folder / "base").write_bytes(BACKING)
        self.path, self.raw = folder / "hostile.qcow2", folder / "hostile.raw"
        self.counts: Counter[str] = Counter()

    def compare(self, before: Look, content: bytes, backing: bool, done: list[str]) -> None:
        if before.size > 8 * SMALL:
            return
        self.path.write_bytes(content)
        for peer in self.peers:
            info = peer.img("info", "--output=json", "-f", "qcow2", self.path, check=False)
            if before.opened.error or info.returncode:
                ours, theirs = ("refuses" if failed else "opens" for failed in (before.opened.error, info.returncode))
                self.counts[f"Lamina {ours}, QEMU {theirs}"] += 1
                if ours != theirs and os.environ.get("LAMINA_LAYOUT_TELL"):
                    print("TELL", peer, ours, theirs, done, before.opened.text, "|", info.stderr.strip())
                continue
            told = json.loads(info.stdout)
            size = before.size - before.size % q.SECTOR
            assert told["virtual-size"] == size, f"{peer}: {told['virtual-size']} bytes, and we {size}"
            assert os.fsencode(told.get("backing-filename", "")) == os.fsencode(before.backing), f"{peer}: {told}"
            if before.backing != "base" * backing:
                self.counts["another backing file"] += 1  # than we gave the image
                continue
            read = peer.img("convert", "-q", "-f", "qcow2", "-O", "raw", self.path, self.raw, check=False)
            if before.disk is None or read.returncode:
                ours, theirs = ("no" if failed else "all" for failed in (before.disk is None, read.returncode))
                self.counts[f"Lamina reads {ours} bytes, QEMU {theirs}"] += 1
                if ours != theirs and os.environ.get("LAMINA_LAYOUT_TELL"):
                    print("TELL", peer, "reads", ours, theirs, done, before.said, "|", read.stderr.strip())
                continue
            found = self.raw.read_bytes()
            assert found == before.disk[: len(found)], f"{peer} reads other bytes"
            self.counts["both read the same"] += 1


# -- tests


def test_the_originals_contain_all_structures() -> None:
    """Each integer of each structure of `layout` is a field of some image; and all images are whole."""
    covered = {field.name for one in originals() for field in one.fields}
    names = {
        q.HEADER_V2: "header",
        q.HEADER_V3: "header",
        q.ENCRYPTION_POINTER: "encryption",
        q.SNAPSHOT: "snapshot",
        q.BITMAPS: "bitmaps",
        q.BITMAP_ENTRY: "bitmap",
        q.EXTENSION: "extension",
    }
    for structure in (one for one in vars(q).values() if isinstance(one, Structure)):
        for field in structure.fields:
            assert not field.is_integer or f"{names[structure]}.{field.name}" in covered, (structure, field)
    for one in originals():
        before, changed = examine(random.Random(0), one.content, one.backing)
        assert before.sound
        answers = [before.info, before.opened, changed.opened, *changed.answers]
        assert not [answer for answer in answers if answer.error], one.name
        assert not before.said, one.name


def test_fields_at_the_edges(
    tmp_path: Path,
    seed: int,
    qemu7: Qemu,
    qemu10: Qemu,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(luks1, "MAX_ITERATIONS", 4000)  # 12 million take seconds, as they should
    sources = originals()
    weights = [1 if source.encrypted else 4 for source in sources]  # a passphrase takes 20 ms
    peers = Peers(tmp_path, [qemu7, qemu10])
    counts: Counter[str] = Counter()
    for number in range(IMAGES):
        rng = random.Random(f"{seed}/{number}")
        source = rng.choices(sources, weights)[0]
        content, done = source.changed(rng)
        start, state = time.process_time(), rng.getstate()
        try:
            with no_hang():
                before, changed = examine(rng, content, source.backing)
            seconds = time.process_time() - start
            assert seconds < MAX_SECONDS, f"it took {seconds:.1f} s of processor time"
            if number % TRACED_EVERY == 0:
                rng.setstate(state)
                cost = measure(partial(examine, rng, content, source.backing))
                assert cost.memory < MAX_MEMORY, f"{cost.memory >> 20} MiB"
            if number % PEERS_EVERY == 0 and not source.encrypted:
                peers.compare(before, content, source.backing, done)
        except BaseException as error:
            if keep := os.environ.get("LAMINA_FUZZ_KEEP"):
                (Path(keep) / f"failed-{number}.qcow2").write_bytes(content)
            error.add_note(f"image {number} of LAMINA_SEED={seed}: {source.name} with {'; '.join(done)}")
            raise
        counts["opened"] += not before.opened.error
        counts["read whole"] += before.disk is not None
        counts["sound"] += before.sound
        counts["written"] += not changed.opened.error
    with capsys.disabled():
        print(f"\n{IMAGES} images: {dict(counts)}; {dict(peers.counts)}")
    evidence.count("images with fields at the edges of their ranges", IMAGES)
    evidence.count("of these opened", counts["opened"])
    evidence.count("of these written to", counts["written"])
    assert all(counts[kind] > IMAGES // 20 for kind in ("opened", "read whole", "sound", "written")), counts
