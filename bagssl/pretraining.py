"""Pre-training: the one loop, from a configuration and images to a run.

The life of a crop. A dataset lies on the device as uint8 pixels, or is fed to it (feeding.py). For each step `train`
takes the next images of the epoch's order, and seeds a generator anew. From it `Learner.step` draws boxes and colours
for `views` patches of each image (`patches.draw`); cut, resized and coloured (`patches.apply`) they are patches [V, B,
3, s, s]. The encoder embeds each as h [V, B, dim]; the projector, and beside an averaged network the predictor, maps h
to z [V, B, D] (`Model`). The objective makes named terms of z; their `loss` goes back through the networks, and the
optimiser takes a step at the rate of the schedule. Around that, `Record` (recording.py) keeps the history and the
checkpoint, and at the end writes the run. Of several processes (distributed.py) each takes its share of a batch's
images through the networks; what is drawn is drawn for all of them, and the objective sees the z of all. Later bags.py
averages h over the patches of an image.
"""

import contextlib
import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bagssl import budget, distributed, records, runs
from bagssl.colours import apply_colour
from bagssl.config import PretrainConfig
from bagssl.data import Images
from bagssl.devices import pick_compiled, pick_device, pick_precision
from bagssl.distributed import gather
from bagssl.encoders import build_encoder, build_predictor, build_projector, embedding_dim
from bagssl.errors import InputError, Stopped
from bagssl.feeding import feed
from bagssl.graphs import Replayed
from bagssl.objectives import OBJECTIVES, Terms, spread
from bagssl.online import interval
from bagssl.optimisers import build_optimiser
from bagssl.patches import augment
from bagssl.progress import progress_bar
from bagssl.recomputing import recompute_blocks, recomputed
from bagssl.recording import Record
from bagssl.runs import Run
from bagssl.watching import loggers, watched

_COST = ("objective", "encoder", "stem", "width", "size", "views", "batch_size", "norm_groups", "projector_hidden",
         "projector_dim", "optimiser")  # what the time of a step depends on
INTERRUPTED = 2  # why a training stops: more than that its time is up


def pretrain(config: PretrainConfig, images: Images, root: Path | None = None, *, device: str = "auto",
             precision: str = "auto", compiled: str = "auto", accumulate: bool = False, recompute: bool = False,
             along: Sequence[float] = (), time_limit: float | None = None, checkpoint_every: float = 60.0,
             progress: bool = True, log_to: str | Sequence[str] | None = None, online: str | None = None) -> Run:
    """The finished run of `config` on `images`: trained, or resumed, or found in the store at `root`.

    Stopped by Ctrl-C, SIGTERM or after `time_limit` seconds ($BAGSSL_DEADLINE, in Unix time, counts as well), it
    writes a checkpoint and raises Stopped (killed, it goes on from the checkpoint of at most `checkpoint_every` seconds
    before); the next call goes on from there and ends, on a CPU, with the weights of a run that was never stopped, to
    the bit. Called by each process of a torchrun, it trains on all of them, with other rounding.

    along: epochs at which it leaves, beside its own run, the finished one of `until` these: the same weights as when
    that is asked for, without another training.

    log_to: where its history goes as well, while it trains: tensorboard, trackio, wandb, see watching.py; None:
    $BAGSSL_LOG_TO says. online: `knn` measures the encoder on its way, on training images, see online.py; `knn:EVERY`
    every so many crops. Neither changes anything of the run.

    Where memory does not suffice, at a third more work each: recompute keeps the inputs of residual blocks alone;
    accumulate goes through the batch in its `norm_groups` (batch-norm's statistics are of what goes through at once, so
    these belong to the configuration). Neither changes anything but, perhaps, rounding.

    Raises Diverged when a loss term is not finite or the projections collapse, DoesNotFit as `budget.piece` does, Lost
    when another process is gone or hangs, InputError when there are fewer images than one batch holds, a batch cannot
    be shared, a finished run is damaged, or a logger or probe is unknown or not installed.
    """
    crops = config.steps(len(images)) * config.crops_per_step  # what is refused, before a folder is made
    _check_shares(config, accumulate)
    watch = loggers(log_to), None if online is None else interval(online)
    device = distributed.own(torch.device(pick_device(device)))
    compiled = pick_compiled(compiled, device, crops, plain=distributed.launched() > 1 or accumulate or recompute)
    deadline = budget.deadline(time_limit)
    with distributed.led(_claimed(config, images, root, deadline)) as (path, left):
        run = Run(Path(path))
        if left:
            with distributed.group(device):
                how = device, pick_precision(precision, device), compiled, accumulate, recompute
                train(Learner(config, *how), images, run, deadline, checkpoint_every, progress, along=along,
                      watch=watch)
    return run


