"""Images and an encoder in, one embedding an image out; and the one place where a network is run over a whole set."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from phyla.errors import InputError
from phyla.images.augment import Views
from phyla.images.batches import in_order, open_pixels
from phyla.progress import bar
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
    progress bar.
    """
    device = device or device_of(net)
    pixels = open_pixels(images, device.device)
    was_training = net.training
    device.place(net).eval()
    out: Tensor | None = None
    start = 0
    source = generator(seed, "forward")
    try:
        with torch.no_grad(), bar(title, total=len(images), unit="image") as shown:
            for rows in in_order(len(images), batch_size, device.device):
                with device.autocast():
                    batch = function(device.arrange(views(pixels.take(rows), source)))
                if out is None:
                    out = batch.new_empty((len(images), *batch.shape[1:]))
                out[start : start + len(rows)] = batch
                start += len(rows)
                shown.advance(len(rows))
    finally:
        net.train(was_training)
    if out is None:
        raise InputError("there is no image to embed or predict")
    return out


def device_of(net: nn.Module) -> Device:
    """Return the device on which ``net`` lies; the CPU for a net without parameters."""
    held = next(net.parameters(), None)
    return choose_device("cpu" if held is None else str(held.device))


def weights_fingerprint(net: nn.Module) -> str:
    """Return 16 hex digits that change when a parameter or buffer of ``net`` changes."""
    return fingerprint({name: np.atleast_1d(value.numpy(force=True)) for name, value in net.state_dict().items()})
