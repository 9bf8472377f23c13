"""All methods side by side at a size that one core carries: 2,000 images of Fashion-MNIST, and of CIFAR-10.

The settings are ours and were fixed by what they cost, before any score was seen: a ResNet-18 of 16 channels behind
ImageNet's stem (Super-AND: two streams of 8), so 128 features either way, tens of epochs instead of hundreds, CIFAR-10
at 24 pixels. Where so few images ask for another value than the published one (temperatures, prototypes, the embedded
layer), it is that of the recipes on digits. No published number is meant to be reached: what can be compared is the
methods with each other, at this size. As many of the 10,000 test images are only predicted, and choose epochs without
labels, as published.

SCAN, NNM and RUC of one seed start from one encoder, both stages of TSUC and its RUC from another.
"""

from dataclasses import dataclass, replace

from phyla.cluster.kmeans import KMeans
from phyla.cluster.nnm import NNM
from phyla.cluster.scan import SCAN
from phyla.cluster.tsuc import TSUC
from phyla.images.augment import Views
from phyla.nets.resnet import EncoderSpec
from phyla.pipeline import Data, EmbedOptions, Pipeline
from phyla.pretrain.simclr import SimCLR
from phyla.pretrain.superand import SuperAND
from phyla.recipes.settings import CIFAR10, DIGIT_OPERATIONS, FASHION
from phyla.refine.ruc import RUC
from phyla.refine.selflabel import SelfLabel


@dataclass(frozen=True)
class _Small:
    """A data set at this size: the end of its recipes' names, its images, and its views."""

    title: str
    data: Data
    crops: Views
    crops_of_superand: Views
    strong: Views
    ruc: Views


_GREY = Views("simclr", 28, *FASHION, saturation=0.0, hue=0.0, grey=0.0)
_COLOR = Views("simclr", 24, *CIFAR10)
_FASHION = _Small("fashion-small", Data("fashion-mnist", held_out="test", limit=2000), _GREY,
                  replace(_GREY, jitter=1.0),
                  Views("strong", 28, *FASHION, cutout=14, operations=DIGIT_OPERATIONS),
                  Views("ruc_strong", 28, *FASHION, cutout=14))
_CIFAR10 = _Small("cifar10-small", Data("cifar10", held_out="test", size=24, limit=2000), _COLOR,
                  replace(_COLOR, jitter=1.0, hue=0.4), Views("strong", 24, *CIFAR10, cutout=12),
                  Views("ruc_strong", 24, *CIFAR10, cutout=12))


def scan_fashion_small() -> Pipeline:
    """Cluster 2,000 images of Fashion-MNIST with SCAN and self-labelling, from a SimCLR encoder of their own.

    Paper: SCAN (van Gansbeke et al. 2020) at a small size; the settings are ours.
    Command: phyla run scan-fashion-small            Cost: minutes on one core.
    Expected: see results/scan-fashion-small/, and docs/concepts/methods-side-by-side.md for all methods.
    """
    return _scan(_FASHION)


def scan_cifar10_small() -> Pipeline:
    """Cluster 2,000 images of CIFAR-10 at 24 pixels with SCAN and self-labelling; see scan-fashion-small.

    Expected: see results/scan-cifar10-small/; far below scan-cifar10.
    """
    return _scan(_CIFAR10)


def nnm_fashion_small() -> Pipeline:
    """Cluster 2,000 images of Fashion-MNIST with NNM from scan-fashion-small's encoder; the settings are ours.

    Command: phyla run nnm-fashion-small            Cost: minutes on one core.
    Expected: see results/nnm-fashion-small/.
    """
    return _nnm(_FASHION)


def nnm_cifar10_small() -> Pipeline:
    """Cluster 2,000 images of CIFAR-10 with NNM from scan-cifar10-small's encoder; see nnm-fashion-small.

    Expected: see results/nnm-cifar10-small/; far below nnm-cifar10.
    """
    return _nnm(_CIFAR10)


def ruc_fashion_small() -> Pipeline:
    """Learn the result of scan-fashion-small anew with RUC; the settings are ours.

    Command: phyla run ruc-fashion-small            Cost: minutes on one core.
    Expected: see results/ruc-fashion-small/.
    """
    return _ruc(_scan(_FASHION), _FASHION, "ruc")


def ruc_cifar10_small() -> Pipeline:
    """Learn the result of scan-cifar10-small anew with RUC; see ruc-fashion-small.

    Expected: see results/ruc-cifar10-small/; far below ruc-scan-cifar10.
    """
    return _ruc(_scan(_CIFAR10), _CIFAR10, "ruc")