def _check_shares(config: PretrainConfig, accumulate: bool) -> None:
    if accumulate and config.norm_groups == 1 and config.epochs:
        raise InputError("accumulate needs parts of a batch that have batch-norm statistics of their own: set "
                         "norm_groups to 2 or more, which makes it another run; recompute changes nothing")  # fmt: skip
    if config.epochs and config.batch_size % (config.norm_groups * (count := distributed.launched())):
        groups = f" and norm_groups = {config.norm_groups}" * (config.norm_groups > 1)
        raise InputError(f"batch_size = {config.batch_size} cannot be shared by {count} processes{groups}: make it a "
                         f"multiple of {count * config.norm_groups}")  # fmt: skip


@contextlib.contextmanager
def _claimed(config: PretrainConfig, images: Images, root: Path | None, deadline: float) -> Iterator[tuple[str, bool]]:
    """The run's folder, and whether there is training left; it is held then."""
    run = runs.open_run(config.to_dict(), images.fingerprint, config.label, root)
    if run.finished:
        run.check()
        runs.drop_checkpoint(run)  # killed when nothing but this was left to do
        yield str(run.path), False
        return
    with runs.locked(run, deadline):
        left = not (run.finished or root is None and records.adopt(run.path))  # it may have been while we waited
        if left:
            runs.reopen(run)
        yield str(run.path), left


# ---- the mathematics


