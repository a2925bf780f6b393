"""Makes a child process like one on macOS or on Windows, as far as names and their absence go: for `test_systems.py`.

`darwin` and `windows` remove from the modules of the standard library what CPython lacks there, and make the calls that
remain refuse what the system would refuse. They are called before Lamina is imported. What a foreign kernel does by itself
(its file system, its sockets) is not imitated.
"""

from __future__ import annotations

import builtins
import errno
import os
import select
import selectors
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from .withheld import withhold

#: What CPython on macOS lacks, of the names that CPython on Linux has. SEEK_DATA and preadv are there in new versions.
NOT_ON_DARWIN = {
    os: """O_DIRECT O_LARGEFILE O_NOATIME O_PATH O_RSYNC O_TMPFILE SEEK_DATA SEEK_HOLE RWF_DSYNC RWF_HIPRI RWF_NOWAIT
        RWF_SYNC RWF_APPEND copy_file_range eventfd eventfd_read eventfd_write fdatasync getrandom getresgid getresuid
        getxattr listxattr memfd_create pidfd_open pipe2 posix_fadvise posix_fallocate preadv pwritev removexattr
        sched_getaffinity sched_getparam sched_getscheduler sched_setaffinity sched_setparam sched_setscheduler setns
        setresgid setresuid setxattr splice unshare""",
    select: "epoll EPOLLIN EPOLLOUT EPOLLERR EPOLLHUP EPOLLRDHUP EPOLLET EPOLLONESHOT EPOLLPRI EPOLL_CLOEXEC POLLRDHUP",
    socket: """SO_PEERCRED SO_DOMAIN SO_PROTOCOL SO_PRIORITY SO_PASSCRED SO_PEERSEC SOCK_CLOEXEC SOCK_NONBLOCK MSG_NOSIGNAL
        MSG_CMSG_CLOEXEC MSG_MORE AF_NETLINK AF_VSOCK AF_ALG AF_PACKET TCP_KEEPIDLE TCP_CORK TCP_DEFER_ACCEPT TCP_INFO
        TCP_LINGER2 TCP_QUICKACK TCP_SYNCNT TCP_USER_TIMEOUT TCP_WINDOW_CLAMP""",
    signal: "SIGPWR SIGRTMIN SIGRTMAX SIGSTKFLT SIGCLD SIGPOLL sigtimedwait sigwaitinfo",
}
_FCNTL = """F_OFD_GETLK F_OFD_SETLK F_OFD_SETLKW F_GETPIPE_SZ F_SETPIPE_SZ F_ADD_SEALS F_GET_SEALS F_NOTIFY F_SETLEASE
    F_GETLEASE F_GETSIG F_SETSIG"""

#: Further names that CPython on Windows lacks.
NOT_ON_WINDOWS = {
    os: """O_ACCMODE O_ASYNC O_CLOEXEC O_DIRECTORY O_DSYNC O_NDELAY O_NOCTTY O_NOFOLLOW O_NONBLOCK O_SYNC WNOHANG chown chroot
        fchdir fchmod fchown fork forkpty fpathconf fstatvfs get_blocking getegid geteuid getgid getgrouplist getgroups
        getloadavg getpgid getpgrp getpriority getsid getuid initgroups killpg lchown lockf major makedev minor mkfifo
        mknod nice openpty posix_spawn posix_spawnp pread pwrite readv register_at_fork sendfile set_blocking setegid
        seteuid setgid setgroups setpgid setpriority setregid setreuid setsid setuid statvfs sync tcgetpgrp tcsetpgrp
        ttyname uname wait wait3 wait4 waitid writev""",
    select: "poll POLLIN POLLOUT POLLERR POLLHUP POLLNVAL POLLPRI",
    socket: "AF_UNIX MSG_DONTWAIT MSG_EOR SO_REUSEPORT CMSG_LEN CMSG_SPACE send_fds recv_fds sethostname if_nameindex",
    signal: """SIGHUP SIGUSR1 SIGUSR2 SIGPIPE SIGALRM SIGKILL SIGCHLD SIGCONT SIGSTOP SIGTSTP SIGTTIN SIGTTOU SIGQUIT SIGPROF
        SIGIO SIGURG SIGSYS SIGTRAP SIGBUS SIGVTALRM SIGWINCH SIGXCPU SIGXFSZ alarm pause pthread_kill pthread_sigmask
        setitimer getitimer siginterrupt sigpending sigwait ITIMER_REAL""",
}
MODULES_NOT_ON_WINDOWS = ("fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")


def _remove(names: dict[ModuleType, str]) -> None:
    for module, line in names.items():
        for name in line.split():
            if hasattr(module, name):
                delattr(module, name)


def _refuse_proc() -> None:
    """Every call that takes a path finds no /proc."""

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **named: Any) -> Any:
            if isinstance(path, str) and path.startswith("/proc"):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return real(path, *rest, **named)

        return call

    for name in ("open", "stat", "lstat", "readlink", "listdir", "scandir", "access"):
        before = getattr(os, name)
        after = refusing(before)
        setattr(os, name, after)
        for known in (os.supports_dir_fd, os.supports_follow_symlinks, os.supports_fd):
            if before in known:
                known.add(after)
    builtins.open = refusing(builtins.open)  # type: ignore[assignment]


