"""The command line: what each verb says and where, and one line with a way out for everything that cannot be."""

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import phyla
from commands import (
    N_DIGITS,
    N_PICTURES,
    SMALL,
    TINY_PICTURES,
    call,
    digits_run,
    flags,
    picture,
    pictures,
    pictures_run,
    stage_files,
    table,
)
from phyla.cli import _guarded, main
from phyla.errors import (
    ElsewhereError,
    InputError,
    LostProcessError,
    NonFiniteLossError,
    PhylaError,
    StorageError,
)
from phyla.launch import LOST
from phyla.recipes import RECIPES
from phyla.training import loop

VERBS = ("run", "pretrain", "embed", "neighbors", "cluster", "refine", "evaluate", "report", "predict", "export", "cut",
         "reproduce", "list", "show", "import")


@pytest.fixture
def run(tmp_path, tmp_path_factory, monkeypatch):
    """Return a finished run on digits; what is done to it after that writes a report of one line."""
    made = digits_run(tmp_path_factory, tmp_path)
    monkeypatch.setattr("phyla.runner.build_report", lambda _, folder: (folder / "report.html").write_text("page"))
    return made


def whole(*more: object) -> list[object]:
    return ["run", "scan-digits", "--limit", N_DIGITS, *flags(), *more]


# ── what is said, and where ───────────────────────────────────────────────────────────────────────────────────────


def test_without_a_command_the_help_is_shown():
    said = call()
    assert said.code in (0, 2) and "Usage: phyla" in said.err + said.out
    assert all(verb in said.err + said.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb):
    for flag in ("--help", "-h"):
        said = call(verb, flag)
        assert said.code == 0 and said.out.startswith("Usage: phyla " + verb) and said.err == ""


def test_the_version_is_told():
    assert call("--version") == (0, f"phyla {phyla.__version__}\n", "")


def test_the_table_goes_to_stdout_and_the_talk_to_stderr(run):
    said = call(*whole("--out", run))
    lines = said.out.splitlines()
    assert said.code == 0 and lines[0].split() == ["method", "split", "images", "Hungarian", "accuracy", "NMI", "ARI"]
    assert [line.split("  ")[0] for line in lines[2:]] == ["k-means on pixels", "k-means on embeddings", "SCAN",
                                                          "SCAN + self-label"]
    assert len({len(line) for line in lines}) == 1  # columns stand below one another
    assert f"report: {run / 'report.html'}" in said.err and "nothing to do" in said.err
    assert not set(lines) & set(said.err.splitlines())


def test_without_labels_the_table_has_what_is_known(run):
    said = call(*whole("--out", run, "--labels", "none", "-q"))
    assert said.code == 0 and said.err == ""
    assert said.out.splitlines()[0].split()[3:] == ["neighbor", "agreement", "mean", "confidence", "clusters", "used"]
    assert json.loads((run / "run.json").read_text())["labels"] is None
    again = call("run", run, "-q")  # a run that is gone on with keeps its labels as they were
    assert again.out == said.out


def test_a_run_as_json_is_json_alone(run):
    said = call(*whole("--out", run, "--json"))
    told = json.loads(said.out)
    assert told["run"] == str(run) and told["did_work"] is False and told["n_images"] == N_DIGITS
    assert told["notices"] and told["scores"][0]["method"] == "k-means on pixels" and 0 <= told["scores"][0]["nmi"] <= 1
    assert call(*whole("--out", run, "--json", "--quiet")) == (0, said.out, "")


@pytest.mark.parametrize("verb", ["pretrain", "embed", "neighbors", "cluster", "refine", "evaluate"])
def test_a_verb_carries_the_chain_so_far_and_no_further(run, tmp_path, verb):
    out = tmp_path / "part"
    shutil.copytree(run / "stages", out / "stages")  # all is there to be found again
    shutil.copy(run / "options.json", out)
    said = call(verb, "scan-digits", "--limit", N_DIGITS, *flags(), "--out", out)
    assert said.code == 0 and f"run folder: {out}" in said.err and "report" not in said.err
    assert (said.out != "") == (verb == "evaluate")
    stages = list(json.loads((out / "run.json").read_text())["stages"])
    assert verb in stages and len(stages) == 1 + VERBS[1:].index(verb)
    assert (out / "embeddings.npy").exists() == (verb != "pretrain")
    assert (out / "model.safetensors").exists() == (verb in ("cluster", "refine", "evaluate"))
    assert (out / "scores.json").exists() == (verb == "evaluate")


