"""The pages of figures: from canned results to the exact text, and the pages of this repository from its results."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmarks import page, plot
from benchmarks.results import SECTIONS, Promise, Results, Row, Run, Spread, Work, load, text

ROOT = Path(__file__).resolve().parent.parent.parent
DAY = Run("2026-01-02", "abc1234", {"processors": "2", "kernel": "Linux 6.18"})


def map_of_extents() -> Work:
    ours = Row("lamina map", figure=Spread(0.5, 0.4, 0.6), cpu=0.25, memory=60 << 20)
    ours.promises = [Promise("CPU", "qemu-img 7.2", Spread(0.5, 0.45, 0.55), 0.6)]
    theirs = Row("qemu-img 7.2", figure=Spread(0.75, 0.7, 0.8), cpu=0.5, memory=17 << 20)
    return Work("commands", "1,048,576 extents, data stored", "median of 5", [ours, theirs], 0, 60.0)


def packed() -> Work:
    ours = Row("lamina", figure=Spread(2.0), stored=220 << 20)
    ours.promises = [
        Promise("wall", "qemu-img 7.2", Spread(0.125), 0.2),
        Promise("size", "qemu-img 7.2", Spread(1.125), 1.1),
        Promise("wall", "qemu-img 7.2", Spread(-14.0), 0.1, unit="s more"),
    ]
    theirs = Row("qemu-img 7.2", figure=Spread(16.0), stored=195 << 20)
    return Work("tools", "tools: packed, zlib", "median of 3", [ours, theirs, Row("qemu-img 10.0", error="no space")])


def served() -> Work:
    ours = Row("lamina serve", "k/s", Spread(200.0, 180.0, 210.0), cpu=4.9)
    ours.promises = [Promise("rate", "qemu-nbd 7.2", Spread(4.0, 3.5, 4.5), 1.5, at_least=True)]
    return Work(
        "nbd", "nbd: 4 KiB random reads, 16 in flight", "median of 3", [ours, Row("qemu-nbd 7.2", "k/s", Spread(50.0))]
    )


def canned() -> Results:
    return Results([DAY], [map_of_extents(), packed(), served()])


def test_the_page_of_results() -> None:
    made = page.results_page(canned(), "../docs/")
    assert made.startswith("# Figures\n")
    lines = made.splitlines()
    assert "Of 5 targets 4 were met and 1 missed." in lines
    assert "- tools: packed, zlib, lamina: 1.12, at most 1.10" in lines
    assert "1. 2026-01-02, commit abc1234; processors 2; kernel Linux 6.18. 3 works in 1 minutes." in lines
    assert "![the ratios of this section as a picture](../docs/speed-tools.svg)" in lines
    at = lines.index("## Status, check, conversions and start-up")
    assert lines[at + 4 : at + 8] == [
        "| work | run | program | figure | least to most | CPU | peak MiB | made MiB | in comparison | ratio "
        "| least to most | target |  |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- |",
        "| 1,048,576 extents, data stored (median of 5) | 1 | lamina map | 0.500 s | 0.400 to 0.600 | 0.250 s | 60 |  "
        "| CPU, qemu-img 7.2 | 0.50 | 0.45 to 0.55 | at most 0.60 | met |",
        "|  |  | qemu-img 7.2 | 0.750 s | 0.700 to 0.800 | 0.500 s | 17 |  |  |  |  |  |  |",
    ]
    assert "|  |  |  |  |  |  |  |  | wall, qemu-img 7.2 | -14.00 s more |  | at most 0.10 s more | met |" in lines
    assert "- tools: packed, zlib, qemu-img 10.0: no space" in lines


def test_the_summary() -> None:
    assert page.summary(canned()).splitlines() == [
        "| work | Lamina | best peer |  |",
        "| --- | ---: | --- | --- |",
        "| `map` of a million extents | 0.250 s | 0.500 s, qemu-img 7.2 | 0.50 of the CPU time |",
        "| `convert -c`, zlib | 2.00 s, 220 MiB | 16.0 s, qemu-img 7.2 | 0.12 of the time |",
        "| NBD server, thousands of random reads of 4 KiB a second | 200.0 k/s | 50.0 k/s, qemu-nbd 7.2 "
        "| 4.0 times the rate |",
        "",
        "Measured on 2026-01-02 by `make bench`; every row with its spread, and the machine: `benchmarks/RESULTS.md`.",
    ]


def test_a_section_has_a_column_for_each_program() -> None:
    assert page.section(canned(), "tools").splitlines()[:4] == [
        "| work | Lamina | qemu-img 7.2 | qemu-img 10.0 | ratio | least to most | target |  |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        "| packed, zlib | 2.00 s | 16.0 s | n/a | 0.12 |  | at most 0.20 | met |",
        "|  |  |  |  | 1.12 (size, qemu-img 7.2) |  | at most 1.10 | missed |",
    ]


def test_a_block_is_filled_and_nothing_else_changes() -> None:
    given = "before\n<!-- figures: summary -->\nold\n<!-- end of figures -->\nafter\n"
    made = page.filled(given, canned())
    assert made == f"before\n<!-- figures: summary -->\n{page.summary(canned())}\n<!-- end of figures -->\nafter\n"
    assert page.filled(made, canned()) == made
    with pytest.raises(ValueError, match="no figures called 'sumary'"):
        page.filled(given.replace("summary", "sumary"), canned())


def test_the_picture_shows_times_and_escapes_names() -> None:
    work = served()
    work.title = "nbd: <b> & c"
    (bar,) = plot.bars([work])
    assert (bar.ratio, bar.target, bar.missed) == (0.25, 1 / 1.5, False)
    assert bar.ends == (1 / 4.5, 1 / 3.5)
    drawn = plot.svg([work, packed()], "NBD")
    names = [one.text for one in ElementTree.fromstring(drawn).iter() if one.text]
    assert "<b> & c, serve" in names
    assert "packed, zlib, size" in names
    assert not any("more" in name for name in names), "a difference is no ratio"


def test_a_picture_stands_where_its_page_looks_for_it(tmp_path: Path) -> None:
    page.write_all(canned(), tmp_path)
    named = set(re.findall(r"\]\(\./(\S+\.svg)\)", (tmp_path / "RESULTS.md").read_text()))
    assert (
        named
        == {"speed-commands.svg", "speed-tools.svg", "speed-nbd.svg"}
        == {path.name for path in tmp_path.glob("*.svg")}
    )
    assert load(tmp_path / "results.json") == canned()
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_pages_of_a_run_are_those_of_the_data_that_it_wrote(tmp_path: Path) -> None:
    """A figure is rounded twice: for the file, and for the page."""
    results = canned()
    results.works[0].rows[0].cpu = 1.23451  # 1.235 in the file, which is 1.24 on the page, and not 1.23
    page.write_all(results, tmp_path)
    written = (tmp_path / "RESULTS.md").read_text()
    assert written == page.results_page(load(tmp_path / "results.json"), "./")
    assert written != page.results_page(results, "./")


# What a run changes


def titles(results: Results) -> list[tuple[str, str]]:
    return [(work.title, results.run(work).date) for work in results.works]


def test_a_run_of_some_works_leaves_the_others() -> None:
    later = Run("2026-02-03", "def5678", {})
    new = served()
    new.rows[0].figure = Spread(1.0)
    changed = canned().updated(later, [new], whole=False)
    assert titles(changed) == [
        ("1,048,576 extents, data stored", "2026-01-02"),
        ("tools: packed, zlib", "2026-01-02"),
        ("nbd: 4 KiB random reads, 16 in flight", "2026-02-03"),
    ]
    assert changed.works[2].rows[0].figure == Spread(1.0)
    added = Work("commands", "start-up", "median of 20", [])
    assert titles(changed.updated(Run("2026-03-04", "", {}), [added], whole=False))[1] == ("start-up", "2026-03-04")


def test_a_run_of_all_works_leaves_nothing_and_old_runs_go() -> None:
    changed = canned().updated(Run("2026-02-03", "def5678", {}), [served(), map_of_extents()], whole=True)
    assert [run.date for run in changed.runs] == ["2026-02-03"]
    assert [work.section for work in changed.works] == ["commands", "nbd"]


def test_results_are_the_same_when_they_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert load(path) == Results()
    path.write_text(text(canned()))
    assert load(path) == canned()


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (0.0389, 3, "0.039"),
        (1.888, 3, "1.89"),
        (16.03, 3, "16.0"),
        (198.71, 3, "198.7"),
        (4.5, 2, "4.5"),
        (0.25, 2, "0.25"),
    ],
)
def test_numbers_have_the_digits_that_mean_something(value: float, digits: int, shown: str) -> None:
    assert page.number(value, digits) == shown


# The pages of this repository


RESULTS = load(page.BENCHMARKS / page.DATA)


def test_the_pages_are_made_from_the_results() -> None:
    stale = [str(path.relative_to(ROOT)) for path, made in page.pages(RESULTS).items() if path.read_text() != made]
    assert not stale, f"run python -m benchmarks.page: {', '.join(stale)}"


@pytest.mark.parametrize(("name", "block"), [("README.md", "summary"), *(("docs/speed.md", name) for name in SECTIONS)])
def test_the_pages_show_figures_in_blocks(name: str, block: str) -> None:
    assert block in [found[2] for found in page.BLOCK.finditer((ROOT / name).read_text())]


#: A ratio or a measured time in prose: "0.12 of", "1.5 times", "0.1 s more", "3 GiB/s", "200 k/s".
FIGURE = re.compile(
    r"\d\.\d+ of (?!the rate of one)|\d+(\.\d+)? times (the|as)|\d\.\d+ s\b|\d (GiB/s|MB/s|k/s|us)\b|\| *\d+\.\d\d+ *\|"
)


def test_the_readme_has_no_figures_of_its_own() -> None:
    rest = page.BLOCK.sub("", (ROOT / "README.md").read_text())
    assert not FIGURE.findall(rest), "show figures in a block: see benchmarks/README.md"
    assert FIGURE.search("zlib takes 0.12 of the time, 0.1 s, or 2 times as long")


def test_the_results_name_no_machine() -> None:
    told = (page.BENCHMARKS / page.DATA).read_text() + (page.BENCHMARKS / page.PAGE).read_text()
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|var|dev|usr)/", told)
