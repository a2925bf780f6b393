"""What is said of the backing file of a new image: whether the image would open by the default for references."""

from __future__ import annotations

import os
import sys

from ..errors import LaminaError, PolicyError, printable
from ..policy import Policy


def warn_where_refused(image: str, backing: str) -> None:
    """Say on standard error where the new `image` names a `backing` file that the default (`Policy.default`) does not grant,
    and which option does. What else may be wrong with that file is not looked at."""
    try:
        found = Policy.default().open_reference(backing, referrer=os.path.realpath(image))
    except PolicyError as error:
        hint = f"; {error.hint}" if error.hint else ""
        text = f"warning: the new image opens only with a grant: {error.message}{hint}"
        sys.stderr.write(f"lamina: {printable(text)}\n")
    except LaminaError:
        return
    else:
        os.close(found.fd)
