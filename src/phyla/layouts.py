"""What the authors' checkpoint files hold: which networks there are, and under which names their tensors stand.

A file is sorted into parts by the names in it. Each part keeps the names of the file and knows how one of ours is
written there, so that an error speaks of what is in the file. Everything is accounted for: a name that belongs to no
network is an error, and what stands beside the networks is left out with a note.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from phyla.errors import CorruptFileError, InputError
from phyla.nets.resnet import SOBEL, Streams

MOCO_FILE = "moco_v2_800ep_pretrain.pth.tar"
"""The official name of the ResNet-50 that every ImageNet configuration of SCAN starts from."""

WANTED = f"give a checkpoint of SCAN, NNM, RUC, Super-AND, AND or TSUC with a ResNet, or MoCo's {MOCO_FILE}"
AGAIN = "fetch the file again"

Family = Literal["scan", "ruc", "moco", "superand", "tsuc"]
State = dict[str, Tensor]
Net = TypeVar("Net", bound=nn.Module)


class Part(NamedTuple):
    """The tensors of one network by their names in the file, and the name there of one of ours."""

    state: State
    named: Callable[[str], str]

    def get(self, name: str) -> Tensor | None:
        """Return the tensor that is ``name`` with us, None where the file has none."""
        return self.state.get(self.named(name))


NOTHING = Part({}, str)


@dataclass(frozen=True, eq=False)
class Contents:
    """The networks of a file, not yet compared with ours.

    Parameters
    ----------
    family : whose file it is: scan (SCAN, NNM), ruc, moco, superand (AND, too) or tsuc
    encoder, projection, heads, memory : no tensors where the file has none
    streams : of the encoder
    head : what the file says is the best head
    names_head : whether it has a place to say so
    reported : numbers that the file tells about itself; accuracies among them were measured with true labels
    notes : what was left out, and what RUC's two networks became
    second : RUC's second network, whose logits are added to those of the first
    """

    family: Family
    encoder: Part
    projection: Part
    heads: Part
    memory: Part = NOTHING
    streams: Streams = "rgb"
    head: object = None
    names_head: bool = False
    reported: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    second: "Contents | None" = None


def contents(path: Path, held: object) -> Contents:
    """Return the parts of what ``read_checkpoint`` found at ``path``; InputError when they are of no known file."""
    if not isinstance(held, dict):
        raise InputError(f"{path} holds a {type(held).__name__} and no networks", WANTED)
    if isinstance(held.get("net"), dict):
        return _superand(path, held)
    return _ruc(path, held) if any(isinstance(held.get(name), dict) for name in _NETWORKS) else _scan(path, held)


def filled(path: Path, what: str, net: Net, part: Part) -> Net:
    """Return ``net``, which may be on the meta device, with the tensors of ``part``; an error when they do not fit."""
    wanted = net.state_dict()
    compare(path, what, {name: tuple(value.shape) for name, value in wanted.items()}, part)
    net.load_state_dict({name: part.state[part.named(name)].to(value.dtype) for name, value in wanted.items()},
                        assign=True)
    return net


def compare(path: Path, what: str, expected: Mapping[str, tuple[int, ...]], part: Part) -> None:
    """Raise an error unless ``part`` has exactly the tensors ``expected``, by our names and shapes, and all finite."""
    shapes = {part.named(name): shape for name, shape in expected.items()}
    found = {name: tuple(value.shape) for name, value in part.state.items()}
    missing = [name for name in shapes if name not in found]
    unexpected = [name for name in found if name not in shapes]
    misshapen = [f"{name} {found[name]} instead of {shape}" for name, shape in shapes.items()
                 if found.get(name, shape) != shape]
    if missing or unexpected or misshapen:
        raise fault(path, what, missing=missing, unexpected=unexpected, misshapen=misshapen)
    for name, value in part.state.items():
        if not torch.isfinite(value).all():
            raise CorruptFileError(f"{path} holds numbers that are not finite in {name}", AGAIN)


def fault(path: Path, what: str, **faults: list[str]) -> InputError:
    """Return the error for a network that is not whole: how many names are at fault, and the first of them."""
    told = [f"{len(names)} {wrong} ({_some(names)})" for wrong, names in faults.items() if names]
    return InputError(f"{path} holds no whole {what}: {', '.join(told)}", WANTED)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _part(state: State, prefix: str) -> Part:
    return Part(state, lambda name: prefix + name)


def _tensors(path: Path, state: Mapping[str, Any], prefix: str = "") -> State:
    """Return the tensors of a state by name, without the ``module.`` of DataParallel and with ``prefix``."""
    other = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        raise InputError(f"{path} holds no networks" + (f" but {_some(other)}" if other else ""), WANTED)
    return {prefix + str(name).removeprefix("module."): value for name, value in state.items()}


def _left_out(held: Mapping[str, Any], *used: str) -> list[str]:
    left_out = [str(name) for name in held if name not in used]
    return [f"left out of the file: {_some(left_out)}"] if left_out else []


# ---- SCAN, NNM and MoCo ---------------------------------------------------------------------------------------------


def _scan(path: Path, held: Mapping[str, Any]) -> Contents:
    wrapper = next((name for name in ("model", "state_dict") if isinstance(held.get(name), dict)), None)
    notes = _left_out(held, wrapper, "head", "best_loss_head") if wrapper else []
    state = _tensors(path, held[wrapper] if wrapper else held)
    is_moco = any(name.startswith("encoder_q.") for name in state)
    if is_moco:
        # A file that MoCo itself trained also has the slow encoder and the queue, which serve training alone.
        training = [name for name in state if re.match(r"encoder_k\.|queue(_ptr)?$", name)]
        state = {name: value for name, value in state.items() if name not in training}
        if training:
            notes.append(f"left out {len(training)} entries that serve training: {_some(training)}")
    prefixes = ("encoder_q.", "encoder_q.fc.", "cluster_head.") if is_moco else (
        "backbone.", "contrastive_head.", "cluster_head.")
    encoder, projection, heads = _by_prefix(path, state, prefixes)
    return Contents("moco" if is_moco else "scan", encoder, projection, heads, notes=notes,
                    head=held.get("head", held.get("best_loss_head")),
                    names_head="head" in held or "best_loss_head" in held)


def _by_prefix(path: Path, state: State, prefixes: tuple[str, str, str]) -> list[Part]:
    parts: dict[str, State] = {prefix: {} for prefix in prefixes}
    strange = []
    for name, value in state.items():
        prefix = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
        if prefix is None:
            strange.append(name)
        else:
            parts[prefix][name] = value
    if not parts[prefixes[0]]:
        raise InputError(f"{path} holds no encoder: no name begins with backbone. or encoder_q. ({_some(strange)})",
                         WANTED)
    if strange:
        raise fault(path, "network of SCAN, RUC or MoCo", unexpected=strange)
    return [_part(parts[prefix], prefix) for prefix in prefixes]


# ---- RUC ------------------------------------------------------------------------------------------------------------

_NETWORKS = ("net1", "net2")


def _ruc(path: Path, held: Mapping[str, Any]) -> Contents:
    """Return the parts of RUC's two networks, each an encoder and one head; what they make is the sum of both."""
    absent = [name for name in _NETWORKS if not isinstance(held.get(name), dict) or not held[name]]
    if absent:
        raise InputError(f"{path} has no {' and no '.join(absent)}: RUC's logits are the sum of two networks", AGAIN)
    first, second = (_ruc_network(path, held[name], f"{name}.") for name in _NETWORKS)
    notes = ["the encoder is RUC's two networks side by side, and the logits are the sum of theirs"]
    return replace(first, second=second, notes=notes + _left_out(held, *_NETWORKS))


