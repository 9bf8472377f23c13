"""The public checkpoint files: what each is, where its authors keep it, its licence, and what it should score.

phyla passes none of them on. Ids are those in the authors' READMEs; scores are the authors', as shares of 1, under the
names of our own tables. What they were measured on stands beside them, because it differs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_TITLES = {"hungarian_accuracy": "Hungarian accuracy", "nmi": "NMI", "ari": "ARI",
           "knn_accuracy_200_memory": "kNN accuracy against the memory", "neighbor_purity": "neighbor purity",
           "heads_mean_hungarian_accuracy": "mean of the heads", "heads_best_hungarian_accuracy": "best head by labels"}


@dataclass(frozen=True)
class Expected:
    """What a file should score in a run made of it.

    Parameters
    ----------
    recipe : to give as ``--as``
    images : in words, those that were scored
    values : by the names of our tables
    row : the row of the run's table, "" for the result of the file
    note : how the number came about
    """

    recipe: str
    images: str
    values: Mapping[str, float] = field(default_factory=dict)
    row: str = ""
    note: str = ""

    def text(self) -> str:
        """Return it as a sentence without a full stop, in percent."""
        if not self.values:
            return self.note or "no score published"
        told = ", ".join(f"{_TITLES[name]} {_percent(value)}" for name, value in self.values.items())
        row = f" ({self.row})" if self.row else ""
        return f"{told}{row} on {self.images}" + (f"; {self.note}" if self.note else "")


def _percent(value: float) -> str:
    return f"{100 * value:.2f}".removesuffix("0")  # one decimal, or two where the second says something


@dataclass(frozen=True)
class Checkpoint:
    """One public file.

    Parameters
    ----------
    what : what was trained, and the network
    layout : the kind that ``load_published`` finds in it
    place : the project, by name; the file is linked from its README
    file_id : on Google Drive; the name of the file where it lies elsewhere
    licence : of the project, and so of the weights
    expected : one entry a recipe that takes it
    """

    what: str
    layout: str
    place: str
    file_id: str
    licence: str
    expected: tuple[Expected, ...]

    def text(self) -> str:
        """Return the line of a list."""
        recipes = " or ".join(dict.fromkeys(each.recipe for each in self.expected if each.recipe))
        taken = f"--as {recipes}" if recipes else "no recipe of its own"
        scores = " | ".join(dict.fromkeys(each.text() for each in self.expected))
        return f"{self.what} ({taken}): {scores}. {self.layout} file {self.file_id} of {self.place}, {self.licence}"


class _Source(NamedTuple):
    place: str
    licence: str

    def file(self, what: str, layout: str, file_id: str, *expected: Expected) -> Checkpoint:
        return Checkpoint(what, layout, self.place, file_id, self.licence, expected)


_SCAN = _Source("github.com/wvangansbeke/Unsupervised-Classification", "CC BY-NC 4.0")
_MOCO = _Source("github.com/facebookresearch/moco", "CC BY-NC 4.0")
_NNM = _Source("github.com/ZhiyuanDang/NNM", "CC BY-NC 4.0")
_RUC = _Source("github.com/deu30303/RUC", "no licence stated")
_RUC_OF_SCAN = _Source(_RUC.place, "CC BY-NC 4.0 (SCAN's)")
_SAND = _Source("github.com/super-AND/super-AND", "no licence stated")
_EMBEDUL = _Source("github.com/EmbedUL/EmbedUL", "no licence stated")
_AND = _Source("github.com/Raymond-sci/AND", "MIT")

_TEST = {"cifar10": "the 10,000 test images", "cifar20": "the 10,000 test images", "stl10": "the 8,000 test images",
         "imagenet50": "the 2,500 validation images", "imagenet100": "the 5,000 validation images",
         "imagenet200": "the 10,000 validation images", "imagenet1000": "the 50,000 validation images"}
_DATA = {"cifar10": "CIFAR-10", "cifar20": "CIFAR-20", "stl10": "STL-10", "imagenet50": "ImageNet-50",
         "imagenet100": "ImageNet-100", "imagenet200": "ImageNet-200", "imagenet1000": "ImageNet"}
_TRAINED_ON = {"cifar10": "the 50,000 training images", "cifar20": "the 50,000 training images",
               "stl10": "the 13,000 images of training and test"}
_KMEANS = "k-means on embeddings"


def _clustered(accuracy: float, *others: float) -> dict[str, float]:
    return dict(zip(("hungarian_accuracy", "nmi", "ari"), (accuracy, *others), strict=False))


def _on_test(data: str, stage: str, file_id: str, *values: float, note: str = "best run") -> Checkpoint:
    """Return a file of SCAN's zoo: ``stage`` is scan or selflabel."""
    network = "ResNet-50" if data.startswith("imagenet") else "ResNet-18"
    method = "SCAN" if stage == "scan" else "SCAN + self-label"
    return _SCAN.file(f"{method} on {_DATA[data]}, {network}", stage, file_id,
                      Expected(f"scan-{data}", _TEST[data], _clustered(*values), note=note))


