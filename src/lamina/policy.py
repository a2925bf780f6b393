"""Policies for references: the files that a name inside an image may open.

The name of a backing file, of a data file or of a parent is untrusted data. Only `Policy.open_reference` turns it into an
open file, and only if the policy of the image grants it. A policy decides about names alone: the budget (`limits.py`) bounds
the cost of the images, and the reference (`references.py`, which calls this module for every such name) says what kind of
file the image expects.

Base layer; POSIX: where a folder has no descriptor (Windows), no name inside an image is followed. Opening has no race: the
module resolves a name to a path without symlinks, checks that path, and then opens exactly that path, one directory at a
time, without following links. If another process replaces a file or directory by a symlink in between, the open fails; it
cannot lead to another file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

from .capabilities import (
    FOLDERS,
    O_CLOEXEC,
    O_DIRECTORY,
    O_NOCTTY,
    O_NOFOLLOW,
    O_NONBLOCK,
    O_PATH,
    has_rights_of_another,
    set_blocking,
    user,
)
from .descriptors import close_all, close_one, open_into
from .errors import (
    BlockIOError,
    Hint,
    LaminaError,
    NotFound,
    OptionError,
    PolicyError,
    join_hints,
    printable,
    printable_hint,
)
from .options import file_path, join_paths, split_paths

Kind = Literal["none", "beneath", "listed", "any"]

#: The longest accepted name, in bytes of the file system: PATH_MAX of Linux.
MAX_NAME = 4096
#: The longest name that a message shows completely, in characters: more than qcow2 can store.
MAX_SHOWN = 1024
#: The most symlinks followed during the resolution of one name; the limit of the Linux kernel.
MAX_LINKS = 40

#: Locations of the default of a site; see `Policy.default`.
SYSTEM_DEFAULT = "/etc/lamina/references"
_MAX_SITE_FILE = 64 << 10

_OWN, _OWN_READ_ONLY = "same-dir", "same-dir:read-only"
_SPELLINGS = "use none, same-dir, same-dir:read-only, beneath:DIRECTORY, list:FILE:FILE... or any"
_DIRECTORY_FLAGS = O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC
_Fds: TypeAlias = list[int] | None
_FILE_FLAGS = O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC


class GrantedFile(NamedTuple):
    """A file that a name inside an image refers to: its path without symlinks, and a descriptor, which the owner closes.
    `denied` makes the error for opening it for writing, if it may only be read."""

    path: str
    fd: int
    denied: Callable[[], PolicyError] | None = None


class Policy:
    """An immutable rule for names inside images. `none`, `beneath`, `listed`, `any` and `parse` create policies; `default` is
    the one in effect without an explicit policy.

    Threads and images may share a policy. Policies that grant the same are equal, and have the same hash; `str` returns the
    notation of `parse`, which gives an equal policy.
    """

    __slots__ = ("_directory", "_kind", "_paths", "_probed", "_writes", "trusting")

    def __init__(
        self,
        kind: Kind,
        *,
        directory: str | None = None,
        paths: tuple[str, ...] = (),
        probed: str | None = None,
        writes: bool = True,
        trusting: bool = False,
    ) -> None:
        self._kind: Kind = kind
        #: Whether names and formats are believed; see `unchecked`.
        self.trusting: bool = trusting
        self._directory = directory
        self._paths = paths
        self._probed = probed
        self._writes = writes  # whether a file may be opened for writing, if the image is

    @classmethod
    def none(cls) -> Policy:
        """No name inside an image opens a file. This is the policy for services that open uploads of strangers."""
        return cls("none")

    @classmethod
    def probed(cls, format: str) -> Policy:
        """As `none`, for an image whose `format` Lamina detected by its magic, because the user named none."""
        return cls("none", probed=format)

    @classmethod
    def beneath(cls, directory: str | os.PathLike[str] | None = None) -> Policy:
        """Regular files below `directory`, at any depth. Symlinks may lead anywhere below it, and nowhere else. `directory`
        is resolved now, not at each use.

        None stands for the *own directory* of each image: the directory of its file without symlinks, and its subdirectories.
        Hidden files and directories below it (with a leading dot) are not granted, nor are subdirectories that are symlinks:
        images in a home directory reach neither its keys nor the target of a link.
        """
        return cls("beneath", directory=None if directory is None else _real(directory))

    @classmethod
    def listed(cls, paths: Iterable[str | os.PathLike[str]]) -> Policy:
        """Exactly these files and block devices; `none` if there are none. Symlinks in `paths` are resolved now, not at each
        use."""
        if isinstance(paths, (str, bytes)):
            raise OptionError("a list of paths is needed, not a single path")
        found = tuple(sorted({_real(path) for path in paths}))
        return cls("listed", paths=found) if found else cls.none()

    @classmethod
    def any(cls) -> Policy:
        """Every regular file and block device that this process can open: only for images from trusted sources."""
        return cls("any")

    @classmethod
    def unchecked(cls) -> Policy:
        """As `any`, and images are believed as by the reference tools: a name inside an image has any notation of a command
        line (`json:`, URLs), a format that is not stated is detected, and an image whose format was detected is written. For
        the drop-in personality alone: no notation of `parse` stands for it."""
        return cls("any", trusting=True)

    @classmethod
    def parse(cls, text: str) -> Policy:
        r"""The policy in the notation of a command line: `none`, `same-dir` (the own directory), `same-dir:read-only` (the
        same, and no file is opened for writing), `beneath:DIR`, `list:A:B`, `any`.

        In a list, `\:` and `\\` stand for a colon and a backslash inside a path. Raises OptionError.
        """
        word, colon, rest = text.partition(":")
        if not colon and word in ("none", "any"):
            return cls("none" if word == "none" else "any")
        if text in (_OWN, _OWN_READ_ONLY):
            return cls("beneath", writes=text == _OWN)
        if word == "beneath" and rest:
            return cls.beneath(rest)
        if word == "list" and rest:
            paths = split_paths(rest)
            if "" in paths:
                raise OptionError(f'"{printable(text)}" contains an empty path', hint=_SPELLINGS)
            return cls.listed(paths)
        raise OptionError(f'"{printable(text)}" is not a policy for references', hint=_SPELLINGS)

    @classmethod
    def default(cls) -> Policy:
        """The policy for images with an explicit format and without an explicit policy: the setting of this site, otherwise
        the own directory, where files are read and never written (`same-dir:read-only`): an image of a stranger that is
        opened for writing would else name any file beside it as its data file.

        A site sets it, in the notation of `parse`, in the environment variable LAMINA_REFERENCES, in the file
        `lamina/references` below $XDG_CONFIG_HOME (~/.config), or in /etc/lamina/references; the first that exists is used. A
        file must belong to this user or to root; if other users may write to it, OptionError is raised. A process with more
        rights than its user (set-user-id) uses /etc alone.
        """
        plain = not has_rights_of_another()
        text = os.environ.get("LAMINA_REFERENCES") if plain else None
        if text:
            return _site_policy(text, "LAMINA_REFERENCES")
        for path in site_files() if plain else [SYSTEM_DEFAULT]:
            text = _site_file(path)
            if text is not None:
                return _site_policy(text, path)
        return cls("beneath", writes=False)

    @property
    def kind(self) -> Kind:
        """What the policy grants in general; its other properties say the rest."""
        return self._kind

    @property
    def directory(self) -> str | None:
        """The directory of `beneath`, without symlinks; None for the own directory of each image, and for other policies."""
        return self._directory

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of `listed`, without symlinks, sorted."""
        return self._paths

    def __str__(self) -> str:
        if self._kind == "beneath":
            own = _OWN if self._writes else _OWN_READ_ONLY
            return own if self._directory is None else f"beneath:{self._directory}"
        if self._kind == "listed":
            return "list:" + join_paths(self._paths)
        return self._kind

    def __repr__(self) -> str:
        return f"<Policy {printable(str(self))}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash(self._fields())

    def _fields(self) -> tuple[Any, ...]:
        # What was probed is told in messages alone.
        return (self._kind, self._directory, self._paths, self._writes, self.trusting)

    def open_reference(
        self, name: str, *, referrer: str, what: str = "backing file", writable: bool = False, fds: _Fds = None
    ) -> GrantedFile:
        """Open the file `name` if this policy grants it. The caller owns and closes `GrantedFile.fd`, which is added to `fds`
        (see `descriptors`).

        `name` is a name inside the image `referrer` (its real path), relative to the directory of that image. It is always a
        path: `json:`, URLs and option strings are refused, and `file:` has no meaning. `what` describes the file in messages.
        The file is opened for reading, with `writable` also for writing. The open never blocks, and opens nothing but a
        regular file or, if listed or with `any`, a block device.

        Raises PolicyError if the policy does not grant it, NotFound if it is granted but does not exist, BlockIOError if the
        system refuses to open it. The error does not reveal whether a file exists that is not granted.
        """
        check = _Check(self, name, referrer, what)
        check.check_name()
        if not FOLDERS:
            hint = "give it in the options, as the child of that role"
            raise check.refusal("names inside images are not followed on this system", hint)
        try:
            home = check.home()
            root = self._directory or (_resolve(home)[0] if self._kind == "beneath" else None)
            path, through = _resolve(os.path.join(home, name), root)
        except OSError as error:
            raise check.refusal("its target cannot be determined", None) from error
        check.check_path(path, root, through)
        denied = None
        if not self._writes:
            denied = partial(
                check.refusal, "it would be written, and this policy grants reading alone", check.grant(path)
            )
            if writable:
                raise denied()
        try:
            fd = check.open([] if fds is None else fds, path, os.O_RDWR if writable else os.O_RDONLY)
            return GrantedFile(path, fd, denied)
        except OSError as error:
            if isinstance(error, LaminaError):
                raise
            raise check.failure(error, path) from error


