"""The program as which Lamina was started, and everything that its commands do differently under that name.

The methods of `Program` are the table of these differences, with the behaviour of `lamina`. The package `personality` derives
the reference tools from it; a command asks `program.current`, and knows no name of a program itself.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import printable

if TYPE_CHECKING:
    from ..check_result import CheckResult
    from ..extents import Extents
    from ..image import Image
    from ..job_results import MeasureResult
    from ..jobs.compare import Strict
    from ..nbd.inspect import Inspection
    from ..results import ImageInfo, Snapshot
    from ..schema import Schema


class Program:
    """`lamina` itself. A method that returns None leaves the matter to the command."""

    #: The first word of messages on standard error.
    name = "lamina"
    #: Whether progress (-p) is text on standard output, never a bar on the terminal.
    plain_progress = False
    #: Whether a command warns where the default policy for references would refuse a file.
    warns_of_references = True
    #: Whether an error is an object on standard error where --output json is given, and --debug shows tracebacks.
    errors_as_json = True
    #: Whether a passphrase in the list of processes is worth a warning.
    warns_of_secrets = True

    #: Whether `map` shows which extents are compressed, and refuses, for people, those that are not stored as they are.
    maps_compression = True
    maps_only_files = False
    #: Whether of an option that is given twice in -o the last one counts; else that is an error.
    last_option_counts = False
    #: What a strict comparison compares besides sizes and content.
    strictness: Strict = "status"
    #: The unit, in bytes, of the offset at which two images differ.
    mismatch_unit = 1
    #: The smallest size that `resize` accepts, in bytes.
    smallest_disk = 0
    #: Whether `bench` tells rates and latencies besides the time.
    tells_latency = True
    #: The prompt of `io`, and whether it is written where standard input is no terminal.
    prompt = "lamina> "
    prompts_always = False
    #: Whether the command `open` of `io` knows nothing of the options of the program.
    opens_with_own_options = False
    #: Whether `serve` tells on standard output that it is ready, and offers the depth of allocation without an option.
    announces = True
    server_name = "lamina serve"
    offers_depth_always = True
    #: The table of snapshots: its layout, the titles of its columns, and the digits of the hours of its clock.
    snapshot_columns = "{:<8}{:<20}{:>12}{:>21}{:>16}{:>11}"
    snapshot_titles = ("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
    hour_digits = 4

    def command_line(self, arguments: Sequence[str]) -> list[str]:
        """The command line of `lamina` (a command, then its arguments) for that of this program."""
        return list(arguments)

    def adjust(self, command: str, args: Namespace) -> None:
        """Change the parsed arguments of a command before it runs."""

    def usual_options(self) -> Mapping[str, Any]:
        """Options of all nodes that the program opens, where a driver has them (`graph.usual`)."""
        return {}

    def disk_size(self, size: int) -> int:
        """The size of a new disk that is to have at least `size` bytes."""
        return size

    def options_text(self, schema: Schema, *, amend: bool) -> str | None:
        """The text of `-o help` about the options of a new image, or of one that is amended."""
        return None

    def new_image(self, filename: str, format: str, options: Mapping[str, Any], *, quiet: bool) -> Mapping[str, Any]:
        """The options with which `create` makes an image; `options` are those that the user gave."""
        return options

    def created(self, filename: str, format: str, options: Mapping[str, Any]) -> str | None:
        """The text of `create` about a new image."""
        return None

    def described(self, found: Sequence[ImageInfo], *, json: bool, chain: bool) -> str | None:
        """The text of `info`."""
        return None

    def checked(self, found: CheckResult, *, json: bool) -> str | None:
        """The text of `check` on standard output."""
        return None

    def measured(self, found: MeasureResult, *, json: bool) -> str | None:
        """The text of `measure`."""
        return None

    def amending(self, image: Image, options: Mapping[str, Any]) -> None:
        """Raise OptionError for options that `amend` does not change."""

    def snapshots(self, image: Image, *, asked: bool) -> Sequence[Snapshot]:
        """The snapshots that `snapshot` lists; `asked`: whether the option -l asks for them."""
        return image.snapshots()

    def map_of_nothing(self, offset: int) -> str:
        """The row of a map of no bytes, at `offset`, if there is one."""
        return ""

    def exports(self, found: Sequence[Inspection]) -> str | None:
        """The text of `info --list`."""
        return None

    def mapped(self, image: Image, piece: Extents) -> Extents:
        """A part of the map of an image as `map` shows it."""
        return piece


current: Program = Program()


def tell(text: str) -> None:
    """Print a line on standard error after the name of the program."""
    sys.stderr.write(f"{current.name}: {printable(text)}\n")
