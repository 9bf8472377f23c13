"""The nouns refuse arrays that are something else, and say what they are."""

from pathlib import Path

import numpy as np
import pytest
import torch

from phyla.errors import (
    CorruptFileError,
    DataNotFoundError,
    InputError,
    NonFiniteLossError,
    PhylaError,
    StorageError,
    nearest,
)
from phyla.types import Assignment, Embeddings, ImageSet, Neighbors, Scores

IDS = ["a", "b/c.png", "d"]


def pixels(n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)


# ---- images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [pixels(), torch.from_numpy(pixels())])
def test_images_are_pixels_and_names(given: np.ndarray | torch.Tensor) -> None:
    images = ImageSet(given, IDS, "some")
    assert (len(images), images.size, images.name) == (3, (4, 5), "some")
    np.testing.assert_array_equal(images.array, pixels())
    chosen = images.select(np.array([2, 0]))
    assert (chosen.ids, chosen.name) == (["d", "a"], "some")
    np.testing.assert_array_equal(chosen.array, pixels()[[2, 0]])


@pytest.mark.parametrize(("given", "told"), [
    (pixels().astype(np.float32), r"uint8 \(n, height, width, 3\), got float32 \(3, 4, 5, 3\)"),
    (torch.from_numpy(pixels()).float(), r"got float32 \(3, 4, 5, 3\)"),
    (pixels()[0], r"got uint8 \(4, 5, 3\)"), (pixels()[..., :1], r"got uint8 \(3, 4, 5, 1\)"),
    (pixels().transpose(0, 3, 1, 2), r"got uint8 \(3, 3, 4, 5\). hint: phyla.images.sources.from_array converts")])
def test_other_arrays_are_not_images(given: np.ndarray, told: str) -> None:
    with pytest.raises(InputError, match=told):
        ImageSet(given, IDS)


@pytest.mark.parametrize(("ids", "told"), [(["a"], "3 images need 3 ids, got 1"), (["a", "b", "a"], "must be unique")])
def test_every_image_has_a_name_of_its_own(ids: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        ImageSet(pixels(), ids)


def test_a_fingerprint_is_of_pixels_and_names_wherever_they_lie(tmp_path: Path) -> None:
    np.save(tmp_path / "pixels.npy", pixels())
    mapped = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    prints = {ImageSet(given, IDS, name).fingerprint for given in (pixels(), torch.from_numpy(pixels()), mapped)
              for name in ("one", "other")}
    assert len(prints) == 1
    changed = pixels()
    changed[1, 2, 3, 0] ^= 1
    assert ImageSet(changed, IDS).fingerprint not in prints
    assert ImageSet(pixels(), ["a", "b", "d"]).fingerprint not in prints


# ---- embeddings and neighbors -------------------------------------------------------------------------------------


def test_embeddings_are_one_vector_an_image() -> None:
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert len(Embeddings(values, IDS)) == 3
    assert Embeddings(values, IDS).fingerprint == Embeddings(values.copy(), list(IDS)).fingerprint
    assert Embeddings(values, IDS).fingerprint != Embeddings(values + 1, IDS).fingerprint
    assert Embeddings(values, IDS).fingerprint != Embeddings(values, ["x", "y", "z"]).fingerprint
    for wrong in (values[:2], values[0], values[None]):
        with pytest.raises(InputError, match=r"embeddings must be \(3, n_features\), got \("):
            Embeddings(wrong, IDS)


def near(indices: object) -> Neighbors:
    found = np.asarray(indices)
    return Neighbors(found, np.ones(found.shape, np.float32))


def test_neighbors_are_other_images() -> None:
    neighbors = near([[1, 2], [2, 0], [0, 1]])
    assert (len(neighbors), neighbors.n_neighbors) == (3, 2)
    assert neighbors.fingerprint == near([[1, 2], [2, 0], [0, 1]]).fingerprint
    assert neighbors.fingerprint != near([[2, 1], [2, 0], [0, 1]]).fingerprint
    assert near(np.zeros((1, 0), np.int64)).n_neighbors == 0


@pytest.mark.parametrize(("indices", "told"), [
    ([[1], [0], [3]], r"neighbors of 3 images must be 0 to 2, got 0 to 3"), ([[1], [-1], [0]], "got -1 to 1"),
    ([[0, 1], [1, 2], [2, 0]], "not its own neighbor, and 3 are. hint: leave the image itself out"),
    ([[1], [1], [0]], "and 1 are"), ([[1.0], [0.0], [0.0]], "must be integer indices, got float64")])
def test_wrong_neighbors_are_refused(indices: object, told: str) -> None:
    with pytest.raises(InputError, match=told):
        near(indices)


def test_neighbors_and_similarities_have_one_shape() -> None:
    for indices, similarities in (((3, 2), (3, 3)), ((3,), (3,)), ((3, 2), (2, 2))):
        with pytest.raises(InputError, match="of one \\(n, k\\) shape"):
            Neighbors(np.ones(indices, np.int64), np.ones(similarities, np.float32))


# ---- assignments --------------------------------------------------------------------------------------------------


def test_an_assignment_tells_labels_confidence_and_sizes() -> None:
    assignment = Assignment(np.float32([[0.2, 0.5, 0.3, 0], [0.6, 0.1, 0.3, 0], [0.25, 0.25, 0.5, 0]]), IDS)
    assert (len(assignment), assignment.n_clusters) == (3, 4)
    assert assignment.labels.tolist() == [1, 0, 2] and assignment.labels.dtype == np.int64
    assert assignment.confidence.tolist() == pytest.approx([0.5, 0.6, 0.5])
    assert assignment.sizes.tolist() == [1, 1, 1, 0]
    order, probabilities = assignment.top(2)
    assert order.tolist() == [[1, 2], [0, 2], [2, 0]]
    np.testing.assert_allclose(probabilities, [[0.5, 0.3], [0.6, 0.3], [0.5, 0.25]], rtol=1e-6)
    assert assignment.top(9)[0].shape == (3, 4)


def test_a_tie_goes_to_the_first_cluster() -> None:
    assignment = Assignment(np.full((3, 4), 0.25), IDS)
    assert assignment.labels.tolist() == [0, 0, 0]
    assert assignment.top(3)[0].tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("shape", [(2, 4), (3,), (3, 4, 1)])
def test_an_assignment_has_one_row_an_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"probabilities must be \(3, n_clusters\), got \("):
        Assignment(np.ones(shape), IDS)