def test_a_report_is_rebuilt(run):
    (run / "report.html").unlink()
    said = call("report", run, "--json")
    assert said.code == 0 and json.loads(said.out)["did_work"] and (run / "report.html").read_text() == "page"
    said = call("report", run, "--labels", "none")
    assert said.code == 0 and "neighbor agreement" in said.out and "pretrain  unchanged, kept" in said.err


def test_a_run_and_a_recipe_are_shown(run):
    said = call("show", run)
    assert said.code == 0 and said.out.startswith("command   phyla run scan-digits") and said.err == ""
    assert json.loads(call("show", run, "--json").out)["scores"][0]["values"]["nmi"] >= 0
    said = call("show", "scan-cifar10")
    assert said.code == 0 and "\ncluster.entropy_weight = 5.0\n" in said.out
    assert json.loads(call("show", "scan-cifar10", "--json").out)["cluster"]["batch_size"] == 128


def test_what_there_is_is_listed(tmp_path):
    said = call("list", "--data", tmp_path)
    assert said.code == 0 and said.err == "" and all(name in said.out for name in RECIPES)
    told = json.loads(call("list", "--json", "--data", tmp_path).out)
    assert list(told) == ["recipes", "methods", "encoders", "checkpoints", "data"]
    assert json.loads(call("list", "recipes", "--json").out)["recipes"].keys() == RECIPES.keys()
    assert "scan-cifar10" not in call("list", "data", "--data", tmp_path).out


def test_pictures_are_labelled_on_stdout_or_in_a_file(tmp_path, tmp_path_factory):
    run, photos = pictures_run(tmp_path_factory, tmp_path)
    said = call("predict", run, photos)
    assert said.code == 0 and said.err == "" and len(said.out.splitlines()) == N_PICTURES + 1
    as_json = call("predict", run, photos, "--json")
    assert [row["id"] for row in json.loads(as_json.out)] == [row["id"] for row in table(run / "assignments.csv")]
    out = tmp_path / "deep" / "labels.parquet"
    said = call("predict", run, photos, "--out", out)
    assert said == (0, "", f"{N_PICTURES} images labelled, 0 skipped: {out}\n") and out.exists()
    said = call("predict", run, photos, "--out", out, "--json", "-q")
    assert json.loads(said.out) == {"labelled": N_PICTURES, "skipped": 0, "out": str(out)} and said.err == ""
    one = call("predict", run, photos / "a" / "00.jpg")
    assert one.out.splitlines()[1].startswith("00.jpg,")


def test_pictures_are_sorted(tmp_path, tmp_path_factory):
    run, _ = pictures_run(tmp_path_factory, tmp_path)
    said = call("export", run, "--folders", tmp_path / "sorted")
    assert said == (0, "", f"{N_PICTURES} images in {tmp_path / 'sorted'}\n")
    assert call("export", run, "--folders", tmp_path / "linked", "--link", "-q") == (0, "", "")
    said = call("export", run, "--folders", tmp_path / "both", "--parquet", tmp_path / "t.parquet", "--embeddings")
    told = [f"{N_PICTURES} images in {tmp_path / name}\n" for name in ("both", "t.parquet")]
    assert said == (0, "", "".join(told))


def test_a_published_checkpoint_is_taken_in(tmp_path):
    from phyla.nets.resnet import EncoderSpec

    net = EncoderSpec(width=2).build(torch.Generator().manual_seed(0))
    state = {f"backbone.{name}": value for name, value in net.state_dict().items()}
    heads = {"cluster_head.0.weight": torch.zeros(10, 16), "cluster_head.0.bias": torch.zeros(10)}
    torch.save(state | heads, tmp_path / "model.pth.tar")
    said = call("import", tmp_path / "model.pth.tar", "--out", tmp_path / "mine", "--stem", "cifar", "--json")
    assert said.code == 0 and json.loads(said.out)["n_clusters"] == 10 and said.err == ""
    assert phyla.load(tmp_path / "mine").n_clusters == 10
    assert "kind: selflabel" in call("import", tmp_path / "model.pth.tar", "--out", tmp_path / "mine", "--stem",
                                     "cifar").out


