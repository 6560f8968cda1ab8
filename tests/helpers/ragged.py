"""Passes whose rows stand at different places, and their rows by themselves."""

from __future__ import annotations

import torch
from small_models import small_mar

from cspd.order import Plan, by_token, plan_steps, random_orders

IMAGES = torch.tensor([7, 2**40, 3])
BOUNDS = ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2))


def made(num_iter=6, guided=True, schedule="linear") -> Plan:
    taken = plan_steps(16, num_iter, 3.0 if guided else 1.0, schedule)
    orders = random_orders(1, IMAGES, 16)
    return Plan(orders, IMAGES, taken, guided, by_token(taken, orders.device))


def model():
    return small_mar(encoder_depth=2, decoder_depth=2, decoder_embed_dim=48)


def places(plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows at the first step, at the last one and between, of images in no order: none known, and nearly all."""
    return torch.tensor([0, len(plan.steps) - 1, 2, 1, 3, 2]), torch.tensor([2, 0, 1, 1, 0, 2])


def inputs(rows: int, doubled: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 16, 4), (doubled * rows, 32)))


def spoilt(tokens, taken, value):
    """Tokens with something else where nothing is known."""
    return tokens.masked_fill((taken.rank >= taken.count[:, None])[..., None], value)


def alone(plan: Plan, row: int, at, image, span: int):
    """The tables of a row by itself, with its exact known tokens: known, rank, where; and the columns of where."""
    starts = [16 - step.before for step in plan.steps] + [16] * 17
    first, stop, i = starts[at[row]], starts[min(int(at[row]) + span, len(plan.steps))], image[row : row + 1]
    return plan.drawing[i, :first], plan.rank[i], plan.drawing[i, first:stop], torch.arange(first, stop)
