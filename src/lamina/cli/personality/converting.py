"""The arguments of `qemu-img convert` in which it differs from `lamina convert`."""

from __future__ import annotations

from argparse import Namespace

from ...errors import OptionError
from ...options import asks_for_help, flatten, parse_keyval, to_keyval
from .tool import SECTOR

#: The largest -S, in bytes.
_MOST_SPARSE = 16 << 20
#: Options of a new image without an effect: the new disk has the size of the source.
_IGNORED = ("size",)


def adjust(args: Namespace) -> None:
    """Change the parsed arguments of `convert`."""
    if args.sparse_size is not None and (args.sparse_size % SECTOR or args.sparse_size > _MOST_SPARSE):
        raise OptionError(f"-S is {args.sparse_size}", hint=f"it takes multiples of {SECTOR} up to {_MOST_SPARSE}")
    if args.no_create and args.target_format is None and not args.target_image_opts:
        args.target_format = "raw"
    texts = args.target_options or ()
    if args.no_create or any(asks_for_help(text) for text in texts):
        return
    given: dict[str, object] = {}
    for text in texts:
        given |= flatten(parse_keyval(text, last_wins=True))
    kept = {key: value for key, value in given.items() if key not in _IGNORED and (key, value) != ("encryption", "off")}
    args.target_options = [to_keyval(kept)] if kept else None
