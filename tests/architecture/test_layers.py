"""The architecture: imports point down the layers, files are short and documented, the module map is complete.

The tests parse the source with `ast` and import nothing of Lamina. Each rule is a function of plain values, and a second
test shows that the rule can fail.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "src" / "lamina"

#: From the lowest to the highest. A module may import modules of its own layer and of lower ones.
LAYERS = [
    {"errors"},
    {
        "atomic_file",
        "buffers",
        "capabilities",
        "check_result",
        "clock",
        "codecs",
        "descriptors",
        "crypto",
        "bitmap",
        "detection",
        "extents",
        "json_forms",
        "json_forms_nbd",
        "layout",
        "job_results",
        "limits",
        "named_file",
        "numeric",
        "options",
        "palette",
        "parameters",
        "peer_options",
        "pending",
        "picture",
        "policy",
        "registry",
        "schema",
        "side_file",
        "report",
        "rounding",
        "status",
        "result_schema",
        "results",
        "target_file",
        "version",
        "workers",
        "zeros",
    },
    {
        "api",
        "around",
        "block_runs",
        "coding",
        "creation",
        "disk_file",
        "edge",
        "edit",
        "explanation",
        "file_map",
        "format",
        "format_node",
        "gate",
        "graph",
        "holes",
        "image",
        "inspection",
        "layers",
        "lifecycle",
        "node",
        "node_tree",
        "own_files",
        "pooled",
        "ranges",
        "reopening",
        "references",
        "request",
        "root",
        "window",
    },
    {"filters", "formats", "storage"},
    {"jobs", "nbd", "verdict", "viewer"},
    {"operations"},
    {"cli", "fsspec", "testing"},
    # The package's `__init__` loads the public names of every layer on demand, and `aio` takes them from there.
    {"", "__main__", "aio"},
]
#: Packages of one layer that never import one another: the registry finds each driver by its name.
SIBLINGS = {"filters", "formats", "storage"}

LONGEST = 500
LONGER = "Longer than 500 lines:"
VAGUE = {"common", "helper", "helpers", "misc", "util", "utils"}
# Folders and hosts of one machine, which do not exist on another.
OF_A_MACHINE = re.compile(
    r"""(?<![\w.$)}~/-])/(?:work|root|tmp/venv|var/cache|opt)/
    |(?:--|_)(?:extra-)?index-url|INDEX_URL
    |://[^/\s"']*(?:artifactory|nexus|mirror|registry|proxy)[^/\s"']*
    |(?<![\d.])(?:10\.\d+|192\.168)\.\d+\.\d+(?![\d.])""",
    re.VERBOSE | re.IGNORECASE,
)


def sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def module_name(file: Path) -> str:
    """The dotted name of `file` below the package, such as `formats.qcow2.header`; "" for the package's `__init__`."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int | None:
    top = module.split(".")[0]
    return next((number for number, names in enumerate(LAYERS) if top in names), None)


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All import statements at any depth, except those that only the type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and is_type_checking(node.test):
            for other in node.orelse:
                yield from imports(ast.Module([other], []))
        else:
            yield from imports(node)


