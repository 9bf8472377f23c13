"""Every recipe against the published configuration, and options laid over them by name."""

import dataclasses
import json
from dataclasses import asdict, replace

import pytest

from phyla.cluster.scan import SCAN
from phyla.errors import DataNotFoundError, InputError
from phyla.images.augment import STRONG
from phyla.images.catalog import DATASETS, split_parts
from phyla.nets.resnet import EncoderSpec
from phyla.overrides import change, from_file, from_options, with_checkpoint, with_fast, with_seed, with_size
from phyla.pipeline import Data, Pipeline, check_pipeline
from phyla.pretrain.simclr import SimCLR
from phyla.recipes import RECIPES, recipe
from phyla.refine.selflabel import SelfLabel
from phyla.zoo import PublishedEncoder

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR20 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL_SETS = ("scan-cifar10", "scan-cifar20", "scan-stl10")
IMAGENETS = ("scan-imagenet50", "scan-imagenet100", "scan-imagenet200", "scan-imagenet1000")

# Van Gansbeke et al. 2020, their released configurations, a column a data set.
PUBLISHED = {
    "scan-cifar10": {"source": "cifar10", "n_clusters": 10, "size": 32, "norm": CIFAR10, "stem": "cifar",
                     "scan_batch": 128, "scan_epochs": 50, "self_epochs": 200, "cutout": 16},
    "scan-cifar20": {"source": "cifar20", "n_clusters": 20, "size": 32, "norm": CIFAR20, "stem": "cifar",
                     "scan_batch": 512, "scan_epochs": 100, "self_epochs": 200, "cutout": 16},
    "scan-stl10": {"source": "stl10", "n_clusters": 10, "size": 96, "norm": IMAGENET, "stem": "stl",
                   "scan_batch": 128, "scan_epochs": 100, "self_epochs": 100, "cutout": 32},
    "scan-imagenet50": {"source": "imagenet50", "n_clusters": 50, "scan_batch": 512},
    "scan-imagenet100": {"source": "imagenet100", "n_clusters": 100, "scan_batch": 1024},
    "scan-imagenet200": {"source": "imagenet200", "n_clusters": 200, "scan_batch": 1024},
    "scan-imagenet1000": {"source": "imagenet", "n_clusters": 1000, "scan_batch": 4096},
}


def has(stage: object, **wanted: object) -> None:
    assert {name: getattr(stage, name) for name in wanted} == wanted


# ── the published configurations ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SMALL_SETS)
def test_pretext_of_the_small_sets_is_the_published_one(name):
    wanted, pipeline = PUBLISHED[name], recipe(name)
    has(pipeline.pretrain, encoder=EncoderSpec("resnet18", wanted["stem"], 64), n_projection=128, temperature=0.1,
        n_epochs=500, batch_size=512, lr=0.4, momentum=0.9, weight_decay=1e-4, warmup="0 epochs", symmetric=False)
    assert pipeline.pretrain.lr * pipeline.pretrain.lr_floor == pytest.approx(0.4 * 0.1**3)
    has(pipeline.embed, layer="projection")
    has(pipeline.neighbors, n_neighbors=20, n_held_out=5)


@pytest.mark.parametrize("name", SMALL_SETS)
def test_clustering_of_the_small_sets_is_the_published_one(name):
    wanted, pipeline = PUBLISHED[name], recipe(name)
    has(pipeline.cluster, n_clusters=wanted["n_clusters"], n_heads=1, entropy_weight=5.0, class_prior=None,
        update="all", forwards="two", cached_views=0, select="neighbor_score", n_selection_neighbors=5,
        optimizer="adam", lr=1e-4, weight_decay=1e-4, n_epochs=wanted["scan_epochs"], batch_size=wanted["scan_batch"])
    has(pipeline.refine, threshold=0.99, balanced=True, ema="off", weak_mode="batch", optimizer="adam", lr=1e-4,
        weight_decay=1e-4, n_epochs=wanted["self_epochs"], batch_size=1000, keep="last")


@pytest.mark.parametrize("name", SMALL_SETS)
def test_views_of_the_small_sets_are_the_published_ones(name):
    wanted, pipeline = PUBLISHED[name], recipe(name)
    is_simclr(pipeline.pretrain.views, wanted["size"], wanted["norm"])
    for stage in (pipeline.cluster, pipeline.refine):
        is_strong(stage.views, wanted["size"], wanted["norm"], wanted["cutout"])


