"""Who may ask a small server of this library: people on this machine, or who has the token."""

import hmac
import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie

from postgrad.errors import PostgradError

_SHORTEST_TOKEN = 16


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address, without port) is this machine and no other."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def token_from(variable: str) -> str:
    """The token in an environment variable; an error if there is none or it is easily guessed."""
    token = os.environ.get(variable, "")
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isalnum():
        found = f"{len(token)} characters" if token else "nothing"
        raise PostgradError(
            f"the token in the environment variable {variable}: expected {_SHORTEST_TOKEN} or more "
            f"letters and digits, found {found if len(token) < _SHORTEST_TOKEN else 'others'}"
        )
    return token


def new_token() -> str:
    return secrets.token_hex(24)


def listening(host: str, port: int, key: str) -> socket.socket:
    """A socket that listens at `host`:`port` (0: any free port); `key` names the port in errors."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(64)
        except OSError:
            made.close()
            raise
    except (OSError, UnicodeError) as error:  # the latter: no name of a machine
        why = getattr(error, "strerror", None) or error
        raise PostgradError(f"{key}: cannot listen at {host}:{port}: {why}") from error
    return made


@dataclass(frozen=True)
class Access:
    """Decides on requests by their headers.

    Args:
        host: where the server listens. On loopback the `Host` header must be of this machine: a
            page elsewhere whose name was pointed here (DNS rebinding) is refused.
        token: what a request must bring, as `Authorization: Bearer`, or as the cookie `cookie`;
            empty: nothing. Required anywhere but on loopback.
    """

    host: str
    token: str = ""
    cookie: str = ""

    def __post_init__(self) -> None:
        if not self.token and not is_loopback(self.host):
            raise PostgradError(f"{self.host} can be reached by other machines: a token is needed")

    def refusal(self, headers: Mapping[str, str]) -> HTTPStatus | None:
        """The status that a request with these headers (names in lower case) is refused with."""
        name = re.sub(r":\d*$", "", headers.get("host", ""))
        if is_loopback(self.host) and not is_loopback(name):
            return HTTPStatus.MISDIRECTED_REQUEST
        # browsers say where a request comes from; following a link is fine, loading parts is not
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and headers.get("sec-fetch-mode") != "navigate":
            return HTTPStatus.FORBIDDEN
        return None if not self.token or self._known(headers) else HTTPStatus.UNAUTHORIZED

    def _known(self, headers: Mapping[str, str]) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.opens(given.strip()):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self.cookie or " ")
        except CookieError:
            return False
        return cookie is not None and self.opens(cookie.value)

    def opens(self, given: str) -> bool:
        """Whether this is the token; takes as long whatever was given."""
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())
