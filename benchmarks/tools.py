"""The work of qemu-img on whole images, done by both: conversions, comparisons, and changes in place.

`run.py` measures these groups with the others. Two ext4 images are used, with real files: a small one (4 GiB, 600 MB of
files) and a large one (16 GiB, over 4 GB); `measure` has an image of a million extents. The files of changes in place are
copied anew before each run. Targets are new files, and both programs have their default cache mode; one row counts the time
until the target is on the disk.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from .compare import Target, Targets
from .measure import Failed, Task, anything
from .peers import Peer

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

Image = Callable[..., Path]
#: The level at which zlib takes no more room than qemu-img's.
LEVEL = ("--compression-level", "7")
AS_SMALL = "lamina, level 7"
#: A title, targets, tasks.
Work = tuple[str, Targets, Callable[[], list[Task]]]
#: Checks a result: source, made, judge.
Same = Callable[[Path, Path, Peer], Callable[[Path], None]]


class Tools:
    """The works; `image` makes an image in `folder` once (see `run.plan`), `same` makes the check of a conversion."""

    def __init__(
        self, folder: Path, image: Image, lamina: list[str], others: list[Peer], small: bool, same: Same
    ) -> None:
        self.folder, self.image, self.lamina, self.others, self.same = folder, image, lamina, others, same
        self.scale = 16 if small else 1
        self.judge = others[0]

    def ext4(self, which: str) -> Path:
        size, content = (4 * GIB, 600 * 10**6) if which == "small" else (16 * GIB, 4300 * 10**6)
        return self.image(
            f"ext4-{which}.raw", "ext4", "--size", str(size // self.scale), "--content", str(content // self.scale)
        )

    def qcow2(self, which: str, *options: str) -> Path:
        """The same as qcow2, made by the peer."""
        source = self.ext4(which)
        path = source.with_name(source.stem + "".join(options).replace("=", "-") + ".qcow2")
        if not path.exists():
            self.peer("convert", "-f", "raw", "-O", "qcow2", *options, source, path)
        return path

    def peer(self, *words: str | Path) -> None:
        done = subprocess.run([self.judge.qemu_img, *map(str, words)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(done.stderr.strip())

    def tasks(
        self,
        words: Sequence[str],
        check: Callable[[Path], None] = anything,
        *,
        makes: Path | None = None,
        prepare: Sequence[str] = (),
        ours: Sequence[str] = (),
        synced: bool = False,
    ) -> list[Task]:
        """The same words for each program; `ours` are added for Lamina."""
        found: list[Task] = []
        programs = [("lamina", [*self.lamina, words[0], *ours, *words[1:]])]
        programs += [(other.name, [other.qemu_img, *words]) for other in self.others]
        for name, command in programs:
            if synced:
                command = ["sh", "-c", '"$@" && sync', "sh", *command]
            found.append(Task(name, command, check, makes=makes, prepare=prepare))
        return found

    def convert(
        self, source: Path, to: str, *options: str, ours: Sequence[str] = (), synced: bool = False
    ) -> list[Task]:
        made = self.folder / f"made.{to}"
        words = ["convert", "-f", source.suffix[1:], "-O", to, *options, str(source), str(made)]
        return self.tasks(words, self.same(source, made, self.judge), makes=made, ours=ours, synced=synced)

    def chain(self) -> Path:
        """Five overlays, each with 64 MiB of its own, over the small image."""
        below = self.qcow2("small")
        for number in range(5):
            path = below.with_name(f"overlay-{self.scale}-{number}.qcow2")
            if not path.exists():
                self.peer("create", "-q", "-f", "qcow2", "-b", below.name, "-F", "qcow2", path)
                self.scatter(path, 64 * MIB, number)
            below = path
        return below

    def scatter(self, path: Path, amount: int, seed: int) -> None:
        """Write `amount` bytes in pieces of 256 KiB at random offsets."""
        dice, piece = random.Random(seed), 256 << 10
        places = dice.sample(range(4 * GIB // self.scale // piece), amount // self.scale // piece)
        commands = "".join(f"write -q -P {dice.randrange(1, 255)} {at * piece} {piece}\n" for at in places)
        program = self.judge.qemu_img.replace("qemu-img", "qemu-io")
        subprocess.run(
            [program, "-t", "writeback", "-f", "qcow2", str(path)], input=commands, text=True, check=True, stdout=-3
        )

    def commit(self) -> list[Task]:
        base, top = self.qcow2("small"), self.folder / "commit-top.qcow2"
        if not top.exists():
            self.peer("create", "-q", "-f", "qcow2", "-b", "commit-base.work", "-F", "qcow2", "-u", top, self.size())
            self.peer("rebase", "-u", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
            self.scatter(top, 512 * MIB, 11)
            self.peer("rebase", "-u", "-f", "qcow2", "-b", "commit-base.work", "-F", "qcow2", top)
        work, below = self.folder / "commit-top.work", self.folder / "commit-base.work"
        prepare = ["sh", "-c", f"cp {base} {below} && cp {top} {work}"]
        return self.tasks(["commit", "-q", "-f", "qcow2", str(work)], prepare=prepare)

    def rebase(self) -> list[Task]:
        old, new, top = self.qcow2("small"), self.folder / "rebase-new.qcow2", self.folder / "rebase-top.qcow2"
        if not top.exists():
            self.peer("convert", "-f", "qcow2", "-O", "qcow2", old, new)
            self.scatter(new, 128 * MIB, 12)
            self.peer("create", "-q", "-f", "qcow2", "-b", old.name, "-F", "qcow2", top)
            self.scatter(top, 128 * MIB, 13)
        work = self.folder / "rebase-top.work"
        words = ["rebase", "-q", "-f", "qcow2", "-b", new.name, "-F", "qcow2", str(work)]
        return self.tasks(words, self.same_disk(top, work), prepare=["cp", str(top), str(work)])

    def same_disk(self, first: Path, second: Path) -> Callable[[Path], None]:
        return lambda _: self.peer("compare", "-q", "-f", "qcow2", "-F", "qcow2", first, second)

    def extents(self) -> Path:
        count = (1 << 20) // self.scale
        return self.image("alternating-512.qcow2", "alternating", "--count", str(count), "--sharing", "512")

    def size(self) -> str:
        return str(4 * GIB // self.scale)

    def sparse(self) -> Path:
        """8 TiB, of which the first holds the files of the small image."""
        path = self.folder / f"sparse-{self.scale}.qcow2"
        if not path.exists():
            self.peer("convert", "-f", "raw", "-O", "qcow2", self.ext4("small"), path)
            self.peer("resize", "-q", path, str(8 * TIB // self.scale))
        return path

    def preallocated(self) -> Path:
        path = self.folder / f"preallocated-{self.scale}.qcow2"
        if not path.exists():
            size = str(100 * GIB // self.scale)
            self.peer("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, size)
        return path

    def packed(self) -> list[Task]:
        """Compressed with zlib, at the default level and at the one that takes no more room than qemu-img's."""
        first = self.convert(self.ext4("small"), "qcow2", "-c")
        small, *_ = self.convert(self.ext4("small"), "qcow2", "-c", ours=LEVEL)
        return [*first, replace(small, program=AS_SMALL)]

    def works(self) -> Iterator[Work]:
        def within(limit: float | None) -> Targets:
            return {"lamina": [Target("wall", limit)]}

        start = {"lamina": [Target("wall"), Target("more", 0.1)]}  # the interpreter and numpy start
        large, small = partial(self.ext4, "large"), partial(self.ext4, "small")
        yield "tools: raw to qcow2, large", within(1.0), lambda: self.convert(large(), "qcow2")
        yield "tools: qcow2 to raw, large", within(0.9), lambda: self.convert(self.qcow2("large"), "raw")
        yield (
            "tools: raw to qcow2, large, synced",
            within(None),
            lambda: self.convert(large(), "qcow2", synced=True),
        )
        yield "tools: raw to qcow2, small", start, lambda: self.convert(small(), "qcow2")
        yield "tools: qcow2 to raw, small", start, lambda: self.convert(self.qcow2("small"), "raw")
        zlib = {
            "lamina": [Target("wall", 0.2), Target("size", 1.1)],
            AS_SMALL: [Target("wall", 0.6), Target("size", 1.0)],
        }
        yield "tools: packed, zlib", zlib, self.packed
        yield (
            "tools: packed, zstd",
            {"lamina": [Target("wall", 0.5), Target("size")]},
            lambda: self.convert(small(), "qcow2", "-c", "-o", "compression_type=zstd"),
        )
        yield "tools: packed to raw", within(0.6), lambda: self.convert(self.qcow2("small", "-c"), "raw")
        yield "tools: five overlays to one", within(1.0), lambda: self.convert(self.chain(), "qcow2")
        yield (
            "tools: compare, large",
            within(0.7),
            lambda: self.tasks(["compare", "-q", "-f", "raw", "-F", "qcow2", str(large()), str(self.qcow2("large"))]),
        )
        yield (
            "tools: measure",
            within(1.0),
            lambda: self.tasks(["measure", "-f", "qcow2", "-O", "qcow2", str(self.extents())]),
        )
        yield "tools: commit", within(1.0), self.commit
        yield "tools: rebase", within(1.0), self.rebase
        yield "tools: 8 TiB, sparse", within(1.0), lambda: self.convert(self.sparse(), "qcow2")
        yield "tools: 100 GiB, preallocated", within(None), lambda: self.convert(self.preallocated(), "qcow2")
