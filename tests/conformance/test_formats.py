"""The formats, in many geometries, against `FormatConformance`."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from lamina.crypto.secret import Secret
from lamina.node import Node
from lamina.request import Child
from lamina.testing import FormatConformance
from lamina.testing.formats import KeptMemory


class TestRaw(FormatConformance):
    driver = "raw"


class TestRawTail(FormatConformance):
    driver = "raw"
    open_options = {"offset": 77}


class TestRawWindow(FormatConformance):
    driver = "raw"
    open_options = {"offset": 65_536, "size": 200_000}
    resizes = False


class Qcow2(FormatConformance):
    driver = "qcow2"
    size_unit = 512
    unit = 512
    create_options = {"cluster_size": 512}
    size = 70_000


class TestQcow2Clusters512(Qcow2):
    pass


class TestQcow2Clusters512Version2(Qcow2):
    create_options = {"cluster_size": 512, "compat": "0.10"}


class TestQcow2Clusters512Bits1(Qcow2):
    create_options = {"cluster_size": 512, "refcount_bits": 1}


class TestQcow2Clusters512Bits64(Qcow2):
    create_options = {"cluster_size": 512, "refcount_bits": 64}


class TestQcow2Bytes1000(Qcow2):
    size = 1000
    unit = 300
    create_options = {"cluster_size": 65_536}


class TestQcow2Bytes1000OverLonger(Qcow2):
    size = 1000
    unit = 300
    create_options = {"cluster_size": 4096}
    backing = 100_000


class TestQcow2BackingShorter(Qcow2):
    backing = 30_001


class TestQcow2BackingEqual(Qcow2):
    create_options = {"cluster_size": 4096}
    unit = 4096
    backing = 70_000


class TestQcow2BackingLonger(Qcow2):
    create_options = {"cluster_size": 4096, "refcount_bits": 1}
    unit = 4096
    backing = 100_000


class TestQcow2BackingShorterVersion2(Qcow2):
    create_options = {"cluster_size": 4096, "compat": "0.10"}
    unit = 4096
    backing = 30_001


class TestQcow2BackingLongerVersion2(Qcow2):
    create_options = {"cluster_size": 512, "compat": "0.10"}
    backing = 100_000


class TestQcow2BackingEqualVersion2Whole(Qcow2):
    create_options = {"cluster_size": 4096, "compat": "0.10"}
    unit = 4096
    size = backing = 65_536


class TestQcow2Clusters65536(Qcow2):
    create_options = {"cluster_size": 65_536}
    unit = 65_536
    size = 5 * 65_536 + 512
    backing = 200_000


class TestQcow2Clusters2M(Qcow2):
    create_options = {"cluster_size": 2 << 20}
    unit = 2 << 20
    size = (2 << 20) + 70_001


class TestQcow2Clusters2MVersion2OverBacking(Qcow2):
    create_options = {"cluster_size": 2 << 20, "compat": "0.10"}
    unit = 2 << 20
    size = (2 << 20) + 70_001
    backing = (2 << 20) + 10_000


SECRET = Secret(b"conformance")


class EncryptedQcow2(Qcow2):
    """With the LUKS header the image is made of more than 2 MiB."""

    create_options = {"cluster_size": 4096, "encrypt": {"format": "luks", "key-secret": SECRET, "iter-time": 1}}
    open_options = {"encrypt": {"key-secret": SECRET}}
    unit = 4096


class TestQcow2Encrypted(EncryptedQcow2):
    pass


class TestQcow2EncryptedOddSizeOverLonger(EncryptedQcow2):
    size = 70_001
    size_unit = 512
    backing = 100_000


class TestQcow2EncryptedCbc(EncryptedQcow2):
    create_options = {
        "cluster_size": 512,
        "encrypt": {
            "format": "luks",
            "key-secret": SECRET,
            "iter-time": 1,
            "cipher-alg": "aes-128",
            "cipher-mode": "cbc",
            "ivgen-alg": "essiv",
            "ivgen-hash-alg": "md5",
        },
    }
    unit = 512
    backing = 30_001


class TestQcow2Subclusters(Qcow2):
    """Zeroes are in subclusters of 512 bytes."""

    create_options = {"cluster_size": 16_384, "extended_l2": True}
    unit = 16_384


class TestQcow2SubclustersOverShorter(Qcow2):
    create_options = {"cluster_size": 16_384, "extended_l2": True, "refcount_bits": 1}
    unit = 16_384
    backing = 30_001


class TestQcow2SubclustersOddSizeOverLonger(Qcow2):
    create_options = {"cluster_size": 32_768, "extended_l2": True}
    unit = 32_768
    size = 70_001
    size_unit = 512
    backing = 100_000


class TestQcow2SubclustersEncrypted(EncryptedQcow2):
    create_options = {
        "cluster_size": 16_384,
        "extended_l2": True,
        "encrypt": {"format": "luks", "key-secret": SECRET, "iter-time": 1},
    }
    unit = 16_384
    backing = 30_001


class DataFile(Qcow2):
    """Over an external data file, which is in memory too, and outlives the node."""

    create_options = {"cluster_size": 4096, "data_file": "data"}
    unit = 4096

    @cached_property
    def _data(self) -> dict[Node, KeptMemory]:
        """The data files by the storage of their images."""
        return {}

    def make(self, storage: Child) -> None:
        kind = self.kind()
        with TemporaryDirectory() as folder:
            path = Path(folder, "data")
            path.touch()
            given = {**self.create_options, "size": self.size}
            values = kind.creation_schema().parse(given) | {"data_file_path": str(path)}
            kind.create(storage, self.size, values)
        self._data[storage.node] = KeptMemory(self.size)

    def over(self, storage: KeptMemory, below: KeptMemory | None, *, read_only: bool = False) -> Node:
        data = self._data[storage]
        data.read_only = read_only
        self.open_options = {"data-file": Child(data, "data-file", grows=True)}
        return super().over(storage, below, read_only=read_only)


class TestQcow2DataFile(DataFile):
    pass


class TestQcow2DataFileClusters512(DataFile):
    create_options = {"cluster_size": 512, "data_file": "data"}
    unit = 512


class TestQcow2DataFileRaw(DataFile):
    create_options = {"cluster_size": 4096, "data_file": "data", "data_file_raw": True}


class TestQcow2DataFileExtended(DataFile):
    create_options = {"cluster_size": 16_384, "data_file": "data", "extended_l2": True}
    unit = 512


class TestQcow2DataFileRawExtended(DataFile):
    create_options = {"cluster_size": 16_384, "data_file": "data", "data_file_raw": True, "extended_l2": True}
    unit = 512


class TestQcow2DataFileOverBacking(DataFile):
    backing = 100_000


class TestQcow2DataFileExtendedOverShorterBacking(DataFile):
    create_options = {"cluster_size": 16_384, "data_file": "data", "extended_l2": True}
    unit = 512
    backing = 30_001
