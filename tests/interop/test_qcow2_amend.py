"""Options of an image that change in place: widths of counts, lazy refcounts, size and key slots, judged by QEMU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.testing.image_checks import check_whole
from lamina.testing.persistence import Bounds, CrashState, Persistence
from lamina.testing.power_loss import record
from lamina.testing.recorder import Marks, Recorder
from tests.conftest import Qemu
from tests.crash.workloads import open_on

SIZE = 1 << 20


def made(path: Path, rng: random.Random, cluster: int, bits: int) -> bytes:
    lamina.create(path, "qcow2", SIZE, cluster_size=cluster, refcount_bits=bits, extended_l2=cluster > 4096)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for _ in range(10):
            offset = rng.randrange(SIZE)
            image.write(offset, rng.randbytes(min(rng.choice((1, 5000, 60_000)), SIZE - offset)))
        return image.read(0, SIZE)


def amended(path: Path, spec: Any = None, **values: Any) -> None:
    with lamina.open(spec or {"driver": "qcow2", "file": str(path)}, read_only=False) as image:
        node: Any = image.node
        node.amend(node.amend_schema.parse(values))


@pytest.mark.peers
@pytest.mark.parametrize("cluster", [512, 4096, 16_384])
def test_every_width_becomes_every_other(tmp_path: Path, qemu: Qemu, cluster: int) -> None:
    path, rng = tmp_path / "disk.qcow2", random.Random(cluster)
    disk = bytearray(made(path, rng, cluster, 16))
    widths = [1, 64, 2, 32, 4, 8, 16, 1, 16, 64]
    for number, bits in enumerate(widths):
        amended(path, refcount_bits=bits)
        assert lamina.info(path, format="qcow2").to_json()["format-specific"]["data"]["refcount-bits"] == bits
        qemu.img("check", path)
        assert lamina.check(path, format="qcow2").clean
        with lamina.open(path, format="qcow2", read_only=False) as image:
            assert image.read(0, SIZE) == disk
            offset = rng.randrange(SIZE - 9000)
            image.write(offset, bytes([number + 1]) * 9000)
            disk[offset : offset + 9000] = bytes([number + 1]) * 9000
        qemu.img("check", path)


@pytest.mark.peers
def test_counts_that_do_not_fit(tmp_path: Path, qemu: Qemu) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, random.Random(1), 4096, 16)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.create_snapshot("one")
    before = path.read_bytes()
    with pytest.raises(lamina.LimitExceeded, match="more references than 1 bits"):
        amended(path, refcount_bits=1)
    assert path.read_bytes() == before
    amended(path, refcount_bits=2)
    qemu.img("check", path)
    for values, match in (({"refcount_bits": 3}, "power of two"), ({"encrypt": {"state": "inactive"}}, "LUKS")):
        with pytest.raises(lamina.OptionError, match=match):
            amended(path, **values)
    old = tmp_path / "old.qcow2"
    lamina.create(old, "qcow2", SIZE, compat="0.10")
    amended(old, lazy_refcounts=False, refcount_bits=16)  # as it is
    for values in ({"refcount_bits": 64}, {"lazy_refcounts": True}):
        with pytest.raises(lamina.OptionError, match="version 2"):
            amended(old, **values)


@pytest.mark.peers
def test_compressed_clusters_follow_the_width(tmp_path: Path, qemu: Qemu) -> None:
    """Counts of one bit cannot count two of them in one cluster."""
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, refcount_bits=16)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        node: Any = image.node
        node.amend(node.amend_schema.parse({"refcount_bits": 1}))
        with pytest.raises(lamina.UnsupportedFeature):
            image.write(0, b"A" * 65_536, compress=True)
        node.amend(node.amend_schema.parse({"refcount_bits": 16}))
        for at in range(0, 3 * 65_536, 65_536):
            image.write(at, b"A" * 65_536, compress=True)
        assert image.extents(0, 65_536).compressed.all()
    qemu.img("check", path)
    assert lamina.check(path, format="qcow2").clean


@pytest.mark.peers
def test_size_and_lazy_refcounts(tmp_path: Path, qemu: Qemu) -> None:
    path = tmp_path / "disk.qcow2"
    made(path, random.Random(2), 4096, 16)
    amended(path, lazy_refcounts=True, size=2 * SIZE)
    found = lamina.info(path, format="qcow2")
    assert found.virtual_size == 2 * SIZE
    assert found.to_json()["format-specific"]["data"]["lazy-refcounts"] is True
    qemu.img("check", path)
    amended(path, lazy_refcounts=False)
    assert lamina.info(path, format="qcow2").to_json()["format-specific"]["data"]["lazy-refcounts"] is False


@pytest.mark.peers
def test_passphrases_come_and_go(tmp_path: Path, qemu: Qemu) -> None:
    path = tmp_path / "disk.qcow2"
    one, two = lamina.Secret(b"one"), lamina.Secret(b"two")
    lamina.create(path, "qcow2", SIZE, encrypt={"format": "luks", "key-secret": one, "iter-time": 1})

    def spec(secret: lamina.Secret) -> dict[str, Any]:
        return {"driver": "qcow2", "file": str(path), "encrypt": {"key-secret": secret}}

    with lamina.open(spec(one), read_only=False) as image:
        image.write(0, b"kept")
    amended(path, spec(one), encrypt={"state": "active", "new-secret": two, "keyslot": 5, "iter-time": 1})
    word = tmp_path / "word"
    word.write_bytes(b"two")
    options = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    qemu.io("--object", f"secret,id=s,file={word}", "--image-opts", "-c", "read -P 0x6b 0 1", options)
    amended(path, spec(two), encrypt={"state": "inactive", "old-secret": one})
    with pytest.raises(lamina.OptionError, match="no key slot"):
        lamina.open(spec(one))
    with pytest.raises(lamina.OptionError, match="last one"):
        amended(path, spec(two), encrypt={"state": "inactive", "keyslot": 5})
    with lamina.open(spec(two)) as image:
        assert image.read(0, 4) == b"kept"
    assert lamina.check(path, format="qcow2").clean


@pytest.mark.parametrize(("bits", "new"), [(16, 64), (64, 1), (2, 16)])
def test_a_power_cut_in_the_middle(tmp_path: Path, bits: int, new: int) -> None:
    path = tmp_path / "disk.qcow2"
    disk = made(path, random.Random(bits), 512, bits)
    states = 0

    def amend(storage: Recorder, marks: Marks) -> None:
        with open_on(storage, read_only=False) as image:
            node: Any = image.node
            node.amend(node.amend_schema.parse({"refcount_bits": new}))

    def verify(content: bytes, state: CrashState) -> None:
        nonlocal states
        states += 1
        with open_on(Recorder(content), read_only=True) as image:
            check_whole(image)
            assert image.read(0, SIZE) == disk

    record(amend, start=path.read_bytes(), model=Persistence.P4, bounds=Bounds(at_cut=40)).examine(verify)
    assert states > 10
