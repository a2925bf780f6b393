"""Options nobody would write: graphs drawn from the schemas of all drivers, and command lines drawn from all parsers.

Run as a program, in a folder of its own that it may fill: `python -m tests.option_words graphs|lines SEED COUNT`. Each must
end in success or in a LaminaError, soon; what ends otherwise is printed, once for each place. No name that is drawn has a
slash, so nothing outside the folder can be touched.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import lamina
from lamina import clock, registry
from lamina.cli.arguments import Parser
from lamina.cli.failure import wants_json
from lamina.cli.io.commands import COMMANDS as IO_COMMANDS
from lamina.cli.main import COMMANDS, main
from lamina.errors import LaminaError
from lamina.options import parse_size
from lamina.schema import Option, Schema

SLOW = {str(rate) for rate in range(1, 512)}
LIMIT = 20.0  #: seconds after which one case counts as hanging
MIB = 1 << 20

NAMES = ["disk", "image", "missing", "folder", "new", "", "a\udcffb", "x" * 300, "\n", "-x", "disk:1"]
#: Only a library call can have these: no command line has a NUL, nor half a character but from `json:`.
WORSE_NAMES = ["a\0b", "\0", "\ud800", "\ud800x"]
TEXTS = [
    "0",
    "1",
    "-1",
    "512",
    "4k",
    "64k",
    "1M",
    "8E",
    "7E",
    "0x10",
    "1_0",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "5%",
    "1:0",
    "0:0",
    "1:100",
    "on",
    "off",
    "yes",
    "help",
    "?",
    "=",
    "-",
    "--",
    "EIO",
    "ENOSUCH",
    "read",
    "write",
    "0-1",
    "1-0",
    "0-",
    "5-5,",
    "none",
    "any",
    "raw",
    "qcow2",
    "vmdk",
    "json",
    "human",
    "list:",
    "beneath:",
    "beneath:.",
    "same-dir",
    "same-dir:read-only",
    "a=b",
    "cluster_size=1M",
    "cluster_size=1",
    "size=-1",
    "backing_file=disk",
    "backing_fmt=raw",
    "compat=v2",
    "base:allocation",
]
TEXTS += ["", "9" * 30, "9" * 5000, "a" * 10000, "\u0663", "\udcff", "%s%n", "[]", "{}"]
NUMBERS = [0, 1, 2, -1, 5, 512, 4096, MIB, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(2**63)]
COMMAND_NAMES = [
    *NAMES,
    "json:{}",
    'json:{"driver":"raw","file":"disk"}',
    'json:{"driver":"memory","size":1048576}',
    "json:[",
    "json:" + "[" * 5000,
    'json:{"a":"\\ud800"}',
    'json:{"filename":"\\ud800"}',
    'json:{"driver":"raw","file":{"filename":"\\ud800"}}',
    "null-co://",
    "null:?size=1G",
    "null:?size=9E",
    "blkdebug::disk",
    "blkdebug:missing:image",
    "blkverify:disk:disk",
    "file:disk",
    "driver=raw,file.filename=disk",
    "driver=qcow2,file.filename=image",
    "driver=blkdebug,image=disk,align=4k",
    "nbd:unix:missing",
    "driver=delay,image=disk,read-ms=99999999999999999999",
    "driver=",
    "driver",
    "a=b=c",
    ",,",
    "=",
    "-",
    "driver=raw,file.filename=disk,discard.a=b",
]


class Graphs:
    """Options of nodes. About one in three can be opened."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.schemas: dict[str, Schema] = {name: registry.lookup(name).schema for name in registry.names()}

    def text(self) -> str:
        return self.rng.choice([*TEXTS, *NAMES, *WORSE_NAMES])

    def anything(self) -> Any:
        text = self.text()
        return self.rng.choice(
            [
                None,
                True,
                False,
                self.rng.choice(NUMBERS),
                float("nan"),
                float("inf"),
                0.5,
                text,
                [],
                {},
                [text],
                {text: text},
                {"driver": "memory"},
                b"x",
                [[[]]],
                {"a.b": 1, "a": 2},
                {"0": 1, "1": 2},
                {"1": 1},
                [None],
                {"driver": None},
            ]
        )

    def value(self, option: Option, depth: int) -> Any:
        if self.rng.random() < 0.04:
            return self.anything()
        if option.type == "node":
            return self.node(depth + 1)
        if option.type in ("size", "int"):
            bounds = [
                bound + step for bound in (option.minimum, option.maximum) if bound is not None for step in (-1, 0, 1)
            ]
            number = self.rng.choice([self.rng.choice(NUMBERS), *bounds, *option.choices])
            return str(number) if self.rng.random() < 0.3 and abs(number) < 10**40 else number
        if option.type == "bool":
            return self.rng.choice([True, False, "on", "off"])
        if option.type == "enum":
            return self.rng.choice([*option.choices, "x"])
        if option.type == "str":
            return self.text()
        if option.type == "list" and option.items is not None:
            return [self._item(option.items, depth) for _ in range(self.rng.choice([0, 1, 1, 2, 3]))]
        if isinstance(option.items, Schema):
            return self.group(option.items, depth)
        return self.anything()

    def _item(self, items: Schema | Option, depth: int) -> Any:
        return self.group(items, depth) if isinstance(items, Schema) else self.value(items, depth)

    def group(self, schema: Schema, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for option in schema.options:
            # A request that hangs until a test lets it go on does what it says.
            if option.name != "hang" and self.rng.random() < (0.97 if option.required else 0.3):
                value = self.value(option, depth)
                if schema.driver == "throttle" and str(value) in SLOW:
                    continue  # so does a request that may take minutes
                found[self.rng.choice([option.name, *option.aliases])] = value
        if self.rng.random() < 0.03:
            found[self.text()] = self.anything()
        return found

    def node(self, depth: int = 0) -> Any:
        if depth > 3 or self.rng.random() < 0.25:
            return self.rng.choice(
                [
                    {"driver": "memory", "size": MIB},
                    {"driver": "null", "size": MIB},
                    {"driver": "file", "filename": "disk"},
                    {"driver": "qcow2", "file": {"driver": "file", "filename": "image"}},
                    "disk",
                    "image",
                    {"driver": "raw", "file": {"driver": "memory", "size": MIB}},
                ]
            )
        name = self.rng.choice(list(self.schemas))
        if name == "nbd":
            return {"driver": "nbd", "path": self.rng.choice(NAMES), "export": self.text()}
        found = {"driver": name, **self.group(self.schemas[name], depth)}
        for key, values in (
            ("read-only", ["on", "off", True]),
            ("snapshot", ["on", True]),
            ("detect-zeroes", ["on", "unmap"]),
            ("discard", ["unmap", "ignore"]),
            ("node-name", ["a"]),
            ("force-share", ["on"]),
        ):
            if self.rng.random() < 0.05:
                found[key] = self.rng.choice([*values, self.anything()])
        return found

    def use(self, spec: Any) -> None:
        """Open the graph, and ask a few things of it."""
        format = self.rng.choice([None, None, "probe", "raw", "qcow2"])
        with lamina.open(spec, read_only=self.rng.random() < 0.5, format=format) as image:
            requests: list[Callable[[], Any]] = [
                lambda: image.read(0, min(512, image.size)),
                lambda: image.write(0, b"x" * 512),
                lambda: image.zero(0, 4096),
                lambda: image.discard(0, 4096),
                image.flush,
                lambda: image.truncate(MIB),
                lambda: len(image.extents(0, min(image.size, MIB))),
            ]
            for request in self.rng.sample(requests, 4):
                with contextlib.suppress(LaminaError):
                    request()


class Lines:
    """Command lines. `serve` and `bench` are left out: they would serve, and measure for long."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.parsers = {name: parser_of(name) for name in COMMANDS if name not in ("serve", "bench")}

    def text(self) -> str:
        return self.rng.choice([*TEXTS, *COMMAND_NAMES])

    def line(self) -> list[str]:
        name = self.rng.choice([*self.parsers, "io"])
        words = [name]
        actions = [a for a in self.parsers[name]._actions if a.option_strings and a.dest not in ("help", "cmd")]
        for action in self.rng.sample(actions, min(self.rng.choice([0, 0, 1, 1, 2, 3]), len(actions))):
            option = self.rng.choice(action.option_strings)
            if action.nargs == 0:
                words.append(option)
                continue
            value = str(self.rng.choice(list(action.choices))) if action.choices else self.text()
            if action.dest == "rate" and _is_slow(value):
                value = "8E"
            words += [f"{option}={value}"] if option.startswith("--") and self.rng.random() < 0.5 else [option, value]
        if name == "io":
            image, format = self.rng.choice([("disk", "raw"), ("image", "qcow2")])
            words += ["-f", format]
            for _ in range(4):
                words += ["-c", self.io_command()]
            return [*words, image]
        count = {"create": 2, "compare": 2, "convert": 2, "copy": 2}.get(name, 1)
        for _ in range(count if self.rng.random() < 0.9 else self.rng.randrange(4)):
            words.append(self.rng.choice(["disk", "image", self.rng.choice(COMMAND_NAMES)]))
        if name == "create" and self.rng.random() < 0.8:
            words[-1] = self.rng.choice(["1M", self.text()])
        if self.rng.random() < 0.1:
            words.insert(
                self.rng.randrange(1, len(words) + 1), self.rng.choice(["--", "--zzz", "-Z", "--hlep", self.text()])
            )
        return words

    def io_command(self) -> str:
        never = ("abort", "sigraise", "wait_break")  # these end the program, or wait, as they should
        command = self.rng.choice([one for one in IO_COMMANDS.values() if one.name not in never])
        words = [command.name]
        for letter in command.letters:
            if self.rng.random() < 0.2:
                words.append(f"-{letter}")
                if f"{letter}:" in command.accepts:
                    words.append(self._word())
        for _ in range(self.rng.choice([command.minimum] * 3 + [self.rng.randrange(4)])):
            words.append(self.rng.choice(["0", "512", "1k", "4k", "64k", "1M", "-1", self._word(), "9" * 19]))
        return " ".join(words)

    def _word(self) -> str:
        return self.text().replace(" ", "") or "x"

    def run(self, words: list[str]) -> str | None:
        """Run it. What is wrong with what it said, if anything."""
        out, err = _Quiet(), _Quiet()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(words)
        allowed = {"compare": (0, 1, 2), "check": (0, 1, 2, 3, 63), "inspect": (0, 1, 2)}.get(words[0], (0, 1))
        if status not in allowed:
            return f"exit status {status}"
        known = ("lamina: ", "error: ", "leak: ", "unreadable: ", "lamina serve: ")
        rest = [line for line in err.said().splitlines() if not line.startswith(known)]
        if rest and wants_json(words):
            try:
                return None if json.loads("\n".join(rest)).keys() == {"error"} else "an object that is no error"
            except ValueError:
                pass
        return f"a line of standard error that does not say whose it is: {rest[0][:80]!r}" if rest else None


class _Quiet(io.TextIOWrapper):
    """A stream that keeps what is said, over a descriptor that goes nowhere (`copy` writes to that of standard output)."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", errors="backslashreplace")

    def fileno(self) -> int:
        return NOWHERE

    def said(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined, no-any-return]


