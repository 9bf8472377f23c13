"""Many images labelled in shards: the same file however often it was stopped, and whoever made its parts."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from commands import call, picture, pictures, table
from phyla import labelling
from phyla.classifier import Classifier
from phyla.embed import forward_all
from phyla.errors import CorruptFileError, InputError
from phyla.images.augment import Views
from phyla.images.sources import open_images
from phyla.labelling import Share, label_files, share_from
from phyla.nets.heads import ClusterHeads, ClusterNet
from phyla.nets.resnet import EncoderSpec
from phyla.prediction import predict_table
from phyla.randomness import generator
from phyla.rundir import load_embeddings
from phyla.training.device import Device
from phyla.training.group import Group

N = 22


@pytest.fixture
def classifier(tmp_path) -> Classifier:
    """Return a classifier of 12-pixel pictures into four clusters, saved in ``run``."""
    net = ClusterNet(EncoderSpec(width=4).build(generator(0, "test")), ClusterHeads(32, 4))
    net.heads.initialise(generator(1, "test"))
    made = Classifier(net, Views("plain", 8), 12)
    made.save(tmp_path / "run")
    return made


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Return a folder of 22 pictures, two of which cannot be read, cut into shards of eight."""
    monkeypatch.setattr(labelling, "SHARD", 8)
    monkeypatch.setattr(labelling, "CHUNK", 4)
    folder = pictures(tmp_path / "photos", N)
    (folder / "a" / "03.jpg").write_bytes(b"")
    (folder / "c" / "20.jpg").write_text("text")
    return folder


def undisturbed(classifier: Classifier, photos, folder) -> dict[str, bytes]:
    """Return the files that come of a work that nothing disturbs."""
    folder.mkdir()
    label_files(classifier, photos, folder / "t.csv", embeddings=folder / "e.npy")
    assert {path.name for path in folder.iterdir()} == {"t.csv", "e.npy", "e.ids.json"}
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def counted(monkeypatch) -> list[str]:
    """Return the ids of the files that are decoded from now on."""
    real, seen = Classifier.output_stream, []

    def counting(self, files, **options):
        files = list(files)
        seen.extend(file.id for file in files)
        return real(self, files, **options)

    monkeypatch.setattr(Classifier, "output_stream", counting)
    return seen


# ── what comes of it ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet"])
def test_a_table_is_that_of_one_pass(classifier, photos, tmp_path, name, capsysbinary):
    told = label_files(classifier, photos, tmp_path / name)
    assert told == {"labelled": N - 2, "skipped": 2, "out": str(tmp_path / name)}
    predict_table(classifier, photos, None)
    if name == "t.csv":
        rows = table(tmp_path / name)
        (tmp_path / "stdout.csv").write_bytes(capsysbinary.readouterr().out)
        assert [row["id"] for row in rows] == [row["id"] for row in table(tmp_path / "stdout.csv")]
        assert [row["cluster"] for row in rows] == [row["cluster"] for row in table(tmp_path / "stdout.csv")]
    assert not list(tmp_path.glob(".*"))


def test_embeddings_are_what_the_head_sees_in_the_order_of_the_table(classifier, photos, tmp_path):
    label_files(classifier, photos, tmp_path / "t.csv", embeddings=tmp_path / "e.npy")
    held = load_embeddings(tmp_path, "e")
    assert list(held.ids) == [row["id"] for row in table(tmp_path / "t.csv")] and held.values.dtype == np.float32
    images = open_images(photos, size=12).images
    expected = forward_all(images, classifier.net, classifier.net.embed, classifier.views)
    np.testing.assert_allclose(held.values, expected.numpy(), rtol=1e-4, atol=1e-5)
    label_files(classifier, photos, None, embeddings=tmp_path / "alone.npy")
    assert (tmp_path / "alone.npy").read_bytes() == (tmp_path / "e.npy").read_bytes()


@pytest.mark.parametrize(("out", "embeddings", "told"), [
    ("t.xls", None, r"cannot write a table to 't\.xls'"), ("t.csv", "e.txt", r"cannot write embeddings to 'e\.txt'"),
    (None, None, "shards need a file to become")])
