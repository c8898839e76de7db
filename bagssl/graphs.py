"""A step of training as one CUDA graph."""

import warnings
from typing import Any

import torch
from torch import Tensor

from bagssl.errors import InputError
from bagssl.objectives import Terms


class Replayed:
    """`Learner.step` as one CUDA graph: a thousand launches by the CPU become one.

    The first steps run as they are, on a stream of their own, as capturing asks for; the next is captured, without
    being executed, and from then on replayed. The generator's seed counts at each replay.
    """

    EAGER = 3

    def __init__(self, learner: Any):
        self.learner, self.stream, self.graph, self.calls = learner, torch.cuda.Stream(), None, 0
        self.pixels: Tensor | None = None  # where the graph reads them
        self.rate, self.momentum = torch.empty(2, device=learner.device).unbind()

    def __call__(self, pixels: Tensor, rate: float, momentum: float) -> Terms:
        self.pixels = torch.empty_like(pixels) if self.pixels is None else self.pixels
        self.pixels.copy_(pixels), self.rate.fill_(rate), self.momentum.fill_(momentum)
        self.calls += 1
        if self.calls <= self.EAGER:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream), warnings.catch_warnings(action="ignore"):  # that it is not captured
                terms = self.learner.step(self.pixels, self.rate, self.momentum)
            torch.cuda.current_stream().wait_stream(self.stream)
            return terms
        if self.graph is None:
            self._capture()
        self.graph.replay()
        return self.terms

    def _capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.learner.generator)
        try:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.terms = self.learner.step(self.pixels, self.rate, self.momentum)
        except RuntimeError as error:  # an objective that waits for the device, perhaps
            raise InputError(f"the step cannot be captured as a CUDA graph ({str(error).splitlines()[0]}): "
                             "set BAGSSL_COMPILE=none") from error
