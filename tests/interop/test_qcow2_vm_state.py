"""The machine state of internal snapshots: stored behind the disk, read from there, and left alone by QEMU's tools."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.crypto.secret import Secret
from lamina.errors import OptionError, UnsupportedFeature
from tests.conftest import Qemu

SIZE = (1 << 20) + 512


def opened(path: Path, snapshot: str, **more: Any) -> lamina.Image:
    return lamina.open({"driver": "qcow2", "file": {"filename": str(path)}, "snapshot-id": snapshot, **more})


@pytest.mark.peers
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cluster_size": 512},
        {"cluster_size": 16_384, "extended_l2": True},
        {"compat": "0.10"},
        {"refcount_bits": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("backing", [False, True])
def test_the_state_is_kept_beside_the_disk(tmp_path: Path, qemu: Qemu, options: dict[str, Any], backing: bool) -> None:
    path, rng = tmp_path / "disk.qcow2", random.Random(str(options))
    if backing:
        (tmp_path / "base").write_bytes(rng.randbytes(3 * SIZE // 512 * 512))
        options = options | {"backing_file": "base", "backing_fmt": "raw"}
    lamina.create(path, "qcow2", SIZE, **options)
    state, disk = rng.randbytes(300_001), rng.randbytes(SIZE)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, disk)
        first = image.create_snapshot("one", state)
        assert first.vm_state == len(state)
        second = image.create_snapshot("two")
        third = image.create_snapshot("three", state[::-1])
        image.write(1000, b"later")
        assert image.node.check().clean  # type: ignore[attr-defined]
        with pytest.raises(OptionError, match="has a snapshot"):
            image.create_snapshot("one", b"x" * 5000)
    qemu.img("check", "-f", "qcow2", path)
    told = json.loads(qemu.img("info", "--output=json", "-f", "qcow2", path).stdout)["snapshots"]
    assert [one["vm-state-size"] for one in told] == [len(state), 0, len(state)]
    with opened(path, first.id) as image:
        assert image.read_vm_state(0, len(state)) == state
        assert image.read_vm_state(70_000, 1000) == state[70_000:71_000]
        assert image.read(0, SIZE) == disk
        with pytest.raises(OptionError, match="not inside"):
            image.read_vm_state(len(state), 1)
    with opened(path, second.id) as image, pytest.raises(OptionError):
        image.read_vm_state(0, 1)
    qemu.img("snapshot", "-d", "one", path)
    qemu.img("snapshot", "-a", "three", path)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        assert image.read(0, SIZE) == disk
        image.truncate(SIZE + (4 << 20))  # the state of the disk that QEMU brought back must not become visible
        grown = image.read(SIZE, 4 << 20)
        assert grown == bytes(4 << 20)
    with opened(path, third.id) as image:
        assert image.read_vm_state(0, len(state)) == state[::-1]
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.delete_snapshot(third.id)
        image.delete_snapshot(second.id)
    assert lamina.check(path, format="qcow2").clean
    qemu.img("check", "-f", "qcow2", path)


def test_the_state_is_encrypted_as_the_disk_is(tmp_path: Path) -> None:
    path, secret = tmp_path / "disk.qcow2", Secret(b"word")
    lamina.create(path, "qcow2", SIZE, encrypt={"format": "luks", "key-secret": secret, "iter-time": 1})
    spec = {"driver": "qcow2", "file": {"filename": str(path)}, "encrypt": {"key-secret": secret}}
    with lamina.open(spec, read_only=False) as image:
        made = image.create_snapshot("one", b"registers " * 5000)
    assert b"registers" not in path.read_bytes()
    with lamina.open({**spec, "snapshot-id": made.id}) as image:
        assert image.read_vm_state(0, made.vm_state) == b"registers " * 5000


def test_formats_without_snapshots_have_no_state(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(512))
    with lamina.open(tmp_path / "raw", format="raw") as image, pytest.raises(UnsupportedFeature):
        image.read_vm_state(0, 1)
