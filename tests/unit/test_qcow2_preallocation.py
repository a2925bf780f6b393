"""Preallocated qcow2 images read as zeros, whatever the storage contained before."""

from __future__ import annotations

import random

import pytest

from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.image import Image
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing.image_checks import check_whole

MIB = 1 << 20


class Device(MemoryStorage):
    """Storage of a fixed size, full of old bytes, which outlives the images on it."""

    def __init__(self) -> None:
        super().__init__(4 * MIB)
        self.write(0, memoryview(random.Random(1).randbytes(4 * MIB)))

    @property
    def growable(self) -> bool:
        return False

    def close(self) -> None:
        pass


@pytest.mark.parametrize("how", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("extended", [False, True])
def test_old_bytes_of_a_device_are_not_those_of_the_disk(how: str, extended: bool) -> None:
    device = Device()
    options = {"size": MIB, "preallocation": how, "extended_l2": extended, "cluster_size": 16_384}
    Qcow2.create(Child(device, "file", grows=True), MIB, Qcow2.creation_schema().parse(options))
    spec = {"file": Child(device, "file", grows=True)}
    with Image(Qcow2.open(Qcow2.schema.parse(spec), Opener(read_only=False))) as image:
        assert not any(image.read(0, MIB))
        image.write(700_000, b"new")
        assert image.read(700_000 - 16_384, 32_768) == bytes(16_384) + b"new" + bytes(16_381)
        check_whole(image)