@pytest.mark.parametrize("name", IMAGENETS)
def test_imagenet_is_the_published_one(name):
    wanted, pipeline = PUBLISHED[name], recipe(name)
    assert isinstance(pipeline.pretrain, PublishedEncoder)
    has(pipeline.pretrain, path="", stem="imagenet")
    has(pipeline.embed, layer="encoder")
    has(pipeline.neighbors, n_neighbors=50, n_held_out=5)
    has(pipeline.data, size=256)
    has(pipeline.cluster, n_clusters=wanted["n_clusters"], n_heads=10, entropy_weight=5.0, update="heads",
        cached_views=0, optimizer="sgd", lr=5.0, momentum=0.9, weight_decay=0.0, n_epochs=100,
        batch_size=wanted["scan_batch"], select="neighbor_score")
    for stage in (pipeline.pretrain, pipeline.cluster):
        is_simclr(stage.views, 224, IMAGENET)
    if name == "scan-imagenet1000":
        assert pipeline.refine is None
        return
    has(pipeline.refine, threshold=0.99, balanced=False, ema="write_back", ema_decay=0.999, optimizer="sgd", lr=0.03,
        momentum=0.9, weight_decay=0.0, n_epochs=25, batch_size=512, weak_mode="batch", keep="last")
    is_strong(pipeline.refine.views, 224, IMAGENET, 75)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_images_are_the_published_ones(name):
    data, held_out = recipe(name).data, "val" if "imagenet" in name else "test"
    has(data, source=PUBLISHED[name]["source"], split="train", held_out=held_out, limit=None, select_on="held_out",
        pretrain_split="train+unlabeled" if name == "scan-stl10" else None)
    for split in filter(None, (data.split, data.held_out, data.pretrain_split)):
        assert split_parts(data.source, split)
    assert DATASETS[data.source].n_classes == recipe(name).cluster.n_clusters


def is_simclr(views, size, norm):
    has(views, kind="simclr", size=size, mean=norm[0], std=norm[1], crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3),
        flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.2)


def is_strong(views, size, norm, cutout):
    has(views, kind="strong", size=size, mean=norm[0], std=norm[1], flip=0.5, operations=STRONG, rotate=30.0, shear=0.1,
        translate=0.1, cutout=cutout)
    assert views.n_operations in (None, 4)


# ── Super-AND and TSUC ──────────────────────────────────────────────────────────────────────────────────────────────


# Han et al. 2020, their released code and log (Super-AND), and its parent's constants for SVHN.
SUPERAND = {
    "superand-cifar10": ("cifar10", 10, CIFAR10),
    "superand-cifar100": ("cifar100", 100, ((0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023))),
    "superand-svhn": ("svhn", 10, ((0.4377, 0.4438, 0.4728), (0.1201, 0.1231, 0.1052))),
}
TSUC_CLUSTERS = {"tsuc-cifar10": ("cifar10", 10), "tsuc-cifar20": ("cifar20", 20), "tsuc-cifar100": ("cifar100", 100),
                 "tsuc-stl10": ("stl10", 10)}


@pytest.mark.parametrize("name", [*SUPERAND, "tsuc-cifar10", "and-cifar10", "instance-cifar10"])
def test_super_and_is_the_published_one(name):
    source, n_clusters, norm = SUPERAND.get(name, SUPERAND["superand-cifar10"])
    pipeline = recipe(name)
    has(pipeline.data, source=source, split="train", held_out="test", pretrain_split=None)
    has(pipeline.pretrain, encoder=EncoderSpec("resnet18", "cifar", 64, "rgb_sobel"), n_projection=128, temperature=0.1,
        batch_temperature=0.1, n_epochs=200, batch_size=128, lr=0.03, lr_drop_epoch=120, lr_drop_every=40, lr_decay=0.1,
        momentum=0.9, weight_decay=5e-4, memory_momentum=0.5, memory_view="second", anchors_per_round=0.25,
        unification_every=80, mask_self=True)
    has(pipeline.pretrain.views, kind="simclr", size=32, mean=norm[0], std=norm[1], crop_scale=(0.2, 1.0), flip=0.5,
        jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, grey=0.2)
    ancestor = name in ("and-cifar10", "instance-cifar10")
    has(pipeline.pretrain, n_rounds=1 if name == "instance-cifar10" else 5,
        augmentation_weight=0.0 if ancestor else 1.0, unification_step=0.0 if ancestor else 0.2)
    has(pipeline.evaluate, knn_neighbors=200)
    assert pipeline.cluster.n_clusters == n_clusters


