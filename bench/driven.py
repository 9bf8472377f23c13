"""The steps of every method's own ``fit``, carried out one at a time: what the cards of steps and of a GPU drive.

    fit = METHODS["scan"](images, width=64, batch=128)
    steps = Steps(lambda: fit(device))
    steps()        # one step, and what the loop does around it
    steps.close()

Nothing of a method is written again here. ``fit`` runs in a thread of its own that waits before each step until it is
told to go on; the thread that tells it waits meanwhile, so the two never run at once.
"""

import copy
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from phyla.cluster.nnm import NNM
from phyla.cluster.scan import SCAN
from phyla.cluster.tsuc import TSUC
from phyla.embed import forward_all
from phyla.images.augment import Views
from phyla.nets.heads import ClusterHeads, ClusterNet, Projection
from phyla.nets.resnet import EncoderSpec
from phyla.pretrain import superand as superand_module
from phyla.pretrain.simclr import SimCLR
from phyla.pretrain.superand import SuperAND
from phyla.randomness import generator
from phyla.refine.ruc import RUC
from phyla.refine.selflabel import SelfLabel
from phyla.training.device import Device
from phyla.training.loop import Loop, Step
from phyla.types import ImageSet, Neighbors

Fit = Callable[[Device], object]
N_CLUSTERS, N_EPOCHS = 10, 50  # no card comes to the end of the last epoch

AT_ONCE = 1 << 40  # as unification_every: the weight that it has from the 80th epoch on, from the first

_here = threading.local()  # the Steps of this thread, if it has any


class Closed(BaseException):
    """What ends a ``fit`` that is to take no further step."""


class Steps:
    """Steps of a ``fit``, one or more a call; ``loop`` is its loop, ``step`` the step that comes next.

    ``notes`` may be set to a list, which then gets (name, arguments, result) of what `_note` watches.
    """

    def __init__(self, fit: Callable[[], object], *, warm: int = 0) -> None:
        self.loop: Loop
        self.step: Step
        self.notes: list[tuple[str, tuple[Any, ...], Any]] | None = None
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ends, self._more = False, 0
        self._thread = threading.Thread(target=self._run, args=(fit,), daemon=True)
        self._thread.start()
        self._wait()
        if warm:
            self(warm)

    def __call__(self, n_steps: int = 1) -> int:
        """Carry out ``n_steps`` more, and return how many that was."""
        self._more = n_steps - 1
        self._go.release()
        self._wait()
        return n_steps

    def close(self) -> None:
        """End the ``fit`` where it stands."""
        self._ends = True
        self._go.release()
        self._thread.join()
        self.__dict__.pop("loop", None)
        self.__dict__.pop("step", None)

    def pause(self, loop: Loop, step: Step) -> None:
        """Wait for the next call; called in the thread of the ``fit``, before each step."""
        self.loop, self.step = loop, step
        if self._more:
            self._more -= 1
            return
        self._waits.release()
        self._go.acquire()
        if self._ends:
            raise Closed

    def _wait(self) -> None:
        self._waits.acquire()
        if self._error is not None:
            raise self._error

    def _run(self, fit: Callable[[], object]) -> None:
        _here.steps = self
        try:
            fit()
            self._error = RuntimeError("the method came to its end: a card takes fewer steps than there are")
        except Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._waits.release()


def _gate() -> None:
    each = Loop.__iter__

    def gated(loop: Loop) -> Any:
        steps = getattr(_here, "steps", None)
        for step in each(loop):
            if steps is not None:
                steps.pause(loop, step)
            yield step

    Loop.__iter__ = gated  # type: ignore[method-assign]


def _note(owner: type, name: str) -> None:
    original = getattr(owner, name)

    def noted(*given: Any, **named: Any) -> Any:
        result = original(*given, **named)
        steps = getattr(_here, "steps", None)
        if steps is not None and steps.notes is not None:
            steps.notes.append((name, given, result))
        return result

    setattr(owner, name, noted)



