"""Pre-training: the one loop, from a configuration and images to a run."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bagssl import runs
from bagssl.config import PretrainConfig
from bagssl.data import Images
from bagssl.devices import pick_compiled, pick_device, pick_precision
from bagssl.encoders import build_encoder, build_predictor, build_projector
from bagssl.errors import Diverged, InputError, Stopped
from bagssl.objectives import OBJECTIVES, needs_target, spread
from bagssl.optimisers import LARS
from bagssl.patches import apply_colour, augment
from bagssl.progress import progress_bar
from bagssl.runs import Run

LOGS = 200  # rows of a run's history: each waits for the device


def pretrain(
    config: PretrainConfig,
    images: Images,
    root: Path | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    compiled: str = "auto",
    time_limit: float | None = None,
    checkpoint_every: float = 60.0,
    progress: bool = True,
) -> Run:
    """The finished run of `config` on `images`: trained, or resumed, or found in the store at `root`.

    Stopped by Ctrl-C, SIGTERM or after `time_limit` seconds ($BAGSSL_DEADLINE, in Unix time, counts as well), it
    writes a checkpoint and raises Stopped (killed, it goes on from the checkpoint of at most `checkpoint_every` seconds
    before); the next call goes on from there and ends, on a CPU, with the weights of a
    run that was never stopped, to the bit. Raises Diverged when a loss term is not finite or the projections collapse,
    InputError when there are fewer images than one batch holds, or a finished run is damaged.
    """
    config.steps(len(images))  # refused before a folder is made
    device = torch.device(pick_device(device))
    compiled = pick_compiled(compiled, device)
    run = runs.open_run(config.to_dict(), images.fingerprint, config.label, root)
    if run.finished:
        run.check()
        runs.drop_checkpoint(run)  # killed when nothing but this was left to do
        return run
    deadline = _deadline(time_limit)
    with runs.locked(run, deadline):
        if not run.finished:  # it may have been finished while we waited
            runs.reopen(run)
            dtype = pick_precision(precision, device)
            _train(config, images, run, device, dtype, compiled, deadline, checkpoint_every, progress)
    return run


def load_encoder(run: Run, device: str | torch.device = "cpu") -> nn.Module:
    """The run's encoder in evaluation mode: patches [batch, 3, s, s] in [0, 1] -> h [batch, dim]."""
    config = _config(run)
    encoder = build_encoder(config.encoder, config.width)
    return _load(encoder, run, "encoder.").to(device)


def load_projector(run: Run, device: str | torch.device = "cpu") -> nn.Module:
    """The run's projector in evaluation mode: h [batch, dim] -> z [batch, projector_dim]."""
    config = _config(run)
    width = build_encoder(config.encoder, config.width).dim
    projector = build_projector(config.objective, width, config.projector_hidden, config.projector_dim)
    return _load(projector, run, "projector.").to(device)


def _config(run: Run) -> PretrainConfig:
    values = run.config
    try:
        return PretrainConfig.from_dict(values)
    except InputError as error:
        raise InputError(f"{run.path / 'config.json'}, perhaps of a newer bagssl, is not understood: {error}") from error


def _load(module: nn.Module, run: Run, prefix: str) -> nn.Module:
    tensors = {name.removeprefix(prefix): tensor for name, tensor in run.weights().items() if name.startswith(prefix)}
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{run.path}: its weights are not those of its config.json; delete the folder to train it again") from error
    return module.eval()


def _compiled(name: str) -> tuple[Callable, Callable]:
    """The function that colours patches, and the one that embeds and projects them."""
    mode = {"mode": "reduce-overhead"} if name == "graphs" else {}
    colour = apply_colour if name == "none" else torch.compile(apply_colour)
    return colour, torch.compile(_project, **mode) if name in ("all", "graphs") else _project


