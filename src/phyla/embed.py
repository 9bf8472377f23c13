"""Images and an encoder in, one embedding an image out; and the one place where a network is run over a whole set."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from phyla.errors import InputError
from phyla.images.augment import Views
from phyla.images.batches import AHEAD, CPU, Streaming, open_pixels
from phyla.progress import Bar, bar
from phyla.randomness import generator
from phyla.storage import fingerprint
from phyla.training.device import Device, choose_device
from phyla.types import Embeddings, ImageSet


def embed(images: ImageSet, encoder: nn.Module, views: Views, *, device: Device | None = None,
          batch_size: int = 512) -> Embeddings:
    """Return what ``encoder`` makes of the plain view of every image, float32, rows in the order of the ids.

    Parameters
    ----------
    images : the set
    encoder : (B, 3, H, W) views to (B, n_features); put into evaluation mode for the pass, and back
    views : how an image becomes a view; deterministic for an embedding one can reproduce
    device : where to compute, and where ``encoder`` is moved to; None: where it is
    batch_size : images a forward pass; changes nothing but speed
    """
    values = forward_all(images, encoder, encoder, views, device=device, batch_size=batch_size, title="embed")
    return Embeddings(values.float().cpu().numpy(), images.ids)


def forward_all(images: ImageSet, net: nn.Module, function: Callable[[Tensor], Tensor], views: Views, *,
                device: Device | None = None, batch_size: int = 512, seed: int = 0, title: str = "") -> Tensor:
    """Return ``function`` of the views of all images, (n_images, ...) on the device, ``net`` in evaluation mode.

    ``device`` None is where ``net`` is; ``seed`` names the random views when ``views`` are random; ``title`` shows a
    progress bar. The processes of a group share the work, and each has the whole result: that of one process.
    """
    device = device or device_of(net)
    if not len(images):
        raise InputError("there is no image to embed or predict")
    with evaluating(net, device), bar(title, total=len(images), unit="image") as shown:
        work = Forward(images, function, views, device=device, batch_size=batch_size, seed=seed, shown=shown)
        return work.shared() if device.group.size > 1 else work.rows(range(len(images)))


@contextmanager
def evaluating(net: nn.Module, device: Device) -> Iterator[None]:
    """Have ``net`` on the device, in evaluation mode and without gradients; its mode is restored afterwards."""
    was_training = net.training
    device.place(net).eval()
    try:
        with torch.no_grad():
            yield
    finally:
        net.train(was_training)


class Forward:
    """``function`` of the views of ``images``, batch after batch; pixels that must be read are read two batches ahead.

    Parameters
    ----------
    images, function, views : as in ``forward_all``
    seed : of random views
    shown : a bar that counts images
    """

    def __init__(self, images: ImageSet, function: Callable[[Tensor], Tensor], views: Views, *, device: Device,
                 batch_size: int, shown: Bar, seed: int = 0) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        self.function, self.views, self.device, self.batch_size = function, views, device, batch_size
        self.shown, self.n_images = shown, len(images)
        self._pixels, self._source = open_pixels(images, device.device), generator(seed, "forward")
        self._home = CPU if isinstance(self._pixels, Streaming) else device.device

    def rows(self, span: range) -> Tensor:
        """Return the outputs of the images of ``span``, at least one, in one array made at the start."""
        batches = [(at, min(at + self.batch_size, span.stop)) for at in range(span.start, span.stop, self.batch_size)]
        out: Tensor | None = None
        for (start, stop), indices in zip(batches, self._taken(batches), strict=True):
            found = self._of(self._pixels.take(indices))
            if out is None:
                out = found.new_empty((len(span), *found.shape[1:]))
            out[start - span.start : stop - span.start] = found
            self.shown.advance(stop - start)
        if out is None:
            raise InputError("there is no image to embed or predict")
        return out

    def shared(self) -> Tensor:
        """Return the outputs of all images, of which each process of the group computes some.

        Batches are those of one process: their size may decide the last bit of a result.
        """
        group, size, n = self.device.group, self.batch_size, -(-self.n_images // self.batch_size)
        if self.views.kind not in ("plain", "weak"):
            return self._shared_by_batch()
        if n < group.size:
            return self.rows(range(self.n_images))
        own = group.part(n)
        rows = self.rows(range(own.start * size, min(own.stop * size, self.n_images)))
        whole = rows.new_zeros(((own.stop - own.start) * size, *rows.shape[1:]))
        whole[: len(rows)] = rows
        batches = whole.view(-1, size, *rows.shape[1:])
        return group.collect(batches, n).flatten(0, 1)[: self.n_images]

    def _shared_by_batch(self) -> Tensor:
        # What is random follows from batch to batch, and is drawn for a whole one: each process takes rows of each.
        group, parts = self.device.group, []
        for start in range(0, self.n_images, self.batch_size):
            n = min(self.batch_size, self.n_images - start)
            own = group.part(n) if n >= group.size else slice(0, n)
            indices = torch.arange(start + own.start, start + own.stop, device=self._home)
            found = self._of(self._pixels.take(indices), total=n, start=own.start)
            parts.append(group.collect(found, n) if n >= group.size else found)
            self.shown.advance(n)
        return torch.cat(parts)

    def _of(self, pixels: Tensor, *, total: int | None = None, start: int = 0) -> Tensor:
        views = self.views(pixels, self._source, total=total, start=start)
        with self.device.autocast():
            return self.function(self.device.arrange(views))

    def _taken(self, batches: list[tuple[int, int]]) -> Iterator[Tensor]:
        """Yield the indices of each batch, once those of the next ones are expected."""
        ahead: deque[Tensor] = deque()
        for start, stop in batches:
            indices = torch.arange(start, stop, device=self._home)
            self._pixels.expect(indices)
            ahead.append(indices)
            if len(ahead) == AHEAD:
                yield ahead.popleft()
        yield from ahead


def device_of(net: nn.Module) -> Device:
    """Return the device on which ``net`` lies; the CPU for a net without parameters."""
    held = next(net.parameters(), None)
    return choose_device("cpu" if held is None else str(held.device))


def weights_fingerprint(net: nn.Module) -> str:
    """Return 16 hex digits that change when a parameter or buffer of ``net`` changes."""
    return fingerprint({name: np.atleast_1d(value.numpy(force=True)) for name, value in net.state_dict().items()})
