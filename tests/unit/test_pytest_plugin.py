"""The pytest plugin, and the tutorial and pages that show it: each runs as a stranger's project would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TUTORIAL = ROOT / "docs" / "testing-your-own.md"


def run(folder: Path, *arguments: str, seed: str | None = "0") -> tuple[int, str]:
    """Exit status and output of pytest in `folder`, with this plugin and no other."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LAMINA_SEED", "PYTEST_ADDOPTS")}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT / "src")}
    if seed is not None:
        environment["LAMINA_SEED"] = seed
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "lamina.testing.plugin", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the tutorial."""
    folder = tmp_path_factory.mktemp("project")
    blocks = re.findall(r'```python title="(\S+)"\n(.*?)```', TUTORIAL.read_text(), re.DOTALL)
    assert len(blocks) == 7
    for name, text in blocks:
        (folder / name).write_text(text)
    return folder


def test_the_tutorial_finds_the_missing_sync(project: Path) -> None:
    status, said = run(project, "test_store.py")
    assert status == 1, said
    assert "PowerLossFailure" in said
    assert "is damaged" in said or "unpack requires" in said
    assert re.search(r"to repeat it: the same workload with seed=0, model=Persistence.P4, bounds=.*only=\d+", said)
    assert re.search(r"record \d+: write of 4 at 0: kept", said), said
    shown = re.search(r"```text\n(.*?)\nto repeat it", TUTORIAL.read_text(), re.DOTALL)
    assert shown
    for line in shown[1].splitlines():
        assert line in said, "the tutorial shows what is really said"


def test_the_tutorial_is_repaired(project: Path) -> None:
    status, said = run(project, "test_fixed.py", "test_loop.py", "test_errors.py", "test_image.py")
    assert status == 0, said
    assert "4 passed" in said


def test_a_failing_loop_tells_its_state(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "def work(storage, marks):\n"
        "    storage.write(0, b'a' * 512)\n"
        "    storage.flush()\n"
        "    marks.durable('a')\n"
        "    storage.write(0, b'b' * 512)\n"
        "def test_it(lamina_power_loss):\n"
        "    for state in lamina_power_loss(work):\n"
        "        assert state.content[:1] != b'b'\n"
        "def test_done(lamina_power_loss):\n"
        "    assert len(list(lamina_power_loss(work))) == 4\n"
        "    assert False\n"
    )
    status, said = run(tmp_path, seed="7")
    assert status == 1
    assert "- power loss -" in said
    assert "durable: 'a'" in said
    assert "seed=7" in said
    assert said.count("- power loss -") == 1, "a loop that ended has nothing to tell"


def test_a_state_that_failed_can_be_had_alone(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "from lamina.testing import PowerLossFailure\n"
        "def work(storage, marks):\n"
        "    for at in range(4):\n"
        "        storage.write(at * 512, b'a' * 512)\n"
        "def verify(content, state):\n"
        "    return content.count(b'a') != 1024 or content[:512] == bytes(512)\n"
        "def test_it(lamina_power_loss):\n"
        "    try:\n"
        "        lamina_power_loss.check(work, verify)\n"
        "    except PowerLossFailure as failure:\n"
        "        state = failure.state\n"
        "    try:\n"
        "        lamina_power_loss.check(work, verify, only=state.number)\n"
        "    except PowerLossFailure as failure:\n"
        "        assert failure.state == state\n"
        "        assert 'verify returned False' in str(failure)\n"
        "    else:\n"
        "        raise AssertionError('not repeated')\n"
    )
    status, said = run(tmp_path)
    assert status == 0, said


OLD_NAMES = """
def test_image(image):
    assert image("2M").size == 2 << 20

def test_faulty(faulty):
    faulty.fail("read")

def test_power_loss(power_loss):
    for state in power_loss(lambda storage, marks: storage.write(0, bytes(512))):
        assert False
"""


def test_the_old_names_of_fixtures_still_work_and_name_the_test(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(OLD_NAMES)
    status, said = run(tmp_path)
    assert status == 1, said
    assert "2 passed" in said
    assert "- power loss -" in said
    for line, name in ((2, "image"), (5, "faulty"), (8, "power_loss")):
        assert f"test_it.py:{line}: DeprecationWarning: the fixture {name} is called lamina_{name} now" in said


def test_a_fixture_of_the_project_comes_first(tmp_path: Path) -> None:
    own = "import pytest\n@pytest.fixture\ndef image():\n    return 'mine'\ndef test_it(image):\n    assert image == 'mine'\n"
    (tmp_path / "test_it.py").write_text(own)
    status, said = run(tmp_path, "-W", "error")
    assert status == 0, said


def test_the_plugin_costs_nothing_where_it_is_not_used() -> None:
    program = (
        "import pytest, sys; before = set(sys.modules); import lamina.testing.plugin;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["lamina"]


def test_pytest_finds_it_by_itself() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert declared["project"]["entry-points"]["pytest11"] == {"lamina": "lamina.testing.plugin"}


def test_the_page_of_logwrites_runs(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "filters" / "logwrites.md").read_text(), re.DOTALL)
    assert found
    done = subprocess.run([sys.executable, "-c", found[1]], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
