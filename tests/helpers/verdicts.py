"""Verdicts beside their definition in float64, and the inputs they are compared on."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import NamedTuple

import torch

from cspd_kernels import Denoised, accept_reject, log_density_ratio
from cspd_kernels.noise import STREAM_PROPOSAL, normals, uniforms
from cspd_kernels.ops.accept_reject import Verdict
from cspd_kernels.ops.accept_reject.reference import FARTHEST, closed_form
from cspd_kernels.testing import random_chains

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
CHANNELS = [1, 3, 5, 16, 17, 64, 100, 255, 256]
ROUNDING = 2e-6  # of a comparison, in proportion to what is added up on its way
NORMAL = 4e-6  # by how much two backends' normals may differ


def take(chain, part) -> Denoised:
    return Denoised(*(v[part] for v in chain))


def cast(chain, to) -> Denoised:
    """The chain with every field of a type, or on a device."""
    return Denoised(*(v.to(to) for v in chain))


def judged_chains(rows, channels, seed, same_sigma=False):
    """(x, draft, target) of which about half the tokens are accepted, whatever the number of channels."""
    x, draft, target = random_chains(rows, channels, seed, shift=1.3 * channels**-0.5, scale=0.2 * channels**-0.5)
    return x, draft, target._replace(log_std=draft.log_std.clone()) if same_sigma else target


def equal(a, b, what="") -> None:
    """Two verdicts agree bit by bit."""
    for name, u, v in zip(Verdict._fields, a, b, strict=True):
        assert torch.equal(u.cpu(), v.cpu()), f"{name} {what}"


# --- the definition in float64 ---


def ratio_and_scale(x, draft, target, relaxation=1.0, sigma="paper"):
    """(log ratio, sum of the magnitudes of what is added up), float64 (N,) of float32 operands.

    The scale is that of the terms as the definition forms them from small differences: where the models are close
    it is thousands of times below that of the densities.
    """
    x, mu_q, mu_p, log_q, log_p, path_q, path_p = (
        v.float().double()
        for v in (x, draft.mean, target.mean, draft.log_std, target.log_std, draft.path_log_std, target.path_log_std)
    )
    width = relaxation.float().double()[:, None] if isinstance(relaxation, torch.Tensor) else relaxation
    log_scale = log_p - log_q
    a, b = (x - mu_p) * torch.exp(-log_p), (x - mu_q) * torch.exp(-log_q)
    shift, stretch = (mu_p - mu_q) * torch.exp(-log_q), a * torch.expm1(log_scale)
    close = log_scale.abs() < 0.5
    difference = torch.where(close, shift + stretch, b - a)
    span = torch.where(close, shift.abs() + stretch.abs(), a.abs() + b.abs())
    path = path_q - path_p if sigma == "paper" else path_p - path_q
    ratio = (0.5 * (difference / width) * ((a + b) / width) - log_scale).sum(dim=1) + path
    scale = (0.5 * (span / width) * ((a.abs() + b.abs()) / width) + log_scale.abs()).sum(dim=1) + path.abs()
    return torch.where(ratio.isnan(), -torch.inf, ratio), scale


def assert_ratio(actual, x, draft, target, relaxation=1.0, sigma="paper") -> None:
    """Within 1e-5 of the terms' magnitudes; infinite where float32 ends."""
    expected, scale = (v.cpu() for v in ratio_and_scale(x, draft, target, relaxation, sigma))
    actual = actual.cpu()
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    ends = ~(scale < 1e38)  # includes what cannot be judged
    assert ((actual - expected).abs() <= 1e-5 * scale)[~ends].all()
    assert (actual[ends & (expected == -torch.inf)] == -torch.inf).all()


class Expected(NamedTuple):
    verdict: Verdict
    sure: torch.Tensor  # (N,) bool: no decision on the way to this outcome lies within rounding
    tolerance: torch.Tensor  # (N, C) of the token


