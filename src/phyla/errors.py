"""Errors and warnings a user may meet: what was given, what is allowed, what to do."""


class PhylaError(Exception):
    """Say in one line what went wrong and, in ``hint``, what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message, self.hint = message, hint
        super().__init__(f"{message}. hint: {hint}" if hint else message)


class InputError(PhylaError, ValueError):
    """A value, file or combination of options that cannot be used: the user's to mend."""

    exit_code = 2


class DataNotFoundError(InputError, FileNotFoundError):
    """A data set, file or folder that is not where it was looked for."""


class CorruptFileError(PhylaError):
    """A file that exists but cannot be read as what it should be."""


class StorageError(PhylaError, OSError):
    """A file that cannot be written: full disk, no permission, read-only place."""

    def __str__(self) -> str:
        return f"{self.message}. hint: {self.hint}" if self.hint else self.message


class NonFiniteLossError(PhylaError, ArithmeticError):
    """A loss that became NaN or infinite; names the steps in which it did."""


class LostProcessError(PhylaError):
    """A process that trained together with this one, and has ended or cannot be reached."""


class ElsewhereError(PhylaError):
    """An error that another process of the group met, and tells; this one only ends with it."""

    def __init__(self, rank: int, exit_code: int) -> None:
        super().__init__(f"process {rank + 1} met an error", "see its message")
        self.exit_code = exit_code


class PhylaWarning(UserWarning):
    """Something worth knowing that did not stop the run."""


class CollapseWarning(PhylaWarning):
    """Clusters became empty, or all images fell into one."""


def closest(word: str, allowed: list[str]) -> str | None:
    """Return the allowed name that ``word`` is probably meant to be; None when none is like it."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, allowed, n=1, cutoff=0.5)), None)


def nearest(word: str, allowed: list[str]) -> str:
    """Return a hint that offers the nearest allowed name, or lists the allowed ones."""
    close = closest(word, allowed)
    return f"did you mean {close}?" if close is not None else "allowed: " + ", ".join(sorted(allowed))
