"""The default policy for references, which a site sets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lamina import policy as policy_module
from lamina.errors import (
    OptionError,
)
from lamina.policy import Policy

#: The default where no site has set one.
OWN = Policy("beneath", writes=False)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a user, and none of the system."""
    monkeypatch.delenv("LAMINA_REFERENCES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(policy_module, "SYSTEM_DEFAULT", str(tmp_path / "etc"))
    path = tmp_path / "config" / "lamina" / "references"
    path.parent.mkdir(parents=True)
    return path


def test_a_site_sets_its_default(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = Path(policy_module.SYSTEM_DEFAULT)
    assert Policy.default() == OWN
    system.write_text("# all images lie here\n\n  beneath:/srv  \nany\n")
    assert Policy.default() == Policy.beneath("/srv")
    site.write_text("none\n")
    assert Policy.default() == Policy.none()
    monkeypatch.setenv("LAMINA_REFERENCES", "list:/a:/b")
    assert Policy.default() == Policy.listed(["/a", "/b"])
    monkeypatch.setenv("LAMINA_REFERENCES", "")
    assert Policy.default() == Policy.none()
    # With more rights than its user, a process trusts nothing that the user sets.
    monkeypatch.setenv("LAMINA_REFERENCES", "any")
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    assert Policy.default() == Policy.beneath("/srv")


def test_a_relative_folder_of_settings_does_not_count(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.write_text("any\n")
    monkeypatch.chdir(site.parent.parent.parent)
    monkeypatch.setenv("HOME", str(site.parent))
    monkeypatch.setenv("XDG_CONFIG_HOME", "config")
    assert Policy.default() == OWN


def test_a_default_that_is_wrong_names_its_place(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.write_text("everything\n")
    with pytest.raises(OptionError, match=r"lamina/references: .everything. is not a policy"):
        Policy.default()
    monkeypatch.setenv("LAMINA_REFERENCES", "all")
    with pytest.raises(OptionError, match=r"LAMINA_REFERENCES: .all. is not a policy"):
        Policy.default()


def test_a_default_that_others_could_have_written_does_not_count(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.write_text("any\n")
    site.chmod(0o666)
    with pytest.raises(OptionError, match="other users may write"):
        Policy.default()
    site.unlink()
    os.mkfifo(site)
    assert Policy.default() == OWN
    site.unlink()
    site.write_text("any\n")
    if os.geteuid() == 0:
        os.chown(site, 12345, -1)
        assert Policy.default() == OWN
