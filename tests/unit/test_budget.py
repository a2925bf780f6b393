"""The budget of a graph: values that can be, and for each member that it is enforced, for all ways to open an image."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import Budget, LimitExceeded, OptionError
from lamina.cli.main import main
from lamina.jobs.convert import convert
from lamina.limits import KIB, MAX_CHAIN, MIB

CLUSTER = 4096


def chain(folder: Path, count: int) -> Path:
    """`count` images, each over the one before; the lowest one has a cluster of data."""
    below: dict[str, Any] = {}
    for index in range(count):
        path = folder / f"{index}.qcow2"
        lamina.create(path, "qcow2", MIB, cluster_size=CLUSTER, **below)
        below = {"backing_file": path.name, "backing_fmt": "qcow2", "backing_unchecked": True}
    with lamina.open(folder / "0.qcow2", format="qcow2", read_only=False) as lowest:
        lowest.write(0, b"base" * (CLUSTER // 4))
        lowest.write(8 * CLUSTER, b"more" * (CLUSTER // 4))
    return path


# Each member: with `enough` nothing is refused, with `less` the same work is. A new member needs a row.


def depth(top: Path, **members: Any) -> None:
    lamina.open(top, format="qcow2", budget=Budget(**members)).close()


def cached(top: Path, **members: Any) -> None:
    """What is cached is dropped, and nothing is refused: the driver of each level was told its share."""
    with lamina.open(top, format="qcow2", budget=Budget(**members)) as image:
        node, level = image.node, 1
        while True:
            if sum(node._caches) != 3 * MIB // level:  # type: ignore[attr-defined]
                raise LimitExceeded("another budget")
            if "backing" not in node.children:
                return
            node, level = node.children["backing"].node, level + 1


def rows(top: Path, **members: Any) -> None:
    with lamina.open(top, format="qcow2", budget=Budget(**members)) as image:
        assert len(image.extents()) == 4


def memory(top: Path, **members: Any) -> None:
    lamina.open(top, format="qcow2", budget=Budget(**members)).close()


def output(top: Path, **members: Any) -> None:
    with (
        lamina.open(top, format="qcow2", budget=Budget(**members)) as source,
        lamina.open({"driver": "memory", "size": MIB}, read_only=False) as target,
    ):
        convert(source, target, blank=True)


#: member -> (the work, enough of it, less than enough)
MEMBERS: dict[str, tuple[Callable[..., None], int, int]] = {
    "chain_depth": (depth, 4, 3),
    "cache_bytes": (cached, 3 * MIB, 2 * MIB),
    "rows": (rows, 4, 3),
    "memory": (memory, 5 * 8, 5 * 8 - 1),
    "max_output": (output, 2 * CLUSTER, 2 * CLUSTER - 1),
}


def test_every_member_has_a_row() -> None:
    assert set(MEMBERS) == set(Budget._fields)


@pytest.mark.parametrize("member", MEMBERS)
def test_each_member_is_enforced(tmp_path: Path, member: str) -> None:
    work, enough, less = MEMBERS[member]
    top = chain(tmp_path, 5)
    work(top, **{member: enough})
    with pytest.raises(LimitExceeded):
        work(top, **{member: less})


@pytest.mark.parametrize("members", [{"chain_depth": 151}, {"chain_depth": -1}, {"memory": "1G"}, {"rows": 1.5}])
def test_budgets_that_cannot_be(members: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(members))):
        Budget(**members)
    with pytest.raises(OptionError):
        Budget()._replace(**members)


def test_a_budget_is_a_value() -> None:
    budget = Budget(chain_depth=150, memory=1)
    assert budget == Budget(150, memory=1)
    assert pickle.loads(pickle.dumps(budget)) == copy.deepcopy(budget) == budget


def test_the_longest_chain_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = chain(tmp_path, MAX_CHAIN + 1)
    with lamina.open(top, format="qcow2", budget=Budget(chain_depth=MAX_CHAIN)) as image:
        assert image.read(0, 8) == b"basebase"
        assert image.extents().depth.max() == MAX_CHAIN
        with lamina.open({"driver": "memory", "size": MIB}, read_only=False) as target:
            convert(image, target, blank=True)
            assert target.read(8 * CLUSTER, 4) == b"more"
    limit = ["--limits", f"chain-depth={MAX_CHAIN}", "-f", "qcow2"]
    assert main(["map", *limit, str(top)]) == 0
    assert main(["info", "--backing-chain", *limit, str(top)]) == 0
    assert main(["io", "-r", *limit, "-c", "read -P 98 0 1", str(top)]) == 0
    capsys.readouterr()
    with pytest.raises(LimitExceeded, match="limit of 64 files"):
        lamina.open(top, format="qcow2")


def test_images_that_the_user_names_count_as_well(tmp_path: Path) -> None:
    """The third image, named in the options, names the other two itself."""
    chain(tmp_path, 3)
    spec: dict[str, Any] = {"driver": "qcow2", "file": {"filename": str(tmp_path / "2.qcow2")}}
    for name in ("new", "newer"):
        lamina.create(tmp_path / name, "qcow2", MIB)
        spec = {"driver": "qcow2", "file": {"filename": str(tmp_path / name)}, "backing": spec}
    lamina.open(spec, budget=Budget(chain_depth=4)).close()
    for depth in range(4):
        with pytest.raises(LimitExceeded, match=f"limit of {depth} files"):
            lamina.open(spec, budget=Budget(chain_depth=depth))


def test_an_edit_shares_the_budget_of_its_graph(tmp_path: Path) -> None:
    top = chain(tmp_path, 3)
    for name in ("overlay", "another"):
        lamina.create(tmp_path / name, "qcow2", MIB)
    spec = {"driver": "qcow2", "file": {"filename": str(tmp_path / "overlay")}}
    with lamina.open(top, format="qcow2", budget=Budget(chain_depth=4, memory=32)) as image:
        with image.edit() as edit:
            edit.overlay(spec)
        again = {**spec, "file": {"filename": str(tmp_path / "another")}}
        with image.edit() as edit, pytest.raises(LimitExceeded, match="32 of 32 bytes"):
            edit.overlay(again)
        assert image.read(0, 4) == b"base"
    with lamina.open(top, format="qcow2", budget=Budget(chain_depth=2)) as image:
        with image.edit() as edit, pytest.raises(LimitExceeded, match="limit of 2 files"):
            edit.overlay(spec)
        assert image.read(0, 4) == b"base"


def test_what_failed_to_open_costs_nothing(tmp_path: Path) -> None:
    top = chain(tmp_path, 2)
    broken = tmp_path / "broken"
    options: dict[str, Any] = {"backing_file": "missing", "backing_fmt": "raw", "backing_unchecked": True}
    lamina.create(broken, "qcow2", MIB, **options)
    with lamina.open(top, format="qcow2", budget=Budget(memory=24)) as image, image.edit() as edit:
        for _ in range(3):
            with pytest.raises(lamina.NotFound):
                edit.set_backing(image.node, {"driver": "qcow2", "file": {"filename": str(broken)}})
        edit.set_backing(image.node, {"driver": "qcow2", "file": {"filename": str(tmp_path / "0.qcow2")}})


def test_a_larger_disk_pays_for_its_larger_l1_table(tmp_path: Path) -> None:
    """With clusters of 512 bytes an L2 table maps 32 KiB: 8 bytes of L1 table for each of these."""
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", 32 * KIB, cluster_size=512)
    with lamina.open(path, format="qcow2", read_only=False, budget=Budget(memory=80)) as image:
        image.write(0, b"here")
        image.truncate(9 * 32 * KIB)
        with pytest.raises(LimitExceeded, match="a longer L1 table needs 16 bytes of memory, but 72 of 80"):
            image.truncate(11 * 32 * KIB)
        assert (image.size, image.read(0, 4)) == (9 * 32 * KIB, b"here")
        other = {"driver": "qcow2", "file": {"filename": str(tmp_path / "other")}}
        lamina.create(tmp_path / "other", "qcow2", 2 * 32 * KIB, cluster_size=512)
        with (
            image.edit() as edit,
            pytest.raises(LimitExceeded, match="72 of 80 bytes for all images"),
        ):
            edit.overlay(other)
        image.truncate(32 * KIB)
        image.truncate(10 * 32 * KIB)
    with lamina.open(path, format="qcow2") as image:
        assert (image.size, image.read(0, 4)) == (10 * 32 * KIB, b"here")


WORDS = {
    "map": ["map"],
    "check": ["check"],
    "compare": ["compare", "-F", "qcow2", "TOP"],
    "convert": ["convert", "-O", "raw", "TOP", "out.raw"],
    "io": ["io", "-r", "-c", "length"],
    "info": ["info", "--backing-chain"],
    "copy": ["copy", "SPEC", "out.raw"],
    "create": ["create", "-b", "TOP", "-F", "qcow2", "new.qcow2"],
}


@pytest.mark.parametrize("command", WORDS)
def test_every_command_that_opens_images_has_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    top = chain(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    names = {"TOP": top.name, "SPEC": f'json:{{"driver": "qcow2", "file.filename": "{top.name}"}}'}
    words = [names.get(word, word) for word in WORDS[command]]
    if command != "copy":
        words[1:1] = ["-f", "qcow2"]
    if command not in ("convert", "copy", "create"):
        words.append(top.name)
    member, enough, less = ("chain-depth", 1, 0) if command == "info" else ("memory", 16, 7)
    assert main([*words, "--limits", f"{member}={enough}"]) == 0
    assert main([*words, "--limits", f"{member}={less}"]) not in (0, 63)
    assert f"--limits {member}=" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "check", "map", "compare", "convert", "copy", "create", "io", "serve"])
def test_every_command_that_opens_images_shows_the_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "--limits LIMITS" in capsys.readouterr().out


def test_info_through_a_filter_has_the_budget(tmp_path: Path) -> None:
    top = chain(tmp_path, 1)
    source = {"driver": "readonly", "image": {"driver": "qcow2", "file": {"filename": str(top)}}}
    assert lamina.info(source, budget=Budget(memory=8)).virtual_size == MIB
    with pytest.raises(LimitExceeded, match="memory"):
        lamina.info(source, budget=Budget(memory=7))


def test_a_new_image_is_not_made_over_a_chain_that_cannot_be_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The target could be a file deep in the chain."""
    top = chain(tmp_path, 3)
    lowest = tmp_path / "0.qcow2"
    before = lowest.read_bytes()
    words = ["create", "-f", "qcow2", "-b", top.name, "-F", "qcow2", str(lowest), "--limits"]
    assert main([*words, "chain-depth=1"]) == 1
    assert "limit of 1 files" in capsys.readouterr().err
    assert main([*words, "chain-depth=2"]) == 1
    assert "limit" not in capsys.readouterr().err
    assert lowest.read_bytes() == before


def test_the_layers_below_a_new_image_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = chain(tmp_path, 2)
    (tmp_path / "source.raw").write_bytes(b"x" * MIB)
    words = ["convert", "-f", "raw", "-O", "qcow2", "-B", top.name, "-F", "qcow2"]
    names = [str(tmp_path / "source.raw"), str(tmp_path / "new.qcow2")]
    assert main([*words, "--limits", "chain-depth=2", *names]) == 0
    for depth in range(2):
        assert main([*words, "--limits", f"chain-depth={depth}", *names]) == 1
        assert f"limit of {depth} files" in capsys.readouterr().err
