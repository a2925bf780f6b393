"""Drivers of the reference tools, and options of drivers, that have no effect here or are not supported, and why.

Scripts give these options for reasons of the other program: its caches, its threads, its checks. An option that changes no
result here is accepted if its value is valid there, and ignored; any other is refused as "not supported", never as unknown.
`schema.Schema` asks `find` about options that a driver does not have.
"""

from __future__ import annotations

from typing import NamedTuple


class PeerOption(NamedTuple):
    """One option. `why`: the reason why it has no effect, or is not supported. `type`: the type of its values, as of
    `schema.Option`, if it is accepted; None: it is refused. `choices`: the accepted words of an enum."""

    why: str
    type: str | None = None
    choices: tuple[str, ...] = ()


_ONE_ORDER = "reference counts are written before what refers to them, always"
_DISCARDS = "freed clusters are discarded as far as the option discard of the node allows"
_CACHES = "the caches of tables have one size of their own"
_THREADS = "requests run in threads"

#: Options of the files of new images.
_NEW_FILES = {
    "nocow": PeerOption("files are copied on write as their folder says (chattr +C)", "bool"),
    "extent_size_hint": PeerOption("the file system chooses the size of its extents", "size"),
}

#: Options by driver; "" stands for every driver.
OPTIONS: dict[str, dict[str, PeerOption]] = {
    "": {
        "auto-read-only": PeerOption("a file is opened for what its user needs", "bool"),
        "copy-on-read": PeerOption("it is a filter here: driver=copy_on_read,image...."),
        "throttling": PeerOption("it is a filter here: driver=throttle,image...."),
        "x-blockdev-change": PeerOption("graphs are edited by the library: Image.edit"),
    },
    "raw": _NEW_FILES,
    "qcow2": _NEW_FILES
    | {
        "lazy-refcounts": PeerOption(_ONE_ORDER, "bool"),
        "pass-discard-request": PeerOption(_DISCARDS, "bool"),
        "pass-discard-snapshot": PeerOption(_DISCARDS, "bool"),
        "pass-discard-other": PeerOption(_DISCARDS, "bool"),
        "overlap-check": PeerOption("writes never reach a cluster of metadata", "any"),
        "l2-cache-entry-size": PeerOption(_CACHES, "size"),
        "cache-clean-interval": PeerOption("tables that are not used make room for others", "int"),
    },
    "file": {
        "aio": PeerOption(_THREADS, "enum", ("threads", "native", "io_uring")),
        "aio-max-batch": PeerOption(_THREADS, "int"),
        "drop-cache": PeerOption("the system decides what stays in its cache", "bool"),
        "x-check-cache-dropped": PeerOption("the system decides what stays in its cache", "bool"),
        "pr-manager": PeerOption("persistent reservations are not supported"),
    },
    "null": {
        "latency-ns": PeerOption("it is a filter here: driver=delay,image.driver=null"),
    },
    "nbd": {
        "x-dirty-bitmap": PeerOption("extents of a bitmap: lamina map --context qemu:dirty-bitmap:NAME"),
    },
}


_SERVED = "let a program serve it over NBD, and open nbd://HOST: nbdkit has a plugin for it"
_MOUNTED = "mount it, and open the file"

#: Drivers and protocols of the reference tools that Lamina does not have: what to do instead.
DRIVERS: dict[str, str] = {
    **dict.fromkeys(("http", "https", "ftp", "ftps", "ssh", "iscsi", "iser", "rbd", "gluster", "nvme"), _SERVED),
    **dict.fromkeys(("nfs", "vvfat", "fat"), _MOUNTED),
    "host_cdrom": "open the device as a file: driver=host_device",
    "copy-before-write": "backups of a disk in use need bitmaps: lamina bitmap, lamina diff",
    "snapshot-access": "backups of a disk in use need bitmaps: lamina bitmap, lamina diff",
    "replication": "copies of a disk in use: driver=quorum, or lamina copy",
    "io_uring": "open the device as a file: driver=host_device",
}


def find(driver: str, name: str) -> PeerOption | None:
    """The option `name` of the driver `driver`, which does not have it here; None if the reference tools do not have it
    either."""
    return OPTIONS.get(driver, {}).get(name) or OPTIONS[""].get(name)
