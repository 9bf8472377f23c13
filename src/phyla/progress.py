"""Progress of long steps, shown by whoever runs the program and silent in a library.

A long step opens a bar; the command line installs a display. Nothing here prints.
"""

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@runtime_checkable
class Bar(Protocol):
    """One long step being shown."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Move on by ``n`` units; ``note`` replaces the short text beside the bar."""


@runtime_checkable
class Display(Protocol):
    """Something that shows bars: a terminal, a log file, a notebook."""

    def start(self, description: str, total: int | None, unit: str, done: int) -> Bar:
        """Open a bar that stands at ``done`` of ``total`` units."""

    def stop(self, bar: Bar) -> None:
        """Close a bar; it is not advanced again."""


class _Silent:
    def advance(self, n: int = 1, note: str = "") -> None:
        pass


_display: ContextVar[Display | None] = ContextVar("phyla_display", default=None)


@contextmanager
def shown_by(display: Display | None) -> Iterator[None]:
    """Show every bar opened inside this block on ``display``; None shows none."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


@contextmanager
def bar(description: str, *, total: int | None, unit: str = "it", done: int = 0) -> Iterator[Bar]:
    """Open a bar for a long step; silent when no display is installed, or without a description."""
    display = _display.get()
    if display is None or not description:
        yield _Silent()
        return
    opened = display.start(description, total, unit, done)
    try:
        yield opened
    finally:
        display.stop(opened)


def track(items: Iterable[T], description: str, *, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield the items of ``items``, advancing a bar by one after each."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar(description, total=total, unit=unit) as shown:
        for item in items:
            yield item
            shown.advance()
