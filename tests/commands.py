"""phyla as its users run it: the command line in this process, options small enough for a test, and pictures."""

import csv
import io
import shutil
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from phyla.cli import main
from phyla.errors import PhylaWarning
from phyla.overrides import change
from phyla.pipeline import Pipeline
from phyla.recipes import recipe

SMALL = {"pretrain.encoder.width": "4", "pretrain.n_epochs": "1", "pretrain.batch_size": "20", "cluster.n_epochs": "2",
         "cluster.batch_size": "20", "refine.n_epochs": "1", "refine.batch_size": "20", "refine.threshold": "0.2",
         "refine.keep": "last", "evaluate.kmeans_restarts": "1"}
TINY_PICTURES = {"data.size": "16"} | {f"{stage}.views.size": "16" for stage in ("pretrain", "cluster", "refine")}
N_DIGITS, N_PICTURES = 60, 36
COLORS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


def flags(**more: object) -> list[str]:
    """Return the small options as --set flags; ``more`` has __ for the dot."""
    told = SMALL | {name.replace("__", "."): str(value) for name, value in more.items()}
    return [part for key, value in told.items() for part in ("--set", f"{key}={value}")]


def small(name: str = "scan-digits", **more: object) -> Pipeline:
    """Return a recipe with the small options, 60 images of it."""
    pipeline = recipe(name)
    told = SMALL | {"data.limit": str(N_DIGITS)} | {key.replace("__", "."): value for key, value in more.items()}
    for key, value in told.items():
        pipeline = change(pipeline, key, value)
    return pipeline


class Said(NamedTuple):
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str

    def error(self, code: int = 2) -> str:
        """Return the one line that says what went wrong; fail unless that is how the command ended."""
        assert self.code == code, self
        lines = self.err.splitlines()
        assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], self.err
        assert "Traceback" not in self.err
        return lines[-1]


def call(*args: object) -> Said:
    """Run a command in this process; phyla's own warnings are lines, anybody else's fail the test."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="", write_through=True) for _ in range(2))
    with (redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings(), pytest.raises(SystemExit) as ended,
          mock.patch.object(sys, "argv", ["phyla", *map(str, args)])):
        warnings.filterwarnings("always", category=PhylaWarning)
        main()
    return Said(int(ended.value.code or 0), *(stream.buffer.getvalue().decode() for stream in (out, err)))


def picture(path: Path, number: int, *, size: int = 20) -> None:
    """Write a noisy picture of one of three colors, and of stripes whose direction goes with the color."""
    pixels = np.random.default_rng(number).integers(0, 60, (size, size, 3)) + np.array(COLORS[number % 3])
    pixels[:: number % 3 + 2, :: (number % 3) ** 2 + 1] = 20
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def pictures(folder: Path, n: int = N_PICTURES) -> Path:
    """Write ``n`` JPEG files into three class folders, and return ``folder``."""
    for number in range(n):
        picture(folder / "abc"[number % 3] / f"{number:02d}.jpg", number)
    return folder


@cache
def _digits_run(folder: Path) -> Path:
    done = call("run", "scan-digits", "--limit", N_DIGITS, *flags(), "--out", folder / "digits-run")
    assert done.code == 0, done
    return folder / "digits-run"


@cache
def _pictures_run(folder: Path) -> Path:
    photos = pictures(folder / "photos")
    done = call("run", photos, "--classes", "3", *flags(**TINY_PICTURES), "--out", folder / "photos-run")
    assert done.code == 0, done
    return folder / "photos-run"


def digits_run(factory: pytest.TempPathFactory, folder: Path) -> Path:
    """Return a copy, in ``folder``, of a finished run on 60 digits that is made once a session."""
    return shutil.copytree(_digits_run(factory.getbasetemp()), folder / "run")


def pictures_run(factory: pytest.TempPathFactory, folder: Path) -> tuple[Path, Path]:
    """Return a finished run on a folder of JPEG files without labels, in ``folder``, and that folder: not to change."""
    made = _pictures_run(factory.getbasetemp())
    return shutil.copytree(made, folder / "run"), made.parent / "photos"


def table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def stage_files(run: Path) -> dict[str, bytes]:
    """Return every file that the stages of a run made and that says nothing about time: name to content."""
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in sorted(run.glob("stages/*/*"))
            if path.name != "done.json" and not path.parent.name.startswith("report-")}


def top_files(run: Path) -> dict[str, bytes]:
    """Return the files at the top of a run folder: name to content."""
    return {path.name: path.read_bytes() for path in sorted(run.iterdir()) if path.is_file()}
