"""DiffusionHead: packing, operand types, recognition by structure, and the message for every misfit."""

import pytest
import torch
import torch.nn as nn

from cspd.models.diffloss import TimestepEmbedder
from cspd_kernels import DiffusionHead, denoise
from cspd_kernels.head import OPERAND_DTYPES
from cspd_kernels.ops.denoise.reference import network
from cspd_kernels.testing import random_inputs, relative_error

C, Z, W, D = 5, 7, 48, 2


def outputs_agree(module, head):
    """Relative error of the packed network against the module's own, float64, at a middle timestep."""
    torch.manual_seed(0)
    x, c = torch.randn(9, C, dtype=torch.float64), torch.randn(9, Z, dtype=torch.float64)
    i = head.num_steps // 2
    t = torch.full((9,), int(head.schedule.timesteps[i]))
    packed = network(head, x, head.time_embedding[i] + c @ head.cond_weight.T + head.cond_bias)
    with torch.no_grad():
        return relative_error(packed, module.net(x, t, c))


def test_attributes(make_diffloss):
    module = make_diffloss("linear", D)
    head = DiffusionHead.from_module(module)
    assert (head.channels, head.cond_channels, head.width, head.depth, head.num_steps) == (C, Z, W, D, 7)
    assert (head.dtype, head.device, head.norm_eps) == (torch.float32, torch.device("cpu"), 1e-6)
    assert head.learned_variance
    assert head.schedule is module.gen_diffusion.schedule
    assert head.time_embedding.shape == (7, W)
    assert not any(p.requires_grad for p in (head.cond_weight, head.time_embedding, head.blocks[0].weight0))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_network_equals_the_modules_own_in_float64(make_diffloss, depth):
    module = make_diffloss("cosine", depth).double()
    assert outputs_agree(module, DiffusionHead.from_module(module)) <= 1e-10


def test_time_embedding_is_the_modules_at_the_respaced_timesteps(make_diffloss):
    module = make_diffloss("cosine", 1)
    head = DiffusionHead.from_module(module)
    with torch.no_grad():
        expected = module.net.time_embed(torch.tensor(head.schedule.timesteps))
    assert relative_error(head.time_embedding, expected) <= 1e-6


def test_dtype_follows_the_weights(make_diffloss):
    module = make_diffloss()
    for dtype in OPERAND_DTYPES:
        head = DiffusionHead.from_module(module.to(dtype))
        assert (head.dtype, head.cond_weight.dtype, head.final_mod_bias.dtype) == (dtype, dtype, dtype)


