"""`PretrainConfig`: what identifies a run; its fields, their ranges, and when a field decides nothing."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bagssl.encoders import BLOCKS
from bagssl.errors import InputError, check_choice, nearest
from bagssl.objectives import OBJECTIVES, needs_target
from bagssl.patches import Augmentation

TRAININGS = ("patch-based", "multi-scale", "untrained")

OPTIMISERS = ("sgd", "lars", "adamw")

_LATER = {"later": True}  # marks a setting that was added after the first runs


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides the weights of a run; nothing about hardware, precision or time.

    `patch-based` cuts square patches of one fixed scale, `multi-scale` random resized crops; both are resized to
    `size` pixels, so both arms see the same number of crops of the same size. Raises InputError for a value that
    makes no sense.
    """

    dataset: str = "synthetic"
    objective: str = "tcr"
    training: str = "patch-based"
    seed: int = 0
    epochs: float = 10  # passes over the images; each image gives `views` crops per pass
    views: int = 4
    batch_size: int = 256  # images per step
    # crops: scales are fractions of the image's area
    size: int = 16
    patch_scale: float = 0.25
    min_scale: float = 0.2
    # colour: strengths, then probabilities
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter: float = 0.8
    grey: float = 0.2
    blur: float = 0.0
    solarise: float = 0.0
    flip: float = 0.5
    # networks
    encoder: str = "resnet10"
    width: int = 16  # a multiple of 8: with fewer channels a CPU's convolutions can corrupt memory (oneDNN, AVX2)
    projector_hidden: int = 512
    projector_dim: int = 128
    # optimisation
    optimiser: str = "adamw"
    learning_rate: float = 4e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9  # of sgd and lars
    warmup: float = 0.1  # fraction of the steps
    teacher_momentum: float = 0.99  # of the averaged network of BYOL and MoCo, rising to 1 along a cosine
    options: Mapping[str, float] = field(default_factory=dict)  # the objective's own numbers, by name
    # added later: at its default such a setting is not in `to_dict`, so that runs made before it keep their keys
    lars_trust: float = field(default=0.02, metadata=_LATER)
    lars_clip: bool = field(default=False, metadata=_LATER)  # a tensor's rate is at most learning_rate, see LARS
    grid: int = field(default=0, metadata=_LATER)  # px: a patch's offsets are multiples of it, views differ; 0: anywhere

    def __post_init__(self):
        for field_ in dataclasses.fields(self):
            object.__setattr__(self, field_.name, _typed(field_.name, getattr(self, field_.name), field_.type))
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.dataset):
            raise InputError(f"dataset = {self.dataset!r} is no name of a dataset: see `bagssl data list`")
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("training", self.training, TRAININGS)
        check_choice("encoder", self.encoder, BLOCKS)
        check_choice("optimiser", self.optimiser, OPTIMISERS)
        for name, low, high in _RANGES:
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} = {getattr(self, name)} is outside {low:g} to {high:g}")
        if self.width % 8:
            raise InputError(f"width = {self.width} must be a multiple of 8")
        allowed = [name for name in inspect.signature(OBJECTIVES[self.objective]).parameters if name not in ("z", "target")]
        for name, value in self.options.items():
            if name not in allowed:
                raise InputError(f"{self.objective} has no option {name!r}: it has {', '.join(allowed) or 'none'}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**53:
                raise InputError(f"option {name} = {value!r} of {self.objective} must be a positive number")
        if self.training != "untrained" and not self.epochs:
            raise InputError("epochs = 0 trains nothing: for random weights set training to untrained")
        if self.optimiser == "lars" and not self.weight_decay:
            raise InputError("weight_decay = 0: LARS then rescales nothing; set it above 0, or use sgd")
        # what decides nothing is set back, so that one run serves every recipe that differs in nothing else
        for field_ in dataclasses.fields(self):
            if not self._uses(field_.name):
                made = field_.default_factory() if field_.default is dataclasses.MISSING else field_.default
                object.__setattr__(self, field_.name, made)
        if self.training == "untrained":
            object.__setattr__(self, "epochs", 0.0)

    def _uses(self, name: str) -> bool:
        if self.training == "untrained":
            return name in _OF_UNTRAINED
        unused = {
            "min_scale": self.training == "patch-based",
            "patch_scale": self.training == "multi-scale",
            "grid": self.training == "multi-scale",
            "momentum": self.optimiser == "adamw",
            "lars_trust": self.optimiser != "lars",
            "lars_clip": self.optimiser != "lars",
            "teacher_momentum": not needs_target(self.objective),
        }
        return not unused.get(name, False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PretrainConfig:
        """A configuration from names and values. Raises InputError for a name that does not exist."""
        names = [field_.name for field_ in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise InputError(f"unknown setting {name!r}; {nearest(str(name), names)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What identifies a run: all settings, but for those marked `_LATER` that have their default."""
        same = {f.name for f in dataclasses.fields(self) if f.metadata.get("later") and getattr(self, f.name) == f.default}
        values = {**dataclasses.asdict(self), "options": dict(sorted(self.options.items()))}
        return {name: value for name, value in values.items() if name not in same}

    def steps(self, images: int) -> int:
        """Optimiser steps of a run on so many images. Raises InputError when they do not make up one."""
        if not self.epochs:
            return 0
        if images < self.batch_size:
            raise InputError(f"{images} images do not fill one batch of {self.batch_size}: lower batch_size")
        per_epoch = images // self.batch_size
        if not (steps := round(self.epochs * per_epoch)):
            raise InputError(f"epochs = {self.epochs:g} of {per_epoch} steps is not one step: raise epochs")
        return steps

    @property
    def label(self) -> str:
        """A readable name: it leads the name of the run's folder."""
        if self.training == "untrained":
            return f"{self.dataset}-untrained-seed{self.seed}"
        return f"{self.dataset}-{self.objective}-{self.training}-seed{self.seed}"

    def augmentation(self) -> Augmentation:
        """The distribution of the training crops."""
        fixed = self.training != "multi-scale"
        return Augmentation(
            scale=(self.patch_scale, self.patch_scale) if fixed else (self.min_scale, 1.0),
            ratio=(1.0, 1.0) if fixed else (3 / 4, 4 / 3),
            size=self.size,
            grid=self.grid,
            **{name: getattr(self, name) for name in _COLOUR},
        )


_OF_UNTRAINED = ("dataset", "training", "seed", "size", "encoder", "width")

_COLOUR = ("flip", "brightness", "contrast", "saturation", "hue", "jitter", "grey", "blur", "solarise")

_RANGES = [
    ("seed", 0, 2**31 - 1),
    ("epochs", 0, 1e6),
    ("views", 2, 1024),
    ("batch_size", 2, 2**20),
    ("size", 4, 1024),
    ("grid", 0, 1024),
    ("patch_scale", 1e-3, 1),
    ("min_scale", 1e-3, 1),
    *((name, 0, 10) for name in ("brightness", "contrast", "saturation")),
    ("hue", 0, 0.5),
    *((name, 0, 1) for name in ("jitter", "grey", "blur", "solarise", "flip", "momentum", "warmup", "teacher_momentum")),
    *((name, 1, 2**16) for name in ("width", "projector_hidden", "projector_dim")),
    ("learning_rate", 1e-12, 1e3),
    ("lars_trust", 1e-6, 1e3),
    ("weight_decay", 0, 1e3),
]


def _typed(name: str, value: Any, kind: str) -> Any:
    """`value` as `kind`; whole numbers pass as floats, nothing else is converted."""
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in ("str", "bool") and isinstance(value, {"str": str, "bool": bool}[kind]):
        return value
    if kind.startswith("Mapping") and isinstance(value, Mapping):
        whole = [key for key, number in value.items() if type(number) is int and abs(number) < 2**53]
        return {**value, **{key: float(value[key]) for key in whole}}
    wanted = {"float": "a finite number", "int": "a whole number", "str": "a word", "bool": "true or false"}.get(kind, "a mapping of names to numbers")
    raise InputError(f"{name} = {value!r} must be {wanted}")
