"""Embeddings: rows in the order of the ids, whatever the batch; the network as it was before."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from commands import pictures
from phyla.embed import device_of, embed, forward_all, weights_fingerprint
from phyla.errors import InputError
from phyla.images.augment import Views
from phyla.images.batches import AHEAD, Streaming
from phyla.images.sources import open_images
from phyla.progress import shown_by
from phyla.randomness import generator
from phyla.shards import Shards
from phyla.training.device import Device
from phyla.training.group import ALONE, Group
from phyla.types import ImageSet

PLAIN = Views("plain", 8)


class Means(nn.Module):
    """Stands for an encoder whose embeddings say which image they are of: the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.modes: list[bool] = []

    def forward(self, views: Tensor) -> Tensor:
        self.batches.append(len(views))
        self.modes.append(self.training or torch.is_grad_enabled())
        return views.mean(dim=(2, 3))


def test_rows_are_in_the_order_of_the_ids(digits):
    views = Views("plain", 8, mean=(0.0,) * 3, std=(1.0,) * 3)
    found = embed(digits, Means(), views, batch_size=7)
    np.testing.assert_allclose(found.values, digits.array.mean(axis=(1, 2)) / 255, rtol=1e-5)
    assert list(found.ids) == list(digits.ids) and found.values.dtype == np.float32
    turned = digits.select(np.arange(len(digits))[::-1])
    np.testing.assert_array_equal(embed(turned, Means(), views).values, found.values[::-1])


def test_every_image_goes_through_once_in_evaluation_mode_without_a_graph(digits):
    net = Means()
    embed(digits, net, PLAIN, batch_size=20)
    assert net.batches == [20, 20, 8] and not any(net.modes)


@pytest.mark.parametrize("batch_size", [1, 5, 48, 1000])
def test_batch_size_changes_nothing_but_speed(digits, encoder, batch_size):
    np.testing.assert_allclose(embed(digits, encoder, PLAIN, batch_size=batch_size).values,
                               embed(digits, encoder, PLAIN).values, rtol=1e-4, atol=1e-5)


def test_embeddings_are_those_of_the_encoder(digits, encoder):
    with torch.no_grad():
        expected = encoder.eval()(PLAIN(torch.from_numpy(digits.array), generator(0, "any")))
    np.testing.assert_allclose(embed(digits, encoder, PLAIN).values, expected, rtol=1e-4, atol=1e-5)
    again = embed(digits, encoder, PLAIN)
    assert np.array_equal(again.values, embed(digits, encoder, PLAIN).values)


@pytest.mark.parametrize("training", [True, False])
def test_the_encoder_is_left_as_it_was(digits, encoder, training):
    before = weights_fingerprint(encoder)
    embed(digits, encoder.train(training), PLAIN)
    assert encoder.training is training and encoder.layer1.training is training
    assert weights_fingerprint(encoder) == before, "BatchNorm's statistics too"


def test_the_mode_is_restored_when_the_network_fails(digits, encoder):
    def failing(views: Tensor) -> Tensor:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        forward_all(digits, encoder.train(), failing, PLAIN)
    assert encoder.training


