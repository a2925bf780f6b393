"""`copy --resume-file` and the file that is at its target: held until the copy has its name, and kept what it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main
from lamina.errors import Locked
from lamina.jobs import copy as job

MIB = 1 << 20
COMMAND = ["copy", "--resume-file", "journal", "-R", "1", "source.raw", "target.raw"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("source.raw").write_bytes(os.urandom(4 * MIB))
    return tmp_path


@pytest.fixture
def old(folder: Path) -> bytes:
    """A target that is there."""
    Path("target.raw").write_bytes(b"old" * 1000)
    return b"old" * 1000


@pytest.fixture
def breaks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs a copy that fails half-way."""

    def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(job, "_BETWEEN", 0.0)
            source = {"driver": "faults", "rules": [{"kind": "read", "nth": 5}], "image": {"driver": "file"}}
            opened = lamina.open(source | {"image": {"driver": "file", "filename": "source.raw"}})
            patch.setattr("lamina.cli.copy.Image", lambda node, **_: (node.close(), opened)[1])
            assert main(COMMAND) == 1

    return run


def test_it_waits_for_no_program_that_uses_the_target(
    folder: Path, old: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with lamina.open("target.raw", format="raw", read_only=False):
        assert main(COMMAND) == 1
        assert "close it there first" in capsys.readouterr().err
    with lamina.open("target.raw", format="raw"):
        assert main(COMMAND) == 1
    assert sorted(os.listdir()) == ["source.raw", "target.raw"]
    assert Path("target.raw").read_bytes() == old
    assert main(COMMAND) == 0
    assert Path("target.raw").read_bytes() == Path("source.raw").read_bytes()


def test_the_target_is_held_until_after_the_rename(folder: Path, old: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def look(name: str) -> Any:
        real = getattr(os, name)

        def looking(*args: Any, **how: Any) -> Any:
            if "target.raw" in map(str, args):
                for _ in range(2):
                    descriptor = os.open("target.raw", os.O_RDWR)
                    same = os.path.sameopenfile(descriptor, held)
                    os.close(descriptor)
                    if same:
                        with pytest.raises(Locked):
                            lamina.open("target.raw", format="raw")
                    tried.append(f"{name} {same}")
                    if len(tried) % 2:
                        result = real(*args, **how)
                return result
            return real(*args, **how)

        monkeypatch.setattr(os, name, looking)

    held = os.open("target.raw", os.O_RDONLY)
    try:
        look("replace")
        assert main(COMMAND) == 0
        assert tried == ["replace True", "replace False"]
    finally:
        os.close(held)
    assert Path("target.raw").read_bytes() == Path("source.raw").read_bytes()


def test_what_the_target_was_is_kept(folder: Path, old: bytes, breaks: Any) -> None:
    os.chmod("target.raw", 0o4750)
    if os.geteuid() == 0:
        os.chown("target.raw", 65534, 65534)
        os.chmod("target.raw", 0o4750)
    before = os.stat("target.raw")
    breaks()
    partial = os.stat("target.raw.partial")
    assert partial.st_mode & 0o7777 == 0o750
    assert partial.st_uid == before.st_uid
    assert Path("target.raw").read_bytes() == old
    assert main(COMMAND) == 0
    after = os.stat("target.raw")
    assert (after.st_mode & 0o7777, after.st_uid, after.st_gid) == (0o750, before.st_uid, before.st_gid)
    assert Path("target.raw").read_bytes() == Path("source.raw").read_bytes()
    assert sorted(os.listdir()) == ["source.raw", "target.raw"]


def test_a_target_with_several_names_is_not_cut_off_from_them(
    folder: Path, old: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    os.link("target.raw", "other")
    assert main(COMMAND) == 1
    assert "leave --resume-file out" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["other", "source.raw", "target.raw"]
    assert Path("other").read_bytes() == old


@pytest.mark.parametrize("there", [False, True])
def test_a_target_that_another_program_made_meanwhile_stays(
    folder: Path, breaks: Any, capsys: pytest.CaptureFixture[str], there: bool
) -> None:
    if there:
        Path("target.raw").write_bytes(b"old")
    breaks()
    Path("another").write_bytes(b"another program's")
    os.replace("another", "target.raw")
    assert main(COMMAND) == 1
    assert "target identity" in capsys.readouterr().err
    assert Path("target.raw").read_bytes() == b"another program's"
    assert os.path.exists("target.raw.partial")


def test_a_target_that_appears_at_the_last_moment_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = job.Copy.run

    def late(self: job.Copy) -> job.Copied:
        copied = run(self)
        Path("target.raw").write_bytes(b"another program's")
        return copied

    monkeypatch.setattr(job.Copy, "run", late)
    assert main(COMMAND) == 1
    assert "another program made a file of this name" in capsys.readouterr().err
    assert Path("target.raw").read_bytes() == b"another program's"
    assert Path("target.raw.partial").read_bytes() == Path("source.raw").read_bytes()


def test_a_partial_file_that_is_exchanged_is_not_written(
    folder: Path, breaks: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A link in its place is not followed, neither before it is looked at nor after."""
    breaks()
    Path("precious").write_bytes(b"precious")
    os.rename("target.raw.partial", "aside")
    os.symlink("precious", "target.raw.partial")
    assert main(COMMAND) == 1
    os.unlink("target.raw.partial")
    os.rename("aside", "target.raw.partial")
    monkeypatch.setattr("lamina.jobs.copy_named.open_unsynced", _swapped)
    assert main(COMMAND) == 1
    assert "not the file" in capsys.readouterr().err
    assert Path("precious").read_bytes() == b"precious"


def _swapped(path: str) -> Any:
    from lamina.creation import open_unsynced

    os.rename(path, "aside")
    os.symlink("precious", path)
    return open_unsynced(path)


def test_a_copy_that_has_its_name_already_only_loses_its_journal(
    folder: Path, old: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the rename and the removal of the journal."""
    with monkeypatch.context() as patch:
        patch.setattr("lamina.jobs.copy_journal.Journal.remove", lambda self: None)
        assert main(COMMAND) == 0
    assert json.loads(Path("journal").read_text())["position"] == 4 * MIB
    Path("target.raw").touch()
    assert main(COMMAND) == 0
    assert sorted(os.listdir()) == ["source.raw", "target.raw"]
    assert Path("target.raw").read_bytes() == Path("source.raw").read_bytes()


def test_an_interrupt_is_told_how_to_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lamina.cli.terminal.Meter.report", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        main(COMMAND)
    assert any("the same command resumes at" in note for note in caught.value.__notes__)
    assert sorted(os.listdir()) == ["journal", "source.raw", "target.raw.partial"]
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert main(COMMAND) == 0
    assert Path("target.raw").read_bytes() == Path("source.raw").read_bytes()


def test_a_journal_that_is_a_fifo_is_refused_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("journal")
    assert main(COMMAND) == 1
    assert "no journal" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["journal", "source.raw"]


def test_a_journal_behind_a_link_is_removed_at_the_end(folder: Path) -> None:
    os.symlink("elsewhere", "journal")
    assert main(COMMAND) == 0
    assert sorted(os.listdir()) == ["journal", "source.raw", "target.raw"]