def test_options_come_from_flags_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ['recipe = "scan-digits"', *(f'{key} = "{value}"' for key, value in SMALL.items())]
    Path("mine.toml").write_text("\n".join(lines) + "\n")
    assert call("pretrain", "mine.toml", "--limit", "40", "--seed", "5", "-q", "-k", "4").code == 0
    told = json.loads(Path("runs/scan-digits/run.json").read_text())
    assert told["options"]["pretrain"]["random_state"] == 5 and told["options"]["data"]["limit"] == 40
    assert told["options"]["cluster"]["n_clusters"] == 4 and told["n_images"] == {"train": 40}


def test_a_folder_gets_a_run_folder_of_its_own_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "my photos.old", 6)
    assert call("embed", "my photos.old/", "--classes", "2", *flags(**TINY_PICTURES), "-q").code == 0
    assert Path("runs/my photos.old-2/embeddings.npy").exists()


def test_scores_that_are_no_numbers_are_null(run):
    told = json.loads((run / "scores.json").read_text())
    told["scores"][0]["values"]["nmi"] = float("nan")
    (run / "scores.json").write_text(json.dumps(told))
    assert json.loads(call("show", run, "--json").out)["scores"][0]["values"]["nmi"] is None


# ── odd files among good ones ─────────────────────────────────────────────────────────────────────────────────────