def learning_rate_at(step: int, steps: int, config: PretrainConfig) -> float:
    """Linear warm-up over the first `warmup` of the steps, then half a cosine down to zero."""
    warm = config.warmup * steps
    if step < warm:
        return config.learning_rate * (step + 1) / (warm + 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def _train(
    config: PretrainConfig,
    images: Images,
    run: Run,
    device: torch.device,
    dtype: torch.dtype,
    compiled: str,
    deadline: float,
    checkpoint_every: float,
    progress: bool,
) -> None:
    steps_per_epoch, steps = len(images) // config.batch_size, config.steps(len(images))
    crops_per_step = config.batch_size * config.views
    log_every = max(1, steps // LOGS)

    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # no shape changes from step to step
    model = _model(config).to(device, memory_format=torch.channels_last)
    followed = nn.ModuleList([model.encoder, model.projector])
    teacher = copy.deepcopy(followed) if needs_target(config.objective) else None
    optimiser = _optimiser(config, model)
    pixels = images.pixels.to(device)
    augmentation = config.augmentation()
    generator = torch.Generator(device)
    objective = OBJECTIVES[config.objective]
    colour, project = _compiled(compiled)

    step, history, seconds, sums, parts = 0, [], 0.0, {}, []
    here = {"hardware": runs.hardware(), "device": str(device), "precision": str(dtype).removeprefix("torch.")}
    state = runs.load_checkpoint(run, device, ("model", "optimiser", "step", "history", "seconds", "sums"))
    if state is not None:
        try:
            model.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
            if teacher is not None:
                teacher.load_state_dict(state["teacher"])
        except (RuntimeError, ValueError, KeyError):
            raise InputError(f"{run.path / 'checkpoint.pt'} is of another network: delete it to train from the start") from None
        step, history, seconds, sums = state["step"], state["history"], state["seconds"], state["sums"]
        parts = state.get("parts", [])
        if parts and parts[-1] | {"until": 0} == here | {"until": 0}:
            parts = parts[:-1]

    def checkpoint() -> None:
        spent = seconds + time.monotonic() - clock
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "sums": sums}
        state |= {"step": step, "history": history, "seconds": spent, "parts": [*parts, {**here, "until": step}]}
        runs.save_checkpoint(run, state | ({"teacher": teacher.state_dict()} if teacher is not None else {}))

    model.train()
    order, order_epoch = None, -1
    clock = saved = time.monotonic()
    logged = step
    with _signals() as stop, progress_bar(steps * crops_per_step, step * crops_per_step, config.label, progress) as bar:
        while step < steps:
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                order = torch.randperm(len(images), generator=_seeded(config.seed, 0, epoch))
                order, order_epoch = order.to(device, non_blocking=True), epoch
            batch = pixels[order[position * config.batch_size :][: config.batch_size]]
            # every step has its own seed: resuming needs no generator state, and no step depends on another's draws
            patches = augment(batch, config.views, augmentation, _seeded(config.seed, 1, step, generator), colour)

            rate = learning_rate_at(step, steps, config)
            for group in optimiser.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                # the views go through in one pass and share their batch-norm statistics
                z = model.project(patches, project)
                with torch.no_grad():
                    target = (project(*teacher, patches),) if teacher is not None else ()
            terms = objective(z.float(), *(t.float() for t in target), **config.options)
            terms["spread"] = spread(z.detach())
            optimiser.zero_grad(set_to_none=True)
            terms["loss"].backward()
            optimiser.step()
            if teacher is not None:
                decay = 1 - (1 - config.teacher_momentum) * 0.5 * (1 + math.cos(math.pi * step / steps))
                _average(teacher, followed, decay)

            step += 1
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach()
            if step % log_every == 0 or step == steps:
                means = _means(sums, (step - 1) % log_every + 1)
                _check(means, step, steps, config)
                now = time.monotonic()
                seconds, elapsed, clock = seconds + now - clock, now - clock, now
                row = {"step": step, "epoch": step / steps_per_epoch, "crops": step * crops_per_step, "learning_rate": rate}
                row["crops_per_second"] = round((step - logged) * crops_per_step / max(elapsed, 1e-9), 1)
                history.append({**row, **means})
                sums, logged = {}, step
                bar(step * crops_per_step, f"loss {means['loss']:.3f}")
            if stop or time.monotonic() > deadline:
                checkpoint()
                message = f"{config.label} stopped at step {step} of {steps}; the next call goes on from there"
                raise Stopped(message, interrupted=bool(stop))
            if time.monotonic() - saved > checkpoint_every:
                checkpoint()
                saved = time.monotonic()

        metrics = {
            "steps": steps,
            "epochs": steps / max(steps_per_epoch, 1),
            "crops": steps * crops_per_step,
            "images": len(images),
            "final": {name: history[-1][name] for name in terms_of(history)},
            "seconds": round(seconds, 3),
        }
        made = {**runs.provenance(), **here, "seed": config.seed, "data": images.fingerprint, "wall_seconds": metrics["seconds"]}
        made |= {"compiled": compiled} if compiled != "none" else {}
        made |= {"parts": [*parts, {**here, "until": steps}]} if parts else {}  # it went from one machine to another
        runs.finish(run, model.state_dict(), history, metrics, made)
        if stop:  # asked for when there was no step left to stop at
            raise Stopped(f"{config.label} is finished; what comes after it was not begun", interrupted=True)


def terms_of(history: list[dict[str, float]]) -> list[str]:
    """The names of the loss terms among a history's columns."""
    columns = ("step", "epoch", "crops", "learning_rate", "crops_per_second")
    return [name for name in history[0] if name not in columns] if history else []


class _Model(nn.Module):
    """Encoder, projector and, beside an averaged network, predictor: patches [views, batch, 3, s, s] -> z [views, batch, dim]."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module | None):
        super().__init__()
        self.encoder, self.projector, self.predictor = encoder, projector, predictor

    def project(self, patches: Tensor, project: Callable) -> Tensor:
        z = project(self.encoder, self.projector, patches)
        return z if self.predictor is None else self.predictor(z.flatten(0, 1)).view_as(z)


def _model(config: PretrainConfig) -> _Model:
    encoder = build_encoder(config.encoder, config.width, config.seed)
    projector = build_projector(
        config.objective, encoder.dim, config.projector_hidden, config.projector_dim, config.seed
    )
    predictor = None
    if needs_target(config.objective):
        predictor = build_predictor(config.projector_dim, config.projector_hidden, config.seed)
    return _Model(encoder, projector, predictor)


def _project(encoder: nn.Module, projector: nn.Module, patches: Tensor) -> Tensor:
    views, batch = patches.shape[:2]
    flat = patches.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return projector(encoder(flat)).view(views, batch, -1)


def _optimiser(config: PretrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Biases and batch-norm's scales are neither decayed nor, by LARS, rescaled."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    if config.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)
    return LARS(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0,
                trust=config.lars_trust, clip=config.lars_clip)


@torch.no_grad()
def _average(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, in place; batch-norm's statistics are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
    for mine, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        mine.copy_(theirs)


def _means(sums: Mapping[str, Tensor], steps: int) -> dict[str, float]:
    """The only wait for the device in the loop, but for checkpoints."""
    return dict(zip(sums, (torch.stack(list(sums.values())).cpu() / steps).tolist(), strict=True))


def _check(means: dict[str, float], step: int, steps: int, config: PretrainConfig) -> None:
    for name, value in means.items():
        if not math.isfinite(value):
            raise Diverged(f"{config.label}: '{name}' is {value} at step {step}: lower learning_rate ({config.learning_rate})")
    if step > 0.2 * steps and means["spread"] < 1e-3:
        raise Diverged(
            f"{config.label}: collapsed at step {step}: 'spread' is {means['spread']:.1e}, all projections are alike"
        )


def _seeded(seed: int, purpose: int, index: int, generator: torch.Generator | None = None) -> torch.Generator:
    """A generator whose stream belongs to (seed, purpose, index) alone."""
    generator = generator or torch.Generator()
    # mixed within 32 bits: that is all that the CPU's generator keeps of a seed
    return generator.manual_seed((seed * 0x9E3779B1 ^ (purpose << 31) + index) & 0xFFFFFFFF)


def _deadline(time_limit: float | None) -> float:
    """When to stop, on the monotonic clock: the other one may be set while we train."""
    deadline = os.environ.get("BAGSSL_DEADLINE") or "inf"
    try:
        left = float(deadline) - time.time()
        if math.isnan(left):
            raise ValueError
        return time.monotonic() + min(left, math.inf if time_limit is None else time_limit)
    except ValueError:
        raise InputError(f"BAGSSL_DEADLINE = {deadline!r} is not a Unix time in seconds") from None


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """While training, SIGINT and SIGTERM only ask for a stop: the list holds those that came."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
