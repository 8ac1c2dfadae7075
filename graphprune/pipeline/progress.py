"""Progress for a person: bars on a terminal, plain lines elsewhere, and everything in log.txt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


class Tick(Protocol):
    """Moves a task on."""

    def __call__(self, done: int, words: str = "", total: int | None = None) -> None:
        """Say how many steps are done now, in a few words, and how many there are if that is news."""


class Reporter:
    """Tells what is going on.

    Args:
        console: Where to; silent if None.
    """

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._log: TextIO | None = None

    @contextmanager
    def logging_to(self, path: Path) -> Iterator[None]:
        """Within the block, append every line to the file as well."""
        with path.open("a", encoding="utf-8") as log:
            self._log = log
            try:
                yield
            finally:
                self._log = None

    def say(self, line: str) -> None:
        """Tell one line."""
        if self._console:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        if self._log:
            self._log.write(f"{time.strftime('%H:%M:%S')} {line}\n")
            self._log.flush()

    @contextmanager
    def task(self, title: str, total: int | None = None) -> Iterator[Tick]:
        """Show a task while the block runs; the tick that it yields moves it on.

        Args:
            title: What is being done.
            total: How many steps it has; None if nobody knows.
        """
        if self._console and self._console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[words]}"),
            )
            with Progress(*columns, console=self._console, transient=True) as progress:
                bar = progress.add_task(title, total=total, words="")

                def move(done: int, words: str = "", total: int | None = None) -> None:
                    progress.update(bar, completed=done, words=words, total=total)

                yield move
        else:
            if total is None:
                self.say(f"    {title}")
            yield self._plain(title, total)

    def _plain(self, title: str, known: int | None) -> Tick:
        told = 0

        def tick(done: int, words: str = "", total: int | None = None) -> None:
            nonlocal told
            of = total or known or 5
            if done * 5 // of > told:
                told = done * 5 // of
                self.say(f"    {title} {done}/{of} {words}".rstrip())

        return tick
