"""KeyboardInterrupt at every function entry and C return of the public functions, of `as_file`, fsspec, `view` and `map`.

Afterwards, while the exception and the frames of its traceback are still there, so that no finalizer can have helped:
everything is closed, no thread is left, no half file and no temporary file lies about, and the images can be opened for
writing. With `LAMINA_INTERRUPTS=all` (`make soak`) every point is tried, else a share that the seed of the run draws.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.testing.interrupts import Interrupt, interrupts
from tests import evidence

from ..conftest import in_ci
from .remains import Remains, require_free

KIB = 1 << 10
ALL = os.environ.get("LAMINA_INTERRUPTS") == "all"
#: About so many points of each case are tried in one run of the test.
POINTS = 120
TARGETS = ("out", "page.html")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.raw").write_bytes(b"a" * 300 * KIB + bytes(400 * KIB) + b"b" * 100 * KIB)
    lamina.convert(tmp_path / "a.raw", tmp_path / "a.qcow2", "qcow2", format="raw")
    lamina.create(tmp_path / "over.qcow2", "qcow2", backing_file="a.qcow2", backing_fmt="qcow2")
    return tmp_path


# What is interrupted. Each gets the folder of the images, and leaves it as it was.


def as_file(folder: Path) -> None:
    image = lamina.open(folder / "a.qcow2", format="qcow2", read_only=False)
    try:
        with image.as_file() as file:
            file.read(10)
            file.seek(5)
            file.write(b"aaaa")
            file.seek(0, os.SEEK_HOLE)
            # Not through io.BufferedReader, whose constructor swallows what `tell` raises.
            shutil.copyfileobj(file, io.BytesIO(), 64 * KIB)
    finally:
        try:
            image.close()
        finally:
            image.close()


def fsspec_file(folder: Path) -> None:
    import fsspec

    with fsspec.open(f"lamina://{folder}/a.qcow2?format=qcow2", "rb") as file:
        file.read(100)
        file.seek(1000)
        file.read(10)
    with pytest.raises(lamina.ReadOnly):
        fsspec.open(f"lamina://{folder}/a.qcow2?format=qcow2", "wb").open()


def file_system() -> Any:
    from lamina.fsspec import ImageFileSystem

    return ImageFileSystem(format="qcow2")


def fsspec_walk(folder: Path) -> None:
    list(file_system().walk(f"{folder}/a.qcow2"))
    file_system().cat_ranges([f"{folder}/a.qcow2"] * 2, [0, 10], [5, 20], on_error="raise")


def fsspec_get(folder: Path) -> None:
    # A copy that is cut off stays, as that of every file system of fsspec.
    file_system().get(f"{folder}/a.qcow2", f"{folder}/out")


def convert(folder: Path) -> None:
    lamina.convert(folder / "a.qcow2", folder / "out", "qcow2", format="qcow2")


def convert_over_a_base(folder: Path) -> None:
    how = {"backing": "a.raw", "backing_format": "raw"}
    lamina.convert(folder / "a.qcow2", folder / "out", "qcow2", format="qcow2", **how)  # type: ignore[arg-type]


def copy(folder: Path) -> None:
    lamina.copy(folder / "a.raw", folder / "out", request_size=64 * KIB)


def compare(folder: Path) -> None:
    lamina.compare(folder / "over.qcow2", folder / "a.raw", first_format="qcow2", second_format="raw")


def map_(folder: Path) -> None:
    lamina.map(folder / "over.qcow2", format="qcow2")


def measure(folder: Path) -> None:
    lamina.measure(folder / "a.qcow2", "qcow2", format="qcow2")


def diff(folder: Path) -> None:
    list(lamina.diff(folder / "a.raw", folder / "a.qcow2", first_format="raw", second_format="qcow2"))


def detect(folder: Path) -> None:
    lamina.detect(folder / "a.qcow2")


def info(folder: Path) -> None:
    lamina.info(folder / "a.qcow2")


def info_chain(folder: Path) -> None:
    lamina.info_chain(folder / "over.qcow2", references=lamina.Policy.beneath())


def check(folder: Path) -> None:
    lamina.check(folder / "a.qcow2")


def inspect(folder: Path) -> None:
    lamina.inspect(folder / "a.qcow2")


def resize(folder: Path) -> None:
    lamina.resize(folder / "over.qcow2", 800 * KIB, format="qcow2")


def commit(folder: Path) -> None:
    lamina.commit(folder / "over.qcow2", format="qcow2")


def view(folder: Path) -> None:
    lamina.view(folder / "a.qcow2", first_format="qcow2", output=folder / "page.html")


def view_command(folder: Path) -> None:
    from lamina.cli.view import main

    main(["-q", "-o", str(folder / "page.html"), "-f", "qcow2", str(folder / "a.qcow2")])


def map_command(folder: Path) -> None:
    from lamina.cli.map import main

    main(["--plot", "-f", "qcow2", str(folder / "a.qcow2")])


CASES = [
    as_file,
    fsspec_file,
    fsspec_walk,
    fsspec_get,
    convert,
    convert_over_a_base,
    copy,
    compare,
    map_,
    measure,
    diff,
    detect,
    info,
    info_chain,
    check,
    inspect,
    resize,
    commit,
    view,
    view_command,
    map_command,
]


def points(work: Callable[[], object], seed: int) -> Iterator[Interrupt]:
    """The interrupts to try: all, or a share that the seed draws."""
    if ALL:
        yield from interrupts()
        return
    whole = Interrupt(1 << 40)
    whole.run(work)
    step = max(((1 << 40) - whole.left) // POINTS, 1)
    yield from interrupts(seed % step, step)


def require_whole(folder: Path, work: Callable[[Path], None]) -> None:
    """A new file that has its name is complete."""
    target = folder / "out"
    if not target.exists() or work is fsspec_get:
        return
    form = "raw" if work is copy else "qcow2"
    found = lamina.compare(target, folder / "a.raw", first_format=form, second_format="raw")
    assert found.identical


@pytest.mark.parametrize("work", CASES, ids=lambda work: work.__name__)
def test_nothing_is_left_after_an_interrupt_anywhere(
    work: Callable[[Path], None], folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch, no_collection: None
) -> None:
    if work.__name__.startswith("fsspec"):
        if not in_ci():
            pytest.importorskip("fsspec")
        import fsspec

        from lamina.fsspec import ImageFileSystem

        fsspec.register_implementation("lamina", ImageFileSystem, clobber=True)
    work(folder)  # imports, caches
    tried = 0
    for target in TARGETS:
        (folder / target).unlink(missing_ok=True)
    remains = Remains(folder, monkeypatch, TARGETS)
    for interrupt in points(lambda: work(folder), seed):
        for target in TARGETS:
            (folder / target).unlink(missing_ok=True)
        try:
            interrupt.run(lambda: work(folder))
        except AttributeError as error:
            assert error.name == "save_nargs"  # argparse in its parse_intermixed_args  # noqa: PT017
            continue
        where = f"{work.__name__}, interrupted at {interrupt.struck}"
        if interrupt.struck is not None and interrupt.struck.endswith("ImageFile.close (call)"):
            # `with` of the caller is over; fsspec closes a file that is deleted, without a warning.
            interrupt.error = None
            remains.await_finalizers(where)
        remains.require_none(where)
        require_free(folder / "a.raw", folder / "a.qcow2")
        require_whole(folder, work)
        if (folder / "page.html").exists():
            assert (folder / "page.html").read_text().rstrip().endswith("</html>"), where
        interrupt.error = None
        tried += 1
    assert tried > 10
    evidence.count("interrupts", tried)


def test_a_with_statement_of_the_caller_leaves_at_worst_an_image_to_its_finalizer(
    folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch, no_collection: None
) -> None:
    """An interrupt at the first step of `__enter__` or `__exit__` is beyond the reach of the image: no block is entered yet,
    or the block is left already. The finalizer closes it then, with a warning. Everywhere else it is closed at once."""

    def work() -> None:
        with lamina.open(folder / "over.qcow2", format="qcow2", read_only=False) as image:
            image.write(0, b"a")

    work()
    remains = Remains(folder, monkeypatch)
    tried = 0
    for interrupt in points(work, seed):
        interrupt.run(work)
        where = f"interrupted at {interrupt.struck}"
        if interrupt.struck is not None and interrupt.struck.endswith(
            ("Image.__enter__ (call)", "Image.__exit__ (call)")
        ):
            interrupt.error = None
            remains.await_finalizers(where)
        else:
            remains.require_none(where)
        require_free(folder / "over.qcow2", folder / "a.qcow2")
        interrupt.error = None
        tried += 1
    assert tried > 10
    evidence.count("interrupts", tried)
