"""`lamina completion`: the words of Lamina for a shell, which completes them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from .arguments import Parser

_EXAMPLES = """
  lamina completion bash > ~/.local/share/bash-completion/completions/lamina
  lamina completion zsh > "${fpath[1]}/_lamina"
  lamina completion fish > ~/.config/fish/completions/lamina.fish
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        "completion", "Print a script with which a shell completes commands, options and their values.", _EXAMPLES
    )
    parser.add_argument("shell", choices=tuple(_SCRIPTS), help="the shell")
    args = parser.parse(argv)
    sys.stdout.write(_SCRIPTS[args.shell]())
    return 0


def _bash() -> str:
    from .described import options_of, parser_of
    from .main import COMMANDS

    cases: list[str] = []
    for command in COMMANDS:
        options = options_of(parser_of(command))
        cases.append(f"    {command}) options='{' '.join(flag for one in options for flag in one.flags)}' ;;")
    values: list[str] = []
    for command in COMMANDS:
        for one in options_of(parser_of(command)):
            if one.choices:
                patterns = "|".join(f"{command}:{flag}" for flag in one.flags)
                values.append(f"    {patterns}) words='{' '.join(one.choices)}' ;;")
    return f"""\
# bash completion for lamina; made by `lamina completion bash`
_lamina() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}"
  local options= words=
  COMPREPLY=()
  if [[ $COMP_CWORD -eq 1 ]]; then
    COMPREPLY=($(compgen -W '{" ".join(COMMANDS)} help --help --version' -- "$current"))
    return
  fi
  case "$command" in
    help) options='{" ".join(COMMANDS)}'; COMPREPLY=($(compgen -W "$options" -- "$current")); return ;;
{chr(10).join(cases)}
  esac
  case "$command:$previous" in
{chr(10).join(values)}
  esac
  if [[ -n $words ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$current"))
  elif [[ $current == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$current"))
  fi
}}
complete -o bashdefault -o default -F _lamina lamina
"""


def _zsh() -> str:
    from .described import options_of, parser_of
    from .main import COMMANDS

    def lines() -> Iterator[str]:
        for command in COMMANDS:
            yield f"    {command})"
            yield "      _arguments -s -S \\"
            for one in options_of(parser_of(command)):
                value = ""
                if one.value is not None:
                    what = f"({' '.join(one.choices)})" if one.choices else "_files"
                    value = f":{_zsh_text(one.value)}:{what}"
                excluded = " ".join(one.flags)
                for flag in one.flags:
                    yield f"        '({excluded}){flag}[{_zsh_text(one.help)}]{value}' \\"
            yield "        '*:file:_files'"
            yield "      ;;"

    commands = "\n".join(f"    '{name}:{_zsh_text(summary)}'" for name, (_, summary) in COMMANDS.items())
    return f"""\
#compdef lamina
# zsh completion for lamina; made by `lamina completion zsh`
_lamina() {{
  local -a commands
  commands=(
{commands}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  local command="${{words[2]}}"
  shift words
  (( CURRENT-- ))
  case "$command" in
    help) _describe command commands ;;
{chr(10).join(lines())}
  esac
}}
_lamina "$@"
"""


def _zsh_text(text: str) -> str:
    """`text` inside a quoted specification of `_arguments` or `_describe`."""
    for mark in "\\[]:":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("'", "'\\''")


def _fish() -> str:
    from .described import options_of, parser_of
    from .main import COMMANDS

    def lines() -> Iterator[str]:
        yield "# fish completion for lamina; made by `lamina completion fish`"
        for name, (_, summary) in COMMANDS.items():
            yield f"complete -c lamina -f -n __fish_use_subcommand -a {name} -d {_fish_text(summary)}"
        for command in COMMANDS:
            for one in options_of(parser_of(command)):
                words = [f"complete -c lamina -n '__fish_seen_subcommand_from {command}'"]
                for flag in one.flags:
                    words.append(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}")
                if one.value is not None:
                    words.append("-r")
                if one.choices:
                    words.append(f"-f -a {_fish_text(' '.join(one.choices))}")
                words.append(f"-d {_fish_text(one.help)}")
                yield " ".join(words)

    return "".join(f"{line}\n" for line in lines())


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SCRIPTS: dict[str, Callable[[], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
