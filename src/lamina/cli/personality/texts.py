"""The help texts of the tools, in words of our own, and in the shape that scripts search for options and formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ... import registry
from .grammar import IMG, IO, NBD

if TYPE_CHECKING:
    from ...schema import Schema

#: The operands of the commands of qemu-img.
_OPERANDS = {
    "bitmap": "FILENAME BITMAP",
    "compare": "FILENAME1 FILENAME2",
    "convert": "FILENAME [FILENAME2 ...] OUTPUT_FILENAME",
    "create": "FILENAME [SIZE]",
    "dd": "[bs=BLOCK_SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
    "measure": "[FILENAME]",
    "resize": "FILENAME [+|-]SIZE",
}


def img_help(command: str | None) -> str:
    """The help of qemu-img, or of one of its commands."""
    names = [command] if command else list(IMG)
    rows = "".join(f"  {name} {IMG[name].summary()} {_OPERANDS.get(name, 'FILENAME')}\n" for name in names)
    if command:
        return f"usage: qemu-img\n{rows}\nThe options are those of `lamina {command} --help`.\n"
    return (
        "usage: qemu-img [-h | --help] [-V | --version] [-T | --trace PATTERN] COMMAND [OPTIONS] ...\n\n"
        f"Command syntax:\n{rows}\n"
        "Sizes are bytes, or have one of the suffixes k, M, G, T, P and E for powers of 1024.\n"
        "`lamina COMMAND --help` explains the options of a command, with examples.\n\n"
        f"Supported formats: {' '.join(_drivers())}\n"
    )


def io_help() -> str:
    """The help of qemu-io."""
    return f"Usage: qemu-io {IO.summary()} [FILE]\n\n`qemu-io -c help` lists the commands.\n"


def nbd_help() -> str:
    """The help of qemu-nbd."""
    return (
        f"Usage: qemu-nbd {NBD.summary()} FILE\n  or:  qemu-nbd -L [OPTIONS]\n\n"
        "`lamina serve --help` explains the options, with examples.\n"
    )


def format_options(schema: Schema, *, amend: bool) -> str:
    """The text of `-o help`: a title, then NAME=<TYPE> and a description in each line."""
    rows = []
    for name, kind, _, doc in sorted(schema.help()):
        type = {"size": "<size>", "int": "<num>", "on|off": "<bool (on/off)>"}.get(kind, "<str>")
        rows.append(f"  {f'{name}={type}':<22} - {doc}\n")
    if amend:
        return f"Amend options for '{schema.driver}':\n{''.join(rows)}"
    return f"Supported {schema.driver} options:\n{''.join(rows)}"


def _drivers() -> list[str]:
    """The names of all drivers, as the tool lists them."""
    return sorted(registry.names())
