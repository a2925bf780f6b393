"""No code runs because a folder or an image asks for it: `python -m lamina` in a hostile folder, drivers named in images."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lamina
from lamina import registry
from lamina.errors import OptionError, UnsupportedFeature

from .images import overlay, victim

_MARK = "with open({mark!r}, 'a') as mark: mark.write(__name__)\n"


def offer(folder: Path, mark: Path, name: str = "format.evil") -> None:
    """A package in `folder` that offers a driver; importing it leaves a mark."""
    info = folder / "evilpkg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evilpkg\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lamina.drivers]\n{name} = evilpkg:Evil\n")
    (folder / "evilpkg.py").write_text(_MARK.format(mark=str(mark)) + "class Evil: pass\n")


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        [sys.executable, *args], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    folder = tmp_path / "hostile"
    folder.mkdir()
    return folder


def test_python_m_lamina_imports_nothing_from_the_current_folder(hostile: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    victim(hostile)
    names = "typing numpy isal deflate rich argparse difflib json signal dataclasses zlib"
    for name in names.split():
        (hostile / f"{name}.py").write_text(_MARK.format(mark=str(mark)))
    for words in (["map", "hostile.qcow2"], ["check", "hostile.qcow2"], ["info", "--output=json", "hostile.qcow2"]):
        done = run(hostile, "-m", "lamina", *words)
        assert done.returncode == 0, done.stderr
    assert not mark.exists()


def test_lamina_is_run_from_the_folder_it_lies_in() -> None:
    source = Path(lamina.__file__).parent.parent
    done = run(source, "-m", "lamina", "--version")
    assert done.stdout == f"lamina {lamina.__version__}\n", done.stderr


@pytest.mark.parametrize("way", ["-m", "-c"])
@pytest.mark.parametrize("where", ["backing format", "option"])
def test_drivers_are_not_taken_from_the_current_folder(hostile: Path, tmp_path: Path, way: str, where: str) -> None:
    mark = tmp_path / "mark"
    offer(hostile, mark)
    victim(hostile, "base.qcow2")
    overlay(hostile, "base.qcow2", fmt="evil")
    start = ["-m", "lamina"] if way == "-m" else ["-c", "from lamina.cli.main import run; run()"]
    words = (
        ["map", "-f", "qcow2", "overlay.qcow2"] if where == "backing format" else ["map", "-f", "evil", "base.qcow2"]
    )
    done = run(hostile, *start, *words)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not mark.exists()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_drivers: None) -> Iterator[Path]:
    """A folder where packages are installed; it offers the formats `evil` and `vhdx`."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    offer(folder, tmp_path / "mark", "format.evil")
    yield folder
    sys.modules.pop("evilpkg", None)


@pytest.mark.parametrize("known", [False, True])
def test_an_image_names_built_in_drivers_only(installed: Path, hostile: Path, tmp_path: Path, known: bool) -> None:
    victim(hostile, "base.qcow2")
    top = overlay(hostile, "base.qcow2", fmt="evil")
    if known:
        assert registry.entry("evil").target == "evilpkg:Evil"
    with pytest.raises(OptionError, match="no format with the name"):
        lamina.open(top, format="qcow2")
    assert not (tmp_path / "mark").exists()
    # What the user names is looked for among installed packages, too.
    assert registry.lookup("evil", "format").__name__ == "Evil"


def test_a_known_format_that_a_package_drives_is_not_for_images_to_choose(hostile: Path, own_drivers: None) -> None:
    registry.register("vhdx", "format", "nowhere:Vhdx", "a driver of somebody else")
    top = overlay(hostile, "base", fmt="vhdx")
    (hostile / "base").write_bytes(b"vhdxfile".ljust(4096, b"\0"))
    with pytest.raises(UnsupportedFeature, match="has no driver"):
        lamina.open(top, format="qcow2")