class _Check:
    """The check of one name against one policy, and the error messages."""

    __slots__ = ("name", "policy", "referrer", "what")

    def __init__(self, policy: Policy, name: str, referrer: str, what: str) -> None:
        self.policy = policy
        self.name = name
        self.referrer = referrer
        self.what = what

    def title(self) -> str:
        name = self.name if len(self.name) <= MAX_SHOWN else self.name[:64] + "..."
        return f'{self.what} "{name}"'

    def home(self) -> str:
        """The directory to which the name is relative."""
        referrer = self.referrer
        return os.path.dirname(referrer if referrer.startswith("/") else os.path.join(os.getcwd(), referrer))

    def grant(self, path: str) -> str:
        """A hint with the narrowest grant that would allow this file in addition to the present ones."""
        from shlex import quote

        if len(path) > MAX_SHOWN:
            in_python, option = "Policy.listed([PATH])", "list:PATH"
        else:
            paths = [*self.policy.paths, path]
            in_python, option = f"Policy.listed({paths!r})", quote("list:" + join_paths(paths))
        allow = "to allow it, give"
        return Hint(f"{allow} references={in_python}", command=f"{allow} --references {option}")

    def refusal(self, reason: str, hint: str | None) -> PolicyError:
        text = printable(f"{self.title()} is refused: {reason} (policy for references: {self.policy})")
        return PolicyError(text, path=self.referrer, operation="open", hint=printable_hint(hint))

    def failure(self, error: OSError, path: str) -> LaminaError:
        if error.errno == errno.ELOOP:
            # `path` had no links when it was checked.
            return self.refusal("it changed while it was being opened", "try again if that was intended")
        if error.errno == errno.ENOENT:
            return NotFound(printable(f"{self.title()} does not exist ({path})"), path=self.referrer, operation="open")
        message = printable(f"cannot open {self.title()} ({path})")
        return BlockIOError.from_os(error, message, path=self.referrer, operation="open")

    def check_name(self) -> None:
        """Refuse names that can be refused without a look at any file."""
        if self.policy.kind == "none":
            hint = self.grant(os.path.join(self.home(), self.name)) if "\0" not in self.name else None
            if self.policy._probed is None:
                raise self.refusal("no name inside an image is opened", hint)
            reason = (
                f"the format of the image, {self.policy._probed}, was only detected by its magic, and a detected format "
                "opens no other files"
            )
            probed = self.policy._probed
            named = Hint(
                f'if the format is {probed}, give it: format="{probed}"',
                command=f"if the format is {probed}, give it (-f {probed})",
            )
            raise self.refusal(reason, join_hints(named, hint) if hint else named)
        if not self.name:
            raise self.refusal("the name is empty", None)
        if "\0" in self.name:
            raise self.refusal("the name contains a NUL", None)
        try:
            length = len(os.fsencode(self.name))
        except UnicodeEncodeError as error:
            raise self.refusal("the name has no form in this file system", None) from error
        if length > MAX_NAME:
            raise self.refusal(f"the name has {length} bytes, above the limit of {MAX_NAME}", None)
        if _looks_like_protocol(self.name):
            raise self.refusal(
                "a name inside an image is always a path, and this one looks like a URL or options",
                "to use it, give that child in the options; for a file with that name write ./ before it",
            )

    def check_path(self, path: str, root: str | None, through: str | None) -> None:
        """Refuse `path` (absolute, without symlinks) unless the policy grants it. `through`: a directory of the name below
        `root` that is a symlink."""
        kind = self.policy.kind
        if path == "/proc" or path.startswith("/proc/"):
            # A link of the process itself, such as /dev/stdin, leads there as well: see _resolve.
            raise self.refusal("it leads into /proc", None)
        if kind == "listed" and path not in self.policy.paths:
            raise self.refusal("it is not in the list", self.grant(path))
        if kind != "beneath":
            return
        assert root is not None
        below = path.removeprefix(root.rstrip("/") + "/")
        if below == path:
            raise self.refusal(f"it leads outside of {root}", self.grant(path))
        if self.policy.directory is not None:
            return
        if through is not None:
            raise self.refusal(f'it leads through the directory "{through}", which is a symlink', self.grant(path))
        if any(part.startswith(".") for part in below.split("/")):
            raise self.refusal(f"it is hidden below {root}: a part of its path has a leading dot", self.grant(path))

    def check_type(self, mode: int, path: str) -> None:
        if stat.S_ISREG(mode):
            return
        if stat.S_ISBLK(mode):
            if self.policy.kind in ("listed", "any"):
                return
            raise self.refusal("it is a block device", self.grant(path))
        if stat.S_ISLNK(mode):
            raise self.refusal("it changed while it was being opened", "try again if that was intended")
        kind = _TYPES.get(stat.S_IFMT(mode), "not a file")
        raise self.refusal(f"it is {kind}, and only regular files are opened", None)

    def open(self, into: list[int], path: str, access: int) -> int:
        """A descriptor of exactly `path`: every step from the root refuses symlinks. Added to `into`. Raises OSError."""
        *parents, last = path.split("/")[1:]
        last = last or "."
        directories: list[int] = []
        try:
            directory = open_into(directories, "/", _DIRECTORY_FLAGS)
            for part in parents:
                directory = open_into(directories, part, _DIRECTORY_FLAGS, folder=directory)
                close_one(directories, 0)
            # Checked before it is opened, since the open of a device or a FIFO has side effects.
            self.check_type(os.stat(last, dir_fd=directory, follow_symlinks=False).st_mode, path)
            fd = open_into(into, last, access | _FILE_FLAGS, folder=directory)
        finally:
            for directory in directories:
                os.close(directory)
        try:
            self.check_type(os.fstat(fd).st_mode, path)
            set_blocking(fd)
            return fd
        except BaseException:
            close_all(into)
            raise


