"""The verdict on LUKS: the header of version 1, by the same code that opens encrypted images."""

from __future__ import annotations

from ..crypto.luks1 import Luks1
from ..limits import Budget
from .content import Content
from .result import Findings


def judge(content: Content, found: Findings, budget: Budget) -> None:
    """Raises FormatError if the header is not that of a usable volume."""
    storage = content.storage()
    try:
        header = Luks1.read(storage, 0, content.size)
    finally:
        storage.close()
    found.features.append(f"cipher {header.spec.cipher}-{header.spec.mode_text}")
    if not 0 < header.payload_offset <= content.size:
        found.refuse("its payload is not inside the file")
        return
    found.virtual_size = content.size - header.payload_offset
