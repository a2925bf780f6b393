"""The rules of `blkdebug` beside qemu-io: the same rules and the same requests give the same outcome of every request.

Each case is one sentence of the specification. Text, exit status and bytes are compared. Where ours decides otherwise
on purpose (`docs/filters/blkdebug.md` says where), the case is in a test of its own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lamina.cli.main import main

pytestmark = pytest.mark.peers

NAME = ["-f", "raw", "blkdebug:rules:disk"]
TOP = "driver=blkdebug,config=rules,image.driver=raw,image.file.filename=disk"


def fail(event: str, **values: Any) -> str:
    return _group("inject-error", event=event, **values)


def turn(event: str, new_state: int, state: int = 0) -> str:
    return _group("set-state", event=event, state=state, new_state=new_state)


def _group(name: str, **values: Any) -> str:
    return f"[{name}]\n" + "".join(f'{key} = "{value}"\n' for key, value in values.items()) + "\n"


R, W, Z, F, A = "read 0 512", "write 0 512", "write -z 0 4k", "write -zf 0 4k", "alloc 0 512"

#: About what, the rules, the options (None: by name, with the format raw above), the commands.
CASES: list[tuple[str, str, list[str] | None, list[str]]] = [
    # events and what they arm
    ("nothing is armed before its event", fail("write_aio"), None, [R, W, R]),
    ("an armed error hits unrelated requests", fail("write_aio"), None, [W, R, "discard 0 64k", R]),
    ("until another match", fail("write_aio") + fail("read_aio", errno=28, iotype="write"), None, [W, W, R, R, W]),
    ("no match keeps the list", fail("write_aio") + fail("read_aio", state=9, errno=28), None, [W, R, R]),
    ("the earliest defined is first", fail("none", errno=28) + fail("none"), None, [R, W]),
    ("reads fire read_aio", fail("read_aio", iotype="read", once="on"), None, [R, R, W]),
    ("readv fires read_aio", fail("read_aio"), None, ["readv 0 512 512", "writev 0 1k"]),
    ("writes fire write_aio", fail("write_aio", iotype="write", once="on"), None, [W, W, R]),
    ("zeroes do not fire write_aio", fail("write_aio"), None, [Z, R, W]),
    ("zeroes fire pwritev_zero", fail("pwritev_zero", iotype="write-zeroes"), None, [R, W, Z, "write -zu 0 4k"]),
    ("zeroes do not fire pwritev", fail("pwritev"), None, [Z, R, W, R]),
    ("discards fire nothing before they are done", fail("pwritev") + fail("write_aio"), None, ["discard 0 64k", R]),
    ("writes fire pwritev after write_aio", fail("write_aio", errno=28) + fail("pwritev"), None, [W]),
    ("pwritev_done comes after the write", fail("pwritev_done"), None, [W, R]),
    ("pwritev_done comes after zeroes", fail("pwritev_done"), None, [Z, R]),
    ("pwritev_done comes after a write that failed",
     fail("pwritev", iotype="write", once="on") + fail("pwritev_done", iotype="read", errno=28), None, [W, R, W, R]),
    ("none fires after opening", fail("none", once="on"), None, [R, R]),
    ("none fires once", turn("none", 2, 1) + turn("none", 3, 2) + fail("read_aio", state=2), None, [R, W]),
    ("events of a format do not come here", fail("l2_load") + fail("l1_update"), None, [R, W, Z]),
    ("the node on top hears no read_aio", fail("read_aio") + fail("write_aio"), ["--image-opts", TOP], [R, W]),
    ("the node on top hears pwritev", fail("pwritev", once="on"), ["--image-opts", TOP], [R, W, W]),
    # states
    ("the state begins at 1", fail("read_aio", state=1, once="on"), None, [R, R]),
    ("another state does not take part", fail("read_aio", state=2), None, [R, R]),
    ("state 0 is any", turn("write_aio", 7) + fail("read_aio", state=0), None, [W, R]),
    ("a new state counts after the event", turn("read_aio", 2) + fail("read_aio", state=2), None, [R, R, R]),
    ("states form a machine",
     turn("write_aio", 2, 1) + turn("write_aio", 3, 2) + fail("write_aio", state=3), None, [W, W, W, R]),
    ("the earliest set-state wins",
     turn("write_aio", 5) + turn("write_aio", 6) + fail("read_aio", state=5), None, [W, R]),
    ("the order in the file is that of its groups",
     turn("write_aio", 2) + fail("write_aio", state=1, once="on") + fail("write_aio", state=2, errno=28), None, [W, W]),
    ("without new_state it is 0", _group("set-state", event="write_aio") + fail("read_aio", state=1), None, [R, W, R]),
    # once, errno, sector, iotype, immediately
    ("once is gone for good", fail("write_aio", once="on"), None, [W, W, R]),
    ("once that was not met is armed again",
     fail("read_aio", iotype="write", once="on") + fail("write_aio", iotype="discard"), None, [R, W, R, W]),
    ("two rules that say once are two", fail("none", once="on") + fail("none", once="on", errno=28), None, [R, R, R]),
    ("errno is the error", fail("none", errno=28), None, [R, W]),
    ("errno may be hex", fail("none", errno="0x1c"), None, [R]),
    ("errno defaults to EIO", fail("none"), None, [R]),
    ("errno 0 is a shield that lasts", fail("none", errno=0, iotype="read") + fail("none"), None, [R, R, W, R]),
    ("ENOTSUP for zeroes is a fallback", fail("none", errno=95, iotype="write-zeroes"), None, [W, Z, "read -P 0 0 512"]),
    ("ENOTSUP for zeroes without fallback", fail("none", errno=95, iotype="write-zeroes"), None, [W, "write -zn 0 4k", R]),
    ("ENOTSUP for discards is no failure", fail("none", errno=95, iotype="discard"), None, ["discard 0 64k"]),
    ("a sector is hit inside", fail("none", sector=2), None,
     ["read 0 1k", "read 1k 512", "read 512 1k", "read 0 4k", "read 1536 512", "write 1k 1", "write 1025 1"]),
    ("a sector is hit by its first byte", fail("none", sector=2), None, ["read 1000 24", "read 1000 25", "read 1025 4k"]),
    ("a sector of zeroes and discards", fail("none", sector=8), None, [Z, "write -z 4k 4k", "discard 0 4k", "discard 0 8k"]),
    ("sector -1 is none", fail("none", sector=-1), None, [R]),
    *(
        (f"iotype {kind}", fail("none", iotype=kind), None, [R, W, Z, F, "discard 0 64k"])
        for kind in ("read", "write", "write-zeroes", "discard", "flush")
    ),
    ("a flush has no sector", fail("none", iotype="flush", sector=0), None, [F, W]),
    ("FUA is a flush here", fail("none", iotype="flush"), None, [W, Z, F, R]),
    ("block status is not in the usual mask", fail("none"), None, [A]),
    ("immediately", fail("write_aio", immediately="on", once="on"), None, [W, W]),
    ("off and on", fail("write_aio", once="off", immediately="off"), None, [W, W]),
    # options
    ("options are rules", "", ["--image-opts", TOP + ",inject-error.0.event=pwritev,inject-error.0.errno=28"], [R, W, R]),
    ("file and options add up, file first", fail("pwritev", errno=28, once="on"),
     ["--image-opts", TOP + ",inject-error.0.event=pwritev,inject-error.1.event=none,inject-error.1.iotype=read"], [R, W, W]),
    ("set-state as an option", fail("pwritev", state=4),
     ["--image-opts", TOP + ",set-state.0.event=pwritev,set-state.0.new_state=4"], [W, W, W]),
    ("an empty name of a file", "", ["-f", "raw", "blkdebug::disk"], [R, W]),
    ("a chain of two hears below only what passes", fail("pwritev", once="on"),
     ["-f", "raw", "blkdebug:rules:blkdebug:rules:disk"], [W, W, W]),
    # limits
    ("short zeroes are written before the rules are asked", fail("none", iotype="write-zeroes"),
     ["--image-opts", TOP + ",align=4k,opt-write-zero=16k"], ["write -z 0 4k", "write -z 0 16k", R]),
    ("read-modify-write fires at the tail", fail("pwritev_rmw_after_tail", iotype="write", once="on"),
     ["--image-opts", TOP + ",align=4k"], [W, W, "write 0 4k"]),
    ("read-modify-write fires at the head", fail("pwritev_rmw_after_head", iotype="write", once="on"),
     ["--image-opts", TOP + ",align=4k"], [W, "write 512 3584", "write 512 3584"]),
    ("aligned requests fire no read-modify-write",
     fail("pwritev_rmw_head") + fail("pwritev_rmw_tail") + fail("pwritev_rmw_after_head") + fail("pwritev_rmw_after_tail"),
     ["--image-opts", TOP + ",align=4k"], ["write 0 4k", "write -z 4k 8k", "read 100 5"]),
    ("split requests fail where the sector is", fail("none", sector=16, iotype="read"),
     ["--image-opts", TOP + ",max-transfer=4k"], ["read 0 8k", "read 0 16k", "read 12k 8k"]),
]  # fmt: skip


class Pair:
    """A folder for the reference and one for ours, with the same disk and the same rules."""

    def __init__(self, qemu: Any, folder: Path, monkeypatch: Any, capfd: Any) -> None:
        self.qemu, self.monkeypatch, self.capfd = qemu, monkeypatch, capfd
        self.theirs, self.ours = folder / "theirs", folder / "ours"
        for one in (self.theirs, self.ours):
            one.mkdir()
            (one / "disk").write_bytes(random.Random(4).randbytes(1 << 18))

    def run(self, rules: str | bytes, options: list[str], commands: list[str]) -> tuple[Any, Any, str]:
        """((their status, text), (our status, text), our complaints); fails if the disks differ afterwards."""
        # Without -t qemu-io makes each write stable, which a rule about flushes would meet.
        words = [word for command in commands for word in ("-c", command)] + ["-t", "writeback", *options]
        for one in (self.theirs, self.ours):
            (one / "rules").write_bytes(rules if isinstance(rules, bytes) else rules.encode())
        self.monkeypatch.chdir(self.theirs)
        done = self.qemu.io(*words, check=False)
        self.monkeypatch.chdir(self.ours)
        self.capfd.readouterr()
        status = main(["io", *words])
        said = self.capfd.readouterr()
        assert (self.ours / "disk").read_bytes() == (self.theirs / "disk").read_bytes(), said.err
        return (done.returncode, _settled(done.stdout)), (status, _settled(said.out)), said.err


def _settled(text: str) -> str:
    return re.sub(r"(1 ops; ).*$", r"\1TIME", text, flags=re.MULTILINE)


@pytest.fixture
def pair(qemu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pair:
    return Pair(qemu, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize(
    ("rules", "options", "commands"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_the_same_outcome(pair: Pair, rules: str, options: list[str] | None, commands: list[str]) -> None:
    theirs, ours, complaint = pair.run(rules, NAME if options is None else options, commands)
    assert ours == theirs, f"{rules}\n{commands}\n{complaint}"


#: Files that both refuse: nothing is opened.
REFUSED = [
    'event = "none"\n',
    "[bogus]\n",
    "[inject-error]\n",
    '[inject-error]\nerrno = "5"\n',
    "[set-state]\n",
    '[inject-error]\nevent = "bogus"\n',
    '[inject-error]\nevent = "READ_AIO"\n',
    '[inject-error]\nevent = ""\n',
    '[set-state]\nevent = "bogus"\n',
    '[inject-error]\nevent = "none"\niotype = "bogus"\n',
    '[inject-error]\nevent = "none"\niotype = ""\n',
    '[inject-error]\nevent = "none"\nbogus = "1"\n',
    '[set-state]\nevent = "none"\nerrno = "1"\n',
    '[inject-error]\nevent = "none"\nerrno = "EIO"\n',
    '[inject-error]\nevent = "none"\nstate = "x"\n',
    '[inject-error]\nevent = "none"\nonce = "maybe"\n',
    "[inject-error]\nevent = none\n",
    "[inject-error]\nevent = 'none'\n",
    '[inject-error "a"]\nevent = "none"\n[inject-error "a"]\nevent = "none"\n',
]


def test_what_is_refused_there_is_refused_here(pair: Pair) -> None:
    for rules in REFUSED:
        theirs, ours, complaint = pair.run(rules, NAME, [R])
        assert theirs == ours == (1, ""), rules
        assert complaint.startswith("lamina: "), rules


@pytest.mark.parametrize(
    "options",
    [
        ["-f", "raw", "blkdebug:absent:disk"],
        ["-f", "raw", "blkdebug:.:disk"],
        ["-f", "raw", "blkdebug:disk"],
        ["--image-opts", TOP + ",inject-error.0.errno=5"],
        ["--image-opts", TOP + ",inject-error.0.event=bogus"],
        ["--image-opts", TOP + ",inject-error.1.event=none"],
        ["--image-opts", TOP + ",inject-error.0.event=none,inject-error.0.bogus=1"],
        ["--image-opts", TOP + ",set-state.0.event=none,set-state.0.errno=1"],
    ],
)
def test_names_and_options_that_both_refuse(pair: Pair, options: list[str]) -> None:
    theirs, ours, complaint = pair.run("", options, [R])
    assert theirs == ours == (1, ""), complaint


#: How files may be written: comments, spaces, names, a key that is given twice.
SPELLINGS = [
    '# c\n[inject-error]\n# x\nevent = "write_aio"\n',
    '[inject-error]\n\tevent\t=\t"write_aio"   \n',
    '[inject-error]\r\nevent = "write_aio"\r\n',
    '[inject-error]\nevent = "write_aio" # c\n',
    '[inject-error "a"]\nevent = "write_aio"\n',
    '[inject-error]\nevent = "read_aio"\nevent = "write_aio"\n',
    '[inject-error]\nevent = "write_aio"',
    "\n\n",
    b'# \xe9\n[inject-error]\nevent = "write_aio"\n',
]


def test_spellings(pair: Pair) -> None:
    for rules in SPELLINGS:
        theirs, ours, complaint = pair.run(rules, NAME, [R, W, W])
        assert theirs == ours, f"{rules!r}: {complaint}"


#: Breakpoints: what stops, goes on, and in which order.
BREAKS = [
    ["break write_aio A", "aio_write -P 7 0 512", "wait_break A", R, "resume A", "aio_flush", "read -P 7 0 512"],
    ["break pwritev A", "aio_write 0 512", "wait_break A", W, "resume A", "aio_flush"],
    ["break pwritev_done A", "aio_write -P 1 0 512", "wait_break A", "read -P 1 0 512", "resume A", "aio_flush"],
    ["break read_aio A", "aio_read 0 512", "wait_break A", "resume A", "aio_flush", "resume A"],
    ["break pwritev_zero A", "aio_write -z 0 4k", "wait_break A", "resume A", "aio_flush"],
    ["break write_aio A", "break write_aio B", "aio_write 0 512", "wait_break A", "resume B", "resume A", "aio_flush"],
    ["break write_aio A", "break pwritev B", "aio_write 0 512", "wait_break A", "resume A", "wait_break B", "resume B",
     "aio_flush"],
    ["break write_aio A", "remove_break A", W, "remove_break A"],
    ["break write_aio A", "break read_aio A", "remove_break A", W, R],
    ["break bogus A", R],
    ["resume A", "remove_break A", R],
    ["break write_aio A", "break write_aio A", "aio_write 0 512", "wait_break A", "resume A", "resume A", "aio_flush"],
]  # fmt: skip


@pytest.mark.parametrize("commands", BREAKS, ids=lambda commands: ";".join(commands)[:50])
def test_breakpoints(pair: Pair, commands: list[str]) -> None:
    theirs, ours, complaint = pair.run("", NAME, commands)
    # Complaints have words of their own in either program; qemu-io's stand among the results.
    said = "".join(line for line in theirs[1].splitlines(True) if not line.startswith("Could not "))
    assert ours == (theirs[0], said), complaint


def test_what_overlaps_a_stopped_request_waits_for_it(pair: Pair) -> None:
    commands = ["break pwritev_rmw_after_tail A", "aio_write -qP 1 0 512", "wait_break A", "aio_write -qP 2 512 512"]
    commands += ["sleep 20", "resume A", "aio_flush", "read -P 1 0 512", "read -P 2 512 512"]
    theirs, ours, complaint = pair.run("", ["--image-opts", TOP + ",align=4k"], commands)
    assert ours == theirs, complaint
    assert ours[0] == 0


def test_breakpoints_without_a_blkdebug(pair: Pair) -> None:
    for line in ("break write_aio A", "resume A", "remove_break A"):
        theirs, ours, _ = pair.run("", ["-f", "raw", "disk"], [line])
        assert theirs[0] == ours[0] == 1


def test_the_first_blkdebug_below_takes_the_breakpoints(pair: Pair) -> None:
    pair.qemu.img("create", "-q", "-f", "qcow2", pair.theirs / "disk", "1M")
    (pair.ours / "disk").write_bytes((pair.theirs / "disk").read_bytes())
    commands = ["break write_aio A", "aio_write 0 64k", "wait_break A", "resume A", "aio_flush", "read -P 0xcd 0 64k"]
    words = [word for command in commands for word in ("-c", command)]
    theirs = pair.qemu.io("-f", "qcow2", *words, f"blkdebug::{pair.theirs / 'disk'}")
    pair.capfd.readouterr()
    assert main(["io", "-f", "qcow2", *words, f"blkdebug::{pair.ours / 'disk'}"]) == 0
    assert _settled(pair.capfd.readouterr().out) == _settled(theirs.stdout)


#: On qcow2, where an event means the same in both: a request fails in both or in neither, and whatever was not hit is there.
FORMAT = [
    ("reads fire read_aio", fail("read_aio", iotype="read", once="on"), ["read 0 64k", "read 0 64k", "read -P 0 1M 64k"]),
    ("writes fire write_aio", fail("write_aio", iotype="write", once="on"), ["write 2M 64k", "write 2M 64k", "read 2M 64k"]),
    ("a write in place fires write_aio", fail("write_aio", iotype="write", once="on"), ["write 0 512", "write 0 512"]),
    ("reads of holes fire nothing", fail("read_aio"), ["read -P 0 1M 64k"]),
    ("zeroes of whole clusters write no data", fail("write_aio", iotype="write"), ["write -z 3M 64k", "read -P 0 3M 64k"]),
    ("tables are loaded once", fail("l2_load", iotype="read", once="on"), ["read 0 512", "read 0 512", "read 64k 512"]),
    ("what is below fires read_backing_aio", fail("read_backing_aio"), ["read 8M 64k", "read 0 512", "write 0 64k"]),
    ("cow_read comes before the rest of a cluster is read",
     fail("cow_read", iotype="write", once="on"), ["write 8M 512", "write 8M 512", "read 8M 64k"]),
    ("cow_write comes before it is written",
     fail("cow_write", iotype="write", once="on"), ["write 8M 512", "write 8M 512", "read 8M 64k"]),
    ("cluster_alloc comes before there is room",
     fail("cluster_alloc", iotype="write", once="on"), ["write 2M 64k", "read 0 512"]),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "commands"), [case[1:] for case in FORMAT], ids=[case[0] for case in FORMAT])
def test_the_same_outcome_on_qcow2(pair: Pair, rules: str, commands: list[str]) -> None:
    for folder in (pair.theirs, pair.ours):
        pair.qemu.img("create", "-q", "-f", "raw", folder / "base", "10M")
        pair.qemu.io("-f", "raw", "-c", "write -q -P 9 8M 1M", folder / "base")
        pair.qemu.img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", folder / "top")
        pair.qemu.io("-f", "qcow2", "-c", "write -q -P 1 0 1M", folder / "top")
        (folder / "rules").write_text(rules)
    words = [word for command in commands for word in ("-c", command)]
    options = ["--image-opts", "driver=qcow2,file.driver=blkdebug,file.config={0}/rules,file.image.driver=file,"
               "file.image.filename={0}/top,backing.driver=raw,backing.file.filename={0}/base"]  # fmt: skip
    theirs = pair.qemu.io(*words, options[0], options[1].format(pair.theirs), check=False)
    pair.capfd.readouterr()
    status = main(["io", *words, options[0], options[1].format(pair.ours)])
    said = pair.capfd.readouterr()
    assert (status, _settled(said.out)) == (theirs.returncode, _settled(theirs.stdout)), said.err
    code, report = pair.qemu.check(pair.ours / "top")
    assert code in (0, 3), report


def test_random_rules_and_requests(pair: Pair, seed: int) -> None:
    """A machine of random states over the events of raw, and 30 requests of every kind, twelve times."""
    rng = random.Random(seed)
    events = ["read_aio", "write_aio", "pwritev", "pwritev_zero", "pwritev_done", "none"]
    for _ in range(12):
        rules = _random_rules(rng, events)
        commands = [_random_command(rng) for _ in range(30)]
        theirs, ours, complaint = pair.run(rules, NAME, commands)
        assert ours == theirs, f"{rules}\n{commands}\n{complaint}"


def _random_rules(rng: random.Random, events: list[str]) -> str:
    groups = []
    for _ in range(rng.randrange(1, 7)):
        event = rng.choice(events)
        if rng.random() < 0.4:
            groups.append(turn(event, rng.randrange(1, 4), rng.randrange(4)))
            continue
        values: dict[str, Any] = {"errno": rng.choice([5, 28, 13, 0]), "state": rng.randrange(4)}
        if rng.random() < 0.6:
            values["iotype"] = rng.choice(["read", "write", "write-zeroes", "discard", "flush"])
        if rng.random() < 0.3:
            values["sector"] = rng.choice([0, 2, 8])
        if values["errno"] and rng.random() < 0.5:  # a shield that says once is where we differ
            values["once"] = "on"
        groups.append(fail(event, **values))
    return "".join(groups)


def _random_command(rng: random.Random) -> str:
    offset, length = rng.choice([0, 512, 1024, 4096]), rng.choice([512, 1024, 4096])
    commands: list[Callable[[], str]] = [
        lambda: f"read {offset} {length}",
        lambda: f"write -P {rng.randrange(256)} {offset} {length}",
        lambda: f"write -zf {offset} {length}",
        lambda: f"write -z {offset} {length}",
        lambda: f"discard {offset} {length}",
        lambda: f"readv {offset} {length} 512",
    ]
    return rng.choice(commands)()


# -- where ours decides otherwise


def test_a_shield_that_says_once_is_used_up(pair: Pair) -> None:
    theirs, ours, _ = pair.run(fail("none", errno=0, once="on") + fail("none"), NAME, [R, R])
    assert ours == (
        1,
        _settled(theirs[1].splitlines(True)[0]) + "512 bytes, 1 ops; TIME\nread failed: Input/output error\n",
    )
    if pair.qemu.version >= (10,):
        assert theirs == ours


def test_a_read_that_fails_inside_fails_the_write(pair: Pair) -> None:
    """The reference says that it wrote, and the neighbours are gone: so the disks are not compared."""
    pair.monkeypatch.chdir(pair.ours)
    before = Path("disk").read_bytes()
    for event, offset in (("pwritev_rmw_head", 512), ("pwritev_rmw_tail", 0)):
        Path("rules").write_text(fail(event, iotype="read", once="on"))
        pair.capfd.readouterr()
        assert main(["io", "-c", f"write {offset} 512", "--image-opts", TOP + ",align=4k"]) == 1
        assert pair.capfd.readouterr().out == "write failed: Input/output error\n"
        assert Path("disk").read_bytes() == before


def test_a_write_that_must_be_stable_flushes(pair: Pair) -> None:
    """As in 7.2. QEMU 10 hands the flag to the file, whose error no rule can be about."""
    theirs, ours, _ = pair.run(fail("none", iotype="flush"), NAME, ["write -f 0 512"])
    assert ours == (1, "write failed: Input/output error\n")
    if pair.qemu.version < (10,):
        assert theirs == ours


def test_a_failed_flush_is_told(pair: Pair) -> None:
    theirs, ours, _ = pair.run(fail("none", iotype="flush"), NAME, [W, "flush"])
    assert theirs[1] == ours[1].removesuffix("flush failed: Input/output error\n")
    assert ours[0] == 1


def test_remove_break_of_a_request_that_stopped_is_no_failure(pair: Pair) -> None:
    """The reference lets it go on, and complains that there was nothing."""
    theirs, ours, complaint = pair.run("", NAME, ["break pwritev A", "aio_write 0 512", "remove_break A", "aio_flush"])
    assert (theirs[0], ours[0]) == (1, 0), complaint
    assert ours[1] == "".join(line for line in theirs[1].splitlines(True) if not line.startswith("Could not "))
