"""The processes that train one network together: how rows, sums and decisions pass between them.

Every process sees the same options, draws the random numbers of the whole batch and computes its own share of it. The
rows it gets (logits, projections) are gathered, and each process then takes *the loss of the whole batch*, the same
number everywhere. So no equation knows of processes, and two rules make the gradient that of one process:

* ``gather`` passes back to a process the gradient of its own rows alone, as the others compute the same loss;
* ``add_gradients`` then adds up what the processes found for the parameters, all of which lie before a ``gather``.

``total`` is for sums in the middle of a network, of which every process computes something else afterwards
(synchronised BatchNorm): there the gradients are added up.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from phyla.errors import InputError, LostProcessError

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: rank 0 alone finds neighbors, scores and writes, which may take hours."""


@dataclass(frozen=True)
class Group:
    """The processes of one run; of one process every call gives back what it was given.

    Parameters
    ----------
    rank : which process this is, from 0
    size : how many there are
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def part(self, n: int) -> slice:
        """Return which of ``n`` rows are this process's: contiguous, in order of rank, the first ones one longer."""
        bounds = self._bounds(n)
        return slice(bounds[self.rank], bounds[self.rank + 1])

    def gather(self, rows: Tensor, n: int) -> Tensor:
        """Return the ``n`` rows of all processes in order, given each one's ``part``; see the module for gradients."""
        return rows if self.size == 1 else cast(Tensor, _Gather.apply(rows, self, n))

    def collect(self, rows: Tensor, n: int) -> Tensor:
        """Return the ``n`` rows of all processes in order, without a gradient."""
        return rows if self.size == 1 else _gathered(rows.detach(), self._lengths(n))

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over processes; its gradient is the sum of theirs."""
        return values if self.size == 1 else cast(Tensor, _Total.apply(values))

    def share(self, value: T) -> T:
        """Return the value that the first process gave, plain values or tensors, on every process.

        With several processes tensors come on the CPU: on a GPU all of them would get the first one's.
        """
        if self.size == 1:
            return value
        held: list[Any] = [_on_cpu(value) if self.is_first else None]
        _told(lambda: dist.broadcast_object_list(held, src=0, device=_device()))
        return cast(T, held[0])

    def values(self, value: T) -> list[T]:
        """Return the plain values that the processes gave, in order of rank, on every process."""
        held: list[Any] = [value] * self.size
        if self.size > 1:
            _told(lambda: dist.all_gather_object(held, value))
        return held

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            _told(dist.barrier)

    def add_gradients(self, parameters: Iterable[Tensor], means: Iterable[Tensor] = ()) -> None:
        """Add up the gradients of all processes in place, and average ``means``, in one exchange.

        ``means`` are numbers that each process estimated from its own rows, such as BatchNorm's running statistics.
        """
        if self.size == 1:
            return
        sums = [parameter.grad for parameter in parameters if parameter.grad is not None]
        averaged = list(means)
        for dtype in dict.fromkeys(value.dtype for value in [*sums, *averaged]):
            alike = [value for value in sums if value.dtype == dtype]
            shared = [value for value in averaged if value.dtype == dtype]
            flat = torch.cat([value.reshape(-1) for value in (*alike, *(value / self.size for value in shared))])
            _told(lambda flat=flat: dist.all_reduce(flat))  # type: ignore[misc]
            parts = torch.split(flat, [value.numel() for value in (*alike, *shared)])
            for value, part in zip((*alike, *shared), parts, strict=True):
                value.copy_(part.view_as(value))

    def _lengths(self, n: int) -> list[int]:
        bounds = self._bounds(n)
        return [end - start for start, end in pairwise(bounds)]

    def _bounds(self, n: int) -> list[int]:
        whole, rest = divmod(n, self.size)
        return [rank * whole + min(rank, rest) for rank in range(self.size + 1)]


ALONE = Group()
"""One process."""


def join(backend: str, *, device: torch.device | None = None) -> Group:
    """Return the group that torchrun or ``--devices`` started this process in; ALONE where there is none.

    Parameters
    ----------
    backend : gloo (CPU) or nccl (CUDA)
    device : of this process, for nccl

    Raises
    ------
    LostProcessError
        The others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if not dist.is_available():
        raise InputError("this build of PyTorch cannot train with several processes", "leave out --devices")
    if not dist.is_initialized():
        _told(lambda: dist.init_process_group(backend, timeout=PATIENCE, device_id=device))
    return Group(dist.get_rank(), dist.get_world_size())


