"""Memory for time: activations that a step does not keep, but computes again when their gradients are due.

Chen et al. 2016. Of what is computed again block by block, the block's input is kept; of a whole group of a batch
(`norm_groups`), its patches. The latter is gradient accumulation, and exact for objectives that look at the whole
batch, as GradCache is (Gao et al. 2021): all projections come first, then each group's gradients by its own.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute_blocks(encoder: nn.Module) -> None:
    """Let each residual block of the stages (the children that are sequences) be computed again."""
    for stage in encoder.children():
        for block in stage if isinstance(stage, nn.Sequential) else ():
            block.forward = recomputed(block.forward, block)


def recomputed(forward: Callable[[Tensor], Tensor], module: nn.Module) -> Callable[[Tensor], Tensor]:
    """`forward`, part of what `module` does and without random numbers, with its activations computed again."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm)]

    def call(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(x)
        return checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False,
                          context_fn=lambda: (contextlib.nullcontext(), _counted(norms)))  # fmt: skip

    return call


@contextlib.contextmanager
def _counted(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Batch-norms whose running statistics stay as they are: these patches are in them already."""
    before = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, before, strict=True):
        norm._buffers.update({name: None if value is None else value.clone() for name, value in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            norm._buffers.update(buffers)
