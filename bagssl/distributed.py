"""The processes ("ranks") of one training or evaluation: who they are, what they tell each other, and which one writes.

    torchrun --nproc-per-node 2 -m bagssl.cli pretrain ...

Each takes its share of every batch; projections are gathered, so that an objective sees all of them; batch-norm takes
its statistics over all; DistributedDataParallel averages the gradients. The first alone holds the run and writes it.
To be measured, images are embedded in turns, and go to the first.
The others wait for it by asking torchrun's key-value store, as long as that takes; once they train, what one waits for
comes within $BAGSSL_TIMEOUT seconds (300), or all end. In a process that is alone nothing here does anything.
"""

import atexit
import contextlib
import functools
import io
import itertools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from bagssl import errors
from bagssl.errors import InputError, Lost, OneLine
from bagssl.paths import cores
from bagssl.ranks import launched, rank

T = TypeVar("T")
_TRANSPORT = r"gloo|NCCL|[Cc]onnection|[Bb]roken pipe|[Tt]imed out|[Tt]imeout|recvValue|sendBytes"  # who is not there
_turns = itertools.count()  # parts of the store that this process has asked for
_held: list[object] = []  # the last group


def ranks() -> int:
    """How many train together now: 1 outside of a `group`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own(device: torch.device) -> torch.device:
    """The device of this process: of several GPUs, each takes one. Raises InputError when there are too few."""
    if launched() == 1 or device.type != "cuda":
        return device
    here, count = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if here >= count:
        raise InputError(f"{count} GPU{'s' * (count != 1)} for {here + 1} processes or more: start one for each")
    torch.cuda.set_device(here)
    return torch.device("cuda", here)


def timeout() -> float:
    """The seconds of $BAGSSL_TIMEOUT. Raises InputError for what is no number above 0."""
    named = os.environ.get("BAGSSL_TIMEOUT") or "300"
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(named)) < 1e9:
            return seconds
    raise InputError(f"BAGSSL_TIMEOUT = {named!r} is not a number of seconds")


def launch(processes: int, words: Sequence[str]) -> int:
    """`bagssl WORDS` in so many processes of this machine, as torchrun starts them, which ends with a code of its own:
    here it is that of the first process that failed, or 130 after Ctrl-C.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # the processes say themselves what it is
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    try:
        run.main(["--standalone", f"--nproc-per-node={processes}", "-m", "bagssl.cli", *words])
    except SignalException:
        return 130
    except ChildFailedError as error:
        return max(error.get_first_failure()[1].exitcode, 1)
    return 0


# ---- who leads, and how all end


@functools.cache
def _root() -> dist.Store:
    return next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout())))[0]


def _store() -> dist.Store:
    """A part of it that all processes ask for at the same turn."""
    return dist.PrefixStore(f"bagssl/{next(_turns)}", _root())


@contextlib.contextmanager
def led(claim: AbstractContextManager[T], work: str = "training; the next call goes on from the last checkpoint"
        ) -> Iterator[T]:  # fmt: skip
    """Around some work: the first process enters `claim`, all get what it gives (as JSON has it: lists, numbers,
    text), none leaves before the first has.

    What ends one with a line ends all with that line; one that is gone, or hangs, ends the others with Lost, which
    says of what work, and what comes next.
    """
    if launched() == 1:
        with claim as found:
            yield found
        return
    store = _store()
    with _one_end(store, work):
        if rank():
            yield _told(store, "claimed")
            _told(store, "left")
            return
        with claim as found:
            store.set("claimed", json.dumps(found))
            yield found
        store.set("left", "null")


def _told(store: dist.Store, key: str) -> Any:
    """What the first process says; it may be waiting for a lock, so there is no limit but a launcher's patience."""
    while not store.check([key]):
        if store.check(["end"]):
            raise _read(store.get("end"))
        time.sleep(0.1)
    return json.loads(store.get(key))


