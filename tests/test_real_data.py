"""Slow and real: the demonstration's numbers on digits, and CIFAR-10 as the methods' page predicts it."""

import os
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

N_FIRST = 2


def _data(*parts: str) -> Path:
    root = os.environ.get("PHYLA_DATA")
    if not root or not Path(root, *parts).exists():
        pytest.skip(f"needs real data: PHYLA_DATA/{'/'.join(parts)} is not here")
    return Path(root)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_beat_kmeans_on_pixels(tmp_path, seed):
    from phyla.overrides import with_seed
    from phyla.recipes import recipe
    from phyla.runner import Runner

    result = Runner(with_seed(recipe("scan-digits"), seed), tmp_path / "run").go("evaluate")
    key = "hungarian_accuracy"
    table = {row.method: row.values[key] for row in result.scores if key in row.values}
    assert table["SCAN + self-label"] > 0.9 > table["k-means on pixels"] > 0.75


@pytest.mark.data
def test_the_loss_of_all_of_cifar10_starts_where_the_paper_has_it(monkeypatch):
    """SCAN at initial weights: consistency and entropy near ln 10, so the total near ln 10 - 5 ln 10 = -9.21."""
    from phyla.cluster import scan
    from phyla.images.sources import open_images
    from phyla.neighbors import find_neighbors
    from phyla.randomness import generator
    from phyla.recipes import recipe

    images = open_images("cifar10", data_dir=_data("cifar10")).images
    assert len(images) == 50_000
    small = images.array.reshape(50_000, 8, 4, 8, 4, 3).mean((2, 4)).reshape(50_000, -1)
    pipeline, seen, real = recipe("scan-cifar10"), [], scan.scan_loss

    def watched(*logits, **options):
        seen.append(real(*logits, **options))
        if len(seen) == N_FIRST:
            raise SeenEnoughError
        return seen[-1]

    monkeypatch.setattr(scan, "scan_loss", watched)
    encoder = pipeline.pretrain.encoder.build(generator(0, "weights"))
    with pytest.raises(SeenEnoughError):
        pipeline.cluster.fit(images, neighbors=find_neighbors(small, 20), encoder=encoder)
    total, consistency, entropy = (value.item() for value in seen[0])
    assert consistency == pytest.approx(np.log(10), abs=0.15)
    assert entropy == pytest.approx(np.log(10), abs=0.15)
    assert total == pytest.approx(-9.2, abs=0.5)


class SeenEnoughError(Exception):
    """Ends a fit whose first steps are all that is asked for."""
