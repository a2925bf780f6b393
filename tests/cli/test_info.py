"""`lamina info`: what the peers say, and nothing opened but the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.cli.main import main
from tests.conftest import Qemu


def info(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(["info", "--output=json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["-f", "qcow2", "a", "100M"],
        ["-f", "qcow2", "-o", "cluster_size=512", "a", "1M"],
        ["-f", "qcow2", "-o", "cluster_size=2M,refcount_bits=1", "a", "5G"],
        ["-f", "qcow2", "-o", "compat=0.10", "a", "5G"],
        ["-f", "qcow2", "-u", "-b", "base.raw", "-F", "raw", "a", "1G"],
        ["-f", "qcow2", "-u", "-b", "dir/base", "-F", "qcow2", "dir/a", "1G"],
        ["-f", "qcow2", "-u", "-b", "/abs/base", "-F", "qcow2", "dir/a", "1G"],
        ["-f", "qcow2", "-o", "lazy_refcounts=on", "a", "1M"],
        ["-f", "qcow2", "-o", "extended_l2=on", "a", "1M"],
        ["-f", "qcow2", "-o", "compression_type=zstd", "a", "1M"],
        ["-f", "raw", "a", "1G"],
    ],
    ids=" ".join,
)
def test_the_same_as_the_peer(
    qemu: Qemu, folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    (folder / "dir").mkdir()
    qemu.img("create", "-q", *arguments)
    name = next(word for word in arguments if word in ("a", "dir/a"))
    peer = json.loads(qemu.img("info", "--output=json", name).stdout)
    peer.pop("children", None)
    format = arguments[1]
    probed = info(capsys, name)
    ours = info(capsys, "-f", format, name)
    assert probed == ours | {"format-probed": True}
    assert ours == peer
    # For people: the same lines, those about features in any order.
    assert main(["info", "-f", format, name]) == 0
    told = capsys.readouterr().out.splitlines()
    theirs = qemu.img("info", name).stdout.partition("Child node")[0].splitlines()
    assert sorted(told) == sorted(theirs)
    assert told[:4] == theirs[:4]
    assert main(["info", name]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"file format: {format} (probed)"


def test_the_size_of_a_raw_image_is_exact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.raw").write_bytes(b"x" * 1000)
    assert info(capsys, "a.raw")["virtual-size"] == 1000
    window = 'json:{"driver": "raw", "offset": 100, "size": 7, "file": {"driver": "file", "filename": "a.raw"}}'
    assert info(capsys, window)["virtual-size"] == 7


@pytest.mark.parametrize(
    ("head", "format"), [(b"KDMV" + bytes(600), "vmdk"), (b"vhdxfile" + bytes(600), "vhdx"), (b"QED\0", "qed")]
)
def test_a_format_without_a_driver_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], head: bytes, format: str
) -> None:
    (folder / "a").write_bytes(head)
    found = info(capsys, "a")
    assert found["format"] == format
    assert format in found["unsupported"][0]
    assert "virtual-size" not in found
    assert main(["info", "a"]) == 0
    told = capsys.readouterr().out
    assert f"file format: {format} (probed)\n" in told
    assert "not supported here: " in told


OPENED = """
import sys
from lamina.cli.main import main
sys.addaudithook(lambda event, given: print("OPENED", given[0]) if event == "open" else None)
status = main(sys.argv[1:])
sys.exit(status)
"""


def opened(folder: Path, *arguments: str) -> set[str]:
    """The files beneath `folder` that `lamina ARGUMENTS` opens."""
    done = subprocess.run(
        [sys.executable, "-c", OPENED, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(lamina.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    names = [line.removeprefix("OPENED ") for line in done.stdout.splitlines() if line.startswith("OPENED ")]
    paths = {os.path.join(folder, name) for name in names}
    return {os.path.basename(path) for path in paths if os.path.dirname(path) == str(folder)}


def test_nothing_is_opened_but_the_file(folder: Path) -> None:
    for arguments in (["base", "1M"], ["-b", "base", "-F", "qcow2", "top"]):
        assert main(["create", "-q", "-f", "qcow2", *arguments]) == 0
    assert opened(folder, "info", "top") == {"top"}
    assert opened(folder, "info", "--output=json", "-f", "qcow2", "top") == {"top"}
    assert opened(folder, "info", "--image-opts", "driver=qcow2,file.filename=top") == {"top"}
    assert opened(folder, "info", "--image-opts", "driver=blkdebug,image.driver=qcow2,image.file.filename=top") == {
        "top"
    }
    assert opened(folder, "check", "top") == {"top"}
    assert opened(folder, "info", "--backing-chain", "-f", "qcow2", "top") >= {"top"}


def test_a_chain(qemu: Qemu, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "below").mkdir()
    (folder / "below" / "base.raw").write_bytes(bytes(1 << 20))
    for arguments in (["-b", "below/base.raw", "-F", "raw", "middle"], ["-b", "middle", "-F", "qcow2", "top"]):
        assert main(["create", "-q", "-f", "qcow2", *arguments]) == 0
    peer = json.loads(qemu.img("info", "--output=json", "--backing-chain", "top").stdout)
    for one in peer:
        one.pop("children", None)
    assert info(capsys, "--backing-chain", "-f", "qcow2", "top") == peer
    assert main(["info", "--backing-chain", "-f", "qcow2", "top"]) == 0
    parts = capsys.readouterr().out.split("\n\n")
    assert [part.splitlines()[0] for part in parts] == ["image: top", "image: middle", "image: below/base.raw"]


@pytest.mark.parametrize(
    ("policy", "words"), [("none", "no name inside"), ("list:top", "not in the list"), ("same-dir", "leads outside")]
)
def test_a_chain_is_followed_as_far_as_the_policy_grants(
    folder: Path, capsys: pytest.CaptureFixture[str], policy: str, words: str
) -> None:
    (folder / "inner").mkdir()
    (folder / "base.raw").write_bytes(bytes(1 << 20))
    assert main(["create", "-q", "-f", "qcow2", "-b", "../base.raw", "-F", "raw", "inner/top"]) == 0
    assert main(["info", "--backing-chain", "--references", policy, "inner/top"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert words in told.err
    assert len(info(capsys, "--backing-chain", "--references", "any", "inner/top")) == 2


def test_a_probed_image_shows_no_chain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["base", "1M"], ["-b", "base", "-F", "qcow2", "top"]):
        assert main(["create", "-q", "-f", "qcow2", *arguments]) == 0
    assert main(["info", "--backing-chain", "top"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "-f qcow2" in told.err
    assert f"--references list:{folder}/base" in told.err
    for given in (["-f", "qcow2"], ["--references", "same-dir"], ["--references", f"list:{folder}/base"]):
        assert len(info(capsys, "--backing-chain", *given, "top")) == 2


def test_a_chain_that_contains_itself_ends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["a", "1M"], ["-b", "a", "-F", "qcow2", "b"]):
        assert main(["create", "-q", "-f", "qcow2", *arguments]) == 0
    assert main(["create", "-q", "-f", "qcow2", "-u", "-b", "b", "-F", "qcow2", "a", "1M"]) == 0
    assert main(["info", "--backing-chain", "-f", "qcow2", "a"]) == 1
    assert "contains itself" in capsys.readouterr().err


def test_the_format_below_is_never_guessed(qemu7: Qemu, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["create", "-q", "-f", "qcow2", "-u", "-b", "base", "-F", "raw", "top", "1M"]) == 0
    content = bytearray((folder / "top").read_bytes())
    at = content.index((0xE2792ACA).to_bytes(4, "big"))  # the extension that holds the format
    content[at : at + 4] = b"\x12\x34\x56\x78"
    (folder / "top").write_bytes(content)
    assert "backing-filename-format" not in info(capsys, "top")
    assert main(["info", "--backing-chain", "top"]) == 1
    assert "never guessed" in capsys.readouterr().err


def test_names_inside_an_image_cannot_drive_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "./\x1b]0;mine\x07\nfile format: raw"
    assert main(["create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", "top", "1M"]) == 0
    assert main(["info", "top"]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert [line for line in told.splitlines() if line.startswith("file format")] == ["file format: qcow2 (probed)"]
    assert r"backing file: ./\x1b]0;mine\x07\nfile format: raw" in told
    assert info(capsys, "top")["backing-filename"] == name


def test_a_file_that_another_holds_needs_force_share(
    folder: Path, capsys: pytest.CaptureFixture[str], qemu7: Qemu
) -> None:
    assert main(["create", "-q", "-f", "qcow2", "a", "1M"]) == 0
    holder = subprocess.Popen(
        [qemu7.peer.qemu_io, "-f", "qcow2", "a"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        holder.stdin.write("length\n")
        holder.stdin.flush()
        assert "1 MiB" in holder.stdout.readline()
        assert main(["info", "a"]) == 1
        assert "lamina: a: " in capsys.readouterr().err
        assert info(capsys, "-U", "a")["virtual-size"] == 1 << 20
    finally:
        holder.communicate("quit\n", timeout=30)
