"""Measure every clusterer of frozen embeddings on real data, three seeds each, into results/frozen/SET-ENCODER.json.

    python results/frozen.py --data FOLDER --work FOLDER            all of it; resumable, fit by fit
    python results/frozen.py --data FOLDER --work FOLDER --sets stl10 --encoders lite0 --methods kmeans consensus

True labels score and do nothing else: every method runs with its defaults and the true number of classes. The encoders
were trained with ImageNet's labels, which favours sets of the same objects (STL-10 is a part of ImageNet).
"""

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import phyla
from phyla.embed import embed
from phyla.evaluate.metrics import score_assignment
from phyla.evaluate.truth import true_labels
from phyla.images.sources import open_images
from phyla.members import Members
from phyla.neighbors import find_neighbors
from phyla.pipeline import Pipeline
from phyla.pretrain.frozen import Frozen
from phyla.quality import matching_temperature
from phyla.recipes import recipe
from phyla.spaces import scaled
from phyla.types import Assignment, Embeddings, Neighbors

HERE = Path(__file__).resolve().parent / "frozen"
SETS = {"cifar10": ("cifar10", "test", "auto"), "stl10": ("stl10", "train", "auto"),
        "cifar20": ("cifar20", "test", "auto"), "fashion-mnist": ("fashion-mnist", "test", "auto"),
        "clothing": ("clothing/by-class", "train", "folders"),
        "cifar100": ("cifar100", "test", "auto"), "cifar10-train": ("cifar10", "train", "auto"),
        "fashion-mnist-train": ("fashion-mnist", "train", "auto")}
"""What is opened, which split, and where its labels are from; of each the first 10,000 images, or all, or MOST."""

UNSEEN = ("cifar100", "cifar10-train", "fashion-mnist-train")
"""Sets whose scores nobody had looked at when the defaults were settled."""

ENCODERS = ("lite0", "mobilenetv2", "lite0,mobilenetv2", "lite2")
METHODS = ("kmeans", "spherical", "turtle", "scan", "nnm", "consensus")
SEEDS = (0, 1, 2)
MOST = dict.fromkeys(SETS, 10_000) | dict.fromkeys(UNSEEN, 5_000)
SHOWN = 160  # pixels at which the encoders are shown the images, fewer than their own 224: twice as fast
TITLES = {"kmeans": "k-means", "spherical": "spherical k-means", "temi": "TEMI", "turtle": "TURTLE", "scan": "SCAN",
          "nnm": "NNM", "member": "best member", "consensus": "consensus",
          "agreement": "consensus, confidence of agreement"}
SCORES = ("hungarian_accuracy", "nmi", "ari", "expected_calibration_error")

Fitted = tuple[np.ndarray, float]


def main() -> None:
    """Measure what is asked for, and write a file for each set and encoder: the methods whose seeds are all there."""
    asked = _arguments()
    for name in asked.sets:
        for encoder in asked.encoders:
            fits = measure(name, encoder, [] if asked.only_embed else asked.methods, asked.data, asked.work)
            if fits["methods"]:
                print(write(name, encoder, fits), flush=True)


def measure(name: str, encoder: str, methods: list[str], data: Path, work: Path) -> dict[str, Any]:
    """Return the scores of every fit, keyed METHOD/SEED; what ``work`` has from before is kept."""
    embeddings, true, told = _embedded(name, encoder, data, work)
    n_clusters = len(np.unique(true[true >= 0]))
    neighbors = find_neighbors(scaled(embeddings), 50)
    for method in methods:
        for seed in SEEDS:
            path = work / f"{name}-{encoder}-{method}-{seed}.json"
            if path.exists():
                continue
            rows = {}
            for title, (p, seconds) in _fit(method, n_clusters, seed, embeddings, neighbors).items():
                values = score_assignment(Assignment(p, embeddings.ids), true, method=title, split="train").values
                rows[title] = {key: values[key] for key in SCORES} | {"seconds": seconds}
                print(f"{name:14} {encoder:18} {title:18} {seed}  " + "  ".join(
                    f"{key[:8]} {value:.3f}" for key, value in rows[title].items()), flush=True)
            path.write_text(json.dumps(rows), encoding="utf-8")
    fits = {f"{method}/{seed}": json.loads(path.read_text(encoding="utf-8")) for method in METHODS for seed in SEEDS
            if (path := work / f"{name}-{encoder}-{method}-{seed}.json").exists()}
    whole = [method for method in METHODS if all(f"{method}/{seed}" in fits for seed in SEEDS)]
    fits = {key: fit for key, fit in fits.items() if key.split("/")[0] in whole}
    return told | {"n_images": len(true), "n_clusters": n_clusters, "size": SHOWN, "methods": whole, "fits": fits}