def _nnm(data: str, file_id: str, accuracy: float, pretext_id: str) -> Iterator[tuple[str, Checkpoint]]:
    yield f"nnm-{data}-pretext", _NNM.file(
        f"NNM's SimCLR on {_DATA[data]}, ResNet-18", "pretext", pretext_id, Expected(f"nnm-{data}", _TEST[data]))
    yield f"nnm-{data}", _NNM.file(
        f"NNM on {_DATA[data]}, ResNet-18", "scan", file_id, Expected(
            f"nnm-{data}", _TEST[data], _clustered(accuracy), note="the epoch that did best on these images by labels"))


def _ruc(data: str, file_id: str, after: float, before_id: str, before: float, pretext_id: str
         ) -> Iterator[tuple[str, Checkpoint]]:
    recipe, images = f"ruc-scan-{data}", _TRAINED_ON[data]
    yield f"ruc-{data}-pretext", _RUC_OF_SCAN.file(
        f"SCAN's SimCLR on {_DATA[data]} as RUC links it (e_model)", "pretext", pretext_id, Expected(recipe, images))
    yield f"ruc-{data}-selflabel", _RUC_OF_SCAN.file(
        f"SCAN + self-label on {_DATA[data]} as RUC links it (o_model)", "selflabel", before_id,
        Expected(recipe, images, _clustered(before), note="as RUC's authors scored it"))
    yield f"ruc-{data}", _RUC.file(
        f"SCAN + RUC on {_DATA[data]}, two ResNet-18", "ruc", file_id,
        Expected(recipe, images, _clustered(after), note="hybrid split, last epoch; the images it was trained on"))