def superand_fashion_small() -> Pipeline:
    """Embed 2,000 images of Fashion-MNIST with Super-AND, and cluster the embeddings by k-means; the settings are ours.

    Command: phyla run superand-fashion-small            Cost: minutes on one core.
    Expected: see results/superand-fashion-small/.
    """
    return _superand(_FASHION)


def superand_cifar10_small() -> Pipeline:
    """Embed 2,000 images of CIFAR-10 with Super-AND, and cluster them by k-means; see superand-fashion-small.

    Expected: see results/superand-cifar10-small/; far below superand-cifar10.
    """
    return _superand(_CIFAR10)


def tsuc_fashion_small() -> Pipeline:
    """Cluster 2,000 images of Fashion-MNIST with both stages of TSUC; the settings are ours.

    Command: phyla run tsuc-fashion-small            Cost: minutes on one core.
    Expected: see results/tsuc-fashion-small/.
    """
    return _tsuc(_FASHION)


def tsuc_cifar10_small() -> Pipeline:
    """Cluster 2,000 images of CIFAR-10 with both stages of TSUC; see tsuc-fashion-small.

    Expected: see results/tsuc-cifar10-small/; far below tsuc-cifar10.
    """
    return _tsuc(_CIFAR10)


def ruc_tsuc_fashion_small() -> Pipeline:
    """Learn the result of tsuc-fashion-small anew with RUC; the settings are ours.

    Command: phyla run ruc-tsuc-fashion-small            Cost: minutes on one core.
    Expected: see results/ruc-tsuc-fashion-small/.
    """
    return _ruc(_tsuc(_FASHION), _FASHION, "ruc-tsuc")


def ruc_tsuc_cifar10_small() -> Pipeline:
    """Learn the result of tsuc-cifar10-small anew with RUC; see ruc-tsuc-fashion-small.

    Expected: see results/ruc-tsuc-cifar10-small/; far below ruc-tsuc-cifar10.
    """
    return _ruc(_tsuc(_CIFAR10), _CIFAR10, "ruc-tsuc")


def _scan(of: _Small) -> Pipeline:
    return Pipeline(
        name=f"scan-{of.title}",
        data=of.data,
        pretrain=SimCLR(encoder=EncoderSpec(stem="imagenet", width=16), views=of.crops, temperature=0.5, n_epochs=40,
                        batch_size=128, lr=0.15),
        embed=EmbedOptions(layer="encoder"),
        cluster=SCAN(views=of.strong, n_epochs=15, batch_size=128, lr=1e-3),
        refine=SelfLabel(views=of.strong, threshold=0.95, n_epochs=10, batch_size=128, lr=3e-4),
    )


def _nnm(of: _Small) -> Pipeline:
    method = NNM(views=of.strong, n_epochs=15, batch_size=128, lr=1e-3)
    return replace(_scan(of), name=f"nnm-{of.title}", cluster=method, refine=None)


def _superand(of: _Small) -> Pipeline:
    return Pipeline(
        name=f"superand-{of.title}",
        data=of.data,
        pretrain=SuperAND(encoder=EncoderSpec(stem="imagenet", width=8, streams="rgb_sobel"),
                          views=of.crops_of_superand, n_rounds=2, n_epochs=10, lr_drop_epoch=6, lr_drop_every=2,
                          unification_every=4, temperature=0.3, batch_temperature=0.3),
        embed=EmbedOptions(layer="encoder"),
        cluster=KMeans(),
    )


def _tsuc(of: _Small) -> Pipeline:
    method = TSUC(views=of.crops_of_superand, layer="encoder", prototypes="kmeans", norm="class_columns",
                  temperature=0.03, n_epochs=12, lr_drop_epoch=8, lr_drop_every=2)
    return replace(_superand(of), name=f"tsuc-{of.title}", cluster=method)


def _ruc(pipeline: Pipeline, of: _Small, name: str) -> Pipeline:
    # So short a training leaves networks unsure: few images, or none of a cluster, reach a confidence of 0.99.
    method = RUC(views=of.ruc, split="metric", n_epochs=5, batch_size=128, ramp_length=5,
                 temperature="label_free")
    return replace(pipeline, name=f"{name}-{of.title}", robust=method)


RECIPES = (
    scan_fashion_small, nnm_fashion_small, ruc_fashion_small, superand_fashion_small, tsuc_fashion_small,
    ruc_tsuc_fashion_small, scan_cifar10_small, nnm_cifar10_small, ruc_cifar10_small, superand_cifar10_small,
    tsuc_cifar10_small, ruc_tsuc_cifar10_small)
