"""The names of the reference tools: their command lines, translated, and what only they do."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import lamina
from lamina.cli import program
from lamina.cli.main import COMMANDS, main
from lamina.cli.personality import personality
from lamina.cli.personality.grammar import IMG, Grammar
from lamina.cli.personality.ordered import dump
from lamina.errors import BlockIOError, LaminaError, OptionError, UnsupportedFeature
from lamina.nbd.access_rules import AccessRules

#: Makes this process a tool, in a version, until the end of the test.
Become = Callable[..., program.Program]


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Become:
    def become(name: str, version: str = "7.2") -> program.Program:
        monkeypatch.setattr(program, "current", personality(name, {"LAMINA_COMPAT": version}))
        return program.current

    return become


def translated(name: str, *words: str) -> list[str]:
    return personality(name, {}).command_line(words)


def test_spellings_of_options() -> None:
    grammar = Grammar("quiet,q format,f= options,o= ~trace,T= source-format=")
    for line in ("-q -f raw a", "a -qf raw", "--quiet --format raw -- a", "-qfraw a", "--qui --form=raw a -T x"):
        assert grammar.translate(grammar.parse(line.split())) == ["--quiet", "--format=raw", "--", "a"], line
    assert grammar.parse(["-f", "raw", "-f", "qcow2"]).last("format") == "qcow2"
    assert grammar.translate(grammar.parse(["-o", "=x", "--", "-q"])) == ["--options==x", "--", "-q"]
    for wrong in (["-x"], ["-f"], ["--nosuch"], ["--quiet=1"], ["--s=1", "--format"]):
        with pytest.raises(OptionError):
            grammar.parse(wrong)


def test_every_option_of_a_tool_is_one_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The tables name the long options of the commands that exist."""
    for name, grammar in IMG.items():
        if name not in COMMANDS:
            continue
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        missing = [word.name for word in grammar.words if word.passed and f"--{word.name}" not in text]
        assert not set(missing) - {"compress"}, f"{name}: {missing}"  # of rebase: it is refused by name


def test_json_is_laid_out_as_theirs() -> None:
    told = {"dirty-flag": False, "format": "raw", "virtual-size": 512, "filename": "a\tb", "children": []}
    assert dump(told) == (
        '{\n    "children": [\n    ],\n    "virtual-size": 512,\n    "filename": "a\\tb",\n    "format": "raw",\n'
        '    "dirty-flag": false\n}\n'
    )


def test_the_help_names_commands_and_formats(become: Become, capsys: pytest.CaptureFixture[str]) -> None:
    become("qemu-img")
    for line in (["--help"], ["-h"], ["create", "--help"]):
        assert main(line) == 0
        text = capsys.readouterr().out
        assert text.startswith("qemu-img version 7.2.")
        assert all(f"\n  {name} " in text for name in IMG)
        assert "qcow2" in text.partition("Supported formats: ")[2]
    become("qemu-img", "10.0")
    assert main(["create", "-h"]) == 0
    assert "create [--object=OBJECT]" in capsys.readouterr().out


def test_qemu_io_on_a_pipe(
    tmp_path: Path,
    become: Become,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "disk").write_bytes(bytes(1000))
    become("qemu-io")
    monkeypatch.setattr("sys.stdin", io.StringIO("length\nwrite -q 1000 24\n\nquit\nlength\n"))
    assert main(["-f", "raw", str(tmp_path / "disk")]) == 0
    assert capsys.readouterr().out == "qemu-io> 1 KiB\nqemu-io> qemu-io> qemu-io> "
    assert (tmp_path / "disk").read_bytes() == bytes(1000) + b"\xcd" * 24


