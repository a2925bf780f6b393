"""How the error that ends a command is told: one line for people, an object for programs, and a traceback on request."""

from __future__ import annotations

import errno as codes
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ..errors import LaminaError, command_hint
from . import program
from .streams import drop, print_error


def wants_json(words: Sequence[str]) -> bool:
    """Whether the words of a command line ask for JSON (--output json)."""
    words = words[: words.index("--")] if "--" in words else words
    return "--output=json" in words or ("--output", "json") in pairwise(words)


def without_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """These words without --debug, and whether it was there. What follows `--` are names."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    return [*kept, *words[end:]], len(kept) < end


def tell(error: LaminaError | OSError, words: Sequence[str], *, debug: bool) -> None:
    """Tell on standard error why the command with these words failed."""
    if debug:
        import traceback

        traceback.print_exception(error)
    if not (program.current.errors_as_json and wants_json(words)):
        print_error(text_of(error))
        return
    import json

    try:
        sys.stderr.write(json.dumps({"error": describe(error)}, indent=4) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        drop(sys.stderr)


def text_of(error: BaseException) -> str:
    """The error in the words of the command line."""
    return error.command_text() if isinstance(error, LaminaError) else str(error)


def describe(error: LaminaError | OSError) -> dict[str, Any]:
    """The error as JSON shows it: `type` (the class), `message`, and what is known of `errno` (ENOENT), `path`, `node`,
    `operation`, `offset`, `length` and `hint`."""
    found: dict[str, Any] = {"type": type(error).__name__}
    if isinstance(error, LaminaError):
        found["message"] = error.message
        state = {name: vars(error)[name] for name in ("path", "node", "operation", "offset", "length", "hint")}
        state["hint"] = command_hint(error.hint)
        found |= {name: value for name, value in state.items() if value is not None}
    else:
        found["message"] = os.strerror(error.errno) if error.errno else str(error)
        if error.filename is not None:
            found["path"] = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
    if error.errno is not None and error.errno in codes.errorcode:
        found["errno"] = codes.errorcode[error.errno]
    return found


def log_everything() -> None:
    """Log what Lamina does on standard error."""
    import logging

    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s: %(message)s")
