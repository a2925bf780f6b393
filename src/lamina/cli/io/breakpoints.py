"""The commands that stop requests at an event and resume them: break, wait_break, resume, remove_break.

They use the first `blkdebug` node below the image. A request stops in its own thread, while further commands run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import NotSupported, OptionError
from .session import Session

if TYPE_CHECKING:
    from ...filters.blkdebug.rules import Rules

Flags = dict[str, list[str]]

#: Seconds that `resume` and `remove_break` wait for a request to stop at its breakpoint.
_STOP_TIMEOUT = 1.0
_POLL_INTERVAL = 0.01


def set_break(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    event, tag = operands
    rules = _rules(session)
    commands = threading.get_ident()

    def tell(what: str, tag: str) -> None:
        if what == "Suspended" and threading.get_ident() == commands:
            raise OptionError(
                f"this request would stop at {tag!r}, and no further command could resume it",
                hint="use aio_read or aio_write",
            )
        # Exactly the text of qemu-io, for which scripts wait.
        session.output.say(f"blkdebug: {what} request '{tag}'")
        session.output.flush()

    rules.tell = tell
    rules.add_break(event, tag)
    session.rules = rules
    return True


def wait_break(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    rules, tag = _rules(session), operands[0]
    session.output.flush()
    while not rules.wait_break(tag, _POLL_INTERVAL):
        # In this order, since a request may end between the two queries.
        sleeping = rules.sleeping
        if session.running() <= sleeping and not rules.wait_break(tag, 0):
            raise OptionError(f"no request in progress can stop at {tag!r}", hint="start one with aio_write")
    return True


def resume(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    rules, tag = _rules(session), operands[0]
    _let_arrive(session, rules, tag)
    if not rules.resume(tag):
        raise OptionError(f"no request is stopped at {tag!r}", hint="wait_break TAG waits for one")
    return True


def remove_break(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    rules, tag = _rules(session), operands[0]
    _let_arrive(session, rules, tag)
    if not rules.remove_break(tag):
        raise OptionError(f"there is no breakpoint {tag!r}, and no request is stopped there")
    return True


def _rules(session: Session) -> Rules:
    from ...filters.blkdebug import Blkdebug

    node = session.image.node
    while not isinstance(node, Blkdebug):
        child = node.children.get("image") or node.children.get("file")
        if child is None:
            raise NotSupported(
                "breakpoints need a blkdebug node", path=session.image.filename, hint="open blkdebug::FILE"
            )
        node = child.node
    return node.rules


def _let_arrive(session: Session, rules: Rules, tag: str) -> None:
    """Wait for a request of an earlier command that has not yet reached its breakpoint, for a limited time."""
    end = time.monotonic() + _STOP_TIMEOUT
    while not rules.wait_break(tag, 0) and session.running() > rules.sleeping and time.monotonic() < end:
        rules.wait_break(tag, _POLL_INTERVAL)
