"""Long steps are shown by whoever installs a display, and by nobody else."""

from dataclasses import dataclass, field

import pytest

from phyla.progress import Bar, bar, shown_by, track


@dataclass
class Shown:
    """A bar that remembers."""

    description: str
    total: int | None
    unit: str
    done: int
    moves: list[tuple[int, str]] = field(default_factory=list)
    is_open: bool = True

    def advance(self, n: int = 1, note: str = "") -> None:
        assert self.is_open
        self.moves.append((n, note))
        self.done += n


@dataclass
class Recorder:
    """A display that remembers its bars."""

    bars: list[Shown] = field(default_factory=list)

    def start(self, description: str, total: int | None, unit: str, done: int) -> Bar:
        self.bars.append(Shown(description, total, unit, done))
        return self.bars[-1]

    def stop(self, bar: Bar) -> None:
        assert isinstance(bar, Shown)
        bar.is_open = False


def test_without_a_display_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("work", total=3) as shown:
        shown.advance()
        shown.advance(2, note="almost")
    assert list(track(range(3), "work")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_bar_goes_to_the_display_from_where_it_stands() -> None:
    display = Recorder()
    with shown_by(display), bar("pretrain", total=10, unit="step", done=4) as shown:
        shown.advance(2, note="loss 1.0")
        assert display.bars[0].is_open
    assert display.bars == [Shown("pretrain", 10, "step", 6, [(2, "loss 1.0")], is_open=False)]


def test_a_bar_without_a_description_is_silent() -> None:
    display = Recorder()
    with shown_by(display), bar("", total=10) as shown:
        shown.advance()
    assert display.bars == []


def test_a_bar_is_closed_when_its_work_fails() -> None:
    display = Recorder()
    with shown_by(display), pytest.raises(ZeroDivisionError), bar("work", total=1):
        raise ZeroDivisionError
    assert not display.bars[0].is_open


def test_displays_nest_and_end_with_their_block() -> None:
    outer, inner = Recorder(), Recorder()
    with shown_by(outer):
        with shown_by(inner), bar("a", total=1):
            pass
        with bar("b", total=1):
            pass
    with bar("c", total=1):
        pass
    assert [shown.description for shown in inner.bars] == ["a"]
    assert [shown.description for shown in outer.bars] == ["b"]


def test_a_display_ends_also_when_its_block_fails() -> None:
    display = Recorder()
    with pytest.raises(ZeroDivisionError), shown_by(display):
        raise ZeroDivisionError
    with bar("later", total=1):
        pass
    assert display.bars == []


def test_track_counts_each_item_once_its_work_is_done() -> None:
    display, done = Recorder(), []
    with shown_by(display):
        for item in track("abc", "letters", unit="letter"):
            done.append((item, display.bars[0].done))
    assert done == [("a", 0), ("b", 1), ("c", 2)]
    assert (display.bars[0].total, display.bars[0].unit, display.bars[0].done) == (3, "letter", 3)
    assert not display.bars[0].is_open


def test_track_takes_items_of_unknown_number() -> None:
    display = Recorder()
    with shown_by(display):
        assert list(track(iter("ab"), "some")) == ["a", "b"]
        assert list(track(iter("ab"), "some", total=2)) == ["a", "b"]
    assert [shown.total for shown in display.bars] == [None, 2]


def test_track_closes_its_bar_when_left_early() -> None:
    display = Recorder()
    with shown_by(display):
        items = track(range(9), "some")
        next(items)
        items.close()
    assert not display.bars[0].is_open