def test_dtype_follows_autocast(make_diffloss):
    module = make_diffloss()
    plain = DiffusionHead.from_module(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head = DiffusionHead.from_module(module)
        explicit = DiffusionHead.from_module(module, dtype=torch.float16)
    assert head.dtype == head.blocks[0].mod_weight.dtype == torch.bfloat16
    assert explicit.dtype == torch.float16
    assert torch.equal(head.time_embedding, plain.time_embedding)  # computed outside autocast


@pytest.mark.parametrize("dtype", OPERAND_DTYPES)
def test_residual_stream_parameters_stay_wide(make_diffloss, dtype):
    stream = torch.float64 if dtype == torch.float64 else torch.float32
    for head in (
        DiffusionHead.from_module(make_diffloss(), dtype=dtype),
        DiffusionHead.from_module(make_diffloss()).to(dtype),
    ):
        block = head.blocks[-1]
        ends = (head.input_weight, head.input_bias, head.final_weight, head.final_bias)
        assert {v.dtype for v in (head.time_embedding, block.norm_weight, block.norm_bias, *ends)} == {stream}
        assert {v.dtype for v in (head.cond_weight, block.bias1, block.mod_weight, head.final_mod_bias)} == {dtype}


def test_to_equals_packing_at_that_type(make_diffloss):
    head, packed = (DiffusionHead.from_module(make_diffloss(), dtype=d) for d in (torch.float32, torch.bfloat16))
    moved = head.to(torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    assert head.dtype == torch.float32
    assert torch.equal(moved.blocks[1].weight0, packed.blocks[1].weight0)
    assert torch.equal(moved.final_weight, packed.final_weight)
    assert (moved.norm_eps, moved.schedule) == (head.norm_eps, head.schedule)


def test_weights_of_the_asked_type_are_shared(make_diffloss):
    module = make_diffloss()
    head = DiffusionHead.from_module(module)
    pairs = [
        (head.input_weight, module.net.input_proj.weight),
        (head.blocks[1].weight1, module.net.res_blocks[1].mlp[2].weight),
        (head.blocks[0].norm_weight, module.net.res_blocks[0].in_ln.weight),
        (head.final_mod_bias, module.net.final_layer.adaLN_modulation[-1].bias),
    ]
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert head.to(torch.bfloat16).cond_weight.data_ptr() != module.net.cond_embed.weight.data_ptr()


def test_fixed_variance_head(make_diffloss):
    module = make_diffloss()
    module.net.final_layer.linear = nn.Linear(W, C)
    head = DiffusionHead.from_module(module.double())
    assert not head.learned_variance
    assert head.final_weight.shape == (C, W)
    assert outputs_agree(module, head) <= 1e-10


def test_layers_without_bias_or_affine_parameters(make_diffloss):
    module = make_diffloss()
    module.net.input_proj = nn.Linear(C, W, bias=False)
    module.net.res_blocks[0].in_ln = nn.LayerNorm(W, eps=1e-6, elementwise_affine=False)
    module = module.double()
    assert outputs_agree(module, DiffusionHead.from_module(module)) <= 1e-10


def test_epsilon_of_the_layer_norms_is_read(make_diffloss):
    module = make_diffloss().double()
    for norm in [b.in_ln for b in module.net.res_blocks] + [module.net.final_layer.norm_final]:
        norm.eps = 0.3
    head = DiffusionHead.from_module(module)
    assert head.norm_eps == 0.3
    assert outputs_agree(module, head) <= 1e-10


def test_found_by_structure_not_by_name(make_diffloss):
    module = make_diffloss()

    class SomethingElse(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_channels, self.gen_diffusion, self.net = C, module.gen_diffusion, module.net

    head, same = DiffusionHead.from_module(SomethingElse()), DiffusionHead.from_module(module)
    inputs = random_inputs(head, 3, 0)
    assert torch.equal(denoise(head, *inputs).sample, denoise(same, *inputs).sample)


def remove(path):
    def change(module):
        *parents, name = path.split(".")
        for parent in parents:
            module = module[int(parent)] if parent.isdigit() else getattr(module, parent)
        delattr(module, name)

    return change


def replace_activation(path):
    def change(module):
        module.get_submodule(path)[1] = nn.GELU()

    return change


def triple_output(module):
    module.net.final_layer.linear = nn.Linear(W, 3 * C)


def change_epsilon(module):
    module.net.res_blocks[1].in_ln.eps = 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [(remove(path), f"it lacks {path}$") for path in (
        "in_channels", "gen_diffusion", "net.input_proj", "net.cond_embed", "net.res_blocks", "net.time_embed.mlp",
        "net.final_layer.norm_final", "net.final_layer.linear", "net.final_layer.adaLN_modulation",
    )]
    + [
        (remove("net.res_blocks.1.in_ln"), r"net.res_blocks\[1\] lacks in_ln$"),
        (remove("net.res_blocks.1.mlp"), r"net.res_blocks\[1\] lacks mlp$"),
        (remove("net.res_blocks.1.adaLN_modulation"), r"net.res_blocks\[1\] lacks adaLN_modulation$"),
        (replace_activation("net.res_blocks.1.mlp"), r"net.res_blocks\[1\].mlp is not Linear, SiLU, Linear"),
        (replace_activation("net.time_embed.mlp"), "net.time_embed.mlp is not Linear, SiLU, Linear"),
        (triple_output, r"puts out 15 channels; 5 \(eps\) or 10 \(eps, v\)"),
        (change_epsilon, r"LayerNorms differ in eps: \[1e-06, 1e-05\]"),
    ],
)  # fmt: skip
def test_structural_errors_name_what_is_wrong(make_diffloss, change, message):
    module = make_diffloss()
    change(module)
    with pytest.raises(TypeError, match=message):
        DiffusionHead.from_module(module)


def test_every_missing_part_is_listed():
    with pytest.raises(TypeError, match=r"got Linear: it lacks in_channels, gen_diffusion, net\.input_proj"):
        DiffusionHead.from_module(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_operand_types_that_are_not_covered(make_diffloss, dtype):
    head = DiffusionHead.from_module(make_diffloss())
    for build in (lambda: DiffusionHead.from_module(make_diffloss(), dtype=dtype), lambda: head.to(dtype)):
        with pytest.raises(ValueError, match=rf"dtype as float32, bfloat16, float16, float64 \(.*\), got {dtype}"):
            build()


def test_unsupported_diffusion_is_refused(make_diffloss):
    module = make_diffloss()
    module.gen_diffusion = [module.gen_diffusion]
    with pytest.raises(TypeError, match="one diffusion object, got a list of 1"):
        DiffusionHead.from_module(module)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: setattr(m.net, "cond_embed", nn.Identity()), "net.cond_embed is .*Identity, not torch.nn.Linear"),
        (
            lambda m: setattr(m.net.final_layer, "adaLN_modulation", nn.Linear(W, 2 * W)),
            r"net.final_layer.adaLN_modulation\[-1\] is builtins.NoneType, not torch.nn.Linear",
        ),
        (
            lambda m: m.net.res_blocks[0].adaLN_modulation.__setitem__(1, nn.Linear(W, 2 * W)),
            r"res_blocks\[0\].adaLN_modulation\[-1\] is 48 -> 96, expected 48 -> 144",
        ),
        (lambda m: setattr(m, "in_channels", C + 1), "net.input_proj is 5 -> 48, expected 6 -> 48"),
        (
            lambda m: setattr(m.net.final_layer, "linear", nn.Linear(W + 1, 2 * C)),
            "linear is 49 -> 10, expected 48 -> 10",
        ),
        (lambda m: setattr(m.net, "input_proj", nn.Linear(C + 1, W)), "net.input_proj is 6 -> 48, expected 5 -> 48"),
    ],
)
def test_parts_that_do_not_fit_together(make_diffloss, change, match):
    module = make_diffloss()
    change(module)
    with pytest.raises(TypeError, match=match):
        DiffusionHead.from_module(module)


@pytest.mark.parametrize("size", [7, 100, 256])
def test_time_embedding_of_any_size_is_the_modules_own(make_diffloss, size):
    module = make_diffloss().double()
    module.net.time_embed = TimestepEmbedder(W, size).double()
    head = DiffusionHead.from_module(module)
    expected = module.net.time_embed(torch.tensor(head.schedule.timesteps))
    assert torch.allclose(head.time_embedding, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(7), nn.RMSNorm(W)])
def test_other_norms_are_named(make_diffloss, norm):
    module = make_diffloss()
    module.net.res_blocks[1].in_ln = norm
    with pytest.raises(TypeError, match=r"res_blocks\[1\].in_ln is .*not a LayerNorm of width 48"):
        DiffusionHead.from_module(module)
    module = make_diffloss()
    module.net.final_layer.norm_final = nn.LayerNorm(W, eps=1e-6)
    with pytest.raises(TypeError, match="norm_final has affine parameters"):
        DiffusionHead.from_module(module)
