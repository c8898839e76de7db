"""LARS against lightly's."""

import pytest
import torch
from lightly.utils.lars import LARS as Lightlys

from bagssl.optimisers import LARS


def trajectory(optimiser, trust, steps=5, **how):
    """Three tensors, one of them zero and one without a gradient's norm, led along the same gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,), (2, 2)]
    params = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    with torch.no_grad():
        params[1].zero_()
    unused = torch.ones(3, dtype=torch.float64, requires_grad=True)
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": [params[2], unused], "weight_decay": 0.0}]
    made = optimiser(groups, lr=0.3, **trust, **how)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        params[0].grad *= int(torch.rand((), generator=generator) < 0.7)
        made.step()
    return [p.detach() for p in (*params, unused)]


@pytest.mark.parametrize("how", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_steps_are_those_of_lightlys_lars(how):
    ours, theirs = trajectory(LARS, {"trust": 0.02}, **how), trajectory(Lightlys, {"trust_coefficient": 0.02}, **how)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)
    other = trajectory(LARS, {"trust": 0.03}, **how)  # negative control
    assert not torch.allclose(other[0], theirs[0])


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    p = torch.ones(3, requires_grad=True)
    optimiser = LARS([p], lr=0.1)

    def closure():
        optimiser.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimiser.step(closure).item() == 3 and torch.allclose(p, torch.full((3,), 0.8))


@pytest.mark.parametrize("lr", [0.3, 0.001, 0.0])
def test_clipped_a_tensors_rate_is_the_smaller_of_the_two(lr):
    """Against You et al.'s rate and the learning rate, tensor by tensor; the last tensor is not rescaled."""
    generator = torch.Generator().manual_seed(0)
    params, grads = ([torch.randn(4, 3, generator=generator, dtype=torch.float64) * size for size in (1, 30, 1)]
                     for _ in "ab")  # fmt: skip
    params[0] = params[0] * 0.1
    ours = [p.clone().requires_grad_() for p in params]
    for p, g in zip(ours, grads, strict=True):
        p.grad = g.clone()
    LARS([{"params": ours[:2], "weight_decay": 0.1}, {"params": ours[2:]}], lr, trust=0.02, clip=True).step()
    decays, taken = (0.1, 0.1, 0.0), []
    for p, g, decay, mine in zip(params, grads, decays, ours, strict=True):
        own = 0.02 * p.norm() / (g.norm() + decay * p.norm()) if decay else torch.tensor(1.0)
        taken.append(bool(own < lr))
        torch.testing.assert_close(mine.detach(), p - min(own, lr) * (g + decay * p), rtol=1e-7, atol=1e-9)
    assert any(taken[:2]) == (lr == 0.3)  # there the tensor's own rate decides, elsewhere lr does


def test_it_goes_on_where_its_state_was_kept():
    def run(interrupted):
        generator = torch.Generator().manual_seed(1)
        p = torch.ones(6, requires_grad=True)
        optimiser = LARS([p], 0.1, momentum=0.9, weight_decay=0.1)
        for step in range(6):
            if interrupted and step == 3:
                state, optimiser = optimiser.state_dict(), LARS([p], 0.1, momentum=0.9, weight_decay=0.1)
                optimiser.load_state_dict(state)
            p.grad = torch.randn(6, generator=generator)
            optimiser.step()
        return p.detach()

    assert torch.equal(run(True), run(False))
