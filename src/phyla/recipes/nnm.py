"""NNM, by the authors' configurations, and on digits."""

from dataclasses import replace

from phyla.cluster.nnm import NNM
from phyla.pipeline import Data, EmbedOptions, Pipeline
from phyla.recipes.scan import imagenet, scan_cifar10, scan_cifar20, scan_digits, scan_stl10, small
from phyla.recipes.settings import IMAGENET


def nnm_digits() -> Pipeline:
    """Cluster scikit-learn's 1,797 digits with NNM from scan-digits' encoder; the settings are ours.

    Command: phyla run nnm-digits            Cost: minutes on two cores.
    Expected: see results/nnm-digits; k-means on pixels 0.793.
    """
    first = scan_digits()
    return replace(first, name="nnm-digits", refine=None,
                   cluster=NNM(views=first.cluster.views, n_epochs=25, batch_size=128, lr=1e-3))


def nnm_cifar10() -> Pipeline:
    """Cluster CIFAR-10 with NNM; the targets over all images belong to their images, unlike in the released code.

    Paper: NNM (Dang et al. 2021), scored on the 10,000 test images. The released behaviour: --set
    cluster.global_targets=visit_order.
    Command: phyla run nnm-cifar10            Cost: 2.2e17 FLOP; a GPU.
    Expected (authors, the epoch with the best test accuracy): 84.3; others' reruns 77 to 80.
    """
    return _nnm(scan_cifar10(), "nnm-cifar10", batch=200)


def nnm_cifar20() -> Pipeline:
    """Cluster CIFAR-100's images into its 20 super-classes with NNM; see nnm-cifar10.

    Expected (authors, the epoch with the best test accuracy): 47.7.
    """
    return _nnm(scan_cifar20(), "nnm-cifar20", batch=500)


def nnm_stl10() -> Pipeline:
    """Cluster STL-10's 5,000 training images with NNM; see nnm-cifar10.

    Expected (authors, the epoch with the best test accuracy): 80.8; a rerun: 73.6, its last epoch 69.1.
    """
    return _nnm(scan_stl10(), "nnm-stl10", batch=200)


def nnm_imagenet10() -> Pipeline:
    """Cluster ImageNet-10 with NNM at 96 pixels, encoder and all, from a SimCLR encoder trained at 96 pixels.

    Configured by the authors; no result is known.
    Expected: not published.
    """
    pipeline = small("nnm-imagenet10", "imagenet10", 10, "stl", IMAGENET, size=96, cutout=32)
    pipeline = replace(pipeline, data=Data("imagenet10", held_out="val", size=256))
    return _nnm(pipeline, "nnm-imagenet10", batch=128, n_heads=1)


def nnm_imagenetdogs() -> Pipeline:
    """Cluster 15 breeds of dogs of ImageNet with NNM from a MoCo v2 encoder; see scan-imagenet50 for its file.

    Configured by the authors; no result is known.
    Expected: not published.
    """
    return _nnm_imagenet("nnm-imagenetdogs", "imagenetdogs", 15, batch=512, n_heads=3)


def nnm_imagenet50() -> Pipeline:
    """Cluster 50 ImageNet classes with NNM from a MoCo v2 encoder; see scan-imagenet50 for its file.

    Configured by the authors; no result is known.
    Expected: not published.
    """
    return _nnm_imagenet("nnm-imagenet50", "imagenet50", 50, batch=512, n_heads=10)


def nnm_imagenet100() -> Pipeline:
    """Cluster 100 ImageNet classes with NNM; see nnm-imagenet50.

    Expected: not published.
    """
    return _nnm_imagenet("nnm-imagenet100", "imagenet100", 100, batch=1000, n_heads=3)


def nnm_imagenet200() -> Pipeline:
    """Cluster 200 ImageNet classes with NNM; see nnm-imagenet50.

    Expected: not published.
    """
    return _nnm_imagenet("nnm-imagenet200", "imagenet200", 200, batch=1024, n_heads=1)


def _nnm(pipeline: Pipeline, name: str, *, batch: int, n_heads: int = 3) -> Pipeline:
    cluster = NNM(n_clusters=pipeline.cluster.n_clusters, n_heads=n_heads, batch_size=batch,
                  views=pipeline.cluster.views)
    return replace(pipeline, name=name, embed=EmbedOptions(layer="encoder"), cluster=cluster, refine=None)


def _nnm_imagenet(name: str, source: str, n_clusters: int, *, batch: int, n_heads: int) -> Pipeline:
    pipeline = imagenet(name, source, n_clusters, batch=batch)
    cluster = NNM(n_clusters=n_clusters, n_heads=n_heads, views=pipeline.pretrain.views, update="heads",
                  optimizer="sgd", lr=5.0, weight_decay=0.0, batch_size=batch)
    return replace(pipeline, cluster=cluster, refine=None)


RECIPES = (
    nnm_digits, nnm_cifar10, nnm_cifar20, nnm_stl10, nnm_imagenet10, nnm_imagenetdogs, nnm_imagenet50,
    nnm_imagenet100, nnm_imagenet200)
