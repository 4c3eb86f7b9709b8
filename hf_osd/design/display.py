"""What a design says on the terminal: progress while it works, and lines about what it found."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .history import Evaluation

if TYPE_CHECKING:
    from rich.console import Console


class Display:
    """
    Shows how far a design is: a bar on a terminal, and lines of figures everywhere.

    Args:
        console ([`~rich.console.Console`], *optional*): Where to print; nowhere if left out.
    """

    def __init__(self, console: "Console | None" = None) -> None:
        self._console = console

    def say(self, line: str) -> None:
        """Print a line, however long."""
        if self._console is not None:
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    @contextmanager
    def progress(self, label: str, total: float) -> Iterator[Callable[[float], object]]:
        """Show a bar while something is done; yields a function that takes how much is done by now."""
        if self._console is None or not self._console.is_terminal:
            yield lambda done: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(label, total=total)
            yield lambda done: progress.update(task, completed=done)

    def evaluation(self, name: str, found: Evaluation) -> None:
        """Print what a draft can do by now."""
        quality = found.quality
        self.say(
            f"{name}, minute {found.minutes:.1f}: {quality.agreement:.3f} of first tokens accepted, "
            f"{quality.accepted:.2f} of a chain of five"
        )