def test_random_views_are_named_by_a_seed(digits):
    strong = Views("strong", 8)
    once, again, other = (forward_all(digits, net := Means(), net, strong, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(once, again) and not torch.allclose(once, other)


def test_any_function_of_the_views_keeps_its_shape_and_type(digits, encoder):
    found = forward_all(digits, encoder, lambda views: views[:, 0].double(), PLAIN, batch_size=9)
    assert found.shape == (48, 8, 8) and found.dtype == torch.float64


def test_half_precision_comes_back_as_float32(digits, encoder):
    half = embed(digits, encoder, PLAIN, device=Device(torch.device("cpu"), "bf16"))
    assert half.values.dtype == np.float32
    full = embed(digits, encoder, PLAIN).values
    assert np.abs(half.values - full).max() < 0.05 * np.abs(full).max()


def test_images_on_disk_are_read_a_batch_at_a_time(digits, tmp_path, monkeypatch):
    np.save(tmp_path / "pixels.npy", digits.array)
    mapped = ImageSet(np.load(tmp_path / "pixels.npy", mmap_mode="r"), digits.ids)
    monkeypatch.setattr("phyla.embed.open_pixels", Streaming)
    found = embed(mapped, net := Means(), PLAIN, batch_size=10)
    assert net.batches == [10, 10, 10, 10, 8]
    np.testing.assert_array_equal(found.values, forward_all(digits, net, net, PLAIN))


def test_progress_counts_images(digits):
    counts = []

    class Shown:
        def start(self, description: str, total: int | None, unit: str, done: int) -> "Shown":
            counts.append((description, total, unit))
            return self

        def advance(self, n: int = 1, note: str = "") -> None:
            counts.append(n)

        def stop(self, bar: object) -> None:
            counts.append("end")

    with shown_by(Shown()):
        embed(digits, Means(), PLAIN, batch_size=30)
        forward_all(digits, Means(), Means(), PLAIN)
    assert counts == [("embed", 48, "image"), 30, 18, "end"], "and without a title nothing is shown"


def test_no_image_is_an_error(encoder):
    none = ImageSet(np.zeros((0, 8, 8, 3), np.uint8), [])
    with pytest.raises(InputError, match="no image"):
        embed(none, encoder, PLAIN)


def test_weights_fingerprint_sees_parameters_and_buffers(encoder):
    prints = [weights_fingerprint(encoder)]
    with torch.no_grad():
        encoder.layer4[1].conv2.weight[0, 0, 0, 0] += 1e-3
        prints.append(weights_fingerprint(encoder))
        encoder.bn1.num_batches_tracked += 1
        prints.append(weights_fingerprint(encoder))
    assert len(set(prints)) == 3 and weights_fingerprint(encoder) == prints[-1]


def test_a_network_says_where_it_is(encoder):
    assert device_of(encoder).device.type == "cpu" and device_of(nn.Identity()).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_without_a_device_it_computes_where_the_encoder_is(digits, encoder):
    on_cpu = embed(digits, encoder, PLAIN).values
    on_gpu = embed(digits, encoder.cuda(), PLAIN).values
    assert next(encoder.parameters()).is_cuda
    assert np.abs(on_gpu - on_cpu).max() < 0.05 * np.abs(on_cpu).max()


# ── reading ahead, and many processes ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n_batches", [1, 2, 5])
def test_the_next_batches_are_expected_before_one_is_taken(digits, monkeypatch, n_batches):
    told = []

    class Told(Streaming):
        def expect(self, indices: Tensor) -> None:
            told.append(("expect", int(indices[0])))
            super().expect(indices)

        def take(self, indices: Tensor) -> Tensor:
            told.append(("take", int(indices[0])))
            return super().take(indices)

    monkeypatch.setattr("phyla.embed.open_pixels", Told)
    some = digits.select(np.arange(9 * n_batches))
    found = embed(some, Means(), PLAIN, batch_size=9)
    takes = [first for what, first in told if what == "take"]
    assert takes == [9 * i for i in range(n_batches)]
    for i, first in enumerate(takes):
        seen = {at for what, at in told[: told.index(("take", first))] if what == "expect"}
        assert seen == set(takes[: i + AHEAD])
    np.testing.assert_array_equal(found.values, embed(digits, Means(), PLAIN, batch_size=9).values[: 9 * n_batches])


def _forwards(group: Group) -> list[Tensor]:
    pixels = np.random.default_rng(0).integers(0, 256, (47, 8, 8, 3), dtype=np.uint8)
    images = ImageSet(pixels, [str(i) for i in range(47)])
    device = Device(torch.device("cpu"), group=group)
    net, found = Means(), []
    for views, batch_size in ((PLAIN, 5), (PLAIN, 47), (PLAIN, 46), (Views("strong", 8), 12), (Views("strong", 8), 46)):
        found.append(forward_all(images, net, net, views, device=device, batch_size=batch_size))
    bright = forward_all(images, net, lambda rows: rows.mean(dim=(1, 2, 3)) > 0, PLAIN, device=device, batch_size=9)
    return [*found, bright]


def test_processes_share_the_work_and_each_has_what_one_would_have(processes):
    expected = _forwards(ALONE)
    for found in processes.run(_forwards):
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


# ── shards ────────────────────────────────────────────────────────────────────────────────────────────────────────


CHILD = """
import os, signal, sys
from pathlib import Path
from phyla import embed, shards
from phyla.images.augment import Views
from phyla.images.sources import open_images
from phyla.nets.resnet import EncoderSpec
from phyla.randomness import generator
embed.SHARD = 8
folder, moment, real = Path(sys.argv[1]), int(sys.argv[2]), shards.Shards.write
def dying(self, shard, **arrays):
    if shard == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, shard, **arrays)
shards.Shards.write = dying
images = open_images(folder / "photos", size=8, cache=folder / "kept", keep="off").images
encoder = EncoderSpec(width=4).build(generator(0, "test"))
embed.embed(images, encoder, Views("plain", 8), batch_size=4, folder=folder / ".work")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_embedding_goes_on_to_the_same_values(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr("phyla.embed.SHARD", 8)
    pictures(tmp_path / "photos", 30)
    ended = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), "2"], capture_output=True, text=True,
                           timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(list((tmp_path / ".work").glob("*.npz"))) == 2
    images = open_images(tmp_path / "photos", size=8, cache=tmp_path / "kept", keep="off").images
    expected = embed(images, encoder, PLAIN, batch_size=4).values
    real, made = Shards.write, []
    monkeypatch.setattr(Shards, "write", lambda self, shard, **told: made.append(shard) or real(self, shard, **told))
    found = embed(images, encoder, PLAIN, batch_size=4, folder=tmp_path / ".work").values
    assert made == [2, 3] and found.tobytes() == expected.tobytes()
    assert not (tmp_path / ".work").exists()


def test_shards_give_what_one_pass_gives(noise, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("phyla.embed.SHARD", 11)
    for batch_size in (5, 11, 20):
        found = embed(noise, encoder, PLAIN, batch_size=batch_size, folder=tmp_path / "work").values
        np.testing.assert_array_equal(found, embed(noise, encoder, PLAIN, batch_size=batch_size).values)
    assert not list(tmp_path.iterdir())


def _sharded(group: Group, folder: str) -> np.ndarray:
    from phyla import embed as module

    module.SHARD = 8
    pixels = np.random.default_rng(0).integers(0, 256, (47, 8, 8, 3), dtype=np.uint8)
    images = ImageSet(pixels, [str(i) for i in range(47)])
    return embed(images, Means(), PLAIN, device=Device(torch.device("cpu"), group=group), batch_size=4,
                 folder=Path(folder) / ("work" if group.is_first else "none of its own")).values


def test_processes_share_the_shards(processes, tmp_path):
    expected = _sharded(ALONE, str(tmp_path))
    for found in processes.run(_sharded, str(tmp_path)):
        np.testing.assert_array_equal(found, expected)
    assert not list(tmp_path.iterdir())
