"""SCAN, as published on every data set, on digits, and on anyone's folder."""

from dataclasses import replace

from phyla.cluster.scan import SCAN
from phyla.images.augment import Views
from phyla.nets.resnet import EncoderSpec, Stem
from phyla.pipeline import Data, EmbedOptions, NeighborOptions, Pipeline
from phyla.pretrain.simclr import SimCLR
from phyla.recipes.settings import CIFAR10, CIFAR100, DIGIT_CROPS, DIGIT_OPERATIONS, DIGITS, IMAGENET, Normalization
from phyla.refine.selflabel import SelfLabel
from phyla.zoo import PublishedEncoder


def scan_digits() -> Pipeline:
    """Cluster scikit-learn's 1,797 handwritten digits (8x8): the demonstration, and the quickest check of everything.

    Paper: SCAN's stages (van Gansbeke et al. 2020) at a small size; the settings are ours.
    Command: phyla run            Cost: minutes on two cores.
    Expected: see results/scan-digits; k-means on pixels 0.793.
    """
    strong = Views("strong", 8, *DIGITS, flip=0.0, rotate=15.0, cutout=2, operations=DIGIT_OPERATIONS)
    return Pipeline(
        name="scan-digits",
        data=Data("digits"),
        pretrain=SimCLR(encoder=EncoderSpec(width=32), views=DIGIT_CROPS, temperature=0.5, n_epochs=80,
                        batch_size=256, lr=0.3),
        embed=EmbedOptions(layer="encoder"),
        cluster=SCAN(n_clusters=10, views=strong, n_epochs=25, batch_size=128, lr=1e-3),
        refine=SelfLabel(views=strong, threshold=0.95, n_epochs=30, batch_size=256),
    )


def scan_cifar10() -> Pipeline:
    """Cluster CIFAR-10 as published.

    Paper: SCAN, 50,000 training images, scored on the 10,000 test images.
    Command: phyla run scan-cifar10            Cost: 2.3e17 FLOP; a GPU.
    Expected (authors, mean of 10 runs on one pretext): SCAN 81.8 +- 0.3, self-label 87.6 +- 0.4.
    """
    return small("scan-cifar10", "cifar10", 10, "cifar", CIFAR10, size=32)


def scan_cifar20() -> Pipeline:
    """Cluster CIFAR-100's images into its 20 super-classes as published.

    Paper: SCAN (where it is called CIFAR100-20).
    Command: phyla run scan-cifar20            Cost: 2.4e17 FLOP; a GPU.
    Expected (authors, mean of 10 runs): SCAN 42.2 +- 3.0, self-label 45.9 +- 2.7.
    """
    return small("scan-cifar20", "cifar20", 20, "cifar", CIFAR100, size=32, scan_batch=512, scan_epochs=100)


def scan_cifar100() -> Pipeline:
    """Cluster CIFAR-100 into 100 classes with SCAN; its settings there are not published, CIFAR-20's are used.

    Expected (RUC's authors, best run, training images): self-label 34.6.
    """
    return small("scan-cifar100", "cifar100", 100, "cifar", CIFAR100, size=32, scan_batch=512, scan_epochs=100)


def scan_stl10() -> Pipeline:
    """Cluster STL-10 as published: the encoder learns from 105,000 images, 5,000 are clustered.

    Paper: SCAN, 96x96, scored on the 8,000 test images.
    Command: phyla run scan-stl10            Cost: 9.4e17 FLOP; a GPU.
    Expected (authors, mean of 10 runs): SCAN 75.5 +- 2.0, self-label 76.7 +- 1.9.
    """
    return small("scan-stl10", "stl10", 10, "stl", IMAGENET, size=96, cutout=32, scan_epochs=100, self_epochs=100,
                  pretrain_split="train+unlabeled")


def scan_imagenet50() -> Pipeline:
    """Cluster 50 ImageNet classes from a MoCo v2 encoder that is not trained further in stage 2.

    Paper: SCAN; options as published, crops taken from the central square instead of the oblong picture. Needs
    moco_v2_800ep_pretrain.pth.tar: found in PHYLA_DATA, or named with --set pretrain.path=FILE.
    Command: phyla run scan-imagenet50 --set pretrain.path=FILE            Cost: 1.1e17 FLOP and self-labelling; a GPU.
    Expected (authors, best run): SCAN 75.1, self-label 76.8.
    """
    return imagenet("scan-imagenet50", "imagenet50", 50, batch=512)


