"""`dd` beside qemu-img: the same lines make the same files, and end with the same exit status."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lamina.cli.main import main
from tests.conftest import Qemu

#: Lines without a file that QEMU could destroy. `disk` has 10,240 bytes, `odd` 10,000, `image` is a qcow2 of 300 KiB.
LINES = [
    "if=disk of=out",
    "-f raw if=disk of=out",
    "-f raw -O raw if=disk of=out",
    "if=disk of=out bs=1000 -f raw",
    "-f raw bs=1000 if=disk of=out",
    "-f raw bs=1k if=disk of=out",
    "-f raw bs=1K if=disk of=out",
    "-f raw bs=1M if=disk of=out",
    "-f raw bs=2147483647 if=disk of=out",
    "-f raw bs=2147483647 count=2 if=disk of=out",
    "-f raw bs=7 skip=1 if=disk of=out",
    "-f raw bs=7 count=3 if=disk of=out",
    "-f raw bs=7 count=3 skip=2 if=disk of=out",
    "-f raw bs=1.5k count=2 if=disk of=out",
    "-f raw bs=0x200 count=0x2 if=disk of=out",
    "-f raw bs=1000 count=4 if=disk of=out",
    "-f raw bs=1000 count=4 skip=2 if=disk of=out",
    "-f raw bs=1000 count=4 skip=4 if=disk of=out",
    "-f raw bs=1000 count=4 skip=6 if=disk of=out",
    "-f raw bs=1000 count=40 skip=6 if=disk of=out",
    "-f raw bs=1000 skip=2 if=disk of=out",
    "-f raw bs=1024 skip=9 if=disk of=out",
    "-f raw bs=1024 skip=10 if=disk of=out",
    "-f raw bs=1024 skip=11 if=disk of=out",
    "-f raw bs=1024 count=10 if=disk of=out",
    "-f raw bs=1024 count=11 if=disk of=out",
    "-f raw count=0 if=disk of=out",
    "-f raw count=0 skip=1 if=disk of=out",
    "-f raw count=9223372036854775807 if=disk of=out",
    "-f raw count=9223372036854775808 if=disk of=out",
    "-f raw bs=4k count=9223372036854775807 skip=1 if=disk of=out",
    "-f raw skip=9223372036854775807 if=disk of=out",
    "-f raw skip=9223372036854775808 if=disk of=out",
    "-f raw bs=1000 bs=500 count=2 if=disk of=out",
    "-f raw if=none if=disk of=out",
    "-f raw -f raw if=disk of=out",
    "-- if=disk of=out",
    "-U -f raw if=disk of=out",
    "--image-opts if=driver=raw,file.filename=disk of=out",
    "--image-opts -f raw if=driver=raw,file.filename=disk of=out",
    "--image-opts if=driver=nosuch,file.filename=disk of=out",
    "-f raw -O qcow2 if=disk of=out",
    "-f raw -O qcow2 bs=1000 skip=1 if=disk of=out",
    "-f raw -O qcow2 bs=1024 skip=11 if=disk of=out",
    "-f qcow2 if=image of=out",
    "if=image of=out",
    "if=image of=out bs=64k skip=1",
    "if=image of=out bs=64k skip=1 count=3",
    "if=image of=out bs=3k skip=7 count=51",
    "-O qcow2 if=image of=out",
    "-O qcow2 if=image of=out bs=64k skip=1 count=4",
    "-O qcow2 if=image of=out bs=1 skip=100000",
    "-f qcow2 if=disk of=out",
    "-f raw if=odd of=out",
    "-f raw if=odd of=out bs=1024 skip=3",
    "-f raw if=odd of=out bs=1000 count=9",
    "-f raw -O qcow2 if=odd of=out",
    "-f raw if=disk of=there",
    "-f raw -O qcow2 if=disk of=there",
    "-f raw bs=0 if=disk of=out",
    "-f raw bs=-1 if=disk of=out",
    "-f raw bs=2G if=disk of=out",
    "-f raw bs= if=disk of=out",
    "-f raw bs if=disk of=out",
    "-f raw count=abc if=disk of=out",
    "-f raw count= if=disk of=out",
    "-f raw count=-1 if=disk of=out",
    "-f raw skip=-1 if=disk of=out",
    "-f raw skip=x if=disk of=out",
    "-f raw skip=99999999999999999999 if=disk of=out",
    "-f raw of=out",
    "-f raw if=disk",
    "",
    "-f raw if=disk of=out seek=2",
    "-f raw if=disk of=out conv=notrunc",
    "-f raw if=disk of=out ibs=512",
    "-f raw if=disk of=out iflag=direct",
    "-f raw if=disk of=out other",
    "-f raw if= of=out",
    "-f nosuch if=disk of=out",
    "-O nosuch if=disk of=out",
    "-f raw if=none of=out",
    "-f raw if=disk of=none/out",
    "-x if=disk of=out",
    "-n -f raw if=disk of=out",
    "-f raw if=disk of=out -O",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, qemu7: Qemu) -> list[Path]:
    top = tmp_path_factory.mktemp("dd")
    dice = random.Random(5)
    for folder in top / "ours", top / "theirs":
        folder.mkdir()
    content = dice.randbytes(4096) + bytes(3000) + dice.randbytes(3144)
    for folder in top.iterdir():
        (folder / "disk").write_bytes(content)
        (folder / "odd").write_bytes(content[:10000])
        qemu7.img("create", "-q", "-f", "qcow2", folder / "image", "300k")
        qemu7.io("-f", "qcow2", "-c", "write -P 3 1k 70k", "-c", "write -P 4 200k 100k", folder / "image")
    return [top / "ours", top / "theirs"]


def dd(line: str) -> int:
    return main(["dd", *line.split()])


def content(qemu: Qemu, path: Path) -> bytes | None:
    """The disk in the file that a line has made, with the zeros with which QEMU fills its last sector."""
    if not path.exists():
        return None
    data = path.read_bytes()
    if data.startswith(b"QFI\xfb"):
        assert qemu.check(path)[0] == 0
        raw = path.with_suffix(".raw")
        qemu.img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        data = raw.read_bytes()
        raw.unlink()
    return data + bytes(-len(data) % 512)


@pytest.mark.peers
def test_the_same_lines_make_the_same_files(
    folders: list[Path], qemu: Qemu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = []
    for line in LINES:
        found = []
        for folder in folders:
            (folder / "out").unlink(missing_ok=True)
            (folder / "there").write_bytes(b"old" * 9999)
            monkeypatch.chdir(folder)
            mine = folder.name == "ours"
            status = dd(line) if mine else qemu.img("dd", *line.split(), check=False).returncode
            found.append((status, content(qemu, folder / "out"), content(qemu, folder / "there")))
        if found[0] != found[1]:
            wrong.append((line, *[(status, one and len(one)) for status, one, _ in found]))
        output = capsys.readouterr()
        assert output.out == ""
        assert (found[0][0] == 0) == (output.err == "" or "warning" in output.err), (line, output.err)
    assert not wrong, "\n".join(map(str, wrong))
    assert len(LINES) >= 60


@pytest.mark.peers
def test_a_number_may_have_a_suffix_as_in_old_releases(
    folders: list[Path], qemu7: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU 10 refuses suffixes of count and skip; 7.2 takes them."""
    monkeypatch.chdir(folders[0])
    line = "-f raw bs=1 count=8k skip=1k if=disk"
    assert dd(f"{line} of=out") == 0
    qemu7.img("dd", *line.split(), "of=theirs")
    assert Path("out").read_bytes() == Path("theirs").read_bytes() == Path("disk").read_bytes()[1024:8192]