class _Caught(Exception):
    pass


def _is_slow(value: str) -> bool:
    """Whether a command with this rate limit would run for long."""
    try:
        return 0 < parse_size(value) < 1 << 30
    except LaminaError:
        return False


def parser_of(command: str) -> Parser:
    """The parser of a command."""
    parse = Parser.parse

    def catch(self: Parser, argv: list[str]) -> Any:
        raise _Caught(self)

    Parser.parse = catch  # type: ignore[method-assign]
    try:
        main([command])
    except _Caught as caught:
        found: Parser = caught.args[0]
        return found
    finally:
        Parser.parse = parse  # type: ignore[method-assign]
    raise AssertionError(f"{command} parses nothing")


def fresh() -> None:
    """The folder as it is for the first case."""
    for name in os.listdir():
        if name != "folder":
            (shutil.rmtree if os.path.isdir(name) and not os.path.islink(name) else os.unlink)(name)
    with open("disk", "wb") as file:
        file.write(b"\1" * MIB)
    lamina.create("image", "qcow2", MIB)


def patient(seconds: float) -> None:
    """Stands for the `sleep` of the clock: refuses what that refuses, and does not sleep."""
    if not 0 <= seconds < 9e9:
        raise OverflowError(f"the system cannot sleep for {seconds} s")


