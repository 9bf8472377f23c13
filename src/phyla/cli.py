"""The command line: one verb per box of the pipeline, and `run` for the whole chain.

Data goes to stdout, talk and progress to stderr. Exit code 0: done; 2: the user can mend it; 1: something failed.
Heavy imports happen inside the verbs, so that `phyla --help` answers at once.
"""

import io
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import phyla
from phyla import launch

if TYPE_CHECKING:
    from phyla.runner import Result
    from phyla.types import Scores

app = typer.Typer(name="phyla", no_args_is_help=True, add_completion=False, rich_markup_mode=None,
                  pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
                  help="Find the classes in images that nobody has labelled.\n\n"
                       "phyla run                        the demonstration: digits\n\n"
                       "phyla run FOLDER --classes 10    your own images\n\n"
                       "phyla predict RUN FOLDER         label new images with a finished run")

What = Annotated[str, typer.Argument(metavar="RECIPE|FOLDER|RUN", help="a recipe, a folder or list of images, or a run "
                                                                       "folder to go on with")]
FolderRecipe = Annotated[str | None, typer.Option("--recipe", metavar="NAME", show_default=False,
                                                  help="for a folder: frozen-folder (default for photographs), "
                                                       "scan-folder or superand-folder")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="run folder; default runs/NAME", show_default=False)]
Classes = Annotated[str | None, typer.Option("--classes", "-k", metavar="K|auto|LOW-HIGH", show_default=False,
                                             help="how many classes to look for: a number, auto to have it estimated, "
                                                  "or bounds for that, as in 5-50")]
Seed = Annotated[int | None, typer.Option(help="seed of everything random", show_default=False)]
Limit = Annotated[int | None, typer.Option(help="use at most this many images, spread evenly", show_default=False)]
Size = Annotated[int | None, typer.Option(help="side of the images in pixels: stored and seen at this size",
                                         show_default=False)]
Encoder = Annotated[str | None, typer.Option(metavar="NAME|FILE", show_default=False, help="frozen encoders by name "
                                             "(`phyla list encoders`), several with commas between; a file of weights; "
                                             "or a published checkpoint (.pth.tar)")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="STAGE.OPTION=VALUE", show_default=False,
                                               help="change an option, as in cluster.entropy_weight=2; repeatable")]
DataDir = Annotated[Path | None, typer.Option("--data", help="where data sets are (else $PHYLA_DATA, else a cache)",
                                              show_default=False)]
