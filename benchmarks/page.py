"""The pages with figures, made from `results.json` alone: `RESULTS.md`, the pictures, and the tables inside other pages.

`python -m benchmarks.page` writes them anew (`make bench` does so after each run). A table inside another page stands between
`<!-- figures: NAME -->` and `<!-- end of figures -->`; NAME is `summary`, or a section of `results.SECTIONS`. A test asserts
that every such table is the one that this module makes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import plot
from .peers import ROOT
from .results import SECTIONS, Promise, Results, Row, Spread, Work, load, text, write

MIB = 1 << 20

BENCHMARKS = ROOT / "benchmarks"
PAGE, DATA = "RESULTS.md", "results.json"
#: Pages with tables in marked blocks.
PAGES = ("README.md", "docs/speed.md")
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)

#: The rows of the summary: the title of a work, our program, and the words of the page.
SUMMARY = [
    ("1,048,576 extents, data stored", "lamina map", "`map` of a million extents"),
    ("1,048,576 extents, data stored", "lamina library", "the same as columns, by the library"),
    ("check, 1024 GiB, half mapped", "lamina check", "`check` of 1 TiB, half of it mapped"),
    ("tools: raw to qcow2, large", "lamina", "`convert` of 4.3 GB of files, raw to qcow2"),
    ("tools: qcow2 to raw, large", "lamina", "the same, qcow2 to raw"),
    ("tools: packed, zlib", "lamina", "`convert -c`, zlib"),
    ("tools: packed, zlib", "lamina, level 7", "`convert -c`, zlib, as small as qemu-img's"),
    ("tools: packed, zstd", "lamina", "`convert -c`, zstd"),
    ("tools: packed to raw", "lamina", "`convert` of compressed clusters to raw"),
    ("tools: compare, large", "lamina", "`compare` of two equal images, 4.3 GB of files"),
    (
        "nbd: 4 KiB random reads, 16 in flight",
        "lamina serve",
        "NBD server, thousands of random reads of 4 KiB a second",
    ),
    ("nbd: 256 KiB sequential reads, 16 in flight", "lamina serve", "NBD server, sequential reads of 256 KiB"),
    ("start-up", "lamina info", "start-up of `info`"),
]


def number(value: float, digits: int = 3) -> str:
    """With so many digits that mean something, and no exponent: 0.523, 1.89, 16.0, 198.7."""
    whole = len(str(int(abs(value))))
    return f"{value:.{max(digits - whole if abs(value) >= 1 else digits, 1)}f}"


def figure(row: Row) -> str:
    return f"{number(row.figure.value)} {row.unit}" if row.figure else "n/a"


def extent(spread: Spread | None, digits: int = 3) -> str:
    """The least and the most."""
    if spread is None or spread.least is None or spread.most is None:
        return ""
    return f"{number(spread.least, digits)} to {number(spread.most, digits)}"


def found(promise: Promise) -> str:
    """Such as "0.67", "8.1 ms" or "0.09 s more"."""
    return f"{promise.found.value:.2f} {promise.unit}".rstrip() if promise.found else "n/a"


def target(promise: Promise) -> str:
    """Such as "at most 0.60"."""
    if promise.target is None:
        return ""
    return f"at {'least' if promise.at_least else 'most'} {promise.target:.2f} {promise.unit}".rstrip()


def aligned(lines: Sequence[Sequence[str]], numbers: set[int]) -> str:
    """A Markdown table. The columns in `numbers` are on the right."""
    rule = ["---:" if n in numbers else "---" for n in range(len(lines[0]))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


# -- RESULTS.md


def results_page(results: Results, pictures: str = "") -> str:
    """The page with all rows. `pictures`: the folder of the pictures, as the page names it; none without."""
    parts = [
        "# Figures",
        "Made by `make bench` from [results.json](results.json); [README.md](README.md) says what is measured and how. "
        "A figure is the median of its rounds, with the least and the most of them. A ratio compares Lamina with the best "
        "of the peers, median with median; its least and most are those of single rounds, in which the programs take turns. "
        "Where these are missing, an earlier version of the benchmark kept one figure.",
        _verdicts(results),
        "## Runs",
        _runs(results),
        "Versions before and after the large changes: [before-and-after.md](before-and-after.md).",
    ]
    for section, title in SECTIONS.items():
        works = [work for work in results.works if work.section == section]
        if works:
            parts.append(f"## {title}")
            if pictures and plot.bars(works):
                parts.append(f"![the ratios of this section as a picture]({pictures}{picture(section)})")
            parts.append(_table(works))
    errors = [f"- {work.title}, {row.program}: {row.error}" for work, row in results.rows() if row.error]
    if errors:
        parts += ["## Not measured", "\n".join(errors)]
    return "\n\n".join(parts) + "\n"


def picture(section: str) -> str:
    return f"speed-{section}.svg"


def _verdicts(results: Results) -> str:
    kept: dict[str, list[str]] = {"met": [], "missed": [], "n/a": []}
    for work, row in results.rows():
        for promise in row.promises:
            if promise.verdict:
                kept[promise.verdict].append(f"- {work.title}, {row.program}: {found(promise)}, {target(promise)}")
    count = {verdict: len(lines) for verdict, lines in kept.items()}
    said = f"Of {sum(count.values())} targets {count['met']} were met and {count['missed']} missed"
    said += f"; {count['n/a']} could not be measured." if count["n/a"] else "."
    return "\n\n".join([said, *(["Missed:\n\n" + "\n".join(kept["missed"])] if kept["missed"] else [])])


def _runs(results: Results) -> str:
    lines = []
    for index, run in enumerate(results.runs, 1):
        works = [work for work in results.works if work.run == index - 1]
        seconds = sum(work.seconds or 0 for work in works)
        facts = "; ".join(f"{name} {value}" for name, value in run.machine.items())
        line = f"{index}. {run.date}, commit {run.commit}; {facts}."
        line += f" {len(works)} works in {seconds / 60:.0f} minutes." if seconds else f" {len(works)} works."
        lines.append(f"{line} {run.note}".rstrip())
    return "\n".join(lines)


def _table(works: list[Work]) -> str:
    head = ["work", "run", "program", "figure", "least to most", "CPU", "peak MiB", "made MiB"]
    lines = [[*head, "in comparison", "ratio", "least to most", "target", ""]]
    for work in works:
        for index, row in enumerate(work.rows):
            title = ["", ""] if index else [f"{work.name} ({work.how})", str(work.run + 1)]
            cpu = "" if row.cpu is None else f"{number(row.cpu)} {'s' if row.unit == 's' else 'us'}"
            memory = "" if row.memory is None else f"{row.memory / MIB:.0f}"
            stored = f"{row.stored / MIB:.1f}" if row.stored else ""
            cells = [*title, row.program, figure(row), extent(row.figure), cpu, memory, stored]
            lines += _beside(cells, [_compared(promise) for promise in row.promises])
    return aligned(lines, {1, 3, 4, 5, 6, 7, 9, 10, 11})


def _beside(cells: list[str], promises: list[list[str]]) -> Iterator[list[str]]:
    """The cells with the first promise, and a line without them for each further one."""
    for promise in promises or [[""] * 5]:
        yield [*cells, *promise]
        cells = [""] * len(cells)


def _compared(promise: Promise) -> list[str]:
    what = f"{promise.what}, {promise.of}" if promise.of else promise.what
    return [what, found(promise), extent(promise.found, 2), target(promise), promise.verdict]


# -- tables of other pages


def summary(results: Results) -> str:
    """What the README shows: some rows, each with the best peer."""
    lines = [["work", "Lamina", "best peer", ""]]
    used = []
    for title, program, words in SUMMARY:
        work = results.work(title)
        row = next((row for row in work.rows if row.program == program), None) if work else None
        promise = row.promises[0] if row and row.promises else None
        if work is None or row is None or promise is None or promise.found is None:
            continue
        peer = next((one for one in work.rows if one.program == promise.of), None)
        ratio = promise.found.value
        said = f"{ratio:.1f} times the rate" if promise.what == "rate" else f"{ratio:.2f} of the time"
        if promise.what == "CPU":
            said = f"{ratio:.2f} of the CPU time"
        lines.append([words, _cell(row, promise), f"{_cell(peer, promise)}, {promise.of}" if peer else "", said])
        used.append(results.run(work).date)
    return "\n\n".join([aligned(lines, {1}), *([_when(used)] if used else [])])


def _cell(row: Row, promise: Promise) -> str:
    shown = f"{number(row.cpu)} s" if promise.what == "CPU" and row.cpu is not None else figure(row)
    return (
        f"{shown}, {row.stored / MIB:.0f} MiB"
        if any(one.what == "size" for one in row.promises) and row.stored
        else shown
    )


def _when(dates: list[str]) -> str:
    first, last = min(dates), max(dates)
    when = f"on {first}" if first == last else f"between {first} and {last}"
    return f"Measured {when} by `make bench`; every row with its spread, and the machine: `benchmarks/{PAGE}`."


def section(results: Results, name: str) -> str:
    """The works of a section, a column for each program."""
    works = [work for work in results.works if work.section == name]
    peers: dict[str, None] = {}
    for work in works:
        if len({row.program for row in work.rows if not row.ours}) > 1:
            peers |= dict.fromkeys(row.program for row in work.rows if not row.ours and row.program != "one client")
    lines = [["work", "Lamina", *peers, "ratio", "least to most", "target", ""]]
    for work in works:
        figures = {row.program: _main(work, row) for row in work.rows}
        if not set(figures) & set(peers):
            continue
        for row in work.rows:
            if row.ours:
                words = work.name if row.program in OWN else f"{work.name} ({row.program})"
                cells = [words, figures[row.program], *(figures.get(peer, "") for peer in peers)]
                promises = []
                for promise in row.promises:
                    what, ratio, *rest = _compared(promise)
                    plain = promise is row.promises[0]
                    promises.append([ratio if plain else f"{ratio} ({what})", *rest])
                lines += _beside(cells, promises or [[""] * 4])
    dates = [results.run(work).date for work in works]
    return "\n\n".join([aligned(lines, set(range(1, len(lines[0]) - 1))), *([_when(dates)] if dates else [])])


def _main(work: Work, row: Row) -> str:
    """The figure that the work is about: the peak memory, or the rate or time."""
    memory = [promise.what for one in work.rows for promise in one.promises][:1] == ["memory"]
    if memory and row.memory is not None:
        return f"{row.memory / MIB:.0f} MiB"
    return figure(row)


#: Rows that the title of a work alone describes.
OWN = {"lamina", "lamina serve", "lamina copy", "lamina convert", "lamina check", "lamina info", "lamina library"}


def filled(page: str, results: Results) -> str:
    """The text of a page with its marked blocks made anew. ValueError if a block has an unknown name."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name != "summary" and name not in SECTIONS:
            raise ValueError(f"there are no figures called {name!r}: use summary, {', '.join(SECTIONS)}")
        made = summary(results) if name == "summary" else section(results, name)
        return f"{match[1]}{made}\n{match[3]}"

    return BLOCK.sub(block, page)


def pages(results: Results) -> dict[Path, str]:
    """All files of this repository that come from the results, and their texts."""
    found = {BENCHMARKS / PAGE: results_page(results, "../docs/")}
    for name in PAGES:
        path = ROOT / name
        found[path] = filled(path.read_text(), results)
    return found | pictures(results, ROOT / "docs")


def pictures(results: Results, folder: Path) -> dict[Path, str]:
    found = {}
    for name, title in SECTIONS.items():
        works = [work for work in results.works if work.section == name]
        if plot.bars(works):
            found[folder / picture(name)] = plot.svg(works, title)
    return found


def write_all(results: Results, folder: Path) -> None:
    """Write the results and what is made from them: into this repository if `folder` is its own, else all into `folder`."""
    write(folder / DATA, text(results))
    results = load(folder / DATA)  # with as many digits as the file keeps, from which the pages are made again
    if folder.resolve() == BENCHMARKS:
        made = pages(results)
    else:
        made = {folder / PAGE: results_page(results, "./"), **pictures(results, folder)}
    for path, content in made.items():
        write(path, content)


def main() -> int:
    """Write the pages of this repository anew."""
    write_all(load(BENCHMARKS / DATA), BENCHMARKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
