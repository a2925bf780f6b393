"""`Image.layers`, the chain of a disk, and `Image.find`, a node of its graph by class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lamina
from lamina.filters.delay import Delay
from lamina.filters.stats import Stats
from lamina.formats.raw import Raw
from lamina.image import Image
from lamina.node import FilterNode, Node
from lamina.storage.file import FileStorage
from lamina.storage.memory import MemoryStorage

MIB = 1 << 20


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """top.qcow2 (3 MiB) over middle.qcow2 (2 MiB) over base.raw (1 MiB); each layer owns the MiB of its depth."""
    (tmp_path / "base.raw").write_bytes(b"b" * MIB)
    for name, below, format, size in (
        ("middle.qcow2", "base.raw", "raw", 2 * MIB),
        ("top.qcow2", "middle.qcow2", "qcow2", 3 * MIB),
    ):
        lamina.create(tmp_path / name, "qcow2", size=size, backing_file=below, backing_fmt=format)
        with lamina.open(tmp_path / name, format="qcow2", read_only=False) as image:
            image.write(size - MIB, name[:1].encode() * MIB)
    return tmp_path / "top.qcow2"


def test_layers_from_the_top_down(chain: Path) -> None:
    with lamina.open(chain, format="qcow2", read_only=False) as image:
        layers = image.layers
        assert [one.depth for one in layers] == [0, 1, 2]
        assert [one.format for one in layers] == ["qcow2", "qcow2", "raw"]
        names = [str(chain.with_name(name)) for name in ("top.qcow2", "middle.qcow2", "base.raw")]
        assert [one.filename for one in layers] == names
        assert [one.virtual_size for one in layers] == [3 * MIB, 2 * MIB, MIB]
        assert [one.file_size for one in layers] == [Path(name).stat().st_size for name in names]
        assert [one.actual_size for one in layers] == [Path(name).stat().st_blocks * 512 for name in names]
        assert [one.read_only for one in layers] == [False, True, True]
        assert [image.graph.nodes[one.node_name].driver for one in layers] == ["qcow2", "qcow2", "raw"]
        assert image.read_only is layers[0].read_only


def test_depth_is_that_of_extents(chain: Path) -> None:
    with lamina.open(chain, format="qcow2") as image:
        for layer, start in zip(image.layers, (2 * MIB, MIB, 0), strict=True):
            row = image.extents().at(start)
            assert row.depth == layer.depth
            assert row.file is not None
            assert row.file.filename == layer.filename
        below = image.share(image.layers[1].node_name)
        with below:
            assert [one.filename for one in below.layers] == [one.filename for one in image.layers[1:]]


def test_filters_belong_to_the_layer_below_them(chain: Path) -> None:
    plain = {"driver": "qcow2", "file": {"driver": "stats", "image": {"driver": "file", "filename": str(chain)}}}
    with lamina.open(chain, format="qcow2", read_only=True) as image:
        expected = [one._replace(node_name="") for one in image.layers]
    for spec in (plain, {"driver": "delay", "image": {"driver": "stats", "image": plain}}):
        with lamina.open(spec, references=lamina.Policy.default()) as image:
            assert [one._replace(node_name="") for one in image.layers] == expected
    with lamina.open(chain, format="qcow2", snapshot=True) as image:
        assert [one.depth for one in image.layers] == [0, 1, 2]
        assert image.layers[0].format == "qcow2"


def test_an_edit_changes_the_layers(chain: Path) -> None:
    with lamina.open(chain, format="qcow2") as image:
        before = image.layers
        with image.edit() as edit:
            edit.insert("stats", {})
        assert image.layers == before
    with pytest.raises(lamina.Closed):
        image.layers  # noqa: B018


def test_storage_alone_is_one_layer() -> None:
    with Image(MemoryStorage(1000)) as image:
        (layer,) = image.layers
        assert (layer.depth, layer.format, layer.virtual_size, layer.file_size) == (0, "memory", 1000, 1000)


def test_a_filter_over_several_images_is_a_layer(tmp_path: Path) -> None:
    memory = {"driver": "memory", "size": 1024}
    with lamina.open({"driver": "concat", "children": [memory, memory]}) as image:
        (layer,) = image.layers
        assert (layer.format, layer.virtual_size, layer.file_size) == ("concat", 2048, None)


def test_a_filter_over_several_images_below_an_overlay(tmp_path: Path) -> None:
    lamina.create(tmp_path / "top.qcow2", "qcow2", size=2048)
    memory = {"driver": "memory", "size": 1024}
    file = {"driver": "file", "filename": str(tmp_path / "top.qcow2")}
    below = {"driver": "stats", "image": {"driver": "concat", "children": [memory, memory]}}
    with lamina.open({"driver": "qcow2", "file": file, "backing": below}) as image:
        assert [(one.depth, one.format, one.filename) for one in image.layers] == [
            (0, "qcow2", str(tmp_path / "top.qcow2")),
            (1, "concat", image.layers[1].filename),
        ]
        assert {row.depth for row in image.extents()} == {1}


def test_layers_are_json(chain: Path) -> None:
    with lamina.open(chain, format="qcow2") as image:
        found = [one.to_json() for one in image.layers]
    assert json.loads(json.dumps(found)) == found
    assert found[2] == {
        "depth": 2,
        "format": "raw",
        "filename": str(chain.with_name("base.raw")),
        "virtual-size": MIB,
        "file-size": MIB,
        "actual-size": chain.with_name("base.raw").stat().st_blocks * 512,
        "read-only": True,
        "node-name": image_name(found[2]),
    }
    with lamina.open({"driver": "concat", "children": [{"driver": "memory", "size": 512}] * 2}) as image:
        assert "file-size" not in image.layers[0].to_json()


def image_name(layer: dict[str, object]) -> object:
    """The name that Lamina made for a node."""
    name = layer["node-name"]
    assert isinstance(name, str)
    assert name.startswith("raw#")
    return name


# find


def test_find_returns_the_node_of_a_class(chain: Path) -> None:
    spec = {"driver": "stats", "image": {"driver": "qcow2", "file": {"filename": str(chain)}}}
    with lamina.open(spec) as image:
        stats: Stats = image.find(Stats)
        assert stats is image.node
        image.read(0, 512)
        assert stats.snapshot()["operations"]["read"]["done"] == 1
        assert image.find(Raw).filename == str(chain.with_name("base.raw"))  # at any depth
        assert image.find(FilterNode) is stats  # a base class


def test_find_names_what_there_is_instead(chain: Path) -> None:
    with lamina.open(chain, format="qcow2") as image:
        with pytest.raises(lamina.OptionError, match=r"no node of the class Stats; the nodes are qcow2#\d+ \(Qcow2"):
            image.find(Stats)
        with pytest.raises(
            lamina.OptionError, match=r"3 nodes are of the class FileStorage; name one: file#\d+, file#"
        ):
            image.find(FileStorage)


def test_find_by_name(tmp_path: Path) -> None:
    inner = {"driver": "stats", "node-name": "below", "image": {"driver": "memory", "size": 1024}}
    with lamina.open({"driver": "stats", "node-name": "above", "image": inner}) as image:
        assert image.find(Stats, "below") is image.node.children["image"].node
        assert image.find(Stats, name="above") is image.node
        with pytest.raises(lamina.OptionError, match="2 nodes are of the class Stats; name one: above, below"):
            image.find(Stats)
        with pytest.raises(lamina.OptionError, match="no node of the class Delay called 'below'"):
            image.find(Delay, "below")
        with pytest.raises(lamina.OptionError, match="no node of the class Node called 'beside'"):
            image.find(Node, "beside")


def test_find_looks_below_its_own_image_alone() -> None:
    with lamina.open({"driver": "memory", "size": 1024}) as one:
        spec = {"driver": "stats", "image": {"driver": "memory", "size": 512}}
        with lamina.open(spec, graph=one.graph) as other:
            assert other.find(Stats)
            assert other.find(MemoryStorage).size == 512
            assert one.find(MemoryStorage).size == 1024
            with pytest.raises(lamina.OptionError, match="no node"):
                one.find(Stats)


def test_a_filter_with_a_second_child_shows_the_layers_of_its_image(tmp_path: Path) -> None:
    """`logwrites` has a log beside its image; extents count depths as without it."""
    lamina.create(tmp_path / "disk.qcow2", "qcow2", 1 << 20)
    disk = {"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "disk.qcow2")}}
    log = {"driver": "memory", "size": 0}
    with lamina.open({"driver": "logwrites", "image": disk, "log": log}, read_only=False) as image:
        image.write(0, b"x")
        assert [layer.format for layer in image.layers] == ["qcow2"]
        assert image.extents(0, 512)[0].depth == 0