@contextlib.contextmanager
def _one_end(store: dist.Store, work: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        gone = isinstance(error, RuntimeError) and re.search(_TRANSPORT, str(error))
        if isinstance(error, OneLine) or not gone:
            store.set("end", _written(error if isinstance(error, OneLine) else _lost("has failed", work)))
            raise
        late = re.search("[Tt]ime", str(error))
        said = _lost(f"has not answered for {timeout():g} s (BAGSSL_TIMEOUT)" if late else "has ended", work)
        with contextlib.suppress(RuntimeError):  # the store may be gone as well
            said = _read(store.compare_set("end", "", _written(said)))
        raise said from None


def _written(error: OneLine) -> str:
    return json.dumps({"kind": type(error).__name__, "said": str(error), **vars(error)})


def _read(written: bytes) -> OneLine:
    values = json.loads(written)
    return getattr(errors, values.pop("kind"))(values.pop("said"), **values)


def _lost(how: str, work: str) -> Lost:
    name, _, then = work.partition("; ")
    return Lost(f"another process of this {name} {how}; {then}")


def speaks() -> bool:
    """Whether this process is the one to print how all ended: the first that asks."""
    if launched() == 1:
        return True
    try:
        return _root().add("bagssl/said", 1) == 1
    except (RuntimeError, InputError):
        return rank() == 0


def leave(code: int) -> NoReturn:
    """End this process as `sys.exit` does, but for the interpreter's taking apart, which one of several is not to
    begin: gloo's threads may come to need it then, and would abort a process whose work is done.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # who read it may be gone
            stream.flush()
    os._exit(code)


# ---- training together


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[None]:
    """All processes as one group, within `led`: gloo between the CPUs, and NCCL between GPUs."""
    if launched() == 1:
        yield
        return
    backend, store = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", _store()
    limit = timedelta(seconds=timeout())
    dist.init_process_group(backend, store=store, rank=rank(), world_size=launched(), timeout=limit)
    # An error's traceback holds the model, and this the group: were it the last to hold it, the group's threads would
    # be waited for under the interpreter's lock, which one of them may wait for.
    _held[:] = [dist.group.WORLD]
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(batch: Tensor, groups: int = 1) -> Tensor:
    """This process's part of a batch [B, ...]: of each of `groups` equal parts of it, an equal slice."""
    return batch if ranks() == 1 else batch.unflatten(0, (groups, ranks(), -1))[:, dist.get_rank()].flatten(0, 1)


def gather(z: Tensor, groups: int = 1) -> Tensor:
    """What all have of a batch, each its `share`: [views, B / ranks, dim] -> [views, B, dim], in the batch's order.

    The gradient reaches one's own z, times the number of processes: the mean that DistributedDataParallel takes of the
    parameters' gradients is then that of one process, exactly. (torch.distributed.nn.functional.all_gather is silently
    wrong under gloo: pytorch issue 192920.)
    """
    if ranks() == 1:
        return z
    parts = [torch.empty_like(z, memory_format=torch.contiguous_format) for _ in range(ranks())]
    dist.all_gather(parts, z.detach().contiguous())
    parts[dist.get_rank()] = _Weighted.apply(z)
    return torch.stack([part.unflatten(1, (groups, -1)) for part in parts], 2).flatten(1, 3)


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ranks()


def parallel(model: nn.Module) -> nn.Module:
    """`model`, to be called so that its gradients become the mean over all processes."""
    # batch-norm's statistics are synchronised, hence its buffers equal: none need be sent
    return model if ranks() == 1 else DistributedDataParallel(model, broadcast_buffers=False)


def agreed(reason: int) -> int:
    """The highest of what the processes say; each waits for all, on the CPU."""
    if ranks() == 1:
        return reason
    highest = torch.tensor([int(reason)])
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return int(highest)


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes: tensors, numbers, text, in lists and mappings; of several processes, on the CPU."""
    if ranks() == 1:
        return make()
    content = io.BytesIO()
    if rank() == 0:
        torch.save(make(), content)
    count = torch.tensor([content.tell()])
    dist.broadcast(count, 0)
    whole = torch.empty(int(count), dtype=torch.uint8)
    if rank() == 0:
        whole[:] = torch.frombuffer(content.getbuffer(), dtype=torch.uint8)
    dist.broadcast(whole, 0)
    return torch.load(io.BytesIO(whole.numpy()), map_location="cpu", weights_only=True)


# ---- measuring together


def turns(count: int, step: int) -> Iterator[tuple[slice, slice]]:
    """Of so many images, `step` at a time: those of this process, and all that the processes take at the same turn.

    The steps are those of one process. Who would have none at the last turn takes the last images as well, for nothing.
    """
    for first in range(0, count, step * ranks()):
        own = min(first + step * rank(), (count - 1) // step * step) if ranks() > 1 else first
        yield slice(own, min(own + step, count)), slice(first, min(first + step * ranks(), count))


def to_first(x: Tensor, step: int) -> Tensor | None:
    """What all have made at one of their `turns`, [images of the turn, dim]: on the first's CPU, elsewhere None."""
    if ranks() == 1:
        return x
    x = F.pad(x.cpu(), (0, 0, 0, step - len(x)))
    parts = None if rank() else [torch.empty_like(x) for _ in range(ranks())]
    dist.gather(x, parts)
    return None if parts is None else torch.cat(parts)


# ---- batch-norm over all


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with batch-norm statistics over the images of all processes; names and tensors stay as they are."""
    if ranks() > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules() if ranks() > 1 else ():
        if isinstance(module, _BatchNorm):
            module.__class__ = _Synchronised
    return model


class _Synchronised(_BatchNorm):
    """Batch-norm over all processes, which torch's own does on GPUs alone; all have equally many values."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        wide, shape = x if x.dtype == torch.float64 else x.float(), (1, -1, *[1] * (x.ndim - 2))
        moments = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
        variance, mean = (each.double() for each in moments)  # so that a difference of squares loses nothing
        mean, square = _Mean.apply(torch.stack([mean, variance + mean.square()]))
        variance = square - mean.square()
        if self.track_running_stats:
            count = x.numel() // x.shape[1] * ranks()
            self.num_batches_tracked += 1
            for kept, new in ((self.running_mean, mean), (self.running_var, variance * (count / (count - 1)))):
                kept.lerp_(new.detach().to(kept.dtype), self.momentum)
        scale = (variance + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        shift = (0 if self.bias is None else self.bias) - mean * scale
        scale, shift = (each.to(wide.dtype).view(shape) for each in (scale, shift))
        return torch.addcmul(shift, wide, scale).to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class _Mean(torch.autograd.Function):
    """The mean over all processes; its gradient is the mean of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total / ranks()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Mean.forward(ctx, gradient.contiguous())
