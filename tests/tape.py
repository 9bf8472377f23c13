"""A CUDA graph for a CPU: what a block does is recorded once and replayed on the same memory.

A CUDA graph holds kernels and addresses. Python does not run again, a result lands where it landed before, and nothing
may wait for the host or read from it. So does a `Tape`::

    with Tape() as tape:
        loss = step(pixels)
    pixels.copy_(others)
    source.manual_seed(7)
    tape.replay()  # ``loss`` is now that of the others

It stands below autograd, so it sees backward passes and optimizer steps as the operations they are made of. Generators
are used again as they stand: reseed them before a replay, as a caller of a graph does by other means.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

WAITS = frozenset({
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "unique_dim_consecutive",
})
"""Operations that a GPU must finish before the host can go on, by their names in aten."""

COPIES = frozenset({"lift_fresh"})
"""What ``torch.tensor`` of Python's values, or of NumPy's, becomes."""

MASKED = ("index", "_unsafe_index", "index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_")

READS = {getattr(Tensor, name): name for name in ("tolist", "numpy", "cpu", "__array__", "item")}
"""Methods that bring values to the host, and on a CPU do so unseen by the dispatcher."""


class HostError(AssertionError):
    """Something that a CUDA graph cannot hold was done while it was recorded."""


class Step(NamedTuple):
    """One operation, with aliases of its tensors: a graph knows addresses, not what a name means later."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[tuple[int, Tensor]]  # place among the results, and the tensor that it must land in

    def again(self) -> None:
        """Do the operation once more."""
        results = tree_leaves(self.function(*self.args, **self.kwargs))
        for place, tensor in self.made:
            if results[place].shape != tensor.shape:
                raise HostError(f"{self.function} gave {tuple(tensor.shape)}, now {tuple(results[place].shape)}")
            tensor.copy_(results[place])


class Tape(TorchDispatchMode):
    """What was done in its block, to be done again by ``replay``.

    Parameters
    ----------
    allow : names of operations that are let pass, such as "lift_fresh" where an optimizer counts steps on a CPU
    """

    def __init__(self, *, allow: Iterable[str] = ()) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.allow = frozenset(allow)
        self._reads = _Reads(self.allow)

    def __enter__(self) -> Self:
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do one operation and note it."""
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        fault = None if name in self.allow else _fault(name, args, kwargs)
        if fault:
            raise HostError(f"{func}: {fault}")
        held_args, held_kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        given = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        results = func(*args, **kwargs)
        made = [(place, tensor.detach()) for place, tensor in enumerate(tree_flatten(results)[0])
                if isinstance(tensor, Tensor) and _storage(tensor) not in given]
        if made or (func._schema.is_mutable and torch.Tag.inplace_view not in func.tags):
            self.steps.append(Step(func, held_args, held_kwargs, made))
        return results

    def replay(self) -> None:
        """Do everything again, each result in the memory that held it when it was recorded."""
        with torch.inference_mode():  # below autograd; and what was made in this mode may be changed only in it
            for step in self.steps:
                step.again()


class _Reads(TorchFunctionMode):
    """Refuses what the dispatcher does not see on a CPU."""

    def __init__(self, allow: frozenset[str]) -> None:
        super().__init__()
        self.allow = allow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = READS.get(func)
        if name and name not in self.allow:
            raise HostError(f"Tensor.{name} brings values to the host")
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list | np.ndarray) for part in index) and "getitem" not in self.allow:
                raise HostError("an index of Python's or NumPy's values is copied from the host")
        return func(*args, **(kwargs or {}))


def _fault(name: str, args: Any, kwargs: Any) -> str | None:
    """Return why a CUDA graph cannot hold the operation, None where it can."""
    if name in WAITS:
        return "the host waits for its result"
    if name in COPIES:
        return "values of the host are copied; keep such a constant for each device"
    if name in MASKED and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
        return "how much a mask picks is known to the host only when it has waited"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "how long its result is, is known to the host only when it has waited; give output_size"
    if name == "_to_copy" and torch.device(kwargs.get("device") or args[0].device).type != args[0].device.type:
        return "a copy to another device"
    if name == "copy_" and args[0].device.type != args[1].device.type:
        return "a copy from another device"
    return None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
