"""The loop keeps records and checkpoints; stopped at any moment it goes on bit-equal, and it stops at a NaN."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from phyla.errors import CorruptFileError, InputError, NonFiniteLossError, StorageError
from phyla.images.batches import Order
from phyla.progress import shown_by
from phyla.training.loop import Loop, Step

N_IMAGES, BATCH, EPOCHS = 11, 4, 3
PER_EPOCH, TOTAL = 2, 6
FAR = 1e9


@dataclass
class Training:
    """A small method: everything made from scratch, so that only the folder ties two of them together."""

    folder: Path | None
    seconds: float = 0.0
    key: str = "k"
    name: str = "pretrain"
    optimizer_name: str = "sgd"
    loss_at: Callable[[int], float] = lambda step: 1.0
    net: nn.Module = field(init=False)
    memory: dict[str, Any] = field(init=False)
    steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        weights = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        for parameter in self.net.parameters():
            nn.init.normal_(parameter, generator=weights)
        self.data = torch.randn(N_IMAGES, 3, generator=weights)
        self.memory = {"best": float("inf"), "weights": None}
        parameters = self.net.parameters()
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, 0.1)
        if self.optimizer_name == "sgd":
            self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1, 0.9)
        self.loop = Loop(self.name, Order(N_IMAGES, BATCH, 0), n_epochs=EPOCHS, seed=0, memory=self.memory,
                         state={"net": self.net, "optimizer": self.optimizer}, folder=self.folder, key=self.key,
                         checkpoint_seconds=self.seconds)

    def body(self, step: Step) -> None:
        step.set_lr(self.optimizer, 0.1 / (1 + step.index))
        noise = torch.randn(BATCH, 3, generator=step.generator)
        loss = self.net(self.data[step.indices] + noise).square().mean() * self.loss_at(step.index)
        step.backward(loss, self.optimizer)
        step.log(loss=loss, noise=float(noise.mean()))
        self.steps.append(step.index)
        if step.ends_epoch:
            score = np.float64(loss.item())  # a NumPy number, as scores tend to be
            step.record(score=score)
            if score < self.memory["best"]:
                weights = {name: value.clone() for name, value in self.net.state_dict().items()}
                self.memory.update(best=score, weights=weights)

    def run(self) -> "Training":
        for step in self.loop:
            self.body(step)
        return self

    def killed_after(self, n_steps: int, *, saved: bool) -> None:
        """Do ``n_steps`` steps and vanish, after the checkpoint that follows the last of them or before it."""
        steps = iter(self.loop)
        for done in count():
            if done == n_steps and not saved:
                return
            step = next(steps, None)
            if done == n_steps or step is None:
                return
            self.body(step)


def tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in nested dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def same(found: Training, wanted: Training) -> None:
    """Bit-equal weights, statistics, optimizer, memory and records."""
    for part in ("net", "optimizer"):
        pairs = [list(tensors(getattr(training, part).state_dict())) for training in (found, wanted)]
        assert len(pairs[0]) == len(pairs[1]) > 0
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True)), part
    assert found.loop.history == wanted.loop.history
    assert found.memory["best"] == wanted.memory["best"]
    assert all(torch.equal(found.memory["weights"][name], value) for name, value in wanted.memory["weights"].items())


@pytest.fixture(scope="module", autouse=True)  # for all, because torch's first optimizer imports for seconds
def whole() -> Training:
    """The training that nobody stopped."""
    return Training(None).run()


# ---- steps and records --------------------------------------------------------------------------------------------


def test_the_steps_cover_the_epochs() -> None:
    order = Order(N_IMAGES, BATCH, 0)
    steps = list(Loop("x", order, n_epochs=2, state={}, seed=0))
    assert [(step.epoch, step.position, step.index, step.ends_epoch) for step in steps] == [
        (0, 0, 0, False), (0, 1, 1, True), (1, 0, 2, False), (1, 1, 3, True)]
    for step in steps:
        assert torch.equal(step.indices, order.indices(step.epoch, step.position))


def test_a_step_draws_from_its_own_stream() -> None:
    def drawn(name: str, seed: int) -> list[float]:
        loop = Loop(name, Order(N_IMAGES, BATCH, 0), n_epochs=2, state={}, seed=seed)
        return [torch.rand(1, generator=step.generator).item() for step in loop]

    assert drawn("pretrain", 0) == drawn("pretrain", 0)
    assert len({*drawn("pretrain", 0), *drawn("cluster", 0), *drawn("pretrain", 1)}) == 12


def test_a_step_tells_the_mean_of_what_was_logged_so_far_in_its_epoch() -> None:
    loop = Loop("x", Order(9, 3, 0), n_epochs=2, state={}, seed=0)
    seen = []
    for step in loop:
        step.log(loss=torch.tensor(float(step.index)), twice=2.0 * step.index)
        seen.append((step.mean("loss"), step.mean("twice")))
    assert seen == [(0, 0), (0.5, 1), (1, 2), (3, 6), (3.5, 7), (4, 8)]
    assert [record["loss"] for record in loop.history] == [seen[2][0], seen[5][0]]


def test_an_epochs_record_is_the_mean_of_what_was_logged_and_what_was_recorded() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    loop = Loop("x", Order(9, 3, 0), n_epochs=2, state={}, seed=0)
    for step in loop:
        step.set_lr(optimizer, 10.0 - step.index)
        step.log(loss=torch.tensor(float(step.index)), plain=step.index * 2)
        if step.position == 1:
            step.log(now_and_then=7.0)
        if step.ends_epoch:
            step.record(score=step.epoch)
        assert optimizer.param_groups[0]["lr"] == 10.0 - step.index
    assert loop.history == [
        {"stage": "x", "epoch": 1, "loss": 1.0, "plain": 2.0, "now_and_then": 7.0, "lr": 10.0, "score": 0},
        {"stage": "x", "epoch": 2, "loss": 4.0, "plain": 8.0, "now_and_then": 7.0, "lr": 7.0, "score": 1}]


def test_means_are_taken_in_double_precision() -> None:
    loop = Loop("x", Order(2000, 1, 0), n_epochs=1, state={}, seed=0)
    for step in loop:
        step.log(loss=torch.tensor(16_777_216.0 if step.index == 0 else 1.0))
    assert loop.history[0]["loss"] == (16_777_216 + 1999) / 2000


def test_logging_keeps_no_graph() -> None:
    weight = torch.ones(1, requires_grad=True)
    loop = Loop("x", Order(4, 2, 0), n_epochs=1, state={}, seed=0)
    for step in loop:
        step.log(loss=weight.sum())
        assert not loop.sums["loss"][0].requires_grad


def test_backward_moves_the_parameters_and_starts_from_no_gradient() -> None:
    weight = torch.tensor([2.0], requires_grad=True)
    weight.grad = torch.tensor([100.0])
    optimizer = torch.optim.SGD([weight], 0.5)
    for step in Loop("x", Order(1, 1, 0), n_epochs=1, state={}, seed=0):
        step.backward((weight**2).sum(), optimizer)
    assert weight.item() == 2.0 - 0.5 * 4.0


def test_a_loop_needs_an_epoch() -> None:
    with pytest.raises(InputError, match="pretrain: n_epochs must be at least 1, got 0"):
        Loop("pretrain", Order(4, 2, 0), n_epochs=0, state={}, seed=0)


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    training = Training(None).run()
    assert training.loop.path is None
    assert training.steps == list(range(TOTAL))
    assert not list(tmp_path.iterdir())


class Ticks:
    """A display that remembers where its only bar stood and what was written beside it."""

    def start(self, description: str, total: int | None, unit: str, done: int) -> "Ticks":
        self.opened, self.done, self.notes, self.closed = (description, total, unit, done), done, [], False
        return self

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.notes.append(note)

    def stop(self, bar: object) -> None:
        self.closed = True


def test_progress_is_shown_from_where_the_loop_stands(tmp_path: Path) -> None:
    display = Ticks()
    Training(tmp_path).killed_after(3, saved=True)
    with shown_by(display):
        training = Training(tmp_path).run()
    assert display.opened == ("pretrain", TOTAL, "step", 3)
    assert (display.done, display.closed) == (TOTAL, True)
    assert display.notes[-1] == f"epoch 3/3, loss {training.loop.history[-1]['loss']:.3f}"


# ---- stopping and going on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("n_steps", range(TOTAL))
def test_killed_after_any_step_it_goes_on_bit_equal(tmp_path: Path, whole: Training, n_steps: int, saved: bool) -> None:
    Training(tmp_path).killed_after(n_steps, saved=saved)
    training = Training(tmp_path).run()
    same(training, whole)
    redone = 0 if saved else min(n_steps, 1)
    assert training.steps == list(range(n_steps - redone, TOTAL))


def test_killed_after_every_step_it_still_ends_bit_equal(tmp_path: Path, whole: Training) -> None:
    for _ in range(TOTAL):
        Training(tmp_path).killed_after(1, saved=True)
    training = Training(tmp_path).run()
    assert training.steps == []
    same(training, whole)


@pytest.mark.parametrize("optimizer_name", ["sgd", "adam"])
def test_between_two_checkpoints_steps_are_done_again(tmp_path: Path, optimizer_name: str,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Training(None, optimizer_name=optimizer_name).run()
    clock = count()
    monkeypatch.setattr("phyla.training.loop.time.monotonic", lambda: float(next(clock)))
    Training(tmp_path, seconds=3, optimizer_name=optimizer_name).killed_after(5, saved=False)
    training = Training(tmp_path, seconds=FAR, optimizer_name=optimizer_name).run()
    assert 0 < training.steps[0] < 4
    same(training, wanted)


def test_checkpoints_are_spaced_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Training(tmp_path, seconds=FAR).killed_after(5, saved=True)
    assert not (tmp_path / "checkpoint.pt").exists()
    now = [0.0]
    monkeypatch.setattr("phyla.training.loop.time.monotonic", lambda: now[0])
    training, saved = Training(tmp_path, seconds=10), []
    monkeypatch.setattr(training.loop, "save", lambda: saved.append(now[0]))
    for step in training.loop:
        training.body(step)
        now[0] += 4
    assert saved == [12.0, 16.0, 20.0, 24.0], "due after three steps, and the one above does not count as written"


def test_a_finished_loop_does_no_step_again(tmp_path: Path, whole: Training) -> None:
    Training(tmp_path, seconds=FAR).run()
    training = Training(tmp_path).run()
    assert training.steps == []
    same(training, whole)


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_survive_in_records_and_memory(tmp_path: Path) -> None:
    def loop(memory: dict[str, Any]) -> Loop:
        return Loop("x", Order(4, 2, 0), n_epochs=2, state={}, memory=memory, folder=tmp_path, seed=0,
                    checkpoint_seconds=0)

    for step in loop({"a": np.float64(0.5), "b": {"c": [np.int64(3), (np.float32(0.25), "text")]}, "d": torch.ones(2)}):
        step.log(loss=np.float32(1.5))
        step.record(score=np.float64(2.5))
        if step.index == 2:
            break
    memory: dict[str, Any] = {"gone": 1}
    run = loop(memory)
    next(iter(run))
    assert memory.pop("d").tolist() == [1.0, 1.0]
    assert memory == {"a": 0.5, "b": {"c": [3, (0.25, "text")]}}
    assert type(memory["a"]) is float and type(memory["b"]["c"][0]) is int
    assert run.history == [{"stage": "x", "epoch": 1, "loss": 1.5, "score": 2.5}]


def test_a_stop_ends_the_loop_after_the_step_and_is_remembered(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for step in training.loop:
        training.body(step)
        if step.index == 3:
            training.loop.stop("nothing is confident")
    assert training.steps == [0, 1, 2, 3]
    assert len(training.loop.history) == 2
    again = Training(tmp_path).run()
    assert (again.steps, again.loop.stopped) == ([], "nothing is confident")
    assert again.loop.history == training.loop.history


# ---- killed for real ----------------------------------------------------------------------------------------------


@contextmanager
def child() -> Iterator[None]:
    """Run the block in a forked process that is expected to be killed in it."""
    pid = os.fork()
    if pid == 0:
        try:
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os._exit(0)
    else:
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        raise ChildKilled


class ChildKilled(Exception):
    """The block ran elsewhere, and was killed there."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step(training: Training) -> None:
    for step in training.loop:
        training.body(step)
        if step.index == 3:
            kill()


