"""The state of a speculative run before its first step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .checks import check_run
from .order import Plan, by_token, plan_steps, random_orders, to_device
from .run_state import RunState
from .stats import PREFILLED
from .whole.noise import PhiloxSource

if TYPE_CHECKING:
    from .model_pair import ModelPair
    from .speculative import SpecDecodeRunner


def begin_run(
    runner: SpecDecodeRunner,
    pair: ModelPair,
    bsz: int,
    steps: int,
    cfg_schedule: str,
    labels: torch.Tensor | None,
    temperature: float,
    cfg: float,
    seed: int | None,
    first_image: int,
    orders: torch.Tensor | None,
) -> RunState:
    """See :meth:`cspd.SpecDecodeRunner.begin`. What may wait for the device, and what comes from the host, is done
    here: before the first kernel.
    """
    draft, target = runner.draft_model, runner.target_model
    check_run(draft, target, bsz, labels, temperature, cfg, seed, first_image, orders)
    planned = plan_steps(runner.seq_len, steps, cfg, cfg_schedule)
    device, guided = target.fake_latent.device, bool(cfg != 1.0)
    seed = int(torch.randint(2**63 - 1, (), device="cpu")) if seed is None else seed
    transformers = pair.transformers(runner.dtype)
    labels = None if labels is None else to_device(labels, device)
    relaxation = runner.relaxation
    if isinstance(relaxation, torch.Tensor):
        relaxation = to_device(relaxation.float(), device)
    tables = by_token(planned, device)
    orders = None if orders is None else to_device(orders, device)
    heads = pair.heads(runner.dtype, planned, steps)
    images = torch.arange(first_image, first_image + bsz, device=device)
    orders = random_orders(seed, images, runner.seq_len) if orders is None else orders
    plan = Plan(orders, images, planned, guided, tables)
    models = pair.of_run(heads[0], transformers, bsz, labels, guided)
    annealed = tuple({role: replace(models[role], head=head) for role, head in each.items()} for each in heads)
    # Of how many chains a token has noise, and of how many last steps beside them.
    chains = (runner.num_candidates, 0) if runner.criterion == "trajectory" else (1, runner.num_candidates)
    state = RunState(
        tokens=torch.zeros(bsz, runner.seq_len, runner.token_embed_dim, dtype=torch.float32, device=device),
        outcome=torch.full(orders.shape, PREFILLED, dtype=torch.int8, device=device),
        probability=torch.ones(orders.shape, dtype=torch.float32, device=device),
        plan=plan,
        prefilled=sum(step.index < runner.prefill * steps - 1e-9 for step in planned),
        **models,
        noise=PhiloxSource(seed, plan.rows, runner.token_embed_dim, *chains),
        temperature=float(temperature),
        relaxation=relaxation,
        backend=runner.backend,
        parallel_tol=runner.parallel_tol,
        rule={name: getattr(runner, name) for name in ("sigma", "max_tries", "residual", "target_sigma")},
        candidates=runner.num_candidates,
        criterion=runner.criterion,
        annealed=annealed if runner.sampling.anneals else (),
    )
    if runner.verify == "strict":
        state.at = torch.full((bsz,), state.prefilled, dtype=torch.int64, device=device)
    else:
        state.make_room()
    return state