def expected_verdict(
    x, draft, target, seed, rows, relaxation=1.0, sigma="paper", max_tries=100, residual="rejection"
) -> Expected:  # fmt: skip
    """The definition in float64 on the CPU, try by try, with the decisions that rounding may turn."""
    x, rows, draft, target = x.cpu().float(), rows.cpu(), cast(cast(draft, "cpu"), torch.float32), cast(
        cast(target, "cpu"), torch.float32
    )  # fmt: skip
    relaxation = relaxation.cpu() if isinstance(relaxation, torch.Tensor) else relaxation
    ratio, scale = ratio_and_scale(x, draft, target, relaxation, sigma)
    log_u = uniforms(seed, rows, 0).double().log()
    accepted = log_u <= ratio
    sure = ~((ratio - log_u).abs() <= ROUNDING * (1 + scale + log_u.abs()))
    token = torch.where(accepted[:, None], x, target.sample).double()
    tries = torch.where(accepted, 0, -1).to(torch.int32)
    tolerance = torch.zeros_like(token)
    redraw(token, tries, sure, tolerance, draft, target, seed, rows, sigma, max_tries, residual)
    return Expected(Verdict(token.float(), accepted, tries, ratio.float()), sure, tolerance)


def redraw(
    token, tries, sure, tolerance, draft, target, seed, rows, sigma, max_tries, residual, log_c=None
) -> None:  # fmt: skip
    """The undecided rows (``tries`` -1) of float64 tokens, in place; log_c (N,) of rejected candidates."""
    log_c = torch.zeros(len(token), dtype=torch.float64) if log_c is None else log_c
    for k in range(1, (min(max_tries, 1) if residual == "closed_form" else max_tries) + 1):
        part = (tries == -1).nonzero()[:, 0]
        if not len(part):
            break
        one = (take(draft, part), take(target, part), seed, rows[part])
        again = _draw if residual == "closed_form" else _try
        proposal, kept, doubtful, slack = again(*one, sigma, k, log_c[part])
        sure[part] &= ~doubtful
        done = part[kept]
        token[done], tries[done], tolerance[done] = proposal[kept], k, slack[kept]


def _try(draft, target, seed, rows, sigma, k, log_c):
    n = normals(seed, rows, k, target.mean.shape[1], STREAM_PROPOSAL).double()
    std_q, std_p = (chain.log_std.double().exp() for chain in (draft, target))
    y = target.mean.double() + std_p * n
    ratio, scale = _ratio_of_proposals(y, draft, target, sigma)
    ratio = ratio - log_c
    u, kept_with = uniforms(seed, rows, k).double(), -torch.expm1(-ratio)
    slack = NORMAL * std_p + 3e-7 * y.abs()
    residues = ((y - target.mean) / std_p).abs() / std_p + ((y - draft.mean) / std_q).abs() / std_q
    error = ROUNDING * (1 + scale) + (slack * residues).sum(dim=1)
    doubtful = (u - kept_with).abs() <= 1e-6 + torch.exp(-ratio).clamp(max=2) * error
    return y, u <= kept_with, doubtful, slack


def _ratio_of_proposals(y, draft, target, sigma):
    double = [cast(chain, torch.float64) for chain in (draft, target)]
    a, b = ((y - c.mean) * torch.exp(-c.log_std) for c in reversed(double))
    path = double[0].path_log_std - double[1].path_log_std
    log_scale = double[1].log_std - double[0].log_std
    ratio = (0.5 * (b - a) * (b + a) - log_scale).sum(dim=1) + (path if sigma == "paper" else -path)
    scale = (0.5 * (b - a).abs() * (a.abs() + b.abs()) + log_scale.abs()).sum(dim=1) + path.abs()
    return torch.where(ratio.isnan(), -torch.inf, ratio), scale


def _draw(draft, target, seed, rows, sigma, k, log_c):
    y, exists = closed_form(draft, target, seed, rows, sigma, log_c)
    std = target.log_std.double().exp()
    distance, t_0 = distance_and_start(draft, target, sigma)
    t_0 = t_0 + log_c / distance
    size = distance / 2 + (t_0 + distance / 2).abs()  # t_0 is a difference of two of about this size
    doubtful = (t_0 - FARTHEST).abs() <= 1e-6 * (1 + size)
    slack = (1e-5 + 1e-6 * size)[:, None] * std + 3e-7 * y.double().abs()
    return y.double(), exists, doubtful, slack


