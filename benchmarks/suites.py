"""The long suites of `make evidence`: what they show, their tests, and how much of them is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Suite:
    """Tests that show one thing.

    `paths`: files of tests, which may contain `*`; those in `without` are left out. `knobs`: the environment variables that
    say how much a test does, with the values that the tests have by default (with less they do too little to show that
    they would notice a fault). Suites that end after each test has run a single time have `once`: a repetition would find the
    same. `share`: its part of the time, in relation to the others.
    """

    name: str
    title: str
    shows: str
    paths: tuple[str, ...]
    share: int
    knobs: Mapping[str, int] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    once: bool = False

    def multiplied(self, factor: float) -> dict[str, int]:
        """The settings for so many times the work."""
        return {name: round(value * factor) for name, value in self.knobs.items()}


#: Those that may end early come first: what they leave of their time belongs to the others.
SUITES = (
    Suite(
        "fail",
        "Storage that fails",
        "Each request of each operation on an image fails once, or from then on for good, with EIO and with ENOSPC. "
        "The error names that of the storage, nothing that was flushed is lost, the check finds no corruption "
        "wherever the process ends, and the next try succeeds.",
        ("tests/faults/test_fail_the_nth*.py", "tests/faults/test_compressed.py", "tests/faults/test_full_disk.py"),
        12,
        once=True,
    ),
    Suite(
        "interop",
        "QEMU and other peers",
        "The matrix of features, formats, servers and clients: what QEMU 7.2 and 10 make, Lamina reads, changes and "
        "checks, and the other way round; command lines under both programs; NBD with qemu-nbd, qemu-img, nbdkit, "
        "nbd-server, libnbd and fio.",
        ("tests/interop/test_*.py",),
        14,
        without=(
            "tests/interop/test_differential.py",
            "tests/interop/test_inspect_oslo.py",
            "tests/interop/test_nbd_random_operations.py",
            "tests/interop/test_qcow2_machine.py",
        ),
        once=True,
    ),
    Suite(
        "interrupts",
        "Interrupts",
        "An exception is raised at a function entry, a C return or an opcode of an operation or a job. The image "
        "stays whole and in use, no thread and no lock is left, and a cluster leaks at worst.",
        (
            "tests/faults/test_interrupts.py",
            "tests/faults/test_interrupts_commit.py",
            "tests/faults/test_interrupts_jobs.py",
        ),
        8,
    ),
    Suite(
        "crash",
        "Power cuts",
        "Each state in which a power cut could leave the storage in the middle of random work (writes, discards, "
        "resizing, snapshots, bitmaps, amend, repair, commit, rebase, flatten, compact): the check finds no "
        "corruption, and every sector holds what was flushed or something written since.",
        ("tests/crash/test_*_power_loss.py",),
        24,
        {"LAMINA_CRASH_STATES": 36_000},
    ),
    Suite(
        "kills",
        "Killed processes",
        "Commands and servers are killed at random moments. A conversion leaves the finished target or none, a change "
        "in place keeps the disk, and what a client had flushed is there.",
        ("tests/crash/test_killed_tools.py", "tests/crash/test_nbd_kill.py"),
        6,
        {"LAMINA_KILLS": 8, "LAMINA_NBD_KILLS": 40},
    ),
    Suite(
        "fuzz",
        "Hostile images and options",
        "Valid images with bytes, fields and table entries changed, and random options: no foreign exception, no "
        "hang, no memory over the budget, no file opened that was not granted; some are compared with QEMU and with "
        "oslo.utils.",
        (
            "tests/attacks/test_fuzz.py",
            "tests/attacks/test_qcow2_layout.py",
            "tests/attacks/test_options.py",
            "tests/interop/test_inspect_oslo.py",
        ),
        14,
        {
            "LAMINA_FUZZ_SECONDS": 10,
            "LAMINA_LAYOUT_IMAGES": 3000,
            "LAMINA_OPTION_ROUNDS": 1000,
            "LAMINA_INSPECT_ROUNDS": 250,
        },
    ),
    Suite(
        "differential",
        "Beside a model and beside QEMU",
        "Random sequences of operations on random kinds of image: equal bytes, extents, snapshots and bitmaps, clean "
        "checks. Random disks are held to the laws of conversion, comparison, commit and rebase, and stacks of "
        "filters to what is below them.",
        (
            "tests/interop/test_differential.py",
            "tests/interop/test_qcow2_machine.py",
            "tests/conformance/test_tool_invariants.py",
            "tests/conformance/test_tool_invariants_changes.py",
            "tests/unit/test_filter_stacks.py",
        ),
        12,
        {"LAMINA_TWINS": 300, "LAMINA_QCOW2_MACHINE": 1000, "LAMINA_SOAK_TOOLS": 8, "LAMINA_STACKS": 2000},
    ),
    Suite(
        "nbd-fuzz",
        "Hostile NBD clients and servers",
        "Conversations that follow the grammar of the protocol, and break it: every one ends, nothing is left over, "
        "no error is the program's own, and good clients are served between them. Also around and inside TLS.",
        ("tests/attacks/test_nbd_server_fuzz.py", "tests/attacks/test_nbd_client_fuzz.py"),
        10,
        {"LAMINA_NBD_FUZZ": 40_000},
    ),
    Suite(
        "nbd-operations",
        "Random operations over NBD",
        "As fsx does on a file: reads, writes, zeroes, discards and flushes anywhere on a disk, with our client at "
        "our server and at qemu-nbd, and with qemu-io at our server; each read, and the whole image in the end, is "
        "what a model says.",
        ("tests/interop/test_nbd_random_operations.py",),
        8,
        {"LAMINA_NBD_OPERATIONS": 400},
    ),
)
