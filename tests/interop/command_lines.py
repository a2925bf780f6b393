"""Command lines as data, and one run of them under both programs; see `lines/*.txt` and `test_command_lines.py`.

Each line runs in two new folders of images (`command_folder`), in one by QEMU and in the other by Lamina in its place. An
indented line runs after the lines above it, in their folders. `10.0:` before a line names the only version that has it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lamina.cli import program
from lamina.cli.main import main
from lamina.cli.personality import personality

from .command_folder import Images
from .twins import joined

LINES = Path(__file__).parent / "lines"
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "drop-in.md"

#: What a text says that differs between two runs of one program.
_VARYING = [
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "DATE"),
    (re.compile(r'"date-(n?sec)": \d+'), r'"date-\1": 0'),
    (re.compile(r'"actual-size": \d+'), '"actual-size": 0'),
    (re.compile(r"disk size: [\d.e+]+ [KMG]?i?B"), "disk size: SIZE"),
    (re.compile(r"uuid: [0-9a-f-]+|iters: \d+"), "LUKS"),
    (re.compile(r'"(uuid|iters|master-key-iters)": [^,\n]+'), r'"\1": 0'),
    # Steps of the progress depend on the speed.
    (re.compile(r"(\s*\(\d+\.\d+/100%\)\s*)+"), "PROGRESS"),
    # Errors and help texts on standard output are in words of our own.
    (re.compile(r"^Usage: qemu-io .*QEMU Project[^\n]*\n|Usage: qemu-io .*<https://qemu.org>.\n", re.DOTALL), ""),
    (re.compile(r"^Parsing error: .*\n", re.MULTILINE), ""),
    # Times and rates of requests.
    (re.compile(r"Run completed in [\d.]+ seconds"), "Run completed"),
    (re.compile(r"(\d ops; ).*sec\)"), r"\1TIME"),
    (re.compile(r"(qemu-img version)[^\n]*\n[^\n]*\n"), r"\1\n"),
]


class Group(NamedTuple):
    """Lines that run one after the other in one folder."""

    subject: str
    lines: tuple[str, ...]
    version: str | None

    @property
    def program(self) -> str:
        return "qemu-io" if self.subject == "io" else "qemu-img"

    def __str__(self) -> str:
        return f"{self.subject}: {' ; '.join(self.lines)}"[:90]


def groups() -> Iterator[Group]:
    """All lines of the tables, grouped."""
    for path in sorted(LINES.glob("*.txt")):
        found: list[tuple[list[str], str | None]] = []
        for text in path.read_text().splitlines():
            if text.startswith("#"):
                continue
            if text.startswith("  "):
                found[-1][0].append(text.strip())
                continue
            version = "10.0" if text.startswith("10.0: ") else None
            found.append(([text.removeprefix("10.0: ")], version))
        yield from (Group(path.stem, tuple(lines), version) for lines, version in found)


#: What a change of an image puts where: the layout of the file.
_LAYOUT = [
    (re.compile(r'"offset": \d+'), '"offset": 0'),
    (re.compile(r"[\d.]+% fragmented"), "N% fragmented"),
    (re.compile(r"file length: .*"), "file length: N"),
    (re.compile(r'"virtual-size": \d+(,\s+"filename": "[^"]*",\s+"format": "file")'), r'"virtual-size": 0\1'),
    (re.compile(r"Image end offset: \d+"), "Image end offset: N"),
    (re.compile(r'"image-end-offset": \d+'), '"image-end-offset": 0'),
]


class Differences(NamedTuple):
    """The command lines of the page about differences, by section: "tools" (what the output under the names of the tools
    does not reproduce), and "codes" (where `lamina` ends with another exit status)."""

    tools: frozenset[str]
    codes: frozenset[str]


def differences(version: str) -> Differences:
    """The lines in the code blocks of docs/drop-in.md; `(7.2)` after one names the version that it is about."""
    page = PAGE.read_text().partition("\n## What the output does not reproduce\n")[2]
    return Differences(*(_listed(part, version) for part in page.split("\n## Exit status of `lamina`\n")))


def _listed(text: str, version: str) -> frozenset[str]:
    blocks = "".join(re.findall(r"^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    found = re.findall(r"^qemu-(?:img|io) (.*?)(?: +\((\d+\.\d+)\))?$", blocks, re.MULTILINE)
    return frozenset(line for line, only in found if only in ("", version))


@dataclass
class Outcome:
    """What a run of one line gave."""

    status: int
    output: str
    errors: str

    def without_layout(self) -> str:
        text = self.output
        for pattern, replacement in _LAYOUT:
            text = pattern.sub(replacement, text)
        return text


def run_ours(name: str, line: str, folder: Path, version: str | None, capfd: pytest.CaptureFixture[str]) -> Outcome:
    """Run the line as Lamina in the place of the program `name` in this version; None: as `lamina`."""
    words = _words(line, folder)
    before, here = program.current, os.getcwd()
    os.chdir(folder)
    try:
        if version is not None:
            program.current = personality(name, {"LAMINA_COMPAT": version})
        elif name == "qemu-io":
            words = ["io", *words]
        status = main(words)
    finally:
        program.current = before
        os.chdir(here)
    said = capfd.readouterr()
    return Outcome(status, _normal(said.out, folder), said.err)


def run_theirs(name: str, line: str, folder: Path, qemu: Any) -> Outcome:
    """Run the line by QEMU."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        run = qemu.io if name == "qemu-io" else qemu.img
        done = run(*_words(line, folder), check=False)
    finally:
        os.chdir(here)
    return Outcome(done.returncode, _normal(done.stdout, folder), done.stderr)


