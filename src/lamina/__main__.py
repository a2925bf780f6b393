"""`python -m lamina`: the command line."""

from __future__ import annotations

from .cli.entry import run

run()
