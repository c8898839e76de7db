"""The works that several rows measure: some steps of training, some patches embedded, a product of matrices."""

import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from bagssl import bags, pretraining, recording, runs
from bagssl.batch.rehearsal import embedded_flops, trained_flops
from bagssl.bench.race import Machine, Work
from bagssl.config import PretrainConfig
from bagssl.devices import pick_compiled
from bagssl.pretraining import Learner


def train_steps(machine: Machine, config: PretrainConfig, count: int, compiled: str = "auto") -> Work:
    """A run of `count` steps: its crops and seconds after the first tenth, which warms up.

    It logs as rarely as a long run does: a log waits for the device. Each call trains the same networks on, so that
    what is compiled is compiled once. compiled: see `devices.pick_compiled`.
    """
    config, learner = of_steps(machine, config, count), None

    def work() -> tuple[int, float]:
        nonlocal learner
        if learner is None:
            how = machine.device, machine.dtype, pick_compiled(compiled, machine.device, count * config.crops_per_step)
            learner = Learner(config, *how)
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(recording, "LOGS", 10):
            run = runs.open_run(config.to_dict(), machine.train.fingerprint, config.label, Path(folder))
            pretraining.train(learner, machine.train, run, progress=False)
            rows = [{"crops": 0}, *run.history]
        rows = rows[len(rows) > 2 :]
        seconds = sum((row["crops"] - before["crops"]) / row["crops_per_second"] for before, row in pairwise(rows))
        return int(rows[-1]["crops"] - rows[0]["crops"]), seconds

    return work


def of_steps(machine: Machine, config: PretrainConfig, steps: int) -> PretrainConfig:
    """The configuration, for so many steps."""
    return replace(config, epochs=steps / (len(machine.train) // config.batch_size))


def run_steps(machine: Machine, config: PretrainConfig, steps: int) -> tuple[list[dict[str, float]], nn.Module]:
    """The history of a run of `steps` steps, and its encoder."""
    config = of_steps(machine, config, steps)
    with tempfile.TemporaryDirectory() as folder:
        run = pretraining.pretrain(config, machine.train, Path(folder), progress=False)
        return run.history, pretraining.load_encoder(run, machine.device)


def whole_run(machine: Machine, config: PretrainConfig, crops: int, every: int | None) -> Work:
    """A run of so many crops with all that it waits for, by the clock on the wall; `every`: see `online.Online`."""
    config, learner = of_steps(machine, config, max(2, crops // config.crops_per_step)), None

    def work() -> int:
        nonlocal learner
        if learner is None:
            learner = Learner(config, machine.device, machine.dtype, machine.long)
        with tempfile.TemporaryDirectory() as folder:
            run = runs.open_run(config.to_dict(), machine.train.fingerprint, config.label, Path(folder))
            pretraining.train(learner, machine.train, run, progress=False, watch=((), every))
            return run.metrics["crops"]

    return work


def short_run(machine: Machine, config: PretrainConfig) -> int:
    """Steps of a run that is short, but long against its beginning and end."""
    return max(2, machine.size["crops"][config.size] // (4 * config.crops_per_step))


def embed_patches(machine: Machine, encoder: nn.Module, pixels: Tensor, k: int, size: int) -> Work:
    ks = sorted({1, 4, 16, 64, k} & set(range(k + 1)))

    def work() -> int:
        bags.embed_bags(encoder, pixels, ks, scale=0.25, size=size, device=machine.device)
        return k * len(pixels)

    return work


def product(machine: Machine) -> Work:
    """A product of two square matrices, in floating-point operations."""
    n = machine.size["product"]
    a, b = (torch.rand(n, n, device=machine.device, dtype=machine.dtype) for _ in range(2))

    def work() -> int:
        torch.mm(a, b)
        return 2 * n**3

    return work


def flops(config: PretrainConfig, backward: bool) -> float:
    """Floating-point operations per crop: of a training, or of the encoder alone; a multiply-add is two."""
    return trained_flops(config) if backward else embedded_flops(config)