def kill_in_write(training: Training) -> None:
    write = torch.save

    def half(value: dict[str, Any], out: Any) -> None:
        if value["next"] < 4:
            return write(value, out)
        write(value, out)
        out.truncate(out.tell() // 2)
        out.flush()
        return kill()

    torch.save = half
    training.run()


def kill_before_the_move(training: Training) -> None:
    move = Path.replace

    def replace(source: Path, target: Path) -> Path:
        if len(training.steps) == 4:
            kill()
        return move(source, target)

    Path.replace = replace  # type: ignore[method-assign]
    training.run()


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("killed", [kill_in_step, kill_in_write, kill_before_the_move])
def test_killed_by_the_system_it_goes_on_bit_equal(tmp_path: Path, whole: Training,
                                                   killed: Callable[[Training], None]) -> None:
    with pytest.raises(ChildKilled), child():
        killed(Training(tmp_path))
    left = sorted(path.suffix for path in tmp_path.iterdir())
    assert left == ([".pt"] if killed is kill_in_step else [".part", ".pt"])
    training = Training(tmp_path).run()
    assert training.steps == [3, 4, 5]
    same(training, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


# ---- checkpoints that cannot be used ------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    Training(tmp_path).killed_after(3, saved=True)
    return tmp_path / "checkpoint.pt"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.99])