@pytest.mark.parametrize("name", TSUC_CLUSTERS)
def test_tsuc_is_the_published_one(name):
    pipeline, (source, n_clusters) = recipe(name), TSUC_CLUSTERS[name]
    has(pipeline.cluster, n_clusters=n_clusters, n_heads=5, norm="feature_rows", temperature=0.1,
        consistency_temperature=0.1, consistency_weight=1.0, prototypes="random", trainable=False, update="all",
        momentum=0.9, weight_decay=5e-4, lr=0.01, lr_drop_epoch=120, lr_drop_every=40, lr_decay=0.1, n_epochs=300,
        batch_size=128, select="lowest_loss", views=pipeline.pretrain.views)
    has(pipeline.data, source=source)
    if name == "tsuc-stl10":
        has(pipeline.data, split="train+test", pretrain_split="train+test+unlabeled", held_out=None)
    assert pipeline.refine is None and DATASETS[source].n_classes == n_clusters


# Dang et al. 2021, their released configurations: clusters, heads, batch, what is trained, size.
NNM = {"nnm-cifar10": (10, 3, 200, "all", 32), "nnm-cifar20": (20, 3, 500, "all", 32),
       "nnm-stl10": (10, 3, 200, "all", 96), "nnm-imagenet10": (10, 1, 128, "all", 96),
       "nnm-imagenetdogs": (15, 3, 512, "heads", 224), "nnm-imagenet50": (50, 10, 512, "heads", 224),
       "nnm-imagenet100": (100, 3, 1000, "heads", 224), "nnm-imagenet200": (200, 1, 1024, "heads", 224)}


@pytest.mark.parametrize("name", NNM)
def test_nnm_is_the_published_one(name):
    pipeline, (n_clusters, n_heads, batch, update, size) = recipe(name), NNM[name]
    has(pipeline.cluster, n_clusters=n_clusters, n_heads=n_heads, batch_size=batch, update=update, entropy_weight=5.0,
        global_weight=1.0, global_view="augmented", n_epochs=100, drop_last=False, select="label_free")
    all_of_it = update == "all"
    has(pipeline.cluster, optimizer="adam" if all_of_it else "sgd", lr=1e-4 if all_of_it else 5.0,
        weight_decay=1e-4 if all_of_it else 0.0)
    has(pipeline.neighbors, n_neighbors=20 if all_of_it else 50, n_held_out=5)
    has(pipeline.embed, layer="encoder")
    assert pipeline.refine is None and pipeline.cluster.views.size == size
    norm = IMAGENET if size > 32 else CIFAR10 if name == "nnm-cifar10" else CIFAR20
    if all_of_it:
        is_strong(pipeline.cluster.views, size, norm, 16 if size == 32 else 32)
        has(pipeline.pretrain, n_epochs=500, lr=0.4)
    else:
        is_simclr(pipeline.cluster.views, size, norm)


# Park et al. 2021, their released scripts, and an answer to a user for ImageNet-50.
RUC = {"ruc-scan-cifar10": (25.0, 250, 200, False), "ruc-scan-cifar20": (100.0, 250, 200, True),
       "ruc-scan-stl10": (50.0, 100, 200, True), "ruc-scan-imagenet50": (25.0, 32, 100, False),
       "ruc-tsuc-cifar10": (25.0, 250, 200, False), "ruc-tsuc-cifar20": (100.0, 250, 200, True),
       "ruc-tsuc-stl10": (50.0, 100, 200, True)}


