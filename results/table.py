"""Collect finished runs into results/NAME.json, and write README's table from those files.

    python results/table.py collect scan-digits runs/seed-0 runs/seed-1 runs/seed-2
    python results/table.py                    write the tables into README.md and docs/concepts/frozen-encoders.md

What results/frozen.py measured of frozen encoders, in results/frozen/, has tables of its own. A result is a mean and a
spread over seeds, with the options, versions and machine that made it; never a best-of.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results: begin (written by `make table`) -->", "<!-- results: end -->"
FROZEN_BEGIN = "<!-- frozen results: begin (written by `make table`) -->"
MEASURED = HERE.parent / "docs" / "concepts" / "frozen-encoders.md"
SCORES = {"hungarian_accuracy": "Hungarian accuracy", "nmi": "NMI", "ari": "ARI"}
ORDER = {"cifar10": "CIFAR-10", "stl10": "STL-10", "cifar20": "CIFAR-20", "fashion-mnist": "Fashion-MNIST",
         "clothing": "clothing"}
METHODS = ("k-means", "spherical k-means", "TEMI", "TURTLE", "SCAN", "NNM", "best member", "consensus")
ENCODERS = {"lite0,mobilenetv2": "EfficientNet-Lite0 and MobileNetV2 together", "lite0": "EfficientNet-Lite0",
            "mobilenetv2": "MobileNetV2"}
SHOWN = "lite0,mobilenetv2"
FROZEN_SCORES = {"hungarian_accuracy": "Hungarian accuracy", "nmi": "NMI", "ari": "ARI",
                 "expected_calibration_error": "expected calibration error", "seconds": "seconds, one thread"}
KNN = re.compile(r"knn_accuracy_(\d+)(_memory|_recomputed)?")
BANKS = {None: "the embeddings", "_memory": "the memory bank", "_recomputed": "the memory bank, recomputed"}


def collect(name: str, runs: list[Path]) -> Path:
    """Write results/NAME.json from finished run folders that differ in their seed alone, and return its path."""
    facts = [json.loads((run / "run.json").read_text(encoding="utf-8")) for run in runs]
    scores = [json.loads((run / "scores.json").read_text(encoding="utf-8"))["scores"] for run in runs]
    options = [_without_seed(told["options"]) for told in facts]
    if any(other != options[0] for other in options):
        raise SystemExit("these runs differ in more than their seed")
    rows = []
    for position, row in enumerate(scores[0]):
        values = {key: [table[position]["values"][key] for table in scores] for key in row["values"]}
        rows.append({"method": row["method"], "split": row["split"], "n_images": row["n_images"], "values": values})
    seconds = [sum(stage["seconds"] for stage in told["stages"].values()) for told in facts]
    result = {"name": name, "seeds": [told["options"]["cluster"]["random_state"] for told in facts], "rows": rows,
              "seconds": seconds, "stages": [{key: held["seconds"] for key, held in told["stages"].items()}
                                             for told in facts],
              "device": facts[0]["device"], "machine": facts[0]["machine"], "versions": facts[0]["versions"],
              "options": options[0]}
    path = HERE / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def table() -> str:
    """Return the Markdown table of every results/*.json; a row that stands in several files is shown once."""
    seen: set[str] = set()
    lines = ["| recipe | images | method | " + " | ".join(SCORES.values()) + " | kNN accuracy | seeds |",
             "| --- | --- | --- | " + "--- | " * len(SCORES) + "--- | --- |"]
    for path in sorted(HERE.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            for cells in _lines(row):
                told = f"{row['n_images']:,} {row['split']} | " + " | ".join(cells) + f" | {len(result['seeds'])} |"
                if told not in seen:  # the k-means of one encoder is in the file of every recipe that starts from it
                    lines.append(f"| {result['name']} | {told}")
                seen.add(told)
    return "\n".join(lines)


def _lines(row: dict[str, Any]) -> list[list[str]]:
    """Return the cells of a row of scores: one line of an assignment, one of each kNN probe of an encoder."""
    values = row["values"]
    if "hungarian_accuracy" in values:
        return [[row["method"], *(_mean_and_spread(values[key]) for key in SCORES), ""]]
    probes = [(match, values[name]) for name in sorted(values) if (match := KNN.fullmatch(name))]
    return [[f"{match[1]} nearest in {BANKS[match[2]]}", *[""] * len(SCORES),
             _mean_and_spread(found)] for match, found in probes]


def frozen_table(encoder: str, score: str = "hungarian_accuracy", *, digits: int = 3) -> str:
    """Return the Markdown table of one score, a line a method and a column a data set, of results/frozen/*.json."""
    held = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((HERE / "frozen").glob("*.json"))]
    results = {result["set"]: result for result in held if result["encoder"] == encoder}
    names = sorted(results, key=lambda name: list(ORDER).index(name))
    rows = {name: {row["method"]: row["values"][score] for row in results[name]["rows"]} for name in names}
    methods = [method for method in METHODS if any(method in row for row in rows.values())]
    lines = ["| " + " | ".join(["method", *(ORDER[name] for name in names)]) + " |", "| --- " * (len(names) + 1) + "|"]
    for method in methods:
        cells = [_mean_and_spread(row[method], digits) if method in row else "" for row in rows.values()]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def frozen_tables() -> str:
    """Return the tables of every encoder: accuracy, the other scores, and seconds."""
    parts = []
    for encoder, title in ENCODERS.items():
        for score, name in FROZEN_SCORES.items():
            digits = 0 if score == "seconds" else 3
            parts.append(f"**{title}**: {name}\n\n{frozen_table(encoder, score, digits=digits)}")
    return "\n\n".join(parts)


def write_tables() -> None:
    """Put the tables between the markers of README and of the page of frozen encoders."""
    for path, begin, end, text in ((README, BEGIN, END, table()), (README, FROZEN_BEGIN, END, frozen_table(SHOWN)),
                                   (MEASURED, FROZEN_BEGIN, END, frozen_tables())):
        before, _, rest = path.read_text(encoding="utf-8").partition(begin)
        _, _, after = rest.partition(end)
        path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def _mean_and_spread(values: list[float], digits: int = 3) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _without_seed(options: object) -> object:
    if isinstance(options, dict):
        return {key: _without_seed(value) for key, value in options.items() if key != "random_state"}
    return options


if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"] and len(sys.argv) > 3:
        print(collect(sys.argv[2], [Path(run) for run in sys.argv[3:]]))
    elif sys.argv[1:]:
        raise SystemExit(__doc__)
    write_tables()