def test_a_truncated_checkpoint_is_named(checkpoint: Path, share: float) -> None:
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CorruptFileError, match=r"checkpoint\.pt cannot be read .*hint: delete it: the stage starts"):
        Training(checkpoint.parent).run()
    assert checkpoint.exists(), "nothing is deleted unasked"


def test_one_wrong_bit_in_a_weight_is_found(checkpoint: Path) -> None:
    data = bytearray(checkpoint.read_bytes())
    weights = torch.load(checkpoint)["state"]["net"]["0.weight"].numpy().tobytes()
    data[data.find(weights) + 2] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(CorruptFileError, match="wrong checksum"):
        Training(checkpoint.parent).run()


@pytest.mark.parametrize("data", [b"not a checkpoint", bytes(range(256)) * 8, b"PK\x05\x06" + bytes(18)])
def test_something_else_is_no_checkpoint(checkpoint: Path, data: bytes) -> None:
    checkpoint.write_bytes(data)
    with pytest.raises(CorruptFileError, match="cannot be read"):
        Training(checkpoint.parent).run()


@pytest.mark.parametrize("change", [{"format": 1}, {"next": None}, {"more": 1}])
def test_a_checkpoint_of_another_version_is_refused(checkpoint: Path, change: dict[str, object]) -> None:
    held = torch.load(checkpoint) | change
    torch.save({name: value for name, value in held.items() if value is not None or name == "stopped"}, checkpoint)
    with pytest.raises(CorruptFileError, match="not a checkpoint of this version"):
        Training(checkpoint.parent).run()