class Model(nn.Module):
    """Encoder, projector and, beside an averaged network, predictor: patches [V, B, 3, s, s] -> z [V, B, D].

    groups: of a batch, equal parts that go through one after the other.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module | None = None, groups: int = 1):
        super().__init__()
        self.encoder, self.projector, self.predictor, self.groups = encoder, projector, predictor, groups

    def forward(self, patches: Tensor) -> Tensor:
        if self.groups == 1:
            return self.project(patches)
        return torch.cat([self.project(group) for group in patches.chunk(self.groups, dim=1)], dim=1)

    def project(self, patches: Tensor) -> Tensor:
        # the views go through in one pass and share their batch-norm statistics
        flat = patches.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        z = self.projector(self.encoder(flat))
        return (z if self.predictor is None else self.predictor(z)).unflatten(0, patches.shape[:2])


def build_model(config: PretrainConfig) -> Model:
    """The networks that `config` trains, with the weights of its seed, on the CPU."""
    encoder = _encoder(config)
    sizes = config.projector_dim, config.projector_hidden
    predictor = build_predictor(*sizes, config.seed) if config.needs_target else None
    return Model(encoder, _projector(config), predictor, config.norm_groups)


def _encoder(config: PretrainConfig) -> nn.Module:
    return build_encoder(config.encoder, config.width, config.seed, config.stem)


def _projector(config: PretrainConfig) -> nn.Module:
    dim = embedding_dim(config.encoder, config.width)
    return build_projector(config.objective, dim, config.projector_hidden, config.projector_dim, config.seed)


class Learner:
    """All that a step changes or looks at but pixels: networks and optimiser, on one device.

    compiled: see `devices.pick_compiled`; accumulate, recompute: see `pretrain`. Within a `distributed.group` it is
    one of several that are the same but for the images that they see.
    """

    def __init__(self, config: PretrainConfig, device: torch.device, dtype: torch.dtype, compiled: str,
                 accumulate: bool = False, recompute: bool = False):
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # no shape changes from step to step
        self.config, self.device, self.dtype, self.compiled = config, device, dtype, compiled
        self.augmentation, self.generator = config.augmentation(), torch.Generator(device)
        self.options = {"compiled": compiled, "accumulate": accumulate, "recompute": recompute}
        self.model = build_model(config).to(device, memory_format=torch.channels_last).train()
        self.model = distributed.synchronised(self.model, device)
        self.objective, self.teacher = OBJECTIVES[config.objective], None
        if config.needs_target:
            self.teacher = copy.deepcopy(Model(self.model.encoder, self.model.projector, groups=config.norm_groups))
        self.optimiser = build_optimiser(config, self.model, capturable="graphs" in compiled)
        self.colour = torch.compile(apply_colour) if compiled.startswith(("colours", "all")) else apply_colour
        whole = compiled.startswith("all")
        self.embed, self.embed_target = (torch.compile(net) if whole and net is not None else net
                                         for net in (self.model, self.teacher))  # fmt: skip
        if recompute:
            recompute_blocks(self.model.encoder)
        if accumulate:
            self.model.project = recomputed(self.model.project, self.model)
        self.embed, self.share = distributed.parallel(self.embed), None
        if distributed.ranks() > 1:
            places = distributed.share(torch.arange(config.batch_size, device=device), config.norm_groups)
            self.share = config.batch_size, places

    def step(self, pixels: Tensor, rate: float | Tensor, momentum: float | Tensor) -> Terms:
        """One step on images, uint8 [B, 3, H, W]: the named terms of the loss, and `spread`, see objectives.py.

        The patches follow from the state of `generator`. rate: of the optimiser; momentum: of the teacher; numbers, or
        tensors without dimension on the device, which a CUDA graph reads anew each time. Of several processes each has
        its share of the batch, all the same generator, and all return the same terms.
        """
        config = self.config
        patches = augment(pixels, config.views, self.augmentation, self.generator, self.colour, self.share)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            z = self.embed(patches)
            with torch.no_grad():
                targets = [] if self.teacher is None else [self.embed_target(patches)]
        z, *targets = (gather(each, config.norm_groups) for each in (z, *targets))
        terms = self.objective(z, *targets, **config.options)
        terms["spread"] = spread(z.detach())

        self.optimiser.zero_grad(set_to_none=True)
        terms["loss"].backward()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        if self.teacher is not None:
            _average(self.teacher, self.model, momentum)
        return {name: value.detach() for name, value in terms.items()}


@torch.no_grad()
def _average(teacher: Model, student: Model, momentum: float | Tensor) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in place; batch-norm's statistics are copied."""
    for name in ("encoder", "projector"):
        averaged, trained = getattr(teacher, name), getattr(student, name)
        parameters = list(averaged.parameters())
        weight = [1 - momentum] * len(parameters) if isinstance(momentum, Tensor) else 1 - momentum
        torch._foreach_lerp_(parameters, list(trained.parameters()), weight)
        for copied, buffer in zip(averaged.buffers(), trained.buffers(), strict=True):
            copied.copy_(buffer)


