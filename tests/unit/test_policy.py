"""What names found inside images may open: what each policy grants, and policies as values and as text."""

from __future__ import annotations

import copy
import os
import pickle
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina import policy as module
from lamina.errors import (
    NotFound,
    OptionError,
    PolicyError,
)
from lamina.policy import Policy

from .reference_folders import INSIDE, OUTSIDE, Folders


@pytest.mark.parametrize(
    "name", ["base", "./base", "sub/base", "sub/../base", "../home/base", "sub//base", "./sub/./base"]
)
def test_beneath_opens_files_below_the_directory_of_the_image(folders: Folders, name: str) -> None:
    assert folders.read(Policy.beneath(), name) == INSIDE


def test_beneath_takes_absolute_names_that_are_inside(folders: Folders) -> None:
    assert folders.read(Policy.beneath(), str(folders.home / "sub" / "base")) == INSIDE


def test_beneath_takes_an_absolute_name_that_reaches_the_directory_by_another_way(folders: Folders) -> None:
    (folders.top / "alias").symlink_to(folders.home)
    assert folders.read(Policy.beneath(), str(folders.top / "alias" / "base")) == INSIDE


@pytest.mark.parametrize("target", ["base", "sub/base", "../home/base", "sub/../base", "{home}/sub/base", "second"])
def test_symlinks_that_stay_inside_are_followed(folders: Folders, target: str) -> None:
    (folders.home / "second").symlink_to("sub/base")
    (folders.home / "link").symlink_to(target.format(home=folders.home))
    assert folders.read(Policy.beneath(), "link") == INSIDE


def test_folders_that_are_links_are_followed_beneath_a_folder_that_was_named(folders: Folders) -> None:
    (folders.home / "dir").symlink_to("sub")
    policy = Policy.beneath(folders.home)
    assert folders.read(policy, "dir/base") == INSIDE
    assert folders.read(policy, "dir/../base") == INSIDE


@pytest.mark.parametrize("name", ["dir/base", "dir/../base", "link", "{home}/dir/base"])
def test_the_own_folder_does_not_pass_folders_that_are_links(folders: Folders, name: str) -> None:
    (folders.home / "dir").symlink_to("sub")
    (folders.home / "link").symlink_to("dir/base")
    with pytest.raises(PolicyError, match=r'through the directory ".*/dir"') as caught:
        folders.read(Policy.beneath(), name.format(home=folders.home))
    assert f"list:{folders.home}/" in caught.value.command_text()


@pytest.mark.parametrize(
    "name", [".hidden", ".ssh/base", "sub/.hidden", "sub/../.hidden", "link", "...", "{home}/.hidden"]
)
def test_the_own_folder_has_no_hidden_files(folders: Folders, name: str) -> None:
    (folders.home / ".ssh").mkdir()
    for path in (".hidden", ".ssh/base", "sub/.hidden", "..."):
        (folders.home / path).write_bytes(OUTSIDE)
    (folders.home / "link").symlink_to(".hidden")
    with pytest.raises(PolicyError, match="hidden"):
        folders.read(Policy.beneath(), name.format(home=folders.home))
    assert folders.read(Policy.beneath(folders.home), name.format(home=folders.home)) == OUTSIDE


def test_the_own_folder_may_lie_in_a_hidden_one_or_behind_a_link(folders: Folders) -> None:
    local = folders.top / ".local" / "images"
    local.mkdir(parents=True)
    (folders.top / "pool").symlink_to(local)
    for path in ("top", "base"):
        (local / path).write_bytes(INSIDE)
    folders.image = str(local / "top")
    for name in ("base", str(local / "base"), str(folders.top / "pool" / "base")):
        assert folders.read(Policy.beneath(), name) == INSIDE


