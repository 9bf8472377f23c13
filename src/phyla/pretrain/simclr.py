"""SimCLR: an encoder that gives two views of one image nearby embeddings.

Chen et al. 2020 in the form that van Gansbeke et al. 2020 (SCAN, section 3) trained: no blur, a two-layer projection
without BatchNorm, SGD without warm-up, and a loss that takes only the first views as anchors.

In: images. Out: ``encoder_`` (B, 3, H, W) -> (B, D) and ``projection_`` (B, D) -> (B, 128), unit rows.

Differs from Chen et al.: one-sided loss (``symmetric=True`` gives theirs), SGD instead of LARS, no blur.
Differs from the authors' code: seeded, resumable; the order of the 2B views in the one forward pass (BatchNorm does
not see it).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from phyla.embed import embed
from phyla.errors import InputError
from phyla.images.augment import Views
from phyla.images.batches import Order, open_pixels
from phyla.nets.heads import Projection
from phyla.nets.resnet import Encoder, EncoderSpec, initialise
from phyla.randomness import generator
from phyla.storage import fingerprint
from phyla.training.device import Device, choose_device
from phyla.training.loop import Loop, Step
from phyla.training.options import faults, make_optimizer
from phyla.training.schedule import cosine, n_steps, warm_up
from phyla.types import ImageSet


def nt_xent(first: Float[Tensor, "batch features"], second: Float[Tensor, "batch features"], *,
            temperature: float) -> Float[Tensor, ""]:
    """Return the one-sided NT-Xent loss of two views, anchors from ``first`` alone.

    Parameters
    ----------
    first, second : unit rows (B, D); row i of both shows image i
    temperature : > 0, no unit

    Notes
    -----
    L = -1/B sum_i log [ exp(a_i.b_i/t) / (sum_{j != i} exp(a_i.a_j/t) + sum_j exp(a_i.b_j/t)) ]
    (SCAN's released SimCLR; a softmax over 2B - 1 candidates. Chen et al. 2020, Eq. 1, averages both directions.)
    """
    n = len(first)
    logits = first @ torch.cat([first, second]).T / temperature
    logits = logits.masked_fill(torch.eye(n, 2 * n, dtype=torch.bool, device=first.device), -torch.inf)
    target = torch.arange(n, 2 * n, device=first.device)
    return nn.functional.cross_entropy(logits, target)


@dataclass(eq=False, repr=False)
class SimCLR(TransformerMixin, BaseEstimator):
    """Train an encoder with SimCLR; defaults are the published CIFAR-10 configuration.

    Parameters
    ----------
    encoder : which network
    views : random views of training, both drawn from it
    n_projection : length of the projection
    temperature : of the loss, > 0
    n_epochs, batch_size : epochs, and images (each gives two views) a step
    lr, lr_floor : learning rate at the start and, as a share of it, at the end of the cosine
    momentum, weight_decay : of SGD; the decay falls on every parameter
    warmup : duration of a linear warm-up, such as "10 epochs"; none as published
    symmetric : both views as anchors, as Chen et al. do
    random_state : seed of weights, order and views
    """

    encoder: EncoderSpec = EncoderSpec()
    views: Views = Views(kind="simclr", size=32)
    n_projection: int = 128
    temperature: float = 0.1
    n_epochs: int = 500
    batch_size: int = 512
    lr: float = 0.4
    lr_floor: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: str = "0 epochs"
    symmetric: bool = False
    random_state: int = 0

    def fit(self, images: ImageSet, y: None = None, *, device: Device | None = None,
            folder: Path | None = None) -> "SimCLR":
        """Train on ``images`` and set ``encoder_``, ``projection_`` and ``history_``.

        ``folder`` keeps a checkpoint from which the same call goes on.

        Raises
        ------
        InputError
            An option out of its range, or fewer than two images.
        NonFiniteLossError
            The loss became NaN or infinite.
        """
        for fault in self._faults(images):
            raise fault
        device = device or choose_device("cpu")
        encoder, projection = self._build()
        net = device.place(nn.Sequential(encoder, projection)).train()
        optimizer = make_optimizer("sgd", net.parameters(), device, lr=self.lr, momentum=self.momentum,
                                   weight_decay=self.weight_decay)
        key = fingerprint(asdict(self), images.fingerprint) if folder else ""
        pixels = open_pixels(images, device.device)
        order = Order(len(images), self.batch_size, self.random_state, device=device.device)
        ramp = n_steps(self.warmup, steps_per_epoch=order.steps_per_epoch, batch_size=order.rows,
                       total_steps=order.steps_per_epoch * self.n_epochs)
        encode = device.compiled(encoder)

        def advance(step: Step, batch: Tensor) -> None:
            views = torch.cat([step.view(self.views, batch), step.view(self.views, batch)])
            with device.autocast():
                embeddings = encode(views)
            first, second = (step.gather(rows) for rows in projection(embeddings.float()).chunk(2))
            loss = nt_xent(first, second, temperature=self.temperature)
            if self.symmetric:
                loss = 0.5 * (loss + nt_xent(second, first, temperature=self.temperature))
            step.backward(loss, optimizer)
            step.log(loss=loss)

        run = Loop("pretrain", order, n_epochs=self.n_epochs, state={"net": net, "optimizer": optimizer},
                   folder=folder, seed=self.random_state, key=key, device=device, pixels=pixels)
        for step in run:
            step.set_lr(optimizer, warm_up(step.index, steps=ramp)
                        * cosine(step.epoch, n_epochs=self.n_epochs, lr=self.lr, floor=self.lr * self.lr_floor))
            step.run(advance, pixels.take(step.rows))

        self.encoder_, self.projection_ = encoder.eval(), projection.eval()
        self.history_ = run.history
        return self

    def transform(self, images: ImageSet) -> np.ndarray:
        """Return the embeddings of ``images``, float32 (n_images, n_features)."""
        check_is_fitted(self)
        return embed(images, self.encoder_, self.views.plain()).values

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, an error each: what can be told before any work."""
        yield from faults(self, least={"n_projection": 1, "lr_floor": 0}, above={"temperature": 0})
        if self.batch_size < 2:
            yield InputError(f"batch_size={self.batch_size} leaves no other image to compare with", "at least 2")
        try:
            n_steps(self.warmup, steps_per_epoch=1, batch_size=1, total_steps=1)
        except InputError as fault:
            yield fault

    def _faults(self, images: ImageSet) -> Iterator[InputError]:
        yield from self.option_faults()
        if len(images) < 2:
            yield InputError(f"SimCLR needs at least 2 images, got {len(images)}")

    def _build(self) -> tuple[Encoder, Projection]:
        source = generator(self.random_state, "simclr weights")
        encoder, projection = self.encoder.build(source), Projection(self.encoder.n_features, self.n_projection)
        initialise(projection, source)
        return encoder, projection
