"""The public data sets by name: what each holds, which files it needs, and where those are found or put.

A data set is looked for in ``data_dir``; without one in ``$PHYLA_DATA`` and then in the cache folder. Under each of
these the layouts that its official archive and the usual loaders leave behind are tried.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from phyla.errors import DataNotFoundError, InputError, nearest
from phyla.images.imagenet import CLASS_IDS

Reader = Literal["digits", "cifar", "npz", "stl", "svhn", "idx", "imagenet", "dogs", "cub"]
Files = Mapping[str, tuple[str, ...]]
NOTHING: Files = MappingProxyType({})


@dataclass(frozen=True)
class Archive:
    """A file of the official distribution, its address and md5; a .tar.gz is unpacked, anything else kept as it is.

    One that holds a single split says which, and is fetched when that split is asked for.
    """

    url: str
    md5: str
    split: str | None = None

    @property
    def filename(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class Layout:
    """One way a data set lies on disk: its reader, and for each split the files or folders with images and labels."""

    reader: Reader
    folders: tuple[str, ...]
    images: Files
    labels: Files
    names: str | None = None


@dataclass(frozen=True)
class DataSet:
    """A public data set.

    Parameters
    ----------
    title : name in reports
    n_classes : true classes
    splits : what may be asked for; ``val`` and ``test`` mean the same wherever only one exists
    size : height and width in pixels when none is asked for
    note : licence, and whom to cite
    homes : folder names tried under the data folder
    layouts : ways it may lie on disk, best first
    archives : official files to download; none where a person has to register, or to agree to something
    classes : names of the classes by index, where they are not in a file that is always there
    class_ids : WordNet ids of an ImageNet subset by class index
    site : where a person gets the files, when they are not downloaded
    """

    title: str
    n_classes: int
    splits: tuple[str, ...]
    size: int
    note: str
    homes: tuple[str, ...]
    layouts: tuple[Layout, ...]
    archives: tuple[Archive, ...] = ()
    classes: tuple[str, ...] = ()
    class_ids: tuple[str, ...] = field(default=(), repr=False)
    site: str = ""


@dataclass(frozen=True)
class Found:
    """Where one split of a data set lies."""

    layout: Layout
    folder: Path
    paths: tuple[Path, ...]


_CIFAR = "https://www.cs.toronto.edu/~kriz"
_CIFAR_NOTE = "no licence stated; cite Krizhevsky 2009"
_DIGITS = tuple("0123456789")
_FINE = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
    shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_COARSE = """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
    household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes
    large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees
    vehicles_1 vehicles_2