@pytest.mark.parametrize("odd", ["plain", "a b", "it's", "a:b", "a\\b", "$(touch x)", "-x"])
def test_the_grant_that_a_refusal_names_works(folders: Folders, odd: str) -> None:
    """Typed into a shell it grants this file, and those that were granted before."""
    (folders.outside / odd).write_bytes(OUTSIDE)
    policy = Policy.beneath()
    for name in (f"../outside/{odd}", "../outside/secret"):
        with pytest.raises(PolicyError) as caught:
            folders.read(policy, name)
        words = shlex.split(caught.value.command_text().partition("to allow it, give ")[2])
        assert words[0] == "--references"
        policy = Policy.parse(words[1])
        call = str(caught.value).partition("to allow it, give references=")[2]
        assert eval(call, {"Policy": Policy}) == policy  # typed into Python it says the same
        assert policy.kind == "listed"
        assert folders.read(policy, name) == OUTSIDE
    assert folders.read(policy, f"../outside/{odd}") == OUTSIDE


def test_what_was_only_probed_opens_nothing(folders: Folders) -> None:
    with pytest.raises(PolicyError, match='format="qcow2"') as caught:
        folders.read(Policy.probed("qcow2"), "base")
    assert "-f qcow2" in caught.value.command_text()
    assert f"--references list:{folders.home}/base" in caught.value.command_text()


def test_beneath_a_directory_resolves_names_from_the_image_and_judges_by_the_directory(folders: Folders) -> None:
    policy = Policy.beneath(folders.top)
    assert folders.read(policy, "base") == INSIDE
    assert folders.read(policy, "../outside/secret") == OUTSIDE
    with pytest.raises(PolicyError):
        folders.read(Policy.beneath(folders.outside), "base")


def test_beneath_the_root_is_everything_regular(folders: Folders) -> None:
    assert folders.read(Policy.beneath("/"), str(folders.secret)) == OUTSIDE


def test_a_directory_is_resolved_when_the_policy_is_made(folders: Folders) -> None:
    link = folders.top / "pool"
    link.symlink_to(folders.home)
    policy = Policy.beneath(link)
    link.unlink()
    link.symlink_to(folders.outside)
    assert folders.read(policy, "base") == INSIDE
    with pytest.raises(PolicyError):
        folders.read(policy, str(folders.secret))


def test_listed_grants_exactly_its_files(folders: Folders) -> None:
    policy = Policy.listed([folders.secret, folders.home / "missing"])
    assert folders.read(policy, str(folders.secret)) == OUTSIDE
    assert folders.read(policy, "../outside/secret") == OUTSIDE
    with pytest.raises(NotFound):
        folders.read(policy, "missing")
    with pytest.raises(PolicyError, match="not in the list"):
        folders.read(policy, "base")
    with pytest.raises(PolicyError, match="not in the list"):
        folders.read(policy, str(folders.outside))


def test_a_listed_link_is_resolved_when_the_policy_is_made(folders: Folders) -> None:
    link = folders.home / "link"
    link.symlink_to("base")
    policy = Policy.listed([link])
    assert folders.read(policy, "link") == INSIDE
    link.unlink()
    link.symlink_to(folders.secret)
    with pytest.raises(PolicyError):
        folders.read(policy, "link")


def test_any_opens_regular_files_everywhere(folders: Folders) -> None:
    assert folders.read(Policy.any(), str(folders.secret)) == OUTSIDE
    (folders.home / "link").symlink_to(folders.secret)
    assert folders.read(Policy.any(), "link") == OUTSIDE


def test_a_relative_referrer_is_relative_to_the_working_directory(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders.top)
    reference = Policy.beneath().open_reference("base", referrer="home/top.qcow2")
    os.close(reference.fd)
    assert reference.path == str(folders.home / "base")


