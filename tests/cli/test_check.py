"""`lamina check`: counts, lines and exit status as those of the peer, on images that are whole and on broken ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lamina.cli.main import main
from tests.conftest import Qemu

CLUSTER = 64 << 10


def number(content: bytearray, at: int) -> int:
    return int.from_bytes(content[at : at + 8], "big")


@pytest.fixture
def disk(qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    qemu.img("create", "-q", "-f", "qcow2", "disk.qcow2", "100M")
    qemu.io("-f", "qcow2", "-c", "write -P 1 0 1M", "-c", "write -P 2 10M 64k", "disk.qcow2")
    return tmp_path / "disk.qcow2"


def damage(disk: Path, *kinds: str) -> None:
    """Break the image: `leak` counts three clusters that nobody uses, `error` forgets one that is used."""
    content = bytearray(disk.read_bytes())
    counts = number(content, number(content, 48))
    if "leak" in kinds:
        content += bytes(-len(content) % CLUSTER + 3 * CLUSTER)
        for cluster in range(len(content) // CLUSTER - 3, len(content) // CLUSTER):
            content[counts + 2 * cluster : counts + 2 * cluster + 2] = b"\0\1"
    if "error" in kinds:
        first = number(content, number(content, number(content, 40)) & 0x00FFFFFFFFFFFE00) & 0x00FFFFFFFFFFFE00
        at = counts + 2 * (first // CLUSTER)
        content[at : at + 2] = b"\0\0"
    disk.write_bytes(content)


@pytest.mark.parametrize(
    ("kinds", "status"), [((), 0), (("leak",), 3), (("error",), 2)], ids=["whole", "leaks", "errors"]
)
def test_the_same_verdict_as_the_peer(
    qemu: Qemu, disk: Path, capsys: pytest.CaptureFixture[str], kinds: tuple[str, ...], status: int
) -> None:
    damage(disk, *kinds)
    before = disk.read_bytes()
    assert main(["check", "--output=json", "disk.qcow2"]) == status
    ours = json.loads(capsys.readouterr().out)
    findings = ours.pop("findings")
    assert bool(findings) == bool(kinds)
    peer = qemu.img("check", "--output=json", "-f", "qcow2", "disk.qcow2", check=False)
    assert peer.returncode == status
    expected = json.loads(peer.stdout)
    # How many contradictions one wrong count makes is a matter of counting.
    corruptions = (ours.pop("corruptions", 0), expected.pop("corruptions", 0))
    assert bool(corruptions[0]) == bool(corruptions[1])
    assert ours == expected

    assert main(["check", "disk.qcow2"]) == status
    told = capsys.readouterr()
    text = qemu.img("check", "-f", "qcow2", "disk.qcow2", check=False).stdout
    assert told.out.replace(f"\n{corruptions[0]} errors", f"\n{corruptions[1]} errors") == text
    assert len(told.err.splitlines()) == len(findings)

    assert main(["check", "-q", "disk.qcow2"]) == status
    assert capsys.readouterr().out == ""
    assert disk.read_bytes() == before


def test_leaks_and_errors_are_both_told(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(disk, "leak", "error")
    assert main(["check", "disk.qcow2"]) == 2
    told = capsys.readouterr().out
    assert "errors were found on the image.\nData may be corrupted" in told
    assert "3 leaked clusters were found on the image.\nThis means waste" in told
    assert "No errors" not in told


def test_random_images_are_clean_and_counted_alike(
    qemu: Qemu, disk: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    dice = random.Random(seed)
    commands = []
    for _ in range(30):
        verb = dice.choice(["write -P 7", "write -z", "discard"])
        commands += ["-c", f"{verb} {dice.randrange(99 << 20) & -512} {dice.choice([512, 65536, 300000 & -512])}"]
    qemu.io("-f", "qcow2", *commands, disk)
    capsys.readouterr()
    assert main(["check", "disk.qcow2"]) == 0
    assert capsys.readouterr().out == qemu.img("check", "-f", "qcow2", disk).stdout


@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_what_has_nothing_to_check_has_a_status_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: list[str]
) -> None:
    (tmp_path / "a.raw").write_bytes(b"123")
    assert main(["check", *quiet, "-f", "raw", str(tmp_path / "a.raw")]) == 63
    told = capsys.readouterr()
    assert told.out == ""
    assert bool(told.err) == (not quiet)
