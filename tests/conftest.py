"""What all tests share: checked annotations, one thread, and a few tiny, seeded inputs."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from jaxtyping import config, install_import_hook

sys.path.insert(0, str(Path(__file__).parent))  # shapes, naive and official lie here
install_import_hook("phyla", "shapes.check")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

from phyla.neighbors import find_neighbors  # noqa: E402
from phyla.nets.resnet import EncoderSpec, ResNet  # noqa: E402
from phyla.randomness import generator  # noqa: E402
from phyla.types import ImageSet, Neighbors  # noqa: E402
from processes import Processes  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Leave the annotations unchecked: for tests of what a caller hears who passes another type."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def digits() -> ImageSet:
    """Return 48 real digits, 8 x 8, as images."""
    grey = np.rint(load_digits().images[:48] * (255 / 16)).astype(np.uint8)
    return ImageSet(np.repeat(grey[..., None], 3, axis=3), [f"digit/{row:02d}" for row in range(48)], "digits")


@pytest.fixture(scope="session")
def near(digits: ImageSet) -> Neighbors:
    """Return the five nearest of each of the digits, by their pixels."""
    return find_neighbors(digits.array.reshape(len(digits), -1).astype(np.float32), 5)


@pytest.fixture(scope="session")
def colors() -> tuple[ImageSet, np.ndarray]:
    """Return 60 noisy images, 8 x 8, that are mostly red, green or blue, and which of these each is."""
    draw = np.random.default_rng(0)
    true = np.arange(60) % 3
    pixels = draw.integers(0, 90, (60, 8, 8, 3))
    pixels[np.arange(60), ..., true] += 150
    return ImageSet(pixels.astype(np.uint8), [f"{row}.png" for row in range(60)], "colors"), true


@pytest.fixture(scope="session")
def color_neighbors(colors: tuple[ImageSet, np.ndarray]) -> Neighbors:
    """Return the six nearest of each of the colors, by their mean color."""
    return find_neighbors(colors[0].array.mean(axis=(1, 2)).astype(np.float32), 6)


@pytest.fixture(scope="session")
def noise() -> ImageSet:
    """Return 32 images of noise, 16 x 16.

    For what must come out the same along two ways: no channel of a tiny network is nearly constant on them, where
    BatchNorm would blow rounding up a hundredfold a step.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)
    return ImageSet(pixels, [f"noise/{row:02d}" for row in range(32)], "noise")


@pytest.fixture(scope="session")
def noise_neighbors(noise: ImageSet) -> Neighbors:
    """Return the five nearest of each of the images of noise, by their pixels."""
    return find_neighbors(noise.array.reshape(len(noise), -1).astype(np.float32), 5)


@pytest.fixture
def encoder() -> ResNet:
    """Return the smallest encoder, (B, 3, H, W) to (B, 32), with fresh weights."""
    return EncoderSpec(width=4).build(generator(0, "test"))


class KilledError(Exception):
    """Stands for a process that ends in the middle of a step."""


Killer = Callable[[ModuleType, str, int], object]


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Killer:
    """Return a context in which a module's function kills its caller at its n-th call, and every step is saved."""
    monkeypatch.setattr("phyla.training.loop.CHECKPOINT_SECONDS", 0)

    @contextmanager
    def at(module: ModuleType, name: str, call: int) -> Iterator[None]:
        function, calls = getattr(module, name), 0

        def dying(*args: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                raise KilledError
            return function(*args, **options)

        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr(module, name, dying)
            yield

    return at


@pytest.fixture(scope="session")
def warm() -> None:
    """Make the first optimizer of the process: torch loads its compiler then, which takes seconds."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.fixture(scope="session")
def recorded() -> Callable[[str, list[float]], None]:
    """Return a check of the losses of a fit's first steps against those in ``golden/curves.json``.

    A fit computes in float32, so the tolerance is 1e-4: rounding differs between machines and builds of torch. Where a
    curve is meant to move, PHYLA_RECORD=1 writes the file anew.
    """
    path = Path(__file__).parent / "golden" / "curves.json"

    def check(name: str, losses: list[float]) -> None:
        curves = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if os.environ.get("PHYLA_RECORD") == "1":
            curves[name] = [round(loss, 7) for loss in losses]
            path.write_text(json.dumps(curves, indent=1, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
        assert losses == pytest.approx(curves[name], rel=1e-4)

    return check


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Two processes that form a group."""
    started = Processes()
    yield started
    started.close()
