"""scikit-learn's own checks of an estimator, on every clusterer of embeddings."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from phyla.cluster.kmeans import KMeans
from phyla.cluster.nnm import NNM
from phyla.cluster.scan import SCAN
from phyla.cluster.temi import TEMI
from phyla.cluster.turtle import TURTLE
from phyla.errors import InputError
from phyla.members import Members
from phyla.refine.consensus import Consensus

pytestmark = [pytest.mark.usefixtures("warm", "unchecked"),
              pytest.mark.filterwarnings("ignore::phyla.errors.CollapseWarning")]

CLUSTERERS = (
    KMeans(n_clusters=3),
    KMeans(n_clusters=3, spherical=True),
    TEMI(n_clusters=3, n_heads=4, hidden=(32, 16), n_steps=60, batch_size=64, lr=0.005, teacher_momentum=0.9),
    TURTLE(n_clusters=3, n_steps=60, n_inner=3, start="warm", outer_lr=0.05, scale="standard", select="objective"),
    SCAN(n_clusters=3, n_epochs=10, lr=0.05, normalize=True),
    NNM(n_clusters=3, n_heads=2, n_epochs=10, lr=0.05, normalize=True),
    Members(n_clusters=3, methods=("kmeans", "spherical"), n_each=1),
    Consensus(n_clusters=3, n_steps=20, n_restarts=2),
)

DO_NOT_APPLY = {
    "check_n_features_in_after_fitting": "refused, in words that count the features of each space",
    "check_dtype_object": "embeddings are numbers; an array of objects is refused even where these are numbers",
    "check_fit2d_1sample": "one row is refused, in words that speak of images",
}
"""Checks that ask for what is not meant to be, and why."""

OF_ONE_CLUSTER = dict.fromkeys(
    ("check_dont_overwrite_parameters", "check_methods_subset_invariance", "check_fit2d_1feature",
     "check_fit2d_predict1d"), "the check sets n_clusters=1, and a consensus is about two clusters at least")


def those_that_do_not_apply(estimator: BaseEstimator) -> dict[str, str]:
    one_row_is_enough = {"check_fit2d_1sample"} if isinstance(estimator, KMeans) else set()
    listed = {name: why for name, why in DO_NOT_APPLY.items() if name not in one_row_is_enough}
    return listed | (OF_ONE_CLUSTER if isinstance(estimator, Consensus) else {})


@parametrize_with_checks(list(CLUSTERERS), expected_failed_checks=those_that_do_not_apply)
def test_scikit_learns_check(estimator: BaseEstimator, check: Callable[[BaseEstimator], None]) -> None:
    check(estimator)


@pytest.mark.parametrize("estimator", CLUSTERERS, ids=lambda estimator: type(estimator).__name__)
def test_what_does_not_apply_is_refused_in_words_of_our_own(estimator):
    rows = np.random.default_rng(0).normal(size=(30, 4))
    with pytest.raises(InputError, match="embeddings must be real numbers, got object"):
        clone(estimator).fit(rows.astype(object))
    with pytest.raises(InputError, match=r"embeddings of \D*3\D* features do not fit .* of"):
        clone(estimator).fit(rows).predict(rows[:, :3])
    if not isinstance(estimator, KMeans | Consensus):
        with pytest.raises(InputError, match="needs at least 2 images, got 1"):
            clone(estimator).set_params(n_clusters=1).fit(rows[:1])


def test_the_pipeline_of_the_guide_runs(tmp_path):
    guide = Path(__file__).parents[2] / "docs" / "guides" / "python.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "guide.py").write_text(next(block for block in blocks if "make_pipeline" in block))
    names = runpy.run_path(str(tmp_path / "guide.py"))
    assert names["chain"]["kmeans"].labels_.shape == (1797,)
