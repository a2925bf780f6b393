"""No code asks a driver what it has: the contracts declare it (`node.py`, `format.py`), and a default refuses.

Every `hasattr` and `getattr` in the package is listed here with what it is for, or looks into a module of the system. Read
from the source with `ast`; nothing of Lamina is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent.parent / "src" / "lamina"

#: Modules of the standard library, asked for what only some systems, or some versions of Python, have.
SYSTEM = {
    "ctypes.CDLL(None)",
    "errno",
    "fcntl",
    "libc",
    "mmap",
    "os",
    "select",
    "signal",
    "socket",
    "ssl",
    "sys",
    "threading",
}
SYSTEM |= {"socket.socket"}

#: Attributes that are asked for by a fixed name, and of what. None is one that a driver may have or not.
NAMES = {
    "FAILURE": "a module of the command line: its exit status for errors",
    "WRONG_USAGE": "a module of the command line: its exit status for wrong usage, if that is another",
    "is_set": "an argument of a caller: whether it is an event",
    "__index__": "a value: whether it is an integer",
    "errno": "an exception of any class",
    "reason": "an exception of ssl",
    "verify_code": "an exception of ssl",
    "verify_message": "an exception of ssl",
    "st_blocks": "a status of os.stat, which has it on some systems",
    "number": "an interrupt: the signal that a handler may have noted",
    "__notes__": "an exception",
    "buffer": "a stream that something else may have replaced",
    "funcargs": "an item of pytest",
    "__slots__": "any object, whose locks are renewed after a fork",
    "__dict__": "any object, whose locks are renewed after a fork",
    "after_fork": "any object, whose locks are renewed after a fork",
    "to_json": "a type: whether it is that of a result",
    "_fields": "a type: the fields of a named tuple",
    "__dataclass_fields__": "a type: the fields of a dataclass",
    "__name__": "a type",
    "close": "the result of a function, or an iterator, of any kind",
    "abandon_all": "a module that may not be imported",
}

#: The text of calls with a name that is computed, and what it is.
COMPUTED = {
    "getattr(import_module(f'.{home}', __name__), name)": "public names that are imported when they are first used",
    "getattr(import_module(f'{__name__}.{home}'), name)": "public names that are imported when they are first used",
    "getattr(import_module(f'.{_HOMES[name]}', __name__), name)": "public names that are imported when they are first used",
    "getattr(import_module(__package__), name, None)": "a public name that a caller gives as text",
    "getattr(import_module(module), attribute, None)": "the registry: the class that an entry names",
    "getattr(self, name)": "fields of the same object",
    "getattr(other, name)": "columns of extents",
    "getattr(piece, name)": "columns of extents",
    "getattr(below, name)": "members of Limits",
    "getattr(target, name)": "fields of an NBD address",
    "hasattr(self, f.name)": "fields of a header",
    "getattr(self, f.name)": "fields of a header",
    "getattr(args, name)": "options of the command line",
    "getattr(args, letter)": "options of the command line",
    "hasattr(Option, f'_read_{type}')": "the types of options",
    "getattr(self, f'_read_{self.type}')": "the types of options",
    "getattr(image, method)": "a test harness: the method of Image that a test names",
    "getattr(_errno, text, None)": "an error number by its name",
    "getattr(context, method, None)": "what this version of ssl has",
    "getattr(thing, name, None)": "any object, whose locks are renewed after a fork",
}


def is_known(call: ast.Call) -> bool:
    asked = call.args[1]
    if isinstance(asked, ast.Constant):
        return asked.value in NAMES
    return ast.unparse(call) in COMPUTED


def probes(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each call of `hasattr` or `getattr` that is not listed above."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("hasattr", "getattr"):
            continue
        if ast.unparse(node.args[0]) not in SYSTEM and not is_known(node):
            yield node.lineno, ast.unparse(node)


def test_no_driver_is_asked_what_it_has() -> None:
    found = [
        f"{file.relative_to(PACKAGE)}:{line}: {text}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for line, text in probes(file.read_text())
    ]
    words = "declare it in the contract, with a default that refuses; if it is no driver that is asked, list it above"
    assert not found, "\n".join([words, *found])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("check = getattr(node, 'check', None)", ["getattr(node, 'check', None)"]),
        ('if hasattr(kind, "create"): pass', ["hasattr(kind, 'create')"]),
        ("getattr(os, 'O_PATH', 0)", []),
        ("node.check()", []),
    ],
)
def test_what_counts_as_a_probe(source: str, found: list[str]) -> None:
    assert [text for _, text in probes(source)] == found
