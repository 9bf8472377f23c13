"""Speed card: Super-AND's losses over a memory of N images, streamed against the formulas with all logits at once.

    python bench/memory.py [--losses and+ue] [--images 10000 30000 ...] [--repeats 5] [--out bench.json]

Both sides take the same 256 rows of 128 features and the same memory, forward and backward, and must agree on loss and
gradient. ``and`` is instance discrimination over all N images; ``and+ue`` adds the entropy without the own image. The
plain side is logits, log-softmax, gather, entropy and autograd.

Each side has a process of its own, and both take a step in turn. The peak is what a step needs beyond the memory and
the inputs, after a tiny step that loads the libraries. The plain side is left out where its peak, in proportion to the
size before, would take more than half of the free memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from card import Child, Row, arguments, compare, finish, free_memory, short
from phyla.nets.memory import HIDDEN_LOGIT, memory_softmax

ROWS, FEATURES, TEMPERATURE, UE_WEIGHT = 256, 128, 0.1, 0.2
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
LOSSES = ("and", "and+ue")


def streamed(rows: Tensor, bank: Tensor, own: Tensor, entropy: bool) -> Tensor:
    """Return the loss by phyla's one pass over the memory."""
    found = memory_softmax(rows, bank, own, temperature=TEMPERATURE, entropy="masked" if entropy else "none")
    loss = (found.log_sum - (rows * bank[own]).sum(dim=1) / TEMPERATURE).mean()
    return loss if found.entropy is None else loss + UE_WEIGHT * found.entropy.mean()


def plain(rows: Tensor, bank: Tensor, own: Tensor, entropy: bool) -> Tensor:
    """Return the loss by the formulas, with the logits (R, N) of all images."""
    logits = rows @ bank.T / TEMPERATURE
    loss = -logits.log_softmax(dim=1).gather(1, own[:, None]).mean()
    if not entropy:
        return loss
    log_p = logits.scatter(1, own[:, None], HIDDEN_LOGIT).log_softmax(dim=1)
    return loss - UE_WEIGHT * (log_p.exp() * log_p).sum(dim=1).mean()


def inputs(n_images: int, n_rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows (R, D) and a memory (N, D), both of length 1, and the image of each row; the same for each side."""
    draw = torch.Generator().manual_seed(0)
    bank = torch.empty(n_images, FEATURES).normal_(generator=draw)
    for block in bank.split(4096):  # in place: a copy would count as this process's peak
        block /= block.norm(dim=1, keepdim=True)
    own = torch.randint(n_images, (n_rows,), generator=draw)
    noise = 0.1 * torch.randn(n_rows, FEATURES, generator=draw)
    rows = torch.nn.functional.normalize(bank[own] + noise, dim=1)
    return rows.requires_grad_(), bank, own


def step(side: str, n_images: int, losses: str) -> Callable[[], dict[str, float]]:
    """Return the work of one side: a step, forward and backward, that tells the loss and the gradient's length."""
    loss_of = {"streamed": streamed, "plain": plain}[side]
    loss_of(*inputs(8, 4), losses == "and+ue").backward()
    rows, bank, own = inputs(n_images)

    def work() -> dict[str, float]:
        rows.grad = None
        loss = loss_of(rows, bank, own, losses == "and+ue")
        loss.backward()
        return {"loss": loss.item(), "gradient": rows.grad.norm().item()}

    return work


def card(n_images: int, losses: str, repeats: int, *, with_plain: bool) -> tuple[Row, int | None]:
    """Return the figures of one size, and the plain side's peak in bytes."""
    names = ("streamed", "plain") if with_plain else ("streamed",)
    sides = {name: Child(step, name, n_images, losses) for name in names}
    try:
        rates = compare(sides, repeats=repeats)
        check([side.answer for side in sides.values()])
    finally:
        for side in sides.values():
            side.close()
    row: Row = {"images": n_images}
    for name, side in sides.items():
        seconds, most = rates.seconds(name), side.bytes
        row |= {f"{name} ms": short(seconds * 1e3), f"{name} ns/image": short(seconds * 1e9 / n_images, 3),
                f"{name} peak MB": None if most is None else short(most / 1e6, 3)}
    return row | rates.ratio_row(), sides["plain"].bytes if with_plain else None


def check(answers: list[dict[str, float]]) -> None:
    """Stop where the sides do not compute the same."""
    for name in ("loss", "gradient"):
        if max(found := [answer[name] for answer in answers]) > 1.001 * min(found):
            raise SystemExit(f"the sides differ in {name}: {found}")


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    told = arguments(__doc__, losses={"choices": LOSSES, "default": "and+ue"},
                     images={"type": int, "nargs": "+", "default": list(SIZES)})
    print(f"{told.losses}, {ROWS} rows of {FEATURES} features, forward and backward", flush=True)
    rows: list[Row] = []
    bytes_per_image = ROWS * 4.0  # of the plain side; measured from its first size on
    for n_images in sorted(told.images)[: 2 if told.quick else None]:
        need, free = bytes_per_image * n_images, free_memory()
        row, most = card(n_images, told.losses, told.repeats, with_plain=need <= free / 2)
        if most is not None:
            bytes_per_image = most / n_images
        if need > free / 2:
            print(f"{n_images:,} images, plain left out: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} free", flush=True)
        rows.append(row)
    finish(told, rows, rows_of_a_step=ROWS, features=FEATURES)


if __name__ == "__main__":
    main()
