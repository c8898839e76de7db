"""The works that several rows measure: some steps of training, some patches embedded, a product of matrices."""

import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from bagssl import bags, pretraining
from bagssl.bench.race import Machine, Work
from bagssl.config import PretrainConfig


def train_steps(machine: Machine, config: PretrainConfig, count: int) -> Work:
    """A run of `count` steps, a new seed each time: its crops and seconds after the first tenth, which warms up.

    It logs as rarely as a long run does: a log waits for the device.
    """
    seeds = iter(range(10**9))

    def work() -> tuple[int, float]:
        with mock.patch.object(pretraining, "LOGS", 10):
            history, _ = run_steps(machine, replace(config, seed=next(seeds)), count)
        rows = [{"crops": 0}, *history][len(history) > 1 :]
        seconds = sum((row["crops"] - before["crops"]) / row["crops_per_second"] for before, row in pairwise(rows))
        return int(rows[-1]["crops"] - rows[0]["crops"]), seconds

    return work


def run_steps(machine: Machine, config: PretrainConfig, steps: int) -> tuple[list[dict[str, float]], nn.Module]:
    """The history of a run of `steps` steps, and its encoder."""
    config = replace(config, epochs=steps / (len(machine.train) // config.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        run = pretraining.pretrain(config, machine.train, Path(folder), progress=False)
        return run.history, pretraining.load_encoder(run, machine.device)


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
