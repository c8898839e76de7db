"""What a notebook asks of its data, looked at before anything is trained.

Every size that the data decides is checked here by the name of its parameter, in the cells that load the data: what
does not fit is an InputError in one line, and no training goes before it.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from bagssl import data, evaluation, patches
from bagssl.config import PretrainConfig
from bagssl.data import Images
from bagssl.errors import InputError
from bagssl.evaluation import held_out_places
from bagssl.foreign import Foreign
from bagssl.runs import Run


def check_count(name: str, count: int, available: int, least: int = 0) -> None:
    """Raises InputError unless `count` of `available` images is at least `least`; 0 is then all of them."""
    if available < least:
        raise InputError(f"{name} = {count}: {least} images are needed, and there are {available}: add images")
    if not least <= count <= available:
        every = "" if least else "; 0 takes all"
        raise InputError(f"{name} = {count} of {available} images: choose a number from {least} to {available}{every}")


def sample(images: Images, name: str, count: int, least: int = 0) -> Images:
    """`count` images by `data.subset`, or all of them for 0 if `least` allows it; raises as `check_count` does."""
    check_count(name, count, len(images), least)
    return data.subset(images, count) if count else images


def check_number(name: str, value: int, least: int) -> None:
    """Raises InputError for a number below the least that makes sense."""
    if value < least:
        raise InputError(f"{name} = {value}: choose a whole number of at least {least}")


def check_places(name: str, places: Sequence[int], available: int) -> None:
    """Raises InputError unless `places` has one at least, and each is one among `available` images."""
    if not places or not all(0 <= place < available for place in places):
        raise InputError(f"{name} = {list(places)}: name at least one, each from 0 to {available - 1}: they are "
                         f"places among {available} images")  # fmt: skip


def check_once(name: str, values: Sequence[float], least: float) -> None:
    """Raises InputError unless there is a value, none twice and none below `least`."""
    if not values or len(set(values)) < len(values) or min(values) < least:
        raise InputError(f"{name} = {list(values)}: name at least one, each once, none below {least:g}")


def check_scales(name: str, scales: Sequence[float], images: Images) -> None:
    """Raises InputError unless patches of each scale, named once, are a share of these images and a pixel at least."""
    check_once(name, scales, 0)
    height, width = images.pixels.shape[2:]
    for scale in scales:
        if not 0 < scale <= 1:
            raise InputError(f"{name} = {scale:g} must lie in (0, 1]: it is a share of the image's area")
        if round(math.sqrt(scale * height * width)) < 1:
            raise InputError(f"{name} = {scale:g} of {height}×{width} px is less than a pixel: raise it")


def check_sides(name: str, models: Iterable[Run | Foreign], scales: Sequence[float], images: Images) -> None:
    """Raises InputError where an encoder that others trained takes no patches of such a scale in their own pixels."""
    for model in models:
        with named(f"encoders and {name}"):
            evaluation.check_sides(model, images.pixels, scales)


def check_grid(name: str, stride: int, scale: float, images: Images) -> None:
    """Raises InputError unless patches of one scale at every `stride`-th pixel are two at least in an image."""
    height, width = images.pixels.shape[2:]
    side = patches.native_size(scale, height, width)
    most = max(height, width) - side
    if not 1 <= stride <= most:
        reach = f"choose from 1 to {most}" if most else "only one fits: lower patch_scale"
        raise InputError(f"{name} = {stride} between patches of {side} px in images of {height}×{width} px: {reach}")


def check_training(configs: Iterable[PretrainConfig], images: Images) -> None:
    """Raises InputError for the first configuration that cannot be trained on these images, as `pretrain` would.

    That is for a batch of more images than there are, epochs of less than a step, a patch of less than a pixel, or
    more views than the cells of a grid.
    """
    for config in configs:
        with named(f"{config.objective}, {config.training}"):
            config.steps(len(images))
            if config.training == "patch-based":
                check_scales("patch_scale", [config.patch_scale], images)
            if config.training != "untrained":
                patches.draw(config.views, 1, *images.pixels.shape[2:], config.augmentation(), torch.Generator())


def check_probes(images: Images, probes: Sequence[str] = ("linear",), share: float | None = None) -> None:
    """Raises InputError unless the probes can be fitted to these images, and to what is left of them by `share`.

    share: held out of them first, as by `evaluate`.
    """
    fitted = [images.labels]
    if share is not None:
        fitted.append(images.labels[held_out_places(len(images), share, 0)[1]])
    for labels in fitted:
        counts = labels.bincount()
        if (counts > 0).sum() < 2:
            lacking = "all of one class, and a probe needs two"
        elif "linear" in probes and counts.max() < 2:
            lacking = "each of another class, and a linear probe needs two of one"
        else:
            continue
        held = "" if share is None else f" (less held_out = {share:g} of them)"
        raise InputError(f"the {len(labels)} training images{held} that a probe is fitted to are {lacking}: take "
                         "another dataset, or more train_images or probe_images")  # fmt: skip


@contextlib.contextmanager
def named(parameters: str) -> Iterator[None]:
    """Put the names of the notebook's parameters before the line of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{parameters}: {error}") from None