def overdue(*_: object) -> None:
    raise TimeoutError(f"it has not ended after {LIMIT} s")


def run(kind: str, seed: int, count: int) -> int:
    """Carry out `count` cases; how many places went wrong. Each is printed with the first case that led there."""
    rng = random.Random(seed)
    source: Graphs | Lines = Graphs(rng) if kind == "graphs" else Lines(rng)
    os.mkdir("folder")
    clock.sleep = patient
    signal.signal(signal.SIGALRM, overdue)
    wrong: set[object] = set()
    for number in range(count):
        if number % 100 == 0:
            fresh()
        case: Any = source.node() if isinstance(source, Graphs) else source.line()
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        try:
            place: object = source.use(case) if isinstance(source, Graphs) else source.run(case)
            said = str(place)
        except LaminaError as error:
            said = str(error)
            place = "more than one line" if len(said.splitlines()) > 1 else None
        except BaseException as error:  # noqa: BLE001 - that is what is looked for
            frames = [
                one for one in traceback.extract_tb(error.__traceback__) if f"{os.sep}lamina{os.sep}" in one.filename
            ]
            place = (type(error).__name__, frames[-1].filename, frames[-1].lineno) if frames else type(error).__name__
            said = repr(error)[:300]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if place is not None and place not in wrong:
            wrong.add(place)
            print(f"case {number}: {place!a}\n  {said!a}\n  {ascii(case)[:1000]}")
    return len(wrong)


NOWHERE = -1

if __name__ == "__main__":
    NOWHERE = os.open(os.devnull, os.O_RDWR)
    sys.stdin = io.TextIOWrapper(io.FileIO(NOWHERE, "r", closefd=False))
    sys.exit(1 if run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])) else 0)
