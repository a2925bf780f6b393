"""Ordered rules that say which verified certificates a server admits: exact subjects and patterns, allowed and denied.

They are JSON: `{"policy": "deny", "rules": [{"match": "*,O=Example,*", "format": "glob", "policy": "allow"}]}`, the form of
QEMU's `authz-list`. The first rule that matches decides; `policy` decides where none does, and is deny where it is absent.

A rule is compared with the subject alone, since any other name of a certificate would get around a rule that denies. The
subject is written in the order of the certificate (`C=DE,O=Example,CN=backup`), as GnuTLS, and so QEMU, writes it: the
reverse of RFC 4514, which names in `--tls-allow` follow.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from ..errors import LaminaError, OptionError
from ..limits import MIB
from ..named_file import read_named
from ..options import shown

log = logging.getLogger("lamina.nbd")

#: The most bytes of rules, and the most rules.
_MOST: Final = MIB
_MOST_RULES: Final = 10_000
#: One part of a subject as RFC 4514 writes it: a comma inside a value is escaped.
_PART: Final = re.compile(r"(?:\\.|[^,\\])+", re.DOTALL)
_SUBJECT: Final = re.compile(r"[A-Za-z0-9.-]+=")


class _Rule(NamedTuple):
    matches: re.Pattern[str]
    admits: bool


class AccessRules:
    """Rules in the form of the module's page. Immutable, except those of a file (`from_file`); any thread may ask."""

    def __init__(self, given: object) -> None:
        """OptionError for what is no such form."""
        self._path: str | None = None
        self._seen: tuple[int, ...] | None = None
        #: Replaced as a whole, since other threads ask meanwhile.
        self._decision = _parsed(given)

    @classmethod
    def from_text(cls, text: str) -> AccessRules:
        """`json:{...}`, or the name of a file for `from_file`."""
        if text.startswith("json:"):
            return cls(_json(text[5:].encode(errors="surrogateescape")))
        return cls.from_file(text)

    @classmethod
    def from_file(cls, path: str) -> AccessRules:
        """The rules in a file, which is read again when it has changed. Nobody is admitted while it cannot be read.

        Raises OptionError, BlockIOError."""
        path = os.path.abspath(path)
        content, status = read_named(path, _MOST + 1, failure="the rules for clients cannot be read")
        rules = cls(_json(content, path))
        rules._path, rules._seen = path, _version(status)
        return rules

    def admits(self, names: Sequence[str]) -> bool:
        """Whether the certificate with these names (`tls.peer_names`) is admitted. One without a subject never is."""
        if self._path is not None:
            self._refresh(self._path)
        if not names or not _SUBJECT.match(names[0]):
            return False
        subject = ",".join(reversed(_PART.findall(names[0])))
        policy, rules = self._decision
        for rule in rules:
            if rule.matches.match(subject):
                return rule.admits
        return policy

    def _refresh(self, path: str) -> None:
        try:
            if _version(os.stat(path)) == self._seen:
                return
            changed = AccessRules.from_file(path)
        except (OSError, LaminaError) as error:
            log.error("no client is admitted until the rules can be read: %s", error)
            self._decision, self._seen = (False, ()), None
            return
        self._decision, self._seen = changed._decision, changed._seen


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _json(content: bytes, path: str | None = None) -> object:
    try:
        if len(content) <= _MOST:
            return json.loads(content)
    except (ValueError, RecursionError):
        pass  # the error below says what is needed
    raise OptionError("the rules for clients are not JSON of at most 1 MiB", path=path)


def _parsed(given: object) -> tuple[bool, tuple[_Rule, ...]]:
    given = _checked(given, ("policy", "rules"), "the rules for clients")
    rules = given.get("rules", [])
    if not isinstance(rules, list | tuple) or len(rules) > _MOST_RULES:
        raise OptionError(
            f"the rules for clients are no list of at most {_MOST_RULES}",
            hint="give rules.0.match=..., or a JSON array",
        )
    return _admits(given.get("policy", "deny")), tuple(map(_rule, rules))


def _rule(given: object) -> _Rule:
    given = _checked(given, ("match", "policy", "format"), "a rule for clients")
    match, format = given.get("match"), given.get("format", "exact")
    if not isinstance(match, str) or format not in ("exact", "glob"):
        raise OptionError(
            "a rule for clients needs a match, and its format is exact or glob", hint="match=NAME,policy=allow"
        )
    # A glob has * and ?, but no sets in brackets.
    pattern = fnmatch.translate(match.replace("[", "[[]")) if format == "glob" else rf"{re.escape(match)}\Z"
    return _Rule(re.compile(pattern), _admits(given.get("policy")))


def _checked(given: object, keys: tuple[str, ...], what: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise OptionError(f"{what}: a mapping is needed", hint=f"its keys are {', '.join(keys)}")
    for key in given:
        if key not in keys:
            raise OptionError(f"{what}: {shown(key)} is not known", hint=f"the keys are {', '.join(keys)}")
    return given


def _admits(policy: object) -> bool:
    if policy not in ("allow", "deny"):
        raise OptionError(f"the policy for clients is {shown(policy)}", hint="it is allow or deny")
    return policy == "allow"
