"""`lamina check`: compare the structures of an image with one another, without a change.

Exit status: 0 clean, 1 the check was impossible or incomplete, 2 errors, 3 leaked clusters only, 63 the format has no check.
Scripts parse the lines with the result.
"""

from __future__ import annotations

import sys
from typing import Any

from ..check_result import CheckResult
from ..errors import UnsupportedFeature, printable
from ..inspection import check
from . import program
from .arguments import Parser, image_source, warn_of_writers

_EXAMPLES = """
  lamina check disk.qcow2
  lamina check --output=json -f qcow2 disk.qcow2
  lamina check -r leaks disk.qcow2                 free what nothing refers to

exit status: 0 clean, 1 incomplete, 2 errors, 3 leaks only, 63 the format has no check
"""

NOT_FINISHED, ERRORS, LEAKS, NO_CHECK = 1, 2, 3, 63


def main(argv: list[str]) -> int:
    parser = Parser("check", "Check the metadata of an image for errors, without a change.", _EXAMPLES)
    parser.add_quiet()
    parser.add_format("-f", "--format", dest="format", help="format of the image (default: detected)")
    parser.add_output()
    parser.add_argument(
        "-r",
        "--repair",
        choices=("leaks", "all"),
        help="repair: leaks frees clusters that nothing refers to, all mends contradictions too",
    )
    parser.add_cache("-T", "--cache", dest="cache", written=False)
    parser.add_access()
    parser.add_argument("filename", metavar="FILE", help="the image")
    args = parser.parse(argv)

    source = image_source(args.filename, args, args.format)
    given: dict[str, Any] = {"format": args.format or "probe", "budget": args.limits, "force_share": args.force_share}
    given["repair"] = args.repair
    try:
        found = check(source, **given)
    except UnsupportedFeature as error:
        if not args.quiet:
            program.tell(error.command_text())
        return NO_CHECK
    warn_of_writers(found.other_writers)

    text = program.current.checked(found, json=args.output == "json")
    if text is not None:
        sys.stdout.write(text)
    elif args.output == "json":
        import json

        sys.stdout.write(json.dumps(found.to_json(), indent=4) + "\n")
    else:
        for finding in found.findings:
            sys.stderr.write(f"{finding.kind}: {printable(finding.message)}\n")
        if not args.quiet:
            sys.stdout.write(_human(found))
    if found.check_errors:
        return NOT_FINISHED
    if found.corruptions:
        return ERRORS
    return LEAKS if found.leaks else 0


def _human(found: CheckResult) -> str:
    text = ""
    if found.corruptions_fixed or found.leaks_fixed:
        text += (
            "The following inconsistencies were found and repaired:\n\n"
            f"    {found.leaks_fixed} leaked clusters\n    {found.corruptions_fixed} corruptions\n\n"
            "Double checking the fixed image now...\n"
        )
    if found.clean:
        text += "No errors were found on the image.\n"
    if found.corruptions:
        text += (
            f"\n{found.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it.\n"
        )
    if found.leaks:
        text += (
            f"\n{found.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data.\n"
        )
    if found.check_errors:
        text += f"\n{found.check_errors} internal errors have occurred during the check.\n"
    total, allocated = found.total_clusters, found.allocated_clusters
    if total and allocated:
        text += (
            f"{allocated}/{total} = {100 * allocated / total:.2f}% allocated, "
            f"{100 * found.fragmented_clusters / allocated:.2f}% fragmented, "
            f"{100 * found.compressed_clusters / allocated:.2f}% compressed clusters\n"
        )
    if found.image_end_offset:
        text += f"Image end offset: {found.image_end_offset}\n"
    return text
