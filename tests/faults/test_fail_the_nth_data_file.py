"""Every request of operations on an image with an external data file fails once and for good; nothing is lost.

The data file has a fixed length, and lies on the same disk as its image. Such images have no snapshots.
"""

from __future__ import annotations

import pytest

from lamina.formats.qcow2.driver import Qcow2
from lamina.testing.failing import fail_nth
from tests import evidence

from .test_fail_the_nth import (
    KIB,
    OPERATIONS,
    Geometry,
    Operation,
    checking,
    contents,
    everywhere,
    full,
    growing,
    growing_far,
    opening,
    requests,
    shrinking_and_growing,
    snapshotting,
)

GEOMETRIES = [
    Geometry("data file over a file", Qcow2, {"cluster_size": 4096, "data_file": "d"}, 100 * KIB, 4096, 120 * KIB),
    Geometry("raw data file", Qcow2, {"cluster_size": 512, "data_file": "d", "data_file_raw": True}, 66 * KIB, 512),
]
OTHERS = [everywhere, growing, growing_far, shrinking_and_growing, snapshotting]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=[geometry.name for geometry in GEOMETRIES])
@pytest.mark.parametrize("operation", [operation for operation in OPERATIONS if operation not in OTHERS])
def test_each_request_of_an_operation_fails(operation: Operation, geometry: Geometry) -> None:
    absorbed = ("read",) if operation is checking else ()
    content = contents(geometry, full)
    points = fail_nth(opening(geometry), operation, content=content, absorbed=absorbed)
    assert points == 4 * requests(geometry, operation, content)
    evidence.count("points (operation, request that fails, fault)", points)
