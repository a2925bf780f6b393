"""Copies to a target that a name gives: a new file, a file that is replaced, a device, an export of a server.

A new file gets its name when it is complete. With a journal the copied bytes stay after an error, in a file beside the target
(`copy_journal.PartialFile`), and the next copy goes on with them. Other targets are written in place, and an error says how
much of them is copied.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from .. import registry
from ..creation import begin, lock_for_writing, new_file, open_new, open_unsynced
from ..descriptors import opening
from ..errors import Hint, LaminaError, OptionError, append_hint
from ..graph import Opener
from ..limits import DEFAULT_BUDGET, Budget
from ..node import StorageNode
from ..options import format_size, parse_name, path_in
from ..own_files import refuse_own, refuse_shared
from ..policy import Policy
from ..target_file import Target as HeldTarget
from ..target_file import real_path
from .copy import Copied, Copy, Plan
from .copy_ends import PipeSource, Source, StorageSource, StorageTarget, Target
from .copy_journal import Journal, PartialFile
from .progress import Monitor

_OTHER = "name another file"


class NamedTarget(NamedTuple):
    """Where a copy goes. `name`: a path, or a name of storage. `blank`: the target is known to read as zero. `allocated`:
    zeros take space. `journal`: the path of a journal, which is made, or resumed. `source`: the name of the source, for
    the journal. `references` and `budget` are those of storage that is opened."""

    name: str
    blank: bool = False
    allocated: bool = False
    journal: str | None = None
    source: str = ""
    references: Policy | None = None
    budget: Budget = DEFAULT_BUDGET


def copy_to_name(source: Source | PipeSource, to: NamedTarget, plan: Plan, monitor: Monitor) -> Copied:
    """Copy `source`, which stays open, to that target. Raises OptionError if the copy would overwrite a file that it
    reads, or its own journal; and the errors of `Copy`."""
    _refuse_same(source, to)
    return (_copy if to.journal is None else _copy_with_journal)(source, to, plan, monitor)


def path_of(name: str) -> str | None:
    """The path of a target that is or becomes a regular file; None for any other target."""
    if is_in_place(parse_name(name)):
        return None
    path = path_in(name, what="the target of a copy")
    return None if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode) else path


def is_in_place(options: Mapping[str, Any]) -> bool:
    """Whether a target with these options is storage other than a file."""
    driver = options.get("driver", "file")
    return driver not in ("file", "host_device") and registry.entry(driver).kind == "storage"


def copy_in_place(
    source: Source | PipeSource, target: Target, plan: Plan, monitor: Monitor, journal: Journal | None = None
) -> Copied:
    """Copy to a target that is not replaced, and close it: an error message contains the position."""
    with opening(lambda: target):
        job = Copy(source, target, plan, journal=journal, monitor=monitor)
        try:
            return job.run()
        except (LaminaError, KeyboardInterrupt) as error:
            append_hint(
                error, f"of the target, the first {job.position} bytes ({format_size(job.position)}) are copied"
            )
            raise


def _refuse_same(source: Source | PipeSource, to: NamedTarget) -> None:
    path = path_of(to.name)
    if to.journal is not None:
        journal = os.path.realpath(to.journal)
        for name in (path, f"{os.path.realpath(path)}.partial") if path is not None else ():
            if os.path.realpath(name) == journal:
                raise OptionError("the journal and the target are one file", path=to.journal, hint=_OTHER)
        if isinstance(source, StorageSource):
            refuse_own(source.node, journal)
    if isinstance(source, StorageSource) and path is not None:
        refuse_own(source.node, path)


def _open_in_place(source: Source | PipeSource, to: NamedTarget) -> Target:
    """An existing target: an export, a device; or a storage that discards data."""
    options = parse_name(to.name)
    if options["driver"] == "null" and not isinstance(source, PipeSource):
        options.setdefault("size", source.size)
    opener = Opener(read_only=False, policy=to.references, budget=to.budget)
    child = opener.child("target", options, storage=True)
    try:
        if isinstance(source, StorageSource):
            refuse_shared(source.node, child.node)
        return StorageTarget(child, to.name, blank=to.blank, grows=False, allocated=to.allocated)
    except BaseException:
        child.close()
        raise


def _copy(source: Source | PipeSource, to: NamedTarget, plan: Plan, monitor: Monitor) -> Copied:
    path = path_of(to.name)
    if path is None:
        return copy_in_place(source, _open_in_place(source, to), plan, monitor)
    with new_file(path, durable=plan.flush) as file, opening(open_new, file) as storage:
        target = StorageTarget(storage, path, blank=True, grows=True, allocated=to.allocated)
        begin(storage)
        return Copy(source, target, plan, monitor=monitor).run()


# -- with a journal


def _copy_with_journal(source: Source | PipeSource, to: NamedTarget, plan: Plan, monitor: Monitor) -> Copied:
    """The copied bytes remain after an error and are used by the next run."""
    assert to.journal is not None
    path = path_of(to.name)
    known = Journal.resume(to.journal)
    if known is not None and path is not None and _is_there(path, known):
        # The last run ended between two steps: the copy has its name, but the journal still exists.
        known.expect(_facts(source, to) | {key: known.facts.get(key) for key in ("partial", "target-identity")})
        known.remove()
        return Copied(known.position, 0, 0, 0, 0, known.position)
    with ExitStack() as stack:
        facts = _facts(source, to)
        partial = None
        if path is not None:
            replaces = None
            where = real_path(path)
            if os.path.lexists(where):
                # Locked until the copy has its name: a program that opens the old file meanwhile finds the lock.
                replaces = HeldTarget(where, lock_for_writing)
                stack.callback(replaces.close)
            status = replaces.status if replaces is not None else None
            facts["target-identity"] = None if status is None else [status.st_dev, status.st_ino]
            if known is not None:
                known.expect(facts | {"partial": known.facts.get("partial")})
            partial = PartialFile(path, known.facts.get("partial") if known is not None else None, replaces)
            facts["partial"] = partial.identity
        journal = _begin_journal(known, to.journal, facts, partial)
        try:
            if partial is None:
                copied = copy_in_place(source, _open_in_place(source, to), plan, monitor, journal)
            else:
                copied = _copy_to_partial(source, to, plan, monitor, journal, partial)
                partial.finish()
        except (LaminaError, KeyboardInterrupt) as error:
            at = f"{journal.position} ({format_size(journal.position)})"
            hint = Hint(f"the same call resumes at {at}", command=f"the same command resumes at {at}")
            append_hint(error, hint)
            raise
    journal.remove()
    return copied


def _is_there(path: str, known: Journal) -> bool:
    """Whether the file at `path` is the copy of this journal."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return [status.st_dev, status.st_ino] == known.facts.get("partial")


