"""`bench` beside qemu-img: the same lines announce the same run, and end with the same exit status."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lamina.cli.main import main
from tests.conftest import Qemu

LINES = [
    "-c 10 d",
    "-f qcow2 -c 10 -d 3 -s 8k -S 16k -o 4k d",
    "-f qcow2 -c 10 -w d",
    "-f qcow2 -c 10 -w --pattern 5 d",
    "-f qcow2 -c 10 --pattern 5 d",
    "-f qcow2 -c 10 -w --pattern 256 d",
    "-f qcow2 -c 10 -w --pattern -1 d",
    "-f qcow2 -c 10 -w --flush-interval 2 d",
    "-f qcow2 -c 10 --flush-interval 2 d",
    "-f qcow2 -c 10 -w --flush-interval 2 -d 64 --no-drain d",
    "-f qcow2 -c 10 -d 1 -w --flush-interval 2 --no-drain d",
    "-f qcow2 -c 10 -d 4 -w --flush-interval 4 d",
    "-f qcow2 -c 10 -d 4 -w --flush-interval 3 d",
    "-f qcow2 -c 10 -d 4 -w --flush-interval 0 d",
    "-f qcow2 -c 10 --no-drain d",
    "-c 2000 -s 8192 d",
    "-c 1 -s 16M d",
    "-c 1 -o 8M d",
    "-c 1 -o 9M d",
    "-c 3 -o 8388000 d",
    "-c 3 -S 0 d",
    "-q -c 3 d",
    "-c -1 d",
    "-c x d",
    "-c 1 -t none d",
    "-c 1 -t writethrough -w d",
    "-c 1 -t unsafe d",
    "-c 1 -t other d",
    "-c 1 -n d",
    "-c 1 -t none -n d",
    "-c 1 -i threads d",
    "-c 1 -i native d",
    "-c 1 -t directsync -i native d",
    "-c 1 -i other d",
    "-c 1 -U d",
    "-c 1 -U -w d",
    "--image-opts -c 1 driver=qcow2,file.filename=d",
    "--image-opts -f qcow2 -c 1 driver=qcow2,file.filename=d",
    "",
    "d d",
    "-c 1 -f raw r",
    "-c 1 -f raw -w r",
    "-c 9 -s 512 -S 1k -o 1 -f raw r",
    "-c 5 -s 3 -f raw r",
    "-c 5000 -S 512 -f raw r",
    "-c 1 -d 99999999999 d",
    "-c 1 -S 99999999999 d",
    "-c 1 -s 4G d",
    "-c 1 none",
    "-c 1 -x d",
]
#: QEMU 7.2 makes no or endless requests here; 10 refuses them, and we do.
NEWER = ["-c 0 d", "-c 1 -d 0 d", "-c 1 -s 0 d"]


@pytest.mark.peers
def test_the_same_lines_announce_the_same_run(
    tmp_path: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in "ours", "theirs":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r").write_bytes(bytes(1 << 20))
        qemu.img("create", "-q", "-f", "qcow2", tmp_path / folder / "d", "8M")
    wrong = []
    for line in LINES + (NEWER if qemu.version >= (10,) else []):
        words = ["bench", *line.split()]
        monkeypatch.chdir(tmp_path / "theirs")
        theirs = qemu.img(*words, check=False)
        monkeypatch.chdir(tmp_path / "ours")
        mine = main([*words, "-q"]), capsys.readouterr().out
        said = [re.sub(r"in [0-9.]+ seconds", "in N seconds", text) for text in (mine[1], theirs.stdout)]
        if mine[0] != theirs.returncode or said[0] != said[1]:
            wrong.append((line, mine[0], theirs.returncode, *said))
    assert not wrong, "\n".join(map(str, wrong))
    for name, format in (("d", "qcow2"), ("r", "raw")):
        both = tmp_path / "ours" / name, tmp_path / "theirs" / name
        qemu.img("compare", "-f", format, "-F", format, *both)