def _words(line: str, folder: Path) -> list[str]:
    return [word.replace("DIR", str(folder)) for word in shlex.split(line)]


def _normal(text: str, folder: Path) -> str:
    text = text.replace(str(folder), "DIR")
    for pattern, replacement in _VARYING:
        text = pattern.sub(replacement, text)
    return text


def unlike(images: Images, qemu: Any, ours: Path, theirs: Path, *, failed: bool) -> str | None:
    """The first respect in which the images of two folders differ, apart from their layout. `failed`: after an error QEMU may
    leave a target that is not complete, and Lamina never does."""
    names = sorted(path.name for path in theirs.iterdir())
    mine = sorted(path.name for path in ours.iterdir())
    if mine != names and not (failed and set(mine) < set(names)):
        return f"files: {mine} instead of {names}"
    for name in mine:
        before = images.content.get(name)
        content = [(folder / name).read_bytes() for folder in (ours, theirs)]
        if content[0] == content[1] or content[0] == before == content[1]:
            continue
        told = [_info(qemu, folder / name) for folder in (ours, theirs)]
        if told[0] != told[1]:
            return f"info of {name}: {told[0]} instead of {told[1]}"
        if told[0].get("encrypted"):
            continue  # the keys differ
        if "data-file" in told[0].get("format-specific", {}).get("data", {}):
            continue  # opened in the current folder, whose images are not those of both
        format = told[0]["format"]
        if (told := _compared(qemu, format, ours / name, theirs / name)) is not None:
            return f"compare -s of {name}: {told}"
        check = qemu.img("check", "-q", "-f", format, ours / name, check=False).returncode
        if check and check != qemu.img("check", "-q", "-f", format, theirs / name, check=False).returncode:
            return f"check of {name}: {check}"
    return None


def _compared(qemu: Any, format: str, ours: Path, theirs: Path) -> str | None:
    """What `compare -s` says of two images, if it is not that they are equal."""
    options = ("-f", format, "-F", format)
    same = qemu.img("compare", "-s", *options, ours, theirs, check=False)
    if not same.returncode:
        return None
    if same.returncode == 1 and "block status" in same.stdout:
        # QEMU sees a hole of the file under stored data: which of its zeros lie in one is not part of the format.
        maps = [joined(qemu.map(path, format)) for path in (ours, theirs)]
        if maps[0] == maps[1] and qemu.img("compare", "-q", *options, ours, theirs, check=False).returncode == 0:
            return None
    elif qemu.img("compare", *options, theirs, theirs, check=False).returncode == 2:
        return None  # its backing file does not exist
    return f"{same.stdout}{same.stderr}"


def _info(qemu: Any, path: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(qemu.img("info", "--output=json", path).stdout)
    for key in ("filename", "actual-size", "full-backing-filename", "children"):
        told.pop(key, None)
    for snapshot in told.get("snapshots", ()):
        for key in ("date-sec", "date-nsec", "icount"):
            snapshot.pop(key, None)
    data = told.get("format-specific", {}).get("data", {})
    for bitmap in data.get("bitmaps", ()):
        bitmap["flags"].sort()
    if "encrypt" in data:
        data["encrypt"] = {key: data["encrypt"][key] for key in ("format", "cipher-alg", "cipher-mode", "hash-alg")}
    return told