"""
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_STL10 = "airplane bird car cat deer dog horse monkey ship truck"


def _cifar100(title: str, n_classes: int, home: str, classes: tuple[str, ...]) -> DataSet:
    files = {"train": ("train",), "test": ("test",)}
    test = {"test": ("cifar100_test.npz",)}
    homes = (home, "cifar100", "cifar-100", "cifar20", "cifar100-test")
    return DataSet(
        title, n_classes, ("train", "test"), 32, _CIFAR_NOTE, homes,
        (Layout("cifar", ("", "cifar-100-python"), files, files, "meta"), Layout("npz", ("",), test, test)),
        (Archive(f"{_CIFAR}/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),), classes)


def _mnist(title: str, note: str, homes: tuple[str, ...], url: str, md5: tuple[str, ...],
           classes: tuple[str, ...]) -> DataSet:
    images = {"train": ("train-images-idx3-ubyte",), "test": ("t10k-images-idx3-ubyte",)}
    labels = {"train": ("train-labels-idx1-ubyte",), "test": ("t10k-labels-idx1-ubyte",)}
    names = [files[split][0] for files in (images, labels) for split in ("train", "test")]
    return DataSet(title, 10, ("train", "test"), 28, note, homes,
                   (Layout("idx", ("", "raw", f"{homes[-1]}/raw"), images, labels),),
                   tuple(Archive(f"{url}/{name}.gz", digest) for name, digest in zip(names, md5, strict=True)), classes)


def _imagenet(title: str, name: str, n_classes: int) -> DataSet:
    def layout(pattern: str) -> Layout:
        folders = {split: (pattern.format(split),) for split in ("train", "val")}
        return Layout("imagenet", ("", "ILSVRC/Data/CLS-LOC"), folders, folders)

    return DataSet(title, n_classes, ("train", "val"), 256,
                   "research only, by registration; cite Russakovsky et al. 2015",
                   (name, "imagenet", "ILSVRC2012", "imagenet-1k"), (layout("ILSVRC2012_img_{}"), layout("{}")),
                   class_ids=CLASS_IDS.get(name, ()), site="image-net.org, by registration")


def _svhn(url: str, md5: Mapping[str, str]) -> DataSet:
    files = {split: (f"{split}_32x32.mat",) for split in md5}
    return DataSet("SVHN", 10, tuple(md5), 32, "non-commercial use only; cite Netzer et al. 2011", ("svhn", "SVHN"),
                   (Layout("svhn", ("",), files, files),),
                   tuple(Archive(f"{url}/{files[split][0]}", digest, split) for split, digest in md5.items()),
                   classes=_DIGITS)


def _dogs() -> DataSet:
    def layout(images: str, lists: str) -> Layout:
        labels = {split: (f"{lists}{split}_list.mat",) for split in ("train", "test")}
        return Layout("dogs", ("",), {split: (images, *files) for split, files in labels.items()}, labels)

    return DataSet("Stanford Dogs", 120, ("train", "test"), 96,
                   "images of ImageNet, research only; cite Khosla et al. 2011",
                   ("dogs", "stanford-dogs", "stanford_dogs", "StanfordDogs", "Stanford_Dogs"),
                   # The archive unpacks to Images, its README says images; the lists come without a folder.
                   tuple(layout(images, lists) for images in ("Images", "images") for lists in ("", "lists/")),
                   site="images.tar and lists.tar of vision.stanford.edu/aditya86/ImageNetDogs, for research only")


def _cub() -> DataSet:
    images = {split: ("images", "images.txt", "train_test_split.txt") for split in ("train", "test")}
    labels = {split: ("images.txt", "image_class_labels.txt", "classes.txt") for split in ("train", "test")}
    return DataSet("CUB-200-2011", 200, ("train", "test"), 96,
                   "photographs of many owners, research only; cite Wah et al. 2011",
                   ("cub200", "CUB_200_2011", "CUB-200-2011", "cub-200-2011", "cub-200", "cub", "CUB"),
                   (Layout("cub", ("", "CUB_200_2011"), images, labels),),
                   site="CUB_200_2011.tgz of vision.caltech.edu/datasets/cub_200_2011, for research only")


_CIFAR10_FILES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}

DATASETS: dict[str, DataSet] = {
    "digits": DataSet("Digits", 10, ("train",), 8, "BSD; inside scikit-learn; cite Alpaydin and Kaynak 1998", (),
                      (Layout("digits", (), {"train": ()}, {"train": ()}),), classes=_DIGITS),
    "cifar10": DataSet("CIFAR-10", 10, ("train", "test"), 32, _CIFAR_NOTE, ("cifar10", "cifar-10"),
                       (Layout("cifar", ("", "cifar-10-batches-py"), _CIFAR10_FILES, _CIFAR10_FILES, "batches.meta"),),
                       (Archive(f"{_CIFAR}/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),
                       tuple(_CIFAR10.split())),
    "cifar20": _cifar100("CIFAR-20", 20, "cifar20", tuple(_COARSE.split())),
    "cifar100": _cifar100("CIFAR-100", 100, "cifar100", tuple(_FINE.split())),
    "stl10": DataSet("STL-10", 10, ("train", "unlabeled", "train+unlabeled", "test"), 96,
                     "no licence stated, research; cite Coates et al. 2011", ("stl10", "stl-10"),
                     (Layout("stl", ("", "stl10_binary"), {s: (f"{s}_X.bin",) for s in ("train", "unlabeled", "test")},
                             {s: (f"{s}_y.bin",) for s in ("train", "test")}, "class_names.txt"),),
                     (Archive("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
                              "91f7769df0f17e558f3565bffb0c7dfb"),),
                     tuple(_STL10.split())),
    "svhn": _svhn("http://ufldl.stanford.edu/housenumbers", {"train": "e26dedcc434d2e4c54c9b2d4a06d8373",
                                                             "test": "eb5a983be6a315427106f1b164d9cef3",
                                                             "extra": "a93ce644f1a588dc4d68dda5feec44a7"}),
    "imagenet": _imagenet("ImageNet", "imagenet", 1000),
    "imagenet10": _imagenet("ImageNet-10", "imagenet10", 10),
    "imagenetdogs": _imagenet("ImageNet-Dogs", "imagenetdogs", 15),
    "imagenet50": _imagenet("ImageNet-50", "imagenet50", 50),
    "imagenet100": _imagenet("ImageNet-100", "imagenet100", 100),
    "imagenet200": _imagenet("ImageNet-200", "imagenet200", 200),
    "dogs": _dogs(),
    "cub200": _cub(),
    "mnist": _mnist("MNIST", "CC BY-SA 3.0; cite LeCun et al. 1998", ("mnist", "MNIST"),
                    "https://ossci-datasets.s3.amazonaws.com/mnist",
                    ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "9fb629c4189551a2d022fa330f9573f3",
                     "d53e105ee54ea40749a09fcbcd1e9432", "ec29112dd5afa0611ce80d1b7f02629c"), _DIGITS),
    "fashion-mnist": _mnist("Fashion-MNIST", "MIT; cite Xiao et al. 2017",
                            ("fashion-mnist", "fashionmnist", "FashionMNIST"),
                            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
                            ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "bef4ecab320f06d8554ea6380940ec79",
                             "25c81989df183df01b3e8a0aad5dffbe", "bb300cfdad3c16e7a12a480ee83cd310"),
                            ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                             "Ankle boot")),
}


def data_set_name(word: str) -> str | None:
    """Return the data set called ``word`` (``dogs``, ``Stanford Dogs``), whatever its case and hyphens, or None."""
    plain = {re.sub(r"[-_ ]", "", called.lower()): name for name, data_set in DATASETS.items()
             for called in (data_set.title, name)}
    return plain.get(re.sub(r"[-_ ]", "", word.lower()))


def split_parts(name: str, split: str) -> tuple[str, ...]:
    """Return the splits on disk that make up ``split``: one, or several for ``train+unlabeled``.

    Raises
    ------
    InputError
        The data set has no such split, or one is named twice.
    """
    splits = DATASETS[name].splits
    other = {"val": "test", "test": "val"}.get(split, split)
    parts = tuple((split if split in splits else other).split("+"))
    if not set(parts) <= set(splits) or len(set(parts)) < len(parts):
        raise InputError(f"{DATASETS[name].title} has no split {split!r}", nearest(split, list(splits)))
    return parts


def cache_folder() -> Path:
    """Return the folder for downloads and decoded pixels: ``$PHYLA_CACHE``, else the platform's place for caches."""
    if chosen := os.environ.get("PHYLA_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "phyla"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "phyla"


def data_folders(data_dir: Path | str | None = None) -> list[Path]:
    """Return the folders that are searched, in order; downloads go to the first that can be written."""
    if data_dir is not None:
        return [Path(data_dir).expanduser()]
    chosen = os.environ.get("PHYLA_DATA")
    return [*([Path(chosen).expanduser()] if chosen else []), cache_folder()]


def _places(data_set: DataSet, layout: Layout, data_dir: Path | str | None) -> Iterator[Path]:
    # A data set's own folder goes before the root: root/train may be anything, root/imagenet/train is not.
    for root in data_folders(data_dir):
        for home in (*data_set.homes, ""):
            for folder in layout.folders:
                yield root / home / folder


def _present(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def locate(name: str, part: str, what: Literal["images", "labels"], data_dir: Path | str | None = None) -> Found | None:
    """Return where the files of one split lie, or None when no place has all of them."""
    data_set = DATASETS[name]
    for layout in data_set.layouts:
        wanted = (layout.images if what == "images" else layout.labels).get(part)
        if wanted is None:
            continue
        if not wanted:
            return Found(layout, Path(), ())
        for folder in _places(data_set, layout, data_dir):
            paths = tuple(path for file in wanted if (path := _present(folder, file)))
            if len(paths) == len(wanted):
                return Found(layout, folder, paths)
    return None


def found_splits(name: str, data_dir: Path | str | None = None) -> tuple[str, ...]:
    """Return the splits of a data set whose images lie on this machine."""
    return tuple(split for split in DATASETS[name].splits
                 if all(locate(name, part, "images", data_dir) for part in split_parts(name, split)))


def not_found(name: str, part: str, what: Literal["images", "labels"], data_dir: Path | str | None,
              reason: str = "") -> DataNotFoundError:
    """Return the error that says which files are missing and where to put them."""
    data_set = DATASETS[name]
    layout = data_set.layouts[0]
    wanted = (layout.images if what == "images" else layout.labels).get(part, ())
    home = data_folders(data_dir)[0] / data_set.homes[0]
    names = [str(Path(layout.folders[-1] if layout.reader != "imagenet" else "", file)) for file in wanted]
    looked = " or ".join(str(folder) for folder in data_folders(data_dir))
    told = _incomplete(data_set, part, what, data_dir) or f"no {_some(names)} under {looked}"
    official = data_set.archives[0].url.rsplit("/", 1)[0] if data_set.archives else data_set.site
    return DataNotFoundError(f"{data_set.title}, split {part}: {told}{reason}",
                             f"put the official files ({official}) into {home}, or name the folder they are in with "
                             "--data or PHYLA_DATA")


def _incomplete(data_set: DataSet, part: str, what: Literal["images", "labels"],
                data_dir: Path | str | None) -> str | None:
    """Return what a place has and lacks where a split's files are not all together, or None where no place has any."""
    for layout in data_set.layouts:
        wanted = (layout.images if what == "images" else layout.labels).get(part, ())
        for folder in _places(data_set, layout, data_dir):
            missing = [file for file in wanted if not _present(folder, file)]
            if len(missing) < len(wanted):
                there = next(file for file in wanted if file not in missing)
                return f"{folder} has {there} and lacks {_some(missing)}"
    return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
