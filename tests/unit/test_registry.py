"""Drivers by name: the table, lazy loading, drivers that users add, and what is said when there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina import detection, registry
from lamina.errors import OptionError, UnsupportedFeature

pytestmark = pytest.mark.usefixtures("own_drivers")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to import from, as if packages were installed there."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def install(library: Path, package: str, entry_points: str) -> None:
    info = library / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lamina.drivers]\n{entry_points}\n")


def test_the_table() -> None:
    assert registry.names("storage") == ("file", "memory", "null", "nbd")
    assert {"raw", "qcow2"} <= set(registry.names("format"))
    assert "blkdebug" in registry.names("filter")
    assert registry.names() == tuple(name for kind in registry.KINDS for name in registry.names(kind))


def test_the_table_is_well_formed() -> None:
    words = [word for name in registry.names() for word in (name, *registry.entry(name).aliases)]
    assert len(words) == len(set(words))
    for name in registry.names():
        found = registry.entry(name)
        assert found.kind in registry.KINDS
        assert found.summary
        assert found.target.startswith("lamina.")
        assert registry.register(*found) == found, "registering the same again changes nothing"


@pytest.mark.parametrize("name", registry.names())
def test_every_driver_of_the_table_is_there(name: str) -> None:
    driver = registry.lookup(name)
    assert driver.__name__ == registry.entry(name).target.partition(":")[2]


@pytest.mark.parametrize(("alias", "name"), [("null-co", "null"), ("null-aio", "null"), ("host_device", "file")])
def test_aliases(alias: str, name: str) -> None:
    assert registry.entry(alias) is registry.entry(name)
    assert alias not in registry.names()


def test_probed_formats() -> None:
    assert registry.entry("qcow2").probed
    assert not registry.entry("raw").probed
    assert not registry.entry("file").probed


def test_an_import_loads_no_driver() -> None:
    code = (
        "import sys; from lamina import registry; registry.names(); registry.entry('qcow2').summary;"
        "heavy = {'numpy', 'rich', 'asyncio', 'cryptography', 'importlib.metadata', 'difflib'} & set(sys.modules);"
        "drivers = [n for n in sys.modules if n.startswith(('lamina.storage.', 'lamina.formats.', 'lamina.filters.'))];"
        "assert not heavy and not drivers, (heavy, drivers)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


# --- names that mean nothing


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(OptionError, match=r'"qcow3".*did you mean qcow2'):
        registry.lookup("qcow3")
    with pytest.raises(OptionError, match="did you mean null-co"):
        registry.entry("nullco")
    with pytest.raises(OptionError, match=r"known: .*raw") as caught:
        registry.lookup("\x1b[2J" + "z" * 5000)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_suggestions_are_of_the_kind_that_is_needed() -> None:
    with pytest.raises(OptionError) as caught:
        registry.lookup("blkdebugg", "format")
    assert "there is no format" in str(caught.value)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", ["vhdx", "vmdk", "vpc", "vhd", "dmg", "luks"])
def test_known_formats_without_driver(name: str) -> None:
    with pytest.raises(UnsupportedFeature, match="no driver") as caught:
        registry.lookup(name)
    assert detection.canonical(name) in str(caught.value)
    assert "qcow2" in str(caught.value)
    with pytest.raises(OptionError):
        registry.lookup(name, "filter")


def test_the_wrong_kind_is_refused() -> None:
    for name in ("blkdebug", "null-co", "file"):
        with pytest.raises(OptionError, match="a format is needed"):
            registry.lookup(name, "format")
    assert registry.entry("raw", "format").name == "raw"


# --- drivers that users add


def test_register(library: Path) -> None:
    (library / "user_driver.py").write_text("class Slow: pass\n")
    made = registry.register("slow", "filter", "user_driver:Slow", "takes its time", aliases=("snail",))
    assert registry.entry("snail") is made
    assert "slow" in registry.names("filter")
    assert "user_driver" not in sys.modules
    assert registry.lookup("slow", "filter").__name__ == "Slow"
    assert registry.lookup("snail") is registry.lookup("slow")


def test_a_format_that_was_only_known_can_be_added(library: Path) -> None:
    (library / "user_driver.py").write_text("class Vhdx: pass\n")
    registry.register("vhdx", "format", "user_driver:Vhdx", "Hyper-V disks")
    assert registry.lookup("vhdx").__name__ == "Vhdx"
    assert registry.entry("vhdx").probed


@pytest.mark.parametrize("word", ["qcow2", "null-co"])
def test_names_are_not_taken_away(word: str) -> None:
    with pytest.raises(OptionError, match="already"):
        registry.register(word, "format", "x:Y", "")
    with pytest.raises(OptionError, match="already"):
        registry.register("fresh", "format", "x:Y", "", aliases=(word,))
    assert "fresh" not in registry.names()


@pytest.mark.parametrize("target", ["", "x", "x:", ":Y", "x.y", "x:Y:Z", "x-y:Z", "../x:Y", "x:Y.Z", "os;import:Y"])
def test_targets_are_checked(target: str) -> None:
    with pytest.raises(OptionError, match=r"package\.module:Class"):
        registry.register("fresh", "format", target, "")


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a:b", "a/b", "a,b", "a=b", "a\n"])
def test_names_are_checked(name: str) -> None:
    with pytest.raises(OptionError, match="name of a driver"):
        registry.register(name, "format", "x:Y", "")
    with pytest.raises(OptionError, match="name of a driver"):
        registry.register("fresh", "format", "x:Y", "", aliases=(name,))


def test_kinds_are_checked() -> None:
    with pytest.raises(OptionError, match="storage, format, filter"):
        registry.register("fresh", "job", "x:Y", "")  # type: ignore[arg-type]


# --- loading


def test_a_missing_dependency(library: Path) -> None:
    (library / "needy.py").write_text("import no_such_codec.inner\nclass Needy: pass\n")
    registry.register("needy", "format", "needy:Needy", "")
    with pytest.raises(UnsupportedFeature, match="no_such_codec") as caught:
        registry.lookup("needy")
    assert "pip install no_such_codec" in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)


def test_a_missing_dependency_called_otherwise_on_the_index(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (library / "needy.py").write_text("import zlib_ng\nclass Needy: pass\n")
    monkeypatch.setitem(sys.modules, "zlib_ng", None)
    registry.register("needy", "format", "needy:Needy", "")
    with pytest.raises(UnsupportedFeature, match="pip install zlib-ng"):
        registry.lookup("needy")


@pytest.mark.parametrize("target", ["no_such_package.inner:X", "no_such_package:X"])
def test_a_missing_driver(target: str) -> None:
    registry.register("gone", "format", target, "")
    with pytest.raises(UnsupportedFeature, match="not part of this installation"):
        registry.lookup("gone")


def test_a_broken_dependency(library: Path) -> None:
    (library / "broken.py").write_text("from os import no_such_name\n")
    registry.register("broken", "format", "broken:X", "")
    with pytest.raises(UnsupportedFeature, match="no_such_name"):
        registry.lookup("broken")


def test_other_errors_of_a_driver_are_its_own(library: Path) -> None:
    (library / "buggy.py").write_text("1 / 0\n")
    registry.register("buggy", "format", "buggy:X", "")
    with pytest.raises(ZeroDivisionError):
        registry.lookup("buggy")


@pytest.mark.parametrize("body", ["", "X = 3\n", "def X(): pass\n"])
def test_a_target_that_is_no_class(library: Path, body: str) -> None:
    (library / "odd.py").write_text(body)
    registry.register("odd", "format", "odd:X", "")
    with pytest.raises(OptionError, match="not a class"):
        registry.lookup("odd")


# --- installed packages


def test_entry_points(library: Path) -> None:
    (library / "acme.py").write_text("class Tape: pass\n")
    install(library, "acme", "storage.tape = acme:Tape\nfilter.other = acme:Nothing")
    assert "tape" not in registry.names()
    assert registry.entry("tape").kind == "storage"
    assert "acme" not in sys.modules
    assert registry.lookup("tape").__name__ == "Tape"
    assert "tape" in registry.names("storage")
    with pytest.raises(OptionError, match="a format is needed"):
        registry.lookup("other", "format")
    assert "acme" in registry.entry("other").target


def test_entry_points_never_replace_the_table(library: Path) -> None:
    install(library, "acme", "format.qcow2 = acme:Evil")
    assert registry.entry("qcow2").target.startswith("lamina.")


def test_entry_points_may_drive_a_known_format(library: Path) -> None:
    install(library, "acme", "format.vhdx = acme:Vhdx")
    assert registry.entry("vhdx").target == "acme:Vhdx"


def test_two_packages_with_one_name(library: Path) -> None:
    install(library, "acme", "filter.slow = acme:Slow")
    install(library, "other", "filter.slow = other:Slow")
    with pytest.raises(OptionError, match="acme:Slow, other:Slow"):
        registry.lookup("slow")


def test_an_entry_point_that_is_not_well_formed(library: Path) -> None:
    install(library, "acme", "filter.slow = acme")
    with pytest.raises(OptionError, match=r"package\.module:Class"):
        registry.lookup("slow")


def test_packages_are_not_searched_for_names_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(**_: str) -> None:
        raise AssertionError("installed packages were searched")

    monkeypatch.setattr("importlib.metadata.entry_points", forbidden)
    monkeypatch.setattr("importlib.metadata.distributions", forbidden)
    assert registry.entry("null-co").name == "null"


@pytest.mark.parametrize("name", ["iscsi", "http", "replication", "copy-before-write", "vvfat"])
def test_a_driver_that_is_known_and_not_there_says_so(name: str) -> None:
    with pytest.raises(UnsupportedFeature, match="is not supported") as raised:
        registry.lookup(name)
    assert "did you mean" not in str(raised.value)
