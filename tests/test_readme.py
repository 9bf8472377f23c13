"""README's table is the one that results/*.json give, and the commands it shows exist."""

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _table():
    spec = importlib.util.spec_from_file_location("results_table", ROOT / "results" / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_written_from_the_results():
    module = _table()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{module.BEGIN}\n{module.table()}\n{module.END}" in text


def test_the_tables_of_frozen_encoders_are_written_from_the_results():
    module = _table()
    for path, text in ((module.README, module.frozen_table(module.SHOWN)), (module.MEASURED, module.frozen_tables())):
        assert f"{module.FROZEN_BEGIN}\n{text}\n{module.END}" in path.read_text(encoding="utf-8")


def test_results_of_frozen_encoders_hold_three_seeds_of_every_method():
    found = sorted((ROOT / "results" / "frozen").glob("*.json"))
    assert found
    for path in found:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert len(set(result["seeds"])) == 3 and result["rows"], path.name
        assert {"versions", "machine", "device", "set", "encoder", "n_images"} <= set(result)
        assert all(len(values) == 3 for row in result["rows"] for values in row["values"].values())


def test_results_hold_several_seeds_and_what_made_them():
    found = sorted((ROOT / "results").glob("*.json"))
    assert found
    for path in found:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert len(set(result["seeds"])) >= 3, path.name
        assert {"options", "versions", "machine", "device", "seconds"} <= set(result)
        for row in result["rows"]:
            assert all(len(values) == len(result["seeds"]) for values in row["values"].values())


def test_the_commands_in_the_documents_exist():
    from typer.main import get_command

    from phyla.cli import app

    verbs = set(get_command(app).commands)
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for block in re.findall(r"^```(?:\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for verb in re.findall(r"^(?:\$ )?phyla ([a-z]+)", block, re.MULTILINE):
                assert verb in verbs, f"{path.name}: phyla {verb}"
