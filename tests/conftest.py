"""What every test may ask for: the peers (QEMU's tools), the seed of this run; and that no test leaks a file.

Environment: `LAMINA_SEED` repeats a run, `LAMINA_PEERS_BIN` names the folder of a newer QEMU (see `benchmarks/peers.py`
for the other ways to name it), `CI=true` turns a missing peer from a skip into a failure.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, settings

from lamina import limits, registry
from lamina.storage import holes as storage_holes

ROOT = Path(__file__).resolve().parent.parent
# The tests ask `benchmarks.peers` where the peers are; plain `pytest` does not put the repository's root on the path.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import peers  # noqa: E402

FILE_DESCRIPTORS = Path("/proc/self/fd")

# One profile for all runs: fresh examples each time, told how to repeat them, no verdict on how busy the machine is.
settings.register_profile(
    "ci", derandomize=False, print_blob=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed before the workers of xdist start (they inherit the environment) and before hypothesis looks."""
    # Whoever runs the tests in the background may have SIGINT ignored, and a program that inherits that leaves it so.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.pop("LAMINA_REFERENCES", None)  # the default of a site is none of ours
    given = "LAMINA_SEED" in os.environ
    os.environ.setdefault("LAMINA_SEED", str(random.SystemRandom().randrange(1 << 32)))
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("ci")
    # With a seed of ours, hypothesis does not replay the failures it remembers. On a developer's machine it should.
    if (given or in_ci()) and config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = os.environ["LAMINA_SEED"]


def pytest_report_header() -> str:
    return f"lamina seed: {os.environ['LAMINA_SEED']}"


@pytest.fixture
def seed() -> int:
    """The seed of this run, for `random.Random(seed)`: told in the header and with each failure of a test that asks."""
    print(f"lamina seed: {os.environ['LAMINA_SEED']} (set LAMINA_SEED to repeat)")
    return int(os.environ["LAMINA_SEED"])


@pytest.fixture(autouse=True, scope="module")
def threads_of_aio_end() -> Iterator[None]:
    """The pools of `lamina.aio` keep their threads; the tests of other modules count what jobs leave behind."""
    yield
    if "lamina.aio" not in sys.modules:
        return
    from lamina import aio, workers
    from lamina.aio import work

    aio._threads = workers.Workers(8, "lamina-aio-open")
    work._threads = workers.Workers(work.AT_ONCE, "lamina-aio-work")
    deadline = time.monotonic() + 20
    while any(name.startswith("lamina-aio") for name in workers.names.values()):
        assert time.monotonic() < deadline, f"threads go on: {workers.names}"
        gc.collect()
        time.sleep(0.001)


class Qemu:
    """One installation of QEMU's tools. All methods run a program to its end; they may be called from many threads."""

    def __init__(self, peer: peers.Peer) -> None:
        self.peer = peer
        self.version = peer.version

    def __repr__(self) -> str:
        return f"<{self.peer.name}>"

    def img(
        self, *args: str | os.PathLike[str], check: bool = True, input: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run qemu-img. With `check`, any exit status but 0 fails the test, showing all that was said."""
        return self._run([self.peer.qemu_img, *args], check, input)

    def io(
        self, *args: str | os.PathLike[str], check: bool = True, input: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run qemu-io, such as `io("-f", "qcow2", "-c", "write 0 64k", image)`. Commands may also come by `input`."""
        return self._run([self.peer.qemu_io, *args], check, input)

    def map(self, image: str | os.PathLike[str], fmt: str | None, *options: str) -> list[dict[str, Any]]:
        """The rows of `qemu-img map --output=json`. With `fmt` None, `image` is taken as image options."""
        where = ["--image-opts", image] if fmt is None else ["-f", fmt, image]
        rows: list[dict[str, Any]] = json.loads(self.img("map", "--output=json", *options, *where).stdout)
        return rows

    def check(self, image: str | os.PathLike[str], fmt: str = "qcow2") -> tuple[int, dict[str, Any]]:
        """Exit status and report of `qemu-img check` (0 clean, 1 not checked, 2 corrupt, 3 leaks).

        An image that qemu-img cannot open gives no report: the dict then holds only `error`, its complaint.
        """
        done = self.img("check", "--output=json", "-f", fmt, image, check=False)
        report: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {"error": done.stderr.strip()}
        return done.returncode, report

    @staticmethod
    def _run(
        command: Sequence[str | os.PathLike[str]], check: bool, given: str | None
    ) -> subprocess.CompletedProcess[str]:
        source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if given is None else {"input": given}
        for _ in range(10):
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="surrogateescape",  # names that an image contains may be any bytes
                check=False,
                timeout=120,
                env=os.environ | {"LC_ALL": "C"},
                **source,
            )
            # For a key slot of LUKS it measures the CPU before it does anything, which fails at times on a busy machine.
            if not (done.returncode and "CPU usage" in done.stderr):
                break
        if check and done.returncode:
            said = f"{done.stdout}{done.stderr}".strip()
            pytest.fail(f"exit status {done.returncode} of {' '.join(map(str, command))}\n{said}")
        return done


