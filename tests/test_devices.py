"""Runs by two processes, end to end: the result of one, a kill that costs nothing, one line for what goes wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from commands import TINY_PICTURES, call, flags, pictures, pictures_run, table
from phyla import launch

pytestmark = [pytest.mark.filterwarnings("ignore::phyla.errors.PhylaWarning"),
              pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")]

CHILD = """
import os, signal
import phyla.training.loop as loop
loop.CHECKPOINT_SECONDS = 0
rank, number, stage, steps = os.environ.get("DIES", "- 0 - 0").split()
if rank == os.environ["RANK"]:
    real, seen = loop.Loop.watch, 0
    def watch(run, *arguments):
        global seen
        seen += run.name == stage
        if seen > int(steps):
            os.kill(os.getpid(), int(number))
        return real(run, *arguments)
    loop.Loop.watch = watch
from phyla.cli import main
main()
"""


@pytest.fixture
def noise_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a command, less its folder, on images that come out the same along two ways (see the fixture noise)."""
    for name in ("RANK", "WORLD_SIZE", launch.LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(launch, "_phyla", lambda: [sys.executable, "-c", CHILD])
    pixels = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "noise.npy", pixels)
    return ["cluster", tmp_path / "noise.npy", "--classes", "3", "--device", "cpu", *flags(**TINY_PICTURES)]


def files(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*")}


def check_alike(two: Path, one: Path) -> None:
    """Check that a run by two processes holds what that by one does: the same files, labels and losses."""
    assert files(two) == files(one)
    labels, wanted = ([row["cluster"] for row in table(run / "assignments.csv")] for run in (two, one))
    assert labels == wanted
    losses, wanted = ([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
                      for run in (two, one))
    assert losses == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("rank", "number", "then"), [
    (1, signal.SIGKILL, "2"), pytest.param(0, signal.SIGKILL, "1", marks=pytest.mark.slow),
    pytest.param(1, signal.SIGTERM, "3", marks=pytest.mark.slow)])
def test_a_killed_process_costs_nothing(noise_run, tmp_path, monkeypatch, capfd, rank, number, then) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    monkeypatch.setenv("DIES", f"{rank} {number.value} cluster 4")
    error = call(*noise_run, "--out", two, "--devices", "2").error(1)
    assert error.startswith(f"error: process {rank + 1} of 2 (rank {rank}) was killed (signal {number.value}); "
                            "the others were stopped. hint: give the same command again")
    assert "error" not in (said := capfd.readouterr().err) and "Traceback" not in said
    monkeypatch.delenv("DIES")
    said = call(*noise_run, "--out", two, "--devices", then)  # a checkpoint is of any number of processes
    assert said.code == 0 and "cluster goes on at step 4 of 6\n" in said.err + capfd.readouterr().err
    assert call(*noise_run, "--out", one).code == 0
    check_alike(two, one)
    assert call(*noise_run, "--out", two, "--json").out.count('"did_work": false') == 1  # whatever the number


@pytest.mark.slow
def test_torchrun_starts_the_processes(noise_run, tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "127.0.0.1:0", "-m", "phyla", *map(str, noise_run), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("run folder: ") == 1 and done.stdout == ""
    assert call(*noise_run, "--out", tmp_path / "one").code == 0
    check_alike(tmp_path / "two", tmp_path / "one")
    wrong = subprocess.run([*command, "--set", "cluster.lr=-1"], capture_output=True, text=True, timeout=300)
    assert wrong.returncode != 0 and wrong.stderr.count("error: cluster: lr must be above 0") == 1


@pytest.mark.slow
def test_a_mistake_is_told_once(noise_run, tmp_path, capfd) -> None:
    said = call(*noise_run, "--out", tmp_path / "run", "--devices", "2", "--set", "cluster.lr=-1")
    assert (said.code, said.err) == (2, "")  # the first process has told it
    assert capfd.readouterr().err == "error: cluster: lr must be above 0 and finite, got -1.0\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_pictures_are_decoded_once_and_labelled_together(noise_run, tmp_path, tmp_path_factory, capfd) -> None:
    photos = pictures(tmp_path / "photos")
    (photos / "broken.jpg").write_bytes(b"no picture")
    command = ["embed", photos, "--classes", "3", *flags(**TINY_PICTURES), "--out", tmp_path / "run", "--devices", "2"]
    assert call(*command).code == 0
    assert capfd.readouterr().err.count("broken.jpg") == 1
    assert len(list((tmp_path / "run" / "stages" / "images").glob("*.npy"))) == 1
    run, photos = pictures_run(tmp_path_factory, tmp_path / "finished")
    for out, more in (("one.csv", []), ("two.csv", ["--devices", "2"])):
        assert call("predict", run, photos, "--device", "cpu", "--out", tmp_path / out, *more).code == 0
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert capfd.readouterr().err == f"36 images labelled, 0 skipped: {tmp_path / 'two.csv'}\n"
    assert call("predict", run, photos, "--devices", "2").code == 2
    assert "shards need a file to become" in capfd.readouterr().err
