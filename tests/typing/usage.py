"""A user's program through the public API. ``mypy --strict`` checks it, and tests/test_typing.py runs it."""

from __future__ import annotations

from pathlib import Path

import torch

import cspd
import cspd_kernels
from cspd.demo.pair import load_pair
from cspd_kernels import DiffusionHead, PhiloxNoise, Schedule


def kernels(head: DiffusionHead) -> torch.Tensor:
    """The ops, one after another."""
    backends: dict[str, str] = cspd_kernels.available_backends()
    assert backends["torch"] == "ok"
    cond = torch.zeros(3, head.cond_channels)
    noise = PhiloxNoise(7, torch.arange(3), head.channels)
    x_T: torch.Tensor = noise.x_T()  # noqa: N806  (the mathematics' name)
    draft = cspd_kernels.denoise(head, cond, x_T, noise, temperature=0.9, cfg_scale=1.0, parallel_tol=None)
    target = cspd_kernels.denoise(head, cond + 0.1, x_T, noise, temperature=0.9, parallel_tol=None)
    assert isinstance(draft, cspd_kernels.Denoised)
    assert isinstance(target, cspd_kernels.Denoised)
    ratio: torch.Tensor = cspd_kernels.log_density_ratio(draft.sample, draft, target, relaxation=2.0)
    verdict = cspd_kernels.accept_reject(draft.sample, draft, target, seed=7, target_sigma=False)
    accepted: torch.Tensor = verdict.accepted
    out: torch.Tensor = cspd_kernels.evaluate(head, draft.sample, 3.0, cond)
    assert out.shape[0] == accepted.shape[0] == ratio.shape[0]
    return verdict.token


def schedules() -> list[Schedule]:
    """Every way to make one."""
    made = [
        Schedule.cosine(10),
        Schedule.linear(10, variance="fixed_small").ddim(0.5),
        Schedule.diffusion([0.1, 0.2, 0.3], prediction="v", clip=(-1.0, 1.0)),
        Schedule.euler([0.0, 0.5, 1.0]),
        Schedule.euler_maruyama([0.0, 0.5, 1.0]),
        Schedule.one_step(0.1),
    ]
    return [*made, made[0].respaced(5), made[0].last(2), made[0].clipped(-1.0, [1.0])]


def by_entropy(window: cspd.Window) -> torch.Tensor:
    """A relaxation policy of one's own."""
    relaxation: torch.Tensor = 1.0 + 41.0 * torch.sigmoid(window.target_log_std.mean(dim=-1))
    return relaxation


def told(progress: cspd.Progress) -> None:
    """A callback."""
    share: float = progress.tokens / progress.total
    acceptance: float | None = progress.recent_acceptance
    assert 0 <= share <= 1
    assert acceptance is None or acceptance >= 0


def images() -> torch.Tensor:
    """Patched, whole and speculative sampling."""
    target, draft = load_pair()
    labels = torch.tensor([3, 7])
    model = cspd.patch(target, dtype="bfloat16")
    assert cspd.is_patched(model)
    for head in cspd.describe(model).heads:
        name: str = head.name
        assert name
        assert head.patched
    cspd.unpatch(model)
    with cspd.patched(target, noise="philox", dtype=torch.float32) as same:
        assert same is target
    whole: cspd.SampleOutput = cspd.sample_tokens(target, 2, num_iter=2, labels=labels, seed=0, callback=told)
    plain: torch.Tensor = whole.images
    runner = cspd.SpecDecodeRunner(
        draft, target, by_entropy, prefill=0.25, dtype="fp32", residual="closed_form", target_sigma=True
    )
    output = runner.run(2, steps=4, gamma=2, labels=labels, generator=torch.Generator().manual_seed(3), callback=told)
    runner.run(2, steps=4, gamma=cspd.AdaptiveDraft(0.8), labels=labels, seed=0, progress=False)
    for policy in (cspd.SimilarityRelaxation(), cspd.ContextRelaxation()):
        cspd.SpecDecodeRunner(draft, target, policy, verify="strict")
    runner.run(2, steps=4, gamma=cspd.EntropyDraft(), labels=labels, seed=0)
    stats: cspd.RunStats | None = output.stats
    assert stats is not None
    calls: int = stats.target_calls
    assert calls == runner.stats.target_calls or calls > 0
    both: torch.Tensor = plain + output
    return both


def errors(folder: Path) -> str:
    """What a caller may catch."""
    try:
        cspd.load_mar(folder / "none.safetensors", device="cpu", dtype="bf16", num_sampling_steps="50")
    except cspd.CheckpointError as error:
        return f"damaged: {error}"
    except (cspd.BackendUnavailable, cspd.InvalidInput, cspd.UnsupportedModel, cspd.WrongDtype) as error:
        return f"not loaded: {error}"
    except FileNotFoundError:
        pass
    try:
        cspd.load_vae(folder / "none.ckpt", dtype="bf16")
    except (FileNotFoundError, cspd.errors.MissingPackage):
        return "missing"
    return "loaded"


def main(folder: Path) -> None:
    """All of it."""
    loss = cspd.models.DiffLoss(4, 6, 2, 8, num_sampling_steps=5)
    token = kernels(DiffusionHead.from_module(loss, dtype="fp32").to("float32"))
    assert token.shape == (3, 4)
    assert all(schedule.num_steps >= 1 for schedule in schedules())
    assert images().shape == (2, 1, 8, 8)
    assert errors(folder) == "missing"
    version: str = cspd.__version__
    assert version == cspd_kernels.__version__


if __name__ == "__main__":
    main(Path(__file__).parent)