@pytest.mark.parametrize("name", RUC)
def test_ruc_is_the_published_one(name):
    pipeline, (noisy_weight, batch, n_epochs, rises) = recipe(name), RUC[name]
    has(pipeline.robust, split="hybrid", confidence_threshold=0.99, n_neighbors=100, noisy_weight=noisy_weight,
        refurbish_threshold=0.9 if rises else 0.99, refurbish_rise=0.02 if rises else 0.0, refurbish_every=40,
        sharpen_temperature=0.5, mixup_alpha=4.0, smoothing=0.5, lr=0.01, momentum=0.9, weight_decay=5e-4,
        ramp_length=200, n_epochs=n_epochs, batch_size=batch, forwards="faithful", temperature="none")
    views = pipeline.pretrain.views
    has(pipeline.robust.views, kind="ruc_strong", size=views.size, mean=views.mean, std=views.std, flip=0.5, cutout=16,
        crop_scale=(0.2, 1.0), level=1, operations=STRONG)
    first = recipe(name.replace("ruc-", ""))
    assert (pipeline.pretrain.__dict__, pipeline.cluster.__dict__) == (first.pretrain.__dict__, first.cluster.__dict__)
    assert (pipeline.refine is None) == ("tsuc" in name)
    if "stl10" in name:
        has(pipeline.data, split="train+test", held_out=None)


# All methods at a small size: from one encoder a seed, on the same images, for about the same.
SIDE_BY_SIDE = [(method, data) for data in ("fashion-small", "cifar10-small")
                for method in ("scan", "nnm", "ruc", "superand", "tsuc", "ruc-tsuc")]


@pytest.mark.parametrize(("method", "data"), SIDE_BY_SIDE)
def test_methods_side_by_side_see_the_same(method, data):
    pipeline = recipe(f"{method}-{data}")
    check_pipeline(pipeline)
    source = "fashion-mnist" if data.startswith("fashion") else "cifar10"
    size = None if source == "fashion-mnist" else 24
    has(pipeline.data, source=source, split="train", held_out="test", pretrain_split=None, limit=2000, size=size)
    has(pipeline.embed, layer="encoder")
    first = "superand" if method in ("superand", "tsuc", "ruc-tsuc") else "scan"
    assert asdict(pipeline.pretrain) == asdict(recipe(f"{first}-{data}").pretrain)
    assert pipeline.pretrain.encoder.n_features == 128 and pipeline.cluster.n_clusters == 10
    for of, by in (("scan", "ruc"), ("tsuc", "ruc-tsuc")):
        if method == by:
            before = recipe(f"{of}-{data}")
            assert pipeline.options() | {"recipe": before.name, "robust": None, "methods": 0} == (
                before.options() | {"methods": 0})


@pytest.mark.parametrize(("name", "size"), [("superand-stl10", 32), ("superand-stl10-96", 96)])
def test_super_and_sees_stl10_at_two_sizes(name, size):
    pipeline = recipe(name)
    assert pipeline.pretrain.views.size == pipeline.data.size == size
    has(pipeline.pretrain.encoder, stem="cifar", streams="rgb_sobel")
    has(pipeline.data, split="train", held_out="test", pretrain_split="train+unlabeled")


# ── all recipes ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_together(name):
    pipeline = recipe(name)
    assert pipeline.name == name
    trained = (pipeline.pretrain,) if pipeline.is_frozen else (pipeline.pretrain, pipeline.cluster, pipeline.refine)
    views = [stage.views for stage in trained if hasattr(stage, "views")]  # without an encoder to train, none are made
    assert len({view.size for view in views}) == len({(view.mean, view.std) for view in views}) == 1
    for_any = name.endswith("-folder") or pipeline.is_frozen
    assert "Expected" in (RECIPES[name].__doc__ or "") or for_any or "not published" in RECIPES[name].__doc__ or (
        "see superand-stl10" in RECIPES[name].__doc__)
    assert recipe(name) is not recipe(name)
    assert pipeline.data.source == "" if for_any else pipeline.data.source in DATASETS
    if not for_any:
        for split in filter(None, (pipeline.data.split, pipeline.data.held_out, pipeline.data.pretrain_split)):
            assert split_parts(pipeline.data.source, split)


