"""The house rules, read from the source with the standard library; each rule is also shown a file that breaks it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "phyla"

LAYERS = (
    {"errors", "checkpoints"}, {"storage", "progress", "randomness"}, {"types", "shards"}, {"tables"}, {"images"},
    {"nets"}, {"training"}, {"candidates", "rowcache", "centers"}, {"embed", "neighbors", "criteria", "oddities"},
    {"reciprocal", "index", "spaces", "ensembles", "principal"}, {"generalization"}, {"quality"},
    {"counting", "mergetree"}, {"pretrain", "cluster", "refine"}, {"layouts", "members"},
    {"classifier", "zoo", "rundir"}, {"evaluate"}, {"report"},
    {"pipeline"}, {"recipes"}, {"overrides", "published"}, {"stages", "recorded", "top", "results"}, {"runner"},
    {"labelling"}, {"prediction", "inventory", "importing", "onnx_file", "image_table", "asked"},
    {"exports", "experiment"}, {"reproduce", "standings"}, {"resulttables"}, {"display", "launch"}, {"cli"},
)
"""Bottom to top: a module imports from layers below its own, and from its own folder."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
METHODS = ("pretrain", "cluster", "refine")
SEES_LABELS = {"evaluate", "report", "pipeline", "recipes", "runner", "cli"}
READS_FORMATS = {"images/sources.py", "evaluate/truth.py"}
FORMATS = {"images.formats", "images.finegrained"}
READS_MATLAB = {"images/formats.py", "images/finegrained.py"}
LIMIT_LINES, LIMIT_FUNCTION, LIMIT_FIT = 500, 60, 100

Files = dict[str, str]


def source_files() -> Files:
    return {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}


def imported(text: str) -> Iterator[str]:
    """Yield every phyla module that a source imports, below `phyla.`, function bodies and type checking included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("phyla.") for alias in node.names if alias.name.startswith("phyla."))
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "relative." + (node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.module == "phyla":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("phyla."):
            inner = str(node.module).removeprefix("phyla.")
            folder = inner in FOLDERS
            yield from (f"{inner}.{alias.name}" if folder else inner for alias in node.names)


GLOBAL_SEEDS = r"(torch\.(cuda\.)?manual_seed(_all)?|(np|numpy)\.random\.seed|random\.seed|seed_everything)"
FOLDERS = {"images", "nets", "training", "pretrain", "cluster", "refine", "evaluate", "report"}


def part(path: str) -> str:
    """Return the folder of a file, or its name for one at the top: what the layers are made of."""
    return path.split("/")[0].removesuffix(".py")


def is_root(path: str) -> bool:
    """Return whether a file is the package's lazy front door, which names everything and imports nothing."""
    return path in ("__init__.py", "__main__.py")


def imports_go_down(files: Files) -> list[str]:
    found = []
    for path, text in files.items():
        if is_root(path):
            continue
        own = part(path)
        if own not in LEVEL:
            found.append(f"{path}: in no layer")
            continue
        for name in imported(text):
            other = name.split(".")[0]
            if other not in LEVEL and other not in ("__version__",):
                found.append(f"{path}: imports {name}, which is in no layer")
            elif other in LEVEL and other != own and LEVEL[other] >= LEVEL[own]:
                found.append(f"{path}: {own} imports {name} from above or beside it")
    return found


def labels_stay_behind_the_wall(files: Files) -> list[str]:
    found = []
    for path, text in files.items():
        if is_root(path):
            continue
        for name in imported(text):
            if name.startswith("evaluate") and part(path) not in SEES_LABELS:
                found.append(f"{path}: imports {name}")
            module = ".".join(name.split(".")[:2])
            if (module in FORMATS and path not in READS_FORMATS) or (
                    module == "images.matlab" and path not in READS_MATLAB):
                found.append(f"{path}: imports {name}")
    return found


def no_way_around_the_wall(files: Files) -> list[str]:
    """Find modules reached without an import statement that the other rules would see."""
    found = []
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)) if not is_root(path) else ():
            name = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
            if re.fullmatch(r"phyla\.(?!__version__)\w+", name) or name in ("__import__", "import_module", "importlib"):
                found.append(f"{path}:{node.lineno}: {name}")
    return found


def methods_are_apart(files: Files) -> list[str]:
    found = []
    for path, text in files.items():
        if part(path) in METHODS and not path.endswith("__init__.py"):
            own = path.removesuffix(".py").replace("/", ".")
            found += [f"{path}: imports {name}" for name in imported(text)
                      if name.split(".")[0] in METHODS and not (name + ".").startswith(own + ".")]
    return found


def forbidden_calls(files: Files) -> list[str]:
    found = []
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assert):
                found.append(f"{path}:{node.lineno}: assert")
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name.endswith(".cuda") or name in ("eval", "exec") or (name == "print" and path != "cli.py"):
                found.append(f"{path}:{node.lineno}: {name}(")
            if re.fullmatch(GLOBAL_SEEDS, name):
                found.append(f"{path}:{node.lineno}: {name}( seeds a global generator")
    return found