@pytest.mark.parametrize(("row", "told"), [
    ([0.5, 0.4], "1 of 3 do not; row 1 sums to 0.9"), ([np.nan, 0.5], "row 1 sums to nan"), ([1.5, -0.5], "negative"),
    ([np.inf, 0.0], "row 1 sums to inf"), ([3.0, 4.0], "row 1 sums to 7")])
def test_rows_of_an_assignment_are_probabilities(row: list[float], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Assignment(np.array([[0.5, 0.5], row, [0.0, 1.0]]), IDS)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rounded_probabilities_are_probabilities(dtype: type) -> None:
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0)) * 3
    rounded = logits.softmax(1).numpy().astype(dtype)
    assert Assignment(rounded, [str(i) for i in range(200)]).n_clusters == 1000


def test_no_images_have_an_assignment() -> None:
    assert Assignment(np.zeros((0, 4)), []).sizes.tolist() == [0, 0, 0, 0]


def test_scores_are_named_numbers() -> None:
    assert Scores("SCAN", "test", 100, {"nmi": 0.5}).values["nmi"] == 0.5


# ---- errors -------------------------------------------------------------------------------------------------------


def test_errors_say_what_to_do_and_are_also_what_python_calls_them() -> None:
    assert str(PhylaError("too few images", "add some")) == "too few images. hint: add some"
    assert str(PhylaError("too few images")) == "too few images"
    kinds = {InputError: ValueError, DataNotFoundError: FileNotFoundError, StorageError: OSError,
             NonFiniteLossError: ArithmeticError, CorruptFileError: PhylaError}
    for kind, parent in kinds.items():
        error = kind("what", "do this")
        assert isinstance(error, PhylaError) and isinstance(error, parent)
        assert str(error) == "what. hint: do this"
        assert str(kind("what")) == "what"
        assert error.exit_code == (2 if isinstance(error, InputError) else 1)


def test_the_nearest_name_is_offered() -> None:
    assert nearest("scan-cifar1", ["scan-cifar10", "scan-stl10"]) == "did you mean scan-cifar10?"
    assert nearest("x", ["b", "a"]) == "allowed: a, b"