def imported(source: str, module: str, is_package: bool, known: set[str]) -> Iterator[tuple[int, str]]:
    """The modules of Lamina that the text `source` of `module` imports: line and name, as in `module_name`.

    `known` holds the names of all modules: `from . import x` means the module x if there is one, else a name in the
    package.
    """
    for node in imports(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "lamina" or alias.name.startswith("lamina."):
                    yield node.lineno, alias.name.removeprefix("lamina").removeprefix(".")
            continue
        if node.level:
            here = module.split(".") if module else []
            up = node.level - (1 if is_package else 0)
            base = here[: len(here) - up] + (node.module.split(".") if node.module else [])
        elif node.module and node.module.split(".")[0] == "lamina":
            base = node.module.split(".")[1:]
        else:
            continue
        for alias in node.names:
            inner = ".".join([*base, alias.name])
            yield node.lineno, inner if inner in known else ".".join(base)


def upward(module: str, target: str) -> str | None:
    """Why `module` may not import `target`, or None if it may."""
    below, above = layer_of(module), layer_of(target)
    if above is None:
        return f"{target} is in no layer: add it to LAYERS"
    if below is None:
        return f"{module} is in no layer: add it to LAYERS"
    if above > below:
        return f"lamina.{target} is above lamina.{module}".replace("lamina. ", "lamina ")
    packages = {module.split(".")[0], target.split(".")[0]}
    if len(packages) == 2 and packages <= SIBLINGS:
        return f"{module} and {target} are siblings: let the registry find it by name"
    return None


PACKAGE_FILES = sources("src/lamina")
ALL_FILES = sources("src", "tests", "benchmarks", "tour", "docs")
MODULES = {module_name(file) for file in PACKAGE_FILES}


def from_root(file: Path) -> str:
    return str(file.relative_to(ROOT))


# Layers


def test_no_import_points_upward() -> None:
    wrong = []
    for file in PACKAGE_FILES:
        module = module_name(file)
        for line, target in imported(file.read_text(), module, file.name == "__init__.py", MODULES):
            if reason := upward(module, target):
                wrong.append(f"{from_root(file)}:{line}: {reason}")
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_layer() -> None:
    unknown = sorted({module.split(".")[0] for module in MODULES if layer_of(module) is None})
    assert not unknown, f"add to the lowest possible layer of LAYERS: {', '.join(unknown)}"


@pytest.mark.parametrize(
    ("module", "is_package", "source", "target"),
    [
        ("node", False, "from .graph import x", "graph"),
        ("node", False, "from . import graph", "graph"),
        ("node", False, "from . import open", ""),
        ("node", False, "import lamina.cli.main", "cli.main"),
        ("node", False, "import lamina", ""),
        ("node", False, "from lamina.cli import main", "cli.main"),
        ("node", False, "def f():\n    from .cli import main", "cli.main"),
        ("node", False, "try:\n    from .cli.main import run\nexcept ImportError:\n    raise", "cli.main"),
        ("node", False, "if TYPE_CHECKING:\n    pass\nelse:\n    from .cli import main", "cli.main"),
        ("cli.main", False, "from ..filters import blkdebug", "filters"),
        ("cli", True, "from .main import run", "cli.main"),
        ("cli", True, "from .. import graph", "graph"),
        ("", True, "from .cli import main", "cli.main"),
    ],
)
def test_imports_are_resolved(module: str, is_package: bool, source: str, target: str) -> None:
    known = {"", "node", "graph", "cli", "cli.main", "filters"}
    assert [name for _, name in imported(source, module, is_package, known)] == [target]


def test_imports_for_the_type_checker_are_free() -> None:
    source = (
        "if TYPE_CHECKING:\n    from .cli import main\nif typing.TYPE_CHECKING:\n    import lamina.cli\nimport numpy"
    )
    assert list(imported(source, "node", False, {"", "cli"})) == []


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("errors", "limits"),
        ("extents", "node"),
        ("graph", "formats.raw"),
        ("formats.raw", "filters.blkdebug"),
        ("storage.file", "formats"),
        ("formats.qcow2.header", "jobs.check"),
        ("jobs.convert", "cli.main"),
        ("cli.main", ""),
        ("cli.main", "attic"),
        ("attic", "errors"),
    ],
)
def test_upward_is_refused(module: str, target: str) -> None:
    assert upward(module, target)


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("limits", "errors"),
        ("limits", "extents"),
        ("formats.qcow2.header", "formats.qcow2.layout"),
        ("filters.blkdebug", "node"),
        ("cli.main", "jobs.convert"),
        ("", "cli.main"),
    ],
)
def test_downward_is_granted(module: str, target: str) -> None:
    assert upward(module, target) is None


# Each file


def too_long(source: str) -> bool:
    lines = len(source.splitlines())
    return lines > LONGEST and LONGER not in (ast.get_docstring(ast.parse(source)) or "")


def documented(source: str) -> bool:
    """Whether the docstring of a module holds a sentence: some words and a full stop."""
    return bool(re.search(r"\w+\W+\w+\W.*[.!?:](\s|$)", ast.get_docstring(ast.parse(source)) or "", re.DOTALL))


@pytest.mark.parametrize("file", ALL_FILES, ids=from_root)
def test_file_is_short_and_documented(file: Path) -> None:
    source = file.read_text()
    if file.name == "__init__.py" and not source and not file.is_relative_to(PACKAGE):
        return  # folders of tests are packages only so that two test files may have one name
    assert not too_long(source), f"more than {LONGEST} lines: find the second subject, or say {LONGER!r} and why"
    assert documented(source), "the docstring of a module is at least one sentence"
    assert file.stem not in VAGUE, "a vague name: name the subject"
    assert not VAGUE & set(file.relative_to(ROOT).parts), "a vague folder name: name the subject"


def test_every_folder_of_the_source_is_a_package() -> None:
    bare = {from_root(file.parent) for file in PACKAGE_FILES if not (file.parent / "__init__.py").exists()}
    assert not bare, f"no __init__.py that documents the package: {', '.join(sorted(bare))}"


def test_the_rules_for_a_file_can_fail() -> None:
    assert too_long('"""Long."""\n' + "x = 1\n" * LONGEST)
    assert not too_long('"""Long.\n\nLonger than 500 lines: one table."""\n' + "x = 1\n" * LONGEST)
    assert not too_long("x = 1\n" * LONGEST)
    assert not documented("x = 1")
    assert not documented('"""Formats."""')
    assert documented('"""Formats: one module each."""')