def learning_rate_at(step: int, steps: int, config: PretrainConfig) -> float:
    """Linear warm-up over the first `warmup` of the steps, then half a cosine down to zero."""
    warm = config.warmup * steps
    if step < warm:
        return config.learning_rate * (step + 1) / (warm + 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def teacher_momentum_at(step: int, steps: int, config: PretrainConfig) -> float:
    """From `teacher_momentum` up to 1 along half a cosine."""
    return 1 - (1 - config.teacher_momentum) * 0.5 * (1 + math.cos(math.pi * step / steps))


# Of an epoch's images, of a step's patches. For seed 0 the first epoch's order is `data.subset`'s permutation, so that
# half an epoch of such a run sees the images that probes are fitted to; to change that would change all weights.
ORDER, DRAWS = 0, 1


def _seed(seed: int, purpose: int, index: int) -> int:
    """The seed of a stream that belongs to (seed, purpose, index) alone."""
    # mixed within 32 bits: that is all that the CPU's generator keeps of a seed
    return (seed * 0x9E3779B1 ^ ((purpose << 31) + index)) & 0xFFFFFFFF


# ---- the loop


def train(learner: Learner, images: Images, run: Run, deadline: float = math.inf, checkpoint_every: float = 60.0,
          progress: bool = True, along: Sequence[float] = (), watch: tuple[Sequence[str], int | None] = ((), None)
          ) -> None:  # fmt: skip
    """Take the steps of `run` that are left, and finish its record; see `pretrain` for what may stop it."""
    config = learner.config
    steps, planned, crops = config.steps(len(images)), config.planned_steps(len(images)), config.crops_per_step
    record = Record(learner, run, images, along)
    resumed, cost = record.step, (*(getattr(config, name) for name in _COST), learner.dtype, *learner.options.values())
    take_step = Replayed(learner) if "graphs" in learner.compiled else learner.step
    places = partial(_batches, config, len(images), resumed)
    with (_signals() as stop, progress_bar(steps * crops, resumed * crops, config.label, progress) as bar,
          watched(record, *watch) as look, budget.piece(config.label, cost, (steps - resumed) * crops) as told,
          feed(images.pixels, places, learner.device) as batches):  # fmt: skip
        for pixels in batches:
            # every step has its own seed: resuming needs no generator state, and no step depends on another's draws
            learner.generator.manual_seed(_seed(config.seed, DRAWS, record.step))
            rate = learning_rate_at(record.step, planned, config)
            terms = take_step(pixels, rate, teacher_momentum_at(record.step, planned, config))
            if means := record.add(terms, rate):
                bar(record.step * crops, f"loss {means['loss']:.3f}")
                look()
            if record.step == steps:  # whatever asks for an end, it comes now
                continue
            if halt := distributed.agreed(INTERRUPTED if stop else time.monotonic() > deadline):
                record.save()
                message = f"{config.label} stopped at step {record.step} of {steps}; the next call goes on from there"
                raise Stopped(message, interrupted=halt == INTERRUPTED)
            if time.monotonic() - record.saved > checkpoint_every:
                record.save()
            if means:
                told((record.step - resumed) * crops)
        record.finish()
        if distributed.agreed(INTERRUPTED if stop else 0):  # asked for when there was no step left to stop at
            raise Stopped(f"{config.label} is finished; what comes after it was not begun", interrupted=True)


def _batches(config: PretrainConfig, count: int, step: int, device: torch.device) -> Iterator[Tensor]:
    """The places of the images of each step, from `step` on, among `count`: int64 [B]; each epoch has its order.

    Of several processes each has its share of them.
    """
    per_epoch, order = count // config.batch_size, None
    for at in range(step, config.steps(count)):
        epoch, position = divmod(at, per_epoch)
        if order is None or position == 0:
            shuffled = torch.Generator().manual_seed(_seed(config.seed, ORDER, epoch))
            order = torch.randperm(count, generator=shuffled).to(device, non_blocking=True)
        yield distributed.share(order[position * config.batch_size :][: config.batch_size], config.norm_groups)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """While training, SIGINT and SIGTERM only ask for a stop: the list holds those that came."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield came
    except Exception:
        if distributed.launched() > 1:  # their launcher asks all to end when one has, but how must still be said
            before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- what was trained


def load_encoder(run: Run, device: str | torch.device = "cpu") -> nn.Module:
    """The run's encoder in evaluation mode: patches [batch, 3, s, s] in [0, 1] -> h [batch, dim]."""
    return _load(run, "encoder", _encoder).to(device)


def load_projector(run: Run, device: str | torch.device = "cpu") -> nn.Module:
    """The run's projector in evaluation mode: h [batch, dim] -> z [batch, projector_dim]."""
    return _load(run, "projector", _projector).to(device)


def _weights(run: Run) -> dict[str, Tensor]:
    """Of encoder and projector; those of a random network, which no record holds, are drawn again from its seed."""
    if run.has_weights or run.config["training"] != "untrained":
        return run.weights()
    tensors = build_model(PretrainConfig.from_dict(run.config)).state_dict()
    if runs.weights_hash(tensors) != run.metrics["weights_sha256"]:
        raise InputError(f"{run.path}: this torch draws other weights from its seed; set BAGSSL_RECORD to nothing and "
                         "delete the folder to make the run again")  # fmt: skip
    return tensors


def _load(run: Run, network: str, build: Callable[[PretrainConfig], nn.Module]) -> nn.Module:
    values, path = run.config, run.path / "config.json"
    try:
        module = build(PretrainConfig.from_dict(values))
    except InputError as error:
        raise InputError(f"{path}, perhaps of a newer bagssl, is not understood: {error}") from error
    tensors = {name.removeprefix(f"{network}."): tensor for name, tensor in _weights(run).items()
               if name.startswith(f"{network}.")}  # fmt: skip
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{run.path}: its weights are not those of its config.json; delete the folder to train it "
                         "again") from error
    return module.eval()
