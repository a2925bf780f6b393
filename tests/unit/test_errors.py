"""Errors that are an OSError, too, behave as one: `errno`, `filename` and `strerror`, also after pickling."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest

import lamina
import lamina.nbd.server
from lamina.errors import Hint, UsageError


def test_an_error_of_the_system_has_the_manners_of_one(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as caught:
        lamina.open(missing, format="raw")
    error = caught.value
    assert isinstance(error, lamina.NotFound)
    assert (error.errno, error.filename) == (errno.ENOENT, str(missing))
    assert error.strerror is not None
    assert "No such file" in error.strerror


def test_a_refusal_has_them_too(tmp_path: Path) -> None:
    lamina.create(tmp_path / "a.qcow2", "qcow2", "1M")
    with (
        lamina.open(tmp_path / "a.qcow2", format="qcow2") as image,
        pytest.raises(PermissionError, match="read-only") as caught,
    ):
        image.write(0, b"x")
    assert (caught.value.errno, caught.value.filename) == (errno.EPERM, str(tmp_path / "a.qcow2"))
    assert caught.value.strerror == "it was opened read-only"


@pytest.mark.parametrize(
    "kind",
    [lamina.BlockIOError, lamina.NotFound, lamina.NotSupported, lamina.ReadOnly, lamina.Locked, lamina.PolicyError],
)
def test_manners_survive_pickling(kind: type[lamina.LaminaError]) -> None:
    hint = Hint("pass x=1", command="add -x")
    error = kind("it broke", path="disk.img", operation="read", offset=5, hint=hint)
    assert isinstance(error, OSError)
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert (each.filename, each.strerror, each.errno) == ("disk.img", "it broke", error.errno)
        assert str(each) == "disk.img: it broke (read, offset 5); pass x=1"
        assert each.command_text() == "disk.img: it broke (read, offset 5); add -x"
    error.path = "other.img"
    assert error.filename == "other.img"


def test_warnings_of_old_names_name_the_line_that_uses_them() -> None:
    for module in (lamina.nbd, lamina.nbd.server):
        with pytest.warns(DeprecationWarning, match="RestrictedExport") as caught:
            assert module.Offer is lamina.nbd.RestrictedExport
        assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="RestrictedExport") as caught:
        from lamina.nbd import Offer  # noqa: F401
    assert caught[0].filename == __file__


def test_other_errors_have_a_file_as_well() -> None:
    error = UsageError("wrong", path="x")
    assert not isinstance(error, OSError)
    assert (error.filename, error.strerror) == ("x", "wrong")