CHECKPOINTS: Mapping[str, Checkpoint] = {
    "scan-cifar10-pretext": _SCAN.file(
        "SimCLR on CIFAR-10, ResNet-18", "pretext", "1Cl5oAcJKoNE5FSTZsBSAKLcyA5jXGgTT",
        Expected("scan-cifar10", _TEST["cifar10"], _clustered(0.659, 0.598, 0.509), _KMEANS, "mean of 10 runs")),
    "scan-cifar20-pretext": _SCAN.file(
        "SimCLR on CIFAR-20, ResNet-18", "pretext", "1huW-ChBVvKcx7t8HyDaWTQB5Li1Fht9x",
        Expected("scan-cifar20", _TEST["cifar20"], _clustered(0.395, 0.402, 0.239), _KMEANS, "mean of 10 runs")),
    "scan-stl10-pretext": _SCAN.file(
        "SimCLR on STL-10, ResNet-18", "pretext", "1261NDFfXuKR2Dh4RWHYYhcicdcPag9NZ",
        Expected("scan-stl10", "the 5,000 training images, 20 neighbors", {"neighbor_purity": 0.7281},
                 "embeddings (probes)", "the author's rerun"),
        Expected("scan-stl10", "the 8,000 test images, 5 neighbors", {"neighbor_purity": 0.7985},
                 "embeddings (probes)", "the author's rerun")),
    "scan-cifar10": _on_test("cifar10", "scan", "1v6b6jJY5M4-duSqWpGFmdf9e9T3dPrx0", 0.816, 0.715, 0.665),
    "scan-cifar10-selflabel": _on_test("cifar10", "selflabel", "18gITFzAbQsGS5vt8hyi5HjbeRDsVLihw",
                                       0.883, 0.797, 0.772),
    "scan-cifar20": _on_test("cifar20", "scan", "1pPCi1QG05kP_JdoX29dxEhVddIRk68Sd", 0.440, 0.449, 0.283),
    "scan-cifar20-selflabel": _on_test(
        "cifar20", "selflabel", "11mEmpDMyq63pM4kmDy6ItHouI6Q__uB7", 0.4723,
        note="a user's measurement; the README says 50.7 (NMI 48.6, ARI 33.3), of another run"),
    "scan-stl10": _on_test("stl10", "scan", "1y1cnGLpeTVo80cnWhAJy-B72FYs2AjZ_", 0.792, 0.673, 0.618),
    "scan-stl10-selflabel": _on_test("stl10", "selflabel", "1uNYN9XOMIPb40hmxOzALg4PWhU_xwkEF", 0.809, 0.698, 0.646),
    "scan-imagenet50": _on_test("imagenet50", "scan", "1UdBtvCHVGd08x8SiH6Cuh6mQmqsADg0t", 0.751, 0.805, 0.635),
    "scan-imagenet50-selflabel": _on_test("imagenet50", "selflabel", "1iOE4_lQ4w7CGPLU4algBDG34nz68eN8o",
                                          0.768, 0.822, 0.661),
    "scan-imagenet100": _on_test("imagenet100", "scan", "1tcROQ3wc_MbxmLr05qt-UvF9yVrBwBq9", 0.662, 0.787, 0.544),
    "scan-imagenet100-selflabel": _on_test("imagenet100", "selflabel", "1VVgRpJ9DJn9dNrbAKbfPer2FllTvP6Cs",
                                           0.689, 0.808, 0.576),
    "scan-imagenet200": _on_test("imagenet200", "scan", "1oO-OCW2MiXmNC4sD6pkw8PurYScX7oVW", 0.563, 0.757, 0.441),
    "scan-imagenet200-selflabel": _on_test("imagenet200", "selflabel", "11dfobUwy6ragh7PoqFagoEns5-teWalm",
                                           0.581, 0.772, 0.470),
    "scan-imagenet1000": _on_test("imagenet1000", "scan", "1PcF8ydoWoqhxARGuW55KcNarfZyJwcza", 0.399, 0.720, 0.275,
                                  note="the head with the lowest loss"),
    "moco-imagenet": _MOCO.file(
        "MoCo v2, 800 epochs of ImageNet, ResNet-50", "moco", "moco_v2_800ep_pretrain.pth.tar",
        *(Expected(f"scan-{data}", _TEST[data], _clustered(*values), _KMEANS, "as SCAN's authors report it")
          for data, values in (("imagenet50", (0.659, 0.775, 0.579)), ("imagenet100", (0.597, 0.761, 0.508)),
                               ("imagenet200", (0.525, 0.755, 0.432))))),
    **dict(_nnm("cifar10", "1_7tua1Sam5T1s9fhopAw3buIBLrnI3dy", 0.8430, "1Wk3wJZ1puU8ptAaMgLOhviG54ooGMXPf")),
    **dict(_nnm("cifar20", "1-kqS3Myrw6S1Y9O0kjsHB3kiCv1_d-yw", 0.4773, "1GELVDCmompIT12iKv-Ib4SBNnfohmUTH")),
    **dict(_nnm("stl10", "1aC4aKkoRO2kKAQv1COYcucqRcZ6rdk59", 0.8084, "1ZK5zs6jfjm6_CCm4gf6Ji0gGGrQCc0bk")),
    **dict(_ruc("cifar10", "16Wcby-8etsTPPIlsQb9oluk3NN8kSmCX", 0.901, "1ONJbw6Qnccgl20uN38pS3RgpqeobAWxb", 0.887,
                "1uczIKDCQRZiysgGmyaro0Ukk8VIDQlu3")),
    **dict(_ruc("cifar20", "118SIQ3YBx1y9Uoq-Wo3FyW9iYELKjcQJ", 0.543, "1SWXqE5Esu4j4n7QUrL6kbR39Xzb6bgJg", 0.506,
                "1JzzMjqvd3zPNDh0ndWWfgJrxAEg3jTKw")),
    **dict(_ruc("stl10", "1mHLkC2JrKsnMswIeT6wKO4fV97DbTHtJ", 0.866, "15lFVyOjZvGbqdZ1R150XL9-SuGgo57kp", 0.814,
                "148D5ys5KA4Xm2sSBDqNmCUxiCgzf0cP6")),
    "superand-cifar10": _SAND.file(
        "Super-AND on CIFAR-10, two streams of ResNet-18", "superand", "1cABTquqOl5N2Wbchxs0-DBI6OVfnqY5J",
        *(Expected(recipe, _TEST["cifar10"], {"knn_accuracy_200_memory": 0.8924}, "embeddings (probes)",
                   "the best of 1000 evaluations") for recipe in ("superand-cifar10", "tsuc-cifar10"))),
    "tsuc-cifar10": _EMBEDUL.file(
        "TSUC on CIFAR-10, two streams of ResNet-18, five heads", "tsuc", "1H3ppCkPQNHFEYQS4PLuV26Cp3HpbG4Nb",
        Expected("tsuc-cifar10", _TRAINED_ON["cifar10"], {"heads_mean_hungarian_accuracy": 0.7179,
                                                          "heads_best_hungarian_accuracy": 0.8098},
                 note="the five heads: 64.87, 72.31, 60.81, 80.98, 79.97; the file names none as best")),
    "and": _AND.file(
        "AND, ResNet-18", "superand", "1tMopB0iLPaJzw81tqZuXbK6YYAQRLXA-",
        Expected("", "", note="wants images scaled by ImageNet's mean and deviation, which no recipe here does")),
}
"""By the name that `phyla list checkpoints` shows."""


def expected_of(recipe: str, layout: str) -> list[Expected]:
    """Return what public files of a layout should score in runs of a recipe; none where nothing is known."""
    return [each for known in CHECKPOINTS.values() if known.layout == layout
            for each in known.expected if each.recipe == recipe]
