"""What one process of a group does before the others or for all of them, so that an error of one is an error of all.

Processes that train together wait for each other. One that ended with an error while the others went on to the next
exchange would leave them waiting, so after work that may fail the processes tell each other how it went.
"""

from collections.abc import Callable
from typing import TypeVar, cast

from phyla.errors import ElsewhereError, InputError
from phyla.training.group import Group

T = TypeVar("T")


def by_first(group: Group, work: Callable[[], T]) -> T:
    """Return what ``work`` gave the first process, on every process; the others only wait for it.

    Raises
    ------
    ElsewhereError
        On the others, when the first met an error, which it raises itself.
    """
    found = on_all(group, lambda: work() if group.is_first else None)
    return cast(T, group.share(found))


def first_then_others(group: Group, work: Callable[[], T]) -> T:
    """Return what ``work`` gives on each process; the others begin when the first is done, and find what it left."""
    if group.size == 1:
        return work()
    if group.is_first:
        found = on_all(group, work)
        on_all(group, lambda: None)
        return found
    on_all(group, lambda: None)
    return on_all(group, work)


def on_all(group: Group, work: Callable[[], T]) -> T:
    """Return what ``work`` gives on each process, when it went well on all; it may not exchange anything itself.

    Raises
    ------
    ElsewhereError
        A process of a lower number met an error, or this one met none; each process raises one.
    """
    if group.size == 1:
        return work()
    found, error = None, None
    try:
        found = work()
    except Exception as raised:
        error = raised
    codes = group.values(0 if error is None else getattr(error, "exit_code", 1))
    failed = [rank for rank, code in enumerate(codes) if code]
    if not failed:
        return cast(T, found)
    if error is not None and failed[0] == group.rank:
        raise error
    raise ElsewhereError(failed[0], codes[failed[0]])


def check_alike(group: Group, value: str, *, what: str) -> None:
    """Raise InputError unless every process holds the same ``value``; ``what`` says in words what it stands for."""
    held = group.values(value)
    others = [rank for rank in range(group.size) if held[rank] != held[0]]
    if others:
        raise InputError(f"process {others[0] + 1} of {group.size} has other {what} than the first",
                         "every process needs the same files and the same version of phyla")
