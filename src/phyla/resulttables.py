"""The tables of README and the documentation, written from the files of ``results/`` between markers.

A page asks for a table by a pair of comments. ``results: begin scan-* nnm-digits`` takes the results of these names,
all without a name; ``side by side: begin nmi digits fashion-small`` one score of all methods, of the recipes whose name
ends so; ``options: begin scan-digits`` the results of these recipes by what was changed; ``published: begin SCAN
RUC`` what these papers say, beside ours; ``frozen results: begin`` what results/frozen.py measured of frozen encoders.
"""

import re
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from phyla.errors import DataNotFoundError, InputError
from phyla.experiment import SELECTIONS, Experiment, clustered_protocol, protocol_of, selections
from phyla.images.catalog import DATASETS
from phyla.pipeline import RESULTS
from phyla.published import METRICS, Published, ablation, published
from phyla.results import RunResult, read_results
from phyla.standings import Spread, spreads, standings
from phyla.storage import read_json, write_text

SCORES = {"hungarian_accuracy": "Hungarian accuracy", "nmi": "NMI", "ari": "ARI"}
ORDER = {"cifar10": "CIFAR-10", "stl10": "STL-10", "cifar20": "CIFAR-20", "fashion-mnist": "Fashion-MNIST",
         "clothing": "clothing"}
UNSEEN = {("cifar100", "lite0,mobilenetv2"): "CIFAR-100 test", ("cifar10-train", "lite2"): "CIFAR-10 train",
          ("fashion-mnist-train", "lite2"): "Fashion-MNIST train"}
"""Sets, and their encoders, whose scores nobody had looked at when defaults were settled."""
METHODS = ("k-means", "spherical k-means", "TEMI", "TURTLE", "SCAN", "NNM", "best member", "consensus")
AGREEMENT = "consensus, confidence of agreement"
ENCODERS = {"lite0,mobilenetv2": "EfficientNet-Lite0 and MobileNetV2 together", "lite0": "EfficientNet-Lite0",
            "mobilenetv2": "MobileNetV2"}
SHOWN = "lite0,mobilenetv2"
FROZEN_SCORES = {"hungarian_accuracy": "Hungarian accuracy", "nmi": "NMI", "ari": "ARI",
                 "expected_calibration_error": "expected calibration error", "seconds": "seconds, one thread"}
KNN = re.compile(r"knn_accuracy_(\d+)(_memory|_recomputed)?")
BANKS = {None: "the embeddings", "_memory": "the memory bank", "_recomputed": "the memory bank, recomputed"}
SIDE_BY_SIDE = {"k-means on pixels": ("scan", "k-means on pixels"),
                "SimCLR + k-means": ("scan", "k-means on embeddings"),
                "SCAN": ("scan", "SCAN"), "SCAN + self-label": ("scan", "SCAN + self-label"),
                "SCAN + self-label + RUC": ("ruc", "SCAN + self-label + RUC"), "NNM": ("nnm", "NNM"),
                "Super-AND + k-means": ("superand", "Super-AND + k-means"), "TSUC": ("tsuc", "TSUC"),
                "TSUC + RUC": ("ruc-tsuc", "TSUC + RUC")}
"""The rows of all methods side by side: how the name of the recipe begins, and what its result calls the method."""
BLOCK = re.compile(r"(<!-- (results|side by side|options|published|frozen results): begin(?: ([^(]+?))? "
                   r"\(written by `make table`\) -->).*?(\n<!-- results: end -->)", re.DOTALL)


def write_tables(results: Path) -> list[Path]:
    """Write every table of the repository that ``results`` is a folder of anew; return the pages that changed.

    Raises
    ------
    DataNotFoundError
        No page beside or below ``results`` asks for a table.
    """
    changed = []
    asking = [path for path in _pages(results.absolute().parent) if BLOCK.search(path.read_text(encoding="utf-8"))]
    if not asking:
        raise DataNotFoundError(f"no page beside {results} has a place for a table",
                                "call it in the repository, or name its folder of results: --results DIR")
    for path in asking:
        before = path.read_text(encoding="utf-8")
        after = written(before, results, whole=path.name != "README.md")
        if after != before:
            write_text(path, after)
            changed.append(path)
    return changed


