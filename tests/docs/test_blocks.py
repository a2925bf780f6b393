"""Every code block of every page runs, prints what the page shows, and type-checks."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import in_ci
from tests.docs.markdown import FENCE, ROOT, Block, blocks, name_of, pages
from tests.docs.running import LANGUAGES, Runner, console, matches, write_programs


def runs(block: Block) -> bool:
    return block.language in LANGUAGES and (block.language != "text" or "output" in block.notes)


PAGES = {page: list(blocks(page.read_text())) for page in pages()}
RUNNING = [page for page, found in PAGES.items() if any(map(runs, found))]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "bin"
    write_programs(folder)
    return folder


@pytest.fixture
def known_to_fsspec() -> None:
    """The protocol `lamina`, which an installation declares by an entry point."""
    if importlib.util.find_spec("fsspec") is not None:
        importlib.import_module("fsspec").register_implementation(
            "lamina", "lamina.fsspec.ImageFileSystem", clobber=True
        )


@pytest.mark.usefixtures("own_drivers", "known_to_fsspec")
@pytest.mark.parametrize("page", RUNNING, ids=name_of)
def test_the_blocks_of_a_page_run(page: Path, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name == "fsspec.md" and not in_ci():
        pytest.importorskip("fsspec")
    monkeypatch.chdir(tmp_path)
    with Runner(tmp_path, programs, name_of(page)) as runner:
        for block in PAGES[page]:
            runner.run(block)
        runner.finish()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_block_has_a_language_and_is_fenced(page: Path) -> None:
    for block in PAGES[page]:
        assert block.language in LANGUAGES, f"line {block.line}"
    text = FENCE.sub("", re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL))
    indented = re.findall(r"(?<=\n\n)    .*", text)
    assert not indented, "indented code is not run: use a fence"


def test_few_blocks_do_not_run() -> None:
    left_out = [
        (name_of(page), block.line, note)
        for page, found in PAGES.items()
        for block in found
        for note in block.notes
        if note.startswith("not run:")
    ]
    assert all(len(note) > len("not run: x") for *_, note in left_out)
    assert len(left_out) <= 20, left_out


def test_the_python_blocks_type_check(tmp_path: Path) -> None:
    """One run of mypy over all of them: the blocks of a page are one module, a block with a title is a module of its own."""
    titles = Counter(block.title for found in PAGES.values() for block in found if block.title)
    assert set(titles.values()) <= {1}, "two blocks have the same title"
    lines: dict[str, str] = {}
    for page, found in PAGES.items():
        module = "page_" + re.sub(r"\W", "_", name_of(page).removesuffix(".md")) + ".py"
        text = ""
        for block in found:
            if block.language != "python":
                continue
            if block.title:
                (tmp_path / block.title).write_text(block.text)
                lines[block.title] = f"{name_of(page)}:{block.line}"
            else:
                # The lines of the module are those of the page.
                text += "\n" * (block.line - text.count("\n")) + block.text
        if text:
            (tmp_path / module).write_text(text)
            lines[module] = name_of(page)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", ROOT / "pyproject.toml"]
    command += ["--cache-dir", ROOT / ".mypy_cache", *sorted(lines)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + str(lines)


# -- the runner


def test_output_is_compared() -> None:
    assert matches("a\n...\nb ... d", "a\nx\ny\nb c d\n", False)
    assert matches("...... a ...", "...... a b", False)
    assert not matches("...... a", "abcdef a", False)
    assert not matches("a", "b", False)
    assert not matches("a", "a\nb", False)
    assert matches("took 1.5 seconds,  12 times", "took 0.25 seconds, 1,000 times", True)
    assert not matches("took 1.5 seconds", "took no seconds", True)
    assert not matches("took 1.5 seconds", "took 0.25 seconds", False)


def test_commands_of_a_console_block() -> None:
    text = "$ one \\\n    more\nshown\n\nbelow\n\n$ two\n$ three\nlast\n"
    assert list(console(text)) == [("one \\\n    more", "shown\n\nbelow"), ("two", ""), ("three", "last")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("```console\n$ echo a\nb\n```\n", "printed"),
        ("```console\n$ false\n```\n", "status 1"),
        ("```sh\nfalse\ntrue\n```\n", "status 1"),
        ("```python\nprint(1)  # 2\n```\n", "printed"),
        ("```python\nprint(1)\n```\n<!-- output -->\n```text\n2\n```\n", "printed"),
        ('```python title="test_x.py"\ndef test_x() -> None:\n    assert False\n```\n', "1 failed"),
        ("```console\n$ lamina info none.qcow2 &\nready\n```\n", "cannot be opened"),
    ],
)
def test_a_wrong_page_fails(
    text: str, says: str, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Runner(tmp_path, programs, "page.md") as runner, pytest.raises(AssertionError, match=says):
        run_all(runner, text)


def run_all(runner: Runner, text: str) -> None:
    for block in blocks(text):
        runner.run(block)
    runner.finish()


def test_a_right_page_passes(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = """\
<!-- setup:
echo kept > file
-->
```console
$ cat file
kept
$ cat none
cat: ...
$ echo $?
1
$ lamina --version
lamina 0...
```
<!-- not run: no such program -->
```console
$ nosuch
```
```python
value = 3
```
```python
print(value)  # 3
print("more")
```
<!-- output -->
```text
3
more
```
"""
    with Runner(tmp_path, programs, "page.md") as runner:
        run_all(runner, text)
    assert runner.printed == "3\nmore\n"
