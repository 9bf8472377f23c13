"""TURTLE: its losses against loops, its slopes against traced ones; what the fit finds, keeps, resumes and refuses."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

import naive
from phyla.cluster import turtle
from phyla.cluster.turtle import (
    TURTLE,
    Adam,
    Tasks,
    inner_loss,
    inner_slopes,
    outer_loss,
    outer_slopes,
    task_probabilities,
)
from phyla.errors import CollapseWarning, InputError, NonFiniteLossError
from phyla.evaluate.matching import hungarian_accuracy
from phyla.types import Embeddings

pytestmark = pytest.mark.usefixtures("warm")


def tiny(**options: object) -> TURTLE:
    return TURTLE(**({"n_clusters": 3, "start": "warm", "n_inner": 1, "inner_lr": 0.03, "outer_lr": 0.01, "n_steps": 60,
                      "batch_size": 30, "select": "ridge"} | options))


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def blobs(n: int = 60, n_clusters: int = 3, d: int = 8, seed: int = 0, spread: float = 0.3
          ) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    true = np.arange(n) % n_clusters
    return (spread * draw.normal(size=(n, d)) + 2 * np.eye(d)[true]).astype(np.float32), true


def together(spaces: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(spaces, axis=1))


# ── the equations ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("spaces", "clusters", "batch"), [(1, 2, 1), (2, 3, 5), (3, 4, 2), (2, 1, 3)])
@pytest.mark.parametrize("uneven", [False, True])
def test_outer_loss_is_the_formula(spaces, clusters, batch, uneven):
    tasks, found = logits(spaces, clusters, batch, seed=1), logits(spaces, clusters, batch, seed=2)
    prior = logits(clusters, seed=3).softmax(0) if uneven else None
    expected = naive.turtle_loss(tasks.numpy(), found.numpy(), entropy_weight=3.0,
                                 prior=None if prior is None else prior.tolist())
    for loss in (outer_loss(tasks, found, entropy_weight=3.0, class_prior=prior),
                 outer_slopes(tasks, found, entropy_weight=3.0, class_prior=prior)[0]):
        assert [float(part) for part in loss] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("uneven", [False, True])
def test_outer_slopes_are_the_traced_ones_and_reach_the_tasks_alone(uneven):
    tasks, found = logits(2, 4, 3, 6, seed=1).requires_grad_(), logits(2, 4, 3, 6, seed=2).requires_grad_()
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64) if uneven else None
    outer_loss(tasks, found, entropy_weight=10.0, class_prior=prior).total.sum().backward()
    slopes = outer_slopes(tasks.detach(), found.detach(), entropy_weight=10.0, class_prior=prior)[1]
    torch.testing.assert_close(slopes, tasks.grad, rtol=1e-9, atol=1e-12)
    assert found.grad is None


def test_outer_slopes_are_differences_of_the_formula():
    tasks, found = logits(2, 3, 2, seed=1).numpy(), logits(2, 3, 2, seed=2).numpy()
    expected = naive.gradient(lambda at: naive.turtle_loss(at, found, entropy_weight=2.0)[0], tasks)
    slopes = outer_slopes(torch.from_numpy(tasks), torch.from_numpy(found), entropy_weight=2.0)[1]
    np.testing.assert_allclose(slopes.numpy(), expected, atol=1e-6)


def test_inner_loss_is_the_cross_entropy_and_its_targets_are_fixed():
    found, task = logits(4, 3, 6, seed=1).requires_grad_(), logits(4, 3, 6, seed=2).requires_grad_()
    targets = task.softmax(-2)
    loss = inner_loss(found, targets)
    expected = nn.functional.cross_entropy(found.detach()[1].T, targets.detach()[1].T)
    assert float(loss.detach()[1]) == pytest.approx(float(expected))
    loss.sum().backward()
    torch.testing.assert_close(inner_slopes(found.detach(), targets.detach()), found.grad, rtol=1e-9, atol=1e-12)
    assert task.grad is None


def test_an_even_prior_is_the_entropy_less_its_largest():
    tasks, found = logits(2, 4, 6, seed=1), logits(2, 4, 6, seed=2)
    even = torch.full((4,), 0.25, dtype=torch.float64)
    plain = outer_loss(tasks, found, entropy_weight=10.0)
    held = outer_loss(tasks, found, entropy_weight=10.0, class_prior=even)
    assert float(held.total - plain.total) == pytest.approx(2 * 10 * np.log(4))


def test_one_sure_label_for_each_costs_nothing_but_the_entropy():
    sure = torch.where(torch.eye(3, dtype=torch.float64).bool(), 60.0, 0.0)[None].expand(2, 3, 3)
    loss = outer_loss(sure, sure, entropy_weight=1.0)
    assert float(loss.cross_entropy) == pytest.approx(0, abs=1e-9)
    assert float(loss.entropy) == pytest.approx(2 * np.log(3))


def test_neither_the_names_of_clusters_nor_the_order_of_images_matters():
    tasks, found = logits(2, 4, 6, seed=1), logits(2, 4, 6, seed=2)
    loss = outer_loss(tasks, found, entropy_weight=10.0)
    for turned in ((tasks.flip(1), found.flip(1)), (tasks.flip(2), found.flip(2)), (tasks + 3, found - 2)):
        torch.testing.assert_close(outer_loss(*turned, entropy_weight=10.0), loss)


# ── what moves ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tasks_are_torchs_weight_norm():
    tasks = Tasks(2, 3, 5, torch.Generator().manual_seed(0)).double()
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3).double())
    for name, value in (("original0", tasks.length[1]), ("original1", tasks.direction[1])):
        getattr(linear.parametrizations.weight, name).data = value.clone()
    linear.bias.data = tasks.bias[1, :, 0].clone()
    rows, up = logits(7, 5, seed=1), logits(7, 3, seed=2)
    plain = tasks.weight()[1]
    torch.testing.assert_close(rows @ plain[:, :-1].T + plain[:, -1], linear(rows).detach())
    (linear(rows) * up).sum().backward()
    pulled = up.T @ torch.cat([rows, torch.ones(7, 1, dtype=torch.float64)], dim=1)
    direction, length, bias = (each[1] for each in tasks.slopes(pulled.expand(2, 3, 6)))
    torch.testing.assert_close(direction, linear.parametrizations.weight.original1.grad)
    torch.testing.assert_close(length, linear.parametrizations.weight.original0.grad)
    torch.testing.assert_close(bias[:, 0], linear.bias.grad)


def test_adam_is_torchs_for_each_rate():
    at, rates = logits(2, 3, 4, seed=1), torch.tensor([0.1, 0.01], dtype=torch.float64)
    own = at.clone()
    ours = Adam([own], rates[:, None, None])
    theirs = [at[place].clone().requires_grad_() for place in range(2)]
    optimizers = [torch.optim.Adam([each], lr=float(rate)) for each, rate in zip(theirs, rates, strict=True)]
    for step in range(7):
        slope = logits(2, 3, 4, seed=step + 2)
        ours.move([own], [slope])
        for place, optimizer in enumerate(optimizers):
            theirs[place].grad = slope[place].clone()
            optimizer.step()
    torch.testing.assert_close(own, torch.stack([each.detach() for each in theirs]), rtol=1e-9, atol=1e-12)


def traced_fit(rows: list[Tensor], model: TURTLE, n_steps: int) -> list[Tensor]:
    """Return the task maps after some steps on all rows, every gradient traced and every optimizer torch's."""
    search = turtle._Search([torch.cat([each, torch.ones(len(each), 1)], dim=1) for each in rows], model.n_clusters,
                            model._rates(), 0)
    linear = []
    for tasks, each in zip(search.tasks, rows, strict=True):
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(each.shape[1], model.n_clusters))
        layer.parametrizations.weight.original1.data = tasks.direction[0].clone()
        layer.parametrizations.weight.original0.data = tasks.length[0].clone()
        layer.bias.data = tasks.bias[0, :, 0].clone()
        linear.append(layer)
    outer = torch.optim.Adam([value for layer in linear for value in layer.parameters()], lr=model.outer_lr)
    for step in range(n_steps):
        drawn = search.draw(turtle.generator(0, "turtle classifiers", step))
        held = [each[0].clone().requires_grad_() for each in drawn]
        inner = torch.optim.Adam(held, lr=model.inner_lr)
        tasks = torch.stack([layer(each).T for layer, each in zip(linear, rows, strict=True)])

        def found() -> Tensor:
            return torch.stack([weight[:, :-1] @ each.T + weight[:, -1:]
                                for weight, each in zip(held, rows, strict=True)])  # noqa: B023

        for _ in range(model.n_inner):
            inner.zero_grad()
            inner_loss(found(), task_probabilities(tasks).expand_as(tasks)).sum().backward()
            inner.step()
        outer.zero_grad()
        outer_loss(tasks, found(), entropy_weight=model.entropy_weight).total.backward()
        outer.step()
    return [torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach() for layer in linear]


