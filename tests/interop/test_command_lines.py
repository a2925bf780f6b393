"""Lamina under the name qemu-img, beside qemu-img: the same command lines give the same text, exit status and images."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import evidence

from .command_folder import BENEATH, Images
from .command_lines import Group, differences, groups, run_ours, run_theirs, unlike

pytestmark = pytest.mark.peers

GROUPS = list(groups())
#: Every line on standard error begins like that; findings of `check` have no program before them, as in QEMU.
MESSAGE = re.compile(r"qemu-(img|io): |(error|leak|note|unreadable): ")


#: A version, and the fixture of the programs that have it.
VERSIONS = {"7.2": "qemu7", "10.0": "qemu10"}


@pytest.fixture(scope="module")
def peers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, Images]]:
    """The programs of a version and the images that they made, which are made once."""

    @cache
    def found(version: str) -> tuple[Any, Images]:
        qemu = request.getfixturevalue(VERSIONS[version])
        return qemu, Images(qemu, tmp_path_factory.mktemp("images"))

    return found


def test_the_page_lists_lines_of_the_tables() -> None:
    lines = {line for group in GROUPS for line in group.lines}
    listed = [one for version in VERSIONS for part in differences(version) for one in part]
    assert listed
    assert set(listed) <= lines


#: Every line runs under 7.2. Under 10.0, which is much the same, run one of three and those that only it has.
CASES = [
    *(("7.2", group) for group in GROUPS if group.version is None),
    *(("10.0", group) for number, group in enumerate(GROUPS) if group.version or number % 3 == 0),
]


@pytest.mark.parametrize(("version", "group"), CASES, ids=str)
def test_the_same_answer(
    tmp_path: Path,
    peers: Callable[[str], tuple[Any, Images]],
    version: str,
    group: Group,
    capfd: pytest.CaptureFixture[str],
) -> None:
    qemu, images = peers(version)
    listed = differences(version)
    folders = [tmp_path / name for name in ("ours", "theirs", "plain")]
    for folder in folders:
        folder.mkdir()
        images.write(folder, images.named_in(group.lines))
    problems = []
    failed = False
    for line in group.lines:
        changed = line != group.lines[0] or line.startswith(("check -r", "check --output=json -r", "check --repair"))
        theirs = run_theirs(group.program, line, folders[1], qemu)
        ours = run_ours(group.program, line, folders[0], version, capfd)
        if ours.status != theirs.status:
            problems.append(
                f"{line}: exit status {ours.status} instead of {theirs.status}: {ours.errors}{theirs.errors}"
            )
        elif ours.output != theirs.output and (not changed or ours.without_layout() != theirs.without_layout()):
            problems.append(f"{line}: output\n{ours.output}instead of\n{theirs.output}")
        failed = failed or theirs.status != 0
        if not all(map(MESSAGE.match, ours.errors.splitlines())):
            problems.append(f"{line}: message {ours.errors}")
        if line == group.lines[0] and theirs.status and not set(BENEATH) & images.named_in(group.lines):
            plain = run_ours(group.program, line, folders[2], None, capfd)
            if (plain.status != theirs.status) != (line in listed.codes):
                problems.append(f"lamina {line}: exit status {plain.status} beside {theirs.status}: {plain.errors}")
    if (different := unlike(images, qemu, folders[0], folders[1], failed=failed)) is not None:
        problems.append(different)
    if any(line in listed.tools for line in group.lines):
        assert problems, "the page about differences lists this line, and there is none"
    else:
        assert not problems, "\n".join(problems)
    evidence.count("command lines compared with QEMU's", len(group.lines))
