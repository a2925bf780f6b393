"""The tool qemu-img: its command line, and its texts."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import OptionError, UnsupportedFeature, UsageError, printable
from ...inspection import info
from .grammar import IMG
from .tool import SECTOR, Tool

if TYPE_CHECKING:
    from ...check_result import CheckResult
    from ...extents import Extents
    from ...image import Image
    from ...job_results import MeasureResult
    from ...jobs.compare import Strict
    from ...results import ImageInfo, Snapshot
    from ...schema import Schema

_TRACE = ("-T", "--trace")


class ImageTool(Tool):
    """qemu-img."""

    name = "qemu-img"
    maps_only_files = True
    tells_latency = False
    last_option_counts = True
    strictness: Strict = "compression"
    smallest_disk = 1
    mismatch_unit = SECTOR

    def __init__(self, version: tuple[int, int]) -> None:
        super().__init__(version)
        self.maps_compression = version >= (8, 2)
        if version < (8, 0):
            self.snapshot_columns = "{:<10}{:<16}{:>9}{:>20}{:>13}{:>11}"
            self.hour_digits = 2
        else:
            self.snapshot_columns = "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}"
            self.snapshot_titles = ("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")

    def command_line(self, arguments: Sequence[str]) -> list[str]:
        words = list(arguments)
        while words[:1] and words[0].startswith("-"):
            word = words.pop(0)
            if word in ("-h", "--help"):
                self._help()
            elif word in ("-V", "--version"):
                self.show_version()
            elif word in _TRACE and words:
                words.pop(0)
            elif not word.startswith(("--trace=", "-T")):
                raise UsageError(f"there is no option {printable(word)}", hint="--help lists the commands")
        if not words:
            raise UsageError("no command is given", hint="qemu-img --help lists the commands")
        command, *rest = words
        if command not in IMG:
            raise UsageError(f"there is no command {printable(command)}", hint="qemu-img --help lists the commands")
        if command == "resize" and rest and "--" not in rest and self._is_size(rest[-1]):
            rest = [*rest[:-1], "--", rest[-1]]
        grammar = IMG[command]
        found = grammar.parse(rest)
        if found.last("help") is not None:
            self._help(command)
        return [command, *grammar.translate(found)]

    def adjust(self, command: str, args: Namespace) -> None:
        super().adjust(command, args)
        if command == "measure" and args.size is not None:
            args.size = self.disk_size(args.size)
        elif command == "snapshot" and args.delete is not None:
            args.delete = "snapshot.name=" + args.delete.replace(",", ",,")  # an id deletes nothing
        elif command == "convert":
            from .converting import adjust

            adjust(args)

    def _is_size(self, word: str) -> bool:
        """Whether the last word of `resize` is the size, even with a dash: version 7.2 takes any word for it."""
        return self.version < (9, 1) or (word.startswith("-") and word[1:2].isdecimal())

    def _help(self, command: str | None = None) -> None:
        from . import texts

        if command is None or self.version < (10,):
            self.write_version()
        sys.stdout.write(texts.img_help(command if self.version >= (10,) else None))
        raise SystemExit(0)

    # -- output

    def options_text(self, schema: Schema, *, amend: bool) -> str:
        from .texts import format_options

        return format_options(schema, amend=amend)

    def new_image(self, filename: str, format: str, options: Mapping[str, Any], *, quiet: bool) -> Mapping[str, Any]:
        from .creating import as_theirs, formatting

        if not quiet:
            sys.stdout.write(formatting(filename, format, options))
            sys.stdout.flush()  # before an error
        return as_theirs(filename, options)

    def created(self, filename: str, format: str, options: Mapping[str, Any]) -> str:
        return ""  # `new_image` has written it

    def described(self, found: Sequence[ImageInfo], *, json: bool, chain: bool) -> str:
        from . import describing

        return describing.as_json(found, self, chain) if json else describing.as_text(found, self)

    def checked(self, found: CheckResult, *, json: bool) -> str | None:
        from .ordered import dump

        if not json:
            return None
        told: dict[str, Any] = dict(found.to_json())
        del told["findings"]
        return dump(told)

    def measured(self, found: MeasureResult, *, json: bool) -> str | None:
        from .ordered import dump

        return dump(found.to_json()) if json else None

    def amending(self, image: Image, options: Mapping[str, Any]) -> None:
        described = info(image.filename, format=image.format, force_share=True)
        now = {"backing_file": described.backing_filename, "backing_fmt": described.backing_format}
        for key, value in now.items():
            if options.get(key) not in (None, value):
                raise OptionError("amend does not change the backing file", path=image.filename, hint="use rebase")

    def snapshots(self, image: Image, *, asked: bool) -> Sequence[Snapshot]:
        if not asked and self.version < (9, 1):
            return ()  # earlier versions list them only if asked
        try:
            return image.snapshots()
        except UnsupportedFeature:
            return ()

    def map_of_nothing(self, offset: int) -> str:
        compressed = ', "compressed": false' if self.maps_compression else ""
        words = '"depth": 0, "present": false, "zero": false, "data": false'
        return f'{{ "start": {offset}, "length": 0, {words}{compressed}}}'

    def mapped(self, image: Image, piece: Extents) -> Extents:
        from .mapping import as_theirs

        return as_theirs(image, piece)
