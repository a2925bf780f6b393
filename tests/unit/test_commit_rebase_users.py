"""commit and rebase beside other users of the graph and other programs, and what they refuse."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import lamina
from lamina.creation import create
from lamina.errors import (
    BlockIOError,
    Cancelled,
    LaminaError,
    LimitExceeded,
    Locked,
    OptionError,
    PolicyError,
    ReadOnly,
)
from lamina.jobs.commit import commit
from lamina.jobs.progress import Monitor
from lamina.jobs.rebase import rebase

from .test_commit_rebase import content, require_clean

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    create(tmp_path / "base", "qcow2", MIB)
    create(tmp_path / "mid", "qcow2", backing_file="base", backing_fmt="qcow2")
    create(tmp_path / "top", "qcow2", backing_file="mid", backing_fmt="qcow2")
    create(tmp_path / "new", "raw", MIB)
    for number, name in enumerate(("base", "mid", "top"), 1):
        with lamina.open(tmp_path / name, format="qcow2", read_only=False) as image:
            image.write(number * 64 * KIB, bytes([number]) * 100 * KIB)
    return tmp_path


def test_no_other_user_writes_meanwhile(chain: Path) -> None:
    with lamina.open(chain / "top", format="qcow2", read_only=False) as image:
        seen: list[type[BaseException] | None] = []

        def report(done: int, total: int) -> None:
            try:
                image.write(0, b"x")
            except LaminaError as error:
                seen.append(type(error))
            else:
                seen.append(None)

        commit(image, monitor=Monitor(report))
        rebase(image, "new", "raw", monitor=Monitor(report))
        assert set(seen) == {ReadOnly}
        image.write(0, b"x")  # again its user's
        with image.share() as other:
            for job in (lambda: commit(image), lambda: rebase(image, None)):
                with pytest.raises(OptionError, match="writes to this graph"):
                    job()
            assert not other.read_only
            other.write(0, b"y")
            image.write(1, b"z")


def test_a_layer_with_another_user_is_not_written(chain: Path) -> None:
    before = content((chain / "base", "qcow2"))
    with lamina.open(chain / "top", format="qcow2", read_only=False) as image:
        mid = image.node.children["backing"].node
        with image.share(mid), pytest.raises(OptionError, match="another user"):
            commit(image, chain / "base")
        with image.share(mid.children["backing"].node), pytest.raises(OptionError, match="another user"):
            commit(image, chain / "base")
        commit(image, chain / "base")
    assert content((chain / "base", "qcow2")) != before


def test_a_base_that_another_program_uses_is_locked(chain: Path) -> None:
    before = content((chain / "mid", "qcow2")), content((chain / "top", "qcow2"))
    with (
        lamina.open(chain / "mid", format="qcow2"),
        lamina.open(chain / "top", format="qcow2", read_only=False) as image,
        pytest.raises(Locked),
    ):
        commit(image)
    assert before == (content((chain / "mid", "qcow2")), content((chain / "top", "qcow2")))


def test_the_base_is_read_only_again_afterwards(chain: Path) -> None:
    with lamina.open(chain / "top", format="qcow2", read_only=False) as image:
        mid = image.node.children["backing"].node
        commit(image)
        assert mid.read_only
        with lamina.open(chain / "mid", format="qcow2"):  # nobody holds the lock of a writer
            pass
        with pytest.raises(ReadOnly), image.share(mid) as layer:
            layer.write(0, b"x")


def test_a_cancelled_job_leaves_an_image_that_reads_the_same(chain: Path) -> None:
    expected = content((chain / "top", "qcow2"))
    with lamina.open(chain / "top", format="qcow2", read_only=False) as image:
        for job in commit, lambda image, monitor: rebase(image, "new", "raw", monitor=monitor):
            monitor = Monitor()
            monitor.cancel()
            with pytest.raises(Cancelled):
                job(image, monitor=monitor)  # type: ignore[operator]
            assert image.read(0, image.size) == expected
            image.write(0, b"")
    for name in "base", "mid", "top":
        require_clean((chain / name, "qcow2"))
    assert content((chain / "top", "qcow2")) == expected


def test_other_threads_read_meanwhile(chain: Path) -> None:
    expected = content((chain / "top", "qcow2"))
    with lamina.open(chain / "top", format="qcow2", read_only=False) as image:
        stop, wrong = threading.Event(), []

        def read() -> None:
            while not stop.is_set():
                if image.read(0, image.size) != expected:
                    wrong.append(True)

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        commit(image)
        rebase(image, "base", "qcow2")
        rebase(image, "new", "raw")
        rebase(image, None)
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong


# -- what is refused


def test_what_has_no_backing_file_is_not_committed(tmp_path: Path) -> None:
    create(tmp_path / "disk", "qcow2", MIB)
    with lamina.open(tmp_path / "disk", format="qcow2", read_only=False) as image:
        with pytest.raises(OptionError, match="no backing file"):
            commit(image)
        with pytest.raises(OptionError, match="not given"):
            rebase(image, "base")
    create(tmp_path / "raw", "raw", MIB)
    with (
        lamina.open(tmp_path / "raw", format="raw", read_only=False) as image,
        pytest.raises(OptionError, match="another backing file"),
    ):
        rebase(image, None)


def test_commit_names_a_base_of_the_chain(chain: Path) -> None:
    with lamina.open(chain / "top", format="qcow2", read_only=False) as image:
        with pytest.raises(OptionError, match="not a backing file"):
            commit(image, chain / "new")
        with pytest.raises(OptionError, match="first backing file"):
            commit(image, "base", empty=True)
    with lamina.open(chain / "top", format="qcow2") as image:
        with pytest.raises(ReadOnly):
            commit(image)
        commit(image, "base")


def test_an_image_is_not_its_own_backing_file(chain: Path) -> None:
    create(chain / "above", "qcow2", backing_file="top", backing_fmt="qcow2")
    before = (chain / "top").read_bytes()
    with lamina.open(chain / "top", format="qcow2", read_only=False) as image:
        for name, format in ("top", "raw"), ("above", "qcow2"):
            with pytest.raises((OptionError, Locked)):
                rebase(image, name, format)
    assert (chain / "top").read_bytes() == before


def test_snapshots_keep_their_content(chain: Path) -> None:
    """They show the backing file where they have no clusters."""
    with lamina.open(chain / "top", format="qcow2", read_only=False) as image:
        image.create_snapshot("before")
        for job in (lambda: commit(image), lambda: rebase(image, "new", "raw"), lambda: rebase(image, None)):
            with pytest.raises(OptionError, match="internal snapshots"):
                job()
        image.delete_snapshot("1")
        commit(image)


def test_commit_needs_the_reference_and_no_more(chain: Path) -> None:
    with pytest.raises(PolicyError):
        lamina.open(chain / "top", format="qcow2", references=lamina.Policy.none())
    with lamina.open(chain / "top", format="qcow2", read_only=False) as image:  # the default grants reading
        with pytest.raises(PolicyError):
            image.node.children["backing"].reopen(False)
        commit(image)


def test_errors_of_the_base_reach_the_caller_and_keep_the_overlay(chain: Path) -> None:
    expected = content((chain / "top", "qcow2"))
    rules = [{"event": "pwritev", "errno": 28, "once": True}]
    base = {
        "driver": "qcow2",
        "file": {
            "driver": "blkdebug",
            "inject-error": rules,
            "image": {"driver": "file", "filename": str(chain / "mid")},
        },
    }
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(chain / "top")}, "backing": base}
    with lamina.open(spec, read_only=False) as image:
        with pytest.raises(BlockIOError):
            commit(image)
        assert image.read(0, image.size) == expected
        commit(image)
        assert image.read(0, image.size) == expected
    assert content((chain / "mid", "qcow2")) == expected


def test_a_name_without_room_in_the_header_is_refused_before_the_copying(tmp_path: Path) -> None:
    """With clusters of 512 bytes, the header has one sector for everything."""
    name = "n" * 250
    create(tmp_path / "base", "qcow2", MIB)
    create(tmp_path / name, "raw", MIB)
    create(tmp_path / "top", "qcow2", cluster_size=512, backing_file="base", backing_fmt="qcow2")
    (tmp_path / name).write_bytes(bytes([7]) * MIB)  # all of it differs
    opened = lamina.open(tmp_path / "top", format="qcow2", read_only=False)
    with opened as image, pytest.raises(LimitExceeded, match="does not fit"):
        rebase(image, "./" * 80 + name, "raw", monitor=Monitor(lambda done, total: pytest.fail("it copies")))
    assert lamina.check(tmp_path / "top", format="qcow2").clean
