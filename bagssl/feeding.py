"""The batches of a training, brought to its device: from a dataset that lies there, or while the step before runs.

Pixels that fit the device are put there once, and a batch is a gather. Those that do not stay where they are, in memory
or in shards on a disk: a thread gathers the next batch into one of two buffers, from which it is copied while the
device works. Either way the same batches come, to the bit.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from bagssl.data import Pixels, Shards, gather
from bagssl.progress import notice

SHARE = 0.5  # of a GPU's free memory that pixels may take: networks and patches need the rest
_told: set[str] = set()

Places = Callable[[torch.device], Iterator[Tensor]]  # of the images of each batch, int64 [B], on the device asked for


def fits(pixels: Pixels, device: torch.device) -> bool:
    """Whether pixels are to lie on the device: on a GPU if it has room for them, on a CPU if they are no shards."""
    if device.type == "cuda" and pixels.device.type != "cuda":
        return pixels.nbytes <= SHARE * torch.cuda.mem_get_info(device)[0]
    return isinstance(pixels, Tensor)


@contextlib.contextmanager
def feed(pixels: Pixels, places: Places, device: torch.device) -> Iterator[Iterator[Tensor]]:
    """Yields the batches, uint8 [B, 3, H, W] on the device; each is there until the next is asked for.

    An error of the gathering thread is raised where its batch is asked for. That a dataset is fed is said, once.
    """
    if fits(pixels, device):
        held = pixels.to(device)
        yield (gather(held, batch) for batch in places(device))
        return
    where = "on disk" if isinstance(pixels, Shards) else "in memory"
    said = f"{len(pixels):,} images, {pixels.nbytes / 1e9:,.1f} GB: they stay {where}, and are fed while it trains"
    with _once(said), contextlib.closing(_fed(pixels, places(torch.device("cpu")), device)) as batches:
        yield batches


def _once(text: str) -> contextlib.AbstractContextManager:
    if text in _told:
        return contextlib.nullcontext()
    _told.add(text)
    return notice(text)


def _fed(pixels: Pixels, places: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The batches, each gathered while the one before is worked on."""
    cuda = device.type == "cuda"
    buffers: list[Tensor | None] = [None, None]
    copied = [torch.cuda.Event() for _ in buffers] if cuda else []

    def fill(turn: int, batch: Tensor) -> Tensor:
        if buffers[turn] is None:
            buffers[turn] = torch.empty(len(batch), *pixels.shape[1:], dtype=torch.uint8, pin_memory=cuda)
        elif cuda:
            copied[turn].synchronize()  # what stood there is on the device
        return gather(pixels, batch, buffers[turn])

    def deliver(turn: int, gathered: Tensor) -> Tensor:
        batch = gathered.to(device, non_blocking=True)
        if cuda:
            copied[turn].record()
        return batch

    with ThreadPoolExecutor(1, "feed") as thread:
        ahead = None
        for turn, batch in zip(itertools.cycle((0, 1)), places):
            ahead, before = (turn, thread.submit(fill, turn, batch)), ahead
            if before:
                yield deliver(before[0], before[1].result())
        if ahead:
            yield deliver(ahead[0], ahead[1].result())