def scan_imagenet100() -> Pipeline:
    """Cluster 100 ImageNet classes; see scan-imagenet50.

    Expected (authors, best run): SCAN 66.2, self-label 68.9.
    """
    return imagenet("scan-imagenet100", "imagenet100", 100, batch=1024)


def scan_imagenet200() -> Pipeline:
    """Cluster 200 ImageNet classes; see scan-imagenet50.

    Expected (authors, best run): SCAN 56.3, self-label 58.1.
    """
    return imagenet("scan-imagenet200", "imagenet200", 200, batch=1024)


def scan_imagenet1000() -> Pipeline:
    """Cluster all of ImageNet with the heads alone; the authors publish no configuration but describe one.

    Batch 4096, learning rate 5, 50 neighbors; self-labelling "does not help" there and is left out.
    Expected (authors, best run): SCAN 39.9.
    """
    return replace(imagenet("scan-imagenet1000", "imagenet", 1000, batch=4096), refine=None)


def scan_folder() -> Pipeline:
    """Cluster anyone's images, trained from scratch at a small size that two cores can carry.

    Command: phyla run FOLDER --classes 10            Cost: minutes for a thousand images on two cores.
    The settings are ours: a ResNet-18 of half width with an ImageNet stem, 64 pixels.
    """
    simclr = Views("simclr", 64, *IMAGENET)
    strong = Views("strong", 64, *IMAGENET, cutout=21)
    return Pipeline(
        name="scan-folder",
        data=Data("", size=64),
        pretrain=SimCLR(encoder=EncoderSpec(stem="imagenet", width=32), views=simclr, n_epochs=100, batch_size=256,
                        lr=0.3),
        cluster=SCAN(views=strong, n_epochs=30, batch_size=128, lr=3e-4),
        refine=SelfLabel(views=strong, n_epochs=30, batch_size=256, lr=3e-4),
        neighbors=NeighborOptions(n_neighbors=None),
    )


def small(name: str, source: str, n_clusters: int, stem: Stem, norm: Normalization, *, size: int,
           cutout: int = 16, scan_batch: int = 128, scan_epochs: int = 50, self_epochs: int = 200,
           pretrain_split: str | None = None) -> Pipeline:
    """Return the published pipeline of CIFAR-10, CIFAR-20 and STL-10: SimCLR, SCAN, self-labelling."""
    strong = Views("strong", size, *norm, cutout=cutout)
    return Pipeline(
        name=name,
        data=Data(source, held_out="test", pretrain_split=pretrain_split),
        pretrain=SimCLR(encoder=EncoderSpec(stem=stem), views=Views("simclr", size, *norm)),
        cluster=SCAN(n_clusters=n_clusters, views=strong, n_epochs=scan_epochs, batch_size=scan_batch),
        refine=SelfLabel(views=strong, n_epochs=self_epochs, keep="last"),
    )


def imagenet(name: str, source: str, n_clusters: int, *, batch: int) -> Pipeline:
    """Return the published pipeline of ImageNet and its subsets, from a MoCo v2 encoder that stays frozen."""
    simclr = Views("simclr", 224, *IMAGENET)
    return Pipeline(
        name=name,
        data=Data(source, held_out="val", size=256),
        pretrain=PublishedEncoder(stem="imagenet", views=simclr),
        embed=EmbedOptions(layer="encoder"),
        neighbors=NeighborOptions(n_neighbors=50),
        cluster=SCAN(n_clusters=n_clusters, n_heads=10, views=simclr, update="heads", optimizer="sgd", lr=5.0,
                     weight_decay=0.0, n_epochs=100, batch_size=batch),
        refine=SelfLabel(views=Views("strong", 224, *IMAGENET, cutout=75), balanced=False, ema="write_back",
                         optimizer="sgd", lr=0.03, weight_decay=0.0, n_epochs=25, batch_size=512,
                         keep="last"),
    )


RECIPES = (
    scan_digits, scan_cifar10, scan_cifar20, scan_cifar100, scan_stl10, scan_imagenet50, scan_imagenet100,
    scan_imagenet200, scan_imagenet1000, scan_folder)
