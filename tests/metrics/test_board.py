"""The board: what is read is what was published, and publishing costs little."""

from kvcompress_jax.metrics.board import STEP_SECONDS, Board


class Clock:
    """Goes on when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_figures_are_read_at_most_once_an_interval():
    clock = Clock()
    board = Board(interval_s=1.0, clock=clock)
    assert board.last() is None and board.age_s() is None
    reads = []

    def read():
        reads.append(clock.now)
        return {"seals": len(reads)}, {}

    for _ in range(25):
        board.step(0.2, read)
        clock.now += 0.2
    assert len(reads) == 5
    last = board.last()
    assert last.stats == {"seals": 5} and abs(board.age_s() - (clock.now - reads[-1])) < 1e-9
    assert abs(board.uptime_s() - 5.0) < 1e-9


def test_figures_that_cost_much_are_read_rarely():
    clock = Clock()
    board = Board(interval_s=1.0, clock=clock)
    reads = []

    def read():
        reads.append(clock.now)
        clock.now += 0.5
        return {}, {}

    for _ in range(1000):
        board.step(0.1, read)
        clock.now += 0.1
    cost = 0.5 * len(reads)
    assert len(reads) >= 2 and cost <= 0.011 * (clock.now - 100.0) + 0.5


def test_steps_are_counted_in_cumulative_buckets():
    board = Board(clock=Clock())
    for seconds in (0.0005, 0.003, 0.003, 60.0):
        board.step(seconds, lambda: ({}, {}))
    board.publish({}, {})
    last = board.last()
    bounds = dict(zip((*STEP_SECONDS, "all"), last.steps_at_most, strict=True))
    assert (bounds[0.001], bounds[0.0025], bounds[0.005], bounds[10.0]) == (1, 1, 3, 3)
    assert bounds["all"] == 4 and abs(last.step_seconds - 60.0065) < 1e-9
