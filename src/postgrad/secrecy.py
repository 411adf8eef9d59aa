"""Keeps tokens and passwords out of whatever is written: logs, configurations, records, reports."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from postgrad.errors import PostgradError

_NAME = re.compile(r"(.*[_-])?(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"(\b\w[\w+.-]{0,20}://[^\s/:@]{0,200}:)[^\s/@]{1,200}(?=@)")
_ASSIGNED = re.compile(
    r"(?i)\b((?:[\w.-]*[_.-])?(?:api_?key|access_?key|token|secret|password|passwd)"
    r"[\"']?\s*[=:]\s*[\"']?)([^\s\"',}]+)"
)
# names that mean nothing else, and the look of what is no word
_SURE = re.compile(r"(?i)(.*_)?(api_?key|access_?key|secret(_key)?|password|passwd|auth_token)")
_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w.+/=-]{16,}")
_SHORTEST = 8  # characters; what is shorter may well be a word
HIDDEN = "***"


def _secrets() -> dict[str, str]:
    """Values of environment variables that are named as secrets are, by name."""
    return {
        name: value
        for name, value in os.environ.items()
        if _NAME.fullmatch(name) and len(value) >= _SHORTEST and not os.path.exists(value)
    }


def blanked(text: str) -> str:
    """`text` without the values of secret environment variables and passwords in addresses."""
    for value in sorted(_secrets().values(), key=len, reverse=True):
        # as it is, and as it stands in JSON
        for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
            text = text.replace(form, HIDDEN)
    return _PASSWORD_IN_URL.sub(rf"\1{HIDDEN}", text)


def blanked_command(words: Sequence[str]) -> list[str]:
    """A command line, also without what it gives as a `token`, a `password` …"""
    return [
        HIDDEN if _NAME.fullmatch(before.lstrip("-")) and before.startswith("-")
        else _ASSIGNED.sub(rf"\1{HIDDEN}", blanked(word))
        for before, word in pairwise(["", *words])
    ]  # fmt: skip


def require_no_secrets(settings: Mapping[str, Any], prefix: str = "") -> None:
    """Stop before settings with a secret in them are written into a run folder."""
    for key, value in settings.items():
        place = f"{prefix}{key}"
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, Mapping):
                require_no_secrets(item, f"{place}.")
            elif isinstance(item, str):
                _require_no_secret(place, key, item)


def _require_no_secret(place: str, key: str, value: str) -> None:
    advice = "settings are written into the run folder: let your code read it from the environment"
    for name, secret in _secrets().items():
        if secret in value:
            raise PostgradError(f"{place}: holds the value of the variable {name}; {advice}")
    if _PASSWORD_IN_URL.search(value):
        raise PostgradError(f"{place}: holds an address with a password; {advice}")
    named = _NAME.fullmatch(key) is not None
    if value and (_SURE.fullmatch(key) or (named and _RANDOM.fullmatch(value))):
        raise PostgradError(f"{place}: holds a secret; {advice}")