def stale(results: Path) -> list[Path]:
    """Return the pages whose tables are not what ``results`` gives."""
    pages = [(path, path.read_text(encoding="utf-8")) for path in _pages(results.absolute().parent)]
    return [path for path, text in pages if written(text, results, whole=path.name != "README.md") != text]


def written(page: str, results: Path, *, whole: bool = True) -> str:
    """Return a page with each of its tables written anew; ``whole`` shows every encoder, not the best pair alone."""
    def block(found: re.Match[str]) -> str:
        words = (found[3] or "").split()
        if found[2] == "results":
            text = results_table(results, words)
        elif found[2] == "side by side":
            text = side_by_side(results, words[0] if words else "hungarian_accuracy", words[1:])
        elif found[2] == "options":
            text = options_table(results, words)
        elif found[2] == "published":
            text = published_table(results, words)
        else:
            text = frozen_tables(results) if whole else frozen_summary(results)
        return f"{found[1]}\n{text}{found[4]}"

    return BLOCK.sub(block, page)


def _pages(root: Path) -> list[Path]:
    return [path for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))) if path.is_file()]


# ── results ───────────────────────────────────────────────────────────────────────────────────────────────────────


def results_table(results: Path, names: Sequence[str] = ()) -> str:
    """Return the Markdown table of the results of some names, and below it the command that makes each again.

    A row that stands in several results is shown once: that of an encoder stands with every method that starts from it.
    """
    held = _called(results, names)
    seen: set[str] = set()
    lines = ["| recipe | images | method | " + " | ".join(SCORES.values()) + " | kNN accuracy | seeds |",
             "| --- | --- | --- | " + "--- | " * len(SCORES) + "--- | --- |"]
    for name, found in held.items():
        for row, values in spreads(found):
            for cells in _lines(row.method, values):
                told = f"{row.n_images:,} {row.split} | " + " | ".join(cells) + f" | {len(found)} |"
                if told not in seen:
                    lines.append(f"| {name} | {told}")
                seen.add(told)
    commands = [command_of(found) for found in held.values()]
    return "\n".join([*lines, "", "Each again:", "", "```", *commands, "```"])


def _called(results: Path, names: Sequence[str]) -> dict[str, list[RunResult]]:
    held = {name: found for name, found in read_results(results).items()
            if not names or any(fnmatchcase(name, pattern) for pattern in names)}
    if not held:
        raise InputError(f"no results in {results}" + (f" are called {' or '.join(names)}" if names else ""),
                         "make some: phyla reproduce RECIPE --seeds 3")
    return held


