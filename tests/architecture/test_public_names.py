"""The public names of Lamina, and the list of everything that is internal.

What is public stays, or is deprecated first; it has a docstring, and complete types (`test_public_types`). What is internal
may change in any version, without a line in the changelog. Names with an underscore, and whatever is inside an internal
module, are internal without being listed.

A new module or name fails a test here until it is in one of the lists. A new public name is also a line in CHANGELOG.md and a
part of the documentation.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

from lamina import registry

from .test_layers import MODULES, PACKAGE

#: What programs use. `lamina.X` is where a name is at home for users, even if another module defines it.
FOR_PROGRAMS = {
    "": """
        BenchResult BlockIOError Budget CancelEvent Cancelled CheckResult Closed CommitResult CompactResult
        CompareResult ConvertResult CopyResult CorruptImage Detection Explanation Extent Extents Finding
        FlattenResult FormatError Graph Image ImageInfo
        LaminaError Layer LimitExceeded Limits Locked MeasureResult NotFound NotSupported OptionError OutOfRange
        Policy PolicyError Progress Range ReadOnly RebaseResult ResizeResult Secret Snapshot UnsupportedFeature
        Verdict __version__ bench check commit compact compare connect convert copy create detect diff explain
        explain_guest flatten info info_chain inspect json_schema map measure open probe rebase resize serve
        structures tree view
        """,
    "aio": """
        Image Opening bench check commit compact compare connect convert copy create detect explain explain_guest
        flatten info info_chain
        inspect iterate map measure open rebase resize run serve structures view
        """,
    "nbd": "Client Export Folder RestrictedExport Server",
    "testing": """
        Bounds CrashState Disk FaultyStorage FilterConformance FormatConformance Marks Persistence PowerLoss
        PowerLossFailure Recorder StorageConformance check_status cut_power read_log replay
        """,
}

#: What values of these have as types, and what authors of drivers use, at home where it is defined.
FOR_DRIVERS = {
    "around": "AroundChanges AroundNode Request",
    "bitmap": "DirtyBitmap MemoryBitmap",
    "block_runs": "BlockRuns following",
    "disk_file": "DiskFile",
    "edit": "Edit",
    "explanation": """
        DATA Explainer Explanation FREE Guest LEAKED Overview Part Step UNKNOWN UNREFERENCED UNUSED
        """,
    "extents": "Bools Bytes Extents Int32s Int64s Totals",
    "file_map": "FileMap KINDS NUMBER Route of_regions",
    "format": "Format Repair",
    "format_node": "Columns FormatNode Mapping Reservation To",
    "graph": "Opener Spec",
    "json_forms": "*",  # every form
    "json_forms_nbd": "*",
    "layout": "Field Flag Flags Record Row Structure",
    "limits": """
        Budget DEFAULT_BUDGET GIB KIB Limits MAX_ROWS MAX_SIZE MAX_TRANSFER MIB TIB align_down align_up
        is_power_of_two
        """,
    "node": "COMPRESS FUA FilterNode MAY_UNMAP NO_FALLBACK Node StorageNode TransformNode bounded is_faithful plain",
    "pending": "DONE Done Pending Startable",
    "pooled": "PooledStorage",
    "registry": "ENTRY_POINTS Entry KINDS Kind add_installed entry lookup names register",
    "report": "CheckReport ERROR LEAK MAX_FINDINGS NOTE UNREADABLE",
    "request": "Child",
    "root": "Graph Root",
    "schema": "IMAGE Option REQUIRED Schema",
    "status": "COMPRESSED DATA Extent HostFile HostPath PRESENT Status ZERO",
    "window": "WindowNode",
}

#: Names without an underscore in the modules of `FOR_DRIVERS` that are internal all the same.
INTERNAL_NAMES = {
    "edit": "refresh",
    "format": "below_filter layers_of lookup_format",
    "graph": "COMMON COMMON_SCHEMA STORAGE_ROLES named open_graph probe rebook usual",
    "limits": "MAX_CHAIN Memory",
    "node": "check_size foreign is_plain require_writable",
    "pending": "Holding start_holding",
    "request": "sizes_changed",
    "root": "graph_of",
    "status": "rows_of",
    "window": "shifted_limits",
}

#: Modules, and packages with all that is in them, that are internal. Public names that they define are those of `lamina`.
INTERNAL = """
    __main__ aio api atomic_file buffers capabilities check_result cli clock codecs coding creation crypto descriptors
    detection edge errors filters formats fsspec gate holes image inspection job_results jobs layers lifecycle named_file
    nbd node_tree numeric operations options own_files palette parameters peer_options picture policy ranges
    references reopening result_schema results rounding side_file storage target_file testing verdict version viewer
    workers zeros
    """


def listed(text: str) -> set[str]:
    return set(text.split())


def imported(module: str) -> Any:
    return importlib.import_module(f"lamina.{module}" if module else "lamina")


def defined(module: str) -> set[str]:
    """The names without an underscore that the source of a module defines, without those that it imports."""
    found: set[str] = set()
    for node in ast.parse((PACKAGE / f"{module}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def public() -> Iterator[tuple[str, Any]]:
    """Each public function and class, and each driver, by its full name."""
    for module, names in (FOR_PROGRAMS | FOR_DRIVERS).items():
        where = imported(module)
        for name in sorted(defined(module) if names == "*" else listed(names)):
            yield f"{where.__name__}.{name}", getattr(where, name)
    for name in registry.names():
        kind = registry.lookup(name)
        yield f"{kind.__module__}.{kind.__qualname__}", kind


# The lists


@pytest.mark.parametrize("module", FOR_PROGRAMS, ids=lambda module: module or "lamina")
def test_the_list_is_what_the_module_offers(module: str) -> None:
    assert listed(FOR_PROGRAMS[module]) == set(imported(module).__all__)
    assert listed(FOR_PROGRAMS[module]) == set(dir(imported(module))), "dir() is the list, for people who explore"


@pytest.mark.parametrize("module", FOR_DRIVERS)
def test_each_name_of_a_module_is_in_a_list(module: str) -> None:
    public, internal = listed(FOR_DRIVERS[module]), listed(INTERNAL_NAMES.get(module, ""))
    assert not public & internal
    if public != {"*"}:
        assert public | internal == defined(module)


def test_each_module_is_in_a_list() -> None:
    tops = {module.split(".")[0] for module in MODULES} - {""}
    assert tops == set(FOR_DRIVERS) | listed(INTERNAL)
    assert not set(FOR_DRIVERS) & listed(INTERNAL)
    assert set(INTERNAL_NAMES) <= set(FOR_DRIVERS)


# The documentation


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class itself defines; not the tests of a conformance suite, which are known
    by their names, nor the fields of a named tuple."""
    for name, value in vars(kind).items():
        method = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not name.startswith(("_", "test_")) and inspect.isfunction(method):
            yield name, getattr(kind, name)