def write(name: str, encoder: str, told: dict[str, Any]) -> Path:
    """Write results/frozen/NAME-ENCODER.json: for each method the values of every seed."""
    by_seed = [{title: row for method in told["methods"] for title, row in told["fits"][f"{method}/{seed}"].items()}
               for seed in SEEDS]
    rows = [{"method": title, "values": {key: [round(rows[title][key], 5) for rows in by_seed]
                                         for key in by_seed[0][title]}} for title in by_seed[0]]
    result = {key: value for key, value in told.items() if key not in ("fits", "methods")} | {
        "set": name, "encoder": encoder, "seeds": list(SEEDS), "rows": rows,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": f"CPU, {torch.get_num_threads()} threads, fp32",
        "versions": {"phyla": phyla.__version__, "python": platform.python_version(), "torch": torch.__version__,
                     "scikit-learn": version("scikit-learn"), "numpy": np.__version__}}
    HERE.mkdir(exist_ok=True)
    path = HERE / f"{name}-{encoder.replace(',', '+')}.json"
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _embedded(name: str, encoder: str, data: Path, work: Path) -> tuple[Embeddings, np.ndarray, dict[str, Any]]:
    """Return the embeddings of a set, its true classes, and seconds and size of the embedding."""
    source, split, labels = SETS[name]
    source = str(data / source) if labels == "folders" else source
    images = open_images(source, split=split, data_dir=data, download=False).images
    images = images.select(np.arange(min(MOST[name], len(images))))
    truth = true_labels(source, images.ids, split=split, data_dir=data, labels=labels)
    if truth is None:
        raise SystemExit(f"{name} has no labels to score by")
    parts, told = [], {"embed_seconds": 0.0}
    for each in encoder.split(","):
        path = work / f"{name}-{each}.npz"
        if not path.exists():
            frozen, start = Frozen(encoder=each, size=SHOWN).fit(images), time.monotonic()
            views = replace(frozen.views.plain(), size=images.size[0])
            values = embed(images, frozen.encoder_, views).values
            np.savez(path, values=values, seconds=time.monotonic() - start)
        held = np.load(path)
        parts.append(held["values"])
        told["embed_seconds"] += round(float(held["seconds"]), 1)
    widths = tuple(part.shape[1] for part in parts)
    return Embeddings(np.concatenate(parts, axis=1), images.ids, widths), truth.labels, told


def _fit(method: str, n_clusters: int, seed: int, embeddings: Embeddings, neighbors: Neighbors) -> dict[str, Fitted]:
    """Return the probabilities and seconds of a method; of a consensus those of its best member and TEMI besides."""
    start = time.monotonic()
    pipeline = recipe("frozen-folder" if method == "consensus" else f"frozen-{method}")
    clusterer = _seeded(pipeline.cluster, n_clusters, seed)
    if method in ("kmeans", "spherical", "turtle"):
        clusterer.fit(embeddings)
    else:
        clusterer.fit(embeddings, neighbors=neighbors)
    found = {TITLES[method]: (clusterer.probabilities_, time.monotonic() - start)}
    if not isinstance(clusterer, Members):
        return found
    consensus = _consensus(pipeline, n_clusters, seed)
    consensus.fit(embeddings, members=[each.astype(np.float32) for each in clusterer.members_], neighbors=neighbors,
                  member_scores=[max(0.0, row["score"]) for row in clusterer.rows_])  # as a run does
    whole = {TITLES["member"]: found[TITLES[method]],
             TITLES["consensus"]: (consensus.probabilities_, time.monotonic() - start)}
    whole[TITLES["agreement"]] = _of_agreement(consensus), whole[TITLES["consensus"]][1]
    temi = next((place for place, row in enumerate(clusterer.rows_) if row["method"] == "temi" and row["kept"]), None)
    if temi is not None:  # what frozen-temi fits, with another seed
        p = clusterer.members_[temi].astype(np.float32)
        whole[TITLES["temi"]] = p / p.sum(axis=1, keepdims=True), clusterer.rows_[temi]["seconds"]
    return whole


def _consensus(pipeline: Pipeline, n_clusters: int, seed: int) -> Any:
    method = pipeline.refine
    if method is None:
        raise SystemExit(f"{pipeline.name} has no consensus")
    return _seeded(method, n_clusters, seed)


def _of_agreement(consensus: Any) -> np.ndarray:
    """Return what ``Consensus(calibration="agreement")`` gives: the same labels at another temperature."""
    logits = np.log(np.maximum(consensus.probabilities_, np.finfo(np.float32).tiny)) * consensus.temperature_
    temperature = matching_temperature(logits, min(float(consensus.agreement_.mean()), 1 - 0.5 / len(logits)))
    return torch.from_numpy(logits / temperature).softmax(dim=1).numpy()


def _seeded(method: Any, n_clusters: int, seed: int) -> Any:
    method.n_clusters, method.random_state = n_clusters, seed
    return method


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="where the data sets lie")
    parser.add_argument("--only-embed", action="store_true", help="make the embeddings, and no fit")
    parser.add_argument("--work", type=Path, required=True, help="keeps embeddings and finished fits")
    for name, known in (("sets", list(SETS)), ("encoders", list(ENCODERS)), ("methods", list(METHODS))):
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    return asked


if __name__ == "__main__":
    main()
