"""What notebooks show of results: tables in HTML, escaped and bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from ..errors import LaminaError
from ..options import format_size
from .markup import escaped, shortened

if TYPE_CHECKING:
    from ..check_result import CheckResult
    from ..results import ImageInfo

#: The most rows of a table, and the most characters of a value.
MOST_ROWS, LONGEST = 50, 200


def guarded(make: Callable[[], str]) -> str:
    """The HTML that `make` returns. An error is shown in its place: a notebook that displays a value has nobody to handle
    it."""
    try:
        return make()
    except LaminaError as error:
        return note(str(error))
    except Exception as error:  # noqa: BLE001 - it is shown
        return note(f"{type(error).__name__}: {error}")


def note(text: str) -> str:
    """A paragraph."""
    return f"<p>{escaped(shortened(text, 5 * LONGEST))}</p>"


def heading(name: str, text: str) -> str:
    """A paragraph that begins with the name of a file."""
    return f"<p><b>{escaped(shortened(name, LONGEST))}</b>: {escaped(text)}</p>"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], count: int) -> str:
    """A table of the first rows of `count`, and a paragraph that says how many there are besides."""
    head = "".join(f'<th style="text-align:left">{escaped(title)}</th>' for title in titles)
    shown = list(islice(rows, MOST_ROWS))
    body = "".join(
        "<tr>"
        + "".join(f'<td style="text-align:left">{escaped(shortened(cell, LONGEST))}</td>' for cell in row)
        + "</tr>"
        for row in shown
    )
    more = note(f"and {count - len(shown)} more") if count > len(shown) else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def of_info(found: ImageInfo) -> str:
    """A description of an image."""
    rows: list[tuple[str, str]] = [("format", found.format + (" (probed)" if found.format_probed else ""))]
    for title, size in (
        ("virtual size", found.virtual_size),
        ("disk size", found.actual_size),
        ("file size", found.file_size),
        ("cluster size", found.cluster_size),
    ):
        if size is not None:
            rows.append((title, f"{format_size(size)} ({size} bytes)" if size >= 1024 else format_size(size)))
    if found.encrypted:
        rows.append(("encrypted", "yes"))
    if found.dirty:
        rows.append(("cleanly shut down", "no"))
    if found.backing_filename is not None:
        rows.append(("backing file", found.backing_filename))
        rows.append(("backing file format", found.backing_format or "not stated"))
    if found.snapshots:
        rows.append(("snapshots", str(len(found.snapshots))))
    rows += [("not supported here", feature) for feature in found.unsupported]
    return heading(found.filename, f"{found.format} image") + table(("property", "value"), rows, len(rows))


def of_check(found: CheckResult) -> str:
    """The result of a check: its counters, and the first findings."""
    verdict = "no errors" if found.clean else "has errors or leaks"
    counters = [
        ("errors", found.corruptions),
        ("leaks", found.leaks),
        ("parts that could not be checked", found.check_errors),
        ("errors repaired", found.corruptions_fixed),
        ("leaks repaired", found.leaks_fixed),
        ("clusters", found.total_clusters),
        ("allocated clusters", found.allocated_clusters),
        ("fragmented clusters", found.fragmented_clusters),
        ("compressed clusters", found.compressed_clusters),
    ]
    rows = [(title, str(number)) for number_of, (title, number) in enumerate(counters) if number or number_of < 3]
    text = heading(found.filename, f"{found.format} image, {verdict}") + table(("count of", ""), rows, len(rows))
    if not found.findings:
        return text
    told = ((one.kind, "" if one.offset is None else f"{one.offset:#x}", one.message) for one in found.findings)
    return text + table(("kind", "offset", "finding"), told, len(found.findings))