def side_by_side(results: Path, score: str, sets: Sequence[str]) -> str:
    """Return the Markdown table of one score, a line a method and a column a set of images, and what runs it again.

    ``sets`` are the ends of recipes' names, of which each method has one: scan-digits, nnm-digits.
    """
    held = read_results(results, [f"{begins}-{end}" for begins, _ in SIDE_BY_SIDE.values() for end in sets])
    found = {(name, row.method, row.split): (row, values[score]) for name, of_seeds in held.items()
             for row, values in spreads(of_seeds) if score in values}
    columns = [(end, row.split, f"{end}, {row.n_images:,} {row.split}") for end in sets
               for (name, method, _), (row, _) in found.items() if (name, method) == (f"scan-{end}", "SCAN")]
    if not columns:
        raise InputError(f"no results in {results} are called {' or '.join(f'scan-{end}' for end in sets)}",
                         "make some: phyla reproduce RECIPE --seeds 3")
    lines = ["| method | " + " | ".join(title for *_, title in columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for title, (begins, method) in SIDE_BY_SIDE.items():
        cells = [found.get((f"{begins}-{end}", method, split)) for end, split, _ in columns]
        lines.append(f"| {title} | " + " | ".join(cell[1].text() if cell else "" for cell in cells) + " |")
    return "\n".join([*lines, "", "All of it again:", "", "```", *_in_one_line(held), "```"])


def _in_one_line(held: Mapping[str, list[RunResult]]) -> list[str]:
    """Return the command that makes all results again, or one for each where they differ in more than the recipe."""
    commands = [command_of(found) for found in held.values()]
    recipes = [found[0].recipe for found in held.values()]
    rest = {command.replace(f" {recipe} ", " $recipe ") for command, recipe in zip(commands, recipes, strict=True)}
    return [f"for recipe in {' '.join(recipes)}; do {rest.pop()}; done"] if len(rest) == 1 else commands


def options_table(results: Path, recipes: Sequence[str]) -> str:
    """Return the Markdown table of what changed options make of some recipes, and the commands below it.

    A line is a change and a split, and its scores are those of the clustering, or of RUC where the recipe ends in it.
    """
    held = {name: found for name, found in read_results(results).items() if found[0].recipe in recipes}
    if not held:
        raise InputError(f"no results in {results} are of {' or '.join(recipes)}", "make some: phyla reproduce RECIPE")
    lines = ["| recipe | changed | images | method | " + " | ".join(SCORES.values()) + " | seeds |", "| --- " * 8 + "|"]
    for found in sorted(held.values(), key=lambda of: (recipes.index(of[0].recipe), of[0].name)):
        asked = experiment_of(found[0])
        pipeline = asked.pipeline(0)
        title = pipeline.title("robust" if pipeline.robust else "cluster")
        changes = [*(ablation(asked.recipe, asked.ablation) if asked.ablation else ()), *asked.changes]
        changes += ["in bf16"] if found[0].precision == "bf16" else []
        told = ", ".join(f"`{change}`" if "=" in change else change for change in changes) or "as it is"
        for row, values in spreads(found):
            if row.method == title:
                cells = [values[key].text() if key in values else "" for key in SCORES]
                lines.append(f"| {asked.recipe} | {told} | {row.n_images:,} {row.split} | {title} | "
                             + " | ".join(cells) + f" | {len(found)} |")
    return "\n".join([*lines, "", "Each again:", "", "```", *map(command_of, held.values()), "```"])


def _lines(method: str, values: Mapping[str, Spread]) -> list[list[str]]:
    """Return the cells of a row of scores: one line of an assignment, one of each kNN probe of an encoder."""
    if "hungarian_accuracy" in values:
        return [[method, *(values[key].text() if key in values else "" for key in SCORES), ""]]
    probes = [(match, values[name]) for name in sorted(values) if (match := KNN.fullmatch(name))]
    return [[f"{match[1]} nearest in {BANKS[match[2]]}", *[""] * len(SCORES), found.text()] for match, found in probes]


def experiment_of(result: RunResult) -> Experiment:
    """Return what a result is one of."""
    called = Experiment(result.recipe, result.ablation, result.protocol, result.selection, result.overrides)
    return called if called.name == result.name else Experiment(
        result.recipe, result.ablation, result.protocol, result.selection, result.overrides, result.name)


def command_of(results: Sequence[RunResult]) -> str:
    """Return the command that makes the results of one name again."""
    first, asked = results[0], experiment_of(results[0])
    seeds = [result.seed for result in results]
    told = str(len(seeds)) if seeds == list(range(len(seeds))) else ",".join(map(str, seeds))
    parts = ["phyla", "reproduce", first.recipe, "--seeds", told if len(seeds) > 1 or told == "1" else f"{told},"]
    for option, value in (("ablation", asked.ablation), ("protocol", asked.protocol), ("selection", asked.selection),
                          ("name", asked.called)):
        parts += [f"--{option}", value] if value else []
    for change in asked.changes:
        parts += ["--set", change]
    parts += ["--precision", "bf16"] if first.precision == "bf16" else []
    return shlex.join(parts)


# ── what the papers say ───────────────────────────────────────────────────────────────────────────────────────────


def published_table(results: Path, papers: Sequence[str] = ()) -> str:
    """Return the Markdown table of what some papers say, a row a number's row, with recipe and ours, or why not."""
    held = read_results(results)
    lines = ["| table | method | data | published, percent | protocol, chosen by | runs | here | ours |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in published():
        if not papers or row.paper in papers:
            lines.append("| " + " | ".join(_cells(row, held)) + " |")
    return "\n".join(lines)


def asked_by(row: Published) -> Experiment:
    """Return what is run for a published row; its protocol and selection are named where the recipe has others."""
    asked = Experiment(row.recipe, row.ablation)
    pipeline = asked.pipeline(0)
    if row.protocol not in (protocol_of(pipeline), clustered_protocol(pipeline)):
        asked = replace(asked, protocol=row.protocol)
    title = pipeline.title(row.result) if row.result in RESULTS else row.result
    if row.selection in SELECTIONS and selections(pipeline).get(title, row.selection) != row.selection:
        asked = replace(asked, selection=row.selection)
    return asked


def _cells(row: Published, held: Mapping[str, list[RunResult]]) -> Iterator[str]:
    yield row.table
    yield row.method
    yield DATASETS[row.data].title
    yield row.numbers()
    yield f"{row.protocol}, {row.selection}"
    yield f"{row.of} of {row.seeds}" if row.seeds else row.of
    if not row.recipe:
        yield from (row.why, "")
        return
    asked = asked_by(row)
    told = (("ablation", asked.ablation), ("protocol", asked.protocol), ("selection", asked.selection))
    yield f"`{' '.join([row.recipe, *(f'--{option} {value}' for option, value in told if value)])}`"
    found = held.get(asked.name, [])
    yield ", ".join(f"{METRICS[standing.metric][1]} {standing.ours.text(1)} ({standing.verdict})"
                    for standing in (standings(asked, found) if found else ())
                    if standing.row is row and standing.ours is not None)


# ── frozen encoders ───────────────────────────────────────────────────────────────────────────────────────────────


def frozen_table(results: Path, columns: Mapping[tuple[str, str], str], score: str = "hungarian_accuracy", *,
                 digits: int = 3) -> str:
    """Return the Markdown table of one score, a line a method and a column a set and encoder, of results/frozen."""
    read = [read_json(path) for path in sorted((results / "frozen").glob("*.json"))]
    held = {(result["set"], result["encoder"]): result["rows"] for result in read}
    rows: dict[str, dict[str, Any]] = {title: {row["method"]: row["values"][score] for row in held[key]}
                                       for key, title in columns.items() if key in held}
    known = (*METHODS, AGREEMENT) if score == "expected_calibration_error" else METHODS
    methods = [method for method in known if any(method in row for row in rows.values())]
    lines = ["| " + " | ".join(["method", *rows]) + " |", "| --- " * (len(rows) + 1) + "|"]
    for method in methods:
        cells = [_mean_and_spread(row[method], digits) if method in row else "" for row in rows.values()]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def frozen_tables(results: Path) -> str:
    """Return the tables of every encoder, and of the sets not seen before: accuracy, the other scores, and seconds."""
    groups = {title: {(name, encoder): shown for name, shown in ORDER.items()} for encoder, title in ENCODERS.items()}
    parts = []
    for title, columns in (groups | {"Sets not looked at before": UNSEEN}).items():
        for score, name in FROZEN_SCORES.items():
            digits = 0 if score == "seconds" else 3
            parts.append(f"**{title}**: {name}\n\n{frozen_table(results, columns, score, digits=digits)}")
    return "\n\n".join(parts)


def frozen_summary(results: Path) -> str:
    """Return README's two tables: accuracy of both encoders together, and on the sets not seen before."""
    both = {(name, SHOWN): shown for name, shown in ORDER.items()}
    return f"{frozen_table(results, both)}\n\nOn sets not looked at before:\n\n{frozen_table(results, UNSEEN)}"


def _mean_and_spread(values: list[float], digits: int = 3) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"