@pytest.mark.parametrize("name", RECIPES)
def test_the_plain_view_shows_the_whole_image(name):
    """A plain view is the central square of the stored image: of one stored larger it would be a part."""
    pipeline = recipe(name)
    if pipeline.is_frozen:  # the size is that of the stored images: see the runner
        return
    stored = pipeline.data.size or DATASETS[pipeline.data.source].size
    if "imagenet" not in name:  # published: the central 224 (96) of 256
        assert pipeline.pretrain.views.size == stored


@pytest.mark.parametrize("name", RECIPES)
def test_options_lead_back_to_the_pipeline(name):
    pipeline = with_seed(recipe(name), 7)
    for options in (pipeline.options(), json.loads(json.dumps(pipeline.options()))):
        again = from_options(options)
        assert again.options() == pipeline.options()
        assert [type(getattr(again, part)) for part in ("pretrain", "cluster", "refine")] == [
            type(getattr(pipeline, part)) for part in ("pretrain", "cluster", "refine")]


def test_changed_options_lead_back_too():
    pipeline = with_checkpoint(with_size(recipe("scan-cifar10"), 48), "moco.pth.tar")
    for key, value in {"cluster.class_prior": ",".join(["0.1"] * 10), "data.limit": "50", "refine": "none",
                       "cluster.views.operations": "rotate,equalize", "data.select_on": "train"}.items():
        pipeline = change(pipeline, key, value)
    again = from_options(json.loads(json.dumps(pipeline.options())))
    assert again.options() == pipeline.options() and again.refine is None
    assert isinstance(again.pretrain, PublishedEncoder)
    has(again.pretrain, path="moco.pth.tar", stem="cifar", views=pipeline.pretrain.views)


def test_an_unknown_recipe_gets_the_nearest_name():
    with pytest.raises(InputError, match=r"no recipe 'scan-cifar-10'. hint: did you mean scan-cifar10\?"):
        recipe("scan-cifar-10")
    with pytest.raises(InputError, match="allowed: and-cifar10, frozen-folder, "):
        recipe("zzz")


def test_a_seed_goes_to_every_stage_that_draws():
    pipeline = with_seed(recipe("scan-digits"), 3)
    assert [stage.random_state for stage in (pipeline.pretrain, pipeline.cluster, pipeline.refine, pipeline.evaluate)
            ] == [3, 3, 3, 3]
    assert recipe("scan-digits").cluster.random_state == 0
    held = with_seed(recipe("scan-imagenet1000"), 3)  # a published encoder draws nothing, and nothing refines
    assert held.cluster.random_state == 3 and asdict(held.pretrain) == asdict(recipe("scan-imagenet1000").pretrain)


def test_fast_options_go_to_the_methods_that_have_them():
    pipeline = with_fast(recipe("ruc-scan-cifar10"))
    assert (pipeline.cluster.forwards, pipeline.robust.forwards) == ("fused", "cheap")
    assert with_fast(recipe("nnm-digits")).cluster.forwards == "fused"
    shared = with_fast(recipe("ruc-scan-cifar10"), alone=False)
    assert (shared.cluster.forwards, shared.robust.forwards) == ("fused", "faithful"), "processes see whole batches"
    for name in ("superand-digits", "scan-imagenet1000"):
        assert with_fast(recipe(name)).options() | {"cluster": 0} == recipe(name).options() | {"cluster": 0}


def test_another_size_goes_to_images_and_views():
    pipeline = with_size(recipe("scan-stl10"), 48)
    stages = pipeline.pretrain, pipeline.cluster, pipeline.refine
    assert [pipeline.data.size, *(stage.views.size for stage in stages)] == [48] * 4
    assert pipeline.cluster.views.cutout == 16
    with pytest.raises(InputError, match="at least 1 pixel"):
        with_size(recipe("scan-stl10"), 0)


