"""A memory bank, one row an image, and the softmax of a batch over all of it in one pass, without the table of logits.

With embeddings f (R, D), a bank m (N, D) and a temperature τ the logits are z = f mᵀ/τ (R, N). A loss over all N images
needs little of them: log Σ e^z, the entropy of the softmax, and the gradients of both for f. Each comes from sums over
the images, here with t = z - max z so that nothing overflows and nothing cancels:

    S0 = Σ e^t    S1 = Σ t e^t    V0 = Σ e^t m    V1 = Σ t e^t m
    log Σ e^z = max z + log S0       with gradient  V0/S0 / τ
    H = log S0 - S1/S0               with gradient  -(V1 - S1/S0 V0)/S0 / τ

So chunks of the bank are visited once, the gradient is ready when the value is, and the memory needed does not depend
on N. The maximum is a running one: where a chunk raises it, the sums so far are scaled down to it.

The bank is the "non-parametric classifier" of Super-AND (Han et al. 2020, Section 3; authors' code).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from phyla.errors import InputError, nearest

Entropy = Literal["none", "masked", "all"]

HIDDEN_LOGIT = -10.0
"""What stands for an image's own logit where it is masked: the authors' value, the least logit of unit rows at 0.1."""

# On one core, 256 rows of 128 features and 50,000 images take 77 ms forward and backward without an entropy and 113 ms
# with one, and within 4 % of that at any chunk from 512 to 4096; 256 costs 6 % more, 64 and 16,384 (out of the
# cache) 10 to 40 %. At 1024 a table is 1 MB.
_CHUNK_CPU = 1024
# Not measured: 16 MB a table for 256 rows, so that both stay in the cache of a large GPU, and 50,000 images are a few
# dozen kernel launches.
_CHUNK_DEVICE = 16384
_BLOCK = 1 << 14  # rows drawn or multiplied at once: 8 MB of 128 features


class Memory(nn.Module):
    """One remembered embedding an image: buffers ``rows`` (N, D) and ``gram`` = rowsᵀ rows (D, D), float32.

    Both are zero until ``initialise`` is called, and both are in the state dict. Nothing here has a gradient.

    Parameters
    ----------
    n_images, n_features : N and D, at least 1
    momentum : 0 to 1, how much of a row stays when it is updated
    """

    rows: Tensor
    gram: Tensor

    def __init__(self, n_images: int, n_features: int, *, momentum: float = 0.5) -> None:
        super().__init__()
        for name, value in (("n_images", n_images), ("n_features", n_features)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not 0 <= momentum <= 1:
            raise InputError(f"memory momentum must be 0 to 1, got {momentum}", "0.5 is the published value")
        self.momentum = momentum
        self.register_buffer("rows", torch.zeros(n_images, n_features))
        self.register_buffer("gram", torch.zeros(n_features, n_features))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw every row from U(±√(3/D)), so that its length is about 1; the rows are not normalised."""
        bound = math.sqrt(3 / self.rows.shape[1])
        for block in torch.split(self.rows, _BLOCK):  # drawn where the generator lives: the same on every device
            drawn = torch.empty(block.shape, device=generator.device)
            block.copy_(drawn.uniform_(-bound, bound, generator=generator))
        self.refresh()

    @torch.no_grad()
    def update(self, index: Int[Tensor, " batch"], rows: Float[Tensor, "batch features"]) -> None:
        """Move the rows of the images ``index`` toward ``rows``, and scale them to length 1; ``gram`` follows.

        Call it after the backward pass, as the loss is of the rows before.

        Parameters
        ----------
        index : images, 0 to N - 1, none of them twice (not looked at: that would wait for the device)
        rows : their new embeddings of length 1; no gradient flows through them
        """
        with _full_precision(self.rows.device):
            index, old = index.long(), self.rows[index]
            new = nn.functional.normalize(old.lerp(rows.detach().to(old), 1 - self.momentum), dim=1)
            self.rows.index_copy_(0, index, new)
            self.gram.addmm_(torch.cat((new, old)).T, torch.cat((new, -old)))

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute ``gram`` from the rows again, as rounding adds up over updates.

        Once an epoch is plenty: after 390 updates of 128 rows of 50,000 it was off by 2e-6 of its largest entry.
        """
        with _full_precision(self.rows.device):
            self.gram.zero_()
            for block in torch.split(self.rows, _BLOCK):
                self.gram.addmm_(block.T, block)


class MemorySoftmax(NamedTuple):
    """What ``memory_softmax`` returns: (R,) each, float32 or better."""

    log_sum: Float[Tensor, " rows"]
    entropy: Float[Tensor, " rows"] | None


def memory_softmax(embeddings: Float[Tensor, "rows features"], bank: Float[Tensor, "images features"],
                   own: Int[Tensor, " rows"], *, temperature: float, entropy: Entropy = "none",
                   chunk: int | None = None) -> MemorySoftmax:
    """Return the log-sum-exp of each row's logits over the whole bank, and the entropy of their softmax.

    Parameters
    ----------
    embeddings : R rows, usually of length 1; the only input that gets a gradient
    bank : N rows of any length, ``Memory.rows``
    own : the image in the bank that each row is a view of; only "masked" looks at it
    temperature : > 0, divides the logits
    entropy : none; all: of all N images; masked: an image's own logit counts as the constant -10 instead, through
        which no gradient flows (Han et al. 2020, unification entropy, as published)
    chunk : images looked at together, None for one that suits the device: memory is 2 R × chunk numbers at its peak

    Returns
    -------
    MemorySoftmax
        ``log_sum`` always counts all N images, the own one included; ``entropy`` in nats, None where not asked for.

    Raises
    ------
    InputError
        A value out of its range or shapes that do not fit; a second derivative is asked for (``create_graph=True``).
    """
    _check(embeddings, bank, own, temperature=temperature, entropy=entropy, chunk=chunk)
    chunk = min(chunk or (_CHUNK_CPU if embeddings.device.type == "cpu" else _CHUNK_DEVICE), len(bank))
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, bank.dtype), torch.float32)
    with _full_precision(embeddings.device):
        scaled = embeddings.to(dtype) / temperature
        gradient = torch.is_grad_enabled() and scaled.requires_grad
        return MemorySoftmax(*_Streamed.apply(scaled, bank.detach(), own.long(), entropy, chunk, gradient))


def _check(embeddings: Tensor, bank: Tensor, own: Tensor, *, temperature: float, entropy: str, chunk: int | None
           ) -> None:
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be above 0 and finite, got {temperature}")
    if entropy not in get_args(Entropy):
        raise InputError(f"entropy={entropy!r} is not known", nearest(str(entropy), list(get_args(Entropy))))
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk must be at least 1, got {chunk}", "None takes one that suits the device")
    if embeddings.ndim != 2 or bank.ndim != 2 or embeddings.shape[1] != bank.shape[1] or len(bank) == 0:
        raise InputError(f"embeddings (rows, features) need a bank (images, features) of the same width and at least "
                         f"one image, got {tuple(embeddings.shape)} and {tuple(bank.shape)}")
    if own.shape != embeddings.shape[:1]:
        raise InputError(f"{len(embeddings)} rows need as many own images, got {tuple(own.shape)}")


def _full_precision(device: torch.device) -> torch.autocast:
    """Return a context without autocast: a bfloat16 cosine is off by 0.004, and its logit at 0.1 by 0.04.

    Autocast leaves products that are written in place alone, and all of these are; this holds for any that is not.
    """
    return torch.autocast(device.type, enabled=False)


@dataclass(eq=False)
class _Sums:
    """Sums over the images seen so far, with t = z - top: what the module's first lines call S0, S1, V0 and V1."""

    top: Tensor  # (R,), at least the largest logit seen
    s0: Tensor  # (R,)
    s1: Tensor | None = None  # (R,), only where an entropy is asked for
    v0: Tensor | None = None  # (R, D), only where a gradient is asked for
    v1: Tensor | None = None  # (R, D), only where both are

    @classmethod
    def of_nothing(cls, like: Tensor, *, entropy: bool, gradient: bool) -> "_Sums":
        """Return the sums over no image for rows (R, D) ``like``."""
        zero, zeros = like.new_zeros(len(like)), like.new_zeros(like.shape)
        # Half of the lowest number: far below any logit, yet a difference from it is finite, and finite · 0 is 0.
        return cls(torch.full_like(zero, torch.finfo(like.dtype).min / 2), zero, zero.clone() if entropy else None,
                   zeros if gradient else None, zeros.clone() if entropy and gradient else None)

    def lift(self, top: Tensor) -> None:
        """Make ``top`` (R,), nowhere below the present one, the number that logits are measured from."""
        rise = top - self.top
        scale = torch.exp(-rise)
        if self.s1 is not None:
            self.s1.addcmul_(rise, self.s0, value=-1).mul_(scale)
        if self.v0 is not None and self.v1 is not None:
            self.v1.addcmul_(rise[:, None], self.v0, value=-1).mul_(scale[:, None])
        self.s0.mul_(scale)
        if self.v0 is not None:
            self.v0.mul_(scale[:, None])
        self.top = top

    def add(self, logits: Tensor, images: Tensor, spare: Tensor) -> None:
        """Add a chunk of the bank: ``logits`` (R, C), overwritten, of ``images`` (C, D); ``spare`` is (R, C)."""
        self.lift(torch.maximum(self.top, logits.amax(dim=1)))
        shifted = logits.sub_(self.top[:, None])
        weights = torch.exp(shifted, out=spare)
        self.s0.add_(weights.sum(dim=1))
        if self.v0 is not None:
            self.v0.addmm_(weights, images)
        if self.s1 is not None:
            self.s1.add_(shifted.mul_(weights).sum(dim=1))
        if self.v1 is not None:
            self.v1.addmm_(shifted, images)

    def with_image(self, logits: Tensor, images: Tensor | None) -> "_Sums":
        """Return the sums with one more image a row: its logit (R,), and ``images`` (R, D) unless it is constant."""
        sums = _Sums(**{name: part.clone() for name, part in vars(self).items() if part is not None})
        sums.lift(torch.maximum(self.top, logits))
        shifted = logits - sums.top
        weights = shifted.exp()
        sums.s0.add_(weights)
        if sums.s1 is not None:
            sums.s1.addcmul_(shifted, weights)
        if images is not None and sums.v0 is not None:
            sums.v0.addcmul_(weights[:, None], images)
        if images is not None and sums.v1 is not None:
            sums.v1.addcmul_((shifted * weights)[:, None], images)
        return sums

    def log_sum(self) -> tuple[Tensor, Tensor | None]:
        """Return log Σ e^z (R,) and its gradient (R, D) for the logits' left factor."""
        return self.top + self.s0.log(), None if self.v0 is None else self.v0 / self.s0[:, None]

    def entropy(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the entropy of the softmax (R,) and its gradient (R, D) for the logits' left factor."""
        if self.s1 is None:
            return None, None
        mean = self.s1 / self.s0  # of t under the softmax, never above 0
        value = self.s0.log() - mean
        if self.v0 is None or self.v1 is None:
            return value, None
        return value, (mean[:, None] * self.v0 - self.v1) / self.s0[:, None]


def _sum_over(bank: Tensor, scaled: Tensor, own: Tensor | None, *, chunk: int, entropy: bool, gradient: bool) -> _Sums:
    """Return the sums over the bank, for each row without its image in ``own`` (R,) where that is given."""
    sums = _Sums.of_nothing(scaled, entropy=entropy, gradient=gradient)
    # Made once: fresh pages for every chunk would cost more than the arithmetic on them.
    table, spare = (scaled.new_empty(len(scaled) * chunk) for _ in range(2))
    for start in range(0, len(bank), chunk):
        images = bank[start : start + chunk].to(scaled.dtype)
        shape = len(scaled), len(images)
        logits = torch.mm(scaled, images.T, out=table[: math.prod(shape)].view(shape))
        if own is not None:
            _hide(logits, own - start)
        sums.add(logits, images, spare[: math.prod(shape)].view(shape))
    return sums


def _hide(logits: Tensor, column: Tensor) -> None:
    """Set one column of each row of a chunk (R, C) to the lowest number; ``column`` (R,) may lie outside of it."""
    # Every row writes one of its logits, most of them what was there: a selection would wait for the device.
    width = logits.shape[1]
    inside, at = (column >= 0) & (column < width), column.clamp(0, width - 1)
    kept = logits.gather(1, at[:, None])
    logits.scatter_(1, at[:, None], kept.masked_fill(inside[:, None], torch.finfo(logits.dtype).min))


class _Streamed(torch.autograd.Function):
    """Log-sum-exp and entropy of rows (R, D) that are divided by the temperature, with their gradients."""

    @staticmethod
    def forward(ctx: Any, scaled: Tensor, bank: Tensor, own: Tensor, entropy: Entropy, chunk: int, gradient: bool
                ) -> tuple[Tensor, Tensor | None]:
        masked = entropy == "masked"
        sums = _sum_over(bank, scaled, own if masked else None, chunk=chunk, entropy=entropy != "none",
                         gradient=gradient)
        complete = spread = sums
        if masked:  # the own image is added to the others: taking it away from the sum of all would cancel
            images = bank.index_select(0, own).to(scaled.dtype)
            complete = sums.with_image((scaled * images).sum(dim=1), images)
            spread = sums.with_image(torch.full_like(sums.top, HIDDEN_LOGIT), None)
        (log_sum, along), (value, across) = complete.log_sum(), spread.entropy()
        ctx.save_for_backward(along, across)
        ctx.set_materialize_grads(False)
        return log_sum, value

    @staticmethod
    def backward(ctx: Any, to_log_sum: Tensor | None, to_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        # A second derivative would need another pass; without this line it would silently be zero.
        if torch.is_grad_enabled():
            raise InputError("memory_softmax has a first derivative only", "call backward without create_graph=True")
        parts = [factor[:, None] * gradient
                 for factor, gradient in zip((to_log_sum, to_entropy), ctx.saved_tensors, strict=True)
                 if factor is not None]
        return (sum(parts[1:], parts[0]) if parts else None, None, None, None, None, None)