@pytest.mark.parametrize("other", [{"key": "other"}, {"name": "cluster"}])
def test_a_checkpoint_of_another_run_is_refused_and_kept(checkpoint: Path, other: dict[str, str]) -> None:
    before = checkpoint.read_bytes()
    with pytest.raises(InputError, match="belongs to a run with other options or images"):
        Training(checkpoint.parent, **other).run()
    assert checkpoint.read_bytes() == before


def test_a_checkpoint_runs_no_code(checkpoint: Path) -> None:
    marker = checkpoint.parent / "made"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(marker),)

    torch.save(torch.load(checkpoint) | {"memory": Hostile()}, checkpoint)
    with pytest.raises(InputError, match="it was refused and not run"):
        Training(checkpoint.parent).run()
    assert not marker.exists()


# ---- a full disk and a loss that is not finite ---------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(checkpoint: Path, error: Exception, whole: Training,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    before = checkpoint.read_bytes()

    def full(value: object, out: Any) -> None:
        out.write(b"some of it")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(StorageError, match=r"no space left while writing .*checkpoint\.pt") as caught:
            Training(checkpoint.parent).run()
    assert "\n" not in str(caught.value)
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint.pt"]
    same(Training(checkpoint.parent).run(), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_does_harm(tmp_path: Path, value: float,
                                                                     whole: Training) -> None:
    training = Training(tmp_path, loss_at=lambda step: value if step == 3 else 1.0)
    with pytest.raises(NonFiniteLossError) as caught:
        training.run()
    assert str(caught.value) == (
        "pretrain: the loss is not finite at step 3; the last checkpoint is intact. hint: "
        "lower the learning rate (--set pretrain.lr=...) or look for damaged images")
    assert training.steps == [0, 1, 2]
    assert all(torch.isfinite(value).all() for value in training.net.parameters())
    resumed = Training(tmp_path).run()
    assert resumed.steps == [3, 4, 5]
    same(resumed, whole)


def test_without_a_checkpoint_none_is_promised() -> None:
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 0\. hint: lower"):
        Training(None, loss_at=lambda step: float("nan")).run()


@dataclass
class OnDevice:
    """A loss on an accelerator, where looking at it takes time and is therefore rare."""

    value: float
    device: torch.device = torch.device("cuda")
    looks: list[float] = field(default_factory=list)

    def detach(self) -> "OnDevice":
        return self

    def __float__(self) -> float:
        self.looks.append(self.value)
        return self.value


@pytest.mark.usefixtures("unchecked")
def test_on_an_accelerator_the_loss_is_looked_at_now_and_then() -> None:
    loop = Loop("cluster", Order(4, 2, 0), n_epochs=1, state={}, seed=0)
    losses = [OnDevice(float("nan") if step >= 20 else 1.0) for step in range(50)]
    for step, loss in enumerate(losses[:-1]):
        loop.watch(loss, step)  # type: ignore[arg-type]
    assert not any(loss.looks for loss in losses)
    with pytest.raises(NonFiniteLossError, match="cluster: the loss is not finite at step 20 and later ones"):
        loop.watch(losses[-1], 49)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
def test_a_checkpoint_is_not_written_over_by_a_run_gone_wrong(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    loop = Training(checkpoint.parent).loop
    loop.watch(OnDevice(float("nan")), 3)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteLossError, match="step 3"):
        loop.save()
    assert checkpoint.read_bytes() == before


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot write .*checkpoint\.pt"):
        Training(tmp_path / "file").run()
    shutil.rmtree(tmp_path)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    net = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    run = Loop("pretrain", Order(4, 4, 0), n_epochs=1, state={"net": net, "optimizer": optimizer}, seed=0,
               folder=tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"pretrain: the weights are not finite after step 0.*pretrain\.lr"):
        for step in run:
            step.backward(net(torch.ones(1, 2)).sum() * 1e30, optimizer)
            with torch.no_grad():
                net.weight.fill_(torch.nan)
    assert not (tmp_path / "checkpoint.pt").exists()
