"""Arguments of public functions that are of a wrong type, or of no use: an error of the library that names the parameter.

Each parameter of each function gets each value of a table. What its annotation does not admit is refused with an OptionError
that is a TypeError as well, and names the parameter; any other value works, or is refused with a LaminaError. A refused call
has written nothing, and has left nothing open.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
import lamina.aio
from lamina.errors import LaminaError, OptionError

KIB = 1 << 10
SIZE = 64 * KIB

#: What each function is called with where nothing else is tried. "{}" is the folder of the test.
CALLS: dict[str, dict[str, Any]] = {
    "bench": {"image": "{}/a.qcow2", "format": "qcow2", "count": 2, "depth": 1},
    "check": {"source": "{}/a.qcow2"},
    "commit": {"image": "{}/top.qcow2", "format": "qcow2"},
    "compact": {"image": "{}/a.qcow2", "format": "qcow2"},
    "compare": {"first": "{}/a.qcow2", "second": "{}/a.raw", "first_format": "qcow2", "second_format": "raw"},
    "connect": {"uri": "nbd+unix:///?socket={}/none"},
    "convert": {"source": "{}/a.raw", "target": "{}/new", "target_format": "qcow2", "format": "raw"},
    "copy": {"source": "{}/a.raw", "target": "{}/new"},
    "create": {"path": "{}/new", "format": "qcow2", "size": SIZE},
    "detect": {"source": "{}/a.qcow2"},
    "diff": {"first": "{}/a.qcow2", "second": "{}/b.raw", "first_format": "qcow2", "second_format": "raw"},
    "explain": {"source": "{}/a.qcow2", "offsets": 0},
    "explain_guest": {"source": "{}/a.qcow2", "offset": 0},
    "flatten": {"image": "{}/top.qcow2", "format": "qcow2"},
    "info": {"source": "{}/a.qcow2"},
    "info_chain": {"source": "{}/top.qcow2", "format": "qcow2"},
    "inspect": {"source": "{}/a.qcow2"},
    "json_schema": {"of": "ImageInfo"},
    "map": {"source": "{}/a.qcow2", "format": "qcow2"},
    "measure": {"source": "{}/a.qcow2", "target_format": "qcow2", "format": "qcow2"},
    "open": {"source": "{}/a.qcow2", "format": "qcow2"},
    "rebase": {"image": "{}/top.qcow2", "backing": "b.raw", "backing_format": "raw", "format": "qcow2"},
    "resize": {"image": "{}/a.qcow2", "size": "+64k", "format": "qcow2"},
    "serve": {"source": "{}/a.qcow2", "format": "qcow2", "socket": "{}/s"},
    "structures": {"source": "{}/a.qcow2"},
    "tree": {"top": None},
    "view": {"first": "{}/a.qcow2", "first_format": "qcow2", "output": "{}/new.html"},
}
#: Numbers above 0 that these take make the function wait.
SLOW = {"rate", "open_timeout"}
#: Functions of other names.
LEFT_OUT = {"probe"}


class Odd:
    """Of no use to anybody, and it says nothing of itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<odd>"


#: The values that are tried, and the words of annotations that admit them.
VALUES: tuple[tuple[Any, frozenset[str]], ...] = tuple(
    (value, frozenset(words.split()))
    for value, words in (
        (None, "None"),
        (Odd(), ""),
        (Odd, "type"),
        (5, "int float"),
        (-1, "int float"),
        (1 << 80, "int float"),
        (0, "int float"),
        (2.5, "float"),
        (float("nan"), ""),
        (float("inf"), "float"),
        (-1.0, "float"),
        (1e300, "float"),
        (True, "bool"),
        (False, "bool"),
        ("", "str"),
        ("x", "str"),
        ("x" * 5000, "str"),
        ("a/" * 3000, "str"),
        ("\0", "str"),
        ("\ud800", "str"),
        ("-", "str"),
        (b"x", ""),
        (bytearray(b"x"), ""),
        (Path("x"), "path"),
        (Path("x" * 5000), "path"),
        ([], "list"),
        ((), "list"),
        (["x"], "list"),
        (["x" * 5000], "list"),
        ([5], ""),
        ([None], ""),
        ({}, "dict"),
        ({"x": 1}, "dict"),
        ({5: 5}, "dict"),
        ({"driver": 5}, "dict"),
        ({"driver": []}, "dict"),
        ({"driver": "qcow2", "file": 5}, "dict"),
        ({"driver": "file", "filename": []}, "dict"),
        ({"driver": "raw", "size": {}, "file": {"filename": "x"}}, "dict"),
        (set(), "set"),
        (print, "callable"),
        (lambda *_: 5, "callable"),
        (object, "callable type"),
        (1j, ""),
        (range(3), ""),
    )
)