# Nothing of one machine


def committed() -> list[Path]:
    """The files of the repository, those of the next commit included; in an unpacked archive, every file."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    hidden = {".venv", ".git", "__pycache__"}
    return [file for file in ROOT.rglob("*") if file.is_file() and not hidden & set(file.relative_to(ROOT).parts)]


def test_nothing_names_one_machine() -> None:
    found = []
    for file in committed():
        try:
            text = file.read_text()
        except UnicodeDecodeError:
            continue  # an image or a picture
        for number, line in enumerate(text.splitlines(), 1):
            if OF_A_MACHINE.search(line) and file != Path(__file__).resolve():
                found.append(f"{from_root(file)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("cd /work/main", True),
        ('open("/root/disk.qcow2")', True),
        ("PATH=/var/cache/peers/bin", True),
        ("pip install --index-url x", True),
        ("http://mirror.example.org/simple", True),
        ("http://192.168.1.7/simple", True),
        ("src/work/main", False),
        ("$(ROOT)/work/", False),
        ("https://www.apache.org/licenses/", False),
        ("/usr/share/misc", False),
        ("version 1.192.168.10.20", False),
    ],
)
def test_what_names_one_machine(text: str, named: bool) -> None:
    assert bool(OF_A_MACHINE.search(text)) is named


# The module map

CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def module_map(text: str) -> str:
    """The fenced block of a Markdown text whose first line begins with `src/lamina/`; "" if it has none."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return next((block for block in blocks if block.startswith("src/lamina/")), "")


def named_in(block: str) -> set[str]:
    """The paths from the repository's root that the map names.

    Paths of an indented line are relative to `src/lamina/`, those of any other line to the repository. Words that end in
    `/` or `.py` are paths. If the first word of a line is a folder, the other paths are relative to that folder;
    `qcow2/{layout,header}` names two modules of a folder (a final `...` stands for more). All other words are prose.
    """
    found: set[str] = set()
    for line in block.splitlines():
        base = "src/lamina/" if line.startswith(" ") else ""
        words = re.findall(r"[\w./-]+/\{[^}]*\}|[\w./-]+/(?![\w{])|[\w./-]+\.py\b", line)
        for number, word in enumerate(words):
            if "{" in word:
                folder, _, inside = word.partition("{")
                found.add(base + folder)
                names = (name.strip() for name in inside.rstrip("}").split(","))
                found |= {f"{base}{folder}{name}.py" for name in names if name.strip(".")}
            else:
                found.add(base + word)
            if number == 0 and word.endswith("/") and line.split()[0] == word:
                base += word
    return found


def required_in_map() -> set[str]:
    """The paths that the map must name: every package at any depth, and every module directly in `src/lamina`."""
    packages = {from_root(file.parent) + "/" for file in PACKAGE_FILES if file.name == "__init__.py"}
    return packages | {
        from_root(file) for file in PACKAGE_FILES if file.parent == PACKAGE and file.name != "__main__.py"
    }


def test_the_module_map_is_true() -> None:
    block = module_map(CONTRIBUTING.read_text())
    assert block, "CONTRIBUTING.md has a fenced block that begins with src/lamina/"
    named = named_in(block)
    gone = sorted(name for name in named if not (ROOT / name).exists())
    assert not gone, f"named in the map but not there: {', '.join(gone)}"
    missing = sorted(required_in_map() - named)
    assert not missing, f"there but not named in the map: {', '.join(missing)}"


def test_how_the_map_is_read() -> None:
    text = """Words.

```
make tour
```

```
src/lamina/
  __init__.py     the public names, read/write, loaded lazily
  errors.py  limits.py      base layer; and/or
  request.py      the request path (idea 3);  ranges.py  locks on byte ranges
  formats/        raw  qcow2/{header, mapping,...}
  cli/            main, one module per command, io/ (the shell)
tests/            unit  conformance/
```
"""
    assert named_in(module_map(text)) == {
        "src/lamina/",
        "src/lamina/__init__.py",
        "src/lamina/errors.py",
        "src/lamina/limits.py",
        "src/lamina/request.py",
        "src/lamina/ranges.py",
        "src/lamina/formats/",
        "src/lamina/formats/qcow2/",
        "src/lamina/formats/qcow2/header.py",
        "src/lamina/formats/qcow2/mapping.py",
        "src/lamina/cli/",
        "src/lamina/cli/io/",
        "tests/",
        "tests/conformance/",
    }
    assert module_map("```\nlamina/\n```") == ""
