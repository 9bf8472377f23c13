"""Write the measured part of docs/concepts/speed.md from bench/cards/*.json, so that no number in it is typed.

    python bench/cards.py                        write it
    python bench/cards.py measure [NAME ...]     run these cards first (all that take no more than minutes)

A card lies in bench/cards/NAME.json, as its ``--out`` writes it; what `gpu.py` leaves in its gpu.json goes there as
gpu.json or gpu-WORDS.json. A machine that others use gives worse figures than a quiet one, and wider ranges.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CARDS, PAGE = HERE / "cards", HERE.parent / "docs" / "concepts" / "speed.md"
BEGIN, END = "<!-- cards: begin (written by `python bench/cards.py`) -->", "<!-- cards: end -->"
NOTHING = "No card has been kept yet."

TITLES = {
    "steps": "A training step of every method", "views": "Views a second",
    "memory": "Super-AND's softmax over N images",
    "neighbors": "Images a second whose 20 neighbors are found", "files": "Images a second from JPEG files",
    "growth": "Time and memory against the number of images",
}
"""The cards in the order of the page, by the name of their script, and what stands above their tables."""

PARTS = {
    "machine": "What the GPU does by itself", "smoke": "Recorded steps against the same draws kernel by kernel",
    "epoch": "An epoch of SimCLR, ResNet-18, CIFAR-10, 50,000 images, two views each",
    "profile": "Where a step's time goes, as a share of it", "accuracy": "What the fast path learns",
    "steps": "A step of every method, as published", "tools": "Views and neighbors",
    "plain": "Steps as people write them", "compiled": "Compiled steps against the same draws as they are",
}
HIDDEN = ("trace", "top", "took s", "at", "exact", "fault")


def block() -> str:
    """Return the Markdown of every kept card."""
    found = [*_of_scripts(), *_of_gpus()]
    return "\n".join(found) if found else NOTHING


def _of_scripts() -> Iterator[str]:
    for name, title in TITLES.items():
        for path in sorted(CARDS.glob(f"{name}*.json")):
            held = json.loads(path.read_text(encoding="utf-8"))
            yield f"### {title}\n\n`bench/{name}.py`. {_machine(held)}\n\n{_table(held['rows'])}\n"


def _of_gpus() -> Iterator[str]:
    for path in sorted(CARDS.glob("gpu*.json")):
        held = json.loads(path.read_text(encoding="utf-8"))
        for part, title in PARTS.items():
            rows = [row for row in held["parts"].get(part, {}).values() if "failed" not in row]
            if rows:
                yield f"### {title}\n\n`bench/gpu.py`. {_machine(held)}\n\n{_table(rows)}\n"


def _machine(held: Mapping[str, Any]) -> str:
    """Return where a card was measured, in words."""
    where = held.get("gpu") or f"{held['cpu']}, {held['threads']} threads"
    repeats = held.get("options", {}).get("repeats")
    turns = f", medians of {repeats}" if repeats else ""
    return f"{where}; torch {held['torch']}{turns}."


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table; a ratio stands with its range, and what no row has is left out."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row)
             if name not in HIDDEN and not name.endswith(" range") and any(row.get(name) is not None for row in rows)]
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join(["---"] * len(names)) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(_cell(row, name) for name in names) + " |" for row in rows)])


def _cell(row: Mapping[str, Any], name: str) -> str:
    value, span = row.get(name), row.get(f"{name} range")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    told = f"**{value:,}**" if name.startswith("x ") else f"{value:,}"
    return f"{told} ({span[0]:,} to {span[1]:,})" if span else told


def write_page() -> None:
    """Put the block between the page's two markers."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{block()}\n{END}{after}", encoding="utf-8")


def measure(names: Sequence[str]) -> None:
    """Run cards one after the other, each into its file."""
    CARDS.mkdir(exist_ok=True)
    for name in names or [name for name in TITLES if (HERE / f"{name}.py").exists()]:
        if name not in TITLES:
            raise SystemExit(f"no card {name!r}: {', '.join(TITLES)}")
        print(f"\n{name}", flush=True)
        subprocess.run([sys.executable, HERE / f"{name}.py", "--out", CARDS / f"{name}.json"], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2:])
    elif sys.argv[1:]:
        raise SystemExit(__doc__)
    write_page()