def _begin_journal(known: Journal | None, path: str, facts: dict[str, Any], partial: PartialFile | None) -> Journal:
    if known is not None:
        known.expect(facts)
        return known
    journal = Journal(path, facts)
    try:
        journal.record(0)  # before the first byte, so that the copy can be resumed whatever ends this process
    except BaseException:
        if partial is not None:
            partial.discard()
        raise
    return journal


def _copy_to_partial(
    source: Source | PipeSource, to: NamedTarget, plan: Plan, monitor: Monitor, journal: Journal, partial: PartialFile
) -> Copied:
    with opening(open_unsynced, partial.path) as child:
        target = StorageTarget(child, partial.path, blank=True, grows=True, allocated=to.allocated)
        storage = child.node.children["image"].node
        partial.expect(storage.identity if isinstance(storage, StorageNode) else None)
        return Copy(source, target, plan, journal=journal, monitor=monitor).run()


def _facts(source: Source | PipeSource, to: NamedTarget) -> dict[str, Any]:
    """The facts in a journal: names, sizes, and the identity and time of a source file, which must stay the same."""
    facts: dict[str, Any] = {}
    for word, name in (("source", to.source), ("target", to.name)):
        path = parse_name(name).get("filename")
        if isinstance(path, str):
            facts[word] = os.path.realpath(path)
            if word == "source":
                status = os.stat(path)
                facts["source-identity"] = [status.st_dev, status.st_ino, status.st_mtime_ns]
        else:
            facts[word] = name
    facts["source-size"] = None if isinstance(source, PipeSource) else source.size
    return facts