# ── options by name ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("key", "value", "read"), [
    ("pretrain.n_epochs", "7", 7), ("pretrain.n_epochs", 7, 7), ("pretrain.n_epochs", 7.0, 7),
    ("cluster.lr", "1e-3", 1e-3), ("cluster.lr", 1, 1.0), ("cluster.lr", "-2", -2.0),
    ("pretrain.symmetric", "true", True), ("pretrain.symmetric", "No", False), ("pretrain.symmetric", 1, True),
    ("pretrain.symmetric", False, False), ("refine.balanced", "OFF", False),
    ("pretrain.warmup", "10 epochs", "10 epochs"), ("pretrain.warmup", "none", "none"),
    ("cluster.optimizer", "sgd", "sgd"), ("data.limit", "none", None), ("data.limit", "100", 100),
    ("data.held_out", "", None), ("data.held_out", "test", "test"), ("data.held_out", None, None),
    ("cluster.class_prior", "0.3, 0.7", (0.3, 0.7)), ("cluster.class_prior", [0.3, 0.7], (0.3, 0.7)),
    ("cluster.class_prior", "None", None), ("cluster.class_prior", "(0.3,0.7,)", (0.3, 0.7)),
    ("cluster.views.operations", "rotate", ("rotate",)), ("cluster.views.crop_scale", "[0.1, 0.9]", (0.1, 0.9)),
    ("cluster.views.n_operations", "2", 2), ("pretrain.encoder.width", "8", 8),
    ("pretrain.encoder.name", "resnet50", "resnet50"),
])
def test_an_option_is_read_as_its_type(key, value, read):
    before = recipe("scan-cifar10")
    found = change(before, key, value)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == read and type(found) is type(read)
    assert before.options() == recipe("scan-cifar10").options()


@pytest.mark.parametrize(("key", "value", "wanted"), [
    ("cluster.entropy_wieght", "2", "no option 'cluster.entropy_wieght': SCAN has no 'entropy_wieght'.*entropy_weight"),
    ("clustr.lr", "2", "Pipeline has no 'clustr'.*did you mean cluster"),
    ("pretrain.encoder.widht", "2", "EncoderSpec has no 'widht'.*width"),
    ("pretrain.encoder.nam", "2", "did you mean name"),
    ("pretrain.views.szie", "2", "Views has no 'szie'.*size"),
    ("name.x", "2", "Pipeline has no 'name'"), ("lr", "2", "names no stage.*STAGE.OPTION=VALUE"),
    ("", "", "names no stage"),
    ("cluster.", "2", "SCAN has no ''"), ("cluster.lr.x", "2", "lr has no parts"),
    ("cluster.n_epochs", "1.5", "=1.5 is not a whole number"), ("cluster.n_epochs", 1.5, "not a whole number"),
    ("cluster.n_epochs", "many", "not a whole number"), ("cluster.n_epochs", None, "not a whole number"),
    ("cluster.n_epochs", float("inf"), "not a whole number"),
    ("cluster.lr", "fast", "=fast is not a number"), ("cluster.lr", "nan", "=nan is not a number"),
    ("cluster.lr", "1e999", "not a number"), ("cluster.lr", [1], "not a number"),
    ("cluster.lr", 10**400, "not a number"),
    ("pretrain.symmetric", "maybe", "=maybe is not true or false"), ("pretrain.symmetric", "", "not true or false"),
    ("cluster.optimizer", "adm", "=adm is not allowed.*did you mean adam"),
    ("cluster.optimizer", ["adam"], "is not allowed"),
    ("cluster.views", "strong", r"cannot be set as one value.*cluster.views.NAME"),
    ("cluster.views.crop_scale", "0.5", "takes 2 values, got 1"), ("cluster.views.mean", [0.1, 0.2], "takes 3 values"),
    ("cluster.views.crop_scale", "0.9,0.5", "views cannot be made with crop_scale"),
    ("cluster.views.operations", "rotat", "no operation 'rotat' for views.*rotate"),
    ("cluster.class_prior", "a,b", "not a number"), ("data.limit", "few", "not a whole number"),
    ("refine.threshold", "high", "not a number"), ("refine", "maybe", "no method of that stage"),
])
def test_an_option_that_cannot_be_is_refused_in_one_line(key, value, wanted):
    with pytest.raises(InputError, match=wanted) as raised:
        change(recipe("scan-digits"), key, value)
    assert "\n" not in str(raised.value)


def test_an_option_of_a_stage_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="this recipe has no refine stage"):
        change(recipe("scan-imagenet1000"), "refine.threshold", "0.9")
    assert change(recipe("scan-imagenet1000"), "refine", "off").refine is None


