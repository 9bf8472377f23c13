"""The run folder: whose it is, what a stage finds again and what it makes, and what a damaged file is answered with."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch

from phyla.errors import CorruptFileError, ElsewhereError, InputError, StorageError
from phyla.nets.heads import Projection
from phyla.nets.resnet import EncoderSpec
from phyla.rundir import (
    MARKER,
    RunDir,
    _workplace,
    is_placed,
    load_assignment,
    load_embeddings,
    load_encoder,
    load_neighbors,
    load_records,
    place,
    save_assignment,
    save_embeddings,
    save_encoder,
    save_neighbors,
    save_records,
)
from phyla.training.group import Group
from phyla.types import Assignment, Embeddings, Neighbors

IDENTITY = {"format": 1, "recipe": "scan-digits", "source": "digits"}


def maker(calls, text="made"):
    def make(folder):
        calls.append(folder.name)
        (folder / "out.txt").write_text(text)
        return {"fact": 3}

    return make


# ── whose it is ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_folder_is_marked_and_known_again(tmp_path):
    out = tmp_path / "deep" / "run"
    RunDir(out, IDENTITY)
    assert json.loads((out / MARKER).read_text()) == IDENTITY
    RunDir(out, IDENTITY).stage("neighbors", {}, [], lambda folder: {})
    with pytest.raises(InputError, match=r"another run: recipe 'scan-digits' \(now 'scan-stl10'\).*another --out"):
        RunDir(out, IDENTITY | {"recipe": "scan-stl10"})
    assert json.loads((out / MARKER).read_text()) == IDENTITY


def test_a_folder_in_which_nothing_was_made_claims_nothing(tmp_path):
    RunDir(tmp_path, IDENTITY | {"source": "mnist"})
    (tmp_path / "stages" / "embed-1").mkdir(parents=True)  # begun, and failed
    RunDir(tmp_path, IDENTITY)
    assert json.loads((tmp_path / MARKER).read_text()) == IDENTITY


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match=r"is not empty and not a run folder.*another --out"):
        RunDir(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_hidden_files_do_not_make_a_folder_somebody_elses(tmp_path):
    (tmp_path / ".DS_Store").write_bytes(b"x")
    RunDir(tmp_path, IDENTITY)
    assert (tmp_path / MARKER).exists() and (tmp_path / ".DS_Store").exists()


@pytest.mark.parametrize("below", ["file", "file/run", "file/a/b"])
def test_a_file_in_the_way_is_told(tmp_path, below):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(InputError, match="cannot be a run folder: a file is in the way"):
        RunDir(tmp_path / below, IDENTITY)


@pytest.mark.parametrize(("number", "kind"), [(errno.EACCES, InputError), (errno.EROFS, InputError),
                                              (errno.ENOSPC, StorageError)])
@pytest.mark.parametrize("call", ["mkdir", "write_bytes"])
def test_a_place_that_cannot_be_written_is_told(tmp_path, monkeypatch, number, kind, call):
    def refuse(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(f"pathlib.Path.{call}", refuse)
    with pytest.raises(kind, match=r"hint: (choose another --out|free some space)") as raised:
        RunDir(tmp_path / "run", IDENTITY)
    assert raised.value.exit_code == (2 if kind is InputError else 1) and str(tmp_path / "run") in str(raised.value)


def test_a_damaged_marker_is_named_and_mended_by_its_hint(tmp_path):
    run = RunDir(tmp_path, IDENTITY)
    run.stage("embed", {}, [], maker([]))
    (tmp_path / "options.json").write_text("{}")
    (tmp_path / MARKER).write_text("{")
    with pytest.raises(CorruptFileError, match=rf"{MARKER} is not readable JSON.*delete it"):
        RunDir(tmp_path, IDENTITY)
    (tmp_path / MARKER).unlink()
    assert RunDir(tmp_path, IDENTITY).stage("embed", {}, [], maker([])).was_kept


def test_what_killed_writers_left_is_swept(tmp_path):
    RunDir(tmp_path, IDENTITY).stage("embed", {}, [], maker([]))
    left = [tmp_path / ".run.json.77.part", next(tmp_path.glob("stages/embed-*")) / ".train.npy.77.part"]
    for path in left:
        path.write_bytes(b"half")
    RunDir(tmp_path, IDENTITY)
    assert not any(path.exists() for path in left)


# ── stages ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stage_is_made_once_for_its_options_and_inputs(tmp_path):
    calls = []
    for option, given in [(1, "x"), (1, "x"), (2, "x"), (1, "y"), (1, "x")]:
        stage = RunDir(tmp_path, IDENTITY).stage("embed", {"a": option}, [given], maker(calls))
        assert stage.facts["fact"] == 3 and stage.facts["seconds"] >= 0
        assert (stage.folder / "out.txt").read_text() == "made"
    assert len(calls) == 3 == len(set(calls)) and stage.was_kept
    assert RunDir(tmp_path, IDENTITY).stage("neighbors", {"a": 1}, ["x"], maker(calls)).key != stage.key


def test_a_stage_that_failed_is_not_there(tmp_path):
    def fail(folder):
        (folder / "out.txt").write_text("half")
        raise KeyboardInterrupt

    run = RunDir(tmp_path, IDENTITY)
    with pytest.raises(KeyboardInterrupt):
        run.stage("embed", {}, [], fail)
    assert "embed" not in run.stages
    assert not RunDir(tmp_path, IDENTITY).stage("embed", {}, [], maker([])).was_kept


def test_a_finished_stage_keeps_no_checkpoint(tmp_path):
    def make(folder):
        (folder / "checkpoint.pt").write_bytes(b"state")
        return {}

    stage = RunDir(tmp_path, IDENTITY).stage("pretrain", {}, [], make)
    assert [path.name for path in stage.folder.iterdir()] == ["done.json"]
    (stage.folder / "checkpoint.pt").write_bytes(b"state")  # killed between the two
    RunDir(tmp_path, IDENTITY).stage("pretrain", {}, [], make)
    assert not (stage.folder / "checkpoint.pt").exists()


def test_some_stages_may_not_be_made_and_some_are_made_again(tmp_path):
    calls, run = [], RunDir(tmp_path, IDENTITY)
    run.stage("embed", {}, [], maker(calls))
    run.may_make, run.remake = {"report"}, {"report"}
    assert run.stage("embed", {}, [], maker(calls)).was_kept
    assert not run.stage("report", {}, [], maker(calls)).was_kept
    assert not run.stage("report", {}, [], maker(calls, "again")).was_kept
    assert (run.stages["report"].folder / "out.txt").read_text() == "again"
    with pytest.raises(InputError, match=rf"the cluster stage of .* is not done.*phyla run {tmp_path}"):
        run.stage("cluster", {}, [], maker(calls))
    assert len(calls) == 3


def test_a_stage_that_another_run_has_is_taken(tmp_path):
    calls, theirs = [], RunDir(tmp_path / "theirs", IDENTITY)
    lent = theirs.stage("pretrain", {"a": 1}, ["x"], maker(calls))
    run = RunDir(tmp_path / "own", IDENTITY | {"recipe": "nnm-digits"})
    run.lenders = (tmp_path / "nobody", tmp_path / "own", tmp_path / "theirs")
    taken = run.stage("pretrain", {"a": 1}, ["x"], maker(calls))
    assert taken.was_kept and taken.facts == lent.facts and len(calls) == 1
    assert (taken.folder / "out.txt").read_text() == "made" and taken.folder.parent.parent == tmp_path / "own"
    assert not run.stage("pretrain", {"a": 2}, ["x"], maker(calls)).was_kept
    assert not run.stage("pretrain", {"a": 1}, ["y"], maker(calls)).was_kept
    run.remake = {"pretrain"}
    assert not run.stage("pretrain", {"a": 1}, ["x"], maker(calls, "again")).was_kept
    assert (lent.folder / "out.txt").read_text() == "made"


def test_a_stop_while_a_stage_is_taken_leaves_none_half(tmp_path, monkeypatch):
    RunDir(tmp_path / "theirs", IDENTITY).stage("embed", {}, [], maker([]))
    run = RunDir(tmp_path / "own", IDENTITY)
    run.lenders = (tmp_path / "theirs",)

    def stopped(source, target):
        if source.name == "done.json":
            raise KeyboardInterrupt
        place(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("phyla.rundir.place", stopped)
        run.stage("embed", {}, [], maker([]))
    assert [path.name for path in (tmp_path / "own").glob("stages/*/*")] == ["out.txt"]
    assert run.stage("embed", {}, [], maker([])).was_kept


@pytest.mark.parametrize("harm", ["change", "delete", "done", "unfinished"])
def test_a_stage_that_another_run_has_damaged_is_made(tmp_path, harm):
    lent = RunDir(tmp_path / "theirs", IDENTITY).stage("embed", {}, [], maker([]))
    out, done = lent.folder / "out.txt", lent.folder / "done.json"
    {"change": lambda: out.write_text("mads"), "delete": out.unlink, "done": lambda: done.write_text("null"),
     "unfinished": done.unlink}[harm]()
    run = RunDir(tmp_path / "own", IDENTITY)
    run.lenders = (tmp_path / "theirs",)
    assert not run.stage("embed", {}, [], maker([])).was_kept


@pytest.mark.parametrize("harm", ["change", "delete", "done", "done {}", "done null"])
def test_a_damaged_stage_is_named_and_mended_by_its_hint(tmp_path, harm):
    stage = RunDir(tmp_path, IDENTITY).stage("embed", {}, [], maker([]))
    out, done = stage.folder / "out.txt", stage.folder / "done.json"
    if harm == "change":
        out.write_text("mads")
    elif harm == "delete":
        out.unlink()
    else:
        done.write_text(harm.removeprefix("done").strip() or '{"key": ')
    with pytest.raises(CorruptFileError) as raised:
        RunDir(tmp_path, IDENTITY).stage("embed", {}, [], maker([]))
    assert str(out if harm in ("change", "delete") else done) in raised.value.message
    assert f"delete {stage.folder} and give the command again" in raised.value.hint
    shutil.rmtree(stage.folder)
    assert not RunDir(tmp_path, IDENTITY).stage("embed", {}, [], maker([])).was_kept


def test_a_stage_of_before_digests_is_taken_as_it_is(tmp_path):
    stage = RunDir(tmp_path, IDENTITY).stage("embed", {}, [], maker([]))
    told = json.loads((stage.folder / "done.json").read_text())
    told.pop("files")
    (stage.folder / "done.json").write_text(json.dumps(told))
    assert RunDir(tmp_path, IDENTITY).stage("embed", {}, [], maker([])).was_kept


# ── arrays ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_arrays_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    ids = ["a b.jpg", "ü\n.jpg", "c,d.jpg"]
    embeddings = Embeddings(rng.normal(size=(3, 4)).astype(np.float32), ids)
    neighbors = Neighbors(np.array([[1], [2], [0]]), rng.random((3, 1), np.float32))
    assignment = Assignment(np.full((3, 2), 0.5, np.float32), ids)
    save_embeddings(tmp_path, embeddings)
    save_neighbors(tmp_path, neighbors)
    save_assignment(tmp_path, assignment, "train")
    assert load_embeddings(tmp_path).fingerprint == embeddings.fingerprint
    assert load_neighbors(tmp_path).fingerprint == neighbors.fingerprint
    np.testing.assert_array_equal(load_neighbors(tmp_path).similarities, neighbors.similarities)
    np.testing.assert_array_equal(load_assignment(tmp_path, "train").probabilities, assignment.probabilities)
    assert load_assignment(tmp_path, "train").ids == ids


@pytest.mark.parametrize("with_projection", [True, False])
def test_an_encoder_comes_back_as_it_was(tmp_path, with_projection):
    encoder = EncoderSpec(width=2).build(torch.Generator().manual_seed(0)).eval()
    projection = Projection(16, 5) if with_projection else None
    save_encoder(tmp_path, encoder, projection)
    again, projected = load_encoder(tmp_path)
    assert again.spec == encoder.spec and not again.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in encoder.state_dict().items())
    if projection is None:
        assert projected is None
    else:
        assert all(torch.equal(value, projected.state_dict()[name]) for name, value in projection.state_dict().items())
    if os.name == "posix":  # readable for whoever may read the rest
        assert (tmp_path / "encoder.safetensors").stat().st_mode == (tmp_path / "encoder.json").stat().st_mode


LOADERS = {"encoder.safetensors": load_encoder, "encoder.json": load_encoder, "train.npy": load_embeddings,
           "train.ids.json": load_assignment, "near.npy": load_neighbors, "near.similarities.npy": load_neighbors}


@pytest.mark.parametrize("harm", [None, b"", b"\x93NUMPY", b"{}", b"null", b"[1", b"\xff\xfe\x00"])
@pytest.mark.parametrize("name", LOADERS)
def test_a_damaged_array_is_one_line_with_what_to_delete(tmp_path, name, harm):
    folder = tmp_path / "stages" / "x-1"
    folder.mkdir(parents=True)
    save_encoder(folder, EncoderSpec(width=1).build(), None)
    save_assignment(folder, Assignment(np.ones((2, 1), np.float32), ["a", "b"]), "train")
    save_neighbors(folder, Neighbors(np.array([[1], [0]]), np.ones((2, 1), np.float32)), "near")
    if harm is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(harm)
    loader = LOADERS[name]
    with pytest.raises(CorruptFileError, match=f"delete {folder} and give the command again") as raised:
        loader(folder) if loader is load_encoder else loader(folder, name.split(".")[0])
    assert str(folder) in raised.value.message and "\n" not in str(raised.value)


def test_records_come_back_and_a_damaged_line_is_told(tmp_path):
    records = [{"stage": "pretrain", "loss": 1.5}, {"stage": "cluster", "loss": float("inf")}]
    save_records(tmp_path / "metrics.jsonl", records)
    assert load_records(tmp_path / "metrics.jsonl") == records
    assert load_records(tmp_path / "none.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(CorruptFileError, match=r"metrics.jsonl cannot be read .*delete"):
        load_records(tmp_path / "metrics.jsonl")


# ── the top of the folder ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_file_is_placed_once_and_leaves_nothing_beside_it(tmp_path, name):
    source, target = tmp_path / "stage" / name, tmp_path / name
    source.parent.mkdir()
    source.write_text("new")
    target.write_text("old")
    for _ in range(3):
        place(source, target)
        assert target.read_text() == "new" and is_placed(source, target)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["stage", name])
    target.write_text("mine")  # edited in place
    assert (source.read_text() == "new") == (name == "model.json")


def test_where_files_cannot_be_linked_they_are_copied(tmp_path, monkeypatch):
    def refuse(*names):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a.npy").write_bytes(b"array")
    place(tmp_path / "a.npy", tmp_path / "b.npy")
    assert (tmp_path / "b.npy").read_bytes() == b"array" and is_placed(tmp_path / "a.npy", tmp_path / "b.npy")
    (tmp_path / "b.npy").write_bytes(b"arraz")
    assert not is_placed(tmp_path / "a.npy", tmp_path / "b.npy")
    assert not is_placed(tmp_path / "a.npy", tmp_path / "c.npy")


def test_a_folder_in_which_nothing_was_made_is_free_for_another_run(tmp_path):
    RunDir(tmp_path / "run", IDENTITY)
    other = IDENTITY | {"recipe": "scan-stl10"}
    RunDir(tmp_path / "run", other)
    assert json.loads((tmp_path / "run" / MARKER).read_text()) == other


# ── several processes ─────────────────────────────────────────────────────────────────────────────────────────────


def _together(group, out, options=("same", "same"), may_make=None):
    """Return the stage, as this process knows it, and the folder in which it worked on it."""
    places = []

    def make(folder):
        places.append(folder)
        (folder / "out.txt").write_text(f"by {group.rank}")
        return {"by": group.rank}

    try:
        run = RunDir(out, IDENTITY, group=group)
        run.may_make = may_make
        return run.stage("embed", options[group.rank], [], make, group=group), places
    except (InputError, ElsewhereError) as error:
        return error.message, places


def test_processes_share_a_stage_and_the_first_one_writes(processes, tmp_path):
    out = tmp_path / "run"
    (stage, (place,)), (other, (own,)) = processes.run(_together, out)
    assert stage == other and stage.facts["by"] == 0 and place == stage.folder
    assert (stage.folder / "out.txt").read_text() == "by 0"
    assert not own.is_relative_to(out) and not own.exists()
    assert sorted(path.name for path in out.iterdir()) == [MARKER, "stages"]
    assert sorted(path.name for path in stage.folder.iterdir()) == ["done.json", "out.txt"]
    again = processes.run(_together, out)
    assert [(found.was_kept, places) for found, places in again] == [(True, []), (True, [])]
    assert RunDir(out, IDENTITY).stage("embed", "same", [], maker([])).was_kept  # whatever the number of processes


def test_processes_that_see_different_things_are_told(processes, tmp_path):
    told = "process 2 of 2 has other images or options in the embed stage than the first"
    assert processes.run(_together, tmp_path / "run", ("one", "another")) == [(told, []), (told, [])]


def test_what_the_first_refuses_ends_all(processes, tmp_path):
    (tmp_path / "notes.txt").touch()
    assert processes.run(_together, tmp_path) == [(f"{tmp_path} is not empty and not a run folder", []),
                                                  ("process 1 met an error", [])]
    told, elsewhere = processes.run(_together, tmp_path / "run", ("a", "a"), {"report"})
    assert "the embed stage of" in told[0] and elsewhere == ("process 1 met an error", [])


def test_the_others_work_where_the_starter_tidies_up(tmp_path, monkeypatch):
    monkeypatch.setenv("PHYLA_SCRATCH", str(tmp_path))
    with _workplace(tmp_path / "stage", Group(1, 2)) as own:
        assert own.parent == tmp_path and own.is_dir()
    assert not own.exists()