def test_a_file_of_an_unknown_kind_is_refused_before_the_work(classifier, tmp_path, out, embeddings, told):
    with pytest.raises(InputError, match=told):
        label_files(classifier, tmp_path / "nowhere", tmp_path / out if out else None,
                    embeddings=tmp_path / embeddings if embeddings else None)


def test_a_whole_shard_of_damaged_files_and_nothing_else(classifier, photos, tmp_path):
    for path in sorted(photos.rglob("*.jpg"))[:8]:
        path.write_bytes(b"")
    told = label_files(classifier, photos, tmp_path / "t.csv", embeddings=tmp_path / "e.npy")
    assert told["labelled"] == N - 9 == len(table(tmp_path / "t.csv")) == len(np.load(tmp_path / "e.npy"))
    for path in photos.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=rf"none of the {N} images of .*photos can be read"):
        label_files(classifier, photos, tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists() and not list(tmp_path.glob(".*"))


# ── a stop in the middle ──────────────────────────────────────────────────────────────────────────────────────────


CHILD = """
import os, signal, sys
from phyla import embed, labelling, shards
embed.SHARD = labelling.SHARD = 8
labelling.CHUNK = 4
moment, real = int(sys.argv.pop(1)), shards.Shards.write
def dying(self, shard, **arrays):
    if shard == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, shard, **arrays)
shards.Shards.write = dying
from phyla.cli import main
main()
"""


def killed(moment: int, *command: object) -> None:
    """Run a command in a process that kills itself as it writes a shard."""
    ended = subprocess.run([sys.executable, "-c", CHILD, str(moment), *map(str, command)], capture_output=True,
                           text=True, timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_prediction_goes_on_to_the_same_files(classifier, photos, tmp_path, monkeypatch):
    expected = undisturbed(classifier, photos, tmp_path / "whole")
    out = tmp_path / "killed"
    command = ("predict", tmp_path / "run", photos, "--out", out / "t.csv", "--embeddings", out / "e.npy")
    killed(2, *command)
    assert [path.name for path in out.iterdir()] == [".t.csv.shards"]
    made = {path: path.stat().st_mtime_ns for path in (out / ".t.csv.shards").glob("*.npz")}
    assert len(made) == 2
    decoded = counted(monkeypatch)
    monkeypatch.setattr(labelling.Shards, "remove", lambda shards: None)
    assert call(*command).code == 0
    assert len(decoded) == N - 16, "finished shards are not made again"
    assert {path: path.stat().st_mtime_ns for path in made} == made
    shutil.rmtree(out / ".t.csv.shards")
    assert files_of(out) == expected


def test_an_interrupt_and_a_damaged_shard_cost_no_more(classifier, photos, tmp_path, monkeypatch):
    expected = undisturbed(classifier, photos, tmp_path / "whole")
    out = tmp_path / "stopped"
    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(labelling, "_join", lambda *told, **more: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            label_files(classifier, photos, out / "t.csv", embeddings=out / "e.npy")
    next((out / ".t.csv.shards").glob("00001-*.npz")).write_bytes(b"")
    with pytest.raises(CorruptFileError, match=r"00001-\w+\.npz cannot be read.*delete it"):
        label_files(classifier, photos, out / "t.csv", embeddings=out / "e.npy")
    next((out / ".t.csv.shards").glob("00001-*.npz")).unlink()
    decoded = counted(monkeypatch)
    label_files(classifier, photos, out / "t.csv", embeddings=out / "e.npy")
    assert len(decoded) == 8 and files_of(out) == expected


def stopped(classifier, photos, out, monkeypatch) -> None:
    """Make all shards of a table, and stop before they are joined."""
    with monkeypatch.context() as patch:
        patch.setattr(labelling, "_join", lambda *told, **more: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            label_files(classifier, photos, out)


def test_a_changed_file_costs_its_shard_and_another_classifier_all(classifier, photos, tmp_path, monkeypatch):
    stopped(classifier, photos, tmp_path / "t.csv", monkeypatch)
    picture(photos / "a" / "03.jpg", 3)
    decoded = counted(monkeypatch)
    told = label_files(classifier, photos, tmp_path / "t.csv")
    assert len(decoded) == 8 and "a/03.jpg" in decoded and told["skipped"] == 1
    stopped(classifier, photos, tmp_path / "t.csv", monkeypatch)
    with torch.no_grad():
        classifier.net.heads.bias[0, 1] += 1
    decoded.clear()
    label_files(classifier, photos, tmp_path / "t.csv")
    assert len(decoded) == N


def test_strict_stops_at_a_file_that_an_earlier_command_left_out(classifier, photos, tmp_path, monkeypatch):
    stopped(classifier, photos, tmp_path / "t.csv", monkeypatch)
    with pytest.raises(CorruptFileError, match=r"'a/03\.jpg' is empty"):
        label_files(classifier, photos, tmp_path / "t.csv", strict=True)
    assert not (tmp_path / "t.csv").exists()


# ── shared ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_workers_make_the_same_files_and_the_last_one_joins(classifier, photos, tmp_path, monkeypatch):
    expected = undisturbed(classifier, photos, tmp_path / "whole")
    out = tmp_path / "shared"
    decoded = counted(monkeypatch)
    command = ("predict", tmp_path / "run", photos, "--out", out / "t.csv", "--embeddings", out / "e.npy", "--json")
    for share, n_images in (("2/2", 8), ("1/2", 14)):
        decoded.clear()
        said = call(*command, "--shard", share)
        assert said.code == 0 and len(decoded) == n_images
        assert json.loads(said.out)["labelled"] == (N - 2 if share == "1/2" else None)
    assert files_of(out) == expected


def test_a_command_without_a_share_makes_what_is_missing(classifier, photos, tmp_path, monkeypatch):
    expected = undisturbed(classifier, photos, tmp_path / "whole")
    out = tmp_path / "shared"
    label_files(classifier, photos, out / "t.csv", embeddings=out / "e.npy", share=(0, 3))
    decoded = counted(monkeypatch)
    label_files(classifier, photos, out / "t.csv", embeddings=out / "e.npy")
    assert len(decoded) == N - 8 and files_of(out) == expected


def test_workers_at_something_else_are_refused(classifier, photos, tmp_path):
    label_files(classifier, photos, tmp_path / "t.csv", share=(0, 2))
    with pytest.raises(InputError, match="give all workers the same arguments"):
        label_files(classifier, photos, tmp_path / "t.csv", embeddings=tmp_path / "e.npy", share=(1, 2))
    assert len(list((tmp_path / ".t.csv.shards").glob("*.npz"))) == 2


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2", "1/0", ""])
def test_a_share_is_one_of_so_many(text):
    with pytest.raises(InputError, match=r"--shard 1/8 to --shard 8/8"):
        share_from(text)


def test_shares_count_from_one():
    assert share_from("1/1") == (0, 1) and share_from("3/8") == (2, 8)


def test_a_share_needs_a_file(classifier, photos, tmp_path):
    error = call("predict", tmp_path / "run", photos, "--shard", "1/2").error()
    assert "shards need a file to become" in error


def _labelled(group: Group, run: str, photos: str, out: str, share: Share | None = None) -> dict[str, object]:
    labelling.SHARD, labelling.CHUNK = 8, 4
    from pathlib import Path

    device = Device(torch.device("cpu"), group=group, channels_last=True)
    return label_files(Classifier.load(run), Path(photos), Path(out) / "t.csv", embeddings=Path(out) / "e.npy",
                       device=device, share=share)


def test_processes_share_the_shards(classifier, photos, tmp_path, processes):
    device = Device(torch.device("cpu"), channels_last=True)
    (tmp_path / "whole").mkdir()
    label_files(classifier, photos, tmp_path / "whole" / "t.csv", embeddings=tmp_path / "whole" / "e.npy",
                device=device)
    told = processes.run(_labelled, str(tmp_path / "run"), str(photos), str(tmp_path / "group"))
    assert [found["labelled"] for found in told] == [N - 2, None]
    assert files_of(tmp_path / "group") == files_of(tmp_path / "whole")


def test_a_machine_of_several_processes_shares_its_share(classifier, photos, tmp_path, processes):
    expected = undisturbed(classifier, photos, tmp_path / "whole")
    out = tmp_path / "shared"
    told = processes.run(_labelled, str(tmp_path / "run"), str(photos), str(out), (0, 2))
    assert [each["labelled"] for each in told] == [None, None]
    label_files(classifier, photos, out / "t.csv", embeddings=out / "e.npy", share=(1, 2))  # of one process
    assert files_of(out) == expected
