"""`kvcompress top` on a process that serves figures."""

import pytest
from rich.console import Console

from kvcompress_jax.cli import main
from kvcompress_jax.metrics.board import Board
from kvcompress_jax.metrics.server import MetricsServer
from kvcompress_jax.metrics.top import fetch, view
from tests.metrics.figures import ENGINE, board


def run(capsys, *argv):
    """Exit code and what was printed to either stream."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err


def shown(figures, before=None):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view(figures, before))
    console.file.close()
    return console.export_text()


def test_once(capsys):
    """kvcompress top --once"""
    with MetricsServer(board(disk_budget_bytes=2**30, disk_bytes=2**20, disk_pages=7), port=0) as s:
        code, text, error = run(capsys, "top", "--once", "--url", s.url)
    assert (code, error) == (0, "")
    for part in (
        *("running", "250", "2.50x", "6.50", "promotions refused", "4.0 KiB", "1.00%", "10.00%"),
        *("in 7 files, of 1.0 GiB", "1.4 MiB"),
    ):
        assert part in text, part
    bars = {line.split()[0]: line.count("█") for line in text.splitlines() if "█" in line}
    assert bars["2"] > bars["1"] > bars["0"] > 0


def test_rates_come_from_two_looks():
    first = {"uptime_s": 10.0, "age_s": 0.5, "version": "x", "engine": ENGINE}
    first["stats"] = dict(board().last().stats)
    later = first | {
        "uptime_s": 12.0,
        "engine": ENGINE | {"generated_tokens": 270},
        "stats": first["stats"] | {"seals": 18},
    }
    text = shown(later, first)
    assert "10.0" in text  # 20 tokens in 2 seconds
    assert "+3" in text and "+3" not in shown(later)


def test_no_figures_yet(capsys):
    with MetricsServer(Board(), port=0) as server:
        assert "no figures yet" in run(capsys, "top", "--once", "--url", server.url)[1]
        assert fetch(server.url)["engine"] == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--url", "http://127.0.0.1:9"], "/stats.json: expected figures of kvcompress, got: "),
        (["--url", "file:///etc"], "file:///etc: expected an address that begins with http://"),
        (["--interval", "0"], "argument --interval: expected 0.05 to 3600, got 0"),
    ],
)
def test_mistakes(capsys, argv, message):
    code, _, error = run(capsys, "top", "--once", *argv)
    assert code == 2 and message in error and error.count("\n") == 1