def readable_sizes(files: Files) -> list[str]:
    found = [f"{path}: {n} lines" for path, text in files.items() if (n := len(text.splitlines())) > LIMIT_LINES]
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > (LIMIT_FIT if node.name == "fit" else LIMIT_FUNCTION):
                    found.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    return found


def no_grab_bags(files: Files) -> list[str]:
    return [path for path in files if re.search(r"(utils|common|misc|helpers|base)", Path(path).stem)]


def methods_are_complete(files: Files, root: Path = ROOT) -> list[str]:
    found = []
    recipes = "".join(text for path, text in files.items() if part(path) == "recipes")
    for path in files:
        name = Path(path).stem
        if part(path) in METHODS and name != "__init__":
            if not (root / "docs" / "methods" / f"{name}.md").exists():
                found.append(f"{path}: no docs/methods/{name}.md")
            if not (root / "tests" / Path(path).parent / f"test_{name}.py").exists():
                found.append(f"{path}: no tests/{Path(path).parent.as_posix()}/test_{name}.py")
            in_all = name in ("kmeans", "consensus")  # k-means is in every recipe's table; consensus takes any method's
            if not in_all and f"phyla.{path.removesuffix('.py').replace('/', '.')}" not in recipes:
                found.append(f"{path}: in no recipe")
    return found


RULES = [imports_go_down, labels_stay_behind_the_wall, no_way_around_the_wall, methods_are_apart, forbidden_calls,
         readable_sizes, no_grab_bags, methods_are_complete]

BROKEN = [
    (imports_go_down, "images/sources.py", "from phyla.cluster.scan import SCAN\n"),
    (imports_go_down, "neighbors.py", "def f():\n    import phyla.quality\n"),
    (imports_go_down, "brandnew.py", "x = 1\n"),
    (imports_go_down, "nets/heads.py", "from ..training import loop\n"),
    (labels_stay_behind_the_wall, "cluster/scan.py", "from phyla.evaluate.metrics import nmi\n"),
    (labels_stay_behind_the_wall, "classifier.py", "from phyla.evaluate import truth\n"),
    (labels_stay_behind_the_wall, "report/page.py", "from phyla.images.formats import cifar_labels\n"),
    (labels_stay_behind_the_wall, "images/folders.py", "from phyla.images import finegrained\n"),
    (labels_stay_behind_the_wall, "images/sources.py", "from phyla.images.matlab import read_array\n"),
    (no_way_around_the_wall, "embed.py", "import phyla\nphyla.evaluate.metrics.nmi\n"),
    (no_way_around_the_wall, "embed.py", "import importlib\nimportlib.import_module('phyla.evaluate')\n"),
    (methods_are_apart, "cluster/scan.py", "from phyla.pretrain.simclr import nt_xent\n"),
    (methods_are_apart, "refine/selflabel.py", "from phyla.cluster import scan\n"),
    (forbidden_calls, "embed.py", "def f(x):\n    return x.cuda()\n"),
    (forbidden_calls, "embed.py", "print('hello')\n"),
    (forbidden_calls, "embed.py", "import torch\ntorch.manual_seed(0)\n"),
    (forbidden_calls, "embed.py", "import numpy as np\nnp.random.seed(0)\n"),
    (forbidden_calls, "embed.py", "eval('1')\n"),
    (forbidden_calls, "embed.py", "def f(x):\n    assert x > 0\n"),
    (readable_sizes, "embed.py", "x = 1\n" * (LIMIT_LINES + 1)),
    (readable_sizes, "embed.py", "def f():\n" + "    x = 1\n" * (LIMIT_FUNCTION + 1)),
    (no_grab_bags, "images/image_utils.py", ""),
    (methods_are_complete, "cluster/brandnew.py", ""),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule):
    assert rule(source_files()) == []


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_file_that_breaks_the_rule_is_found(rule, path, text):
    assert any(path in line for line in rule({"recipes/scan.py": "", path: text}))


def test_every_part_of_the_package_has_a_layer():
    assert {part(path) for path in source_files() if not is_root(path)} == set(LEVEL)


LIGHT = ("import sys; {code}; heavy = sorted({{'torch', 'sklearn', 'numpy', 'scipy', 'matplotlib', 'pyarrow', 'PIL'}}"
         " & set(sys.modules)); assert not heavy, heavy")


@pytest.mark.parametrize("code", [
    "import phyla",
    "import phyla.cli",
    "from phyla.cli import app; app(['--help'], standalone_mode=False)",
    "from phyla.cli import app; app(['run', '--help'], standalone_mode=False)",
])
def test_nothing_heavy_is_imported_for(code):
    subprocess.run([sys.executable, "-c", LIGHT.format(code=code)], check=True, capture_output=True, timeout=60)


def test_lazy_names_are_the_public_ones():
    import phyla

    for name in phyla.__all__:
        assert getattr(phyla, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = phyla.nothing_here
