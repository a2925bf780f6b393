"""The commands that open and close the image, and those that pause, signal or abort the program."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace

from ... import clock
from ...errors import OptionError
from ...options import parse_keyval
from . import grammar
from .session import Session
from .target import AIO_MODES, CACHE_MODES, DISCARD_MODES, Target, choose, merged

Flags = dict[str, list[str]]

#: The maximum of `sleep`, in milliseconds.
_LONGEST = 86_400_000


def with_modes(target: Target, flags: Flags) -> Target:
    """`target` with the options -r -U -s -C -n -k -t -d -i, which the program and the command `open` have in common."""
    if "i" in flags:
        choose(AIO_MODES, "aio", flags["i"][-1])
    cache = "none" if "n" in flags else target.cache
    if "t" in flags:
        cache = choose(CACHE_MODES, "cache", flags["t"][-1])
    return replace(
        target,
        read_only=target.read_only or "r" in flags,
        force_share=target.force_share or "U" in flags,
        snapshot=target.snapshot or "s" in flags,
        copy_on_read=target.copy_on_read or "C" in flags,
        cache=cache,
        discard=choose(DISCARD_MODES, "discard", flags["d"][-1]) if "d" in flags else target.discard,
    )


def open_image(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    if not operands and "o" not in flags:
        raise OptionError("no image is named", hint="open FILE, or open -o driver=...")
    target = with_modes(session.default, flags)
    options = parse_keyval(",".join(flags.get("o", ())), last_wins=True) if "o" in flags else {}
    # The option -f of the program applies only to the image on its command line.
    session.open(replace(target, name=operands[0] if operands else None, options=options, format=None))
    return True


def close_image(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    if not session.is_open:
        raise OptionError("no image is open", hint="open one: open FILE")
    session.close()
    return True


def reopen_image(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    if "r" in flags and "w" in flags:
        raise OptionError("-r and -w exclude each other", hint="give one of them")
    if not session.is_open:
        raise OptionError("no image is open", hint="open one: open FILE")
    target = session.opened_as
    if "r" in flags or "w" in flags:
        target = replace(target, read_only="r" in flags)
    if "c" in flags:
        target = replace(target, cache=choose(CACHE_MODES, "cache", flags["c"][-1]))
    if "o" in flags:
        changes = parse_keyval(",".join(flags["o"]), last_wins=True)
        target = replace(target, options=merged(target.options, changes))
    session.reopen(target)
    return True


def sleep(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    milliseconds = grammar.integer(operands[0])
    if not 0 <= milliseconds <= _LONGEST:
        raise OptionError(f"cannot sleep for {milliseconds} milliseconds", hint=f"give 0 to {_LONGEST} (a day)")
    session.output.flush()
    clock.sleep(milliseconds / 1000)
    return True


def raise_signal(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    number = grammar.size(operands[0])
    session.output.flush()
    try:
        # Signal 0 is accepted, as by kill: it only checks that the process exists.
        os.kill(os.getpid(), number)
    except (OSError, OverflowError) as error:
        raise OptionError(f"there is no signal {number}", hint=f"give 1 to {max(signal.valid_signals())}") from error
    return True


def abort(session: Session, flags: Flags, operands: Sequence[str]) -> bool:
    session.output.flush()
    os.abort()
