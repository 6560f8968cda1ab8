"""What the speculative runner refuses: options, models and arguments of a run."""

from __future__ import annotations

import math

import pytest
import torch
from foreign import Spaced
from small_models import small_mar

import cspd
from cspd.loop import patch_of
from cspd.models import DiffLoss, GaussianDiffusion
from cspd.models.diffloss import SimpleMLPAdaLN

CHANNELS = 4


@pytest.fixture(scope="module")
def pair():
    return small_mar(0, width=16, schedule="linear"), small_mar(1, width=32, schedule="linear")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prefill": 1.5}, r"expected prefill in \[0, 1\], got 1.5"),
        ({"sigma": "other"}, "expected sigma one of"),
        ({"relaxation": 0.0}, "expected a finite relaxation > 0, got 0.0"),
        ({"relaxation": torch.ones(3)}, r"one number or \(16,\), got shape \(3,\)"),
        ({"backend": "metal"}, "expected backend one of"),
        ({"max_tries": -1}, "expected max_tries as an int >= 0, got -1"),
        ({"relaxation": torch.tensor([torch.inf] * 16)}, "expected relaxation finite and > 0"),
        ({"dtype": "int8"}, "expected dtype as float32, .*got 'int8'"),
        ({"dtype": torch.int32}, "expected dtype as .*got torch.int32"),
        ({"relaxation": cspd.ContextRelaxation()}, "verify='strict' for ContextRelaxation, got verify='window'"),
        ({"residual": "exact"}, "expected residual one of .*, got 'exact'"),
        ({"target_sigma": True}, "True only with residual='closed_form' or several candidates, got True"),
        ({"residual": "closed_form", "target_sigma": 1}, "expected target_sigma as a bool.*got 1"),
        ({"residual": "closed_form"}, "a learned one in the draft and the target: pass target_sigma=True"),
    ],
)
def test_bad_runner_options(pair, options, match):
    with pytest.raises(ValueError, match=match):
        cspd.SpecDecodeRunner(*pair, **options)


def test_a_relaxation_of_another_kind(pair):
    with pytest.raises(TypeError, match=r"a number, a tensor or a policy .*, got str"):
        cspd.SpecDecodeRunner(*pair, "42")
    with pytest.raises(TypeError, match=r"a policy .*got the class SimilarityRelaxation itself"):
        cspd.SpecDecodeRunner(*pair, cspd.SimilarityRelaxation)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"img_size": 4}, "same seq_len, got 4 and 16"),
        ({"vae_embed_dim": 2}, "same token_embed_dim, got 8 and 4"),
        ({"num_sampling_steps": "7"}, "same number of denoising steps.*got 7 and 12"),
        ({"schedule": "cosine"}, "same noise schedule.*got two different ones"),
    ],
)
def test_models_that_do_not_fit(pair, changes, match):
    with pytest.raises(ValueError, match=match):
        cspd.SpecDecodeRunner(small_mar(0, **{"schedule": "linear", **changes}), pair[1])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bsz": 0}, "expected bsz >= 1"),
        ({"bsz": 2.0}, "expected bsz >= 1, got 2.0"),
        ({"bsz": "2"}, "expected bsz >= 1, got '2'"),
        ({"gamma": cspd.AdaptiveDraft}, "got the class AdaptiveDraft itself"),
        ({"gamma": cspd.EntropyDraft}, "got the class EntropyDraft itself"),
        ({"steps": 4.0}, "expected steps as an int >= 1 .*got 4.0"),
        ({"temperature": "1"}, "expected a finite temperature >= 0 and a finite cfg, got '1'"),
        ({"cfg": None}, "finite cfg, got 1.0 and None"),
        ({"labels": torch.tensor([True, False])}, r"integer tensor .*got \(2,\) torch.bool"),
        ({"first_image": 1.5}, "expected first_image >= 0, got 1.5"),
        ({"first_image": 2**44 - 1}, f"expected first_image <= {2**44 - 2} with 2 images"),
        ({"orders": [[0]]}, "expected orders as int64 .*got list"),
        ({"gamma": 0}, "gamma as an int >= 1"),
        ({"gamma": 2.0}, "an int >= 1 or a policy .*, got 2.0"),
        ({"steps": 0}, "expected steps as an int >= 1"),
        ({"cfg_schedule": "cubic"}, "expected cfg_schedule"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"cfg": math.nan}, "finite cfg"),
        ({"labels": torch.tensor([1])}, r"integer tensor of shape \(2,\) or None, got \(1,\)"),
        ({"labels": [1, 2]}, "got list"),
        ({"labels": torch.tensor([1, 99])}, "expected labels in 0..9"),
        ({"seed": -1}, "expected seed"),
        ({"first_image": -1}, "expected first_image >= 0"),
        ({"orders": torch.zeros(2, 16)}, "expected orders as int64"),
        ({"orders": torch.zeros(2, 16, dtype=torch.int64)}, "permutation"),
    ],
)
def test_bad_run_arguments(pair, options, match):
    runner = cspd.SpecDecodeRunner(*pair)
    with pytest.raises(ValueError, match=match):
        runner.run(**{"bsz": 2, "steps": 4, **options})