def png_header(width: int, height: int) -> bytes:
    """Return a PNG file that claims a size and has next to nothing in it."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


ODD = ["with space.jpg", "ünï✓.jpg", "quote'\".jpg", *(["new\nline.jpg"] if os.name == "posix" else [])]


@pytest.fixture
def odd(tmp_path):
    """Return a folder with all that is found in folders."""
    photos = pictures(tmp_path / "photos", 9)
    for number, name in enumerate(ODD):
        picture(photos / "a" / name, number)
    picture(photos / "b" / "dot.png", 1, size=1)
    Image.fromarray(np.zeros((30, 20), np.uint8)).save(photos / "b" / "grey.PNG")
    whole_file = (photos / "a" / "00.jpg").read_bytes()
    (photos / "a" / "cut.jpg").write_bytes(whole_file[: len(whole_file) // 2])
    (photos / "b" / "zero.jpg").write_bytes(b"")
    (photos / "c" / "bomb.png").write_bytes(png_header(30_000, 20_000))
    (photos / "c" / "text.jpg").write_text("text")
    (photos / "c" / "notes.txt").write_text("not an image, and not called one")
    if os.name == "posix":
        (photos / "c" / "loop").symlink_to(photos)
        (photos / "c" / "self").symlink_to(photos / "c" / "self")
        (photos / "c" / "broken.jpg").symlink_to(photos / "nothing.jpg")
    return photos


def test_odd_files_are_skipped_by_name_and_odd_names_are_kept(odd, tmp_path):
    run = tmp_path / "run"
    said = call("cluster", odd, "--classes", "3", *flags(**TINY_PICTURES), "--out", run, "-q")
    names = ["a/cut.jpg", "b/zero.jpg", "c/bomb.png", "c/text.jpg", *(["c/broken.jpg"] if os.name == "posix" else [])]
    assert said.code == 0 and said.out == ""
    skipped = [line for line in said.err.splitlines() if line.startswith("warning: skipped ")]
    assert sorted(line.split("'")[1] for line in skipped) == sorted(names)
    assert "is damaged" in said.err and "is empty" in said.err and "30000 x 20000 pixels" in said.err
    ids = [row["id"] for row in table(run / "assignments.csv")]
    assert {f"a/{name}" for name in ODD} | {"b/dot.png", "b/grey.PNG"} <= set(ids) and len(ids) == 9 + len(ODD) + 2
    again = call("predict", run, odd, "--out", tmp_path / "again.csv", "-q")
    assert again.code == 0 and again.err.splitlines() == skipped
    assert [row["id"] for row in table(tmp_path / "again.csv")] == ids
    assert "'c/bomb.png'" not in call("cluster", run, "--limit", "3", "-q").err  # of fewer files fewer are skipped


def test_strict_stops_at_the_first_of_them(odd, tmp_path):
    said = call("embed", odd, "--classes", "3", *flags(**TINY_PICTURES), "--out", tmp_path / "run", "--strict", "-q")
    assert said.code == 2 and len(said.err.splitlines()) == 1
    assert said.err.startswith("error: 'a/cut.jpg' is damaged") and "leave out --strict" in said.err


# ── mistakes ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """Stand in a folder with some things that are not what they should be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHYLA_DATA", str(tmp_path / "empty"))
    monkeypatch.setenv("PHYLA_CACHE", str(tmp_path / "empty"))
    pictures(tmp_path / "photos", 4)
    for name in ("empty", "texts"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad.toml").write_text("recipe = scan")
    (tmp_path / "odd.toml").write_text('recipe = "scan-digits"\n[clustr]\nlr = 1')
    return tmp_path


MISTAKES = {
    "empty folder": ("run empty -k 2", "no image in .*empty.*looked through all its folders"),
    "folder of text": ("run texts -k 2", "no image in .*texts"),
    "missing folder": ("run nowhere/ -k 2", "there is no folder or file nowhere/.*check the path"),
    "no classes": ("run photos", "how many classes.*phyla run photos --classes 10"),
    "classes 0": ("run photos -k 0", "at least 1, got 0.*--classes 10"),
    "classes below 0": ("run photos --classes=-2", "at least 1, got -2"),
    "classes above images": ("run photos -k 5", "4 images are fewer than the 5 classes.*lower --classes or add images"),
    "classes no number": ("run photos -k many", "--classes"),
    "limit 0": ("run scan-digits --limit 0", "at least 2, got 0"),
    "one image": ("run photos/a/00.jpg -k 2", "is one image.*give its folder"),
    "seed": ("run scan-digits --seed=-1", "seed must be from 0"),
    "size": ("run photos -k 2 --size 0", "size=0"),
    "recipe": ("run scan-cifr10", r"no recipe 'scan-cifr10'.*did you mean scan-cifar10\?"),
    "nothing of this name": ("run nosuch", "there is no folder, file or recipe 'nosuch'"),
    "recipe without images": ("run scan-folder", "which images.*phyla run FOLDER"),
    "data set": ("run digits", "did you mean ruc-digits"),
    "option": ("run scan-digits --set cluster.entropy_wieght=2", "no option 'cluster.entropy_wieght'.*entropy_weight"),
    "value": ("run scan-digits --set cluster.optimizer=adm", "did you mean adam"),
    "number": ("run scan-digits --set cluster.lr=fast", "cluster.lr=fast is not a number"),
    "set": ("run scan-digits --set cluster.lr", "--set cluster.lr has no value.*STAGE.OPTION=VALUE"),
    "set nothing": ("run scan-digits --set =", "names no stage"),
    "range": ("run scan-digits --limit 20 --set pretrain.temperature=0", "temperature must be above 0"),
    "flag": ("run --clases 3", "--clases.*--classes"),
    "verb": ("runn", "runn.*run"),
    "list": ("list recipe", "recipe.*recipes"),
    "argument": ("predict", "RUN"),
    "device": ("run scan-digits --device gpu", "device 'gpu' is not known.*allowed: auto, cpu"),
    "precision": ("run scan-digits --precision fp8", "precision 'fp8' is not known"),
    "toml": ("run bad.toml", "bad.toml is not TOML.*line 1"),
    "toml option": ("run odd.toml", "did you mean cluster"),
    "missing toml": ("run mine.toml", "there is no folder or file mine.toml"),
    "labels": ("run scan-digits --labels nowhere.csv", "there is no table of labels .*nowhere.csv"),
    "data": ("run scan-cifar10 --offline", "CIFAR-10, split train: no .*--data or PHYLA_DATA"),
    "checkpoint": ("run scan-imagenet50 --offline", "there is no moco_v2_800ep_pretrain.pth.tar.*pretrain.path=FILE"),
    "foreign out": ("run scan-digits --out photos", "photos is not empty and not a run folder.*another --out"),
    "file as out": ("run scan-digits --out file", "file cannot be a run folder.*another --out"),
    "out below a file": ("run scan-digits --out file/a/b", "a file is in the way.*another --out"),
    "report of nothing": ("report empty", "empty is not a run folder"),
    "show nothing": ("show nowhere", "no recipe 'nowhere'"),
    "show a folder": ("show photos", "photos is not a run folder"),
    "predict without a run": ("predict photos photos", "photos holds no classifier.*finished run"),
    "export without a run": ("export empty --folders new", "empty holds no finished run"),
    "export nothing": ("export empty", "nothing to export.*--onnx FILE"),
    "export a network without a run": ("export empty --onnx new.onnx", "empty holds no classifier"),
    "export a table of another kind": ("export empty --parquet new.csv", "cannot write a Parquet table to 'new.csv'"),
    "import nothing": ("import nowhere.pth.tar --out new", "there is no checkpoint nowhere.pth.tar"),
    "import text": ("import bad.toml --out new --stem cifr", "stem='cifr' is not known.*did you mean cifar"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_in_one_line_that_says_what_to_do(scene, name):
    words, wanted = MISTAKES[name]
    said = call(*words.split())
    assert re.search(wanted, said.error()), said.err
    assert said.out == "" and len(said.err.splitlines()) == 1


def test_a_name_with_a_line_break_stays_on_the_line(scene):
    assert "no\\nwhere/" in call("run", "no\nwhere/", "-k", "2").error()


def test_what_a_run_has_is_not_touched_by_a_mistake(run):
    before = stage_files(run)
    for words in (["--classes", 0], ["--classes", 999], ["--set", "cluster.lr=fast"], ["--limit", 1]):
        said = call("run", run, *words)
        said.error()
    other = call("run", "scan-cifar10", "--offline", "--out", run)
    assert "holds another run: recipe 'scan-digits' (now 'scan-cifar10')" in other.error()
    assert stage_files(run) == before and "nothing to do" in call("run", run).err


def test_predictions_that_cannot_be_written_are_told(tmp_path, tmp_path_factory):
    run, photos = pictures_run(tmp_path_factory, tmp_path)
    (tmp_path / "file").write_text("x")
    said = call("predict", run, photos, "--out", tmp_path / "file" / "labels.csv")
    assert said.code != 0 and len(said.err.splitlines()) == 1 and "its folder is a file" in said.err
    assert "cannot write a table to 'labels.xls'" in call("predict", run, photos, "--out", "labels.xls").error()


# ── failures ──────────────────────────────────────────────────────────────────────────────────────────────────────


def broken(path: Path) -> None:
    held = path.read_bytes()
    path.write_bytes(held[:30] if path.suffix == ".json" else held[:30] + b"!" + held[31:])


@pytest.mark.parametrize("damaged", ["encoder.safetensors", "done.json", "train.npy", "model.safetensors"])
def test_a_damaged_file_is_named_and_its_hint_mends_it(run, damaged):
    before = stage_files(run)
    stage = "pretrain" if damaged in ("encoder.safetensors", "done.json") else "refine"
    path = next(run.glob(f"stages/{stage}-*/{damaged}"))
    broken(path)
    said = call(*whole("--out", run, "-q"))
    line = said.error(1)
    assert str(path) in line and f"delete {path.parent} and give the command again" in line
    shutil.rmtree(path.parent)
    assert call(*whole("--out", run, "-q")).code == 0
    assert stage_files(run) == before


def test_a_damaged_checkpoint_is_named_and_its_hint_mends_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    command = ["cluster", "scan-digits", "--limit", N_DIGITS, *flags(), "--out", tmp_path / "new", "-q"]
    interrupted(monkeypatch, "cluster", command)
    path = next(tmp_path.glob("new/stages/cluster-*/checkpoint.pt"))
    path.write_bytes(path.read_bytes()[:200])
    line = call(*command).error(1)
    assert str(path) in line and "delete it" in line
    path.unlink()
    assert call(*command).code == 0
    assert stage_files(tmp_path / "new").items() <= stage_files(run).items()


def interrupted(monkeypatch, stage: str, command: list[object]):
    """Run a command that gets a Ctrl-C at the second step of a stage, and return what it said."""
    real = loop.Loop.watch

    def watch(self, loss, index):
        if self.name == stage and index == 1:
            signal.raise_signal(signal.SIGINT)
        return real(self, loss, index)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Loop, "watch", watch)
        return call(*command)


def test_control_c_is_one_line_and_the_next_run_goes_on(run, tmp_path, monkeypatch):
    command = ["cluster", "scan-digits", "--limit", N_DIGITS, *flags(), "--out", tmp_path / "new", "-q"]
    said = interrupted(monkeypatch, "cluster", command)
    assert said == (130, "", "stopped; give the same command again to go on where it was\n")
    assert call(*command).code == 0
    assert stage_files(tmp_path / "new").items() <= stage_files(run).items()


def test_a_loss_that_is_not_finite_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("phyla.cluster.scan.EPSILON", float("nan"))
    said = call("cluster", "scan-digits", "--limit", N_DIGITS, *flags(), "--out", tmp_path / "run", "-q")
    assert "cluster: the loss is not finite at step 0" in said.error(1) and len(said.err.splitlines()) == 1


def test_an_error_of_the_system_is_one_line(monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("phyla.inventory.found_splits", refuse)
    assert call("list") == (1, "", "error: /some/file: Permission denied\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("phyla.inventory.found_splits", fail)
    monkeypatch.setattr(sys, "argv", ["phyla", "list"])
    with pytest.raises(ZeroDivisionError), redirect_stderr(io.StringIO()):
        main()


def test_a_reader_that_goes_away_is_no_error(tmp_path, tmp_path_factory):
    run, photos = pictures_run(tmp_path_factory, tmp_path)
    child = subprocess.Popen([sys.executable, "-m", "phyla", "predict", str(run), str(photos)], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    child.stdout.close()
    with child.stderr as errors:
        said = errors.read()
    assert child.wait(timeout=120) == 0 and said == ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_below_stdout_is_one_line():
    with Path("/dev/full").open("w") as full:
        child = subprocess.run([sys.executable, "-m", "phyla", "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert child.returncode == 1 and child.stderr == "error: No space left on device\n"


# ── several processes ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def started(monkeypatch):
    """Return the calls of ``launch``, none of which starts anything; each ends with code 7."""
    calls = []
    for name in ("RANK", "WORLD_SIZE", "PHYLA_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("phyla.launch.launch", lambda *given: calls.append(given) or 7)
    return calls


@pytest.mark.parametrize("verb", ["run", "pretrain", "embed", "neighbors", "cluster", "refine", "evaluate"])
def test_devices_start_the_same_command_so_many_times(started, verb):
    said = call(verb, "scan-digits", "--devices", "2", "--seed=3")
    assert said == (7, "", "") and started == [([verb, "scan-digits", "--devices", "2", "--seed=3"], 2)]


def test_none_or_too_many_devices_are_refused(started, monkeypatch):
    assert "'--devices'" in call("run", "--devices", "0").error()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "leave out --devices" in call("run", "--devices", "2").error()
    assert started == []


@pytest.mark.parametrize(("option", "wanted"), [("--engine=graph", "needs CUDA"), ("--engine=fast", "is not known"),
                                                ("--batchnorm=none", "allowed: synced, local")])
def test_an_engine_or_batchnorm_that_cannot_be_is_refused(tmp_path, option, wanted):
    said = call("run", "scan-digits", "--device", "cpu", option, "--out", tmp_path / "run")
    assert wanted in said.error() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("error", "rank", "launched", "told"), [
    (InputError("x"), 0, False, (2, "error: x\n")),
    (InputError("x"), 1, False, (2, "")),  # the first process tells it
    (InputError("x"), 1, True, (2, "error: x\n")),  # and where we started them, whoever is to blame
    (NonFiniteLossError("x"), 1, False, (1, "")),
    (StorageError("x"), 1, False, (1, "error: x\n")),
    (ElsewhereError(0, 2), 1, False, (2, "")),
    (ElsewhereError(1, 2), 0, True, (LOST, "")),
    (LostProcessError("x"), 1, False, (1, "error: x\n")),
    (LostProcessError("x"), 0, True, (LOST, "")),
    (KeyboardInterrupt(), 1, False, (130, "")),
])
def test_of_several_processes_one_tells_an_error(monkeypatch, capsys, error, rank, launched, told):
    def command(**_):
        raise error

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("PHYLA_LAUNCHED", raising=False)
    if launched:
        monkeypatch.setenv("PHYLA_LAUNCHED", "1")
    assert (_guarded(command, PhylaError), capsys.readouterr().err) == told


def test_fast_is_an_option_of_every_verb_of_the_chain(tmp_path):
    command = ["pretrain", "nnm-digits", "--limit", N_DIGITS, *FEW, "--fast", "--out", tmp_path / "run", "-q"]
    assert call(*command).code == 0
    options = json.loads((tmp_path / "run" / "options.json").read_text())["options"]
    assert options["cluster"]["forwards"] == "fused"


FEW = [part for key in ("pretrain.encoder.width", "pretrain.n_epochs", "pretrain.batch_size")
       for part in ("--set", f"{key}={SMALL[key]}")]
