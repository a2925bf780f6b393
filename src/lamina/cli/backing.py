"""A warning about the backing file of a new image: whether the default for references grants it."""

from __future__ import annotations

import os

from ..errors import LaminaError, PolicyError, command_hint
from ..policy import Policy
from . import program


def warn_where_refused(image: str, backing: str) -> None:
    """Print a warning if the new `image` names a `backing` file that the default (`Policy.default`) does not grant, with the
    option that grants it. Other problems of that file are not checked."""
    if not program.current.warns_of_references:
        return
    try:
        found = Policy.default().open_reference(backing, referrer=os.path.realpath(image))
    except PolicyError as error:
        hint = f"; {command_hint(error.hint)}" if error.hint else ""
        text = f"warning: the new image needs a grant to be opened: {error.message}{hint}"
        program.tell(text)
    except LaminaError:
        return
    else:
        os.close(found.fd)
