"""Images and an encoder in, one embedding an image out; and the one place where a network is run over a whole set."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from phyla.errors import InputError
from phyla.images.augment import Views
from phyla.images.batches import AHEAD, CPU, Streaming, open_pixels
from phyla.progress import Bar, bar
from phyla.randomness import generator
from phyla.rowcache import RowCache, image_digests
from phyla.shards import SHARD, Shards
from phyla.storage import fingerprint
from phyla.training.device import Device, choose_device
from phyla.types import Embeddings, ImageSet

log = logging.getLogger("phyla")

_MULTIPLE = 32  # images: what a frozen encoder takes at once on a CPU
_Batch = tuple[int, int, range]  # first image, the one after the last, and the span they are of


def embed(images: ImageSet, encoder: nn.Module, views: Views, *, device: Device | None = None,
          batch_size: int = 512, folder: Path | None = None, cache: Path | None = None) -> Embeddings:
    """Return what ``encoder`` makes of the plain view of every image, float32, rows in the order of the ids.

    Parameters
    ----------
    images : the set
    encoder : (B, 3, H, W) views to (B, n_features); put into evaluation mode for the pass, and back
    views : how an image becomes a view; deterministic for an embedding one can reproduce
    device : where to compute, and where ``encoder`` is moved to; None: where it is
    batch_size : images a forward pass; changes nothing but speed
    folder : keeps finished shards of a large set while it is worked on, so that after a kill only the others are made;
        removed at the end. The processes of a group use that of the first, which all must see
    cache : keeps the row of each image for all runs (``rowcache.rows_folder()``), and is asked before ``encoder`` is.
        The encoder must make the same of an image whatever is beside it in a batch, as frozen ones do. Processes of a
        group do without
    """
    if cache is not None and (device is None or device.group.size == 1):
        return Embeddings(_kept_rows(images, encoder, views, device or device_of(encoder), batch_size, cache),
                          images.ids)
    if folder is not None and len(images) > _shard(batch_size):
        return Embeddings(_in_shards(images, encoder, views, device or device_of(encoder), batch_size, folder),
                          images.ids)
    values = forward_all(images, encoder, encoder, views, device=device, batch_size=batch_size, title="embed")
    return Embeddings(values.float().cpu().numpy(), images.ids)


def _kept_rows(images: ImageSet, encoder: nn.Module, views: Views, device: Device, batch_size: int,
               cache: Path) -> np.ndarray:
    if not len(images):
        raise InputError("there is no image to embed or predict")
    spec = getattr(encoder, "spec", None)
    kept = RowCache(cache, {"weights": weights_fingerprint(encoder), "form": repr(spec), "views": asdict(views),
                            "precision": device.precision, "device": device.device.type})
    digests = image_digests(images)
    rows = kept.find(digests)
    first = {digest: row for row, digest in reversed(list(enumerate(digests)))}  # an image that is there twice, once
    missing = np.array(sorted(row for digest, row in first.items() if digest not in rows), np.int64)
    if rows:
        log.info("embeddings of %d of %d images are kept from before", sum(digest in rows for digest in digests),
                 len(images))
    with evaluating(encoder, device), bar("embed", total=len(images), unit="image",
                                          done=len(images) - len(missing)) as shown:
        at_once = min(batch_size, 4 * _MULTIPLE) if device.device.type == "cpu" else batch_size  # seconds of work
        for start in range(0, len(missing), at_once):
            some = missing[start : start + at_once]
            values = _filled_rows(images, some, encoder, views, device)
            names = [digests[row] for row in some.tolist()]
            rows.update(zip(names, values, strict=True))
            kept.add(names, values)
            shown.advance(len(some))
    kept.write()
    return np.stack([rows[digest] for digest in digests])


def _filled_rows(images: ImageSet, rows: np.ndarray, encoder: nn.Module, views: Views, device: Device) -> np.ndarray:
    """Return the embeddings of ``rows``, made in a batch of a multiple of 32: the last bits are those of any other set.
    """
    filled = np.resize(rows, -(-len(rows) // _MULTIPLE) * _MULTIPLE)
    batch = ImageSet(images.pixels[filled], [str(place) for place in range(len(filled))])
    with bar("", total=None) as silent:
        work = Forward(batch, encoder, views, device=device, batch_size=len(filled), shown=silent)
        return work.rows(range(len(filled)))[: len(rows)].float().cpu().numpy()


def _shard(batch_size: int) -> int:
    return max(1, SHARD // max(1, batch_size)) * batch_size  # whole batches: they are then those of any other way


def _in_shards(images: ImageSet, encoder: nn.Module, views: Views, device: Device, batch_size: int,
               folder: Path) -> np.ndarray:
    group, n = device.group, len(images)
    what = {"encoder": weights_fingerprint(encoder), "images": images.fingerprint, "views": asdict(views),
            "precision": device.precision, "batch_size": batch_size}
    shards = Shards(group.share(folder), n, what=what, size=_shard(batch_size))
    if group.is_first:
        shards.begin()
    group.wait()
    missing = shards.missing((group.rank, group.size))
    done = sum(len(shards.span(shard)) for shard in set(range(group.rank, len(shards), group.size)) - set(missing))
    with evaluating(encoder, device), bar("embed", total=n, unit="image", done=done) as shown:
        work = Forward(images, encoder, views, device=device, batch_size=batch_size, shown=shown)
        for shard, rows in zip(missing, work.spans([shards.span(shard) for shard in missing]), strict=True):
            shards.write(shard, values=rows.float().cpu().numpy())
    group.wait()
    values = np.empty((n, *shards.read(0)["values"].shape[1:]), np.float32)
    for shard in range(len(shards)):
        span = shards.span(shard)
        values[span.start : span.stop] = shards.read(shard)["values"]
    group.wait()
    if group.is_first:
        shards.remove()
    return values


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
        """Return the outputs of the images of ``span``, at least one."""
        return next(self.spans([span]))

    def spans(self, spans: Sequence[range]) -> Iterator[Tensor]:
        """Yield the outputs of the images of each span, in one array that is made at its start."""
        batches = [(at, min(at + self.batch_size, span.stop), span) for span in spans
                   for at in range(span.start, span.stop, self.batch_size)]
        out = torch.empty(0)
        for indices, (start, stop, span) in self._taken(batches):
            found = self._of(self._pixels.take(indices))
            if start == span.start:
                out = found.new_empty((len(span), *found.shape[1:]))
            out[start - span.start : stop - span.start] = found
            self.shown.advance(stop - start)
            if stop == span.stop:
                yield out

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

    def _taken(self, batches: list[_Batch]) -> Iterator[tuple[Tensor, _Batch]]:
        """Yield the indices of each batch, once those of the next ones are expected."""
        ahead: deque[tuple[Tensor, _Batch]] = deque()
        for batch in batches:
            indices = torch.arange(*batch[:2], device=self._home)
            self._pixels.expect(indices)
            ahead.append((indices, batch))
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