def test_the_options_of_qemu_io_are_those_of_its_image(
    tmp_path: Path, become: Become, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    become("qemu-io")
    opened = f"open -o driver=raw {tmp_path / 'disk'}"
    assert main(["-r", "-c", opened, "-c", "write 0 512"]) == 0
    assert "wrote 512/512" in capsys.readouterr().out
    assert main(["one", "two"]) == 1
    assert capsys.readouterr().err.startswith("qemu-io: ")


def test_an_image_is_believed(tmp_path: Path, become: Become, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backing file without a format, outside the folder, and a name in another notation."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "else").mkdir()
    lamina.create(tmp_path / "else" / "base", "qcow2", 1 << 20)
    with lamina.open(tmp_path / "else" / "base", format="qcow2", read_only=False) as image:
        image.write(0, b"x" * 512)
    named = {"path": str(tmp_path / "else" / "base"), "json": 'json:{"driver":"qcow2","file.filename":"else/base"}'}
    for kind, name in named.items():
        _overlay(tmp_path / kind, name)
        words = ["-f", "qcow2", "-c", "read -q -P 120 0 512", kind]
        assert main(["io", "-r", *words]) == 1  # lamina opens none of them
        with monkeypatch.context() as patch:
            patch.setattr(program, "current", personality("qemu-io", {}))
            assert main(words) == 0
        with monkeypatch.context() as patch:
            patch.setattr(program, "current", personality("qemu-img", {}))
            assert main(["info", "--backing-chain", kind]) == 0


def _overlay(path: Path, name: str) -> None:
    """An overlay that names a backing file and no format."""
    lamina.create(path, "qcow2", 1 << 20)
    with open(path, "r+b") as file:
        header = bytearray(file.read(104))
        header[8:16] = (1024).to_bytes(8)
        header[16:20] = len(name).to_bytes(4)
        file.seek(0)
        file.write(header)
        file.seek(1024)
        file.write(name.encode())


def test_qemu_nbd_is_serve() -> None:
    plain = translated("qemu-nbd", "disk")
    for word in ("--writable", "--port=10809", "--bind=0.0.0.0", "--insecure", "--shared=1", "--discard=ignore"):
        assert word in plain
    assert plain[0] == "serve"
    assert plain[-2:] == ["--", "disk"]
    assert "--read-only" in translated("qemu-nbd", "-r", "-k", "s", "disk")
    assert "--writable" not in translated("qemu-nbd", "-r", "-k", "s", "disk")
    assert "--writable" not in translated("qemu-nbd", "-l", "one", "-k", "s", "disk")
    on_socket = translated(
        "qemu-nbd", "-tvk", "s", "-e0", "-x", "a,b", "-B", "b0", "-B", "b1", "--cache=unsafe", "disk"
    )
    assert not {"--insecure", "--port=10809"} & set(on_socket)
    for word in (
        "--socket=s",
        "--persistent",
        "--verbose",
        "--shared=65535",
        "--export-name=a,b",
        "--bitmap=b0",
        "--bitmap=b1",
    ):
        assert word in on_socket
    assert "--cache=unsafe" in on_socket
    assert translated("qemu-nbd", "-L", "-k", "/s") == ["info", "--list", "--", "nbd+unix:///?socket=/s"]
    assert translated("qemu-nbd", "-L", "-b", "::1", "-p", "1") == ["info", "--list", "--", "nbd://[::1]:1/"]


def test_credentials_of_qemu_nbd() -> None:
    x509 = "tls-creds-x509,id=t,endpoint=server,dir=/etc/pki"
    found = translated("qemu-nbd", "--object", x509, "--tls-creds", "t", "disk")
    assert {"--tls-certificates=/etc/pki", "--tls-verify-peer"} <= set(found)
    found = translated("qemu-nbd", "--object", x509 + ",verify-peer=off", "--tls-creds=t", "disk")
    assert "--tls-verify-peer" not in found
    found = translated("qemu-nbd", "--object", "tls-creds-psk,id=t,endpoint=server,dir=d", "--tls-creds=t", "disk")
    assert "--tls-psk-file=d/keys.psk" in found
    simple = "authz-simple,id=a,identity=CN=one,,O=two"
    found = translated("qemu-nbd", "--object", x509, "--object", simple, "--tls-creds=t", "--tls-authz=a", "disk")
    assert '--tls-rules=json:{"rules": [{"match": "CN=one,O=two", "policy": "allow"}]}' in found


def test_rules_for_clients_of_qemu_nbd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x509 = ["--object", "tls-creds-x509,id=t,endpoint=server,dir=/etc/pki", "--tls-creds=t", "--tls-authz=a", "disk"]

    def rules(text: str) -> AccessRules:
        found = translated("qemu-nbd", "--object", text, *x509)
        (word,) = [word for word in found if word.startswith("--tls-rules=")]
        return AccessRules.from_text(word.partition("=")[2])

    listed = "authz-list,id=a,policy=deny,rules.0.match=C=DE,,CN=one,rules.0.policy=allow,"
    listed += "rules.1.match=*CN=t?o,rules.1.policy=allow,rules.1.format=glob"
    names = ("CN=one,C=DE", "CN=two,C=DE", "CN=one", "CN=three")
    assert [rules(listed).admits([name]) for name in names] == [True, True, False, False]
    assert not rules("authz-list,id=a").admits(["CN=one"])
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"policy": "deny", "rules": [{"match": "CN=four", "policy": "allow"}]}))
    for refresh in ("", ",refresh=on", ",refresh=off"):
        found = rules(f"authz-listfile,id=a,filename={path}{refresh}")
        assert [found.admits([name]) for name in ("CN=four", "CN=five")] == [True, False], refresh
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr("lamina.named_file.PATIENCE", 0.1)  # a FIFO without a writer is waited for, but not for ever
    (tmp_path / "wrong.json").write_text("[" * 100_000)
    for refused in (
        "authz-list,id=a,policy=maybe",
        "authz-list,id=a,rules.0.match=CN=one",
        "authz-list,id=a,rules.0.policy=allow",
        "authz-list,id=a,rules.0.match=x,rules.0.policy=allow,rules.0.format=regex",
        "authz-list,id=a,rules.0.match=x,rules.0.policy=allow,rules.0.other=1",
        "authz-list,id=a,rules=x",
        "authz-list,id=a,other=1",
        f"authz-listfile,id=a,filename={path},refresh=maybe",
        f"authz-listfile,id=a,filename={tmp_path}/wrong.json,refresh=no",
        f"authz-listfile,id=a,filename={tmp_path}/missing.json,refresh=no",
        f"authz-listfile,id=a,filename={tmp_path}/missing.json",
        f"authz-listfile,id=a,filename={tmp_path}/fifo,refresh=no",
        "authz-listfile,id=a",
        "authz-simple,id=a",
        "authz-simple,id=a,identity=x,other=1",
        "authz-pam,id=a,service=x",
    ):
        with pytest.raises(LaminaError):
            rules(refused)


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "/dev/nbd0", "disk"],
        ["-d", "/dev/nbd0"],
        [],
        ["a", "b"],
        ["-L", "disk"],
        ["-k", "s", "-p", "1", "disk"],
        ["-e", "many", "disk"],
        ["--tls-creds=t", "disk"],
        ["--object", "tls-creds-x509,id=t,endpoint=client,dir=d", "--tls-creds=t", "disk"],
        ["--nosuch", "disk"],
    ],
    ids=" ".join,
)
def test_what_qemu_nbd_refuses(words: list[str]) -> None:
    with pytest.raises(LaminaError):
        translated("qemu-nbd", *words)


