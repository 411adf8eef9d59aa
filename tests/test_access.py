"""Who may ask a server of ours: names of this machine, tokens, and requests from other sites."""

from http import HTTPStatus

import pytest

from postgrad.access import Access, is_loopback, listening, token_from
from postgrad.errors import PostgradError

TOKEN = "abcdefgh12345678"


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.1", "localhost", "LOCALHOST.", "::1", "[::1]"]
)
def test_this_machine_by_its_names(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "::", "10.0.0.1", "evil.com", "localhost.evil.com", "127.0.0.1.nip.io"]
)
def test_what_is_not_this_machine(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8420", None),
        ("localhost", None),
        ("[::1]:8420", None),
        ("localhost:1", None),
        ("evil.com:8420", HTTPStatus.MISDIRECTED_REQUEST),
        ("localhost.evil.com", HTTPStatus.MISDIRECTED_REQUEST),
        ("[::1].evil.com", HTTPStatus.MISDIRECTED_REQUEST),
        ("", HTTPStatus.MISDIRECTED_REQUEST),
    ],
)
def test_on_loopback_only_names_of_this_machine_are_answered(
    host: str, status: HTTPStatus | None
) -> None:
    assert Access("127.0.0.1").refusal({"host": host}) == status


def test_elsewhere_a_token_is_demanded() -> None:
    with pytest.raises(PostgradError, match="a token is needed"):
        Access("0.0.0.0")
    access = Access("0.0.0.0", TOKEN, "postgrad_1")
    asked = {"host": "cluster.example.org"}
    assert access.refusal(asked) == HTTPStatus.UNAUTHORIZED
    assert access.refusal({**asked, "authorization": f"Bearer {TOKEN}"}) is None
    assert access.refusal({**asked, "cookie": f"a=b; postgrad_1={TOKEN}"}) is None
    for wrong in (
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer \xe9\ud83d"},
        {"cookie": f"postgrad_2={TOKEN}"},
        {"cookie": "postgrad_1="},
        {"cookie": ";;=\x00"},
    ):
        assert access.refusal({**asked, **wrong}) == HTTPStatus.UNAUTHORIZED, wrong


def test_other_sites_may_link_here_and_load_nothing() -> None:
    access = Access("127.0.0.1")
    asked = {"host": "localhost:8420"}
    for site in ("cross-site", "same-site"):
        loads = {**asked, "sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
        assert access.refusal(loads) == HTTPStatus.FORBIDDEN
        assert access.refusal({**loads, "sec-fetch-mode": "navigate"}) is None
    assert access.refusal({**asked, "sec-fetch-site": "same-origin"}) is None


@pytest.mark.parametrize("token", ["", "short", "with a space 12345678", "é" * 20])
def test_a_token_that_is_missing_or_weak_is_refused(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    assert token_from("MY_TOKEN") == TOKEN
    monkeypatch.setenv("MY_TOKEN", token)
    with pytest.raises(PostgradError, match="MY_TOKEN: expected 16 or more letters and digits"):
        token_from("MY_TOKEN")


def test_a_port_that_is_taken_is_named() -> None:
    with listening("127.0.0.1", 0, "port") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PostgradError, match=rf"^port: cannot listen at 127\.0\.0\.1:{port}: "):
            listening("127.0.0.1", port, "port")
    with pytest.raises(PostgradError, match="port: cannot listen at no such host:1"):
        listening("no such host", 1, "port")
