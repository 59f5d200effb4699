"""A small HTTP server for figures: Prometheus on /metrics, JSON on /stats.json."""

import dataclasses
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

import kvcompress_jax
from kvcompress_jax.metrics.board import Board
from kvcompress_jax.metrics.prometheus import BoardCollector

LOOPBACK = "127.0.0.1"
CLIENT_TIMEOUT_SECONDS = 10.0


class MetricsServer:
    """Serves a board from threads of its own until `close`; a context manager.

    Attributes:
      port: that it listens on.
      url: of the server.
    """

    def __init__(self, board: Board, *, port: int, host: str = LOOPBACK) -> None:
        """
        Args:
          board: whose last snapshot is served.
          port: to listen on; 0: any free one.
          host: to listen on; by default this machine alone can ask.

        Raises:
          OSError: the port is taken or not allowed.
        """
        registry = CollectorRegistry()
        registry.register(BoardCollector(board))
        handler = type("Handler", (_Handler,), {"board": board, "registry": registry})
        self._server = ThreadingHTTPServer((host, port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://{host}:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="kvcompress-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "MetricsServer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def as_json(board: Board) -> dict[str, object]:
    """What /stats.json says; numbers that are not finite are null, as JSON has none."""
    last = board.last()
    return {
        "version": kvcompress_jax.__version__,
        "uptime_s": board.uptime_s(),
        "age_s": board.age_s(),
        "stats": {} if last is None else _plain(dict(last.stats)),
        "engine": {} if last is None else _plain(dict(last.engine)),
        "steps": 0 if last is None else last.steps_at_most[-1],
        "step_seconds": 0.0 if last is None else last.step_seconds,
    }


class _Handler(BaseHTTPRequestHandler):
    board: Board
    registry: CollectorRegistry
    timeout = CLIENT_TIMEOUT_SECONDS  # a client that says nothing is not waited for
    server_version = "kvcompress"
    sys_version = ""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, content_type, encode(self.registry))
        elif path == "/stats.json":
            text = json.dumps(as_json(self.board), allow_nan=False)
            self._answer(200, "application/json", text.encode())
        else:
            self._answer(404, "text/plain; charset=utf-8", b"expected /metrics or /stats.json\n")

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing: a scrape every few seconds is no news."""


def _plain(x: object) -> object:
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return _plain(dataclasses.asdict(x))
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x
