"""Who may ask the lab's server what. Alone: uv run --extra lab pytest tests/test_lab_security.py"""

import itertools
import socket
import urllib.parse

import pytest

pytest.importorskip("fastapi", reason="needs uv sync --extra lab")

from fastapi import testclient

from llm_basics.cli import parse
from llm_basics.lab import __main__ as command
from llm_basics.lab import app, security, service

TOKEN = "token-of-the-tests"
RUN = "0" * 12

# what a host header may be, and whether it is allowed
HOSTS = {
    "127.0.0.1:8100": True,
    "127.0.0.1": True,
    "localhost:8100": True,
    "LOCALHOST": True,
    "[::1]:8100": True,
    "evil.example": False,
    "evil.example:8100": False,
    "127.0.0.1:81": False,
    "127.0.0.1.evil.example:8100": False,
    "localhost@evil.example": False,
}

# what the origin may be, with {} for the host; None: no such header
ORIGINS = {
    None: True,
    "http://{}": True,
    "https://{}": False,
    "http://evil.example": False,
    "null": False,
    "http://{}.evil.example": False,
}

# method, path, whether it needs the token
ROUTES = [
    ("GET", "/", False),
    ("GET", "/api/health", False),
    ("GET", "/api/runs", True),
    ("POST", "/api/generate", True),
    ("GET", f"/api/runs/{RUN}/rollouts", True),
    ("PATCH", f"/api/runs/{RUN}", True),
    ("POST", f"/api/runs/{RUN}/checkpoints/0/verify", True),
    ("DELETE", f"/api/runs/{RUN}/checkpoints/0", True),
]

BODIES = {"POST": {"run": RUN}, "PATCH": {"name": "other"}}


@pytest.fixture(scope="module")
def application(tmp_path_factory):
    return app.create(service.make(tmp_path_factory.mktemp("runs")), TOKEN, 8100)


@pytest.fixture
def client(application):
    base = "http://127.0.0.1:8100"
    # one event loop for all requests
    with testclient.TestClient(application, base_url=base, follow_redirects=False) as client:
        yield client


def status(client, method, path, host, origin, **more):
    headers = {"host": host, **more}
    if origin is not None:
        headers["origin"] = origin.format(host.lower())
    return client.request(method, path, headers=headers, json=BODIES.get(method)).status_code


def test_every_combination_of_host_origin_and_route(client):
    n_combinations = 0
    for (host, is_host), (origin, is_origin), (method, path, needs_token) in itertools.product(
        HOSTS.items(), ORIGINS.items(), ROUTES
    ):
        n_combinations += 1
        # the run does not exist: 404 is what an allowed request gets
        answered = 404 if method == "POST" or RUN in path else 200
        expected = 400 if not is_host else 403 if not is_origin else answered
        with_token = status(client, method, path, host, origin, authorization=f"Bearer {TOKEN}")
        assert with_token == expected, (host, origin, path)
        without = status(client, method, path, host, origin)
        assert without == (401 if expected == answered and needs_token else expected), (host, origin, path)
    assert n_combinations == 480


def test_the_token_of_the_address_becomes_a_cookie(client):
    response = client.get("/", params={"token": TOKEN})
    assert response.status_code == 303 and response.headers["location"] == "/"
    cookie = response.headers["set-cookie"]
    assert cookie == f"lab_8100={TOKEN}; HttpOnly; SameSite=Strict; Path=/"
    assert client.get("/api/runs").status_code == 200  # the client keeps the cookie
    # a browser that changes something says where it comes from
    assert client.post("/api/generate", json={"run": RUN}).status_code == 403
    origin = {"origin": "http://127.0.0.1:8100"}
    assert client.post("/api/generate", json={"run": RUN}, headers=origin).status_code == 404
    cross = origin | {"sec-fetch-site": "cross-site"}
    assert client.post("/api/generate", json={"run": RUN}, headers=cross).status_code == 403


@pytest.mark.parametrize("given", ["", "x", TOKEN + "x", TOKEN[:-1], "\u00e9"])
def test_another_token_is_refused(client, given):
    quoted = urllib.parse.quote(given)
    assert client.get(f"/?token={quoted}").status_code == (401 if given else 200)
    assert client.get("/api/runs", headers={"authorization": f"Bearer {quoted}"}).status_code == 401
    assert client.get("/api/runs", headers={"cookie": f"lab_8100={quoted}"}).status_code == 401
    assert client.get("/api/runs", headers={"cookie": f"lab_81={TOKEN}"}).status_code == 401


