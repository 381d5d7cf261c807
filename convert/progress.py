"""The progress bar of a conversion."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def tensor_progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` tensors on stderr; yields the function that moves it on."""
    columns = (TextColumn("tensors"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("tensors", total=total)
        yield lambda tensors: progress.advance(task, tensors)
