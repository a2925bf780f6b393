"""The rules of `blkdebug`: injected errors, changes of state and breakpoints.

A `Rules` has a state (a number, initially 1), the rules of each event, the *active* injections, and the stopped requests.
Rules are applied in the order of QEMU's blkdebug:

- an event applies its rules in reverse order of their addition; injections are added before transitions;
- a rule applies if its state is 0 or equals the state before the event;
- the first injection that applies deactivates all active ones; all injections that apply become active, in the order of their
  definition. If none applies, the active injections stay active;
- a transition takes effect after all rules were applied; of several the first that was defined wins;
- a breakpoint that applies is removed, and after all rules were applied the request stops until another thread resumes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from errno import EIO
from typing import NamedTuple, TypeAlias

from ...errors import OptionError

EVENTS = (
    *("l1_update", "l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table", "l2_load", "l2_update"),
    *("l2_update_compressed", "l2_alloc_cow_read", "l2_alloc_write", "read_aio", "read_backing_aio", "read_compressed"),
    *("write_aio", "write_compressed", "vmstate_load", "vmstate_save", "cow_read", "cow_write", "reftable_load"),
    *("reftable_grow", "reftable_update", "refblock_load", "refblock_update", "refblock_update_part", "refblock_alloc"),
    *("refblock_alloc_hookup", "refblock_alloc_write", "refblock_alloc_write_blocks", "refblock_alloc_write_table"),
    *("refblock_alloc_switch_table", "cluster_alloc", "cluster_alloc_bytes", "cluster_free", "flush_to_os"),
    *("flush_to_disk", "pwritev_rmw_head", "pwritev_rmw_after_head", "pwritev_rmw_tail", "pwritev_rmw_after_tail"),
    *("pwritev", "pwritev_zero", "pwritev_done", "empty_image_prepare", "l1_shrink_write_table"),
    *("l1_shrink_free_l2_clusters", "cor_write", "cluster_alloc_space", "none"),
)
#: The kinds of requests to which a rule can apply, and the default.
KINDS = ("read", "write", "write-zeroes", "discard", "flush", "block-status")
USUAL_KINDS = KINDS[:-1]

_SECTOR = 512


class Injection(NamedTuple):
    """While active, a request of one of `kinds` that contains `sector` (None: any) fails with `errno`; 0: it passes, and
    later rules are not applied to it. `once`: the first matching request removes the rule. `immediately`: no other thread is
    scheduled before the request fails."""

    event: str
    state: int = 0
    kinds: tuple[str, ...] = USUAL_KINDS
    errno: int = EIO
    sector: int | None = None
    once: bool = False
    immediately: bool = False


class Transition(NamedTuple):
    """The event sets the state to `new_state`."""

    event: str
    state: int
    new_state: int


class Breakpoint(NamedTuple):
    """The next request that causes the event stops under the name `tag`."""

    event: str
    tag: str
    state: int = 0


Rule: TypeAlias = Injection | Transition | Breakpoint


class _Stop:
    """One breakpoint at which a request is stopped. A request continues when all of its stops are resumed."""

    __slots__ = ("request", "stopped", "tag")

    def __init__(self, tag: str, request: object) -> None:
        self.tag = tag
        self.request = request
        self.stopped = True


class Rules:
    """The rules of one node. Thread-safe."""

    def __init__(self, rules: Iterable[Injection | Transition] = ()) -> None:
        """Raises OptionError for a rule with an unknown event."""
        #: The active injections, in order. If it is empty, every request passes.
        self.active: list[Injection] = []
        #: A callback with the arguments "Suspended" or "Resuming" and the tag, called in the thread that stops or resumes. If
        #: it raises an error for "Suspended", the request raises that error instead of stopping.
        self.tell: Callable[[str, str], None] | None = None
        self._by_event: dict[str, list[Rule]] = {}  # in the order of application
        self._state = 1
        self._stops: list[_Stop] = []  # the latest last
        self._changed = threading.Condition()
        ordered = sorted(rules, key=lambda rule: isinstance(rule, Transition))
        for rule in ordered:
            self._add(rule)

    @property
    def state(self) -> int:
        return self._state

    def _add(self, rule: Rule) -> None:
        if rule.event not in EVENTS:
            from difflib import get_close_matches

            near = get_close_matches(rule.event[:64], EVENTS, 1)
            hint = (
                f"did you mean {near[0]}?" if near else f"such as read_aio, write_aio, l2_update ({len(EVENTS)} in all)"
            )
            raise OptionError(f"blkdebug has no event {rule.event[:64]!r}", hint=hint)
        self._by_event.setdefault(rule.event, []).insert(0, rule)

    # -- events and requests

    def fire(self, event: str) -> None:
        """Apply the rules of an event, in the thread of the request. Returns when the request is not stopped, or resumed."""
        if event not in self._by_event:
            return
        with self._changed:
            before, after = self._state, self._state
            fresh: list[Injection] = []
            stops: list[_Stop] = []
            for rule in tuple(self._by_event[event]):
                if rule.state not in (0, before):
                    continue
                if isinstance(rule, Injection):
                    fresh.insert(0, rule)
                elif isinstance(rule, Transition):
                    after = rule.new_state
                else:
                    self._remove(rule)
                    stops.append(_Stop(rule.tag, stops))
            if fresh:
                self.active = fresh
            self._state = after
            if stops:
                self._sleep(stops)

    def _sleep(self, stops: list[_Stop]) -> None:
        self._stops += stops
        try:
            for stop in stops:
                if self.tell is not None:
                    self.tell("Suspended", stop.tag)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not any(stop.stopped for stop in stops))
        finally:
            # After an interrupt the request is no longer stopped.
            self._stops = [stop for stop in self._stops if stop not in stops]

    def match(self, kind: str, offset: int, length: int) -> Injection | None:
        """The rule that fails this request; None if the request passes. The length of a flush is 0."""
        with self._changed:
            for rule in self.active:
                inside = rule.sector is None or (length > 0 and offset <= rule.sector * _SECTOR < offset + length)
                if inside and kind in rule.kinds:
                    if rule.once:
                        self.active = [one for one in self.active if one is not rule]
                        self._remove(rule)
                    return rule if rule.errno else None
        return None

    def _remove(self, rule: Rule) -> None:
        # By identity, since two rules may be equal.
        self._by_event[rule.event] = [one for one in self._by_event[rule.event] if one is not rule]

    # -- breakpoints

    def add_break(self, event: str, tag: str) -> None:
        """Stop the next request that causes `event`, in any state, under the name `tag`. Raises OptionError for an unknown
        event."""
        with self._changed:
            self._add(Breakpoint(event, tag))

    @property
    def stopped(self) -> tuple[str, ...]:
        """The tags of the stopped requests, in the order in which they stopped."""
        with self._changed:
            return tuple(stop.tag for stop in self._stops)

    @property
    def sleeping(self) -> int:
        """The number of stopped requests. One request may be stopped at several breakpoints."""
        with self._changed:
            return len({id(stop.request) for stop in self._stops})

    def wait_break(self, tag: str, timeout: float | None = None) -> bool:
        """Wait until a request is stopped under this name. Returns False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: any(stop.tag == tag for stop in self._stops), timeout)

    def resume(self, tag: str) -> bool:
        """Resume the request that stopped last under this name. Returns False if there is none."""
        with self._changed:
            stop = next((stop for stop in reversed(self._stops) if stop.tag == tag), None)
            if stop is not None:
                self._resume(stop)
        return stop is not None

    def remove_break(self, tag: str) -> bool:
        """Remove the breakpoints of this name and resume the requests stopped there. Returns False if there were neither."""
        with self._changed:
            rules = [r for of in self._by_event.values() for r in of if isinstance(r, Breakpoint) and r.tag == tag]
            stops = [stop for stop in reversed(self._stops) if stop.tag == tag]
            for rule in rules:
                self._remove(rule)
            for stop in stops:
                self._resume(stop)
        return bool(rules or stops)

    def release(self) -> None:
        """Remove all breakpoints and resume all requests."""
        with self._changed:
            for rules in tuple(self._by_event.values()):
                for rule in rules:
                    if isinstance(rule, Breakpoint):
                        self._remove(rule)
            for stop in tuple(self._stops):
                self._resume(stop)

    def _resume(self, stop: _Stop) -> None:
        stop.stopped = False
        self._stops.remove(stop)
        if self.tell is not None:
            self.tell("Resuming", stop.tag)
        self._changed.notify_all()
