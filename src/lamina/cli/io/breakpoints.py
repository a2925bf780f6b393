"""The commands that stop requests at an event, and let them go on: break, wait_break, resume, remove_break.

They speak to the first `blkdebug` below the image. A request that stops does so in its thread, while the commands go on.
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

#: Seconds that a request has to come to its breakpoint before a command that needs it there gives up.
_ON_ITS_WAY = 1.0
_LOOK_AGAIN = 0.01


def set_break(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    event, tag = operands
    rules = _rules(session)
    commands = threading.get_ident()

    def tell(what: str, tag: str) -> None:
        if what == "Suspended" and threading.get_ident() == commands:
            raise OptionError(
                f"this request would stop at {tag!r}, and no command could let it go on",
                hint="use aio_read or aio_write",
            )
        # To the letter what scripts wait for.
        session.output.say(f"blkdebug: {what} request '{tag}'")
        session.output.flush()

    rules.tell = tell
    rules.add_break(event, tag)
    session.rules = rules
    return True


def wait_break(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    rules, tag = _rules(session), operands[0]
    session.output.flush()
    while not rules.wait_break(tag, _LOOK_AGAIN):
        # The order matters: what ends between the two looks is no longer under way.
        sleeping = rules.sleeping
        if session.running() <= sleeping and not rules.wait_break(tag, 0):
            raise OptionError(f"no request is under way that could stop at {tag!r}", hint="begin it with aio_write")
    return True


def resume(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    rules, tag = _rules(session), operands[0]
    _let_arrive(session, rules, tag)
    if not rules.resume(tag):
        raise OptionError(f"no request is stopped at {tag!r}", hint="wait_break TAG waits until one is")
    return True


def remove_break(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    rules, tag = _rules(session), operands[0]
    _let_arrive(session, rules, tag)
    if not rules.remove_break(tag):
        raise OptionError(f"there is no breakpoint {tag!r}, and no request that stopped there")
    return True


def _rules(session: Session) -> Rules:
    from ...filters.blkdebug import Blkdebug

    node = session.image.node
    while not isinstance(node, Blkdebug):
        child = node.children.get("image") or node.children.get("file")
        if child is None:
            raise NotSupported(
                "requests stop only at a blkdebug", path=session.image.filename, hint="open blkdebug::FILE"
            )
        node = child.node
    return node.rules


def _let_arrive(session: Session, rules: Rules, tag: str) -> None:
    """A request that was begun by an earlier command may still be on its way to its breakpoint: give it a moment."""
    end = time.monotonic() + _ON_ITS_WAY
    while not rules.wait_break(tag, 0) and session.running() > rules.sleeping and time.monotonic() < end:
        rules.wait_break(tag, _LOOK_AGAIN)