def test_the_published_search_is_the_traced_one():
    spaces = [blobs(n=30)[0], blobs(n=30, d=5, seed=1)[0]]
    model = TURTLE(n_clusters=3, n_steps=8, n_inner=4, outer_lr=0.01, inner_lr=0.02, select="objective").fit(spaces)
    expected = traced_fit([torch.from_numpy(each) for each in spaces], model, 8)
    weight, bias = model.as_parts()[1].weight, model.as_parts()[1].bias
    for member, (first, width) in enumerate(((0, 8), (8, 5))):
        found = torch.cat([weight[member, :, first : first + width], bias[member][:, None]], dim=1)
        torch.testing.assert_close(found, expected[member], rtol=1e-4, atol=1e-4)


# ── the fit ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_finds_blobs_and_predicts_them():
    rows, true = blobs()
    model = tiny(n_tries=4).fit(rows)
    assert hungarian_accuracy(true, model.labels_) > 0.95
    assert model.all_labels_.shape == (4, 60) and model.scores_.shape == (4,)
    assert model.score_ == model.scores_.max() == model.scores_[model.try_]
    np.testing.assert_array_equal(model.all_labels_[model.try_], model.labels_)
    more, more_true = blobs(seed=3)
    assert hungarian_accuracy(more_true, model.predict(more)) > 0.95
    np.testing.assert_array_equal(model.predict_proba(rows), model.probabilities_)
    assert model.probabilities_.dtype == np.float32 and model.labels_.dtype == np.int64


