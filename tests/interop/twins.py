"""Twin images: one of ours and one of QEMU's, made alike, changed by the same operations, and held against each other."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lamina

MIB = 1 << 20


@dataclass
class Geometry:
    """What both twins are made with."""

    cluster_size: int
    compat: str
    refcount_bits: int
    size: int
    backing: tuple[str, int, int] | None  # format, size, seed of its content
    extended_l2: bool = False

    @classmethod
    def draw(cls, rng: random.Random) -> Geometry:
        cluster_size = rng.choice([512, 512, 1024, 4096, 4096, 65536, 65536, 2 * MIB])
        compat = rng.choice(["1.1", "1.1", "1.1", "0.10"])
        clusters = rng.choice([1, 3, 17, 64, 65, 200])
        size = min(clusters * cluster_size, 24 * MIB)
        if rng.random() < 0.4:
            size = max(size - 512 * rng.randrange(1, 5), 512)
        backing = None
        if rng.random() < 0.5:
            length = rng.choice([size, size // 2 // 512 * 512, size + 3 * cluster_size, 512])
            backing = (rng.choice(["raw", "qcow2"]), max(length, 512), rng.randrange(1 << 30))
        bits = rng.choice([1, 2, 4, 8, 16, 16, 32, 64]) if compat == "1.1" else 16
        return cls(cluster_size, compat, bits, size, backing)


@dataclass(frozen=True)
class Operation:
    """One request: `name` is write, zero, unmap, discard, flush or reopen."""

    name: str
    offset: int = 0
    length: int = 0
    pattern: int = 0

    def as_qemu_io(self) -> str:
        at = f"{self.offset} {self.length}"
        return {
            "write": f"write -q -P {self.pattern} {at}",
            "zero": f"write -q -z {at}",
            "unmap": f"write -q -z -u {at}",
            "discard": f"discard -q {at}",
            "flush": "flush",
        }[self.name]

    def apply(self, image: lamina.Image) -> None:
        if self.name == "write":
            image.write(self.offset, bytes([self.pattern]) * self.length)
        elif self.name == "discard":
            image.discard(self.offset, self.length)
        elif self.name == "flush":
            image.flush()
        else:
            image.zero(self.offset, self.length, unmap=self.name == "unmap")


def draw_operations(rng: random.Random, geometry: Geometry, count: int) -> list[Operation]:
    operations = []
    unit = geometry.cluster_size
    for _ in range(count):
        name = rng.choices(["write", "zero", "unmap", "discard", "flush", "reopen"], [8, 3, 3, 3, 1, 1])[0]
        step = rng.choice([1, 512, 512, 4096, unit, unit])
        offset = rng.randrange(0, geometry.size) // step * step
        length = rng.choice([rng.randrange(1, 3 * unit), unit, 2 * unit, rng.randrange(1, geometry.size + 1)])
        length = min(-(-length // step) * step, geometry.size - offset, 4 * MIB)
        operations.append(Operation(name, offset, length, rng.randrange(1, 256)))
    return operations


@dataclass
class Twins:
    """Two images of one geometry in `folder`; `log` says what was done, for the report of a failure."""

    qemu: Any
    folder: Path
    geometry: Geometry
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ours, self.theirs = self.folder / "ours.qcow2", self.folder / "theirs.qcow2"
        g = self.geometry
        options: dict[str, Any] = {"cluster_size": g.cluster_size, "compat": g.compat, "refcount_bits": g.refcount_bits}
        options["extended_l2"] = g.extended_l2
        named: list[str] = []
        if g.backing is not None:
            self._make_backing(*g.backing)
            options |= {"backing_file": "base", "backing_fmt": g.backing[0]}
            named = ["-b", "base", "-F", g.backing[0]]
        lamina.create(self.ours, "qcow2", g.size, **options)
        settings = f"cluster_size={g.cluster_size},compat={g.compat},refcount_bits={g.refcount_bits}"
        settings += ",extended_l2=on" if g.extended_l2 else ""
        self.qemu.img("create", "-q", "-f", "qcow2", *named, "-o", settings, self.theirs, str(g.size))

    def _make_backing(self, format: str, size: int, seed: int) -> None:
        rng = random.Random(seed)
        base = self.folder / "base"
        self.qemu.img("create", "-q", "-f", format, base, str(size))
        commands: list[str] = []
        for _ in range(rng.randrange(1, 6)):
            offset = rng.randrange(0, size) // 512 * 512
            length = min(rng.randrange(1, 1 + size // 3 + 512) // 512 * 512 + 512, size - offset)
            commands += ["-c", f"write -q -P {rng.randrange(1, 256)} {offset} {length}"]
        self.qemu.io("-f", format, *commands, base)

    def run(self, operations: list[Operation]) -> None:
        """Apply to both; a `reopen` closes and opens both images."""
        batches: list[list[Operation]] = [[]]
        for operation in operations:
            self.log.append(str(operation))
            if operation.name == "reopen":
                batches.append([])
            elif operation.length or operation.name == "flush":
                batches[-1].append(operation)
        for batch in filter(None, batches):
            with lamina.open(self.ours, format="qcow2", read_only=False) as image:
                for operation in batch:
                    operation.apply(image)
            commands = [part for operation in batch for part in ("-c", operation.as_qemu_io())]
            done = self.qemu.io("-f", "qcow2", *commands, self.theirs)
            assert "failed" not in done.stdout, done.stdout

    def compare(self) -> None:
        """Equal bytes by either reader, both clean by either checker, equal exact maps by either mapper."""
        about = f"{self.geometry}\n" + "\n".join(self.log)
        with lamina.open(self.ours, format="qcow2") as ours, lamina.open(self.theirs, format="qcow2") as theirs:
            same = ours.read(0, ours.size) == theirs.read(0, theirs.size)
            mine, yours = _rows(ours), _rows(theirs)
            assert ours.node.check().clean, f"our check of ours: {ours.node.check().findings}\n{about}"
            assert theirs.node.check().clean, f"our check of theirs: {theirs.node.check().findings}\n{about}"
        assert same, f"the bytes differ\n{about}"
        assert mine == yours, f"our maps of both differ\nours   {mine}\ntheirs {yours}\n{about}"
        status, report = self.qemu.check(self.ours)
        assert (status, report.get("leaks", 0), report.get("corruptions", 0)) == (0, 0, 0), f"{report}\n{about}"
        assert (
            self.qemu.img("compare", "-q", "-f", "qcow2", "-F", "qcow2", self.ours, self.theirs, check=False).returncode
            == 0
        ), about
        rows = self.qemu.map(self.ours, "qcow2")
        with lamina.open(self.ours, format="qcow2") as ours:
            known = ours.extents()
            for row in rows:
                part = known.clip(row["start"], row["start"] + row["length"])
                assert not row["zero"] or part.zero.all(), f"QEMU knows that {row} is zero, and we {part!r}\n{about}"
        their_map_of_ours = joined(rows)
        assert mine == their_map_of_ours, f"maps of ours differ\nours   {mine}\ntheirs {their_map_of_ours}\n{about}"


def _rows(image: lamina.Image) -> list[tuple[Any, ...]]:
    """The exact map, as `joined` tells QEMU's."""
    past = _backing_size(image)
    pieces = [(0, min(past, image.size)), (past, image.size - past)]
    known = [e for start, length in pieces if length > 0 for e in image.extents(start, length)]
    rows = ((e.start, e.length, e.depth, e.present, e.zero and not e.data, e.data) for e in known)
    return _join(
        # Past the end of a shorter backing file both say: zero, stored nowhere. Ours adds that the backing layer decides
        # that (it is what commit and stream need to know); qemu-img map names the overlay, as if nobody did.
        (start, length, 0, False, zero, data)
        if start >= past and (depth, zero, data) == (1, True, False)
        else (start, length, depth, present, zero, data)
        for start, length, depth, present, zero, data in rows
    )


def _backing_size(image: lamina.Image) -> int:
    backing = image.node.children.get("backing")
    return image.size if backing is None else backing.size


def joined(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Rows of qemu-img map. Data that lies in a hole is zero as well, for us always, and for QEMU where the file takes up
    much less space than the image counts: in the terms of the format it is data."""
    return _join(
        (r["start"], r["length"], r["depth"], r["present"], r["zero"] and not r["data"], r["data"]) for r in rows
    )


def _join(rows: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Neighbours that differ only in where they lie are one: layouts need not agree."""
    found: list[tuple[Any, ...]] = []
    for start, length, *rest in rows:
        if found and found[-1][2:] == tuple(rest):
            found[-1] = (found[-1][0], found[-1][1] + length, *rest)
        else:
            found.append((start, length, *rest))
    return found
