"""Writes the manual pages in docs/man, from the parsers of the commands: `make docs`. A test holds both equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lamina.cli.described import groups_of, names_of, parser_of, statuses_of
from lamina.cli.main import COMMANDS
from lamina.version import __version__

FOLDER = Path(__file__).with_name("man")

_STATUS = """\
0 if the command has done its work, 1 after an error, unless the page of the command says otherwise. After a signal it is
128 plus the number of the signal. An error is one line on standard error."""

_ENVIRONMENT = (
    ("LAMINA_REFERENCES", "the policy for names inside images that applies where --references is not given"),
    ("LAMINA_DEBUG", "if set, tracebacks of errors are printed, as with --debug"),
)


def pages() -> Iterator[tuple[str, str]]:
    """(file name, content) of each page."""
    yield "lamina.1", _overview()
    for command, (_, summary) in COMMANDS.items():
        yield f"lamina-{command}.1", _page(command, summary)


def _overview() -> str:
    rows = [".TP\n" + f".BR lamina\\-{_text(name)} (1)\n{_text(summary)}" for name, (_, summary) in COMMANDS.items()]
    parts = [
        _head("lamina", "create, inspect, compare, convert and serve disk images"),
        ".SH SYNOPSIS\n.B lamina\n.I COMMAND\n[\\fIOPTIONS\\fR] ...",
        ".SH DESCRIPTION\nCommands and options have the names of \\fBqemu\\-img\\fR(1). Backing files and other files that "
        "an image names are opened only where a policy grants it.",
        ".SH COMMANDS\n" + "\n".join(rows),
        ".SH ENVIRONMENT\n" + "\n".join(f".TP\n.B {name}\n{_text(text)}" for name, text in _ENVIRONMENT),
        ".SH EXIT STATUS\n" + _text(_STATUS),
    ]
    return "\n".join(parts) + "\n"


def _page(command: str, summary: str) -> str:
    parser = parser_of(command)
    names = "".join(f" {_text(name)}" for name in names_of(parser))
    parts = [
        _head(f"lamina-{command}", summary),
        f".SH SYNOPSIS\n.B lamina {_text(command)}\n[\\fIOPTIONS\\fR]{names}",
        f".SH DESCRIPTION\n{_text(parser.description or '')}",
    ]
    for title, options in groups_of(parser):
        parts.append(f".SH {_text(title.upper())}")
        for option in options:
            flags = ", ".join(f"\\fB{_text(flag)}\\fR" for flag in option.flags)
            value = f" \\fI{_text(option.value)}\\fR" if option.value else ""
            parts.append(f".TP\n{flags}{value}\n{_text(option.help)}")
    examples = (parser.epilog or "").removeprefix("examples:\n").rstrip("\n")
    parts.append(f".SH EXAMPLES\n.nf\n{_text(examples)}\n.fi")
    statuses = "\n".join(f".TP\n{_text(status)}\n{_text(meaning)}" for status, meaning in statuses_of(command))
    parts.append(f".SH EXIT STATUS\n{statuses}")
    parts.append(".SH SEE ALSO\n.BR lamina (1)")
    return "\n".join(parts) + "\n"


def _head(name: str, summary: str) -> str:
    return (
        f'.\\" Made by `make docs` from the command line: do not edit.\n.TH {name.upper()} 1 "" "lamina {__version__}"\n'
        f".SH NAME\n{_text(name)} \\- {_text(summary)}"
    )


def _text(text: str) -> str:
    """`text` for roff: dashes that can be copied, and no line that begins a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in text.split("\n"))


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    made = dict(pages())
    for path in FOLDER.glob("*.1"):
        if path.name not in made:
            path.unlink()
    for name, content in made.items():
        (FOLDER / name).write_text(content)


if __name__ == "__main__":
    main()
