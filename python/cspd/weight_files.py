"""The files that weights come in: read safely, with what stands beside the weights, without a second copy of them."""

from __future__ import annotations

import json
import logging
import re
import struct
import zipfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, InvalidInput
from .files import check_output, writing
from .unpickling import plain_values_allowed, why_unreadable

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
# What a file may say of a MAR that its weights do not show.
FACTS = ("patch_size", "vae_stride", "vae_embed_dim", "img_size")
# Where training checkpoints keep weights: the averaged ones first.
ENTRIES = ("model_ema", "model", "state_dict")
# The types of weights that are read, under their names in safetensors.
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
# What DataParallel, torch.compile, FSDP and a model that is an attribute of another one put in front of all names.
_PREFIX = re.compile(r"(?:(?:module|_orig_mod|_fsdp_wrapped_module|model)\.)+")
# The names under which hub libraries write weights beside the config.json that is theirs.
_WITH_CONFIG = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
_PLAIN = "state dict"
# By what a file among others in a folder is known: the end of the name of one of its weights, and what that is.
MAR_FILE = ("class_emb.weight", "a MAR")
VAE_FILE = ("decoder.conv_in.weight", "a VAE")
_logger = logging.getLogger("cspd")


@dataclass(frozen=True)
class Weights:
    """A state dict of a file.

    Attributes:
        tensors: by name. They may lie in the file itself: copy what is to outlive it.
        source: the entry of the checkpoint that they are ("model_ema", "model"), or "state dict" where they are all.
        facts: what the file says of its model, of FACTS. told_by: where it does.
        prefix: what all names began with; it is dropped.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    source: str
    facts: dict[str, int]
    told_by: str = ""
    prefix: str = ""


def read_weights(path: Path, entry: str | None = None, mar: bool = False) -> Weights:
    """The state dict in a file, checked: floating tensors in their own shapes, under names of one prefix.

    Args:
        entry: the entry of a training checkpoint to take. By default the first of model_ema, model and state_dict.
        mar: a MAR's weights are wanted: a VAE's are refused by name.

    Raises:
        FileNotFoundError: no such file. ValueError: it holds no such state dict.
    """
    weights = read_unchecked(path, entry)
    if mar and isinstance(weights.tensors, dict) and _is_a_vae(weights.tensors):
        raise CheckpointError(f"expected the state dict of a MAR model in {path}, got a VAE")
    check_weights(weights.tensors, path)
    prefix = _common_prefix(weights.tensors, path)
    if prefix:
        _logger.info("dropped the prefix %s of all names in %s", prefix, path)
    tensors = {name[len(prefix) :]: value for name, value in weights.tensors.items()}
    return Weights(path, tensors, weights.source, weights.facts, weights.told_by, prefix)


def read_unchecked(path: Path, entry: str | None = None) -> Weights:
    """The same for a file whose ``tensors`` may be anything yet, another type than a dict included."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint file, found none at {path}")
    if re.search(r"-\d{5}-of-\d{5}\.", path.name):
        raise CheckpointError(
            f"expected all weights in one file, got one part of several, {path}: save them in one file"
        )
    if path.suffix == ".safetensors":
        tensors, header = _read_safetensors(path)
        source = header["weights"] if header.get("weights") in ENTRIES else _PLAIN
        if entry not in (None, source):
            raise CheckpointError(f"expected {entry} in {path}, but the file does not say that it has it")
        return _told(path, tensors, source, _facts(header), "its header")
    loaded = _read_pickled(path)
    entries = ENTRIES if entry is None else (entry,)
    if isinstance(loaded, dict):
        arguments = loaded.get("args")
        told = _facts(vars(arguments) if isinstance(arguments, Namespace) else arguments)
        for name in entries:
            if isinstance(loaded.get(name), (dict, torch.Tensor)):
                return _told(path, loaded[name], name, told, "its args")
    if entry is not None:
        raise CheckpointError(f"expected the entry {entry} in {path}, found none")
    return _told(path, loaded, _PLAIN, {}, "")


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"expected a safetensors file, could not read {path}: {error}") from error


def _read_pickled(path: Path) -> object:
    try:
        with plain_values_allowed():
            # Mapped, the entries that nobody wants are never read. What older versions of PyTorch wrote cannot be.
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise CheckpointError(
            f"expected a checkpoint of plain tensors, could not read {path}: {why_unreadable(error)}"
        ) from error


def _told(path: Path, tensors: object, source: str, facts: dict[str, int], told_by: str) -> Weights:
    """Weights with these facts, or with those of a config.json beside the file, as hub libraries write it."""
    config = config_beside(path)
    if facts or config is None:
        return Weights(path, tensors, source, facts, told_by)
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"expected JSON in {config}, beside {path.name}: {error}") from error
    return Weights(path, tensors, source, _facts(content), "config.json")


def config_beside(path: Path) -> Path | None:
    """The config.json that is asked where a file does not say itself what its weights do not show."""
    config = path.parent / "config.json"
    return config if path.name in _WITH_CONFIG and config.is_file() else None


def _facts(arguments: object) -> dict[str, int]:
    """Those of FACTS that are there, as whole numbers."""
    if not isinstance(arguments, dict):
        return {}
    found = {name: arguments[name] for name in FACTS if name in arguments}
    texts = {name: str(value) for name, value in found.items() if isinstance(value, (int, str))}
    return {name: int(text) for name, text in texts.items() if re.fullmatch(r"[1-9]\d{0,8}", text)}


