"""Device, precision and memory format, decided once and passed in."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from phyla.errors import InputError
from phyla.training.group import ALONE, Group, share_batchnorm

Precision = Literal["fp32", "bf16"]
Engine = Literal["eager", "graph", "compiled"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Device:
    """Where and how a stage computes.

    Parameters
    ----------
    device : cpu, cuda, cuda:1, mps
    precision : fp32, or bf16 autocast for the encoder (losses stay in float32)
    channels_last : keep activations as NHWC, faster for convolutions on CUDA and on a CPU
    engine : eager: each step runs its kernels one by one; graph: a step is captured as a CUDA graph and replayed;
        compiled: besides, the network is compiled
    group : the processes that train together, each on a device of its own
    synced : BatchNorm takes the statistics of the batch of all processes; else each those of its own rows
    """

    device: torch.device
    precision: Precision = "fp32"
    channels_last: bool = False
    engine: Engine = "eager"
    group: Group = ALONE
    synced: bool = True

    @property
    def alone(self) -> "Device":
        """The same device without the other processes: for work that one of them does for all."""
        return replace(self, group=ALONE)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which an encoder runs forward."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @contextmanager
    def tuned(self) -> Iterator[None]:
        """Let a network train in this block: cuDNN tries its kernels once for each shape and keeps the best."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = before or self.device.type == "cuda"
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before

    def place(self, module: ModuleT) -> ModuleT:
        """Return ``module`` on the device, in its memory format, BatchNorm shared by the group where it is synced."""
        if self.synced:
            share_batchnorm(module, self.group, device=self.device)
        placed = module.to(self.device)
        return placed.to(memory_format=torch.channels_last) if self.channels_last else placed

    def compiled(self, net: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return ``net`` compiled where the engine says so; its weights stay its own."""
        return torch.compile(net) if self.engine == "compiled" else net

    def arrange(self, views: Tensor) -> Tensor:
        """Return (B, 3, H, W) views in the memory format that the placed modules expect."""
        return views.contiguous(memory_format=torch.channels_last) if self.channels_last else views

    @property
    def label(self) -> str:
        """What a person would call it: "NVIDIA H200, bf16" or "2 x CPU, 1 threads, fp32"."""
        name = str(self.device)
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        elif self.device.type == "cpu":
            name = f"CPU, {torch.get_num_threads()} threads"
        many = f"{self.group.size} x " if self.group.size > 1 else ""
        told: list[str] = [self.precision] if self.engine == "eager" else [self.precision, self.engine]
        told += ["local BatchNorm"] if many and not self.synced else []
        return f"{many}{name}, {', '.join(told)}"


def choose_device(name: str = "auto", precision: str = "auto", *, engine: str = "auto",
                  batchnorm: str = "synced") -> Device:
    """Return the device called ``name`` ("auto": CUDA, then Apple's MPS, then the CPU), checked to exist.

    ``precision`` "auto" is bf16 on a GPU that computes in it (not one that only emulates it) and fp32 elsewhere;
    ``engine`` "auto" is eager. ``batchnorm`` "synced" or "local" tells processes that train together apart.
    """
    for what, given, allowed in (("precision", precision, ("auto", "fp32", "bf16")),
                                 ("engine", engine, ("auto", "eager", "graph", "compiled")),
                                 ("batchnorm", batchnorm, ("synced", "local"))):
        if given not in allowed:
            raise InputError(f"{what} {given!r} is not known", f"allowed: {', '.join(allowed)}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is not known", "allowed: auto, cpu, cuda, cuda:N, mps") from error
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise InputError(f"device {name!r} is not on this machine: {torch.cuda.device_count()} CUDA devices found",
                         "use --device cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' is not on this machine", "use --device cpu or auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {name!r} is not supported", "allowed: auto, cpu, cuda, cuda:N, mps")
    if engine in ("graph", "compiled") and device.type != "cuda":
        raise InputError(f"engine {engine!r} needs CUDA, and the device is {device.type}", "use --engine auto")
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
    return Device(device, "bf16" if precision == "bf16" else "fp32", channels_last=device.type != "mps",
                  engine="eager" if engine == "auto" else cast(Engine, engine), synced=batchnorm == "synced")