def two_views(seed: int, n: int = 300) -> tuple[list[np.ndarray], np.ndarray]:
    """Return two spaces that share a class of two, beside which each has a stronger split of its own."""
    draw = np.random.default_rng(seed)
    true = np.arange(n) % 2
    spaces = []
    for _ in range(2):
        rows = draw.normal(size=(n, 6))
        rows[:, 0] += 8 * draw.permutation(true)  # separates better than the class, and means nothing elsewhere
        rows[:, 1] += 6 * true
        spaces.append(rows.astype(np.float32))
    return spaces, true


def test_two_spaces_find_what_they_share_where_one_cannot():
    alone, both = [], []
    for seed in range(2):
        spaces, true = two_views(seed)
        options = {"n_clusters": 2, "n_tries": 4, "n_steps": 100, "batch_size": 150, "random_state": seed,
                   "inner_lr": 0.1, "outer_lr": 0.03}
        alone.append(hungarian_accuracy(true, tiny(**options).fit(spaces[0]).labels_))
        both.append(hungarian_accuracy(true, tiny(**options).fit(spaces).labels_))
    assert np.mean(both) > 0.95
    assert np.mean(both) > np.mean(alone) + 0.1


@pytest.mark.parametrize("scale", ["raw", "unit", "standard"])
@pytest.mark.parametrize("n_components", [None, 4])
def test_parts_give_the_same_probabilities_on_raw_embeddings(scale, n_components):
    spaces = [blobs()[0] + 3, 5 * blobs(d=6, seed=1)[0]]
    model = tiny(scale=scale, n_components=n_components, n_steps=20).fit(spaces)
    projection, heads = model.as_parts()
    rows = together(spaces)
    found = heads.probabilities(rows if projection is None else projection(rows))[:, 0]
    np.testing.assert_allclose(found.numpy(), model.probabilities_, atol=1e-5)
    assert (projection is None) == (scale != "unit")


@pytest.mark.parametrize("scale", ["raw", "unit", "standard"])
@pytest.mark.parametrize("n_components", [None, 4])
def test_what_ships_is_what_the_search_saw(scale, n_components):
    spaces = [blobs()[0] + 3, 5 * blobs(d=6, seed=1)[0]]
    model = tiny(scale=scale, n_components=n_components, n_steps=20, n_tries=3).fit(spaces)
    np.testing.assert_array_equal(model.labels_, model.all_labels_[model.try_])
    assert len(np.unique(model.labels_)) > 1


def test_components_turn_the_embeddings_and_lose_nothing_else():
    rows, true = blobs(d=12)
    model = tiny(n_components=3, n_tries=4, n_steps=150).fit(rows)
    weight = model.as_parts()[1].weight[0]
    assert torch.linalg.matrix_rank(weight, atol=1e-4) <= 3
    assert hungarian_accuracy(true, model.labels_) > 0.9


def test_a_list_and_embeddings_with_widths_are_the_same():
    spaces = [blobs()[0], blobs(d=6, seed=1)[0]]
    ids = tuple(str(place) for place in range(60))
    joined = Embeddings(np.concatenate(spaces, axis=1), ids, widths=(8, 6))
    np.testing.assert_array_equal(tiny().fit(joined).probabilities_, tiny().fit(spaces).probabilities_)


def test_a_seed_decides_all():
    rows, _ = blobs()
    first, again, other = (tiny(random_state=seed).fit(rows) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.probabilities_, again.probabilities_)
    assert not np.array_equal(first.probabilities_, other.probabilities_)
    tiny(random_state=None).fit(rows)


def test_each_try_takes_its_pair_of_rates():
    model = tiny(n_tries=5, outer_lr=(0.1, 0.2), inner_lr=(1.0, 2.0))
    expected = [[0.1, 0.1, 0.2, 0.2, 0.1], [1.0, 2.0, 1.0, 2.0, 1.0]]
    torch.testing.assert_close(model._rates(), torch.tensor(expected))
    assert len(model.fit(blobs()[0]).scores_) == 5


