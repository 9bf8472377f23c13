"""What a run folder says it was: the pipeline whose result it shows, and where its true labels were from."""

from pathlib import Path

from phyla.errors import InputError
from phyla.overrides import from_options
from phyla.pipeline import Pipeline
from phyla.rundir import OPTIONS
from phyla.storage import read_json


def recorded_pipeline(run: Path) -> Pipeline:
    """Return the pipeline whose result a run folder shows; of one that shows none yet, as it was last given."""
    return recorded(run)[0]


def recorded_labels(run: Path) -> str | None:
    """Return where the true labels of ``recorded_pipeline`` are from; None for none."""
    return recorded(run)[1]


def recorded(run: Path) -> tuple[Pipeline, str | None]:
    """Return both; InputError where there is no run, or one that this version cannot read."""
    if not (run / OPTIONS).exists():
        raise InputError(f"{run} is not a run folder", "give the folder of a run, such as runs/scan-digits")
    shown = run / "run.json"  # a later command that failed must not change what the folder is
    held = read_json(shown if shown.exists() else run / OPTIONS)
    try:
        return from_options(held["options"]), held["labels"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{run} is not of this version of phyla ({error})",
                         "give the recipe again") from error
