"""The tool qemu-io: its command line. Its commands and their output are those of `lamina io`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ...errors import UsageError
from .grammar import IO
from .tool import Tool


class IoTool(Tool):
    """qemu-io."""

    name = "qemu-io"
    prompt = "qemu-io> "
    prompts_always = True
    opens_with_own_options = True

    def command_line(self, arguments: Sequence[str]) -> list[str]:
        found = IO.parse(arguments)
        if found.last("help") is not None:
            from .texts import io_help

            sys.stdout.write(io_help())
            raise SystemExit(0)
        if found.last("version") is not None:
            self.show_version()
        if len(found.operands) > 1:
            raise UsageError("more than one image is named", hint="qemu-io --help lists the options")
        return ["io", *IO.translate(found)]
