"""Steps that a GPU repeats by itself: a step's kernels are recorded once as a CUDA graph and then launched as one.

Python needs longer to launch the few hundred kernels of a small network than a large GPU needs to run them. A recorded
step is launched whole; what it reads and writes lies where it lay when it was recorded. So what changes from step to
step is copied into fixed places first: the arguments of the step's body, the images of the batch, the seed of its
random numbers. What does not change (words, whole numbers, shapes) says which recording fits.

A body that is recorded must not look at a value, make a tensor of Python's numbers, or have shapes that depend on data.
"""

import logging
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

log = logging.getLogger("phyla")

Body = Callable[..., None]
WARM_UP = 3
"""Steps of a kind that run as they are before one is recorded: kernels are chosen, optimizers make their state."""


@runtime_checkable
class Recording(Protocol):
    """A step that was recorded."""

    has_run: bool  # whether recording it carried it out, too

    def replay(self) -> None:
        """Carry it out again."""


class CudaGraph:
    """A step as a CUDA graph."""

    has_run = False

    def __init__(self, body: Callable[[], None], generator: torch.Generator,
                 stream: torch.cuda.Stream | None, pool: Any) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(generator.device):  # where the graph keeps the generator's seed
            self.graph.register_generator_state(generator)
            # Other threads, which read ahead or watch over processes, may go on calling CUDA meanwhile.
            with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
                body()

    def replay(self) -> None:
        """Launch it."""
        self.graph.replay()


class Recorder:
    """Runs the bodies of steps, recorded once they are warm.

    Parameters
    ----------
    generator : of all random numbers in the bodies, reseeded by the caller before each step
    device : where the tensors lie
    record : makes a recording of a body without arguments
    """

    def __init__(self, generator: torch.Generator, device: torch.device,
                 record: Callable[..., Recording] = CudaGraph) -> None:
        self.generator, self.device, self.record = generator, device, record
        is_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        # One pool of memory for all recordings: they run one at a time, and none needs what another left there.
        self.pool = torch.cuda.graph_pool_handle() if is_cuda else None
        self.recordings: dict[object, Recording] = {}
        self.warm: dict[object, int] = {}
        self.places: dict[object, Tensor] = {}
        self.is_off = False

    def place(self, name: object, value: Tensor | float) -> Tensor:
        """Return the fixed place of ``name`` for values of this shape, holding ``value``."""
        if not isinstance(value, Tensor):
            return self.places.setdefault(name, torch.empty((), device=self.device)).fill_(value)
        key = name, value.shape, value.dtype
        if key not in self.places:
            self.places[key] = torch.empty_like(value, device=self.device)
        return self.places[key].copy_(value, non_blocking=True)

    def run(self, body: Body, step: Any, arguments: tuple[Any, ...]) -> None:
        """Carry out ``body(step, *arguments)``: as it is while its kind is new, then by its recording."""
        name = getattr(body, "__qualname__", "")
        fixed = [self.place((name, i), value) if isinstance(value, Tensor | float) else value
                 for i, value in enumerate(arguments)]
        kind = (name, *(tuple(value.shape) if isinstance(value, Tensor) else value for value in (step.indices, *fixed)))
        if kind in self.recordings:
            self.recordings[kind].replay()
            return
        if self.is_off or self.warm.setdefault(kind, 0) < WARM_UP:
            self.warm[kind] = self.warm.get(kind, 0) + 1
            self._as_it_is(lambda: body(step, *fixed))
            return
        before = self.generator.get_state()
        try:
            recording = self.record(lambda: body(step, *fixed), self.generator, self.stream, self.pool)
        except RuntimeError as error:
            self.is_off = True
            # The generator of a recording that broke off believes that it is recorded still, and gives nothing more.
            self.generator = step.generator = torch.Generator(self.device)
            self.generator.set_state(before)
            log.warning("steps run kernel by kernel: they cannot be recorded (%s)", str(error).splitlines()[0][:200])
            self._as_it_is(lambda: body(step, *fixed))
            return
        self.recordings[kind] = recording
        if not recording.has_run:
            recording.replay()

    def _as_it_is(self, body: Callable[[], None]) -> None:
        # On the stream of the recording: gradients are added up on the stream on which a parameter was first used.
        if self.stream is None:
            body()
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            body()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
