"""What survives a kill, a full disk and a loss that is not finite: everything that was made, to the last bit."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from commands import N_DIGITS, call, digits_run, flags, small, stage_files
from phyla.errors import NonFiniteLossError, StorageError
from phyla.pipeline import STAGES
from phyla.runner import Runner

pytestmark = pytest.mark.filterwarnings("ignore::phyla.errors.PhylaWarning")

MADE = tuple(stage for stage in STAGES[1:] if stage not in ("count", "cut"))


@pytest.fixture
def run(tmp_path, tmp_path_factory):
    """Return a finished run that nothing has disturbed."""
    return digits_run(tmp_path_factory, tmp_path)


CHILD = """
import os, signal, sys
import phyla.training.loop as loop
loop.CHECKPOINT_SECONDS = 0
where, moment = sys.argv.pop(1), int(sys.argv.pop(1))
seen = 0

def die_at(name):
    global seen
    seen += name == where
    if seen > moment:
        os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, say):
    real = getattr(owner, name)
    def changed(*args, **options):
        die_at(say(*args))
        return real(*args, **options)
    setattr(owner, name, changed)

before(loop.Loop, "watch", lambda run, *_: run.name)
before(os, "fsync", lambda *_: "write")
from phyla.cli import main
main()
"""


def killed(where: str, moment: int, *command: object) -> None:
    """Run a command in a process that kills itself at the given step of a stage, or write, with a checkpoint a step."""
    done = subprocess.run([sys.executable, "-c", CHILD, where, str(moment), *map(str, command)], capture_output=True,
                          text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_run_goes_on_to_the_same_end(run, tmp_path):
    command = ["evaluate", "scan-digits", "--limit", N_DIGITS, *flags(), "--out", tmp_path / "killed"]
    killed("cluster", 4, *command)
    assert not (tmp_path / "killed" / "run.json").exists()
    said = call(*command)
    assert said.code == 0 and "cluster goes on at step 4 of 6" in said.err and "pretrain  unchanged, kept" in said.err
    assert stage_files(tmp_path / "killed") == stage_files(run)
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("moments", [
    [("pretrain", 0), ("pretrain", 1), ("cluster", 3), ("refine", 2)],
    [("write", n) for n in (1, 4, 7, 12, 20)],
])
def test_a_run_killed_again_and_again_goes_on_to_the_same_end(run, tmp_path, moments):
    command = ["evaluate", "scan-digits", "--limit", N_DIGITS, *flags(), "--out", tmp_path / "killed"]
    for where, moment in moments:
        killed(where, moment, *command)
    assert call(*command).code == 0
    assert stage_files(tmp_path / "killed") == stage_files(run)
    assert not list((tmp_path / "killed").rglob(".*.part"))


@pytest.mark.parametrize("stage", ["embed", "cluster", "refine"])
def test_a_full_disk_costs_only_the_stage_that_met_it(run, tmp_path, monkeypatch, stage):
    out, real = tmp_path / "full", os.fsync

    def full(descriptor):
        if list(out.glob(f"stages/{stage}-*")):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"no space left while writing .*free some space"):
            Runner(small(), out).go("evaluate")
        done = {path.parent.name.rsplit("-", 1)[0] for path in out.glob("stages/*/done.json")}
        assert done == set(MADE[: MADE.index(stage)]) and not list(out.rglob(".*.part"))
    Runner(small(), out).go("evaluate")
    assert stage_files(out) == stage_files(run)


@pytest.mark.parametrize(("stage", "loss"), [("pretrain", "phyla.pretrain.simclr.nt_xent"),
                                             ("cluster", "phyla.cluster.scan.scan_loss"),
                                             ("refine", "phyla.refine.selflabel.self_label_loss")])
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(run, tmp_path, monkeypatch, stage, loss):
    module, _, name = loss.rpartition(".")
    real, calls = getattr(sys.modules[module], name), []

    def broken(*args, **options):
        calls.append(name)
        found = real(*args, **options)
        if len(calls) < 2:
            return found
        if hasattr(found, "_replace"):
            return found._replace(total=found.total * torch.nan)
        return (found[0] * torch.nan, found[1]) if isinstance(found, tuple) else found * torch.nan

    out = tmp_path / "broken"
    with monkeypatch.context() as patched:
        patched.setattr(loss, broken)
        with pytest.raises(NonFiniteLossError, match=f"{stage}: the loss is not finite at step 1") as raised:
            Runner(small(), out).go("evaluate")
        assert raised.value.exit_code == 1 and f"--set {stage}.lr" in raised.value.hint
    done = {path.parent.name.rsplit("-", 1)[0] for path in out.glob("stages/*/done.json")}
    assert done == set(MADE[: MADE.index(stage)])
    Runner(small(), out).go("evaluate")
    assert stage_files(out) == stage_files(run)
