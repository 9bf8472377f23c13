"""What a person sees while phyla works: bars on a terminal, plain lines elsewhere, one line an error. All on stderr."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from phyla.progress import Bar, shown_by

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_SECONDS = 10.0
"""At most one progress line in this time when stderr is not a terminal."""


@contextmanager
def showing(*, quiet: bool, silent: bool = False) -> Iterator[None]:
    """Show progress and log messages on stderr inside this block; with ``quiet`` warnings and errors alone.

    ``silent`` shows nothing: of several processes that do the same, one talks.
    """
    quiet = quiet or silent
    logger = logging.getLogger("phyla")
    level = logger.level
    display: Bars | Lines = Lines()
    handler: logging.Handler = _LineHandler()
    if silent:
        handler = logging.NullHandler()
    elif sys.stderr.isatty() and not quiet:
        display, handler = _terminal()
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.captureWarnings(True)
    warned = logging.getLogger("py.warnings")
    warned.addHandler(handler)
    try:
        if quiet:
            yield
        else:
            with display.open(), shown_by(display):
                yield
    finally:
        warned.removeHandler(handler)
        logging.captureWarnings(False)
        logger.removeHandler(handler)
        logger.setLevel(level)


class _LineHandler(logging.Handler):
    """One line a message, without colour."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message to stderr."""
        sys.stderr.write(_text(record) + "\n")
        sys.stderr.flush()


def _text(record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.name == "py.warnings":  # "file:line: Category: text\n  source line"
        message = message.split("Warning: ", 1)[-1].split("\n")[0]
    return f"warning: {message}" if record.levelno >= logging.WARNING else message


class Lines:
    """Progress as plain lines: one when a step starts, one now and then, one when it ends."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Do nothing: lines need no preparation."""
        yield

    def start(self, description: str, total: int | None, unit: str, done: int) -> "Line":
        """Open a step."""
        return Line(description, total, unit, done)

    def stop(self, bar: Bar) -> None:
        """Write the last line of a step that showed any."""
        if isinstance(bar, Line):
            bar.finish()


class Line:
    """One step shown as lines."""

    def __init__(self, description: str, total: int | None, unit: str, done: int) -> None:
        self.description, self.total, self.unit, self.done, self.begun = description, total, unit, done, done
        self.started = self.told = time.monotonic()
        self.note = ""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Move on, and write a line when the last one is old."""
        self.done += n
        self.note = note or self.note
        now = time.monotonic()
        if now - self.told >= LINE_SECONDS and self.done != self.total:  # the last line is written by finish
            self.told = now
            self._write(now)

    def finish(self) -> None:
        """Write how long a step took that was long enough to tell."""
        now = time.monotonic()
        if now - self.started >= 1:
            self._write(now, ended=True)

    def _write(self, now: float, *, ended: bool = False) -> None:
        taken = now - self.started
        rate = (self.done - self.begun) / max(taken, 1e-9)
        scale, units = amount(self.unit)
        of = f"/{self.total * scale:.0f}" if self.total is not None else ""
        left = f", {clock((self.total - self.done) / rate)} left" if self.total and rate > 0 and not ended else ""
        note = f", {self.note}" if self.note else ""
        done = f"{self.done * scale:.0f}{of} {units}"
        told = f"{self.description}: {done} in {clock(taken)}, {rate * scale:.1f}/s{left}{note}"
        sys.stderr.write(told + "\n")
        sys.stderr.flush()


def amount(unit: str) -> tuple[float, str]:
    """Return by what to multiply a number of ``unit`` to show it, and the unit then: megabytes, or its plural."""
    if unit == "B":
        return 1e-6, "MB"
    return 1, unit if unit.endswith("s") else f"{unit}s"


def clock(seconds: float) -> str:
    """Return a duration as a person says it: 4.2 s, 1:05 min, 2:10 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} min"
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h"


def _terminal() -> tuple["Bars", logging.Handler]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False)
    progress = Progress(SpinnerColumn(), TextColumn("{task.description:<9}", markup=False), BarColumn(bar_width=28),
                        MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn(),
                        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
                        console=console, transient=True)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(_text(record), markup=False, soft_wrap=True)

    return Bars(progress), Handler()


class Bars:
    """Progress as live bars of the terminal."""

    def __init__(self, progress: "Progress") -> None:
        self.progress = progress

    @contextmanager
    def open(self) -> Iterator[None]:
        """Draw bars inside this block."""
        with self.progress:
            yield

    def start(self, description: str, total: int | None, unit: str, done: int) -> "LiveBar":
        """Open a bar."""
        return LiveBar(self.progress, description, total, unit, done)

    def stop(self, bar: Bar) -> None:
        """Take a bar away; what mattered is in the log lines."""
        if isinstance(bar, LiveBar):
            self.progress.remove_task(bar.task)


class LiveBar:
    """One bar on a terminal."""

    def __init__(self, progress: "Progress", description: str, total: int | None, unit: str, done: int) -> None:
        self.progress, self.done, self.begun, self.note = progress, done, done, ""
        self.started = time.monotonic()
        self.scale, self.units = amount(unit)
        self.task = progress.add_task(description, total=None if total is None else total * self.scale,
                                      completed=done * self.scale, rate="", note="")  # type: ignore[arg-type]

    def advance(self, n: int = 1, note: str = "") -> None:
        """Move on."""
        self.done += n
        rate = (self.done - self.begun) / max(time.monotonic() - self.started, 1e-9)
        self.note = note or self.note
        self.progress.update(self.task, completed=self.done * self.scale, note=self.note,
                             rate=f"{rate * self.scale:.1f} {self.units}/s")
