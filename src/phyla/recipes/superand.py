"""Super-AND, its two ancestors, and TSUC on top of it."""

from dataclasses import replace

from phyla.cluster.kmeans import KMeans
from phyla.cluster.tsuc import TSUC
from phyla.images.augment import Views
from phyla.nets.resnet import EncoderSpec
from phyla.pipeline import Data, EmbedOptions, EvaluateOptions, NeighborOptions, Pipeline
from phyla.pretrain.superand import SuperAND
from phyla.recipes.settings import CIFAR10, CIFAR100_SUPERAND, DIGIT_CROPS, IMAGENET, SVHN, Normalization


def superand_digits() -> Pipeline:
    """Embed scikit-learn's 1,797 digits with Super-AND, and cluster the embeddings by k-means: every part, in minutes.

    Paper: Super-AND's rounds (Han et al. 2020) at a small size; the settings are ours. At the published temperature,
    0.1, neighbors are as good and k-means finds less: 1,797 images stand further apart.
    Command: phyla run superand-digits            Cost: minutes on two cores.
    Expected: see results/superand-digits; k-means on pixels 0.793.
    """
    return Pipeline(
        name="superand-digits",
        data=Data("digits"),
        pretrain=SuperAND(encoder=EncoderSpec(width=32, streams="rgb_sobel"), views=DIGIT_CROPS, n_rounds=2,
                          n_epochs=16, lr_drop_epoch=10, lr_drop_every=3, unification_every=6, temperature=0.3,
                          batch_temperature=0.3),
        embed=EmbedOptions(layer="encoder"),
        cluster=KMeans(n_clusters=10),
        evaluate=EvaluateOptions(knn_neighbors=20),
    )


def superand_cifar10() -> Pipeline:
    """Embed CIFAR-10 with Super-AND as published; k-means on the embeddings makes a classifier of it.

    Paper: Super-AND (Han et al. 2020), kNN of the 10,000 test images against the memory of the 50,000.
    Command: phyla run superand-cifar10            Cost: 6.7e17 FLOP; a GPU.
    Expected (authors, best of 1000 evaluations): kNN 89.2; their last 10 epochs 89.1; embedding + k-means 38.3.
    """
    return _superand("superand-cifar10", "cifar10", 10, CIFAR10)


def superand_cifar100() -> Pipeline:
    """Embed CIFAR-100 with Super-AND as published; see superand-cifar10.

    Expected (authors, best of 1000 evaluations): kNN 61.5.
    """
    return _superand("superand-cifar100", "cifar100", 100, CIFAR100_SUPERAND)


def superand_svhn() -> Pipeline:
    """Embed the 73,257 digits of SVHN with Super-AND; its settings there are not published, CIFAR-10's are used.

    Expected (authors, best of 1000 evaluations): kNN 94.9.
    """
    return _superand("superand-svhn", "svhn", 10, SVHN)


def superand_stl10() -> Pipeline:
    """Embed STL-10's 105,000 training images with Super-AND at 32 pixels; the authors' settings are not published.

    The published network needs 32 pixels, or global pooling (ours): superand-stl10-96 has the images as they are.
    """
    return _superand("superand-stl10", "stl10", 10, IMAGENET, pretrain_split="train+unlabeled")


def superand_stl10_96() -> Pipeline:
    """Embed STL-10's 105,000 training images with Super-AND at 96 pixels; see superand-stl10.

    The published trunk with global pooling, nine times the work of 32 pixels.
    """
    return _superand("superand-stl10-96", "stl10", 10, IMAGENET, size=96, pretrain_split="train+unlabeled")


def superand_dogs() -> Pipeline:
    """Embed the 12,000 training images of Stanford Dogs with Super-AND at 96 pixels.

    The authors' settings are not published; CIFAR-10's are used.
    Expected (authors, best of 1000 evaluations): kNN 39.0.
    """
    return _superand("superand-dogs", "dogs", 120, IMAGENET, size=96)


def superand_cub200() -> Pipeline:
    """Embed the 5,994 training images of CUB-200-2011 with Super-AND at 96 pixels; see superand-dogs.

    Expected (authors, best of 1000 evaluations): kNN 17.6.
    """
    return _superand("superand-cub200", "cub200", 200, IMAGENET, size=96)


def superand_folder() -> Pipeline:
    """Embed anyone's images with Super-AND, trained from scratch at a small size, and cluster them by TSUC.

    Command: phyla run FOLDER --recipe superand-folder --classes 10            Cost: minutes for a thousand images.
    The settings are ours: half width, an ImageNet stem, 64 pixels, three rounds.
    """
    views = Views("simclr", 64, *IMAGENET, jitter=1.0, hue=0.4)
    return Pipeline(
        name="superand-folder",
        data=Data("", size=64),
        pretrain=SuperAND(encoder=EncoderSpec(stem="imagenet", width=32, streams="rgb_sobel"), views=views, n_rounds=3,
                          n_epochs=30, lr_drop_epoch=18, lr_drop_every=6, unification_every=12),
        embed=EmbedOptions(layer="encoder"),
        cluster=TSUC(views=views, layer="encoder", prototypes="kmeans", norm="class_columns", temperature=0.03,
                     n_epochs=30, lr_drop_epoch=18, lr_drop_every=6),
        neighbors=NeighborOptions(n_neighbors=None),
        evaluate=EvaluateOptions(knn_neighbors=20),
    )


