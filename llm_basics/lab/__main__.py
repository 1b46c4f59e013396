"""Watch runs, generate text and inspect models in the browser.

uv run --extra lab python -m llm_basics.lab
uv run --extra lab python -m llm_basics.lab --runs runs --data book.txt --port 8100 --no-browser
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

import errno
import os
import secrets
import socket
import sys
import threading
import types
import webbrowser
from dataclasses import dataclass
from pathlib import Path

from llm_basics.cli import parse
from llm_basics.runs import run_dir

MIN_TOKEN = 16

MISSING = "the lab needs fastapi and uvicorn; install them with: uv sync --extra lab"


@dataclass(frozen=True)
class LabConfig:
    """Options of the server."""

    runs: str = str(run_dir.RUNS)
    """Folder of run directories."""
    data: tuple[str, ...] = ()
    """Training texts for new runs, in addition to stdlib; as --data of train."""
    mine: str = "mine.py"
    """Python file with your pieces, whose progress the page shows."""
    device: str = "cpu"
    """Device of inspected models: cuda, mps or cpu. A training run may need the GPU."""
    threads: int = 1
    """Number of threads for computations, which have lower priority than a training run."""
    host: str = "127.0.0.1"
    """Address to listen on. Non-loopback addresses need --token."""
    port: int = 8100
    """Port to listen on. 0: a free one."""
    token: str | None = None
    """Token of at least 16 characters. None: a random one, which is part of the printed address."""
    allow_host: tuple[str, ...] = ()
    """Additional host names of this server, as in a browser's address."""
    browser: bool = True
    """Open the page in the browser."""

    def __post_init__(self) -> None:
        if self.token is not None and (len(self.token) < MIN_TOKEN or not is_plain(self.token)):
            raise ValueError(f"token must have at least {MIN_TOKEN} letters, digits, dashes and underscores")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be from 0 to 65535, got {self.port}")
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")


def is_plain(token: str) -> bool:
    """Whether a token is valid in an address and in a cookie."""
    return token.isascii() and token.replace("-", "").replace("_", "").isalnum()


def main(options: LabConfig) -> int:
    """Serve until a signal. Returns the exit status."""
    with parse.exit_on_error():
        try:
            import uvicorn

            from llm_basics.lab import app, security, service
        except ModuleNotFoundError as error:
            if error.name not in ("fastapi", "uvicorn", "starlette"):
                raise
            raise ValueError(MISSING) from None
        import torch

        if options.token is None and not security.is_loopback(options.host):
            raise ValueError(
                f"host {options.host} is reachable by others and needs --token; without, use 127.0.0.1"
            )
        torch.set_num_threads(options.threads)
        token = options.token or secrets.token_urlsafe(24)
        listener = listen(options.host, options.port)
        port = listener.getsockname()[1]
        lab = service.make(Path(options.runs), options.data, options.device, options.mine)
        guarded = app.create(lab, token, port, (*options.allow_host, *own_name(options.host)))
        address = f"http://{shown(options.host)}:{port}/?token={token}"
        print(f"the lab   {address}\nruns      {options.runs}\nCtrl-C ends it, not training runs", flush=True)
        if options.browser:
            threading.Timer(0.5, webbrowser.open, [address]).start()

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
                """End live streams, which would otherwise be cancelled with a traceback."""
                lab.is_closing.set()
                super().handle_exit(sig, frame)

        # no access log, since addresses contain the token
        settings = uvicorn.Config(
            guarded,
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=1,
            lifespan="off",
        )
        Server(settings).run(sockets=[listener])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket on an address. Raises ValueError if it is taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(os.name == "posix"))
    try:
        listener.bind((host.strip("[]"), port))
        # the browser may connect before the server is ready
        listener.listen()
    except OSError as error:
        listener.close()
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"is not available ({error.strerror})"
        raise ValueError(f"{host}:{port} {reason}; try another --port, or 0 for a free one") from None
    return listener


def shown(host: str) -> str:
    """The host in the printed address."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def own_name(host: str) -> tuple[str, ...]:
    """The host as an allowed name, unless it is a wildcard address."""
    return () if host in ("0.0.0.0", "::") else (shown(host),)


if __name__ == "__main__":
    # `python -m llm_basics.lab` in usage lines, not the file's name
    parse.set_up_process()
    chosen = parse.program_options(
        LabConfig(), sys.argv[1:], "python -m llm_basics.lab", (__doc__ or "").partition("\n")[0]
    )
    signals.run(main, chosen)