def undocumented(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, type):
        if not value.__doc__:
            yield name
        yield from (f"{name}.{member}" for member, method in members(value) if not inspect.getdoc(method))
    elif inspect.isfunction(value) and not inspect.getdoc(value):
        yield name


def test_each_public_name_has_a_docstring() -> None:
    missing = sorted({one for name, value in public() for one in undocumented(name, value)})
    assert not missing, "without a docstring:\n" + "\n".join(missing)


def test_a_missing_docstring_is_found() -> None:
    class Bare:
        def method(self) -> None: ...

        @property
        def told(self) -> int:
            """A number."""
            return 1

    assert list(undocumented("Bare", Bare)) == ["Bare", "Bare.method"]


def comments(module: str) -> Iterator[tuple[str, bool]]:
    """Each constant of a module, and whether a comment `#:` is behind it, above it, or above the block that it is in."""
    source = (PACKAGE / f"{module}.py").read_text()
    lines = source.splitlines()
    end, told = -1, False
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        told = (told and node.lineno == end + 1) or lines[node.lineno - 2].startswith("#")
        last = end = node.end_lineno or node.lineno
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for one in (one for one in targets if isinstance(one, ast.Name)):
            yield one.id, told or bool(re.search(r"#:? ", lines[last - 1]))


@pytest.mark.parametrize("module", sorted(set(FOR_DRIVERS) - {"json_forms", "json_forms_nbd"}))
def test_each_public_constant_has_a_comment(module: str) -> None:
    names = listed(FOR_DRIVERS[module])
    missing = [name for name, told in comments(module) if name in names and not told]
    assert not missing, f"say with a comment #: what they are: {', '.join(missing)}"
