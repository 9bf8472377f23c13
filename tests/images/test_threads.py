"""Blocks in threads: all are done, an error is not lost, and nothing of torch's settings changes."""

import threading

import pytest
import torch
from pictures import pictures

from phyla.images.augment import Views
from phyla.images.threads import in_threads


@pytest.fixture(params=[1, 3])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_block_is_done_in_a_thread_with_one_thread_of_torchs(n_threads):
    done = in_threads(lambda block: (block, threading.current_thread().name, torch.get_num_threads()), range(50))
    assert [block for block, *_ in done] == list(range(50))
    names = {name for _, name, _ in done}
    assert len(names) <= n_threads and (threading.current_thread().name in names) == (n_threads == 1)
    assert {count for *_, count in done} == {1}
    assert torch.get_num_threads() == n_threads


def test_threads_begun_later_have_as_many_threads_of_torchs_as_before(n_threads):
    in_threads(lambda block: None, range(4))
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [n_threads]


def test_an_error_in_a_block_is_raised(n_threads):
    def work(block):
        if block == 3:
            raise ValueError("block 3")

    with pytest.raises(ValueError, match="block 3"):
        in_threads(work, range(5))
    assert in_threads(work, range(3)) == [None] * 3  # the threads go on


@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode_is_that_of_the_caller(n_threads, inference):
    with torch.inference_mode(inference):
        assert in_threads(lambda block: torch.is_inference_mode_enabled(), range(6)) == [inference] * 6


@pytest.mark.parametrize("kind", ["simclr", "strong"])
@pytest.mark.parametrize("inference", [False, True])
def test_views_do_not_depend_on_the_number_of_threads(n_threads, kind, inference):
    pixels, views = pictures(32, 32).repeat(5, 1, 1, 1), Views(kind=kind, size=32)
    with torch.inference_mode(inference):
        made = views(pixels, torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    assert torch.equal(made, views(pixels, torch.Generator().manual_seed(0)))