def _count_entropy() -> None:
    usual = superand_module.unification_weight

    def weight(epoch: int, *, step: float, every: int) -> float:
        return step if every == AT_ONCE else usual(epoch, step=step, every=every)

    superand_module.unification_weight = weight


warnings.filterwarnings("ignore", message=".*have no trusted image")  # of RUC, with a network that knows nothing
_gate()
_count_entropy()
for _owner, _name in ((Step, "view"), (Loop, "watch"), (RUC, "_mixing")):
    _note(_owner, _name)


@dataclass
class First:
    """A method's first step: what it started from, what it saw and drew, and the loss that came of it."""

    state: Mapping[str, Any]
    rows: Tensor
    views: list[Tensor]
    mixing: tuple[float, Tensor] | None
    loss: float


def first_step(fit: Callable[[], object]) -> First:
    """Return what the first step of ``fit`` does; the fit goes no further."""
    steps = Steps(fit)
    try:
        state, rows = copy.deepcopy(dict(steps.loop.state)), steps.step.indices.clone()
        steps.notes = []
        steps()
        found = {name: [(given, result) for noted, given, result in steps.notes if noted == name]
                 for name in ("view", "watch", "_mixing")}
    finally:
        steps.close()
    mixing = found["_mixing"][0][1] if found["_mixing"] else None
    return First(state, rows, [result for _, result in found["view"]], mixing, float(found["watch"][0][0][1].detach()))


def photographs(n_images: int, size: int = 32) -> ImageSet:
    """Return as many crops of the two photographs that come with scikit-learn; the same every time."""
    sources, draw = load_sample_images().images, np.random.default_rng(0)
    pixels = np.empty((n_images, size, size, 3), np.uint8)
    for row in range(n_images):
        source = sources[row % 2]
        top, left = (int(draw.integers(side - size)) for side in source.shape[:2])
        pixels[row] = source[top : top + size, left : left + size]
    return ImageSet(pixels, [str(row) for row in range(n_images)], "photographs")


# ── every method, with something to work on ─────────────────────────────────────────────────────────────────────────


def simclr(images: ImageSet, *, width: int, batch: int) -> Fit:
    """Return a fit of SimCLR, both views as anchors as everybody else does it."""
    method = SimCLR(EncoderSpec(width=width), _views("simclr", images), n_epochs=N_EPOCHS, batch_size=batch,
                    symmetric=True)
    return lambda device: method.fit(images, device=device)


def superand(images: ImageSet, *, width: int, batch: int) -> Fit:
    """Return a fit of Super-AND in the first 80 epochs of a round: attraction and augmentation."""
    method = _superand(SuperAND, images, width, batch)
    return lambda device: method.fit(images, device=device)


def superand_later(images: ImageSet, *, width: int, batch: int) -> Fit:
    """Return a fit of Super-AND in the other 120 epochs: the unification entropy counts, too."""
    method = _superand(SuperAND, images, width, batch, unification_every=AT_ONCE)
    return lambda device: method.fit(images, device=device)


def superand_alone(images: ImageSet, *, width: int, batch: int, **options: Any) -> Fit:
    """Return ``superand`` with next to no network: pixels averaged, and the projection."""
    method = _superand(_WithoutNetwork, images, width, batch, **options)
    return lambda device: method.fit(images, device=device)


def scan(images: ImageSet, *, width: int, batch: int) -> Fit:
    """Return a fit of SCAN that trains everything."""
    method = SCAN(N_CLUSTERS, views=_views("strong", images), n_epochs=N_EPOCHS, batch_size=batch)
    encoder, near = _encoder(width), _near(len(images))
    return lambda device: method.fit(images, neighbors=near, encoder=encoder, device=device)


def nnm(images: ImageSet, *, width: int, batch: int) -> Fit:
    """Return a fit of NNM in its first epoch, which has no targets of all images yet."""
    method = NNM(N_CLUSTERS, views=_views("strong", images), n_epochs=N_EPOCHS, batch_size=batch)
    encoder, near = _encoder(width), _near(len(images))
    return lambda device: method.fit(images, neighbors=near, encoder=encoder, device=device)