Labels = Annotated[str | None, typer.Option(metavar="auto|folders|none|CSV", help="true labels, for scores alone: the "
                                            "data set's own, the name of each image's first folder, or a table")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16")]
Devices = Annotated[int | None, typer.Option(min=1, show_default=False, help="how many processes share the work, each "
                                             "on a GPU of its own, or all on the CPU")]
EngineName = Annotated[str, typer.Option("--engine", help="auto, eager, graph (CUDA: a step is recorded once and "
                                         "replayed), compiled (besides, the network is compiled)")]
BatchNorm = Annotated[str, typer.Option("--batchnorm", metavar="synced|local", help="with several processes: "
                                        "statistics of the whole batch, or of each process's part of it")]
Fast = Annotated[bool, typer.Option("--fast", help="one pass through the network where the published code takes two, "
                                    "none where it uses nothing of it")]
Least = Annotated[float | None, typer.Option("--min-confidence", min=0, max=1, show_default=False, help="put images "
                                             "below this confidence into no cluster of the tables: -1")]
Strict = Annotated[bool, typer.Option("--strict", help="stop at the first unreadable image instead of skipping it")]
Offline = Annotated[bool, typer.Option("--offline", help="never download anything")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, warnings and errors alone")]
AsJson = Annotated[bool, typer.Option("--json", help="print the outcome as JSON")]


def _verb(name: str, until: str, text: str) -> None:
    """Register a verb that carries the chain as far as the stage ``until``."""

    def verb(what: What = "scan-digits", recipe: FolderRecipe = None, out: Out = None, classes: Classes = None,
             seed: Seed = None, limit: Limit = None, size: Size = None, encoder: Encoder = None, option: Set = None,
             data: DataDir = None, labels: Labels = None, device: DeviceName = "auto",
             precision: Precision = "auto", devices: Devices = None, engine: EngineName = "auto",
             batchnorm: BatchNorm = "synced", fast: Fast = False, min_confidence: Least = None,
             strict: Strict = False, offline: Offline = False,
             quiet: Quiet = False, as_json: AsJson = False) -> None:
        from phyla.display import showing

        _launched(devices)
        with showing(quiet=quiet, silent=launch.rank() > 0):
            from phyla.asked import resolve
            from phyla.runner import Runner
            from phyla.training.agreement import on_all

            chosen = launch.joined(device, precision, engine=engine, batchnorm=batchnorm)
            asked = on_all(chosen.group, lambda: resolve(
                what, out, folder_recipe=recipe, classes=classes, seed=seed, limit=limit, size=size, encoder=encoder,
                fast=fast, least=min_confidence, changes=option or [], refining=until == "robust",
                alone=chosen.group.size == 1 and chosen.engine == "eager"))
            runner = Runner(asked.pipeline, asked.folder, device=chosen, data_dir=data,
                            labels=asked.labels if labels is None else labels, strict=strict, download=not offline,
                            command=["phyla", *sys.argv[1:]])
            result = runner.go(until)  # type: ignore[arg-type]
        if launch.rank() == 0:
            _show(result, as_json=as_json, quiet=quiet, whole=until == "report")

    app.command(name, help=text)(verb)


_verb("run", "report", "Run the whole chain, from images to report.\n\n"
      "Without an argument: the demonstration on scikit-learn's digits. Give the same command again after a stop or a "
      "kill, and it goes on where it was; stages whose options did not change are kept.")
_verb("pretrain", "pretrain", "Run the chain as far as the trained encoder.")
_verb("embed", "embed", "Run the chain as far as the embeddings.")
_verb("neighbors", "neighbors", "Run the chain as far as the neighbors.")
_verb("cluster", "cluster", "Run the chain as far as the clusters.")
_verb("refine", "robust", "Run the chain as far as the refined clusters.")
_verb("evaluate", "evaluate", "Run the chain as far as the scores.")


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run")], data: DataDir = None,
           labels: Labels = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Rebuild the report of a run.

    report.html and its figures are made anew from what the run already holds; nothing is trained.
    """
    from phyla.display import showing

    with showing(quiet=quiet):
        from phyla.runner import reopen

        result = reopen(run, data_dir=data, labels=labels).rebuild_report()
    _show(result, as_json=as_json, quiet=quiet, whole=True)


@app.command()
def predict(run: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a finished run")],
            images: Annotated[Path, typer.Argument(metavar="FOLDER|LIST|FILE", help="images to label")],
            out: Annotated[Path | None, typer.Option("--out", "-o", help="a .csv, .tsv or .parquet file; else CSV on "
                                                     "stdout", show_default=False)] = None,
            embeddings: Annotated[Path | None, typer.Option(help="a .npy file for what the classifier's head sees of "
                                                            "each image", show_default=False)] = None,
            shard: Annotated[str | None, typer.Option(metavar="I/N", help="do the I-th of N parts of the work; the "
                                                      "last to end writes the file", show_default=False)] = None,
            min_confidence: Annotated[float, typer.Option(min=0, max=1, help="put images below this confidence into "
                                                          "no cluster: -1")] = 0.0,
            device: DeviceName = "auto", precision: Precision = "auto", devices: Devices = None, strict: Strict = False,
            quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Label new images with a run's classifier.

    Gives a table: id, cluster, confidence, and the next two clusters with their probabilities. Give the same command
    again after a stop or a kill, and what was done is kept.
    """
    from phyla.display import showing

    _launched(devices)
    with showing(quiet=quiet, silent=launch.rank() > 0):
        from phyla.classifier import Classifier
        from phyla.labelling import share_from
        from phyla.prediction import predict_table

        chosen, share = launch.joined(device, precision), share_from(shard) if shard else None
        outcome = predict_table(Classifier.load(run), images, out, embeddings=embeddings, device=chosen, strict=strict,
                                as_json=as_json, share=share, min_confidence=min_confidence)
    if launch.rank() > 0:
        return
    if as_json and (out or embeddings):
        print(json.dumps(outcome))
    elif not quiet and outcome["labelled"] is not None and (out or embeddings):
        _say(f"{outcome['labelled']} images labelled, {outcome['skipped']} skipped: {out or embeddings}")


@app.command()
def export(run: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a finished run")],
           onnx: Annotated[Path | None, typer.Option(help="write the classifier as an .onnx file: pixels in, "
                                                     "probabilities out, without torch", show_default=False)] = None,
           parquet: Annotated[Path | None, typer.Option(help="write a .parquet table of the images, for DuckDB, "
                                                        "FiftyOne and Embedding Atlas", show_default=False)] = None,
           embeddings: Annotated[bool, typer.Option("--embeddings", help="with --parquet: embeddings, too")] = False,
           folders: Annotated[Path | None, typer.Option(help="write the images into one folder a cluster, below this "
                                                        "one", show_default=False)] = None,
           min_confidence: Annotated[float, typer.Option(help="with --folders: leave images below this confidence in "
                                                         "'unsure'")] = 0.0,
           link: Annotated[bool, typer.Option("--link", help="with --folders: make links instead of copies")] = False,
           quiet: Quiet = False) -> None:
    """Ship a run's result: an ONNX classifier, a Parquet table, a folder a cluster; any of them at once."""
    from phyla.display import showing

    with showing(quiet=quiet):
        from phyla.exports import export_run

        told = export_run(run, onnx=onnx, parquet=parquet, embeddings=embeddings, folders=folders,
                          min_confidence=min_confidence, link=link)
    for line in () if quiet else told:
        _say(line)


@app.command()
def cut(run: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a finished run")],
        classes: Annotated[int, typer.Option("--classes", "-k", min=1, help="how many classes the result is to have")],
        data: DataDir = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Merge or split the classes of a run, without fitting anything again.

    The tables, the classifier and the report are then of so many classes; the number the run was made with brings the
    first result back.
    """
    from phyla.display import showing

    with showing(quiet=quiet):
        from phyla.overrides import with_cut
        from phyla.recorded import recorded
        from phyla.runner import Runner

        pipeline, labels = recorded(run)
        result = Runner(with_cut(pipeline, classes), run, data_dir=data, labels=labels, download=False,
                        command=["phyla", *sys.argv[1:]]).go()
    _show(result, as_json=as_json, quiet=quiet, whole=True)


@app.command()
def reproduce(recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="a recipe (`phyla list recipes`)")] = "",
              seeds: Annotated[str, typer.Option(metavar="N|LIST", help="5: the seeds 0 to 4; 0,3,7: these")] = "5",
              ablation: Annotated[str, typer.Option(metavar="NAME", help="a named change of the recipe")] = "",
              protocol: Annotated[str, typer.Option(metavar="train-test|train+test|on-train", help="which images are "
                                                    "clustered and which scored; else the recipe's")] = "",
              selection: Annotated[str, typer.Option(metavar="last|label-free", help="what chooses the epoch; else "
                                                     "the recipe's")] = "",
              option: Set = None, data: DataDir = None,
              name: Annotated[str, typer.Option(help="what the results are called; else made of the parts")] = "",
              out: Annotated[Path, typer.Option("--out", "-o", help="folder of the run folders")] = Path("runs"),
              results: Annotated[Path, typer.Option(help="folder of the results")] = Path("results"),
              device: DeviceName = "auto", precision: Precision = "auto", engine: EngineName = "auto",
              table: Annotated[bool, typer.Option("--table", help="run nothing: write the tables of README.md and "
                                                  "docs/ from the results")] = False,
              offline: Offline = False, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Run a recipe over several seeds, and hold mean and spread against the published number.

    Each seed changes everything, the encoder too. Give the same command again after a stop or a kill, and it goes on
    where it was. Each run leaves a small file in results/, from which tables are made.
    """
    from phyla.display import showing

    if table or not recipe:
        return _tables(results, recipe, asked=table)
    with showing(quiet=quiet):
        from phyla.experiment import Experiment, seeds_of
        from phyla.reproduce import reproduce
        from phyla.standings import standing_facts, standing_lines

        asked = Experiment(recipe, ablation=ablation, protocol=protocol, selection=selection,
                           changes=tuple(option or ()), called=name)
        made = reproduce(asked, seeds_of(seeds), runs=out, results=results,
                         device=launch.joined(device, precision, engine=engine), data_dir=data, download=not offline,
                         command=["phyla", *sys.argv[1:]])
    print(_json(standing_facts(asked, made)) if as_json else "\n".join(standing_lines(asked, made)))
    return None


def _tables(results: Path, recipe: str, *, asked: bool) -> None:
    """Write the tables of the repository from its results, and print the pages that changed."""
    from phyla.errors import InputError
    from phyla.resulttables import write_tables

    if recipe or not asked:
        raise InputError(f"--table writes every table, and takes no recipe: {recipe}" if recipe else
                         "which recipe to reproduce is not said", "phyla reproduce scan-cifar10 --seeds 5, or --table")
    for page in write_tables(results):
        print(page)


class Listed(StrEnum):
    """What `phyla list` can list."""

    all = "all"
    recipes = "recipes"
    methods = "methods"
    encoders = "encoders"
    checkpoints = "checkpoints"
    data = "data"


@app.command("list")
def list_(what: Annotated[Listed, typer.Argument(help="which list")] = Listed.all, data: DataDir = None,
          as_json: AsJson = False) -> None:
    """List recipes, methods, encoders, public checkpoint files, data sets found."""
    from phyla.inventory import inventory, inventory_text

    found = inventory(data)
    shown = found if what is Listed.all else {what.value: found[what.value]}
    print(_json(shown) if as_json else inventory_text(shown))


@app.command()
def show(run: Annotated[Path, typer.Argument(metavar="RUN|RECIPE", help="a run folder, or a recipe")],
         as_json: AsJson = False) -> None:
    """Show what a run was, or a recipe's options."""
    from phyla.inventory import recipe_text, run_facts, run_text

    if (run / "options.json").exists():
        facts = run_facts(run)
        print(_json(facts) if as_json else run_text(facts))
        return
    from phyla.errors import InputError
    from phyla.recipes import recipe

    if run.exists():
        raise InputError(f"{run} is not a run folder", "give one, such as runs/scan-digits, or a recipe")
    pipeline = recipe(str(run))
    print(_json(pipeline.options()) if as_json else recipe_text(str(run), pipeline))


@app.command("import")
def import_(checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="a published .pth.tar or .t7 "
                                                            "file")],
            out: Annotated[Path, typer.Option("--out", "-o", help="folder for the run, classifier or encoder")],
            as_: Annotated[str | None, typer.Option("--as", metavar="RECIPE", show_default=False, help="make a run "
                                                    "folder of this recipe, with the file as its result")] = None,
            encoder: Annotated[Path | None, typer.Option(metavar="FILE", show_default=False, help="with --as: "
                                                         "embeddings and neighbors from this file's encoder")] = None,
            stem: Annotated[str | None, typer.Option(help="cifar or stl: SCAN's files do not tell, a recipe does",
                                                     show_default=False)] = None,
            head: Annotated[int | None, typer.Option(help="which cluster head, from 0: TSUC's files do not tell",
                                                     show_default=False)] = None,
            quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Take in a published checkpoint (SCAN, NNM, RUC, SimCLR, MoCo, Super-AND, TSUC): `phyla list checkpoints`.

    With --as it becomes a run folder for `evaluate`, `predict`, `refine` and `report`; else a classifier or encoder.
    """
    from phyla.display import showing

    with showing(quiet=quiet):
        from phyla.importing import import_checkpoint, import_run

        facts = (import_run(checkpoint, as_, out, encoder=encoder, head=head, stem=stem) if as_ is not None else
                 import_checkpoint(checkpoint, out, stem, head=head))
    print(_json(facts) if as_json else "\n".join(f"{name}: {value}" for name, value in facts.items()))


def _launched(devices: int | None) -> None:
    """Start the command as so many processes and end with them; go on here when this is one of them."""
    if launch.wants_launch(devices):
        sys.exit(launch.launch(sys.argv[1:], devices or 1))


def _show(result: "Result", *, as_json: bool, quiet: bool, whole: bool) -> None:
    if as_json:
        print(_json({"run": str(result.path), "did_work": result.did_work, "n_images": result.n_images,
                     "notices": list(result.notices),
                     "scores": [{"method": row.method, "split": row.split, "n_images": row.n_images, **row.values}
                                for row in result.scores]}))
        return
    if result.scores:
        print(_table(result.scores))
    if quiet:
        return
    for notice in result.notices:
        _say(notice)
    _say(f"report: {result.path / 'report.html'}" if whole else f"run folder: {result.path}")


def _table(rows: Sequence["Scores"]) -> str:
    """Return the table of a run as text: the field's metrics where labels exist, else what is known without."""
    labelled = {"hungarian_accuracy": "Hungarian accuracy", "nmi": "NMI", "ari": "ARI"}
    unlabelled = {"neighbor_agreement": "neighbor agreement", "mean_confidence": "mean confidence",
                  "used_clusters": "clusters used"}
    columns = labelled if any("hungarian_accuracy" in row.values for row in rows) else unlabelled
    shown = [row for row in rows if any(name in row.values for name in columns)]
    lines = [["method", "split", "images", *columns.values()]]
    for row in shown:
        cells = [_number(name, row.values[name]) if name in row.values else "-" for name in columns]
        lines.append([row.method, row.split, str(row.n_images), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) if column < 2 else cell.rjust(width)
                      for column, (cell, width) in enumerate(zip(line, widths, strict=True))) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _number(name: str, x: float) -> str:
    return f"{x:.0f}" if name.endswith("clusters") and float(x).is_integer() else f"{x:.3f}"


def _json(value: object) -> str:
    """Return JSON that every reader takes: what is not a finite number is null."""
    def plain(part: object) -> object:
        if isinstance(part, dict):
            return {str(key): plain(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [plain(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), indent=2)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _one_line(text: str) -> str:
    """Return a message on one line, whatever the name of a file in it holds."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode()
                   for char in text)


def _version(wanted: bool) -> bool:
    if wanted:
        print(f"phyla {phyla.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                help="print the version")] = False) -> None:
    pass


def main() -> None:
    """Run the command line; every error of ours is one line on stderr."""
    from phyla.errors import PhylaError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack the letters of a file's name
    if launch.is_launched():
        launch.follow_starter()
    code = _guarded(app, PhylaError)
    if launch.size() > 1:
        launch.end(code)
    sys.exit(code)


def _guarded(command: Callable[..., object], ours: type[Exception]) -> int:
    try:
        code = command(prog_name="phyla", standalone_mode=False)
        sys.stdout.flush()
    except ours as error:
        return _told(error)
    except (KeyboardInterrupt, typer.Abort):
        code = launch.INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:  # the command line library turns the first into the second
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _drop_stdout()  # its reader has gone, as in `phyla predict ... | head`
        return 0
    except OSError as error:  # in the system's own words
        _drop_stdout()
        told = error.strerror or str(error)
        return _failed(f"{error.filename}: {told}" if error.filename else told, 1)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()  # a mistake on the command line itself; with no command at all, the help
        if "\n" not in message:
            return _failed(message, 2)
        _say(message)
        return 2
    if code == launch.INTERRUPTED and launch.rank() == 0:  # the library's own code, when it has caught it first
        _say("stopped; give the same command again to go on where it was")
    return code if isinstance(code, int) else 0


def _told(error: Exception) -> int:
    """Return the exit code for an error of ours, told unless another process of a group tells it."""
    from phyla.errors import ElsewhereError, InputError, LostProcessError, NonFiniteLossError

    code = int(getattr(error, "exit_code", 1))
    if launch.is_launched():  # whoever started us shows the message of the one to blame
        if isinstance(error, ElsewhereError | LostProcessError):
            return launch.LOST
        return _failed(str(error), code)
    of_all = isinstance(error, InputError | NonFiniteLossError)  # the first one meets it, too
    if isinstance(error, ElsewhereError) or (of_all and launch.rank() > 0):
        return code
    return _failed(str(error), code)


def _drop_stdout() -> None:
    """Send what is still to be written nowhere: writing it would fail again when Python ends, and be shouted about."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(message: str, code: int) -> int:
    _say(f"error: {_one_line(message)}")
    return code


if __name__ == "__main__":
    main()
