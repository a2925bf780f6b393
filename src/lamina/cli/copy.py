"""`lamina copy`: copy raw bytes between files, devices, pipes and exports. `convert` is for image formats."""

from __future__ import annotations

import os
import stat
import sys
from argparse import Namespace
from contextlib import ExitStack
from time import monotonic
from typing import Any

from .. import registry
from ..creation import begin, lock_for_writing, new_file, open_new, open_unsynced
from ..errors import LaminaError, OptionError, append_hint
from ..graph import Opener
from ..image import Image
from ..jobs.copy import Copied, Copy, Plan
from ..jobs.copy_ends import PipeSource, PipeTarget, Source, StorageSource, StorageTarget, Target
from ..jobs.copy_journal import Journal, PartialFile
from ..jobs.progress import Monitor
from ..node import StorageNode
from ..options import format_size, parse_name, path_in
from ..own_files import refuse_input, refuse_own, refuse_shared, refuse_stream
from ..request import Child
from ..target_file import Target as HeldTarget
from ..target_file import real_path
from .arguments import Parser, tell_of_writers
from .terminal import Meter

_EXAMPLES = """
  lamina copy nbd://server/disk disk.raw
  lamina copy -p --flush disk.raw nbd://server/disk
  lamina copy --destination-is-zero disk.raw 'nbd+unix:///disk?socket=/run/nbd.sock'
  lamina copy --resume-file disk.journal nbd://server/disk disk.raw      the same command again resumes after a failure
  gunzip -c disk.raw.gz | lamina copy - nbd://server/disk

The command does not convert formats: it copies an image file byte by byte. It does not read holes of the source, and does not
write zeros if the target is known to read as zero. A new file gets its name when it is complete; a device or an export is
written in place, and an error message contains the position of the copy.
"""

_OTHER = "name another file"


def main(argv: list[str]) -> int:
    parser = Parser("copy", "Copy raw bytes between files, block devices, pipes (-) and exports of servers.", _EXAMPLES)
    parser.add_connections(
        "-C", "--connections", default=0,  # the storage chooses
        help="connections to each server that supports several coherent ones (1 to 16; default: 4 over TCP, otherwise 1)",
    )  # fmt: skip
    parser.add_size("-R", "--requests", metavar="NUMBER", default=32, help="requests in flight (default: 32)")
    parser.add_size("--request-size", metavar="SIZE", default=512 << 10, help="the largest read (default: 512k)")
    parser.add_size(
        "-S", "--sparse-size", metavar="SIZE", default=4096,
        help="runs of zeros of at least SIZE bytes are not written as data (default: 4k); 0: data is not searched for zeros",
    )  # fmt: skip
    parser.add_argument(
        "--no-extents", action="store_true", help="read the complete source, without a query of its extents"
    )
    parser.add_argument(
        "--destination-is-zero",
        "--target-is-zero",
        dest="blank",
        action="store_true",
        help="the target is known to read as zero, so zeros are not written",
    )
    parser.add_argument("--allocated", action="store_true", help="allocate zeros in the target")
    parser.add_argument("--flush", action="store_true", help="flush the target to stable storage at the end")
    parser.add_reconnect(default=10)
    parser.add_argument(
        "--resume-file",
        metavar="PATH",
        help="record the position of the copy in this file every ten seconds; if the file exists already, resume from that "
        "position. It is removed at the end",
    )
    parser.add_rate()
    parser.add_max_output()
    parser.add_timeout()
    parser.add_references()
    parser.add_argument("-p", "--progress", action="store_true", help="show progress")
    parser.add_quiet()
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="read a source that another program has open for writing"
    )
    parser.add_output()
    parser.add_argument(
        "source", metavar="SOURCE", help="a file, a device, the URI of an export, or - for standard input"
    )
    parser.add_argument(
        "target", metavar="TARGET", help="a file, a device, the URI of an export, or - for standard output"
    )
    args = parser.parse(argv)
    piped = args.target == "-"
    if piped and (args.output == "json" or args.flush or args.resume_file is not None):
        raise OptionError("a copy to standard output has no summary, and can be neither flushed nor resumed")
    if args.resume_file == "-":
        raise OptionError("the journal cannot be standard output (-)", hint="write ./- for a file named -")
    if args.resume_file is not None and args.source == "-":
        raise OptionError("a copy from a pipe cannot be resumed", hint="omit --resume-file")
    plan = Plan(args.request_size, args.requests, args.sparse_size, args.flush, args.max_output, args.rate)
    begin = monotonic()
    with ExitStack() as stack:
        source = _open_source(args.source, args)
        stack.callback(source.close)
        _refuse_same(source, args)
        meter = stack.enter_context(Meter(args.target, asked=args.progress, quiet=args.quiet, piped=piped))
        run = _run_with_journal if args.resume_file is not None else _run
        copied = run(source, args, plan, Monitor(meter.report))
    if args.output == "json":
        _print_summary(args, copied, plan.flush or args.resume_file is not None, monotonic() - begin)
    return 0


def _print_summary(args: Namespace, copied: Copied, flushed: bool, seconds: float) -> None:
    from json import dumps

    found = {"source": args.source, "target": args.target, **copied._asdict()}
    sys.stdout.write(dumps(found | {"flushed": flushed, "seconds": round(seconds, 3)}, indent=4) + "\n")


# -- source and target


def _open_source(name: str, args: Namespace) -> Source | PipeSource:
    if name == "-":
        return PipeSource(sys.stdin.fileno(), "standard input")
    opener = Opener(read_only=True, policy=args.references, budget=args.limits, force_share=args.force_share)
    node = opener.open(name, storage=True)
    if args.force_share:
        tell_of_writers(node)
    with Image(node, budget=args.limits) as image:
        return StorageSource(image, extents=not args.no_extents)


