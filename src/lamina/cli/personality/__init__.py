"""The drop-in personality: under the names qemu-img, qemu-io and qemu-nbd, Lamina behaves as these programs do.

`assume` makes this process one of them. Each is a `program.Program` that translates the command line (`grammar` has the
options of the tools) and replaces texts; the commands of the package `cli` stay the implementation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ...errors import OptionError, printable
from .. import program

#: The versions of the tools whose behaviour can be chosen, by the value of LAMINA_COMPAT; the first is the default.
VERSIONS = {"7.2": (7, 2), "10.0": (10, 0)}
#: The names under which Lamina can be started.
NAMES = ("qemu-img", "qemu-io", "qemu-nbd")


def personality(name: str, environment: Mapping[str, str] = os.environ) -> program.Program:
    """The tool `name`. OptionError if LAMINA_COMPAT in `environment` is not a known version."""
    text = environment.get("LAMINA_COMPAT") or next(iter(VERSIONS))
    if text not in VERSIONS:
        raise OptionError(f"LAMINA_COMPAT is {printable(text)}", hint=f"it takes one of {', '.join(VERSIONS)}")
    if name == "qemu-img":
        from .img import ImageTool

        return ImageTool(VERSIONS[text])
    if name == "qemu-io":
        from .io import IoTool

        return IoTool(VERSIONS[text])
    if name == "qemu-nbd":
        from .nbd import NbdTool

        return NbdTool(VERSIONS[text])
    raise OptionError(f"there is no tool {printable(name)}", hint=f"the tools are {', '.join(NAMES)}")