@pytest.mark.parametrize("select", ["logistic", "ridge", "objective"])
def test_the_try_is_chosen_without_labels(select):
    model = tiny(n_tries=3, select=select).fit(blobs()[0])
    best = model.scores_.min() if select == "objective" else model.scores_.max()
    assert model.score_ == best


def test_uneven_classes_are_found_with_their_prior():
    draw = np.random.default_rng(0)
    true = np.repeat([0, 1], [108, 12])
    rows = (0.5 * draw.normal(size=(120, 6)) + 3 * np.eye(6)[true]).astype(np.float32)
    options = {"n_clusters": 2, "n_tries": 4, "n_steps": 200, "batch_size": 120}
    even = tiny(**options).fit(rows)
    told = tiny(**options, class_prior=(0.1, 0.9)).fit(rows)
    assert hungarian_accuracy(true, told.labels_) > 0.95 > hungarian_accuracy(true, even.labels_)


@pytest.mark.parametrize("start", ["warm", "cold"])
def test_a_killed_fit_goes_on_bit_equal(start, tmp_path, monkeypatch):
    rows, _ = blobs()
    model = tiny(start=start, n_steps=12)
    whole = clone(model).fit(rows)
    monkeypatch.setattr("phyla.training.loop.CHECKPOINT_SECONDS", 0.0)
    taken = turtle.outer_slopes
    calls = {"n": 0}

    def dying(*arguments: Tensor, **options: object) -> object:
        calls["n"] += 1
        if calls["n"] == 7:
            raise KeyboardInterrupt
        return taken(*arguments, **options)

    monkeypatch.setattr(turtle, "outer_slopes", dying)
    with pytest.raises(KeyboardInterrupt):
        clone(model).fit(rows, folder=tmp_path)
    monkeypatch.setattr(turtle, "outer_slopes", taken)
    resumed = clone(model).fit(rows, folder=tmp_path)
    np.testing.assert_array_equal(resumed.probabilities_, whole.probabilities_)
    assert resumed.history_ == whole.history_
    np.testing.assert_array_equal(resumed.scores_, whole.scores_)


# ── poor inputs ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_cluster_and_as_many_clusters_as_images():
    rows, _ = blobs(n=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)  # one of one is no collapse
        assert set(tiny(n_clusters=1, n_steps=3).fit(rows).labels_) == {0}
        tiny(n_clusters=12, n_steps=3).fit(rows)


def test_equal_embeddings_collapse_with_a_warning():
    with pytest.warns(CollapseWarning, match="one of 3 clusters"):
        model = tiny(n_steps=5).fit(np.ones((20, 4), np.float32))
    assert np.isfinite(model.probabilities_).all()


@pytest.mark.parametrize("scale", ["raw", "unit", "standard"])
def test_a_space_of_zeros_does_no_harm_beyond_itself(scale):
    model = tiny(scale=scale).fit([blobs()[0], np.zeros((60, 3), np.float32)])
    assert np.isfinite(model.probabilities_).all() and len(np.unique(model.labels_)) > 1


def test_a_loss_that_is_not_finite_stops_the_fit():
    with pytest.raises(NonFiniteLossError, match="step 0"):
        tiny(entropy_weight=np.inf).fit(blobs()[0])


@pytest.mark.parametrize(("options", "message"), [
    ({"n_clusters": 0}, "n_clusters"),
    ({"n_clusters": 61}, "needs at least 61 images"),
    ({"n_tries": 0}, "n_tries"),
    ({"outer_lr": 0.0}, "outer_lr"),
    ({"inner_lr": (0.1, -1.0)}, "inner_lr"),
    ({"inner_lr": ()}, "inner_lr"),
    ({"n_components": 0}, "n_components"),
    ({"entropy_weight": -1.0}, "entropy_weight"),
    ({"class_prior": (0.5, 0.5)}, "class_prior"),
])
def test_options_that_cannot_be_used_are_told(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options).fit(blobs()[0])


def test_what_does_not_fit_is_told():
    with pytest.raises(NotFittedError):
        tiny().predict(blobs()[0])
    model = tiny(n_steps=2).fit(blobs()[0])
    with pytest.raises(InputError, match="do not fit"):
        model.predict(blobs(d=9)[0])
    with pytest.raises(InputError, match="seed"):
        tiny(random_state=None).fit(blobs()[0], folder=turtle.Path("nowhere"))


def test_quick_is_a_preset_of_options():
    quick = TURTLE.quick(100, random_state=3)
    assert (quick.n_clusters, quick.random_state, quick.batch_size) == (100, 3, 2000)
    assert not list(quick.option_faults())
    published = TURTLE()
    assert (published.n_steps, published.n_inner, published.batch_size, published.start) == (6000, 10, 10_000, "cold")
