"""The order of an epoch, and two stores of pixels that give the same batches, expected or not."""

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from phyla.errors import CorruptFileError, InputError
from phyla.images.batches import AHEAD, Order, Pixels, Resident, Streaming, in_order, open_pixels
from phyla.types import ImageSet

CPU = torch.device("cpu")


def pictures(n: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)


def image_set(pixels: "np.ndarray | torch.Tensor | Slow") -> ImageSet:
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
        for expected in (None, rows, [4]):
            if expected is not None:
                pixels_of.expect(torch.tensor(expected))
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


@pytest.mark.parametrize("store", [Resident, Streaming])
def test_an_image_that_is_not_there_is_an_error(store: type[Resident | Streaming]) -> None:
    with pytest.raises(IndexError):
        store(image_set(pictures()), CPU).take(torch.tensor([0, 7]))


# ---- reading ahead ------------------------------------------------------------------------------------------------


class Slow:
    """Pixels that say when they are read, and by which thread; they wait until they are let go."""

    dtype = np.dtype(np.uint8)
    shape = (7, 4, 5, 3)

    def __init__(self) -> None:
        self.reads: list[list[int]] = []
        self.threads: set[str] = set()
        self.go = threading.Event()
        self.go.set()

    def __len__(self) -> int:
        return 7

    def __iter__(self):
        return iter(pictures())

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        return pictures()[rows]

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        self.go.wait(10)
        self.reads.append(rows.tolist())
        self.threads.add(threading.current_thread().name)
        if 6 in rows:
            raise CorruptFileError("'g.jpg' is damaged")
        out[:] = pictures()[rows]


def test_what_is_expected_is_read_in_the_background_and_once() -> None:
    slow = Slow()
    store = Streaming(image_set(slow), CPU)
    order = torch.tensor([3, 1, 2, 0, 5, 4])
    slow.go.clear()
    store.expect(order[:2])
    store.expect(order[2:4])  # neither call waits
    assert slow.reads == []
    slow.go.set()
    for part in (order[:2], torch.tensor([2, 0])):  # the same memory, or the same numbers
        np.testing.assert_array_equal(store.take(part).numpy(), pictures()[part.numpy()])
    assert slow.reads == [[3, 1], [2, 0]] and threading.current_thread().name not in slow.threads


def test_no_more_is_read_ahead_than_allowed() -> None:
    slow = Slow()
    store = Streaming(image_set(slow), CPU)
    slow.go.clear()
    for row in (0, 1, 2, 3, 4):
        store.expect(torch.tensor([row]))
    slow.go.set()
    np.testing.assert_array_equal(store.take(torch.tensor([4])).numpy(), pictures()[[4]])
    assert len(slow.reads) <= AHEAD + 1, "the one that was under way, and the last ones"


def test_indices_that_change_after_they_were_expected_are_read_anew() -> None:
    store, indices = Streaming(image_set(pictures()), CPU), torch.tensor([1, 2])
    store.expect(indices)
    indices += 1
    np.testing.assert_array_equal(store.take(indices).numpy(), pictures()[[2, 3]])


def test_what_goes_wrong_in_the_background_is_told_where_the_batch_is_taken() -> None:
    store = Streaming(image_set(Slow()), CPU)
    store.expect(torch.tensor([6, 0]))
    store.expect(torch.tensor([0]))
    with pytest.raises(CorruptFileError, match=r"'g\.jpg' is damaged"):
        store.take(torch.tensor([6, 0]))
    np.testing.assert_array_equal(store.take(torch.tensor([0])).numpy(), pictures()[[0]])


def readers() -> int:
    return sum(thread.name.startswith(("phyla-batch", "phyla-read")) for thread in threading.enumerate())


def settled(n: int) -> bool:
    for _ in range(200):
        if readers() == n:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_threads_end_with_the_store(how: str, tmp_path: Path) -> None:
    gc.collect()
    assert settled(0)
    store = Streaming(image_set(read_only_map(pictures(), tmp_path)), CPU)
    store.expect(torch.tensor([0, 1]))
    store.take(torch.tensor([2]))
    assert readers() > 0
    if how == "closed":
        store.close()
    else:
        del store
        gc.collect()
    assert settled(0)


def test_the_interpreter_ends_while_a_batch_is_being_read() -> None:
    program = """
import time, numpy as np, torch
from phyla.images.batches import Streaming
from phyla.types import ImageSet
class Slow:
    dtype, shape = np.dtype(np.uint8), (4, 2, 2, 3)
    def __len__(self): return 4
    def __getitem__(self, rows): return np.zeros(self.shape, np.uint8)[rows]
    __iter__ = None
    def read(self, rows, out): time.sleep(0.2)
store = Streaming(ImageSet(Slow(), list("abcd")), torch.device("cpu"))
store.expect(torch.tensor([0])), store.expect(torch.tensor([1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_small_sets_are_resident_and_large_ones_stream() -> None:
    images = image_set(pictures())
    assert isinstance(open_pixels(images, CPU), Resident)
    assert isinstance(open_pixels(images, CPU, resident_bytes=7 * 4 * 5 * 3), Resident)
    assert isinstance(open_pixels(images, CPU, resident_bytes=7 * 4 * 5 * 3 - 1), Streaming)
    assert isinstance(open_pixels(image_set(Slow()), CPU), Streaming), "what is not kept, whatever its size"


@pytest.mark.usefixtures("unchecked")
def test_a_set_never_fills_more_than_half_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    images, gpu = image_set(pictures()), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 7 * 60 - 1, 1 << 40))
    assert isinstance(open_pixels(images, gpu), Streaming)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 7 * 60, 1 << 40))
    monkeypatch.setattr("phyla.images.batches.Resident", lambda images, device: SimpleNamespace(device=device))
    assert open_pixels(images, gpu).device == gpu


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_come_to_a_gpu_through_pinned_memory(tmp_path: Path) -> None:
    gpu, large = torch.device("cuda"), np.random.default_rng(0).integers(0, 256, (600, 64, 64, 3), dtype=np.uint8)
    store = Streaming(image_set(read_only_map(large, tmp_path)), gpu)
    order = torch.randperm(600)
    parts = list(order.split(50))
    for host in (False, True):
        wanted = [part if host else part.to(gpu) for part in parts]
        found = []
        store.expect(wanted[0])
        for this, following in zip(wanted, [*wanted[1:], None], strict=True):
            if following is not None:
                store.expect(following)
            found.append(store.take(this))
        assert all(batch.is_cuda for batch in found)
        np.testing.assert_array_equal(torch.cat(found).cpu().numpy(), large[order.numpy()])
