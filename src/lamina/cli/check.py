"""`lamina check`: hold the structures of an image against one another, changing nothing.

Exit status: 0 clean, 1 the check could not be done or not be finished, 2 errors, 3 leaked clusters only, 63 the format
has nothing to check. The lines about the result are those that scripts know.
"""

from __future__ import annotations

import sys
from typing import Any

from ..errors import UnsupportedFeature, printable
from ..format import Format
from ..graph import open_graph
from ..report import CheckReport
from .arguments import Parser, image_source, tell_of_writers

_EXAMPLES = """
  lamina check disk.qcow2
  lamina check --output=json -f qcow2 disk.qcow2

exit status: 0 clean, 1 not finished, 2 errors, 3 leaks only, 63 the format has nothing to check
"""

NOT_FINISHED, ERRORS, LEAKS, NO_CHECK = 1, 2, 3, 63


def main(argv: list[str]) -> int:
    parser = Parser("check", "Hold the structures of an image against one another, changing nothing.", _EXAMPLES)
    parser.add_quiet()
    parser.add_format("-f", "--format", dest="format", help="format of the image (default: found by its magic)")
    parser.add_output()
    parser.add_later("-r", "--repair", "repairing is not there yet", metavar="WHAT")
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the image")
    args = parser.parse(argv)

    source = image_source(args.filename, args, args.format)
    # What it is stacked on has nothing to do with it, and is not opened.
    node = open_graph(source, format=args.format or "probe", force_share=args.force_share, no_references=True)
    try:
        if args.force_share:
            tell_of_writers(node)
        try:
            if not isinstance(node, Format):
                raise UnsupportedFeature(f"the driver {node.driver} has nothing to check", path=node.filename)
            report = node.check()
        except UnsupportedFeature as error:
            if not args.quiet:
                sys.stderr.write(f"lamina: {printable(str(error))}\n")
            return NO_CHECK
        name, format = node.filename, node.driver
    finally:
        node.close()

    if args.output == "json":
        import json

        sys.stdout.write(json.dumps(_record(report, name, format), indent=4) + "\n")
    else:
        for finding in report.findings:
            sys.stderr.write(f"{finding.kind}: {printable(finding.message)}\n")
        if not args.quiet:
            sys.stdout.write(_human(report))
    if report.check_errors:
        return NOT_FINISHED
    if report.corruptions:
        return ERRORS
    return LEAKS if report.leaks else 0


def _record(report: CheckReport, name: str, format: str) -> dict[str, Any]:
    record: dict[str, Any] = {
        "image-end-offset": report.image_end_offset,
        "total-clusters": report.total_clusters,
        "check-errors": report.check_errors,
    }
    counts = {
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "allocated-clusters": report.allocated_clusters,
        "fragmented-clusters": report.fragmented_clusters,
        "compressed-clusters": report.compressed_clusters,
    }
    # Whoever reads these expects that a count of nothing is left out.
    record |= {key: count for key, count in counts.items() if count}
    record |= {"filename": name, "format": format}
    record["findings"] = [
        {"kind": one.kind, "message": one.message, **({} if one.offset is None else {"offset": one.offset})}
        for one in report.findings
    ]
    return record


def _human(report: CheckReport) -> str:
    text = ""
    if report.clean:
        text += "No errors were found on the image.\n"
    if report.corruptions:
        text += (
            f"\n{report.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it.\n"
        )
    if report.leaks:
        text += (
            f"\n{report.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data.\n"
        )
    if report.check_errors:
        text += f"\n{report.check_errors} internal errors have occurred during the check.\n"
    total, allocated = report.total_clusters, report.allocated_clusters
    if total and allocated:
        text += (
            f"{allocated}/{total} = {100 * allocated / total:.2f}% allocated, "
            f"{100 * report.fragmented_clusters / allocated:.2f}% fragmented, "
            f"{100 * report.compressed_clusters / allocated:.2f}% compressed clusters\n"
        )
    if report.image_end_offset:
        text += f"Image end offset: {report.image_end_offset}\n"
    return text