_TYPES = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
}


def _looks_like_protocol(name: str) -> bool:
    """Whether `name` begins like `nbd:`, `json:` or `https:`; `file:` does not count, since it is part of a path here."""
    scheme, colon, _ = name.partition(":")
    if not colon or not scheme.isascii() or not scheme[:1].isalpha() or scheme.lower() == "file":
        return False
    return scheme.translate(_SCHEME_MARKS).isalnum()


_SCHEME_MARKS = dict.fromkeys(map(ord, "+-._"))


def _resolve(path: str, root: str | None = None) -> tuple[str, str | None]:
    """The absolute `path` with every symlink resolved, as far as its parts exist; nothing is opened. Also returns the first
    directory below `root` that is a symlink, or None.

    Stops at /proc, whose links do not contain their targets. Raises OSError for too many links.
    """
    at = ""
    links = 0
    through = None
    pending = path.split("/")[::-1]
    while pending:
        part = pending.pop()
        if part in ("", "."):
            continue
        if part == "..":
            at = at.rpartition("/")[0]
            continue
        at = f"{at}/{part}"
        if at == "/proc":
            return at, through
        try:
            target = os.readlink(at)
        except OSError:
            # It is not a link, or does not exist: opening it will tell.
            continue
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        if through is None and pending and root is not None and at.startswith(root.rstrip("/") + "/"):
            through = at
        at = "" if target.startswith("/") else at.rpartition("/")[0]
        pending += target.split("/")[::-1]
    return at or "/", through


def _real(path: str | os.PathLike[str]) -> str:
    """The path without symlinks. OptionError if no file can have it."""
    return os.path.realpath(file_path(path))


def site_files() -> list[str]:
    """The locations of the setting of this site; the first that exists is used."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(home):  # the specification ignores relative paths: any user may own the current directory
        home = os.path.expanduser("~/.config")
    return [os.path.join(home, "lamina", "references"), SYSTEM_DEFAULT]


def _site_policy(text: str, source: str) -> Policy:
    try:
        return Policy.parse(text)
    except OptionError as error:
        raise OptionError(f"{printable(source)}: {error.message}", hint=error.hint) from error


def _site_file(path: str) -> str | None:
    """The setting of a site in a file: its first line that is neither blank nor a comment. None if the file does not exist or
    belongs to another user."""
    try:
        fd = os.open(path, os.O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, user()):
            return None
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            text = "other users may write to this file, so it cannot grant files to images"
            raise OptionError(text, path=path, hint="chmod go-w it")
        lines = os.fsdecode(os.read(fd, _MAX_SITE_FILE)).splitlines()
    finally:
        os.close(fd)
    return next((line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")), None)