def _ruc_network(path: Path, held: Mapping[str, Any], name: str) -> Contents:
    prefixes = (f"{name}backbone.", f"{name}contrastive_head.", f"{name}cluster_head.")
    encoder, projection, heads = _by_prefix(path, _tensors(path, held, name), prefixes)
    wanted = [heads.named("0.weight"), heads.named("0.bias")]
    missing = [entry for entry in wanted if entry not in heads.state]
    unexpected = [entry for entry in projection.state | heads.state if entry not in wanted]
    if missing or unexpected:
        raise fault(path, "network of RUC", missing=missing, unexpected=unexpected)
    return Contents("ruc", encoder, NOTHING, heads)


# ---- Super-AND, AND and TSUC ----------------------------------------------------------------------------------------


def _superand(path: Path, held: Mapping[str, Any]) -> Contents:
    """Return the parts of a file of stage 1 (``npc`` holds the memory) or of stage 2 (``fc`` holds the heads)."""
    networks = {name: held[name] for name in ("net", "npc", "fc") if isinstance(held.get(name), dict)}
    if len(networks) == 1:
        raise InputError(f"{path} holds net, and neither npc (Super-AND, AND) nor fc (TSUC) beside it", WANTED)
    state = _tensors(path, networks["net"])
    filters = {name: value for name, value in state.items() if name.startswith("sobel.")}
    has_two = bool(filters) or any("_sobel." in name for name in state)
    if has_two:
        _check_filters(path, _part(filters, ""))
    linear = {name: value for name, value in state.items() if name.startswith("linear.")}
    trunk = {name: value for name, value in state.items() if name not in filters and name not in linear}
    npc, fc = (_part(_tensors(path, networks[name], f"{name}.") if name in networks else {}, f"{name}.")
               for name in ("npc", "fc"))
    reported = {name: _number(held[name]) for name in ("acc", "acc_list", "round", "epoch") if name in held}
    return Contents("tsuc" if fc.state else "superand", Part(trunk, _two_stream_name if has_two else _one_stream_name),
                    Part(linear, _linear_name), fc, npc, "rgb_sobel" if has_two else "rgb", reported=reported,
                    notes=_left_out(held, *networks, *reported))


