"""A progress bar for work in stages."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def stages(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Shows a bar for each stage; yields a function of stage and share done.

    A stage that begins ends the one before. On something that is not a terminal nothing moves, and
    each stage is a line.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}
        current: list[TaskID] = []

        def report(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=1.0)
            task = tasks[stage]
            if current and current[0] != task:
                bar.update(current[0], completed=1.0)
                bar.stop_task(current[0])
            current[:] = [task]
            bar.update(task, completed=share)

        yield report
        if current:
            bar.update(current[0], completed=1.0)