def test_options_of_drivers_that_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", 1 << 20)
    options = {
        "lazy-refcounts": "on", "pass-discard-request": "off", "overlap-check": {"template": "all"},
        "cache-clean-interval": 5, "auto-read-only": True, "cache": {"direct": False, "no-flush": True},
        "file": {"filename": str(path), "aio": "io_uring", "aio-max-batch": 1, "drop-cache": "off"},
    }  # fmt: skip
    with lamina.open({"driver": "qcow2", **options}) as image:
        assert image.size == 1 << 20
    wrong = {"lazy-refcounts": "maybe", "cache-clean-interval": "x", "l2-cache-entry-size": "1X"}
    for key, value in wrong.items():
        with pytest.raises(OptionError):
            lamina.open({"driver": "qcow2", key: value, "file": {"filename": str(path)}})
    with pytest.raises(UnsupportedFeature, match="not supported"):
        lamina.open({"driver": "qcow2", "throttling": {"iops-total": 1}, "file": {"filename": str(path)}})
    with pytest.raises(UnsupportedFeature, match="persistent reservations"):
        lamina.open({"driver": "raw", "file": {"driver": "file", "filename": str(path), "pr-manager": "x"}})


def test_a_cache_mode_goes_down_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", 1 << 20)
    for spec in (
        {"driver": "qcow2", "cache": {"direct": True}, "file": {"driver": "file", "filename": str(path)}},
        {"driver": "qcow2", "cache": {"direct": "on"}, "file": str(path)},
        {
            "driver": "blkdebug",
            "cache": {"direct": True},
            "image": {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}},
        },
    ):
        with lamina.open(spec) as image:
            node = image.node
            while node.children:
                node = next(iter(node.children.values())).node
            assert not node._cached  # type: ignore[attr-defined]


def test_a_guessed_disk_stays_raw(tmp_path: Path) -> None:
    """A guest must not choose the format, and the files, of the next run."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    lamina.create(tmp_path / "image", "qcow2", 1 << 20)
    header = (tmp_path / "image").read_bytes()[:65536]
    with lamina.open(path, format="probe", read_only=False, references=lamina.Policy.unchecked()) as image:
        assert image.format == "raw"
        for offset, data in ((0, header), (0, header[:512]), (0, header[:8]), ((1 << 20) - 512, b"conectix")):
            with pytest.raises(BlockIOError, match="only guessed"):
                image.write(offset, data)
        image.write(1, header[1:512])  # the magic, but for one byte
        with pytest.raises(BlockIOError, match="only guessed"):
            image.write(0, header[:1])
        image.write(512, header)
        image.write(100 << 10, b"conectix")
        with pytest.raises(BlockIOError, match="only guessed"):
            image.truncate((100 << 10) + 512)
        image.truncate(2 << 20)
        assert image.size == 2 << 20
    assert lamina.detect(path).format == "raw"
    with lamina.open(path, format="raw", read_only=False) as image:
        image.write(0, header)  # who says that it is raw may write anything
