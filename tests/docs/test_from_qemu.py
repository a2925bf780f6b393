"""The page for users of qemu-img is complete: what the peers have is in Lamina, or on the page."""

from __future__ import annotations

import re
import subprocess

from lamina import registry
from lamina.cli.described import options_of, parser_of
from lamina.cli.io.commands import COMMANDS as COMMANDS_OF_IO
from lamina.cli.main import COMMANDS
from tests.conftest import Qemu
from tests.docs.markdown import ROOT

PAGE = (ROOT / "docs" / "from-qemu.md").read_text()


def told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def row(of: str, name: str) -> str:
    """The row of the table in the section `of` that begins with `name`."""
    found = re.search(rf"^\| `{re.escape(name)}` \|.*$", section(of), re.MULTILINE)
    assert found, f"there is no row for {name}"
    return found[0]


def options(qemu: Qemu, command: str) -> set[str]:
    """The options of a command of qemu-img, in its own help (10.0) or in that of the program (7.2)."""
    help = told(qemu.peer.qemu_img, "--help")
    if "\nCommand syntax:\n" in help:  # one line for each command
        line = help.partition("\nCommand syntax:\n")[2].partition(f"  {command} ")[2].partition("\n")[0]
        return set(re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", line))
    rows = re.findall(r"^  (-.*)$", told(qemu.peer.qemu_img, command, "--help"), re.MULTILINE)
    return {flag for text in rows for flag in re.findall(r"(?:^|[ ,|(])(--?[a-zA-Z][\w-]*)", text)}


def test_the_options_of_each_command(qemu: Qemu) -> None:
    listed = re.findall(r"^\| `([a-z]+)` \|", section("Commands of qemu-img"), re.MULTILINE)
    theirs = [name for name in listed if re.search(rf"^  {name} ", told(qemu.peer.qemu_img, "--help"), re.MULTILINE)]
    assert theirs == listed
    for command in listed:
        found = options(qemu, command) - {"--progres"}  # a misprint of 10.0
        assert len(found) >= 1, command
        ours = {flag for option in options_of(parser_of(command)) for flag in option.flags}
        for flag in found - ours:
            assert f"`{flag}`" in row("Commands of qemu-img", command), f"{command} {flag}"


def test_all_commands_are_listed(qemu: Qemu) -> None:
    help = told(qemu.peer.qemu_img, "--help")
    part = help.partition("ommand syntax:\n")[2] or help.partition("specific help):\n\n")[2]
    names = re.findall(r"^  ([a-z]+)\b", part.partition("\n\n")[0], re.MULTILINE)
    assert len(names) >= 15
    for name in names:
        row("Commands of qemu-img", name)
    ours = set(COMMANDS) - set(names) - {"serve", "io", "shims"}
    assert set(re.findall(r"\[`([a-z]+)`\]", section("Commands of qemu-img").partition("Only Lamina")[2])) == ours


def test_the_commands_of_qemu_io(qemu: Qemu) -> None:
    names = set(re.findall(r"^(\w+) .*-- ", told(qemu.peer.qemu_io, "-c", "help"), re.MULTILINE))
    assert len(names) > 20
    for name in names - set(COMMANDS_OF_IO):
        assert f"`{name}`" in section("Commands of qemu-io")
    for name in set(COMMANDS_OF_IO) - names:
        assert f"`{name}`" in section("Commands of qemu-io")


def test_the_options_of_qemu_nbd(qemu: Qemu) -> None:
    program = qemu.peer.qemu_img.replace("qemu-img", "qemu-nbd")
    flags = re.findall(r"^ +(?:(-\w), )?(--[\w-]+)", told(program, "--help"), re.MULTILINE)
    assert len(flags) > 20
    ours = {flag for option in options_of(parser_of("serve")) for flag in option.flags} | {"--version"}
    for short, long in flags:
        if long not in ours:
            assert f"`{long}`" in section("Options of qemu-nbd"), long
            assert not short or f"`{short}`" in section("Options of qemu-nbd"), short


def test_the_drivers(qemu: Qemu) -> None:
    listed = re.search(r"Supported (?:image )?formats:(.*?)\n\n", told(qemu.peer.qemu_img, "--help"), re.DOTALL)
    assert listed
    ours = {name for one in registry.names() for name in (one, *registry.entry(one).aliases)}
    rows = re.findall(r"^\| [a-z ]+ \| (.*?) \| *(.*?) *\|$", section("Drivers"), re.MULTILINE)
    there, missing = (set(re.findall(r"`([^`]+)`", " ".join(part))) for part in zip(*rows, strict=True))
    for name in listed[1].split():
        assert (name in there) == (name in ours), name
        assert (name in missing) == (name not in ours), name