def _is_a_vae(state: dict[str, torch.Tensor]) -> bool:
    """Whether a state dict has a VAE's names and none of a MAR's. Asked first: a VAE's file also has integers."""
    names = [name for name in state if isinstance(name, str)]
    return any(name.endswith(VAE_FILE[0]) for name in names) and not any(name.endswith(MAR_FILE[0]) for name in names)


def check_weights(state: object, path: Path) -> None:
    """Raise where the state is none, or holds weights in a form that is not theirs."""
    if isinstance(state, torch.Tensor):
        raise CheckpointError(
            f"expected a state dict in {path}, got one tensor of shape {tuple(state.shape)}: {UNFLATTEN}"
        )
    if not isinstance(state, dict) or not state:
        got = "an empty one" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise CheckpointError(f"expected a state dict, or a checkpoint with model_ema or model, in {path}, got {got}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"expected a state dict, or a checkpoint with model_ema or model, in {path}, got {name!r} with a value "
                f"of type {type(value).__name__}"
            )
        if re.search(r"(^|[._])flat_param", name):
            raise CheckpointError(f"expected weights in their original shapes in {path}, got {name}: {UNFLATTEN}")
        if value.dtype not in _TYPES or value.layout is not torch.strided:
            kind = value.dtype if value.layout is torch.strided else value.layout
            raise CheckpointError(
                f"expected floating weights in {path}, got {name} of {kind}: quantised, complex and sparse checkpoints "
                "are not read; save the weights in float32, bfloat16 or float16"
            )


UNFLATTEN = "save a full state dict, with FSDP's StateDictType.FULL_STATE_DICT"


def _common_prefix(state: dict[str, torch.Tensor], path: Path) -> str:
    """What all names begin with, of the prefixes that are known.

    Raises:
        ValueError: some names have such a prefix, and others do not.
    """
    prefixes = {match[0] if (match := _PREFIX.match(name)) else "" for name in state}
    if len(prefixes) > 1:
        some = max(prefixes, key=len)
        other = next(name for name in state if not name.startswith(some))
        raise CheckpointError(
            f"expected all names in {path} with the prefix {some!r}, or none, got {other} too: save the state dict of "
            "the model alone"
        )
    return prefixes.pop()


def find_file(path: Path, marker: str, what: str) -> Path:
    """The one file in a folder that holds a weight whose name ends with ``marker``; a path to a file as it is.

    The folder's own files come first, then those up to two folders deeper, as downloads from a hub lie in.

    Args:
        what: the model with its article, for messages.

    Raises:
        ValueError: there is none, or more than one.
    """
    if not path.is_dir():
        return path
    for pattern in ("*", "*/*", "*/*/*"):
        files = sorted(file for file in path.glob(pattern) if file.suffix in SUFFIXES and file.is_file())
        if files:
            break
    else:
        raise CheckpointError(
            f"expected a checkpoint in the folder {path}, found no file named *{', *'.join(SUFFIXES)}"
        )
    if len(files) == 1:
        return files[0]
    names = ", ".join(str(file.relative_to(path)) for file in files)
    fitting = [file for file in files if _holds(file, marker)]
    if not fitting:
        raise CheckpointError(f"expected the checkpoint of {what} in {path}, found only others: {names}")
    if len(fitting) > 1:
        names = ", ".join(str(file.relative_to(path)) for file in fitting)
        raise CheckpointError(f"expected one checkpoint of {what} in {path}, found several: give one of {names}")
    return fitting[0]


def _holds(path: Path, marker: str) -> bool:
    try:
        state = read_unchecked(path).tensors
    except ValueError:
        return False
    return isinstance(state, dict) and any(str(name).endswith(marker) for name in state)


def why_not_its_weights(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor], what: str) -> str | None:
    """The first difference of two state dicts in names and shapes, for people."""
    for names, how in ((expected.keys() - got.keys(), "without"), (got.keys() - expected.keys(), "with an unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"expected the state dict of {what}, got one {how} {min(names)}{more}"
    for name, value in expected.items():
        if value.shape != got[name].shape:
            return f"expected {name} of shape {tuple(value.shape)}, got {tuple(got[name].shape)}"
    return None


def check_safetensors(path: Path) -> None:
    """Raise where :func:`write_safetensors` could not write ``path``, as far as can be known."""
    if path.suffix != ".safetensors":
        raise InvalidInput(f"expected an output with the ending .safetensors, got {path.name}")
    check_output(path, "the output")


def write_safetensors(path: Path, weights: Weights, facts: dict[str, int]) -> None:
    """Write weights, whole or not at all. Tensor by tensor: a mapped file is never in memory as a whole.

    The header says where they are from (``converted_from``, ``weights``), and the facts.

    Raises:
        OSError: it could not be written; nothing has changed.
    """
    known = {"format": "pt", "converted_from": weights.path.name, **{name: str(facts[name]) for name in facts}}
    if weights.source in ENTRIES:
        known["weights"] = weights.source
    header, end = {"__metadata__": known}, 0
    # The largest numbers first, as the format's own library does: then all are aligned.
    tensors = dict(sorted(weights.tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    for name, value in tensors.items():
        start, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": _TYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with writing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            file.write(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
