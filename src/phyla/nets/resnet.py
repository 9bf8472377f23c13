"""ResNet encoders with the stems that the field uses for 32, 96 and 224 pixels: images (B, 3, H, W) to (B, D).

He et al. 2016; the CIFAR and STL forms are those of van Gansbeke et al. 2020, whose published files use the same
names (`conv1, bn1, layer1..4, shortcut`; the Bottleneck net uses torchvision's `downsample`). Embeddings are the
averaged activations after the last ReLU, so they are not negative.

Two streams, one of the pixels and one of their edges, are the encoder of Super-AND (Han et al. 2020, authors' code).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phyla.errors import InputError, nearest

Depth = Literal["resnet18", "resnet50", "resnet101"]
Stem = Literal["cifar", "stl", "imagenet"]
Streams = Literal["rgb", "rgb_sobel"]
Scheme = Literal["normal", "uniform"]
Scale = Literal["ones", "uniform"]

_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder is, in words a file can hold.

    Parameters
    ----------
    name : resnet18 (basic blocks), resnet50 or resnet101 (bottlenecks)
    stem : cifar: 3x3 stride 1; stl: the same and a 2x2 max-pool (96 px become 49); imagenet: 7x7 stride 2 and max-pool
    width : channels of the first stage, 64 as published; the embedding has 8 * width (32 * width) features a stream
    streams : rgb; rgb_sobel: a second network of the same form beside it, on the edges of the image
    members : networks whose embeddings stand in a row, for two that vote together; 1 as a rule
    """

    name: Depth = "resnet18"
    stem: Stem = "cifar"
    width: int = 64
    streams: Streams = "rgb"
    members: int = 1

    def __post_init__(self) -> None:
        for value, allowed, field in ((self.name, get_args(Depth), "name"), (self.stem, get_args(Stem), "stem"),
                                      (self.streams, get_args(Streams), "streams")):
            if value not in allowed:
                raise InputError(f"encoder {field}={value!r} is not known", nearest(str(value), list(allowed)))
        for count, field in ((self.width, "width"), (self.members, "members")):
            if count < 1:
                raise InputError(f"encoder {field} must be at least 1, got {count}")

    @property
    def n_features(self) -> int:
        """Length of an embedding."""
        streams = 2 if self.streams == "rgb_sobel" else 1
        return self.width * (8 if self.name == "resnet18" else 32) * streams * self.members

    def build(self, generator: torch.Generator | None = None) -> "Encoder":
        """Return the encoder with fresh weights drawn from ``generator``."""
        with torch.random.fork_rng(devices=()):  # torch's own first draw leaves the global generator alone
            net = _network(self)
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
        out = torch.relu_(self.bn1(self.conv1(x)))  # in place, as below: a fresh array costs a CPU its page faults
        return torch.relu_(self.bn2(self.conv2(out)) + self.shortcut(x))


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
        out = torch.relu_(self.bn1(self.conv1(x)))
        out = torch.relu_(self.bn2(self.conv2(out)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu_(self.bn3(self.conv3(out)) + shortcut)


class ResNet(nn.Module):
    """A ResNet of ``n_channels`` without its classifier; built from an EncoderSpec."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, spec: EncoderSpec, n_channels: int = 3) -> None:
        super().__init__()
        self.spec = spec
        block = BasicBlock if spec.name == "resnet18" else Bottleneck
        kernel, stride = (7, 2) if spec.stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(n_channels, spec.width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(spec.width)
        # Padding 1 with a 2x2 window is the published STL form: 96 pixels become 49, not 48.
        pools = {"cifar": nn.Identity(), "stl": nn.MaxPool2d(2, 2, 1), "imagenet": nn.MaxPool2d(3, 2, 1)}
        self.maxpool = pools[spec.stem]
        n_in = spec.width
        for stage, depth in enumerate(_BLOCKS[spec.name], 1):
            width = spec.width * 2 ** (stage - 1)
            strides = [1 if stage == 1 else 2] + [1] * (depth - 1)
            blocks = []
            for s in strides:
                blocks.append(block(n_in, width, s))
                n_in = width * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """Return one embedding an image, float of the input's dtype, not normalised."""
        x = self.maxpool(torch.relu_(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x.mean(dim=(2, 3))


class TwoStream(nn.Module):
    """Two ResNets of one form that share nothing: one sees the pixels, one their edges; the embeddings stand in a row.

    Edges are two Sobel derivatives, horizontal and vertical, of the mean of the three normalized channels, with zeros
    around the image. They are fixed, and neither scaled nor made positive.
    """

    filters: Tensor

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.rgb, self.sobel = ResNet(spec), ResNet(spec, n_channels=2)
        self.register_buffer("filters", torch.tensor(SOBEL).unsqueeze(1), persistent=False)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Return one embedding an image, pixels' half first, not normalised."""
        return torch.cat([self.rgb(x), self.sobel(self.edges(x))], dim=1)

    def edges(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 2 height width"]:
        """Return the two derivatives of grey; the filters have no gradient, the image may."""
        return nn.functional.conv2d(x.mean(dim=1, keepdim=True), self.filters.to(x.dtype), padding=1)


SOBEL = (((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0)), ((1.0, 2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0)))
"""The horizontal and the vertical derivative, rows top to bottom, as a cross-correlation."""


class Ensemble(nn.Module):
    """Encoders of one form that see the same image; their embeddings stand in a row.

    A linear head on it adds up the logits that the members' own heads would give.
    """

    def __init__(self, members: Sequence["ResNet | TwoStream"]) -> None:
        super().__init__()
        self.spec = replace(members[0].spec, members=len(members))
        self.members = nn.ModuleList(members)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Return the members' embeddings, the first member's first, not normalised."""
        return torch.cat([member(x) for member in self.members], dim=1)


Encoder = ResNet | TwoStream | Ensemble


def _network(spec: EncoderSpec) -> Encoder:
    if spec.members > 1:
        one = replace(spec, members=1)
        return Ensemble([TwoStream(one) if one.streams == "rgb_sobel" else ResNet(one) for _ in range(spec.members)])
    return TwoStream(spec) if spec.streams == "rgb_sobel" else ResNet(spec)


def initialise(module: nn.Module, generator: torch.Generator | None, *, convolutions: Scheme = "normal",
               bn_scale: Scale = "ones") -> None:
    """Draw fresh weights in place.

    Linear layers are U(+-1/sqrt(fan_in)), BatchNorm's shift is 0. Residual scales are not zeroed, as published. Only
    ``generator`` is drawn from.

    Parameters
    ----------
    convolutions : normal: Kaiming normal (fan-out); uniform: U(+-1/sqrt(fan_in)), PyTorch's default
    bn_scale : BatchNorm's scale: ones; uniform: U(0, 1), PyTorch's default until 1.1
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and convolutions == "normal":
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            if bn_scale == "uniform":
                nn.init.uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
            layer.reset_running_stats()
        elif isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
