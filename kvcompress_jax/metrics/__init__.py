"""What a running cache does: `board` (the last figures), `prometheus` (their names), `server` (both
over HTTP), `top` (a live view in the terminal).

`prometheus` and `server` need the extra `serve` (prometheus-client), `top` needs rich.
"""
