"""The order of an epoch, and two stores of pixels that give the same batches."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from phyla.errors import InputError
from phyla.images.batches import Order, Pixels, Resident, Streaming, in_order, open_pixels
from phyla.types import ImageSet

CPU = torch.device("cpu")


def pictures(n: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)


def image_set(pixels: np.ndarray | torch.Tensor) -> ImageSet:
    return ImageSet(pixels, [str(i) for i in range(len(pixels))])


def whole_epoch(order: Order, epoch: int = 0) -> list[list[int]]:
    return [order.indices(epoch, position).tolist() for position in range(order.steps_per_epoch)]


# ---- the order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_images", "batch_size", "drop_last", "sizes"), [
    (10, 3, True, [3, 3, 3]), (10, 3, False, [3, 3, 3, 1]), (9, 3, True, [3, 3, 3]), (9, 3, False, [3, 3, 3]),
    (2, 512, True, [2]), (2, 512, False, [2]), (1, 1, True, [1]), (5, 5, True, [5])])
def test_every_image_comes_once_an_epoch(n_images: int, batch_size: int, drop_last: bool, sizes: list[int]) -> None:
    order = Order(n_images, batch_size, seed=0, drop_last=drop_last)
    batches = whole_epoch(order)
    assert [len(batch) for batch in batches] == sizes
    seen = [i for batch in batches for i in batch]
    assert len(set(seen)) == len(seen) == sum(sizes)
    assert set(seen) <= set(range(n_images))
    assert order.rows == sizes[0]


def test_the_published_steps_per_epoch() -> None:
    assert Order(50_000, 512, 0).steps_per_epoch == 97
    assert Order(50_000, 128, 0).steps_per_epoch == 390
    assert Order(105_000, 512, 0).steps_per_epoch == 205
    assert Order(5_000, 128, 0).steps_per_epoch == 39


def test_seed_and_epoch_decide_the_order() -> None:
    assert whole_epoch(Order(50, 10, 0)) == whole_epoch(Order(50, 10, 0))
    assert whole_epoch(Order(50, 10, 0), 0) != whole_epoch(Order(50, 10, 0), 1)
    assert whole_epoch(Order(50, 10, 0)) != whole_epoch(Order(50, 10, 1))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole_epoch(Order(50, 10, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_left_out_differs_from_epoch_to_epoch() -> None:
    order = Order(10, 7, seed=0)
    left_out = {frozenset(range(10)) - set(whole_epoch(order, epoch)[0]) for epoch in range(20)}
    assert len(left_out) > 10
    assert frozenset.union(*left_out) == frozenset(range(10))


def test_positions_are_shuffled_evenly() -> None:
    first = torch.stack([Order(4, 4, seed).epoch(0) for seed in range(2000)])[:, 0]
    assert torch.bincount(first, minlength=4).tolist() == pytest.approx([500] * 4, abs=100)


def test_a_given_permutation_saves_drawing_it_again() -> None:
    order = Order(10, 4, seed=0)
    assert torch.equal(order.indices(3, 1, order.epoch(3)), order.indices(3, 1))
    assert order.epoch(0).dtype == torch.int64


@pytest.mark.parametrize(("n_images", "batch_size"), [(0, 4), (4, 0), (4, -1)])
def test_an_order_needs_images_and_a_batch(n_images: int, batch_size: int) -> None:
    with pytest.raises(InputError, match=f"got {n_images} images and batch_size={batch_size}"):
        Order(n_images, batch_size, seed=0)


@pytest.mark.parametrize(("n_images", "batch_size", "wanted"), [
    (5, 2, [[0, 1], [2, 3], [4]]), (4, 2, [[0, 1], [2, 3]]), (1, 9, [[0]]), (0, 9, [])])
def test_in_order_is_every_image_once(n_images: int, batch_size: int, wanted: list[list[int]]) -> None:
    assert [rows.tolist() for rows in in_order(n_images, batch_size, CPU)] == wanted


@pytest.mark.parametrize("batch_size", [0, -3])
def test_in_order_needs_a_batch(batch_size: int) -> None:
    with pytest.raises(InputError, match=f"batch_size must be at least 1, got {batch_size}"):
        list(in_order(5, batch_size, CPU))


# ---- the stores ---------------------------------------------------------------------------------------------------


def read_only_map(pixels: np.ndarray, folder: Path) -> np.ndarray:
    np.save(folder / "pixels.npy", pixels)
    return np.load(folder / "pixels.npy", mmap_mode="r")


def read_only(pixels: np.ndarray) -> np.ndarray:
    pixels = pixels.copy()
    pixels.flags.writeable = False
    return pixels


@pytest.mark.parametrize("store", [Resident, Streaming])
@pytest.mark.parametrize("layout", ["array", "read_only", "map", "tensor", "mirrored", "fortran"])
def test_a_batch_holds_the_images_asked_for_in_that_order(store: type[Resident | Streaming], layout: str,
                                                         tmp_path: Path) -> None:
    plain = pictures()
    layouts = {"array": plain.copy, "read_only": lambda: read_only(plain),
               "map": lambda: read_only_map(plain, tmp_path),
               "tensor": lambda: torch.from_numpy(plain.copy()), "fortran": lambda: np.asfortranarray(plain),
               "mirrored": lambda: plain[:, :, ::-1].copy()[:, :, ::-1]}
    pixels = layouts[layout]()
    pixels_of: Pixels = store(image_set(pixels), CPU)
    assert len(pixels_of) == 7
    for rows in ([3, 0, 6], [5], [2, 2, 1], [0, 1, 2, 3, 4, 5, 6]):
        batch = pixels_of.take(torch.tensor(rows))
        assert batch.dtype == torch.uint8
        np.testing.assert_array_equal(batch.numpy(), plain[rows])


@pytest.mark.parametrize("store", [Resident, Streaming])
def test_a_batch_is_a_copy(store: type[Resident | Streaming], tmp_path: Path) -> None:
    for pixels in (pictures(), read_only_map(pictures(), tmp_path)):
        store(image_set(pixels), CPU).take(torch.tensor([0, 1])).zero_()
        np.testing.assert_array_equal(pixels, pictures())


def test_no_images_are_an_empty_batch() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for store in (Resident, Streaming):
        assert store(image_set(pictures()), CPU).take(none).shape == (0, 4, 5, 3)


def test_small_sets_are_resident_and_large_ones_stream() -> None:
    images = image_set(pictures())
    assert isinstance(open_pixels(images, CPU), Resident)
    assert isinstance(open_pixels(images, CPU, resident_bytes=7 * 4 * 5 * 3), Resident)
    assert isinstance(open_pixels(images, CPU, resident_bytes=7 * 4 * 5 * 3 - 1), Streaming)


@pytest.mark.usefixtures("unchecked")
def test_a_set_never_fills_more_than_half_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    images, gpu = image_set(pictures()), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 7 * 60 - 1, 1 << 40))
    assert isinstance(open_pixels(images, gpu), Streaming)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 7 * 60, 1 << 40))
    monkeypatch.setattr("phyla.images.batches.Resident", lambda images, device: SimpleNamespace(device=device))
    assert open_pixels(images, gpu).device == gpu
