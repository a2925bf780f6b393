"""The rules of `blkdebug`, sentence by sentence: what an event arms, which rule a request meets, and what that uses up."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import BlockIOError, NotSupported, OptionError
from lamina.filters.blkdebug import Blkdebug
from lamina.filters.blkdebug.rules import EVENTS, KINDS, USUAL_KINDS, Injection, Rules, Transition
from lamina.graph import Opener
from lamina.request import Child
from lamina.storage.memory import MemoryStorage


def opened(**options: Any) -> Blkdebug:
    """A node over a megabyte of memory; keys as `inject_error`, `set_state`, `opt_discard`."""
    values = {key.replace("_", "-"): value for key, value in options.items()}
    image = Child(MemoryStorage(1 << 20), "image", grows=True)
    return Blkdebug.open(Blkdebug.schema.parse({"image": image, **values}), Opener(read_only=False))


def number(rules: Rules, kind: str = "read", offset: int = 0, length: int = 512) -> int:
    """The errno that a request meets; 0 if it passes."""
    rule = rules.match(kind, offset, length)
    return 0 if rule is None else rule.errno


def test_there_are_48_events() -> None:
    assert len(set(EVENTS)) == len(EVENTS) == 48


def test_nothing_is_active_before_its_event() -> None:
    rules = Rules([Injection("read_aio")])
    assert number(rules) == 0
    rules.fire("write_aio")
    assert number(rules) == 0
    rules.fire("read_aio")
    assert number(rules) == errno.EIO


def test_what_is_armed_hits_unrelated_requests_until_another_match() -> None:
    rules = Rules([Injection("read_aio", errno=5), Injection("write_aio", state=2, errno=28)])
    rules.fire("read_aio")
    rules.fire("write_aio")  # its rule is for another state: nothing changes
    assert [number(rules, kind) for kind in ("read", "write", "flush")] == [5, 5, 5]


def test_the_first_match_ends_what_was_active() -> None:
    rules = Rules([Injection("read_aio", errno=5), Injection("write_aio", errno=28, kinds=("write",))])
    rules.fire("read_aio")
    rules.fire("write_aio")
    assert (number(rules, "read"), number(rules, "write")) == (0, 28)


def test_the_first_defined_is_met_first() -> None:
    rules = Rules([Injection("none", errno=5), Injection("none", errno=28)])
    rules.fire("none")
    assert [rule.errno for rule in rules.active] == [5, 28]
    assert number(rules) == 5


def test_a_rule_takes_part_in_its_state_or_in_any() -> None:
    rules = Rules(
        [Injection("read_aio", state=2, errno=28), Injection("write_aio", state=0), Transition("cow_read", 1, 2)]
    )
    rules.fire("read_aio")
    assert number(rules) == 0
    rules.fire("cow_read")
    rules.fire("read_aio")
    assert number(rules) == 28
    rules.fire("write_aio")
    assert number(rules) == errno.EIO


def test_the_state_begins_at_1() -> None:
    assert Rules().state == 1


def test_a_change_of_state_takes_effect_after_the_walk() -> None:
    rules = Rules([Injection("read_aio", state=2), Transition("read_aio", 1, 2)])
    rules.fire("read_aio")
    assert (rules.state, number(rules)) == (2, 0)
    rules.fire("read_aio")
    assert number(rules) == errno.EIO


def test_of_several_changes_the_first_defined_wins() -> None:
    rules = Rules([Transition("read_aio", 0, 7), Transition("read_aio", 1, 8)])
    rules.fire("read_aio")
    assert rules.state == 7


def test_states_that_follow_one_another_do_not_cascade() -> None:
    rules = Rules([Transition("read_aio", 1, 2), Transition("read_aio", 2, 3)])
    rules.fire("read_aio")
    assert rules.state == 2
    rules.fire("read_aio")
    assert rules.state == 3


def test_once_is_gone_for_good() -> None:
    rules = Rules([Injection("read_aio", once=True)])
    rules.fire("read_aio")
    assert (number(rules), number(rules)) == (errno.EIO, 0)
    rules.fire("read_aio")
    assert number(rules) == 0


def test_once_that_met_nothing_is_armed_again() -> None:
    rules = Rules([Injection("read_aio", once=True), Injection("write_aio", errno=28)])
    rules.fire("read_aio")
    rules.fire("write_aio")
    assert number(rules) == 28
    rules.fire("read_aio")
    assert (number(rules), number(rules)) == (errno.EIO, 0)


def test_two_that_say_the_same_are_two() -> None:
    rules = Rules([Injection("none", once=True), Injection("none", once=True)])
    rules.fire("none")
    assert [number(rules) for _ in range(3)] == [errno.EIO, errno.EIO, 0]


def test_a_shield_lasts_and_hides_later_rules() -> None:
    rules = Rules([Injection("none", errno=0, kinds=("read",)), Injection("none")])
    rules.fire("none")
    assert [number(rules) for _ in range(3)] == [0, 0, 0]
    assert number(rules, "write") == errno.EIO


def test_a_shield_that_says_once_is_used_up_by_its_first_match() -> None:
    rules = Rules([Injection("none", errno=0, once=True), Injection("none")])
    rules.fire("none")
    assert [number(rules) for _ in range(2)] == [0, errno.EIO]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    rules = Rules([Injection("none", kinds=(kind,))])
    rules.fire("none")
    assert [one for one in KINDS if number(rules, one)] == [kind]
    usual = Rules([Injection("none")])
    usual.fire("none")
    assert bool(number(usual, kind)) == (kind != "block-status") == (kind in USUAL_KINDS)


@pytest.mark.parametrize(
    ("offset", "length", "hit"),
    [(0, 512, False), (0, 513, False), (0, 1024, False), (0, 1025, True), (1024, 1, True), (1024, 512, True),
     (1025, 511, False), (1536, 512, False), (512, 4096, True), (1024, 0, False)],
)  # fmt: skip
def test_a_sector_is_hit_where_its_first_byte_is(offset: int, length: int, hit: bool) -> None:
    rules = Rules([Injection("none", sector=2)])
    rules.fire("none")
    assert bool(number(rules, "read", offset, length)) == hit


def test_a_flush_has_no_sector() -> None:
    rules = Rules([Injection("none", sector=0)])
    rules.fire("none")
    assert number(rules, "flush", 0, 0) == 0


def test_unknown_events_are_refused_with_what_was_meant() -> None:
    with pytest.raises(OptionError, match=r"reed_aio.*did you mean read_aio"):
        Rules([Injection("reed_aio")])


# -- the node


DONE: dict[str, Callable[[Child], object]] = {
    "read": lambda edge: edge.read_into(0, memoryview(bytearray(512))),
    "write": lambda edge: edge.write(0, memoryview(bytes(512))),
    "write-zeroes": lambda edge: edge.zero(0, 512),
    "discard": lambda edge: edge.discard(0, 512),
    "flush": lambda edge: edge.flush(),
    "block-status": lambda edge: edge.extents(0, 512),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_operation_is_of_its_kind(kind: str) -> None:
    node = opened(inject_error=[{"event": "none", "iotype": kind, "errno": 28, "immediately": True}])
    edge = Child(node, "root")
    for name, action in DONE.items():
        if name == kind:
            with pytest.raises(BlockIOError) as caught:
                action(edge)
            assert (caught.value.errno, caught.value.operation) == (28, kind)
        else:
            action(edge)
    node.close()


def test_what_fails_does_not_reach_the_child() -> None:
    node = opened(inject_error=[{"event": "none"}])
    with pytest.raises(BlockIOError):
        Child(node, "root").write(0, memoryview(b"x" * 512))
    kept = bytearray(512)
    node.image.read_into(0, memoryview(kept))
    assert not any(kept)


def test_no_support_for_zeroes_is_written_instead() -> None:
    node = opened(inject_error=[{"event": "none", "iotype": "write-zeroes", "errno": errno.ENOTSUP}])
    edge = Child(node, "root")
    edge.write(0, memoryview(b"x" * 4096))
    edge.zero(0, 4096)
    kept = bytearray(4096)
    edge.read_into(0, memoryview(kept))
    assert not any(kept)


def test_no_support_for_discards_is_no_failure() -> None:
    edge = Child(opened(inject_error=[{"event": "none", "iotype": "discard", "errno": errno.ENOTSUP}]), "root")
    edge.discard(0, 4096)


def test_what_is_too_short_is_refused_before_the_rules() -> None:
    node = opened(align=4096, opt_write_zero=8192, inject_error=[{"event": "none", "once": True}])
    with pytest.raises(NotSupported):
        node.zero(0, 4096)
    with pytest.raises(NotSupported):
        node.discard(0, 512)
    assert node.rules.active, "neither used the rule up"
    with pytest.raises(BlockIOError):
        node.zero(0, 8192)
    assert not node.rules.active


def test_none_fires_once_after_opening() -> None:
    node = opened(
        set_state=[{"event": "none", "state": 1, "new_state": 2}, {"event": "none", "state": 2, "new_state": 3}]
    )
    assert node.rules.state == 2


def test_options_are_rules() -> None:
    node = opened(
        inject_error=[
            {"event": "read_aio", "iotype": "read", "errno": "28", "sector": "3", "once": "on", "immediately": "yes"},
            {"event": "read_aio", "state": "0x2"},
        ],
        set_state=[{"event": "read_aio", "new_state": "2"}],
    )
    node.event("read_aio")
    (rule,) = node.rules.active
    assert rule == Injection("read_aio", 0, ("read",), 28, 3, True, True)
    assert node.rules.state == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inject_error": [{}]}, "inject-error.0.event is missing"),
        ({"set_state": [{"new_state": 1}]}, "set-state.0.event is missing"),
        ({"inject_error": [{"event": "bogus"}]}, "no event 'bogus'"),
        ({"inject_error": [{"event": "READ_AIO"}]}, "no event 'READ_AIO'"),
        ({"inject_error": [{"event": "none", "iotype": "bogus"}]}, "inject-error.0.iotype is 'bogus'"),
        ({"inject_error": [{"event": "none", "errno": "EIO"}]}, "inject-error.0.errno is 'EIO'"),
        ({"inject_error": [{"event": "none", "errno": -5}]}, "inject-error.0.errno is -5"),
        ({"inject_error": [{"event": "none", "once": "maybe"}]}, "inject-error.0.once is 'maybe'"),
        ({"inject_error": [{"event": "none", "new_state": 1}]}, "no option 'new_state'"),
        ({"set_state": [{"event": "none", "errno": 5}]}, "no option 'errno'"),
    ],
)
def test_options_that_are_no_rules(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        opened(**options)


class Plain:
    """The specification as plain lists, a second time: what `Rules` is held against."""

    def __init__(self, injections: list[Injection], transitions: list[Transition]) -> None:
        self.injections, self.transitions, self.active, self.state = list(injections), transitions, [], 1

    def fire(self, event: str) -> None:
        def takes_part(rule: Any) -> bool:
            return rule.event == event and rule.state in (0, self.state)

        matches = [rule for rule in self.injections if takes_part(rule)]
        if matches:
            self.active = matches
        self.state = next((rule.new_state for rule in self.transitions if takes_part(rule)), self.state)

    def meet(self, kind: str, offset: int, length: int) -> int:
        for rule in self.active:
            covered = range(offset, offset + length)
            if kind in rule.kinds and (rule.sector is None or rule.sector * 512 in covered):
                if rule.once:
                    self.active = [one for one in self.active if one is not rule]
                    self.injections = [one for one in self.injections if one is not rule]
                return rule.errno
        return 0


SOME = st.sampled_from(EVENTS[:4])
STATES = st.integers(0, 3)


@given(
    st.lists(
        st.builds(
            Injection,
            SOME,
            STATES,
            st.sampled_from([USUAL_KINDS, ("read",), ("flush",)]),
            st.sampled_from([0, 5, 28]),
            st.sampled_from([None, None, 0, 2]),
            st.booleans(),
        ),
        max_size=6,
    ),
    st.lists(st.builds(Transition, SOME, STATES, STATES), max_size=5),
    st.randoms(use_true_random=False),
)
def test_random_rules_and_requests(
    injections: list[Injection], transitions: list[Transition], rng: random.Random
) -> None:
    rules, plain = Rules([*transitions, *injections]), Plain(injections, transitions)
    for _ in range(40):
        if rng.random() < 0.5:
            event = rng.choice(EVENTS[:5])
            rules.fire(event)
            plain.fire(event)
        kind = rng.choice(KINDS)
        offset, length = rng.randrange(3) * 512, 0 if kind == "flush" else rng.choice([1, 512, 2048])
        assert number(rules, kind, offset, length) == plain.meet(kind, offset, length)
        assert (rules.state, rules.active) == (plain.state, plain.active)
