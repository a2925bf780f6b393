"""The common arguments of commands: names and options of images, and the notation of values."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import OptionError, UnsupportedFeature, UsageError, command_hint
from ..limits import DEFAULT_BUDGET, Budget
from ..options import HELP, asks_for_help, clip, parse_keyval, parse_seconds, parse_size, shown
from . import program
from .schema_text import print_driver
from .schema_text import print_schema as print_schema  # where commands look for it
from .screen import columns

if TYPE_CHECKING:
    from ..graph import Spec
    from ..image import Image
    from ..node import Node
    from ..policy import Policy

#: The longest time in an option, in seconds: the timeouts of the system have no larger values.
LONGEST = 1_000_000
#: The most connections to one server.
MOST_CONNECTIONS = 16
#: The cache modes of the reference tools, and those in which nothing is reported as written before it is on stable storage.
CACHE_MODES = ("none", "writeback", "writethrough", "directsync", "unsafe", "off")
DURABLE_MODES = ("writethrough", "directsync")
#: The name of the value of an option that names a format.
FORMAT = "FMT"
#: Whether a parser that is about to parse raises `Described` in place of that.
describing = False
#: Options of commands that set an option of all storage that has it.
_OF_STORAGE = {"timeout": "timeout", "connections": "connections", "reconnect": "reconnect-delay"}


class Described(Exception):
    """Raised by a parser that has all its arguments, while `describing`."""

    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """The parser of one command. Options may stand anywhere between names. Mistakes raise UsageError."""

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"lamina {command}",
            description=description,
            epilog=f"examples:\n{examples.rstrip()}",
            formatter_class=_Help,
            allow_abbrev=False,
        )
        self._command = command
        self._names: dict[str, str] = {}
        #: Whether a number with a sign (-5G) as the last word is no option.
        self.signed_last = False
        self._cache_modes: list[str] = []
        # Python accepts numbers that Lamina does not (5,000 digits, nan, 1_0).
        self.register("type", int, _whole)
        self.register("type", float, _seconds)

    def error(self, message: str) -> NoReturn:
        for stand_in, name in self._names.items():
            message = message.replace(stand_in, name)
        near = self._nearest(message)
        message = message if len(message) <= 1000 else f"{message[:1000]}..."
        shows = f"lamina {self._command} --help lists the options"
        raise UsageError(f"{self._command}: {message}", hint=f"did you mean {near}? {shows}" if near else shows)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """The parsed `argv`. All words after a `--` are names, even with a leading dash."""
        if describing:
            raise Described(self)
        if self.signed_last and "--" not in argv and argv and argv[-1][:1] == "-" and argv[-1][1:2].isdecimal():
            argv = [*argv[:-1], "--", argv[-1]]
        end = argv.index("--") if "--" in argv else len(argv)
        self._refuse_unknown(argv[:end])
        # Stand-ins for these names begin with NUL: no option and no word of a command line does.
        self._names = names = {f"\0{number}\0": word for number, word in enumerate(argv[end + 1 :])}
        options = argv[:end]
        for number, word in enumerate(options):
            if word.endswith("=--") and word.startswith("--"):  # argparse drops a value of two dashes
                options[number] = word[:-2] + "\0\0"
                names["\0\0"] = "--"
        args = self.parse_intermixed_args([*options, *[name for name in names if name != "\0\0"]])
        for key, value in vars(args).items():
            if isinstance(value, str):
                setattr(args, key, names.get(value, value))
            elif isinstance(value, list):
                value[:] = [names.get(one, one) if isinstance(one, str) else one for one in value]
        if vars(args).get("object"):
            _name_secrets(args.object)
        for mode in (vars(args)[dest] for dest in self._cache_modes):
            if mode is not None and mode not in CACHE_MODES:
                # No wrong usage: `compare` tells the two apart by its exit status.
                from difflib import get_close_matches

                near = get_close_matches(mode[:64], CACHE_MODES, 1)
                hint = f"use {', '.join(CACHE_MODES)}"
                raise OptionError(
                    f"there is no cache mode {shown(mode)}", hint=f"did you mean {near[0]}? {hint}" if near else hint
                )
        program.current.adjust(self._command, args)
        said = {name: vars(args).get(dest) for dest, name in _OF_STORAGE.items()}
        said = {name: value for name, value in said.items() if value is not None} | dict(
            program.current.usual_options()
        )
        if said:
            from ..graph import usual

            usual.clear()
            usual.update(said)
        return args

    def _registry_get(self, registry_name: str, value: Any, default: Any = None) -> Any:
        found = super()._registry_get(registry_name, value, default)
        return _told(found) if registry_name == "type" and value is not None else found

    def _refuse_unknown(self, words: list[str]) -> None:
        """Report an unknown option first: argparse would report a missing argument, which is the consequence."""
        for word in words:
            name = word.partition("=")[0]
            if (
                word.startswith("-")
                and len(word) > 1
                and " " not in word
                and name not in self._option_string_actions
                and (word.startswith("--") or (word[:2] not in self._option_string_actions and not _is_number(word)))
            ):
                self.error(f"unrecognized arguments: {word}")

    def _nearest(self, message: str) -> str | None:
        """The option, or the value of an option, that the user probably meant, for an error message of argparse."""
        import re
        from difflib import get_close_matches

        known: list[str] = []
        word = ""
        if found := re.match(r"unrecognized arguments: (-[^\s=]+)", message):
            word = found[1]
            known = [
                name
                for action in self._actions
                if action.help is not argparse.SUPPRESS
                for name in action.option_strings
                if name.startswith("--")
            ]
        elif found := re.match(r"argument ([^:]+): invalid choice: '(.*)' \(choose from ", message):
            word = found[2]
            actions = [action for action in self._actions if found[1] == "/".join(action.option_strings)]
            known = [str(choice) for action in actions for choice in action.choices or ()]
        near = get_close_matches(word[:64], known, 1)
        return near[0] if near else None

    def add_format(self, *flags: str, dest: str, help: str) -> None:
        self.add_argument(*flags, dest=dest, metavar=FORMAT, help=help)

    def add_access(self) -> None:
        """Add the options that concern the opening of images."""
        group = self.add_argument_group("opening images")
        group.add_argument(
            "--image-opts", action="store_true", help="FILE is a list of options: driver=qcow2,file.filename=disk.qcow2"
        )
        group.add_argument(
            "-U", "--force-share", action="store_true", help="open an image that another program has open for writing"
        )
        self.add_timeout(group)
        self.add_references(group)

    def add_timeout(self, group: argparse._ArgumentGroup | None = None) -> None:
        """Add --timeout, for the option `timeout` of storage."""
        (group or self).add_argument(
            "--timeout",
            metavar="SECONDS",
            type=_timeout,
            help="seconds without progress after which a server counts as lost (default: 60, and 600 during flush, trim and "
            "zero requests; 0: no limit)",
        )

    def add_connections(self, *flags: str, default: int | None, help: str) -> None:
        """Add the option `connections` of storage."""
        self.add_argument(*flags, dest="connections", metavar="NUMBER", type=_connections, default=default, help=help)

    def add_reconnect(self, *, default: int) -> None:
        """Add --reconnect, for the option `reconnect-delay` of storage."""
        self.add_size(
            "--reconnect", metavar="SECONDS", default=default,
            help=f"time to wait for the reconnection of a lost connection (default: {default}); 0: the loss is an error",
        )  # fmt: skip

    def add_references(self, group: argparse._ArgumentGroup | None = None) -> None:
        where = group or self
        where.add_argument(
            "--references",
            metavar="POLICY",
            type=_policy,
            help="the files that may be opened because an image names them: none, same-dir (files in the directory of the "
            "image, except hidden ones), same-dir:read-only (the default if the format is given), "
            "beneath:DIR, list:FILE:FILE..., any",
        )
        self.add_limits(group)
        self.add_objects(group)

    def add_objects(self, group: argparse._ArgumentGroup | None = None) -> None:
        """The option that names secrets, for options of images (`encrypt.key-secret`)."""
        (group or self).add_argument(
            "--object",
            metavar="OBJDEF",
            action="append",
            help="a passphrase for encrypted images: secret,id=NAME,file=PATH; or fd=NUMBER, env=VARIABLE; format=base64; or "
            "credentials for servers: tls-creds-x509,id=NAME,endpoint=client,dir=FOLDER",
        )

    def add_limits(self, group: argparse._ArgumentGroup | None = None) -> None:
        """Add --limits, the `Budget` of the images that the command opens."""
        (group or self).add_argument(
            "--limits",
            metavar="LIMITS",
            type=_limits,
            default=DEFAULT_BUDGET,
            help="upper bounds on the cost of the opened images: chain-depth=FILES,memory=SIZE (of all tables that stay "
            "loaded),cache-bytes=SIZE,rows=NUMBER",
        )

    def add_progress(self) -> None:
        """Add -p and -q, for `terminal.Meter`."""
        self.add_argument("-p", "--progress", action="store_true", help="show progress")
        self.add_quiet()

    def add_quiet(self) -> None:
        self.add_argument("-q", "--quiet", action="store_true", help="print errors only")

    def add_max_output(self) -> None:
        self.add_size(
            "--max-output",
            metavar="SIZE",
            help="fail if the command would write more than this number of bytes of data (default: no limit); skipped zeros "
            "do not count",
        )

    def add_rate(self) -> None:
        """Add -r, a limit in bytes per second; 0 if it is not given."""
        self.add_size(
            "-r",
            "--rate",
            "--rate-limit",
            metavar="RATE",
            default=0,
            help="read at most this number of bytes per second, and write at most as many (20M; default: no limit)",
        )

    def add_cache(self, *flags: str, dest: str, written: bool, group: argparse._ArgumentGroup | None = None) -> None:
        """Add an option for a cache mode, which scripts always give. `written`: of an image that the command writes: the
        command flushes it at the end in `DURABLE_MODES`. Other modes have no effect: the page cache is always used, and what
        is flushed without the option is flushed in any mode."""
        self._cache_modes.append(dest)
        (group or self).add_argument(
            *flags,
            dest=dest,
            metavar="CACHE",
            help="none, writeback or unsafe, which have no effect; writethrough or directsync: flush it at the end"
            if written
            else "a cache mode of qemu-img, which has no effect: none, writeback, writethrough, directsync, unsafe",
        )

    def add_output(self) -> None:
        self.add_argument(
            "--output", choices=("human", "json"), default="human", help="format of the output (default: human)"
        )

    def add_size(self, *flags: str, **settings: Any) -> None:
        self.add_argument(*flags, type=parse_size, **settings)

    def add_later(self, *flags: str, metavar: str | None = None, group: Any = None) -> None:
        """Add an option of the reference tools that Lamina does not have yet. It is refused by name, not as an unknown
        one."""
        message = flags[-1] if " " in flags[-1] else None
        names = flags[:-1] if message else flags
        (group or self).add_argument(
            *names,
            action=_Later,
            nargs=None if metavar else 0,
            metavar=metavar,
            const=message or "it is not there yet",
            help=argparse.SUPPRESS,
        )


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=columns() - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """The description is filled; examples keep their lines."""
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


class _Later(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: object, option_string: str | None = None
    ) -> None:
        raise UnsupportedFeature(f"{option_string}: {self.const}")


def _is_number(word: str) -> bool:
    """Whether argparse takes `word`, which begins with a dash, for a negative number."""
    return word[1:].replace(".", "", 1).isdecimal()


def _told(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read` for argparse, which would replace the message of an OptionError by "invalid ... value"."""

    def tell(text: str) -> Any:
        try:
            return read(text)
        except OptionError as error:
            message = f"{error.message}; {command_hint(error.hint)}" if error.hint else error.message
            raise argparse.ArgumentTypeError(message.replace(text, clip(text)) if text else message) from error
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a valid value") from error

    return tell


