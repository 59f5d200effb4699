"""`kvcompress top`: what a running process does, live in the terminal."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvcompress_jax.metrics.commands import MetricsError

TIMEOUT_SECONDS = 5.0
MOST_BYTES = 1 << 22
BAR = 30


def watch(url: str, *, interval_s: float, once: bool) -> None:
    """Shows figures until it is interrupted, or once."""
    console = Console()
    figures = fetch(url)
    if once:
        console.print(view(figures, None))
        return
    with Live(view(figures, None), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            before, figures = figures, fetch(url)
            live.update(view(figures, before), refresh=True)


def fetch(url: str) -> dict[str, Any]:
    """Figures of a running process.

    Raises:
      MetricsError: there is none, or it says something else.
    """
    address = f"{url.rstrip('/')}/stats.json"
    if not address.startswith(("http://", "https://")):
        raise MetricsError(f"{url}: expected an address that begins with http://")
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
            figures = json.loads(answer.read(MOST_BYTES))
        if not isinstance(figures, dict) or not {"stats", "engine", "age_s"} <= set(figures):
            raise ValueError("something else")
    except (OSError, http.client.HTTPException, ValueError) as e:
        reason = e.reason if isinstance(e, urllib.error.URLError) else e
        raise MetricsError(f"{address}: expected figures of kvcompress, got: {reason}") from None
    return figures


def view(figures: Mapping[str, Any], before: Mapping[str, Any] | None) -> RenderableType:
    """All that is shown.

    Args:
      figures: of now.
      before: of a moment ago, for rates; None: totals alone.
    """
    stats, engine = figures["stats"], figures["engine"]
    if not stats:
        return Text("kvcompress: no figures yet")
    head = (
        f"kvcompress {figures['version']}, up {figures['uptime_s']:.0f} s,"
        f" figures {figures['age_s']:.1f} s old"
    )
    tables = [_pages(stats), _bytes(stats), _events(stats, before and before["stats"])]
    if engine:
        tables.insert(0, _engine(figures, before))
    if stats.get("telemetry_samples"):
        tables.append(_quality(stats))
    return Group(Text(head, style="bold"), *tables)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _engine(figures: Mapping[str, Any], before: Mapping[str, Any] | None) -> Table:
    engine = figures["engine"]
    table = _table("requests", "running", "waiting", "preempted", "tokens generated", "per second")
    table.add_row(
        *(str(engine.get(f"requests_{what}", 0)) for what in ("running", "waiting", "preempted")),
        f"{engine.get('generated_tokens', 0):,}",
        _rate(figures, before),
    )
    return table


def _rate(figures: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """Generated tokens per second between two snapshots."""
    if before is None or not before["engine"]:
        return "-"
    now, then = (f["uptime_s"] - f["age_s"] for f in (figures, before))
    made = figures["engine"]["generated_tokens"] - before["engine"]["generated_tokens"]
    return f"{made / (now - then):,.1f}" if now - then > 1e-3 and made >= 0 else "-"


def _pages(stats: Mapping[str, Any]) -> Table:
    table = _table("pages", "level", "pages", "")
    counts = [stats.get(f"pages_level_{level}", 0) for level in range(4)]
    for level, count in enumerate(counts):
        bar = "█" * round(BAR * count / max(sum(counts), 1))
        table.add_row(str(level), f"{count:,}", Text(bar.ljust(BAR), style="cyan"))
    return table


def _bytes(stats: Mapping[str, Any]) -> Table:
    table = _table("memory", "", "", "")
    bits = stats.get("effective_bits")
    table.add_row(
        "device", _size(stats["allocated_bytes"]), f"in use of {_size(stats['pool_bytes'])}"
    )
    table.add_row(
        "saved",
        _size(stats["memory_saved_mb"] * 1e6),
        f"of {_size(stats['uncompressed_bytes'])} uncompressed,"
        f" {stats['avg_compression_ratio']:.2f}x",
    )
    table.add_row("bits", "-" if bits is None else f"{bits:.2f}", "per value of sealed pages")
    table.add_row("host", _size(stats.get("host_bytes", 0)), "left the device")
    if stats.get("disk_budget_bytes"):
        table.add_row(
            "disk",
            _size(stats["disk_bytes"]),
            f"in {stats['disk_pages']:,} files, of {_size(stats['disk_budget_bytes'])}",
        )
    return table


_EVENTS = {
    "seals": "sealed",
    "promotions": "promoted",
    "demotions": "demoted",
    "refusals": "promotions refused",
    "prefix_hits": "prefix hits",
    "preemptions": "preemptions",
    "disk_hits": "disk hits",
    "disk_misses": "disk misses",
    "disk_errors": "disk errors",
}


def _events(stats: Mapping[str, Any], before: Mapping[str, Any] | None) -> Table:
    table = _table("events", "", "so far", "since the last look")
    for field, label in _EVENTS.items():
        if field in stats:
            change = f"+{stats[field] - before[field]:,}" if before and field in before else "-"
            table.add_row(label, f"{stats[field]:,}", change)
    return table


def _quality(stats: Mapping[str, Any]) -> Table:
    table = _table("error of the attention output, measured", "samples", "mean", "largest")
    table.add_row(
        f"{stats['telemetry_samples']:,}",
        f"{stats['telemetry_output_error_mean']:.2%}",
        f"{stats['telemetry_output_error_max']:.2%}",
    )
    return table


def _size(count: float) -> str:
    """Bytes for people."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
