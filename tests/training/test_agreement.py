"""An error of one process is an error of all, told once; and the first one may work for the others."""

from pathlib import Path

import pytest

from phyla.errors import ElsewhereError, InputError
from phyla.training.agreement import by_first, check_alike, first_then_others, on_all
from phyla.training.group import ALONE, Group
from processes import Processes


def _fails(*ranks: int, rank: int) -> int:
    if rank in ranks:
        raise InputError(f"from {rank}")
    return rank


def _outcome(group: Group, name: str, ranks: tuple[int, ...]) -> tuple[str, object, int]:
    work = {"by_first": by_first, "first_then_others": first_then_others, "on_all": on_all}[name]
    try:
        return "fine", work(group, lambda: _fails(*ranks, rank=group.rank)), 0
    except InputError as error:
        return "told", str(error), error.exit_code
    except ElsewhereError as error:
        return "elsewhere", error.message, error.exit_code
    finally:
        group.wait()  # nobody is left behind in another exchange


@pytest.mark.parametrize(("name", "ranks", "wanted"), [
    ("by_first", (), [("fine", 0, 0), ("fine", 0, 0)]),
    ("by_first", (1,), [("fine", 0, 0), ("fine", 0, 0)]),
    ("by_first", (0,), [("told", "from 0", 2), ("elsewhere", "process 1 met an error", 2)]),
    ("on_all", (), [("fine", 0, 0), ("fine", 1, 0)]),
    ("on_all", (0, 1), [("told", "from 0", 2), ("elsewhere", "process 1 met an error", 2)]),
    ("on_all", (1,), [("elsewhere", "process 2 met an error", 2), ("told", "from 1", 2)]),
    ("first_then_others", (), [("fine", 0, 0), ("fine", 1, 0)]),
    ("first_then_others", (0, 1), [("told", "from 0", 2), ("elsewhere", "process 1 met an error", 2)]),
    ("first_then_others", (1,), [("elsewhere", "process 2 met an error", 2), ("told", "from 1", 2)]),
])
def test_all_end_alike(processes: Processes, name: str, ranks: tuple[int, ...], wanted: list[object]) -> None:
    assert processes.run(_outcome, name, ranks) == wanted


def _left(group: Group, folder: Path) -> bool:
    def work() -> bool:
        found = (folder / "kept").exists()
        (folder / "kept").touch()
        return found

    return first_then_others(group, work)


def test_the_others_find_what_the_first_left(processes: Processes, tmp_path: Path) -> None:
    assert processes.run(_left, tmp_path) == [False, True]


def _alike(group: Group, values: tuple[str, ...]) -> str:
    try:
        check_alike(group, values[group.rank], what="images")
    except InputError as error:
        return error.message
    return ""


def test_what_differs_is_told_everywhere(processes: Processes) -> None:
    assert processes.run(_alike, ("a", "a")) == ["", ""]
    assert processes.run(_alike, ("a", "b")) == ["process 2 of 2 has other images than the first"] * 2


def _bug(group: Group) -> str:
    try:
        on_all(group, lambda: 1 // group.rank)
    except (ZeroDivisionError, ElsewhereError) as error:
        return type(error).__name__
    return ""


def test_an_error_that_is_not_ours_is_one_of_all(processes: Processes) -> None:
    assert processes.run(_bug) == ["ZeroDivisionError", "ElsewhereError"]


@pytest.mark.parametrize("work", [by_first, first_then_others, on_all])
def test_one_process_only_works(work) -> None:
    assert work(ALONE, lambda: 5) == 5
    with pytest.raises(InputError):
        work(ALONE, lambda: _fails(0, rank=0))