def _linear_name(ours: str) -> str:
    return f"linear.{ours.removeprefix('0.')}"


def _one_stream_name(ours: str) -> str:
    return ours.replace("downsample", "shortcut")


def _two_stream_name(ours: str) -> str:
    """Return ``layer1_sobel.0.bn1.bias`` for ``sobel.layer1.0.bn1.bias`` and ``bn1.bias`` for ``rgb.bn1.bias``."""
    stream, layer, inner = ours.split(".", 2)
    return _one_stream_name(f"{layer}{'_sobel' if stream == 'sobel' else ''}.{inner}")


def _check_filters(path: Path, part: Part) -> None:
    """Raise InputError unless the fixed front end of the file, which is not trained, is the one that ours computes."""
    constants = {"sobel.0.weight": torch.full((1, 3, 1, 1), 1 / 3), "sobel.0.bias": torch.zeros(1),
                 "sobel.1.weight": torch.tensor(SOBEL).unsqueeze(1), "sobel.1.bias": torch.zeros(2)}
    compare(path, "Sobel front end", {name: tuple(value.shape) for name, value in constants.items()}, part)
    for name, wanted in constants.items():
        if not torch.allclose(part.state[name].float(), wanted, rtol=0, atol=1e-6):
            raise InputError(f"{path} has other Sobel filters than Super-AND's: {name} is "
                             f"{part.state[name].flatten().tolist()} instead of {wanted.flatten().tolist()}",
                             "a network of other filters cannot be taken over")


def _number(value: object) -> object:
    """Return a number, or a list of them, as Python's own; what is neither as text."""
    if isinstance(value, Tensor | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_number(inner) for inner in value]
    return value if isinstance(value, int | float) else str(value)