def leave(group: Group) -> None:
    """End the connection to the other processes."""
    if group.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(part) for name, part in value.items()}
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


_BROKEN = re.compile("closed|reset|refused|broken|peer|abort|time[d ]*out|unreachable|nccl.*error", re.IGNORECASE)


def _told(exchange: Callable[[], object]) -> None:
    """Make an exchange, and turn the many words of a broken one into one line."""
    try:
        exchange()
    except RuntimeError as error:  # as gloo's own and every error of torch.distributed is
        if not isinstance(error, dist.DistError) and not _BROKEN.search(str(error)):
            raise
        raise LostProcessError("the connection to the other processes broke: one of them has ended",
                               "see its message; give the same command again and the run goes on") from error


def _gathered(rows: Tensor, lengths: list[int]) -> Tensor:
    longest = max(lengths)
    padded = rows.contiguous()
    if len(rows) < longest:
        padded = torch.cat([padded, padded.new_zeros(longest - len(rows), *rows.shape[1:])])
    as_bytes = padded.dtype == torch.bool  # which gloo does not send
    sent = padded.view(torch.uint8) if as_bytes else padded
    found = sent.new_empty(len(lengths), longest, *rows.shape[1:])
    _told(lambda: dist.all_gather(list(found.unbind()), sent))
    found = found.view(torch.bool) if as_bytes else found
    if min(lengths) == longest:
        return found.flatten(0, 1)
    return torch.cat([part[:length] for part, length in zip(found, lengths, strict=True)])


class _Gather(torch.autograd.Function):
    """All rows, of which a process gets back the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, n: int) -> Tensor:
        ctx.part = group.part(n)
        return _gathered(rows, group._lengths(n))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.part], None, None


class _Total(torch.autograd.Function):
    """The sum over processes, forward and back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        _told(lambda: dist.all_reduce(total))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        _told(lambda: dist.all_reduce(total))
        return total


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batch of all processes, in training; names and numbers of ``nn.BatchNorm2d``.

    For a CPU, where PyTorch's own SyncBatchNorm does not run.
    """

    group: Group = ALONE

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, group: Group) -> "SharedBatchNorm":
        """Return a layer with the parameters and buffers of ``norm`` themselves."""
        shared = cls(norm.num_features, norm.eps, norm.momentum)
        for held, given in ((shared._parameters, norm._parameters), (shared._buffers, norm._buffers)):
            held.update(given)  # type: ignore[arg-type]
        shared.group, shared.training = group, norm.training
        return shared

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Return normalised activations; the running statistics follow."""
        if not self.training or self.group.size == 1:
            return super().forward(x)
        wide = x if x.dtype == torch.float64 else x.float()
        sums = torch.cat([wide.sum(dim=(0, 2, 3)), wide.new_full((1,), wide.numel() / wide.shape[1])])
        sums = self.group.total(sums)
        count = sums[-1]
        mean = sums[:-1] / count
        apart = wide - mean.view(1, -1, 1, 1)
        variance = self.group.total(apart.square().sum(dim=(0, 2, 3))) / count
        self._remember(mean.detach(), variance.detach() * (count / (count - 1).clamp(min=1)).detach())
        scale = self.weight * (variance + self.eps).rsqrt()
        return (apart * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum or 0.0)
        self.running_var.lerp_(variance.to(self.running_var), self.momentum or 0.0)


def share_batchnorm(module: nn.Module, group: Group, *, device: torch.device) -> None:
    """Make every BatchNorm below ``module`` one over the batches of all processes, in place; once is enough."""
    if group.size == 1:
        return
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]  # in place, below a container
        return
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, SharedBatchNorm.of(child, group))
