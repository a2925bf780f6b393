"""The rules of `blkdebug`: which request fails, and how, after which events; and where requests are made to stop.

A `Rules` holds a state (a number that begins at 1), the rules of each event, the injections that are *active*, and the
requests that stopped. What happens in which order is that of the program people know by the filter's name:

- the rules of an event are walked, the last added first, those of injections before those of states in the order of adding;
- a rule takes part if its state is 0 or equals the state before the event;
- the first injection that takes part ends all that were active; all that take part are active from then on, the first that
  was defined in front. Where none takes part the earlier ones stay in force;
- a change of state takes effect after the walk; of several the first that was defined wins;
- a breakpoint that takes part is gone, and the request sleeps after the walk until somebody lets it go on.
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
#: The kinds of requests that a rule can be about, and those that it is about where it does not say.
KINDS = ("read", "write", "write-zeroes", "discard", "flush", "block-status")
USUAL_KINDS = KINDS[:-1]

_SECTOR = 512


class Injection(NamedTuple):
    """While active: a request of one of these `kinds`, which has `sector` in it (any, if None), fails with `errno`; 0: it
    passes, and no later rule sees it. `once`: the first request that it meets uses it up. `immediately`: other threads do
    not get a turn before the request fails."""

    event: str
    state: int = 0
    kinds: tuple[str, ...] = USUAL_KINDS
    errno: int = EIO
    sector: int | None = None
    once: bool = False
    immediately: bool = False


class Transition(NamedTuple):
    """The event makes `new_state` the state."""

    event: str
    state: int
    new_state: int


class Breakpoint(NamedTuple):
    """The next request that comes to the event stops, and has the name `tag`."""

    event: str
    tag: str
    state: int = 0


Rule: TypeAlias = Injection | Transition | Breakpoint


class _Stop:
    """Why a request stopped: one breakpoint. It sleeps until all of its own are gone."""

    __slots__ = ("request", "stopped", "tag")

    def __init__(self, tag: str, request: object) -> None:
        self.tag = tag
        self.request = request
        self.stopped = True


class Rules:
    """The rules of one node. Safe for any number of threads."""

    def __init__(self, rules: Iterable[Injection | Transition] = ()) -> None:
        """OptionError if one of them names no event."""
        #: Those that a request is held against, in order. Empty: every request passes.
        self.active: list[Injection] = []
        #: Told of "Suspended" and "Resuming", with the tag, in the thread that stops or lets go. What it raises when told
        #: of a stop is raised by the request, which then does not stop.
        self.tell: Callable[[str, str], None] | None = None
        self._by_event: dict[str, list[Rule]] = {}  # in the order of the walk
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
            raise OptionError(f"blkdebug knows no event {rule.event[:64]!r}", hint=hint)
        self._by_event.setdefault(rule.event, []).insert(0, rule)

    # -- what happens

    def fire(self, event: str) -> None:
        """The event happens, in the thread of a request. Returns when nothing stops that any longer."""
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
                    self._forget(rule)
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
            # Interrupted while it slept, it is no longer there to be let go.
            self._stops = [stop for stop in self._stops if stop not in stops]

    def meet(self, kind: str, offset: int, length: int) -> Injection | None:
        """The rule by which this request fails; None if it passes. A flush has the length 0."""
        with self._changed:
            for rule in self.active:
                here = rule.sector is None or (length > 0 and offset <= rule.sector * _SECTOR < offset + length)
                if here and kind in rule.kinds:
                    if rule.once:
                        self.active = [one for one in self.active if one is not rule]
                        self._forget(rule)
                    return rule if rule.errno else None
        return None

    def _forget(self, rule: Rule) -> None:
        # By identity: two rules may say the same.
        self._by_event[rule.event] = [one for one in self._by_event[rule.event] if one is not rule]

    # -- breakpoints

    def add_break(self, event: str, tag: str) -> None:
        """The next request that comes to `event`, in whatever state, stops under the name `tag`. OptionError if there is no
        such event."""
        with self._changed:
            self._add(Breakpoint(event, tag))

    @property
    def stopped(self) -> tuple[str, ...]:
        """The tags of the requests that are stopped, the first that stopped in front."""
        with self._changed:
            return tuple(stop.tag for stop in self._stops)

    @property
    def sleeping(self) -> int:
        """How many requests are stopped; one may have stopped at several breakpoints at once."""
        with self._changed:
            return len({id(stop.request) for stop in self._stops})

    def wait_break(self, tag: str, timeout: float | None = None) -> bool:
        """Wait until a request is stopped under this name; False if none was within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: any(stop.tag == tag for stop in self._stops), timeout)

    def resume(self, tag: str) -> bool:
        """Let the request go on that was the last to stop under this name; False if there is none."""
        with self._changed:
            stop = next((stop for stop in reversed(self._stops) if stop.tag == tag), None)
            if stop is not None:
                self._let_go(stop)
        return stop is not None

    def remove_break(self, tag: str) -> bool:
        """Forget the breakpoints of this name, and let all go on that stopped there; False if there was neither."""
        with self._changed:
            rules = [r for of in self._by_event.values() for r in of if isinstance(r, Breakpoint) and r.tag == tag]
            stops = [stop for stop in reversed(self._stops) if stop.tag == tag]
            for rule in rules:
                self._forget(rule)
            for stop in stops:
                self._let_go(stop)
        return bool(rules or stops)

    def release(self) -> None:
        """Forget all breakpoints, and let all requests go on."""
        with self._changed:
            for rules in tuple(self._by_event.values()):
                for rule in rules:
                    if isinstance(rule, Breakpoint):
                        self._forget(rule)
            for stop in tuple(self._stops):
                self._let_go(stop)

    def _let_go(self, stop: _Stop) -> None:
        stop.stopped = False
        self._stops.remove(stop)
        if self.tell is not None:
            self.tell("Resuming", stop.tag)
        self._changed.notify_all()
