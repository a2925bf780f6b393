"""A new file beside the one that it is to replace, so that nobody sees half of what is written.

Ground floor. It stands for `tempfile`, whose import alone is a tenth of what a short command costs.
"""

from __future__ import annotations

import os


def open_beside(path: str) -> tuple[int, str]:
    """Make an empty file in the folder of `path`, under a name that nothing has: its descriptor, open for reading and
    writing, and its path; both are the caller's to put away. Nobody but its owner may open it. Raises OSError."""
    name = os.path.join(os.path.dirname(os.path.abspath(path)), f".lamina-{os.urandom(8).hex()}")
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), name
