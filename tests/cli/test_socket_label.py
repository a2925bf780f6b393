"""`--selinux-label`: the label of the socket that a server listens on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import lamina
from lamina.cli import socket_label
from lamina.cli.main import main
from lamina.cli.socket_label import new_sockets_labelled
from lamina.errors import BlockIOError


def test_the_label_is_set_inside_and_cleared_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sockcreate"
    path.touch()
    monkeypatch.setattr(socket_label, "_NEW_SOCKETS", str(path))
    written: list[bytes] = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: written.append(bytes(data)) or real(fd, data))
    with new_sockets_labelled("system_u:object_r:svirt_t:s0"):
        assert written == [b"system_u:object_r:svirt_t:s0"]
    assert written[1:] == [b""]  # which the kernel takes for: no label
    with pytest.raises(KeyError), new_sockets_labelled("x"):
        raise KeyError
    assert written[2:] == [b"x", b""]
    with new_sockets_labelled(None):
        pass
    assert len(written) == 4


def test_a_system_without_selinux_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(socket_label, "_NEW_SOCKETS", str(tmp_path / "missing"))
    with pytest.raises(BlockIOError, match="SELinux"), new_sockets_labelled("x"):
        pass
    lamina.create(tmp_path / "disk", "raw", 1 << 20)
    words = ["serve", "--selinux-label", "x", "-k", str(tmp_path / "s"), "-f", "raw", str(tmp_path / "disk")]
    assert main(words) == 1
    assert "label of SELinux" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    assert main(["serve", "--selinux-label", "x", "-p", "0", "-f", "raw", str(tmp_path / "disk")]) == 1
    assert "-k" in capsys.readouterr().err