def test_every_option_of_every_recipe_can_be_set_to_itself():
    for name in RECIPES:
        pipeline = recipe(name)
        for part in ("data", "pretrain", "embed", "neighbors", "cluster", "refine", "evaluate"):
            stage = getattr(pipeline, part)
            for field in dataclasses.fields(stage) if stage else ():
                value = getattr(stage, field.name)
                if not dataclasses.is_dataclass(value):
                    typed = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                    assert change(pipeline, f"{part}.{field.name}", typed).options() == pipeline.options()


# ── files of options ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_names_a_recipe_and_what_differs(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'recipe = "scan-cifar10"\nrefine = "none"\n[data]\nlimit = 500\n[cluster]\nentropy_weight = 2\n'
        'class_prior = [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]\n[pretrain.encoder]\nwidth = 8\n', "utf-8")
    made, plain = from_file(tmp_path / "mine.toml"), recipe("scan-cifar10")
    assert made.refine is None and made.data == replace(plain.data, limit=500)
    assert made.pretrain.encoder == EncoderSpec(width=8)
    assert asdict(made.cluster) == asdict(plain.cluster) | {"entropy_weight": 2.0, "class_prior": (0.1,) * 10}


@pytest.mark.parametrize(("text", "wanted"), [
    (b"recipe = scan", r"mine.toml is not TOML: .*line 1.*hint: text is quoted"), (b"\xff", "is not TOML"),
    (b"[cluster]\nlr = 1", 'names no recipe.*recipe = "scan-cifar10"'), (b"recipe = 3", "names no recipe"),
    (b"recipe = 'scan-cifr10'", "did you mean scan-cifar10"), (b"recipe = 'scan-digits'\nlr = 1", "names no stage"),
    (b"recipe = 'scan-digits'\n[clustr]\nlr = 1", "did you mean cluster"),
    (b"recipe = 'scan-digits'\n[cluster.lr]\nx = 1", "lr has no parts"),
    (b"recipe = 'scan-digits'\n[cluster]\nlr = 1979-05-27", "not a number"),
])
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, wanted):
    (tmp_path / "mine.toml").write_bytes(text)
    with pytest.raises(InputError, match=wanted) as raised:
        from_file(tmp_path / "mine.toml")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(DataNotFoundError, match="there is no file"):
        from_file(tmp_path / "mine.toml")


def test_a_pipeline_is_put_together_from_its_methods():
    made = Pipeline("mine", Data("digits"), SimCLR(), SCAN(), SelfLabel())
    assert made.options()["methods"] == {"pretrain": "SimCLR", "cluster": "SCAN", "refine": "SelfLabel"}
    assert made.embed.layer == "projection" and made.neighbors.n_neighbors == 20


@pytest.mark.parametrize(("name", "key", "value", "kind"), [
    ("nnm-digits", "robust", "ruc", "RUC"), ("scan-folder", "robust", "RUC", "RUC"),
    ("scan-digits", "cluster", "tsuc", "TSUC"), ("superand-digits", "cluster", "NNM", "NNM"),
    ("scan-cifar10", "pretrain", "superand", "SuperAND"), ("tsuc-digits", "refine", "selflabel", "SelfLabel")])
def test_a_stage_may_take_another_method(name, key, value, kind):
    before = change(change(recipe(name), "cluster.n_clusters", 7), "cluster.random_state", 3)
    after = change(before, key, value)
    method, shown = getattr(after, key), before.pretrain.views
    assert type(method).__name__ == kind and method.random_state == 3
    has(method.views, size=shown.size, mean=shown.mean, std=shown.std, flip=shown.flip)
    assert after.cluster.n_clusters == 7
    assert from_options(json.loads(json.dumps(after.options()))).options() == after.options()
    if key == "pretrain":
        assert after.pretrain.encoder == before.pretrain.encoder
    assert change(after, f"{key}.n_epochs", 2) is not None


def test_a_stage_has_no_method_of_another():
    with pytest.raises(InputError, match=r"cluster=simclr is no method of that stage. hint: allowed: kmeans, mem"):
        change(recipe("scan-digits"), "cluster", "simclr")


def test_the_grey_square_of_ruc_keeps_its_pixels():
    pipeline = with_size(recipe("ruc-scan-cifar10"), 96)
    assert pipeline.robust.views.cutout == 16 and pipeline.cluster.views.cutout == 48