#: The words of annotations, and what they admit.
ADMITS = {
    "Any": "None int float bool str path list dict set callable type",
    "Budget": "",
    "CancelEvent": "",
    "Graph": "",
    "Image": "",
    "Literal": "str bool",
    "Mapping": "dict",
    "Node": "",
    "None": "None",
    "PathLike": "path",
    "Policy": "",
    "Progress": "callable",
    "Repair": "str",
    "Sequence": "list set dict",
    "Source": "str path dict",
    "Target": "",
    "bool": "bool",
    "float": "int float",
    "int": "int",
    "str": "str",
}


def functions() -> dict[str, Callable[..., Any]]:
    found = {name: getattr(lamina, name) for name in lamina.__all__}
    return {name: value for name, value in found.items() if inspect.isfunction(value) and name not in LEFT_OUT}


def test_each_function_is_called() -> None:
    assert functions().keys() == CALLS.keys()


def admitted(annotation: str) -> set[str]:
    """The words that the annotation of a parameter admits."""
    outer = "".join(annotation.split())
    while "[" in outer:
        start, stop = outer.index("["), outer.index("]")
        outer = outer[:start] + outer[stop + 1 :]
    return {one for word in outer.split("|") for one in ADMITS[word.removeprefix("os.")].split()}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    lamina.create(folder / "a.qcow2", "qcow2", SIZE, cluster_size=512)
    lamina.create(folder / "b.raw", "raw", SIZE)
    lamina.create(folder / "top.qcow2", "qcow2", backing_file="a.qcow2", backing_fmt="qcow2", cluster_size=512)
    with lamina.open(folder / "a.qcow2", format="qcow2", read_only=False) as image:
        image.write(4096, b"x" * 4096)
    with lamina.open(folder / "b.raw", format="raw", read_only=False) as image:
        image.write(8192, b"y" * 4096)
    shutil.copy(folder / "b.raw", folder / "a.raw")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}


@contextlib.contextmanager
def fresh(images: Path, folder: Path) -> Iterator[None]:
    """The files of `images` in `folder`, which is the current one, and nothing else."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in images.iterdir():
        shutil.copyfile(path, folder / path.name)
    yield


def filled(name: str, folder: Path) -> dict[str, Any]:
    return {
        key: value.replace("{}", str(folder)) if isinstance(value, str) else value for key, value in CALLS[name].items()
    }


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What it returns; an iterator is used up, and what has to be closed is."""
    rest = dict(arguments)
    several = [
        one for one in inspect.signature(function).parameters.values() if one.kind is inspect.Parameter.VAR_POSITIONAL
    ]
    if several:
        first, *_ = inspect.signature(function).parameters
        found = function(rest.pop(first), rest.pop(several[0].name), **rest)
    else:
        found = function(**rest)
    if inspect.isgenerator(found):
        return list(found)
    close = getattr(found, "close", None)
    if close is not None:
        close()
    return found


def wrong(function: Callable[..., Any]) -> Iterator[tuple[str, Any, bool]]:
    """Each parameter, with each value, and whether its annotation admits the value."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        words = admitted(str(parameter.annotation))
        for value, kinds in VALUES:
            if parameter.name in SLOW and isinstance(value, int | float) and value > 0:
                continue
            if parameter.name == "progress" and value in (Odd, object):
                continue  # what it raises is raised
            yield parameter.name, value, bool(kinds & words) or "Any" in str(parameter.annotation)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_of_no_use_is_refused(name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    function = functions()[name]
    before = content(images)
    failures = []
    for parameter, value, right in wrong(function):
        with fresh(images, tmp_path):
            arguments = filled(name, tmp_path)
            if name == "tree" and parameter != "top":
                continue
            arguments[parameter] = value
            what = f"{name}({parameter}={value!r:.40})"
            threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
            try:
                call(function, arguments)
                refused: BaseException | None = None
            except Exception as error:  # noqa: BLE001 - the kinds that may not escape are the subject
                refused = error
            if refused is None:
                if not right:
                    failures.append(f"{what}: was taken")
                continue
            if not isinstance(refused, LaminaError):
                failures.append(f"{what}: {type(refused).__name__}: {refused}")
            elif not right and not (
                isinstance(refused, OptionError) and isinstance(refused, TypeError) and f"{parameter} " in str(refused)
            ):
                failures.append(f"{what}: says {type(refused).__name__}: {refused}")
            if isinstance(refused, OptionError) and content(tmp_path) != before:
                failures.append(f"{what}: wrote {content(tmp_path).keys() - before.keys() or 'into a file'}")
            if len(os.listdir("/proc/self/fd")) > files or set(threading.enumerate()) - threads:
                failures.append(f"{what}: left something open")
    assert not failures, f"{len(failures)}:\n" + "\n".join(failures)