def test_stats_before_a_run(pair):
    with pytest.raises(RuntimeError, match="call run"):
        _ = cspd.SpecDecodeRunner(*pair).stats


def test_things_that_are_no_models(pair):
    with pytest.raises(TypeError, match="expected the draft to be a MAR model, got Linear without seq_len"):
        cspd.SpecDecodeRunner(torch.nn.Linear(2, 2), pair[1])
    odd = small_mar(0, schedule="linear")
    odd.diffloss.net.forward = lambda x, t, c: torch.ones(len(x), 8)
    with pytest.raises(
        ValueError, match=r"the target's diffloss .* to compute what its layers say: net had its forward replaced"
    ):
        cspd.SpecDecodeRunner(pair[0], odd)


@pytest.mark.parametrize("role", ["draft", "target"])
@pytest.mark.parametrize(
    ("sample", "match"),
    [
        (
            lambda self, z, temperature=1.0, cfg=1.0: 0.6 * plain(self, z, temperature, cfg),
            "without further work before or after",
        ),
        (
            lambda self, z, temperature=1.0, cfg=1.0: plain(self, z, temperature, 1.5),
            "without further work before or after",
        ),
        (lambda self, z, temperature=1.0, cfg=1.0: z[:, :CHANNELS], "it has a sampler of its own"),
    ],
    ids=["scaled", "always guided", "no loop"],
)
def test_heads_that_sample_otherwise(pair, role, sample, match):
    odd = small_mar(0, schedule="linear")
    odd.diffloss.__class__ = type("Odd", (DiffLoss,), {"sample": sample})
    models = {"draft": pair[0], "target": pair[1], role: odd}
    with pytest.raises(ValueError, match=rf"the {role}'s diffloss \(Odd\) to sample as MAR does.*{match}"):
        cspd.SpecDecodeRunner(models["draft"], models["target"])


def limited(head, z, temperature=1.0):
    noise = torch.randn(len(z), CHANNELS)
    kwargs = {"clip_denoised": True, "model_kwargs": {"c": z}, "temperature": temperature}
    return head.gen_diffusion.p_sample_loop(head.net.forward, noise.shape, noise, **kwargs)


def by_ddim(head, z):
    noise = torch.randn(len(z), CHANNELS)
    kwargs = {"clip_denoised": False, "model_kwargs": {"c": z}}
    return head.gen_diffusion.ddim_sample_loop(head.net.forward, noise.shape, noise, **kwargs)


class Beyond(SimpleMLPAdaLN):
    """``c + s (c - u)``, as mit-han-lab/hart guides."""

    def forward_with_cfg(self, x, t, c, cfg_scale):
        return super().forward_with_cfg(x, t, c, 1.0 + cfg_scale)


@pytest.mark.parametrize("what", ["limits", "ddim", "guidance"])
def test_heads_that_patch_serves_and_a_run_does_not(pair, what):
    """What a run computes is ancestral steps."""
    odd = small_mar(0, schedule="linear")
    if what == "guidance":
        odd.diffloss.net.__class__ = Beyond
    else:
        odd.diffloss.__class__ = type("Odd", (DiffLoss,), {"sample": {"limits": limited, "ddim": by_ddim}[what]})
        odd.diffloss.gen_diffusion = Spaced(12) if what == "ddim" else odd.diffloss.gen_diffusion
    cspd.patch(odd.diffloss)
    assert not patch_of(odd.diffloss.net).told
    cspd.unpatch(odd.diffloss)
    with pytest.raises(ValueError, match=r"to sample as MAR does, .* more than ancestral steps"):
        cspd.SpecDecodeRunner(pair[0], odd)


def test_a_loop_that_computes_otherwise(pair):
    class Odd(GaussianDiffusion):
        def _mean(self, *args):
            mean, log_variance = super()._mean(*args)
            return 1.1 * mean, log_variance

    odd = small_mar(0, schedule="linear")
    odd.diffloss.gen_diffusion = Odd(odd.diffloss.gen_diffusion.schedule)
    with pytest.raises(ValueError, match=r"the draft's diffloss .* to sample as MAR does: .* differ by \S+ of the"):
        cspd.SpecDecodeRunner(odd, pair[1])


def plain(head, z, temperature, cfg):
    return DiffLoss.sample(head, z, temperature, cfg)


def test_labels_must_suit_both_models(pair):
    runner = cspd.SpecDecodeRunner(small_mar(0, width=16, schedule="linear", class_num=5), pair[1])
    with pytest.raises(ValueError, match=r"expected labels in 0\.\.4"):
        runner.run(1, 4, 2, labels=torch.tensor([7]))
