"""Lamina: the block layer for Python.

Virtual disk images as a graph of small nodes (storage, formats, filters), with the exact status and location of every byte.
`open` and `create` are the first functions to use; public names are imported at their first use.
"""

from __future__ import annotations

import sys


def _forget_current_folder() -> None:
    """Remove the current folder from the search path of `python -m lamina`, where Python puts it first: a folder with hostile
    images may contain modules as well. It stays if Lamina itself is there. Runs before all other imports."""
    words = sys.orig_argv
    named = "-mlamina" in words or any(words[at : at + 2] == ["-m", "lamina"] for at in range(len(words)))
    # While Python looks for the module to run, the first argument is "-m".
    if named and sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
        own = __file__.rpartition("/")[0].rpartition("/")[0]
        if sys.path and sys.path[0] != own:
            del sys.path[0]


_forget_current_folder()

from typing import TYPE_CHECKING, Any  # noqa: E402 - see above

from .version import __version__  # noqa: E402

if TYPE_CHECKING:
    from .api import open, probe
    from .check_result import CheckResult, Finding
    from .creation import create
    from .crypto.secret import Secret
    from .detection import Detection
    from .errors import (
        BlockIOError,
        Cancelled,
        Closed,
        CorruptImage,
        FormatError,
        LaminaError,
        LimitExceeded,
        Locked,
        NotFound,
        NotSupported,
        OptionError,
        OutOfRange,
        PolicyError,
        ReadOnly,
        UnsupportedFeature,
    )
    from .explanation import Explanation
    from .extents import Extent, Extents
    from .image import Image
    from .inspection import check, explain, explain_guest, info, info_chain, structures
    from .job_results import (
        BenchResult,
        CommitResult,
        CompactResult,
        CompareResult,
        ConvertResult,
        CopyResult,
        FlattenResult,
        MeasureResult,
        RebaseResult,
        ResizeResult,
    )
    from .jobs.diff import Range
    from .jobs.progress import CancelEvent, Progress
    from .layers import Layer
    from .limits import Budget, Limits
    from .node_tree import tree
    from .operations.benching import bench
    from .operations.changing import commit, compact, flatten, rebase, resize
    from .operations.comparing import compare, diff
    from .operations.converting import convert, copy
    from .operations.describing import detect, map, measure
    from .operations.serving import connect, serve
    from .operations.viewing import view
    from .policy import Policy
    from .result_schema import json_schema
    from .results import ImageInfo, Snapshot
    from .root import Graph
    from .verdict.examine import inspect
    from .verdict.result import Verdict

_HOME = {
    **dict.fromkeys(("open", "probe"), "api"),
    "create": "creation",
    "Detection": "detection",
    **dict.fromkeys(
        (
            "BenchResult",
            "CommitResult",
            "CompactResult",
            "CompareResult",
            "ConvertResult",
            "CopyResult",
            "FlattenResult",
            "MeasureResult",
            "RebaseResult",
            "ResizeResult",
        ),
        "job_results",
    ),
    "Range": "jobs.diff",
    **dict.fromkeys(("CancelEvent", "Progress"), "jobs.progress"),
    "bench": "operations.benching",
    **dict.fromkeys(("commit", "compact", "flatten", "rebase", "resize"), "operations.changing"),
    **dict.fromkeys(("compare", "diff"), "operations.comparing"),
    **dict.fromkeys(("convert", "copy"), "operations.converting"),
    **dict.fromkeys(("detect", "map", "measure"), "operations.describing"),
    **dict.fromkeys(("connect", "serve"), "operations.serving"),
    **dict.fromkeys(("Extent", "Extents"), "extents"),
    "Image": "image",
    "Layer": "layers",
    "json_schema": "result_schema",
    "Policy": "policy",
    **dict.fromkeys(("check", "explain", "explain_guest", "info", "info_chain", "structures"), "inspection"),
    **dict.fromkeys(("CheckResult", "Finding"), "check_result"),
    "Explanation": "explanation",
    **dict.fromkeys(("ImageInfo", "Snapshot"), "results"),
    "Graph": "root",
    "tree": "node_tree",
    "inspect": "verdict.examine",
    "Verdict": "verdict.result",
    "view": "operations.viewing",
    "Secret": "crypto.secret",
    **dict.fromkeys(("Budget", "Limits"), "limits"),
    **dict.fromkeys(
        (
            "BlockIOError",
            "Cancelled",
            "Closed",
            "CorruptImage",
            "FormatError",
            "LaminaError",
            "LimitExceeded",
            "Locked",
            "NotFound",
            "NotSupported",
            "OptionError",
            "OutOfRange",
            "PolicyError",
            "ReadOnly",
            "UnsupportedFeature",
        ),
        "errors",
    ),
}

__all__ = [
    "BenchResult",
    "BlockIOError",
    "Budget",
    "CancelEvent",
    "Cancelled",
    "CheckResult",
    "Closed",
    "CommitResult",
    "CompactResult",
    "CompareResult",
    "ConvertResult",
    "CopyResult",
    "CorruptImage",
    "Detection",
    "Explanation",
    "Extent",
    "Extents",
    "Finding",
    "FlattenResult",
    "FormatError",
    "Graph",
    "Image",
    "ImageInfo",
    "LaminaError",
    "Layer",
    "LimitExceeded",
    "Limits",
    "Locked",
    "MeasureResult",
    "NotFound",
    "NotSupported",
    "OptionError",
    "OutOfRange",
    "Policy",
    "PolicyError",
    "Progress",
    "Range",
    "ReadOnly",
    "RebaseResult",
    "ResizeResult",
    "Secret",
    "Snapshot",
    "UnsupportedFeature",
    "Verdict",
    "__version__",
    "bench",
    "check",
    "commit",
    "compact",
    "compare",
    "connect",
    "convert",
    "copy",
    "create",
    "detect",
    "diff",
    "explain",
    "explain_guest",
    "flatten",
    "info",
    "info_chain",
    "inspect",
    "json_schema",
    "map",
    "measure",
    "open",
    "probe",
    "rebase",
    "resize",
    "serve",
    "structures",
    "tree",
    "view",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
