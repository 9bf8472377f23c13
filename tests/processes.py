"""Two processes that form a group, kept alive over all tests that want one: starting them takes seconds."""

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from phyla.training.group import Group, join

SIZE = 2


class Processes:
    """Runs a function of a group on all its processes; functions are passed by name, so they stand in a module."""

    def __init__(self) -> None:
        context, self.pipes = get_context("spawn"), []
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            context.Process(target=_serve, args=(theirs, rank, port), daemon=True).start()
            self.pipes.append(ours)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what ``function(group, *arguments)`` returns on every process, in order of rank."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        found = [pipe.recv() for pipe in self.pipes]
        failed = [told for is_fine, told in found if not is_fine]
        if failed:
            raise AssertionError("\n".join(failed))
        return [told for _, told in found]

    def close(self) -> None:
        """End them."""
        for pipe in self.pipes:
            pipe.send(None)


def _serve(pipe: Connection, rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    group: Group = join("gloo")
    while (asked := pipe.recv()) is not None:
        function, arguments = asked
        try:
            pipe.send((True, function(group, *arguments)))
        except BaseException:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
