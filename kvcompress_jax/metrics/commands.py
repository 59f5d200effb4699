"""`kvcompress top`, and `--serve-metrics` of commands that run an engine."""

import argparse
import contextlib
from collections.abc import Iterator

from kvcompress_jax.metrics.board import Board

PORT = 9465


class MetricsError(RuntimeError):
    """Figures that cannot be served, or that nobody serves."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `kvcompress top`."""
    parser.add_argument(
        "--url",
        default=f"http://127.0.0.1:{PORT}",
        help="of a process that serves metrics (default: %(default)s)",
    )
    parser.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="SECONDS", help="(default: %(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="show the figures once and end")


def run(args: argparse.Namespace) -> None:
    """`kvcompress top`."""
    from kvcompress_jax.metrics.top import watch

    watch(args.url, interval_s=args.interval, once=args.once)


def add_serving(parser: argparse.ArgumentParser) -> None:
    """Adds `--serve-metrics` to a command."""
    parser.add_argument(
        "--serve-metrics",
        type=_port,
        nargs="?",
        const=PORT,
        metavar="PORT",
        help="serve figures while it runs, to this machine alone: /metrics for Prometheus,"
        f" /stats.json for `kvcompress top` (default port: {PORT})",
    )


@contextlib.contextmanager
def serving(args: argparse.Namespace) -> Iterator[Board | None]:
    """Serves a board while the block runs, if the arguments ask for it; None if not.

    Raises:
      MetricsError: the port is taken or not allowed.
    """
    if args.serve_metrics is None:
        yield None
        return
    from kvcompress_jax.metrics.server import MetricsServer

    board = Board()
    try:
        server = MetricsServer(board, port=args.serve_metrics)
    except OSError as e:
        raise MetricsError(f"--serve-metrics {args.serve_metrics}: {e.strerror}") from None
    with server:
        print(f"metrics: {server.url}/metrics and {server.url}/stats.json", flush=True)
        yield board


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"expected 0 to 65535, got {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"expected 0.05 to 3600, got {text}")
    return value