def test_every_route_but_the_open_ones_needs_the_token(client):
    paths = client.get("/openapi.json").json()["paths"]
    n_open = 0
    for path, methods in paths.items():
        for method in methods:
            response = client.request(method, path.replace("{", "").replace("}", ""))
            n_open += response.status_code != 401
            assert response.status_code == (200 if path == "/api/health" else 401), path
    assert n_open == 1 and len(paths) > 25
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 401


# --------------------------------------------------------------------------------------------------
# Paths


def payloads():
    """300 ways to write a path that leaves its folder."""
    steps = ["../", "..\\", "%2e%2e/", "%2e%2e%2f", "..%2f", "..%5c", "%252e%252e%252f", "....//", ".%00./"]
    steps += ["..%c0%af", "..;/", "/../", "\u2025/", "%uff0e%uff0e/", "..//"]
    targets = ["etc/passwd", "config.json", "lock", "__main__.py", ".lab/x.log"]
    found = [step * depth + target for step in steps for depth in (1, 2, 4, 8) for target in targets]
    assert len(set(found)) == 300
    return found


def test_no_path_leaves_its_folder(client, tmp_path):
    headers = {"authorization": f"Bearer {TOKEN}"}
    for payload in payloads():
        for path in (
            f"/static/{payload}",
            f"/api/runs/{payload}",
            f"/api/runs/{RUN}/checkpoints/{payload}/verify",
        ):
            method = "POST" if path.endswith("verify") else "GET"
            response = client.request(method, path, headers=headers)
            assert response.status_code in (400, 401, 404, 405, 422), (path, response.status_code)
            assert b"root:" not in response.content and b"import" not in response.content
    for payload in payloads()[::10]:
        for body in ({"run": payload}, {"run": RUN, "checkpoint": payload}):
            assert client.post("/api/tokenize", json=body, headers=headers).status_code == 422
        answer = client.post("/v1/completions", json={"model": payload}, headers=headers)
        assert answer.status_code == 404 and "error" in answer.json()
        start = client.post("/api/runs", json={"preset": payload}, headers=headers)
        assert start.status_code == 422


# --------------------------------------------------------------------------------------------------
# Answers and bodies


def test_the_page_may_load_nothing_from_outside(client):
    for path in ("/", "/api/health", "/api/runs", "/static/nothing"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert not any(name.startswith("access-control") for name in headers)
    assert client.options("/api/runs", headers={"origin": "http://evil.example"}).status_code == 403


def test_a_long_body_is_refused_whatever_its_headers_claim(client):
    headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
    long = b"x" * (security.MAX_BODY_BYTES + 1)
    assert client.post("/api/tokenize", content=long, headers=headers).status_code == 413
    in_parts = client.post("/api/tokenize", content=iter([long[:1000], long]), headers=headers)
    assert in_parts.status_code == 413
    assert client.post("/api/tokenize", content=b"{", headers=headers).status_code == 422
    nested = b"[" * 100_000
    assert client.post("/api/tokenize", content=nested, headers=headers).status_code in (400, 422)


def test_errors_do_not_repeat_what_was_sent(client):
    body = {"run": "<script>", "text": "secret"}
    response = client.post("/api/tokenize", json=body, headers={"authorization": f"Bearer {TOKEN}"})
    assert response.status_code == 422 and "run" in response.json()["detail"]
    assert "secret" not in response.text and "<script>" not in response.text


# --------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--host", "0.0.0.0"], "needs --token"),
        (["--host", "192.168.0.7"], "needs --token"),
        (["--token", "short"], "at least 16"),
        (["--token", "not;a-cookie-value"], "at least 16"),
        (["--port", "99999"], "from 0 to 65535"),
    ],
)
def test_a_server_for_others_needs_a_token(capsys, arguments, reason):
    with pytest.raises(SystemExit) as stop:
        command.main(parse.program_options(command.LabConfig(), arguments, "lab"))
    assert stop.value.code == 2 and reason in capsys.readouterr().err


def test_a_taken_port_is_an_error():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ValueError, match="in use; try another --port"):
            command.listen("127.0.0.1", other.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("x", False)],
)
def test_which_hosts_are_local(host, is_local):
    assert security.is_loopback(host) == is_local
