"""The table of the NBD protocol: its page is what it says, and its numbers are those of the specification."""

from __future__ import annotations

import errno
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lamina.layout import Structure
from lamina.nbd import wire

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nbd_protocol", DOCS / "nbd_protocol.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_generated_from_the_table(generator: ModuleType) -> None:
    assert (DOCS / "nbd-protocol.md").read_text() == generator.page(), "run make docs"


def test_every_number_is_on_the_page(generator: ModuleType) -> None:
    told = {name for _, rows in generator.groups(Path(wire.__file__).read_text()) for name, _ in rows}
    constants = {name for name, value in vars(wire).items() if name.isupper() and isinstance(value, int | str)}
    # Bytes of units, and the number of zeros after one reply: no numbers of the protocol's own tables.
    assert constants - told <= {"EXPORT_REPLY_ZEROES", "KIB", "MIB"}, "without a meaning, or outside the groups"


#: As the published specification gives them, and nbd.h of other implementations.
SIZES = {"GREETING": 18, "OPTION": 16, "OPTION_REPLY": 20, "REQUEST": 28, "EXTENDED_REQUEST": 32, "SIMPLE_REPLY": 16}
SIZES |= {"STRUCTURED_REPLY": 20, "EXTENDED_REPLY": 32, "EXPORT_REPLY": 10, "INFO_EXPORT_DATA": 12}
SIZES |= {"INFO_BLOCK_SIZE_DATA": 14, "HOLE": 12, "ERROR": 6, "EXTENT": 8, "EXTENT_EXT": 16, "STATUS_EXT": 8}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_layouts_have_the_size_of_the_specification(name: str, size: int) -> None:
    structure = getattr(wire, name)
    assert isinstance(structure, Structure)
    assert structure.size == size == structure.codec.size


def test_errors_become_those_of_the_wire_and_back() -> None:
    for number in errno.errorcode:
        assert wire.to_wire(number) in wire.WIRE_ERRORS
    assert wire.to_wire(errno.EDQUOT) == wire.to_wire(errno.EFBIG) == wire.ENOSPC
    assert wire.to_wire(errno.EROFS) == wire.EPERM
    assert wire.to_wire(None) == wire.to_wire(errno.ENOMEM) == wire.to_wire(errno.EBADF) == wire.EIO
    assert wire.from_wire(wire.ENOSPC) == errno.ENOSPC
    assert wire.from_wire(12345) == errno.EINVAL
