"""Kept embeddings: found by pixels and encoder, whatever the ids; damaged ones are made again; nobody waits."""

import os
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from phyla import embed as embedding
from phyla import rowcache
from phyla.embed import embed
from phyla.images.augment import Views
from phyla.nets.frozen import FrozenEncoder, FrozenSpec, Member
from phyla.nets.resnet import EncoderSpec
from phyla.randomness import generator
from phyla.rowcache import RowCache, image_digests, rows_folder
from phyla.types import ImageSet

VIEWS = Views("plain", 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Counted(nn.Module):
    """A frozen encoder that counts the images it was asked about, those that fill a block not twice."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        own = Member("mine", "phyla", 8, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), 32, own=EncoderSpec(width=4))
        self.net = FrozenEncoder(FrozenSpec((own,)), [own.own.build(generator(seed, "own"))])
        self.spec, self.asked = self.net.spec, []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(len(torch.unique(x.flatten(1), dim=0)))
        return self.net(x)


@pytest.fixture
def net():
    return Counted()


def test_a_second_pass_asks_nothing_and_gives_the_same_bits(net, noise, tmp_path):
    plain = embed(noise, net, VIEWS)
    first = embed(noise, net, VIEWS, cache=tmp_path)
    net.asked.clear()
    again = embed(noise, net, VIEWS, cache=tmp_path)
    assert net.asked == []
    np.testing.assert_array_equal(first.values, plain.values)
    np.testing.assert_array_equal(again.values, first.values)
    assert list(again.ids) == list(noise.ids)


def test_one_new_image_embeds_one_image_with_the_bits_it_has_among_all(net, noise, tmp_path):
    some = noise.select(np.arange(31))
    embed(some, net, VIEWS, cache=tmp_path)
    net.asked.clear()
    mixed = noise.select(np.random.default_rng(0).permutation(32))
    found = embed(mixed, net, VIEWS, cache=tmp_path)
    assert net.asked == [1]
    whole = dict(zip(noise.ids, embed(noise, net, VIEWS).values, strict=True))
    np.testing.assert_array_equal(found.values, np.stack([whole[name] for name in mixed.ids]))


def test_images_are_known_by_their_pixels(net, noise, tmp_path, caplog):
    caplog.set_level("INFO", "phyla")
    embed(noise, net, VIEWS, cache=tmp_path)
    net.asked.clear()
    renamed = ImageSet(noise.array, [f"other/{row}" for row in range(32)])
    embed(renamed, net, VIEWS, cache=tmp_path)
    assert net.asked == [] and "32 of 32 images are kept from before" in caplog.text
    twice = ImageSet(np.repeat(255 - noise.array[:2], 3, axis=0), [str(row) for row in range(6)])
    caplog.clear()
    found = embed(twice, net, VIEWS, cache=tmp_path)
    assert net.asked == [2] and "kept from before" not in caplog.text  # copies are of this set
    np.testing.assert_array_equal(found.values[0], found.values[2])


@pytest.mark.parametrize("change", ["weights", "views", "preprocessing", "size"])
def test_what_decides_a_row_makes_another(net, noise, tmp_path, change):
    embed(noise, net, VIEWS, cache=tmp_path)
    net.asked.clear()
    views, images = VIEWS, noise
    if change == "weights":
        net.net.members[0].conv1.weight[0, 0, 0, 0] += 1
    elif change == "views":
        views = Views("plain", 12, VIEWS.mean, VIEWS.std)
    elif change == "size":
        images = ImageSet(noise.array.reshape(32, 8, 32, 3), noise.ids)
    else:
        own = Member("mine", "phyla", 8, (0.2, 0.2, 0.3), (0.5, 0.5, 0.5), 32, own=EncoderSpec(width=4))
        net.spec = FrozenSpec((own,))
    embed(images, net, views, cache=tmp_path)
    assert net.asked == [32]


def test_digests_tell_every_pixel_and_the_shape(noise):
    digests = image_digests(noise)
    assert len(set(digests)) == 32 and image_digests(ImageSet(noise.array.copy(), noise.ids)) == digests
    changed = noise.array.copy()
    changed[3, 15, 15, 2] ^= 1
    assert [a == b for a, b in zip(image_digests(ImageSet(changed, noise.ids)), digests, strict=True)].count(False) == 1


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-200]), lambda path: path.write_bytes(b"nothing"),
    lambda path: path.write_bytes(path.read_bytes().replace(b"values", b"valuez")),
    lambda path: path.write_bytes(bytes([*path.read_bytes()[:900], *(b ^ 85 for b in path.read_bytes()[900:1100]),
                                         *path.read_bytes()[1100:]]))])
def test_a_damaged_file_is_made_again_with_one_line(net, noise, tmp_path, caplog, damage):
    caplog.set_level("INFO", "phyla")
    first = embed(noise, net, VIEWS, cache=tmp_path)
    path = next(tmp_path.glob("*/*.npz"))
    damage(path)
    net.asked.clear()
    np.testing.assert_array_equal(embed(noise, net, VIEWS, cache=tmp_path).values, first.values)
    assert net.asked == [32] and [line for line in caplog.messages if "is damaged" in line].__len__() == 1
    net.asked.clear()
    embed(noise, net, VIEWS, cache=tmp_path)
    assert net.asked == []


def test_after_a_kill_only_the_rest_is_made(net, noise, tmp_path, monkeypatch):
    monkeypatch.setattr(rowcache, "WRITE_SECONDS", -1)
    monkeypatch.setattr(embedding, "_MULTIPLE", 2)  # 8 images at once
    whole, fill = embed(noise, net, VIEWS).values, embedding._filled_rows

    def dying(images: ImageSet, rows: np.ndarray, *rest: object) -> np.ndarray:
        if rows[0] >= 16:
            raise KeyboardInterrupt
        return fill(images, rows, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embedding, "_filled_rows", dying)
        embed(noise, net, VIEWS, cache=tmp_path)
    net.asked.clear()
    np.testing.assert_allclose(embed(noise, net, VIEWS, cache=tmp_path).values, whole, rtol=1e-5, atol=1e-6)
    assert net.asked == [8, 8]


def _fill(group, folder):
    values = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    kept = RowCache(folder, "same")
    for row in np.random.default_rng(group.rank).permutation(64):
        kept.add([row.tobytes() * 2], values[row : row + 1])
        kept.write()


def test_processes_share_a_folder_without_waiting(processes, tmp_path):
    processes.run(_fill, tmp_path)
    found = RowCache(tmp_path, "same").find([np.int64(row).tobytes() * 2 for row in range(64)])
    assert len(found) == 64 and not list(tmp_path.glob("*/.*"))


def test_the_encoder_longest_not_used_goes_first(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "phyla")
    row, key = np.zeros((1, 1000), np.float32), [b"0" * 16]
    caches = [RowCache(tmp_path, number) for number in range(4)]
    for number, kept in enumerate(caches[:3]):
        kept.add(key, row)
        kept.write()
        os.utime(kept.folder, (time.time() - 100 + number,) * 2)
    assert caches[0].find(key)  # now the second is the oldest
    monkeypatch.setattr(rowcache, "LIMIT_BYTES", 14_000)
    caches[3].add(key, row)
    caches[3].write()
    assert [kept.folder.exists() for kept in caches] == [True, False, True, True] and "was not used" in caplog.text


def test_a_place_that_cannot_be_written_costs_only_the_keeping(net, noise, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    found = embed(noise, net, VIEWS, cache=tmp_path / "file")
    assert len(found) == 32 and "not kept for the next run" in caplog.text


def test_rows_lie_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PHYLA_CACHE", str(tmp_path))
    assert rows_folder() == tmp_path / "embeddings" == RowCache(None, 1).folder.parent
