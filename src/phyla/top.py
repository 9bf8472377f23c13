"""The top of a run folder: which files of its stages it shows, and whether it still does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from phyla.rundir import RunDir, is_placed, load_assignment, place, save_records
from phyla.storage import read_json, write_json
from phyla.tables import left_open, write_assignments

_TABLES = {"train": "assignments", "held_out": "assignments-held-out"}


@dataclass(frozen=True)
class Top:
    """What the top of ``run`` shows once its stages are there.

    Parameters
    ----------
    run : the folder, with the stages asked for so far
    splits : names of the splits, the clustered one first
    result : the stage whose assignment and classifier are shown; None before there is one
    min_confidence : images below it are put into no cluster of the tables (``left_open``)
    """

    run: RunDir
    splits: Sequence[str]
    result: str | None
    min_confidence: float = 0.0

    def show(self, facts: Mapping[str, object], records: Sequence[Mapping[str, object]]) -> None:
        """Place the stages' files, write tables and records, and last run.json, which names them all."""
        folder = self.run.path
        path, placed, tables = folder / "run.json", self._placed(), self._tables()
        files = [*placed, *tables, "metrics.jsonl"]
        earlier = read_json(path).get("files", []) if path.exists() else []
        for name in {Path(str(file)).name for file in earlier} - set(files):
            (folder / name).unlink(missing_ok=True)  # of other options: its stage still has it
        for name, source in placed.items():
            place(source, folder / name)
        for name, split in tables.items():
            found = load_assignment(self._folder(str(self.result)), split)
            write_assignments(folder / name, [left_open(found, self.min_confidence)])
        save_records(folder / "metrics.jsonl", records)
        write_json(path, dict(facts) | {"files": files})

    def is_shown(self, *, whole: bool) -> bool:
        """Return whether the top of the folder shows these stages; those of a part may be followed by others."""
        path = self.run.path / "run.json"
        held = read_json(path) if path.exists() else {}
        shown = {name: stage["key"] for name, stage in held.get("stages", {}).items()}
        ours = {name: stage.key for name, stage in self.run.stages.items()}
        if not whole:
            return ours.items() <= shown.items()
        return (ours == shown and all((self.run.path / name).exists() for name in held.get("files", []))
                and all(is_placed(source, self.run.path / name) for name, source in self._placed().items()))

    def _folder(self, stage: str) -> Path:
        return self.run.stages[stage].folder

    def _placed(self) -> dict[str, Path]:
        """Return the files at the top of the folder that are a stage's, and where the stage has them."""
        made = self.run.stages
        placed = {f"{name}.npy": self._folder(stage) / "train.npy"
                  for stage, name in (("embed", "embeddings"), ("neighbors", "neighbors")) if stage in made}
        if self.result is not None:
            placed |= {name: self._folder(self.result) / name for name in ("model.safetensors", "model.json")}
        if "evaluate" in made:
            placed["scores.json"] = self._folder("evaluate") / "scores.json"
        if "report" in made:
            placed |= {path.name: path for path in sorted(self._folder("report").iterdir())
                       if path.suffix in (".html", ".png") or path.name in ("health.json", "oddities.csv")}
        return placed

    def _tables(self) -> dict[str, str]:
        """Return the tables at the top of the folder, and the split that each is of."""
        splits = self.splits if self.result is not None else []
        return {f"{_TABLES[split]}.{kind}": split for split in splits for kind in ("csv", "parquet")}
