"""The networks of encoders that others trained, by a word: torchvision's, timm's, our own, or the user's code.

What a library knows of its weights comes with them: mean and deviation, the side in pixels, the share of the image
that counts as its centre. Nothing here reads a checkpoint but the libraries, and those without unpickling it.
"""

import contextlib
import importlib
import io
import logging
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from bagssl.encoders import build_encoder
from bagssl.errors import InputError, check_choice, shortage
from bagssl.paths import command_folder, file_hash
from bagssl.words import POOLS

TIMEOUT = 20.0  # seconds without an answer of a server that has weights
_imported: dict[str, str] = {}  # the user's module -> the hash of its source when it was imported


class Design(NamedTuple):
    """A network from patches to h, without its classifier, and what is known of how it wants to be asked."""

    network: nn.Module
    mean: tuple[float, ...] | None = None  # None: not known
    deviation: tuple[float, ...] | None = None
    size: int | None = None
    crop: float = 1.0  # the share of the image's side that its makers look at
    source: str = ""  # SHA-256 of the user's code
    classifier: nn.Linear | None = None  # what was taken off


def build(arch: str, *, width: int | None = None, size: int | None = None, seed: int = 0,
          trained: bool = False) -> Design:  # fmt: skip
    """The network that `arch` names, on the CPU: its weights drawn from `seed`, or the library's own if `trained`.

    arch: torchvision:NAME[@WEIGHTS], timm:NAME, bagssl:NAME (of `width`), or MODULE:FUNCTION. size: patches' side,
    for networks that are made for one. Raises InputError, in one line, for what there is not, or cannot be made.
    """
    library, _, name = arch.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if library == "torchvision":
            return _torchvision(name, size, trained)
        if library == "timm":
            return _timm(name, size, trained)
        if library == "bagssl":
            zero, one = (0.0,) * 3, (1.0,) * 3
            return Design(build_encoder(name, 64 if width is None else width, seed), zero, one)
        return _own(arch)


def _torchvision(name: str, size: int | None, trained: bool) -> Design:
    from torchvision import models

    name, _, chosen = name.partition("@")
    check_choice("network of torchvision", name, models.list_models(module=models))
    kinds = models.get_model_weights(name)
    check_choice(f"weights of torchvision's {name}", chosen or "DEFAULT", [*kinds.__members__])
    weights = kinds[chosen or "DEFAULT"]
    preset = weights.transforms()
    options = {"image_size": size} if name.startswith("vit_") and size and not trained else {}
    place = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    with warnings.catch_warnings(action="ignore"):  # that drawing weights is slow
        if not trained:
            network = models.get_model(name, **options)
        else:
            remedy = f"bring the file {weights.url} to {place}, or give one by FILE,arch=torchvision:{name}"
            with _from_a_library(f"{weights} of {name}", remedy):
                network = models.get_model(name, weights=weights, progress=sys.stderr.isatty())
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InputError(f"torchvision's {name} has no linear classifier that could be taken off: choose another")
    parent, _, child = linear[-1].rpartition(".")
    classifier = network.get_submodule(linear[-1])
    setattr(network.get_submodule(parent), child, nn.Identity())
    (side,), (resized,) = preset.crop_size, preset.resize_size
    return Design(network, tuple(preset.mean), tuple(preset.std), side, side / resized, "", classifier)


def _timm(name: str, size: int | None, trained: bool) -> Design:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise InputError(f"timm:{name} needs timm, which is not installed ({error}): pip install timm") from None
    if not timm.is_model(name):
        raise InputError(f"timm has no network {name!r}: see timm.list_models()")
    fixed = size and getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    options = {"img_size": size} if fixed else {}  # timm fits its own weights to another grid; a file's must be of it
    with _from_a_library(f"the weights of timm's {name}", f"give a file of them by FILE,arch=timm:{name}"):
        network = timm.create_model(name, pretrained=trained, num_classes=0, **options)
    about = timm.data.resolve_model_data_config(network)
    return Design(network, tuple(about["mean"]), tuple(about["std"]), about["input_size"][-1], about["crop_pct"])