def distance_and_start(draft, target, sigma="paper"):
    """(D, t_0) of the closed form, float64 (N,)."""
    mean_q, mean_p, log_p = (v.double() for v in (draft.mean, target.mean, target.log_std))
    distance = ((mean_p - mean_q) * torch.exp(-log_p)).square().sum(dim=1).sqrt()
    path = (draft.path_log_std.double() - target.path_log_std.double()) * (1 if sigma == "paper" else -1)
    return distance, -distance / 2 - path / distance


def assert_verdict(actual, x, draft, target, *, seed, rows, unsure=0.02, **options) -> Expected:
    """Token by token the definition in float64, but for at most a share of rows with a decision within rounding."""
    expected, sure, tolerance = expected_verdict(x, draft, target, seed, rows, **options)
    token, accepted, tries, log_ratio = (v.cpu() for v in actual)
    assert [v.dtype for v in actual] == [torch.float32, torch.bool, torch.int32, torch.float32]
    assert (~sure).sum() <= unsure * len(sure) + 1
    assert torch.equal(accepted[sure], expected.accepted[sure])
    assert torch.equal(tries[sure], expected.tries[sure])
    assert torch.equal(accepted, tries == 0)
    assert not token.isnan().any()
    assert ((token - expected.token).abs() <= tolerance)[sure].all()
    assert torch.equal(token[accepted], x.cpu().float()[accepted])
    assert torch.equal(token[tries == -1], target.sample.cpu().float()[tries == -1])
    few = {name: options[name] for name in ("relaxation", "sigma") if name in options}
    assert_ratio(log_ratio, x, draft, target, **few)
    return Expected(expected, sure, tolerance)


def check_ratio(backend, x, draft, target, **options):
    """A backend's ratios, compared with the definition."""
    actual = log_density_ratio(x, draft, target, backend=backend, **options)
    assert_ratio(actual, x, draft, target, **options)
    return actual


def check_verdict(backend, x, draft, target, *, seed=0, rows=None, unsure=0.02, **options):
    """A backend's verdict, compared with the definition."""
    actual = accept_reject(x, draft, target, seed=seed, rows=rows, backend=backend, **options)
    options.pop("target_sigma", None)
    rows = torch.arange(len(x)) if rows is None else rows
    assert_verdict(actual, x, draft, target, seed=seed, rows=rows, unsure=unsure, **options)
    return actual


def some_of_each(verdict, tries, count=1) -> torch.Tensor:
    """Numbers of ``count`` rows of each outcome, which must exist."""
    rows = [(verdict.tries.cpu() == k).nonzero()[:count, 0] for k in tries]
    assert all(len(r) == count for r in rows), dict(zip(tries, map(len, rows)))
    return torch.cat(rows)


def on(device, x, draft, target, rows=None):
    moved = x.to(device), cast(draft, device), cast(target, device)
    return moved if rows is None else (*moved, rows.to(device))


def chosen(device, channels, seed, outcomes, residual, count=1, max_tries=40, many=False, **options):
    """(x, draft, target, rows) of rows with certain outcomes, found with the torch backend, and shuffled.

    With ``many`` the models are close and tokens far, so that a redraw takes some thirty tries.
    """
    x, draft, target = judged_chains(3000, channels, seed, residual == "closed_form")
    if many:
        x, draft, target = random_chains(3000, channels, seed, shift=0.1 * channels**-0.5, scale=0.0)
        draft = draft._replace(path_log_std=target.path_log_std)
        x[5:] += 100 * (draft.mean - target.mean)[5:]
    verdict = accept_reject(x, draft, target, seed=0, residual=residual, max_tries=max_tries, **options)
    rows = some_of_each(verdict, outcomes, count)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    return on(device, x[rows], take(draft, rows), take(target, rows), rows)


# --- layouts ---


