"""Access control as an ASGI middleware: hosts, origins, a token, and the size of bodies.

A page of another site can send requests to 127.0.0.1, by its address or by a host name that resolves to it
(DNS rebinding). The host allowlist blocks the second, `Origin` and the SameSite cookie the first. The token
blocks other users of the machine.
"""

import ipaddress
import json
import secrets
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from starlette import exceptions

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL = ("127.0.0.1", "localhost", "[::1]")
MAX_BODY_BYTES = 1 << 20

# paths without the token, which expose no run
OPEN_PATHS = ("/", "/api/health", "/openapi.json", "/favicon.ico")
OPEN_PREFIX = "/static/"

# methods without side effects and computations
SAFE = ("GET", "HEAD")

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


class Guard:
    """The middleware. `hosts` are allowed beside 127.0.0.1 and localhost; each with and without `port`."""

    def __init__(self, app: App, token: str, port: int, hosts: Iterable[str] = ()) -> None:
        self.app, self.token, self.port = app, token, port
        names = [*LOCAL, *(host.lower() for host in hosts)]
        self.hosts = {*names, *(f"{name}:{port}" for name in names)}
        # cookies are not separated by port
        self.cookie = f"lab_{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to, refuse or forward a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def send_protected(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_encoded(HEADERS)]
            await send(message)

        try:
            if (location := self._check(scope)) is not None:
                cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                await _respond(send_protected, 303, b"", {"location": location, "set-cookie": cookie})
                return
            await self.app(scope, _bounded(scope, receive), send_protected)
        except exceptions.HTTPException as error:
            body = json.dumps({"detail": error.detail}).encode()
            await _respond(send_protected, error.status_code, body, {"content-type": "application/json"})

    def _check(self, scope: Scope) -> str | None:
        """Raise HTTPException unless the request is allowed. Returns the redirect address after a login."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts = headers.get("host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            raise exceptions.HTTPException(400, "the Host header must name this server; see --allow_host")
        path, method = scope["path"], scope["method"]
        self._check_origin(headers, hosts[0].lower(), path)
        length = headers.get("content-length", ["0"])[0]
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            raise exceptions.HTTPException(413, f"a body must have at most {MAX_BODY_BYTES:,} bytes")
        query = urllib.parse.parse_qs(scope["query_string"].decode("latin-1"))
        if path == "/" and method in SAFE and "token" in query:
            if not self._is_token(query["token"][0]):
                raise exceptions.HTTPException(
                    401, "the token in the address is not that of this server; it prints a new one"
                )
            return "/"
        if path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return None
        is_bearer = self._is_token(headers.get("authorization", [""])[0].removeprefix("Bearer "))
        if not is_bearer and not self._has_cookie(headers):
            raise exceptions.HTTPException(
                401, "open the address that the server has printed, or send its token as a Bearer"
            )
        # a browser sends Origin with every request that changes state
        if not is_bearer and method not in SAFE and "origin" not in headers:
            raise exceptions.HTTPException(403, "the Origin header is missing")
        return None

    def _check_origin(self, headers: dict[str, list[str]], host: str, path: str) -> None:
        origins = headers.get("origin", [])
        if len(origins) > 1 or any(origin.lower() != f"http://{host}" for origin in origins):
            raise exceptions.HTTPException(403, "the request comes from a page of another origin")
        site = headers.get("sec-fetch-site", ["none"])[0]
        if path not in OPEN_PATHS and site not in ("same-origin", "none"):
            raise exceptions.HTTPException(403, "the request comes from a page of another site")

    def _has_cookie(self, headers: dict[str, list[str]]) -> bool:
        pairs = [
            pair.strip().partition("=") for line in headers.get("cookie", []) for pair in line.split(";")
        ]
        return any(name == self.cookie and self._is_token(value) for name, _, value in pairs)

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode("utf-8", "replace"), self.token.encode())


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _bounded(scope: Scope, receive: Receive) -> Receive:
    """`receive` with a limit of the actual body length, independent of the headers."""
    n_bytes = 0

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal n_bytes
        message = await receive()
        n_bytes += len(message.get("body", b""))
        if n_bytes > MAX_BODY_BYTES:
            raise exceptions.HTTPException(413, f"a body must have at most {MAX_BODY_BYTES:,} bytes")
        return message

    return bounded


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


async def _respond(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    headers = {"content-length": str(len(body)), **headers}
    await send({"type": "http.response.start", "status": status, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": body})