def _refuse_same(source: Source | PipeSource, args: Namespace) -> None:
    """Raise OptionError if the copy would overwrite a file that it reads, or its own journal."""
    path = _path_of(args.target)
    if args.resume_file is not None:
        journal = os.path.realpath(args.resume_file)
        for name in (path, f"{os.path.realpath(path)}.partial") if path is not None else ():
            if os.path.realpath(name) == journal:
                raise OptionError("the journal and the target are one file", path=args.resume_file, hint=_OTHER)
        if isinstance(source, StorageSource):
            refuse_own(source.node, journal)
    if isinstance(source, PipeSource):
        if args.target == "-":
            refuse_input(sys.stdin.fileno(), sys.stdout.fileno(), "standard output")
        elif file := parse_name(args.target).get("filename"):
            refuse_input(sys.stdin.fileno(), file, file)
    elif isinstance(source, StorageSource) and path is not None:
        refuse_own(source.node, path)
    elif isinstance(source, StorageSource) and args.target == "-":
        refuse_stream(source.node, sys.stdout.fileno(), "standard output")


def _open_in_place(name: str, source: Source | PipeSource, args: Namespace) -> Target:
    """An existing target: an export, a pipe, a device; or a storage that discards data."""
    if name == "-":
        return PipeTarget(sys.stdout.fileno(), "standard output")
    options = parse_name(name)
    if options["driver"] == "null" and not isinstance(source, PipeSource):
        options.setdefault("size", source.size)
    child = Child(
        Opener(read_only=False, policy=args.references, budget=args.limits).open(options, storage=True), "target"
    )
    try:
        if isinstance(source, StorageSource):
            refuse_shared(source.node, child.node)
        return StorageTarget(child, name, blank=args.blank, grows=False, allocated=args.allocated)
    except BaseException:
        child.close()
        raise


def _path_of(name: str) -> str | None:
    """The path of a target that is or becomes a regular file; None for any other target."""
    if name == "-" or _is_in_place(parse_name(name)):
        return None
    path = path_in(name, what="the target of a copy")
    return None if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode) else path


def _is_in_place(options: dict[str, Any]) -> bool:
    """Whether a target with these options is storage other than a file."""
    driver = options.get("driver", "file")
    return driver not in ("file", "host_device") and registry.entry(driver).kind == "storage"


# -- the copy


def _run(source: Source | PipeSource, args: Namespace, plan: Plan, monitor: Monitor) -> Copied:
    path = _path_of(args.target)
    if path is None:
        return _copy_in_place(source, args, plan, monitor)
    with new_file(path, durable=args.flush) as file:
        storage = open_new(file)
        target = StorageTarget(storage, path, blank=True, grows=True, allocated=args.allocated)
        try:
            begin(storage)
            return Copy(source, target, plan, monitor=monitor).run()
        finally:
            target.close()


def _copy_in_place(
    source: Source | PipeSource, args: Namespace, plan: Plan, monitor: Monitor, journal: Journal | None = None
) -> Copied:
    """Copy to a target that cannot be replaced: an error message contains the position."""
    target = _open_in_place(args.target, source, args)
    try:
        job = Copy(source, target, plan, journal=journal, monitor=monitor)
        try:
            return job.run()
        except (LaminaError, KeyboardInterrupt) as error:
            append_hint(
                error, f"of the target, the first {job.position} bytes ({format_size(job.position)}) are copied"
            )
            raise
    finally:
        target.close()


def _run_with_journal(source: Source | PipeSource, args: Namespace, plan: Plan, monitor: Monitor) -> Copied:
    """As `_run`, but the copied bytes remain after an error and are used by the next run."""
    path = _path_of(args.target)
    known = Journal.resume(args.resume_file)
    if known is not None and path is not None and _is_there(path, known):
        # The last run ended between two steps: the copy has its name, but the journal still exists.
        known.expect(_facts(source, args) | {key: known.facts.get(key) for key in ("partial", "target-identity")})
        known.remove()
        return Copied(known.position, 0, 0, 0, 0, known.position)
    with ExitStack() as stack:
        facts = _facts(source, args)
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
        journal = _begin_journal(known, args.resume_file, facts, partial)
        try:
            if partial is None:
                copied = _copy_in_place(source, args, plan, monitor, journal)
            else:
                copied = _copy_to_partial(source, args, plan, monitor, journal, partial)
                partial.finish()
        except (LaminaError, KeyboardInterrupt) as error:
            append_hint(error, f"the same command resumes at {journal.position} ({format_size(journal.position)})")
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
    source: Source | PipeSource, args: Namespace, plan: Plan, monitor: Monitor, journal: Journal, partial: PartialFile
) -> Copied:
    child = open_unsynced(partial.path)
    target = StorageTarget(child, partial.path, blank=True, grows=True, allocated=args.allocated)
    storage = child.node.children["image"].node
    try:
        partial.expect(storage.identity if isinstance(storage, StorageNode) else None)
        return Copy(source, target, plan, journal=journal, monitor=monitor).run()
    finally:
        target.close()


def _facts(source: Source | PipeSource, args: Namespace) -> dict[str, Any]:
    """The facts in a journal: names, sizes, and the identity and time of a source file, which must stay the same."""
    facts: dict[str, Any] = {}
    for word, name in (("source", args.source), ("target", args.target)):
        path = None if name == "-" else parse_name(name).get("filename")
        if isinstance(path, str):
            facts[word] = os.path.realpath(path)
            if word == "source":
                status = os.stat(path)
                facts["source-identity"] = [status.st_dev, status.st_ino, status.st_mtime_ns]
        else:
            facts[word] = name
    facts["source-size"] = None if isinstance(source, PipeSource) else source.size
    return facts
