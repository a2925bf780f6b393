"""An interrupt at any opcode of the gate, of a request at the root edge, of an edit or of a close: nobody waits for ever.

`sys.settrace` sees each opcode before it runs, and raises KeyboardInterrupt at the first, the second, ... of those that the
modules `lamina.gate`, `root` and `edit` (or `image`) run for one operation, until the operation comes to its end. That is
more than a signal can do, which is seen at calls and jumps alone.

`LAMINA_CLOSE_INTERRUPTS=1` interrupts a close at each call in all of Lamina, not at each 29th (a few minutes).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

import lamina
from lamina import edit as edit_module
from lamina import gate as gate_module
from lamina import image as image_module
from lamina import root as root_module
from lamina.storage import aligned
from lamina.testing.interrupts import in_another_thread, interrupted_at_call, interrupted_at_opcode

SIZE = 256 * 1024
PATIENCE = 20.0
#: Of the calls of a whole close, each so many-th is interrupted.
STEP = int(os.environ.get("LAMINA_CLOSE_INTERRUPTS", "29"))
GATE = {edit_module.__file__, gate_module.__file__, root_module.__file__}
FILES = {*GATE, image_module.__file__}


def in_files(files: set[str | None]) -> Callable[[CodeType], bool]:
    return lambda code: code.co_filename in files


def edit(image: lamina.Image) -> None:
    with image.edit() as editing:
        node = editing.insert("blkdebug", {"align": 512})
        editing.remove(node)


def take_out(image: lamina.Image) -> None:
    """Filters that an interrupted edit left there."""
    with image.edit() as editing:
        while editing.root.node.driver == "blkdebug":
            editing.remove(editing.root.node)


def empty_edit(image: lamina.Image) -> None:
    with image.edit():
        pass


OPERATIONS: dict[str, Callable[[lamina.Image], object]] = {
    "read": lambda image: image.read(10, 100),
    "read_into": lambda image: image.read_into(10, bytearray(100)),
    "write": lambda image: image.write(SIZE // 2, b"later"),
    "zero": lambda image: image.zero(SIZE // 2, 4096),
    "discard": lambda image: image.discard(SIZE // 2, 4096),
    "flush": lambda image: image.flush(),
    "truncate": lambda image: image.truncate(SIZE),
    "extents": lambda image: image.extents(),
    "reads_zero": lambda image: image.root.reads_zero(0, 100),
    "edit": edit,
    "empty edit": empty_edit,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_gate_stays_shut_and_nobody_inside(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, cluster_size=4096)
    operation = OPERATIONS[name]
    image = lamina.open(path, format="qcow2", read_only=False)
    try:
        image.write(0, b"first")
        number = 0
        done = False
        while not done:
            number += 1
            assert number < 5000
            with interrupted_at_opcode(number, in_files(GATE)) as seen:
                try:
                    operation(image)
                    done = True
                except KeyboardInterrupt:
                    pass
            assert not image.root.gate.inside
            in_another_thread(lambda: take_out(image))
            assert image.read(0, 5) == b"first"
        assert seen[0] < number
        assert number > 20
        in_another_thread(lambda: edit(image))
    finally:
        in_another_thread(image.close)
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 5) == b"first"
        assert image.node.check().clean  # type: ignore[attr-defined]


def test_a_graph_does_not_look_at_other_graphs(tmp_path: Path) -> None:
    """An edit takes the same steps however many images the program has open."""
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE)
    steps = []
    for others in (1, 50):
        with ExitStack() as stack:
            image, *_ = [stack.enter_context(lamina.open(path, format="qcow2")) for _ in range(1 + others)]
            with interrupted_at_opcode(0, in_files(GATE)) as seen:
                edit(image)
                image.share().close()
            steps += seen
    assert steps[0] == steps[1]


def test_requests_that_waited_for_an_interrupted_edit_go_on(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, cluster_size=4096)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        stop = threading.Event()
        thread = threading.Thread(target=lambda: [image.write(0, b"x") for _ in iter(stop.is_set, True)])
        thread.start()
        try:
            for number in range(1, 2000):
                with (
                    interrupted_at_opcode(number, in_files(GATE)) as seen,
                    suppress(KeyboardInterrupt),
                ):
                    empty_edit(image)
                if seen[0] < number:
                    break
        finally:
            stop.set()
            thread.join(PATIENCE)
        assert not thread.is_alive()


def test_no_buffer_of_direct_io_stays_taken() -> None:
    pool = aligned.Pool(2)
    number, done = 0, False
    while not done:
        number += 1
        with interrupted_at_opcode(number, in_files({aligned.__file__})) as seen, suppress(KeyboardInterrupt):
            with pool.buffer() as buffer:
                buffer[:4] = b"data"
            done = True

        def take_both() -> None:
            with pool.buffer(), pool.buffer():
                pass

        in_another_thread(take_both)
    assert seen[0] < number
    assert number > 20
    assert len(pool._free) <= 2


def graph(folder: Path, kind: str) -> dict[str, Any]:
    """A graph over folder/disk.qcow2 that holds something back when it is closed."""
    spec: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(folder / "disk.qcow2")}}
    if kind == "filters":
        spec["file"] = {"driver": "preallocate", "prealloc-size": 65536, "prealloc-align": 65536, "image": spec["file"]}
        log = {"driver": "file", "filename": str(folder / "writes")}
        # No report, no log: an interrupt while such a file is opened or closed may leave its descriptor open.
        for driver, options in (("logwrites", {"log": log}), ("stats", {})):
            spec = {"driver": driver, "image": spec, **options}
    return {"driver": "cache", "image": spec}


@pytest.mark.parametrize("within", ["the gate", "all of Lamina", "filters"])
def test_a_close_that_was_interrupted_is_called_again(tmp_path: Path, within: str) -> None:
    path, base = tmp_path / "disk.qcow2", tmp_path / "base.raw"
    base.write_bytes(b"b" * SIZE)
    package = Path(lamina.__file__).parent
    # What a format does with its tables is tested elsewhere.
    everywhere = {str(file) for file in package.rglob("*.py") if "qcow2" not in file.parts}
    files: set[str | None] = FILES if within == "the gate" else {*everywhere}
    interrupt = interrupted_at_opcode if within == "the gate" else interrupted_at_call
    lamina.create(path, "qcow2", cluster_size=4096, backing_file=base.name, backing_fmt="raw")
    empty = path.read_bytes()
    number, step, interrupted = 1, min(STEP, 5) if within == "the gate" else STEP, True
    while interrupted:
        path.write_bytes(empty)
        (tmp_path / "writes").write_bytes(b"")
        image = lamina.open(graph(tmp_path, within), read_only=False)
        image.write(100, b"written")
        with interrupt(number, in_files(files)):
            try:
                image.close()
                interrupted = False
            except KeyboardInterrupt:
                pass
        in_another_thread(image.close)
        with pytest.raises(lamina.Closed):
            image.read(0, 1)
        with lamina.open(path, format="qcow2", read_only=False) as again:  # the lock was given back
            assert again.read(99, 9) == b"bwrittenb", f"interrupt {number}"
            assert again.node.check().corruptions == 0  # type: ignore[attr-defined]
        number += step
    assert number > 50
