"""`PretrainConfig`: what identifies a run. Each field says what it may be, and when it decides anything."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from bagssl.augmentation import Augmentation
from bagssl.encoders import BLOCKS, STEMS
from bagssl.errors import InputError, check_choice
from bagssl.objectives import OBJECTIVES

TRAININGS = ("patch-based", "multi-scale", "untrained")
OPTIMISERS = ("sgd", "lars", "adamw")


TRAINED = {"training": TRAININGS[:2]}
PATCH_BASED, MULTI_SCALE = {"training": ["patch-based"]}, {"training": ["multi-scale"]}
LARS = {**TRAINED, "optimiser": ["lars"]}
TARGETED = {**TRAINED, "needs_target": [True]}


def setting(default: Any, low: float | None = None, high: float | None = None, *,
            choices: Collection[str] | None = None, only: Mapping[str, Collection[str]] = TRAINED,
            later: bool = False) -> Any:
    """A field with its range or its choices.

    only: settings, or what follows from them -> those of their values with which it decides anything; otherwise it is
    set back to its default, so that one run serves every recipe that differs in nothing else. later: added after the
    first runs; at its default it is not in `to_dict`, so that runs made before it keep their keys.
    """
    declared = {"range": None if low is None else (low, high), "choices": choices, "only": only, "later": later}
    return field(**{"default_factory" if default is dict else "default": default}, metadata=declared)


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides the weights of a run; nothing about hardware, precision or time.

    `patch-based` cuts square patches of one fixed scale, `multi-scale` random resized crops; both are resized to
    `size` pixels, so both arms see the same number of crops of the same size. Raises InputError for a value that
    makes no sense.
    """

    dataset: str = setting("synthetic", only={})
    objective: str = setting("tcr", choices=OBJECTIVES)
    training: str = setting("patch-based", choices=TRAININGS, only={})
    seed: int = setting(0, 0, 2**31 - 1, only={})
    epochs: float = setting(10, 0, 1e6)  # passes over the images; each image gives `views` crops per pass
    views: int = setting(4, 2, 1024)
    batch_size: int = setting(256, 2, 2**20)  # images per step
    # crops: scales are fractions of the image's area
    size: int = setting(16, 4, 1024, only={})  # px, of the crop that the encoder sees
    patch_scale: float = setting(0.25, 1e-3, 1, only=PATCH_BASED)
    min_scale: float = setting(0.2, 1e-3, 1, only=MULTI_SCALE)
    # colour: strengths, then probabilities
    brightness: float = setting(0.4, 0, 10)
    contrast: float = setting(0.4, 0, 10)
    saturation: float = setting(0.4, 0, 10)
    hue: float = setting(0.1, 0, 0.5)
    jitter: float = setting(0.8, 0, 1)
    grey: float = setting(0.2, 0, 1)
    blur: float = setting(0.0, 0, 1)
    solarise: float = setting(0.0, 0, 1)
    flip: float = setting(0.5, 0, 1)
    # networks
    encoder: str = setting("resnet10", choices=BLOCKS, only={})
    # a multiple of 8: with fewer channels a CPU's convolutions can corrupt memory (oneDNN, AVX2)
    width: int = setting(16, 1, 2**16, only={})
    projector_hidden: int = setting(512, 1, 2**16)
    projector_dim: int = setting(128, 1, 2**16)
    # optimisation
    optimiser: str = setting("adamw", choices=OPTIMISERS)
    learning_rate: float = setting(4e-3, 1e-12, 1e3)
    weight_decay: float = setting(1e-4, 0, 1e3)
    momentum: float = setting(0.9, 0, 1, only={**TRAINED, "optimiser": ["sgd", "lars"]})
    warmup: float = setting(0.1, 0, 1)  # fraction of the steps
    # of the averaged network of BYOL and MoCo, rising to 1 along a cosine
    teacher_momentum: float = setting(0.99, 0, 1, only=TARGETED)
    options: Mapping[str, float] = setting(dict)  # the objective's own numbers, by name
    lars_trust: float = setting(0.02, 1e-6, 1e3, only=LARS, later=True)
    lars_clip: bool = setting(False, only=LARS, later=True)  # a tensor's rate is at most learning_rate
    stem: str = setting(STEMS[0], choices=STEMS, only={}, later=True)  # imagenet: for pictures of 64 px and more
    # equal parts of a batch, each embedded with batch-norm statistics of its own (Hoffer et al. 2017); the objective
    # sees all of it: what accumulation needs, see `pretrain`
    norm_groups: int = setting(1, 1, 1024, later=True)
    until: float = setting(0, 0, 1e6, later=True)  # epochs after which it ends, on the schedule of all; 0: its end
    grid: int = setting(0, 0, 1024, only=PATCH_BASED, later=True)  # px, of the offsets; views differ; 0: anywhere

    def __post_init__(self):
        for each in fields(self):
            value, declared = _typed(each.name, getattr(self, each.name), each.type), each.metadata
            object.__setattr__(self, each.name, value)
            if declared["choices"] is not None:
                check_choice(each.name, value, declared["choices"])
            if (ends := declared["range"]) and not ends[0] <= value <= ends[1]:
                raise InputError(f"{each.name} = {value} is outside {ends[0]:g} to {ends[1]:g}")
        self._check_together()
        for each in fields(self):
            if any(getattr(self, name) not in values for name, values in each.metadata["only"].items()):
                object.__setattr__(self, each.name, {} if each.default is dataclasses.MISSING else each.default)
        if self.training == "untrained":
            object.__setattr__(self, "epochs", 0.0)
        if self.until == self.epochs:
            object.__setattr__(self, "until", 0.0)

    def _check_together(self) -> None:
        """What no field can say of itself."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.dataset):
            raise InputError(f"dataset = {self.dataset!r} is no name of a dataset: see `bagssl data list`")
        if self.width % 8:
            raise InputError(f"width = {self.width} must be a multiple of 8")
        if self.batch_size % self.norm_groups:
            raise InputError(f"batch_size = {self.batch_size} is no multiple of norm_groups = {self.norm_groups}")
        declared = OBJECTIVES[self.objective].options
        for name, value in self.options.items():
            if name not in declared:
                raise InputError(f"{self.objective} has no option {name!r}: it has {', '.join(declared) or 'none'}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**53:
                raise InputError(f"option {name} = {value!r} of {self.objective} must be a positive number")
        if self.training != "untrained" and not self.epochs:
            raise InputError("epochs = 0 trains nothing: for random weights set training to untrained")
        if self.training != "untrained" and self.until > self.epochs:
            raise InputError(f"until = {self.until:g} is after its end, epochs = {self.epochs:g}")
        if self.optimiser == "lars" and not self.weight_decay:
            raise InputError("weight_decay = 0: LARS then rescales nothing; set it above 0, or use sgd")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from names and values. Raises InputError for a name that does not exist."""
        names = [each.name for each in fields(cls)]
        for name in values:
            check_choice("setting", name, names)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What identifies a run: all settings, but for later ones that have their default."""
        values = {**dataclasses.asdict(self), "options": dict(sorted(self.options.items()))}
        later = {each.name: each.default for each in fields(self) if each.metadata["later"]}
        return {name: value for name, value in values.items() if name not in later or value != later[name]}

    def steps(self, images: int) -> int:
        """Optimiser steps of a run on so many images. Raises InputError when they do not make up one."""
        steps, per_epoch = self.planned_steps(images), images // self.batch_size
        if self.until and not (steps := round(self.until * per_epoch)):
            raise InputError(f"until = {self.until:g} of {per_epoch} steps is not one step: raise until")
        return steps

    def planned_steps(self, images: int) -> int:
        """Those of its schedule: more than it takes where it ends before that, `until`."""
        if not self.epochs:
            return 0
        if images < self.batch_size:
            raise InputError(f"{images} images do not fill one batch of {self.batch_size}: lower batch_size")
        per_epoch = images // self.batch_size
        if not (steps := round(self.epochs * per_epoch)):
            raise InputError(f"epochs = {self.epochs:g} of {per_epoch} steps is not one step: raise epochs")
        return steps

    @property
    def needs_target(self) -> bool:
        """Whether its objective compares with an averaged network."""
        return OBJECTIVES[self.objective].needs_target

    @property
    def crops_per_step(self) -> int:
        """Views of all images of a step."""
        return self.views * self.batch_size

    @property
    def label(self) -> str:
        """A readable name: it leads the name of the run's folder."""
        arm = "untrained" if self.training == "untrained" else f"{self.objective}-{self.training}"
        return f"{self.dataset}-{arm}-seed{self.seed}"

    def augmentation(self) -> Augmentation:
        """The distribution of the training crops."""
        fixed = self.training != "multi-scale"
        colour = ("flip", "brightness", "contrast", "saturation", "hue", "jitter", "grey", "blur", "solarise")
        return Augmentation(scale=(self.patch_scale, self.patch_scale) if fixed else (self.min_scale, 1.0),
                            ratio=(1.0, 1.0) if fixed else (3 / 4, 4 / 3), size=self.size, grid=self.grid,
                            **{name: getattr(self, name) for name in colour})


_WANTED = {float: "a finite number", int: "a whole number", str: "a word", bool: "true or false"}


def _typed(name: str, value: Any, kind: Any) -> Any:
    """`value` in the type of its field; whole numbers pass as floats, nothing else is converted."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and abs(value) < 2**53:
        return float(value)
    if kind in (int, str, bool) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    if kind not in _WANTED and isinstance(value, Mapping):
        whole = [key for key, number in value.items() if type(number) is int and abs(number) < 2**53]
        return {**value, **{key: float(value[key]) for key in whole}}
    raise InputError(f"{name} = {value!r} must be {_WANTED.get(kind, 'a mapping of names to numbers')}")
