"""ResNet encoders with the stems that the field uses for 32, 96 and 224 pixels: images (B, 3, H, W) to (B, D).

He et al. 2016; the CIFAR and STL forms are those of van Gansbeke et al. 2020, whose published files use the same
names (`conv1, bn1, layer1..4, shortcut`; the Bottleneck net uses torchvision's `downsample`). Embeddings are the
averaged activations after the last ReLU, so they are not negative.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phyla.errors import InputError, nearest

Depth = Literal["resnet18", "resnet50"]
Stem = Literal["cifar", "stl", "imagenet"]


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder is, in words a file can hold.

    Parameters
    ----------
    name : resnet18 (basic blocks) or resnet50 (bottlenecks)
    stem : cifar: 3x3 stride 1; stl: the same and a 2x2 max-pool (96 px become 49); imagenet: 7x7 stride 2 and max-pool
    width : channels of the first stage, 64 as published; the embedding has 8 * width (32 * width) features
    """

    name: Depth = "resnet18"
    stem: Stem = "cifar"
    width: int = 64

    def __post_init__(self) -> None:
        for value, allowed, field in ((self.name, get_args(Depth), "name"), (self.stem, get_args(Stem), "stem")):
            if value not in allowed:
                raise InputError(f"encoder {field}={value!r} is not known", nearest(str(value), list(allowed)))
        if self.width < 1:
            raise InputError(f"encoder width must be at least 1, got {self.width}")

    @property
    def n_features(self) -> int:
        """Length of an embedding."""
        return self.width * (8 if self.name == "resnet18" else 32)

    def build(self, generator: torch.Generator | None = None) -> "ResNet":
        """Return the encoder with fresh weights drawn from ``generator``."""
        with torch.random.fork_rng(devices=()):  # torch's own first draw leaves the global generator alone
            net = ResNet(self)
        initialise(net, generator)
        return net


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's activations."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which strides) and 1x1 convolutions, and a shortcut; torchvision's names."""

    expansion = 4

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        n_out = width * self.expansion
        self.conv1 = nn.Conv2d(n_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, n_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(n_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's activations."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.bn3(self.conv3(out)) + shortcut)


class ResNet(nn.Module):
    """A ResNet without its classifier; built from an EncoderSpec."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        block = BasicBlock if spec.name == "resnet18" else Bottleneck
        depths = (2, 2, 2, 2) if spec.name == "resnet18" else (3, 4, 6, 3)
        kernel, stride = (7, 2) if spec.stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(3, spec.width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(spec.width)
        # Padding 1 with a 2x2 window is the published STL form: 96 pixels become 49, not 48.
        pools = {"cifar": nn.Identity(), "stl": nn.MaxPool2d(2, 2, 1), "imagenet": nn.MaxPool2d(3, 2, 1)}
        self.maxpool = pools[spec.stem]
        n_in = spec.width
        for stage, depth in enumerate(depths, 1):
            width = spec.width * 2 ** (stage - 1)
            strides = [1 if stage == 1 else 2] + [1] * (depth - 1)
            blocks = []
            for s in strides:
                blocks.append(block(n_in, width, s))
                n_in = width * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Return one embedding an image, float of the input's dtype, not normalised."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x.mean(dim=(2, 3))


def initialise(module: nn.Module, generator: torch.Generator | None) -> None:
    """Draw fresh weights in place.

    Convolutions are Kaiming normal (fan-out), linear layers U(+-1/sqrt(fan_in)), BatchNorm is 1 and 0.
    Residual scales are not zeroed, as published. Only ``generator`` is drawn from.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
            layer.reset_running_stats()
        elif isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