def and_cifar10() -> Pipeline:
    """Embed CIFAR-10 with AND, Super-AND's parent: anchors and their neighbors, no augmentation or entropy loss.

    Paper: AND (Huang et al. 2019). Expected (as Super-AND's authors report it): kNN 86.3, then TSUC 73.9.
    """
    return _ablated(superand_cifar10(), "and-cifar10", augmentation_weight=0.0, unification_step=0.0)


def instance_cifar10() -> Pipeline:
    """Embed CIFAR-10 by instance discrimination alone: one round, every image its own class.

    Paper: Wu et al. 2018, with a full softmax. Expected (as Super-AND's authors report it): kNN 80.8, then TSUC 63.8.
    """
    return _ablated(superand_cifar10(), "instance-cifar10", n_rounds=1, augmentation_weight=0.0, unification_step=0.0)


def tsuc_digits() -> Pipeline:
    """Cluster scikit-learn's 1,797 digits with both stages of TSUC, at a small size; the settings are ours.

    Prototypes begin as centers of k-means: the published random ones need more steps than 1,797 images give in minutes.
    Command: phyla run tsuc-digits            Cost: minutes on two cores.
    Expected: see results/tsuc-digits; k-means on pixels 0.793.
    """
    return replace(superand_digits(), name="tsuc-digits",
                   cluster=TSUC(views=DIGIT_CROPS, layer="encoder", prototypes="kmeans", norm="class_columns",
                                temperature=0.03, n_epochs=20, lr_drop_epoch=12, lr_drop_every=4))


def tsuc_cifar10() -> Pipeline:
    """Cluster CIFAR-10 with both stages of TSUC as published.

    Paper: TSUC (Han et al. 2020, EmbedUL), scored on the training images; the row of the test images is for honesty.
    Command: phyla run tsuc-cifar10            Cost: 6.7e17 FLOP and 2.0e17; a GPU.
    Expected (authors, six trainings, training images): 78.8 +- 3.2; the published run's head 81.0, mean of heads 71.8.
    """
    return _tsuc(superand_cifar10(), "tsuc-cifar10")


def tsuc_cifar20() -> Pipeline:
    """Cluster CIFAR-100's images into its 20 super-classes with TSUC; see tsuc-cifar10.

    Expected (authors, six trainings, training images): 35.0 +- 1.7.
    """
    return _tsuc(_superand("", "cifar20", 20, CIFAR100_SUPERAND), "tsuc-cifar20")


def tsuc_cifar100() -> Pipeline:
    """Cluster CIFAR-100 into 100 classes with TSUC; see tsuc-cifar10.

    Expected (authors, six trainings, training images): 26.7 +- 1.0.
    """
    return _tsuc(superand_cifar100(), "tsuc-cifar100")


def tsuc_stl10() -> Pipeline:
    """Cluster STL-10's 13,000 labelled images with TSUC at 32 pixels; the encoder learns from all 113,000.

    The authors give the images of each stage and no other setting.
    Expected (authors, six trainings): 67.4 +- 1.8.
    """
    pipeline = _tsuc(superand_stl10(), "tsuc-stl10")
    return replace(pipeline, data=replace(pipeline.data, split="train+test", pretrain_split="train+test+unlabeled",
                                          held_out=None))


_SIZES = ("stl10", "dogs", "cub200")  # sets whose images are stored at the size they are seen at


def _superand(name: str, source: str, n_clusters: int, norm: Normalization, *, size: int = 32,
              pretrain_split: str | None = None) -> Pipeline:
    views = Views("simclr", size, *norm, jitter=1.0, hue=0.4)
    return Pipeline(
        name=name,
        data=Data(source, held_out="test", pretrain_split=pretrain_split, size=size if source in _SIZES else None),
        pretrain=SuperAND(encoder=EncoderSpec(streams="rgb_sobel"), views=views),
        embed=EmbedOptions(layer="encoder"),
        cluster=KMeans(n_clusters=n_clusters),
        evaluate=EvaluateOptions(knn_neighbors=200),
    )


def _ablated(pipeline: Pipeline, name: str, **options: float) -> Pipeline:
    return replace(pipeline, name=name, pretrain=replace(pipeline.pretrain, **options))  # type: ignore[arg-type]


def _tsuc(pipeline: Pipeline, name: str) -> Pipeline:
    cluster = TSUC(n_clusters=pipeline.cluster.n_clusters, views=pipeline.pretrain.views)
    return replace(pipeline, name=name, cluster=cluster)


RECIPES = (
    superand_digits, superand_cifar10, superand_cifar100, superand_svhn, superand_stl10, superand_stl10_96,
    superand_dogs, superand_cub200, superand_folder, and_cifar10, instance_cifar10, tsuc_digits, tsuc_cifar10,
    tsuc_cifar20, tsuc_cifar100, tsuc_stl10)
