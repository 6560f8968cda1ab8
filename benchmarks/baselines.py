"""What users run today, in plain torch: the baselines of the ratios."""

from __future__ import annotations

import torch


def eager_denoise(diffloss, cond, x_t, noise, dtype=None):
    """The upstream loop on given noise: one network call a step, every operation its own kernel.

    Args:
        dtype: run under autocast to this type, as upstream's evaluation does; None for none.
    """
    diffusion, x = diffloss.gen_diffusion, x_t
    with torch.no_grad(), torch.autocast(x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        for i in reversed(range(diffusion.num_timesteps)):
            t = torch.full((len(x),), int(diffusion.schedule.timesteps[i]), device=x.device)
            mean, log_variance = diffusion.posterior(diffloss.net(x, t, cond), x, i)
            x = mean if i == 0 else mean + torch.exp(0.5 * log_variance) * noise[i]
    return x


def looped_accept_reject(x, draft, target, max_tries=100):
    """Acceptance-rejection as the released runner does it: whole batches of redraws until every row has one.

    The accept test and the redraw use the formulas of this package (log space); the loop, its random
    numbers from the global generator and its wait for the host every round are the released ones.
    """

    def log_ratio(value):
        def density(chain):
            return (-0.5 * ((value - chain.mean) / chain.log_std.exp()) ** 2 - chain.log_std).sum(1)

        return density(target) - density(draft) + draft.path_log_std - target.path_log_std

    accepted = torch.rand(len(x), device=x.device).log() < log_ratio(x)
    token, done = torch.where(accepted[:, None], x, target.sample), accepted.clone()
    for _ in range(max_tries):
        if bool(done.all()):
            break
        proposal = torch.randn_like(target.mean) * target.log_std.exp() + target.mean
        keep = torch.rand(len(x), device=x.device) < 1 - torch.exp(-log_ratio(proposal))
        keep &= ~done
        token[keep] = proposal[keep]
        done |= keep
    return token, accepted
