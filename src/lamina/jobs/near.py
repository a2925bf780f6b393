"""How near is near: stored bytes that are read together, zeros between them included. Used by every job that reads."""

from __future__ import annotations

from ..limits import KIB

#: Stored bytes that lie no further apart than this, in bytes, are read with one request, and the zeros between them are found
#: again: a request of its own takes longer than so many bytes, from a file as over a network.
NEAR = 16 * KIB