def tsuc(images: ImageSet, *, width: int, batch: int) -> Fit:
    """Return a fit of TSUC with its five heads."""
    method = TSUC(N_CLUSTERS, views=_views("simclr", images, jitter=1.0, hue=0.4), n_epochs=N_EPOCHS, batch_size=batch)
    encoder = _encoder(width)
    return lambda device: method.fit(images, encoder=encoder, device=device)


def selflabel(images: ImageSet, *, width: int, batch: int) -> Fit:
    """Return a fit of self-labelling in which all images are confident, as nearly all are in the end."""
    method = SelfLabel(_views("strong", images), threshold=0.5 / N_CLUSTERS, n_epochs=N_EPOCHS, batch_size=batch)
    net = _net(width)
    return lambda device: method.fit(images, net=net, device=device)


def ruc(images: ImageSet, *, width: int, batch: int) -> Fit:
    """Return a fit of RUC that trusts half of the labels."""
    views, net = _views("ruc_strong", images), _net(width)
    with torch.no_grad():
        p = forward_all(images, net, net.probabilities, views.plain(), title="")[:, 0]
    method = RUC(views, split="confidence", confidence_threshold=float(p.amax(dim=1).median()), n_epochs=N_EPOCHS,
                 batch_size=batch)
    return lambda device: method.fit(images, net=net, device=device)


METHODS: Mapping[str, Callable[..., Fit]] = {
    "simclr": simclr, "scan": scan, "selflabel": selflabel, "nnm": nnm, "ruc": ruc, "tsuc": tsuc,
    "superand": superand, "superand+ue": superand_later, "superand, no network": superand_alone,
    "superand+ue, no network": partial(superand_alone, unification_every=AT_ONCE),
}
"""A fit of every method by name, of images, the network's width and the images of a batch."""

BATCH = {"simclr": 512, "scan": 128, "selflabel": 1000, "nnm": 200, "ruc": 250, "tsuc": 128, "superand": 128,
         "superand+ue": 128, "superand, no network": 128, "superand+ue, no network": 128}
"""Images of a batch as published for CIFAR-10."""

FORWARDS = {"simclr": 6, "scan": 6, "selflabel": 4, "nnm": 9, "ruc": 15, "tsuc": 6, "superand": 12, "superand+ue": 12}
"""What a step costs in forward passes of one image through one ResNet, for each image of the batch; backward is two."""


class _WithoutNetwork(SuperAND):
    def _build(self, n_images: int) -> Any:
        _, _, memory = super()._build(n_images)
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
        projection = Projection(48, self.n_projection, 1)
        return pooled, projection, memory


def _superand(kind: type[SuperAND], images: ImageSet, width: int, batch: int, **options: Any) -> SuperAND:
    views = _views("simclr", images, jitter=1.0, hue=0.4)
    return kind(EncoderSpec(width=width, streams="rgb_sobel"), views, n_epochs=N_EPOCHS, batch_size=batch, **options)


def _views(kind: Any, images: ImageSet, **options: Any) -> Views:
    return replace(Views(kind, images.size[0]), **options)


def _encoder(width: int) -> Any:
    return EncoderSpec(width=width).build(generator(0, "bench"))


def _net(width: int) -> ClusterNet:
    encoder = _encoder(width)
    heads = ClusterHeads(encoder.spec.n_features, N_CLUSTERS)
    heads.initialise(generator(0, "bench heads"))
    return ClusterNet(encoder, heads)


def _near(n_images: int, n_neighbors: int = 20) -> Neighbors:
    own = np.arange(n_images)[:, None]
    return Neighbors((own + np.arange(1, n_neighbors + 1)) % n_images,
                     np.tile(np.linspace(0.9, 0.5, n_neighbors, dtype=np.float32), (n_images, 1)))
