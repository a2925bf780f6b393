"""Commands with a wrong passphrase: the error does not show it, and no file has changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main

MIB = 1 << 20
RIGHT, WRONG = "correct horse", "battery staple"

ENCRYPTED = "driver=qcow2,encrypt.key-secret=s,file.filename="

#: Command lines in a folder with enc.qcow2, which is encrypted, top.qcow2, which is opened as its overlay, and plain.qcow2.
LINES = [
    "map --image-opts {enc}",
    "compare --image-opts {enc} driver=qcow2,file.filename=plain.qcow2",
    "convert --image-opts -O raw {enc} new.raw",
    "convert --image-opts -c -O qcow2 {enc} new.qcow2",
    "convert -n --image-opts --target-image-opts driver=qcow2,file.filename=plain.qcow2 {enc}",
    'copy json:{{"driver":"qcow2","encrypt.key-secret":"s","file.filename":"enc.qcow2"}} new.raw',
    "commit --image-opts {top}",
    "rebase --image-opts -b plain.qcow2 -F qcow2 {top}",
    "flatten --image-opts {top}",
    "resize --image-opts {enc} 64M",
    "compact --image-opts {enc}",
    "diff --image-opts {enc} driver=qcow2,file.filename=plain.qcow2",
    "bench --image-opts -w -c 1 {enc}",
    "dd --image-opts -O raw if={enc} of=new.raw",
    "snapshot --image-opts -c one {enc}",
    "bitmap --image-opts --add {enc} one",
    "amend --image-opts -o encrypt.state=active,encrypt.new-secret=s,encrypt.old-secret=s {enc}",
    "measure --image-opts -O qcow2 {enc}",
    "io --image-opts -c read_0_512 {enc}",
    "serve --image-opts -k s {enc}",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    secret = lamina.Secret(RIGHT.encode())
    encrypt = {"format": "luks", "key-secret": secret, "iter-time": 10}
    lamina.create("enc.qcow2", "qcow2", size=4 * MIB, encrypt=encrypt)
    lamina.create("plain.qcow2", "qcow2", size=4 * MIB)
    with lamina.open(
        {"driver": "qcow2", "encrypt": {"key-secret": secret}, "file": {"driver": "file", "filename": "enc.qcow2"}},
        read_only=False,
    ) as image:
        image.write(0, b"data" * 1000)
    lamina.create("top.qcow2", "qcow2", size=4 * MIB, backing_file="plain.qcow2", backing_fmt="qcow2")
    with lamina.open("top.qcow2", format="qcow2", read_only=False) as image:
        image.write(MIB, b"more" * 1000)
    return tmp_path


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_passphrase_changes_nothing(folder: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    top = "driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,backing.encrypt.key-secret=s,"
    top += "backing.file.filename=enc.qcow2"
    words = line.format(enc=f"{ENCRYPTED}enc.qcow2", top=top).split()
    words = [word.replace("read_0_512", "read 0 512") for word in words]
    (folder / "key").write_text(WRONG)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    status = main([words[0], "--object", "secret,id=s,file=key", *words[1:]])
    told = capsys.readouterr()
    assert status == (2 if words[0] == "compare" else 1), told.err
    assert "passphrase" in told.err or "secret" in told.err
    assert WRONG not in told.err + told.out
    assert RIGHT not in told.err + told.out
    assert {name: (folder / name).read_bytes() for name in os.listdir()} == before