def test_the_descriptor_is_read_only_blocking_and_not_inherited(folders: Folders) -> None:
    reference = Policy.beneath().open_reference("base", referrer=folders.image)
    try:
        assert reference.path == str(folders.home / "base")
        assert not os.get_inheritable(reference.fd)
        assert os.get_blocking(reference.fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(reference.fd, b"x", 0)
    finally:
        os.close(reference.fd)


def test_writable_opens_for_writing(folders: Folders) -> None:
    reference = Policy.beneath().open_reference("base", referrer=folders.image, writable=True)
    try:
        assert os.pwrite(reference.fd, b"G", 0) == 1
    finally:
        os.close(reference.fd)
    assert (folders.home / "base").read_bytes() == b"Granted"


# --- the object and its text


@pytest.mark.parametrize(
    "text",
    ["none", "same-dir", "same-dir:read-only", "any", "beneath:/", "beneath:/a:b", "list:/a", r"list:/a\:b:/c\\d"],
)
def test_text_and_back(text: str) -> None:
    policy = Policy.parse(text)
    assert str(policy) == text
    assert Policy.parse(str(policy)) == policy
    assert text in repr(policy) or "\\" in text


def test_parse_gives_what_the_constructors_give(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Policy.parse("none") == Policy.none()
    assert Policy.parse("any") == Policy.any()
    assert Policy.parse("same-dir") == Policy.beneath()
    monkeypatch.chdir(folders.top)
    assert Policy.parse("beneath:home") == Policy.beneath(folders.home)
    assert Policy.parse("list:home/base:outside/secret") == Policy.listed([folders.secret, folders.home / "base"])
    assert Policy.parse(r"list:/a\:b").paths == ("/a:b",)
    assert Policy.parse(r"list:/a\nb").paths == (r"/a\nb",)


#: Parts of paths: any text that a file can be called.
NAMES = st.text(st.characters(exclude_characters="\0/", codec="utf-8"), min_size=1, max_size=6)
PATHS = st.lists(NAMES, max_size=3).map(lambda names: "/".join(["/nowhere", *names]))
POLICIES = st.one_of(
    st.builds(Policy.none),
    st.builds(Policy.any),
    st.builds(Policy.default),
    st.just(Policy.parse("same-dir:read-only")),
    st.builds(Policy.probed, st.sampled_from(["qcow2", "vmdk"])),
    st.builds(Policy.beneath, st.none() | PATHS),
    st.builds(Policy.listed, st.lists(PATHS)),
)


@given(POLICIES)
def test_every_policy_survives_its_text(policy: Policy) -> None:
    again = Policy.parse(str(policy))
    assert again == policy
    assert hash(again) == hash(policy)
    assert str(again) == str(policy)


def test_the_default_grants_the_same_after_its_text(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAMINA_REFERENCES", raising=False)
    monkeypatch.setattr(module, "site_files", list)
    for policy in (Policy.default(), Policy.parse(str(Policy.default()))):
        assert folders.read(policy, "base") == INSIDE
        with pytest.raises(PolicyError, match="grants reading alone"):
            policy.open_reference("base", referrer=folders.image, writable=True)
    assert Policy.default() == Policy.parse("same-dir:read-only") != Policy.beneath()


def test_what_is_believed_without_a_check_has_no_text() -> None:
    """Its text grants less."""
    assert Policy.parse(str(Policy.unchecked())) == Policy.any() != Policy.unchecked()


@pytest.mark.parametrize("path", ["", "a\0b", b"/a", None, 7])
def test_what_no_file_can_be_called_is_refused(path: Any) -> None:
    with pytest.raises(OptionError):
        Policy.listed([path])
    if path is not None:  # the own directory
        with pytest.raises(OptionError):
            Policy.beneath(path)


@given(st.lists(st.text(st.characters(exclude_characters="\0/", codec="utf-8"), min_size=1, max_size=6), min_size=1))
def test_every_list_survives_its_text(names: list[str]) -> None:
    policy = Policy.listed([f"/nowhere/{name}" for name in names])
    assert Policy.parse(str(policy)) == policy


@pytest.mark.parametrize(
    "text",
    ["", "None", "all", "any:", "none:x", "same-dir:x", "beneath", "beneath:", "list", "list:", "list:a:", "list::a"],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        Policy.parse(text)
    assert "same-dir" in str(caught.value)


def test_a_list_is_not_a_string() -> None:
    with pytest.raises(OptionError):
        Policy.listed("/etc/passwd")


def test_policies_are_values() -> None:
    assert Policy.none() == Policy.none()
    assert Policy.none() != Policy.any()
    assert Policy.any() != "any"
    assert len({Policy.any(), Policy.any(), Policy.beneath(), Policy.beneath("/")}) == 3
    with pytest.raises(AttributeError):
        Policy.any().kind = "none"  # type: ignore[misc]
    for policy in (Policy.beneath("/x"), Policy.probed("qcow2"), Policy.listed(["/a", "/b"])):
        assert pickle.loads(pickle.dumps(policy)) == policy
        assert copy.deepcopy(policy) == policy
