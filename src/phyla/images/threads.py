"""Work on blocks of a batch in threads of their own, each with one thread of torch's.

Torch can divide each single operation among threads instead. Blocks that fit a cache make short operations, and after
each of them every thread waits for the slowest: where other programs wanted the cores as well, that was 20 times slower
than one thread. Blocks wait for each other once, at the end.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def in_threads(work: Callable[[T], R], blocks: Sequence[T]) -> list[R]:
    """Return what ``work`` gives for each of ``blocks``, done in as many threads as torch may use here.

    Where that is 1 it is this thread. Else it is not, be there one block only: its operations are not divided.
    """
    n_threads = torch.get_num_threads()
    if n_threads == 1:
        return [work(block) for block in blocks]
    inference = torch.is_inference_mode_enabled()  # each thread has its own

    def one(block: T) -> R:
        with torch.inference_mode(inference):
            return work(block)

    return list(_pool(n_threads, os.getpid()).map(one, blocks))  # an error in a thread is raised here


@lru_cache(maxsize=4)
def _pool(n_threads: int, process: int) -> ThreadPoolExecutor:
    """Return ``n_threads`` threads of one thread of torch's each; a forked process has none of its parent's."""
    pool, all_there = ThreadPoolExecutor(n_threads, thread_name_prefix="views"), Barrier(n_threads)

    def begin(_: int) -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the last number set when it first asks: now, not later
        all_there.wait()  # so that no thread begins twice and another never

    list(pool.map(begin, range(n_threads)))
    torch.set_num_threads(n_threads)  # the number is each thread's own, but threads to come take the last that was set
    return pool