def _found(peer: peers.Peer | None, what: str, remedy: str) -> Qemu:
    return Qemu(peer) if peer else missing(what, remedy)


def missing(what: str, remedy: str) -> NoReturn:
    said = f"{what} was not found: {remedy}"
    if in_ci():
        pytest.fail(said)
    pytest.skip(said)


@pytest.fixture(scope="session")
def qemu7() -> Qemu:
    """The QEMU of this machine (7.2 where the project's own CI runs; see `version`)."""
    return _found(peers.system(), "qemu-img with qemu-io", "install qemu-utils")


@pytest.fixture(scope="session")
def qemu10() -> Qemu:
    """The newer QEMU in a folder of its own (10.0 in the project's own CI; see `version`)."""
    return _found(
        peers.newest(),
        "a newer QEMU",
        "name the folder of its qemu-img and qemu-io in LAMINA_PEERS_BIN, or run peers install",
    )


@pytest.fixture(scope="session", params=["qemu7", "qemu10"])
def qemu(request: pytest.FixtureRequest) -> Qemu:
    """Each QEMU in turn: a test that asks for this runs once with either."""
    chosen: Qemu = request.getfixturevalue(request.param)
    return chosen


class NbdTools:
    """The NBD programs of one installation: libnbd's tools, and those that exist once, such as fio and nbd-client."""

    def __init__(self, name: str, folder: str | None) -> None:
        self.name = name
        self._path = folder or os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin"))

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def path(self, program: str) -> str:
        """Where the program is. Without it the test is skipped, or fails in CI."""
        found = shutil.which(program, path=self._path)
        return found or missing(f"{program} ({self.name})", "install libnbd-bin, python3-libnbd, fio and nbd-client")

    def run(
        self, program: str, *args: str | os.PathLike[str], check: bool = True, input: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end. With `check`, any exit status but 0 fails the test, showing all that was said."""
        where = self.path(program)
        # nbdsh runs the first python3 on PATH: it must be the one that libnbd was installed for, not that of the tests.
        path = os.pathsep.join((os.path.dirname(where), os.environ.get("PATH", os.defpath)))
        return Qemu._run(["env", f"PATH={path}", where, *args], check, input)


@pytest.fixture(scope="session")
def nbd_tools() -> NbdTools:
    """The NBD programs of this machine (libnbd 1.14 where the project's own CI runs)."""
    return NbdTools("the system's", None)


@pytest.fixture(scope="session")
def nbd_tools_new(qemu10: Qemu) -> NbdTools:
    """The newer libnbd's tools, in the folder of the newer QEMU (1.22 in the project's own CI)."""
    return NbdTools("the newer one's", os.path.dirname(qemu10.peer.qemu_img))


@pytest.fixture(scope="session", params=["nbd_tools", "nbd_tools_new"])
def libnbd(request: pytest.FixtureRequest) -> NbdTools:
    """Each libnbd in turn."""
    chosen: NbdTools = request.getfixturevalue(request.param)
    return chosen


@pytest.fixture
def own_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it: other tests of the process would find it."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(registry, "_aliases", dict(registry._aliases))


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with a number: from then on no answer about extents has more rows than that."""

    def bound(rows: int) -> None:
        monkeypatch.setattr(limits, "MAX_ROWS", rows)
        monkeypatch.setattr(storage_holes, "MAX_ROWS", rows)

    return bound


def _open_files() -> dict[str, str]:
    """The descriptors of this process and what they are open on."""
    found = {}
    for name in os.listdir(FILE_DESCRIPTORS):
        try:
            found[name] = os.readlink(FILE_DESCRIPTORS / name)
        except FileNotFoundError:
            continue  # the one that listed the folder, closed since
    return found


@pytest.fixture
def granted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The site grants what lies beside an image, which may then be written as its data file."""
    monkeypatch.setenv("LAMINA_REFERENCES", "same-dir")


@pytest.fixture(autouse=True)
def no_leaked_files() -> Iterator[None]:
    """Fail a test after which more file descriptors are open than before it.

    Set up first and torn down last, so what other fixtures of the test close is closed by then. Counting costs some
    microseconds; only when there are more does the collector run, and a thread that is ending get a moment.
    """
    if not FILE_DESCRIPTORS.is_dir():
        yield
        return
    before = _open_files()
    yield
    for pause in (0.0, 0.02, 0.2, 2.0):  # on a busy machine a thread takes that long to end
        if len(os.listdir(FILE_DESCRIPTORS)) - 1 <= len(before):
            return
        time.sleep(pause)
        gc.collect()
    after = _open_files()
    if len(after) > len(before):
        leaked = [f"{name} -> {target}" for name, target in after.items() if before.get(name) != target]
        pytest.fail(f"the test left {len(after) - len(before)} more files open: {', '.join(leaked)}")
