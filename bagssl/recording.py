"""What is kept of a training on its way: where it is, its history, its checkpoint; and what it leaves at the end."""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bagssl import distributed, runs
from bagssl.config import PretrainConfig
from bagssl.data import Images
from bagssl.errors import Diverged, InputError, Stopped
from bagssl.runs import Run

LOGS = 200  # rows of the history of a whole schedule, or one for each step: each waits for the device
_COLUMNS = ("step", "epoch", "crops", "learning_rate", "crops_per_second")  # of the history, before the terms


class Record:
    """What is kept of a training: where it is, its history, its checkpoint, and the machines that it went through.

    learner: of pretraining.py. along: epochs at which it leaves, beside its own run, the finished one that ends there
    (`PretrainConfig.until`).
    """

    def __init__(self, learner: Any, run: Run, images: Images, along: Sequence[float] = ()):
        self.learner, self.run, self.images, config = learner, run, images, learner.config
        self.steps, self.per_epoch = config.steps(len(images)), len(images) // config.batch_size
        self.step, self.history, self.seconds, self.sums = 0, [], 0.0, {}
        self.planned = config.planned_steps(len(images))
        self.every = max(1, self.planned // LOGS)  # steps of a row of the history
        shorter = [replace(config, until=epochs) for epochs in along]
        self.along = {each.steps(len(images)): each for each in shorter}
        dtype = str(learner.dtype).removeprefix("torch.")
        self.hardware = {"hardware": runs.hardware(), "device": str(learner.device), "precision": dtype}
        self.hardware |= {"processes": distributed.ranks()} if distributed.ranks() > 1 else {}
        self.segments: list[dict[str, Any]] = []  # of the steps before: on which hardware, until which step
        self._resume()
        self.logged = self.step
        self.clock = self.saved = time.monotonic()
        self.paused = 0.0  # seconds since then in which nothing was trained: see watching.py

    def _resume(self) -> None:
        learner, names = self.learner, ("model", "optimiser", "step", "history", "seconds", "sums")
        to = learner.device if distributed.ranks() == 1 else torch.device("cpu")
        state = distributed.from_first(lambda: runs.load_checkpoint(self.run, to, names))
        if state is None:
            return
        try:
            learner.model.load_state_dict(state["model"])
            # rates, momenta and flags are those of the configuration and of this machine
            groups = learner.optimiser.state_dict()["param_groups"]
            learner.optimiser.load_state_dict({**state["optimiser"], "param_groups": groups})
            if learner.teacher is not None:
                learner.teacher.load_state_dict(state["teacher"])
        except (RuntimeError, ValueError, KeyError):
            path = self.run.path / "checkpoint.pt"
            raise InputError(f"{path} is of another network: delete it to train from the start") from None
        self.step, self.history, self.seconds, self.sums = (state[name] for name in names[2:])
        self.segments = state.get("parts", [])
        if self.segments and self.segments[-1] | {"until": 0} == self.hardware | {"until": 0}:
            self.segments.pop()  # this machine's last segment goes on

    def add(self, terms: Mapping[str, Tensor], rate: float) -> dict[str, float] | None:
        """Count a step; at the end of a row of the history the means of the terms over its steps.

        Raises Diverged when they are not those of a training that can go on.
        """
        self.step += 1
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value
        means = None
        if self.step % self.every == 0 or self.step == self.steps:
            self.history.append(row := self._row(rate))
            now = time.monotonic()
            self.seconds, self.clock = self.seconds + now - self.clock, now
            self.sums, self.logged, self.paused = {}, self.step, 0.0
            means = {name: value for name, value in row.items() if name not in _COLUMNS}
        if (shorter := self.along.get(self.step)) and self.step < self.steps and not distributed.rank():
            self._leave(shorter, self.history if means else [*self.history, self._row(rate)])
        return means

    def _row(self, rate: float) -> dict[str, float]:
        """Of the history, for the steps since the last one."""
        means = _means(self.sums, (self.step - 1) % self.every + 1)
        self._check(means)
        crops, elapsed = self.learner.config.crops_per_step, time.monotonic() - self.clock - self.paused
        return {
            "step": self.step, "epoch": self.step / self.per_epoch, "crops": self.step * crops, "learning_rate": rate,
            "crops_per_second": round((self.step - self.logged) * crops / max(elapsed, 1e-9), 1), **means}  # fmt: skip

    def _check(self, means: dict[str, float]) -> None:
        config = self.learner.config
        for name, value in means.items():
            if not math.isfinite(value):
                raise Diverged(f"{config.label}: '{name}' is {value} at step {self.step}: "
                               f"lower learning_rate ({config.learning_rate})")
        if self.step > 0.2 * self.planned and means["spread"] < 1e-3:
            raise Diverged(f"{config.label}: collapsed at step {self.step}: "
                           f"'spread' is {means['spread']:.1e}, all projections are alike")

    def save(self) -> None:
        """Write the checkpoint; of several processes the first does."""
        if distributed.rank():
            return
        learner, seconds = self.learner, self.seconds + time.monotonic() - self.clock
        teacher = {} if learner.teacher is None else {"teacher": learner.teacher.state_dict()}
        runs.save_checkpoint(self.run, {
            "model": learner.model.state_dict(), "optimiser": learner.optimiser.state_dict(), **teacher,
            "step": self.step, "history": self.history, "sums": self.sums, "seconds": seconds,
            "parts": [*self.segments, {**self.hardware, "until": self.step}]})  # fmt: skip
        self.saved = time.monotonic()

    def finish(self) -> None:
        """Write the finished run; of several processes the first does."""
        if not distributed.rank():
            self._write(self.run, self.history)

    def _leave(self, config: PretrainConfig, history: list[dict[str, float]]) -> None:
        """Write the run that ends at this step, unless it is there, or another process trains it."""
        run = runs.open_run(config.to_dict(), self.images.fingerprint, config.label, self.run.path.parent)
        with contextlib.suppress(Stopped), runs.locked(run, -math.inf):
            if not run.finished:
                self._write(run, history)

    def _write(self, run: Run, history: list[dict[str, float]]) -> None:
        learner, config, last = self.learner, self.learner.config, history[-1] if history else {}
        seconds = self.seconds + (time.monotonic() - self.clock) * (run != self.run)
        metrics = {
            "steps": self.step, "epochs": self.step / max(self.per_epoch, 1),
            "crops": self.step * config.crops_per_step, "images": len(self.images), "seconds": round(seconds, 3),
            "final": {name: value for name, value in last.items() if name not in _COLUMNS},
        }  # fmt: skip
        provenance = {**runs.provenance(), **self.hardware, "seed": config.seed, "data": self.images.fingerprint,
                      "wall_seconds": metrics["seconds"]}  # fmt: skip
        provenance |= {name: value for name, value in learner.options.items() if value not in ("none", False)}
        if self.segments:  # it went from one machine to another
            provenance |= {"parts": [*self.segments, {**self.hardware, "until": self.step}]}
        runs.finish(run, learner.model.state_dict(), history, metrics, provenance)


def _means(sums: Mapping[str, Tensor], steps: int) -> dict[str, float]:
    """The only wait for the device in the loop, but for checkpoints."""
    return dict(zip(sums, (torch.stack(list(sums.values())).cpu() / steps).tolist(), strict=True))
