"""What a person sees: lines where stderr is no terminal, bars where it is one, warnings alone when asked for quiet."""

import io
import logging
import re
import sys
import warnings
from time import sleep

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from phyla import display
from phyla.display import Bars, Lines, amount, clock, showing
from phyla.errors import PhylaWarning
from phyla.progress import bar, track

log = logging.getLogger("phyla")


class Terminal(io.StringIO):
    """Stands for a terminal as stderr."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that is told the time."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch):
    """Return the clock that the display looks at."""
    told = Clock()
    monkeypatch.setattr(display, "time", told)
    return told


# ── lines ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_long_step_tells_rate_and_time_left_now_and_then_and_how_long_it_took(time, capsys):
    with showing(quiet=False), bar("pretrain", total=100, unit="step") as shown:
        for second in range(1, 51):
            time.now += 1
            shown.advance(2, note=f"epoch {second}/50")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "pretrain: 20/100 steps in 10.0 s, 2.0/s, 40.0 s left, epoch 10/50"
    assert lines[3] == "pretrain: 80/100 steps in 40.0 s, 2.0/s, 10.0 s left, epoch 40/50"
    assert lines[-1] == "pretrain: 100/100 steps in 50.0 s, 2.0/s, epoch 50/50"
    assert len(lines) == 5  # the line at the end is the only one that tells all 100


def test_a_step_gone_on_with_counts_the_rate_of_its_own_work(time, capsys):
    with showing(quiet=False), bar("pretrain", total=100, unit="step", done=90) as shown:
        time.now += 10
        shown.advance(5)
    assert capsys.readouterr().err.splitlines()[0] == "pretrain: 95/100 steps in 10.0 s, 0.5/s, 10.0 s left"


def test_a_short_step_tells_nothing_and_one_without_an_end_no_time_left(time, capsys):
    with showing(quiet=False):
        assert list(track(range(5), "short", unit="method")) == list(range(5))
        with bar("endless", total=None, unit="images") as shown:
            time.now += 20
            shown.advance(7)
    assert capsys.readouterr().err.splitlines() == ["endless: 7 images in 20.0 s, 0.3/s"] * 2


def test_bytes_are_told_in_megabytes(time, capsys):
    with showing(quiet=False), bar("downloading x", total=170_000_000, unit="B", done=0) as shown:
        time.now += 10
        shown.advance(17_000_000)
    assert capsys.readouterr().err.splitlines()[0] == "downloading x: 17/170 MB in 10.0 s, 1.7/s, 1:30 min left"


@pytest.mark.parametrize(("unit", "shown"), [("image", (1, "images")), ("images", (1, "images")), ("B", (1e-6, "MB"))])
def test_units_are_plural_once(unit, shown):
    assert amount(unit) == shown


@pytest.mark.parametrize(("seconds", "said"), [(0.04, "0.0 s"), (4.24, "4.2 s"), (59.9, "59.9 s"), (60, "1:00 min"),
                                               (65.9, "1:05 min"), (3599, "59:59 min"), (7800, "2:10 h"),
                                               (100 * 3600, "100:00 h")])
def test_a_duration_reads_as_a_person_says_it(seconds, said):
    assert clock(seconds) == said


# ── messages ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_messages_are_lines_and_warnings_say_so(capsys):
    with showing(quiet=False), warnings.catch_warnings():
        warnings.simplefilter("always")
        log.info("hello")
        log.warning("skipped %r", "a\nb.jpg")
        warnings.warn("clusters became empty", PhylaWarning, stacklevel=1)
    said = capsys.readouterr()
    assert said.err == "hello\nwarning: skipped 'a\\nb.jpg'\nwarning: clusters became empty\n" and said.out == ""


def test_quiet_leaves_warnings_alone(time, capsys):
    with showing(quiet=True), warnings.catch_warnings():
        warnings.simplefilter("always")
        log.info("hello")
        log.warning("careful")
        warnings.warn("look", PhylaWarning, stacklevel=1)
        with bar("pretrain", total=3, unit="step") as shown:
            time.now += 100
            shown.advance(1)
    assert capsys.readouterr().err == "warning: careful\nwarning: look\n"


def test_silent_says_nothing(time, capsys):
    with showing(quiet=False, silent=True), warnings.catch_warnings():
        warnings.simplefilter("always")
        log.warning("a message")
        warnings.warn("a warning", PhylaWarning, stacklevel=1)
        with bar("pretrain", total=1, unit="step") as shown:
            time.now += 100
            shown.advance()
    assert capsys.readouterr() == ("", "")


def test_afterwards_all_is_as_before(capsys):
    level, handlers, shower = log.level, list(log.handlers), warnings.showwarning
    with pytest.raises(RuntimeError), showing(quiet=False):
        assert log.level == logging.INFO
        raise RuntimeError
    assert (log.level, log.handlers, warnings.showwarning) == (level, handlers, shower)
    log.warning("nobody listens")
    with bar("pretrain", total=1, unit="step") as shown:
        shown.advance()
    assert "pretrain" not in capsys.readouterr().err


# ── bars ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_terminal_gets_bars_with_rate_and_messages_above_them(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with showing(quiet=False), bar("pretrain", total=4, unit="step") as shown:
        for number in range(4):
            shown.advance(note=f"epoch {number}")
        sleep(0.3)  # bars are drawn ten times a second
        log.info("a message [with] brackets")
        log.warning("careful")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "a message [with] brackets" in text and "warning: careful" in text
    assert re.search(r"pretrain .*4/4.*steps/s.*left.*epoch 3", text)


def test_a_quiet_terminal_gets_no_bars(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with showing(quiet=True), bar("pretrain", total=4, unit="step") as shown:
        shown.advance()
        log.warning("careful")
    assert terminal.getvalue() == "warning: careful\n"


def test_bars_count_in_their_own_unit_and_go_when_they_end(time):
    progress = Progress(TextColumn("{task.fields[rate]}"), console=Console(file=io.StringIO(), width=80))
    bars = Bars(progress)
    shown = bars.start("downloading", 170_000_000, "B", 20_000_000)
    time.now += 10
    shown.advance(50_000_000, note="almost")
    task = progress.tasks[0]
    assert (task.total, task.completed, task.fields["rate"], task.fields["note"]) == (
        pytest.approx(170), pytest.approx(70), "5.0 MB/s", "almost")
    shown.advance(1)
    assert task.fields["note"] == "almost"
    endless = bars.start("walking", None, "image", 0)
    assert progress.tasks[1].total is None
    bars.stop(endless)
    bars.stop(shown)
    assert progress.tasks == []


def test_the_two_displays_open_and_close():
    with Lines().open():
        pass
    file = io.StringIO()
    with Bars(Progress(console=Console(file=file))).open():
        pass
