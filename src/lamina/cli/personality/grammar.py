"""The options of the reference tools, and their translation to those of Lamina's commands.

The tools parse with getopt: options may stand anywhere, short ones may be joined (`-qf qcow2`), long ones shortened
(`--out=json`), and of an option that is given twice the last one counts. A `Grammar` is written as a table of words:
`cache,t=` is `--cache` with a value, also written `-t`. The first name is that of Lamina's command; a `~` before it marks an
option that is not passed on.

The tables contain the spellings of both versions: 7.2 has few long names, and 10.0 has all of them.
"""

from __future__ import annotations

import getopt
from collections.abc import Sequence
from typing import NamedTuple

from ...errors import OptionError, printable


class Word(NamedTuple):
    """One option: its name in Lamina's command, its spellings, whether it has a value, and whether it is passed on."""

    name: str
    spellings: tuple[str, ...]
    has_value: bool
    passed: bool


class Found(NamedTuple):
    """A parsed command line: (name, value) of every option in its order, and the other words."""

    options: list[tuple[str, str]]
    operands: list[str]

    def last(self, name: str) -> str | None:
        """The value of the option `name`; None without it."""
        return next((value for key, value in reversed(self.options) if key == name), None)


class Grammar:
    """The options of one command."""

    def __init__(self, table: str) -> None:
        self.words = tuple(map(_word, table.split()))
        self._by_spelling = {_dashed(spelling): word for word in self.words for spelling in word.spellings}

    def parse(self, arguments: Sequence[str]) -> Found:
        """Raises OptionError for an unknown option, and for a value that is missing or not expected."""
        short = "".join(f"{s}:" if w.has_value else s for w in self.words for s in w.spellings if len(s) == 1)
        long = [f"{s}=" if w.has_value else s for w in self.words for s in w.spellings if len(s) > 1]
        try:
            options, operands = getopt.gnu_getopt(list(arguments), short, long)
        except getopt.GetoptError as error:
            raise OptionError(printable(error.msg), hint="--help lists the options") from error
        return Found([(self._by_spelling[name].name, value) for name, value in options], operands)

    def translate(self, found: Found) -> list[str]:
        """The command line of Lamina's command for `found`."""
        words: list[str] = []
        passed = {word.name: word for word in self.words if word.passed}
        for name, value in found.options:
            if name in passed:
                words.append(f"--{name}={value}" if passed[name].has_value else f"--{name}")
        return [*words, "--", *found.operands]

    def summary(self) -> str:
        """The options for a help text: `[-q] [-f FORMAT] ...`."""
        return " ".join(f"[{_shown(word)}]" for word in self.words if "help" not in word.spellings)


def _word(text: str) -> Word:
    names = text.removeprefix("~").removesuffix("=").split(",")
    return Word(names[0], tuple(names), text.endswith("="), not text.startswith("~"))


def _dashed(spelling: str) -> str:
    return f"-{spelling}" if len(spelling) == 1 else f"--{spelling}"


def _shown(word: Word) -> str:
    spelling = next((one for one in word.spellings if len(one) == 1), word.spellings[0])
    value = word.name.upper().replace("-", "_")
    if not word.has_value:
        return _dashed(spelling)
    return f"-{spelling} {value}" if len(spelling) == 1 else f"--{spelling}={value}"


_ANY = "~help,h object= "
_IMAGE = _ANY + "image-opts "

#: The commands of qemu-img.
IMG = {
    name: Grammar((_ANY if name == "create" else _IMAGE) + table)
    for name, table in {
        "amend": "progress,p quiet,q format,f= cache,t= force options,o=",
        "bench": """count,c= depth,d= format,f= flush-interval= aio,i= native,n no-drain offset,o= pattern= quiet,q
            buffer-size,s= step-size,S= cache,t= write,w force-share,U""",
        "bitmap": """add remove clear enable disable merge= source-file,b= source-format,F= granularity,g= quiet,q
            format,f=""",
        "check": "quiet,q format,f= output= repair,r= cache,T= force-share,U",
        "commit": "quiet,q format,f= cache,t= base,b= rate,r= drop,d progress,p",
        "compare": "a-format,f= b-format,F= cache,T= progress,p quiet,q strict,s force-share,U",
        "convert": """target-image-opts target-is-zero bitmaps skip-broken-bitmaps force-share,U
            copy-range,copy-range-offloading,C compress,c progress,p quiet,q no-create,n source-format,f=
            target-cache,t= source-cache,T= target-format,O= backing,B= backing-format,F= target-options,o=
            source-snapshot,l= sparse-size,S= rate,r= parallel,m= oob-writes,W salvage""",
        "create": "quiet,q format,f= backing,b= backing-format,F= backing-unsafe,u options,o=",
        "dd": "force-share,U format,f= output-format,O=",
        "info": "format,f= output= backing-chain,b force-share,U",
        "map": "format,f= start-offset,s= max-length,l= output= force-share,U",
        "measure": """output= target-format,O= target-options,o= size,s= format,f= source-snapshot,snapshot,l=
            force-share,U""",
        "snapshot": "force-share,U quiet,q list,l apply,a= create,c= delete,d= format,f=",
        "rebase": """force-share,U quiet,q format,f= cache,t= backing-cache,T= progress,p backing-unsafe,u backing,b=
            backing-format,F= compress,c""",
        "resize": "format,f= preallocation= quiet,q shrink",
    }.items()
}

#: The program qemu-io.
IO = Grammar(
    _IMAGE
    + """~version,V cmd,c= format,f= read-only,r snapshot,s nocache,n copy-on-read,C misalign,m native-aio,k aio,i=
    cache,t= discard,d= ~trace,T= force-share,U"""
)

#: The program qemu-nbd.
NBD = Grammar(
    _IMAGE
    + """~version,V port,p= bind,b= socket,k= shared,e= persistent,t verbose,v export-name,x= description,D= offset,o=
    allocation-depth,A bitmap,B= list,L tls-creds= tls-authz= tls-hostname= ~trace,T= fork pid-file= selinux-label=
    connect,c= disconnect,d format,f= read-only,r snapshot,s load-snapshot,l= nocache,n cache= aio= discard=
    detect-zeroes= handshake-limit="""
)