def _timeout(text: str) -> float:
    return parse_seconds(text, "the timeout")


def _connections(text: str) -> int:
    number = parse_size(text)
    if not 1 <= number <= MOST_CONNECTIONS:
        raise OptionError(f"the number of connections must be from 1 to {MOST_CONNECTIONS}")
    return number


def _name_secrets(objects: Sequence[str]) -> None:
    from ..crypto import credentials
    from ..crypto.secret import named, parse_object

    named.clear()
    credentials.named.clear()
    for text in objects:
        if text.partition(",")[0].removeprefix("qom-type=") in credentials.KINDS:
            name, found = credentials.parse(parse_keyval(text, implied="qom-type"))
            if name in credentials.named:
                raise OptionError(f"two objects have the id {shown(name)}", hint="give each its own")
            credentials.named[name] = found
            continue
        name, secret, exposed = parse_object(text)
        if name in named:
            raise OptionError(f"two objects have the id {shown(name)}", hint="give each its own")
        named[name] = secret
        if exposed and program.current.warns_of_secrets:
            program.tell(f"the secret {name} can be read in the list of processes: use file=, fd= or env=")


def _policy(text: str) -> Policy:
    from ..policy import Policy

    return Policy.parse(text)


def _whole(text: str) -> int:
    if len(text) > 20 or not text.isascii() or not text.removeprefix("-").isdecimal():
        raise OptionError(f"{shown(text)} is not a whole number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text) if len(text) <= 40 and text.isascii() and "_" not in text else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value <= LONGEST:
        raise OptionError(f"{shown(text)} is not a number of seconds", hint=f"it takes 0 to {LONGEST}")
    return value


def _limits(text: str) -> Budget:
    names = [name.replace("_", "-") for name in Budget._fields if name != "max_output"]
    found: dict[str, int] = {}
    for key, value in parse_keyval(text).items():
        if key == "max-output":
            raise OptionError("--limits: the limit of written bytes has an option of its own", hint="use --max-output")
        if key not in names or not isinstance(value, str):
            raise OptionError(f"--limits: unknown limit {key}", hint=f"the limits are {', '.join(names)}")
        found[key.replace("-", "_")] = parse_size(value)
    if not found:
        raise OptionError("--limits: the value is empty", hint=f"the limits are {', '.join(names)}")
    return Budget(**found)


def format_options(texts: Sequence[str] | None) -> dict[str, Any] | None:
    """The options of repeated `-o a=b,c=d`, as text; None if one of them is `help`."""
    if any(asks_for_help(text) for text in texts or ()):
        return None
    found: dict[str, Any] = {}
    for text in texts or ():
        for key, value in parse_keyval(text, last_wins=program.current.last_option_counts).items():
            if key in found and not program.current.last_option_counts:
                raise OptionError(f"-o: {key} is given twice", hint="give it once")
            found[key] = value
    return found


def image_source(name: str, args: argparse.Namespace, format: str | None, *, image_opts: bool | None = None) -> Spec:
    """The source for `name` on the command line: the name itself, or with --image-opts the options in it."""
    if not (args.image_opts if image_opts is None else image_opts):
        return name
    if format is not None:
        raise OptionError("a format and --image-opts exclude each other", hint="write driver=FORMAT into the options")
    return image_options(name)


def image_options(text: str, *, last_wins: bool = False) -> dict[str, Any]:
    """The options of --image-opts. With the word `help` among them the options of their driver are printed, and the command
    ends (SystemExit)."""
    if asks_for_help(text):
        driver = parse_keyval(text, skip=HELP, last_wins=True).get("driver")
        if not isinstance(driver, str):
            raise OptionError("the options ask for help, and name no driver", hint="write driver=NAME,help")
        print_driver(driver)
        raise SystemExit(0)
    return parse_keyval(text, last_wins=last_wins)


def open_image(
    name: str,
    args: argparse.Namespace,
    format: str | None,
    *,
    image_opts: bool | None = None,
    read_only: bool = True,
) -> Image:
    """Open the image `name`. Without a format its format is detected by its magic."""
    from ..api import open

    source = image_source(name, args, format, image_opts=image_opts)
    image = open(
        source,
        format=format or "probe",
        read_only=read_only,
        references=args.references,
        budget=args.limits,
        force_share=args.force_share,
    )
    if args.force_share:
        tell_of_writers(image.node)
    return image


def open_writable(name: str, args: argparse.Namespace, format: str | None) -> Image:
    """As `open_image`, for a command that changes the image."""
    if args.force_share:
        raise OptionError("-U opens images that others write to, and this command changes the image", hint="omit -U")
    return open_image(name, args, format, read_only=False)


def tell_of_writers(top: Node) -> None:
    """As `warn_of_writers`, for the files beneath `top`, which was opened with -U."""
    from ..inspection import other_writers

    warn_of_writers(other_writers(top))


def warn_of_writers(names: Iterable[str]) -> None:
    """Print a warning that another program has these files open for writing. Reads of the command may mix several states of
    such a file."""
    for name in names:
        program.tell(
            f"warning: {name}: another program has it open for writing; the output may mix the content before and after a "
            "write"
        )
