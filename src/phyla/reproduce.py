"""Run a recipe over several seeds, a run folder each, and keep what each run scored as a result.

Every seed changes everything, the encoder too. Given again after a stop or a kill, it goes on where it was. Runs of
other recipes, changes and seeds below the same folder lend what they have made: an encoder, or a clustering, that would
come out the same is not made again.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from phyla.errors import InputError
from phyla.experiment import Experiment, clustered_protocol, selections
from phyla.pipeline import Pipeline, check_pipeline
from phyla.progress import track
from phyla.results import RunResult, Scored, check_alike, read_results, without_paths, write_result
from phyla.runner import Result, Runner
from phyla.storage import read_json
from phyla.training.device import Device
from phyla.types import Scores

log = logging.getLogger("phyla")


def reproduce(experiment: Experiment, seeds: Sequence[int], *, runs: Path, results: Path, device: Device,
              data_dir: Path | None = None, download: bool = True, command: Sequence[str] = ()) -> list[RunResult]:
    """Run what is not done yet of each seed, write a result for each, and return the results.

    Parameters
    ----------
    runs : each seed's run folder is ``runs``/RECIPE/seed-N; every change of a recipe goes on in the same one
    results : where NAME/seed-N.json is written
    data_dir, download, command : as the runner takes them

    Raises
    ------
    InputError
        ``results`` holds runs of the same name that differ in more than their seed, or an option cannot be; told before
        any work.
    """
    if device.group.size > 1:
        raise InputError("seeds are run by one process", "a run by several: phyla run RECIPE --seed N --devices 4")
    name = experiment.name
    for seed in seeds:
        check_pipeline(experiment.pipeline(seed))
    kept = read_results(results, [name]).get(name, [])
    for other in kept:
        if other.seed not in seeds:
            check_alike(_promised(experiment, seeds[0], device), other)
    made = []
    for seed in track(seeds, f"{name}, seeds", unit="seed"):
        pipeline, folder = experiment.pipeline(seed), runs / experiment.recipe / f"seed-{seed}"
        log.info("%s, seed %d, in %s", name, seed, folder)
        runner = Runner(pipeline, folder, device=device, data_dir=data_dir, download=download, command=command)
        runner.run.lenders = tuple(sorted(runs.glob("*/seed-*")))
        outcome = runner.go("evaluate")
        result = _result(experiment, seed, outcome, pipeline, device)
        log.info("result: %s", write_result(result, results))
        made.append(result)
    return made


def _promised(experiment: Experiment, seed: int, device: Device) -> RunResult:
    """Return the result that is to be made, without scores: to be compared with those there are."""
    return RunResult(
        name=experiment.name, recipe=experiment.recipe, ablation=experiment.ablation, protocol=experiment.protocol,
        selection=experiment.selection, overrides=experiment.changes, seed=seed, scores=(), seconds={}, devices={},
        precision=device.precision, machine="", versions={}, options=experiment.pipeline(seed).options())


def _result(experiment: Experiment, seed: int, outcome: Result, pipeline: Pipeline, device: Device) -> RunResult:
    told = read_json(outcome.path / "run.json")
    scores = tuple(_scored(row, pipeline) for row in outcome.scores)
    if not any("hungarian_accuracy" in row.values for row in scores):
        log.warning("no true labels of %s were found: the result has no accuracy", pipeline.data.source)
    return RunResult(
        name=experiment.name, recipe=experiment.recipe, ablation=experiment.ablation, protocol=experiment.protocol,
        selection=experiment.selection, overrides=tuple(map(_without_folder, experiment.changes)), seed=seed,
        scores=scores, seconds={name: stage["seconds"] for name, stage in told["stages"].items()},
        devices={name: stage["device"] for name, stage in told["stages"].items()}, precision=device.precision,
        machine=told["machine"], versions=told["versions"], options=without_paths(told["options"]))


def _scored(row: Scores, pipeline: Pipeline) -> Scored:
    held_out = row.split == pipeline.data.held_out
    method, _, oracle = row.method.partition(" (oracle")
    selection = "oracle" if oracle else selections(pipeline).get(method, "")
    return Scored(row.method, row.split, "train-test" if held_out else clustered_protocol(pipeline), selection,
                  row.n_images, dict(row.values))


def _without_folder(change: str) -> str:
    key, _, value = change.partition("=")
    return f"{key}={without_paths(value)}"
