"""A checkpoint that others wrote, fitted to a network: read without running it, unwrapped, and then strictly.

Each tensor of the file must have its place: in the network or, by its name, in what is trained beside an encoder and
left when it is used (a classifier, a projector, a second network that follows or teaches the first).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bagssl.errors import InputError, shortage

# What state dicts are wrapped in, whichever comes first here; of DINO's two networks the teacher is the one to use.
CONTAINERS = ("state_dict", "model_state_dict", "model", "teacher", "student", "encoder_q", "encoder", "backbone",
              "network", "net", "module", "weights")  # fmt: skip
_WRAPPERS = re.compile(r"(?:(?:module|model|network|net|_orig_mod)\.)+")
_BESIDE = re.compile(
    r"(?:\w+_)?(?:fc|heads?|classifier|linear|logits|proj|projector|projection|predictor|prediction|prototypes"
    r"|queue|momentum|student|target|encoder_k)\d*(?:_\w+)?")  # fmt: skip
_COUNTER = "num_batches_tracked"  # of batch-norms; decides nothing in evaluation, and old files have none


class Fitted(NamedTuple):
    """What a checkpoint holds for a network: its tensors by the network's names, what is left over, and how it went."""

    tensors: dict[str, Tensor]
    left: dict[str, Tensor]
    said: str


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, those of its innermost container; safetensors, or torch's without its pickles.

    Raises InputError, in one line, for a file that cannot be read so, or holds no tensors.
    """
    if not path.is_file():
        raise InputError(f"{path} {'is a folder' if path.is_dir() else 'is not there'}: give a file of weights")
    try:
        if path.suffix.lower() == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both raise many kinds for a file that is damaged, or none of theirs
        if shortage(type(error).__name__, str(error)):
            raise
        raise InputError(f"{path} is no checkpoint that can be read, or it is damaged: {_reason(error)}") from None
    tensors = {name: value for name, value in _unwrapped(content).items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path} holds no tensors by name: save a model's state_dict()")
    return {str(name): tensor.detach() for name, tensor in tensors.items()}


def _reason(error: Exception) -> str:
    if pickled := re.search(r"GLOBAL (\S+)", str(error)):
        return (f"beside tensors it holds a pickled {pickled[1]}, which could run code and is not loaded; save the "
                "weights alone, where they were trained: torch.save(model.state_dict(), FILE)")  # fmt: skip
    said = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    return f"{type(error).__name__}: {(said.strip().splitlines() or ['it is damaged'])[0][:200]}"


def _unwrapped(content: Any) -> Mapping:
    for _ in range(8):  # a file may nest its containers, or hold one that contains itself
        if not isinstance(content, Mapping):
            return {}
        inner = [content[name] for name in CONTAINERS if isinstance(content.get(name), Mapping)]
        if not inner:
            break
        content = inner[0]
    return content


def fit(tensors: Mapping[str, Tensor], network: nn.Module, file: str, arch: str) -> Fitted:
    """Give each tensor of a file its place in the network, as fp32 where the network has that.

    The prefix with which most names fit is taken off; a network's children may be numbered, as in a Sequential of them.
    Raises InputError, in one line, unless nothing is missing, misshapen or not finite, and only what is trained beside
    an encoder is left over.
    """
    wanted, children = network.state_dict(), [name for name, _ in network.named_children()]
    split = [(name, *name.partition(".")[::2]) for name in wanted]
    known = {f"{children.index(child)}.{rest}": name for name, child, rest in split if child in children}
    known |= {name: name for name in wanted}
    prefix = _prefix(tensors, known, file)
    found = {known[name.removeprefix(prefix)]: name for name in tensors
             if name.startswith(prefix) and name.removeprefix(prefix) in known}  # fmt: skip
    taken = set(found.values())
    left = {name: tensor for name, tensor in tensors.items() if name not in taken}
    absent = [name for name in wanted if name not in found]
    missing = [name for name in absent if not name.endswith(_COUNTER)]
    unexpected = [name for name in left if not _beside(name, prefix)]
    misshapen = [name for name in found if not _alike(tensors[found[name]], wanted[name])]
    if missing or unexpected or misshapen:
        count = len(found) - len(misshapen)
        faults = [f"{kind} {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
                  for kind, names in (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        faults += [f"{found[name]} is {_shape(tensors[found[name]])} instead of {_shape(wanted[name])}"
                   for name in misshapen[:1]]  # fmt: skip
        raise InputError(f"{file} is not of {arch}: {count} of {len(wanted)} tensors fit; {'; '.join(faults)}")
    fitted = {name: tensors[given].to(wanted[name].dtype) for name, given in found.items()}
    for name, tensor in fitted.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{file} is of no use: {found[name]} holds NaN or infinity")
    said = [f"{file}: {len(fitted)} of {len(fitted) + len(missing)} tensors{f' under {prefix}' * bool(prefix)}"]
    groups = Counter(f"{_child(name, prefix)}.*" for name in left)
    said += ["left over: " + ", ".join(f"{name}, {count}" for name, count in groups.items())] * bool(left)
    said += [f"{_COUNTER} absent, taken as 0"] * (len(absent) > len(missing))
    kinds = {str(tensors[given].dtype).removeprefix("torch.") for given in found.values()
             if tensors[given].is_floating_point()} - {"float32"}  # fmt: skip
    said += [f"{' and '.join(sorted(kinds))} read as float32"] * bool(kinds)
    zero = {name: torch.zeros_like(wanted[name]) for name in absent}
    return Fitted(fitted | zero, {name.removeprefix(prefix): tensor for name, tensor in left.items()}, "; ".join(said))


def _prefix(names: Iterable[str], known: Mapping[str, str], file: str) -> str:
    """What stands before the network's names in a file. Raises InputError where two will do as well."""
    counts: Counter[str] = Counter()
    for name in names:
        starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
        counts.update(name[:start] for start in starts if name[start:] in known)
    most = max(counts.values(), default=0)
    best = [prefix for prefix in counts if counts[prefix] == most]
    if own := [prefix for prefix in best if not any(map(_BESIDE.fullmatch, prefix.split(".")))]:
        best = own  # not the projector, nor the network that follows this one
    if len(best) > 1:
        best = [prefix for prefix in best if "teacher" in prefix] or best
    if len(best) > 1 and most >= sum(not name.endswith(_COUNTER) for name in set(known.values())):
        raise InputError(f"{file} holds the network more than once, under {' and '.join(map(repr, best[:2]))}: save "
                         "the one that is meant")  # fmt: skip
    return min(best, key=len, default="")


def _child(name: str, prefix: str) -> str:
    """The network's part that a tensor belongs to: the first name after the prefix, or after what wraps a model."""
    rest = name.removeprefix(prefix)
    wrapper = _WRAPPERS.match(rest)
    return rest[wrapper.end() if wrapper else 0 :].partition(".")[0]


def _beside(name: str, prefix: str) -> bool:
    return bool(_BESIDE.fullmatch(_child(name, prefix)))


def _alike(tensor: Tensor, wanted: Tensor) -> bool:
    plain = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
    return plain and tensor.shape == wanted.shape and tensor.is_floating_point() == wanted.is_floating_point()


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