def darwin(*, full_fsync: bool = True) -> None:
    """Like macOS. `full_fsync`: with F_FULLFSYNC, which does here what fsync does."""
    import ctypes
    import fcntl

    sys.platform = "darwin"
    del selectors.EpollSelector
    selectors.DefaultSelector = selectors.PollSelector  # type: ignore[misc,assignment] - kqueue there
    _remove(NOT_ON_DARWIN)
    _remove({fcntl: _FCNTL})
    _refuse_proc()
    if full_fsync:
        fcntl.F_FULLFSYNC = 51  # type: ignore[attr-defined]
        real = fcntl.fcntl
        fcntl.fcntl = lambda fd, command, *rest: os.fsync(fd) if command == 51 else real(fd, command, *rest)

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a number of Linux was given to the kernel of another system")

    def change_mode(fd: int, mode: int, real: Callable[[int, int], None] = os.fchmod) -> None:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(fd, mode)

    os.fchmod = change_mode  # type: ignore[assignment]
    fcntl.ioctl = refused
    ctypes.CDLL = refused  # type: ignore[misc,assignment]


class _Complete(socket.socket):
    """A socket without the methods that Windows lacks."""

    @property
    def sendmsg(self) -> Any:  # type: ignore[override]
        raise AttributeError("sendmsg")

    @property
    def recvmsg(self) -> Any:  # type: ignore[override]
        raise AttributeError("recvmsg")


def _socketpair(*_: Any) -> tuple[socket.socket, socket.socket]:
    """Two sockets of the loopback interface, as Python makes them on Windows."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        return first, listener.accept()[0]


def _select_of_sockets(read: Iterable[Any], write: Iterable[Any], broken: Iterable[Any], *rest: Any) -> Any:
    """select.select, which on Windows takes nothing but sockets."""
    for each in (*read, *write, *broken):
        number = each if isinstance(each, int) else each.fileno()
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
    return _select(read, write, broken, *rest)


_select = select.select


def _refuse_open_files() -> None:
    """No file that this process has open can be renamed, replaced or removed, and no name is relative to a folder."""

    def is_open(path: Any) -> bool:
        try:
            wanted = os.lstat(path)
        except OSError:
            return False
        for name in names("/proc/self/fd"):
            try:
                found = os.fstat(int(name))
            except OSError:
                continue
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
        return False

    def refusing(real: Callable[..., Any], arguments: int) -> Callable[..., Any]:
        def call(*paths: Any, **named: Any) -> Any:
            assert all(value is None for name, value in named.items() if name.endswith("dir_fd")), named
            if any(is_open(path) for path in paths[:arguments]):
                raise PermissionError(errno.EACCES, "The process cannot access the file: it is being used", paths[0])
            return real(*paths, **named)

        return call

    names = os.listdir  # before /proc is refused
    for name, arguments in (("unlink", 1), ("remove", 1), ("rename", 2), ("replace", 2)):
        setattr(os, name, refusing(getattr(os, name), arguments))

    def without_folders(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            assert all(value is None for name, value in named.items() if name.endswith("dir_fd")), named
            return real(*arguments, **named)

        return call

    def opening(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        assert named.get("dir_fd") is None
        assert flags & O_BINARY, f"{path} is opened as text"
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags & ~O_BINARY, *rest)

    O_BINARY = os.O_BINARY = 1 << 26  # type: ignore[attr-defined]
    os.O_NOINHERIT = 0  # type: ignore[attr-defined]
    for name in ("stat", "lstat", "link"):
        setattr(os, name, without_folders(getattr(os, name)))
    real, os.open = os.open, opening
    os.supports_dir_fd.clear()


def windows() -> None:
    """Like Windows: what it lacks in addition. `os.name` stays, since the standard library has made its choices."""
    import multiprocessing  # noqa: F401 - and others that have looked at the system already
    import pathlib  # noqa: F401
    import shutil  # noqa: F401
    import subprocess  # noqa: F401
    import tempfile  # noqa: F401

    sys.platform = "win32"
    _refuse_open_files()
    _refuse_proc()
    os.supports_dir_fd.clear()
    _remove(NOT_ON_DARWIN)
    _remove(NOT_ON_WINDOWS)
    select.select = _select_of_sockets
    socket.socketpair = _socketpair
    for method in ("sendmsg", "recvmsg", "recvmsg_into", "sendmsg_afalg"):
        setattr(socket.socket, method, _Complete.sendmsg)
    for name in ("EpollSelector", "PollSelector"):
        if hasattr(selectors, name):
            delattr(selectors, name)
    selectors.DefaultSelector = selectors.SelectSelector  # type: ignore[misc,assignment]
    selectors.SelectSelector._select = staticmethod(_select_of_sockets)
    withhold(*MODULES_NOT_ON_WINDOWS)


SYSTEMS: dict[str, Callable[[], None]] = {"darwin": darwin, "windows": windows}