@contextlib.contextmanager
def _from_a_library(what: str, remedy: str) -> Iterator[None]:
    """A library fetches and reads weights: never by a pickle, never for ever, and what fails is one line."""
    waited, silent = socket.getdefaulttimeout(), logging.root.manager.disable
    socket.setdefaulttimeout(TIMEOUT)
    logging.disable(logging.WARNING)  # of each try
    try:
        with mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"), contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as error:  # of sockets, hubs and torch, for what is absent or damaged
        if shortage(type(error).__name__, str(error)):
            raise
        raise InputError(f"{what} cannot be had ({_first_line(error)}): {remedy}") from None
    finally:
        socket.setdefaulttimeout(waited)
        logging.disable(silent)


def _own(arch: str) -> Design:
    module, _, function = arch.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), function]):
        raise InputError(f"arch = {arch!r} is none of torchvision:NAME, timm:NAME, bagssl:NAME and MODULE:FUNCTION")
    try:
        with _among_modules(command_folder()):
            code = importlib.import_module(module)
            path = Path(getattr(code, "__file__", None) or "")
            source = file_hash(path) if path.is_file() else ""
            if _imported.setdefault(module, source) != source:  # changed since, in a notebook perhaps
                code, _imported[module] = importlib.reload(code), source
            network = getattr(code, function)()
    except (Exception, SystemExit) as error:
        if shortage(type(error).__name__, str(error)):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        files = [frame for frame in frames if not frame.filename.startswith("<frozen")]
        where = f" ({Path(files[-1].filename).name}, line {files[-1].lineno})" if files else ""
        raise InputError(f"arch = {arch} cannot be made: {_first_line(error)}{where}") from None
    if not isinstance(network, nn.Module):
        raise InputError(f"arch = {arch} returns {type(network).__name__}: a torch.nn.Module is needed")
    return Design(network, source=source)


@contextlib.contextmanager
def _among_modules(folder: Path) -> Iterator[None]:
    """The user's own modules can be imported from a folder, in which this leaves no compiled ones."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = before


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".removesuffix(": ")


class PatchEncoder(nn.Module):
    """A network with what it takes and how it is pooled: patches [n, 3, s, s] in [0, 1] -> h [n, dim].

    pool: features, what the network itself gives (of a map [n, dim, h, w] the mean over places); of networks of tokens
    also mean (over the tokens of places) or cls (the class token).
    """

    def __init__(self, network: nn.Module, mean: tuple[float, ...], deviation: tuple[float, ...], pool: str):
        super().__init__()
        self.network, self.pool, self.dim = network, pool, 0  # of h, known when patches have gone through
        for name, values in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, patches: Tensor) -> Tensor:
        x = (patches - self.mean) / self.deviation
        if self.pool == "features":
            h = self.network(x)
            return h.mean(dim=(2, 3)) if h.ndim == 4 else h
        tokens, before = _tokens(self.network, x)
        return tokens[:, 0] if self.pool == "cls" else tokens[:, before:].mean(dim=1)


def _tokens(network: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The tokens [n, tokens, dim] of images, after the last layer, and how many of them come before those of places."""
    if hasattr(network, "forward_features"):  # timm, and who follows it
        return network.forward_features(x), getattr(network, "num_prefix_tokens", 0)
    if hasattr(network, "_process_input"):  # torchvision's vision transformers, which do the same and keep one token
        x = network._process_input(x)
        return network.encoder(torch.cat([network.class_token.expand(len(x), -1, -1), x], dim=1)), 1
    return network(x), getattr(network, "num_prefix_tokens", 0)


@torch.no_grad()
def embedding_dim(encoder: PatchEncoder, side: int, name: str) -> int:
    """The dimensions of h, by two patches of `side` px. Raises InputError, in one line, where none comes of them."""
    network, pool = encoder.network, encoder.pool
    try:
        h = encoder(torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)))
    except Exception as error:  # whatever a network says of what it does not take
        if shortage(type(error).__name__, str(error)):
            raise
        raise InputError(f"{name} takes no patches of {side} px ({_first_line(error)}): choose another size") from None
    class_token = getattr(network, "has_class_token", getattr(network, "num_prefix_tokens", 1))
    shape = list(h.shape) if isinstance(h, Tensor) else type(h).__name__
    if not isinstance(h, Tensor) or h.ndim != 2 or len(h) != 2 or pool == "cls" and not class_token:
        raise InputError(f"{name} with pool = {pool} gives {shape} for 2 patches, and [2, dim] is needed: choose "
                         f"another of {', '.join(POOLS)}")  # fmt: skip
    if not torch.isfinite(h).all():
        raise InputError(f"{name} gives NaN or infinity for patches of {side} px: its weights are of no use")
    return h.shape[1]
