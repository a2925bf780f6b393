"""A warning about the backing file of a new image: whether the default for references grants it."""

from __future__ import annotations

import os
import sys

from ..errors import LaminaError, PolicyError, printable
from ..policy import Policy


def warn_where_refused(image: str, backing: str) -> None:
    """Print a warning if the new `image` names a `backing` file that the default (`Policy.default`) does not grant, with the
    option that grants it. Other problems of that file are not checked."""
    try:
        found = Policy.default().open_reference(backing, referrer=os.path.realpath(image))
    except PolicyError as error:
        hint = f"; {error.hint}" if error.hint else ""
        text = f"warning: the new image needs a grant to be opened: {error.message}{hint}"
        sys.stderr.write(f"lamina: {printable(text)}\n")
    except LaminaError:
        return
    else:
        os.close(found.fd)