def _spread(v, *steps):
    """The same values with gaps of garbage between them."""
    big = v.new_full([n * step + 1 for n, step in zip(v.shape, steps, strict=True)], float("nan"))
    view = big[tuple(slice(1, 1 + n * step, step) for n, step in zip(v.shape, steps, strict=True))]
    return view.copy_(v)


LAYOUTS = {  # of a tensor (N, C)
    "transposed": lambda v: v.t().contiguous().t(),
    "every second row": lambda v: _spread(v, 2, 1),
    "every third channel": lambda v: _spread(v, 1, 3),
    "both": lambda v: _spread(v, 3, 2),
    "transposed with gaps": lambda v: _spread(v.t(), 2, 3).t(),
    "one row": lambda v: v[:1].expand_as(v),
    "one channel": lambda v: v[:, :1].expand_as(v),
    "unaligned": lambda v: v.new_full((v.numel() + 1,), float("nan"))[1:].view_as(v).copy_(v),
}
LINES = {  # of a tensor (N,)
    "every third": lambda v: _spread(v, 3) if v.is_floating_point() else torch.stack([v, -v, ~v], 1)[:, 0],
    "one": lambda v: v[:1].expand_as(v),
    "unaligned": lambda v: torch.cat([v[:1], v])[1:],
}


def laid_out(x, draft, target, matrix, line=None):
    """The operands, each through a layout; ``line`` for the path terms."""
    line = line or (lambda v: v)
    chains = (Denoised(*map(matrix, c[:3]), line(c.path_log_std)) for c in (draft, target))
    return matrix(x), *chains


def laid_out_there(v, layout, device):
    """A tensor on the device with the strides, and the gaps, that a layout gives it here."""
    here = layout(v)
    size = max(1, here.untyped_storage().nbytes() // here.element_size())
    whole = torch.empty(size, dtype=v.dtype, device=device)
    whole.copy_(torch.empty(0, dtype=v.dtype).set_(here.untyped_storage(), 0, (size,), (1,)))
    return whole.as_strided(here.size(), here.stride(), here.storage_offset())


# --- what a backend does beside computing ---


def guarded_outputs(monkeypatch, module, fill) -> list[torch.Tensor]:
    """Give the backend's outputs garbage to begin with, and walls; returns the memory, walls included."""
    walls, memory = 64, []

    def empty(*shape, dtype, device):
        whole = torch.empty(torch.Size(shape).numel() + 2 * walls, dtype=dtype, device=device)
        whole.fill_({torch.float32: float("nan"), torch.int32: 77777 + fill, torch.bool: bool(fill)}[dtype])
        memory.append(whole)
        return whole[walls:-walls].view(shape)

    changed = {name: getattr(torch, name) for name in ("float32", "bool", "int32", "Tensor", "device", "cuda")}
    monkeypatch.setattr(module, "torch", SimpleNamespace(**changed, empty=empty))
    return memory


def assert_walls_stand(memory, fill) -> None:
    for whole in memory:
        for wall in (whole[:64], whole[-64:]):
            if whole.dtype == torch.float32:
                assert wall.isnan().all()
            else:
                assert (wall == (bool(fill) if whole.dtype == torch.bool else 77777 + fill)).all()


def module_of(backend, op):
    """What serves an op."""
    return importlib.import_module(f"cspd_kernels.ops.{op.removeprefix('log_')}.{backend}")


def count_launches(monkeypatch, backend, op, run=True) -> list:
    """A list that grows by one for every launch of an op's kernel, which runs or not."""
    module, launches = module_of(backend, op), []

    def counted(launch):
        def call(*args, **kwargs):
            launches.append(op)
            return launch(*args, **kwargs) if run else None

        return call

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return counted(self.kernel[grid])

    if backend == "triton":
        monkeypatch.setattr(module, f"_{op}_kernel", Counted(getattr(module, f"_{op}_kernel")))
    else:
        launch = counted(getattr(module.extension(), op))
        monkeypatch.setattr(module, "extension", lambda: SimpleNamespace(**{op: launch}))
    return launches
