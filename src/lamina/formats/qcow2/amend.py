"""Options of an image that change in place: size, width of the reference counts, lazy refcounts, and key slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import OptionError
from ...limits import is_power_of_two
from ...schema import Option, Schema

if TYPE_CHECKING:
    from ...request import Child
    from .header import Header

SCHEMA = Schema(
    "qcow2",
    [
        Option("size", "size", "size of the virtual disk"),
        Option("refcount_bits", "int", "width of a reference count: 1, 2, 4 ... 64", minimum=1, maximum=64),
        Option("lazy_refcounts", "bool", "whether writers may update reference counts late"),
        Option(
            "encrypt",
            "dict",
            "a key slot of an encrypted image",
            items=Schema(
                "encrypt",
                [
                    Option(
                        "state", "enum", "add a passphrase, or erase one", required=True, choices=("active", "inactive")
                    ),
                    Option("new-secret", "any", "the passphrase to add"),
                    Option("old-secret", "any", "the passphrase to erase, from each of its slots"),
                    Option("keyslot", "int", "the slot", minimum=0, maximum=7),
                    Option("iter-time", "int", "milliseconds that unlocking takes", default=2000, minimum=1),
                    Option("force", "bool", "erase the last slot, too: the disk is lost", default=False),
                ],
            ),
        ),
    ],
)


def require_possible(header: Header, values: Mapping[str, Any], path: str) -> None:
    """Raise OptionError where one of these changes cannot be, before any of them is made."""
    bits = values.get("refcount_bits")
    if bits is not None and not is_power_of_two(bits):
        raise OptionError(f"refcount_bits {bits} is not a power of two", path=path)
    if header.version < 3 and (bits not in (None, 16) or values.get("lazy_refcounts")):
        raise OptionError("version 2 has counts of 16 bits, and none that are lazy", path=path)
    if values.get("encrypt") is not None and header.crypt_method != 2:
        raise OptionError("only an image encrypted with LUKS has key slots", path=path)


def amend_key_slot(file: Child, header: Header, key: bytes, values: Mapping[str, Any]) -> None:
    """Add or erase a passphrase of the image in `file`, as `encrypt` of SCHEMA says. `key`: the master key."""
    from ...crypto.secret import reveal
    from .encryption import luks_header

    luks, slot, path = luks_header(file, header), values.get("keyslot"), file.node.filename
    if values["state"] == "active":
        luks.add_key(key, reveal(values.get("new-secret")), slot=slot, iter_time=values["iter-time"])
        return
    if values.get("old-secret") is not None:
        slots = luks.slots_of(reveal(values["old-secret"]))
        if not slots:
            raise OptionError("no key slot opens with the passphrase that is to be erased", path=path)
    elif slot is not None:
        slots = [slot]
    else:
        raise OptionError("neither a slot nor its passphrase is given", path=path, hint="give keyslot")
    for number in slots:
        luks.erase_slot(number, force=values["force"])