def test_sizes_are_exact(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference from QEMU, which fills the last sector of source and target with zeros."""
    monkeypatch.chdir(folders[0])
    data = Path("odd").read_bytes()
    assert dd("-f raw bs=1000 count=9 skip=1 if=odd of=out") == 0
    assert Path("out").read_bytes() == data[1000:9000]
    assert dd("-f raw bs=7 skip=1 if=odd of=out") == 0
    assert Path("out").read_bytes() == data[7:]


def test_a_disk_is_not_copied_onto_itself(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """QEMU empties the file before it reads it."""
    monkeypatch.chdir(folders[0])
    before = Path("disk").read_bytes()
    assert main(["dd", "-f", "raw", "if=disk", "of=disk"]) == 1
    assert "disk" in capsys.readouterr().err
    assert Path("disk").read_bytes() == before


def test_an_error_leaves_the_old_file(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders[0])
    Path("old").write_bytes(b"old")
    options = (
        "driver=blkdebug,inject-error.0.event=none,inject-error.0.iotype=read,image.driver=raw,image.file.filename=disk"
    )
    assert main(["dd", "--image-opts", f"if={options}", "of=old"]) == 1
    assert Path("old").read_bytes() == b"old"
    assert [one.name for one in Path().iterdir() if "old" in one.name] == ["old"]


def test_the_warning_names_the_operand(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folders[0])
    assert dd("-f raw bs=1k skip=11 if=disk of=out") == 0
    assert "skip=11" in capsys.readouterr().err
    assert dd("-f raw bs=1k skip=10 if=disk of=out") == 0
    assert capsys.readouterr().err == ""
    assert Path("out").read_bytes() == b""
