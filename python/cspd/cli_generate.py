"""The command ``cspd generate``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .cli_support import dtype, labels, positive, tolerance

# What the options of drafting are unless given.
DRAFTING = {
    "gamma": 8,
    "prefill": 0.15,
    "relaxation": 42.0,
    "residual": "rejection",
    "target_sigma": False,
    "verify": "window",
    "candidates": 1,
    "branches": 1,
}


def add_parser(commands) -> None:
    """Add the command to the subparsers ``commands``."""
    parser = commands.add_parser(
        "generate",
        help="draw a folder of images from MAR checkpoints, or from the digits pair",
        description="Draw images from a MAR checkpoint, or without --target from the digits pair. Run the same command "
        "again to make the missing images. On several GPUs: torchrun --nproc_per_node 8 -m cspd generate ...",
    )
    models = parser.add_argument_group("models")
    models.add_argument("--target", type=Path, metavar="FILE", help="MAR checkpoint (default: the digits pair)")
    models.add_argument("--draft", type=Path, metavar="FILE", help="draft checkpoint (default: the target draws alone)")
    models.add_argument("--vae", type=Path, metavar="FILE", help="MAR's VAE, which decodes latents to pictures")
    models.add_argument(
        "--patch-size", type=positive, metavar="P", help="patch size, if the checkpoint does not store it"
    )
    models.add_argument(
        "--vae-stride", type=positive, metavar="S", help="VAE stride, if the checkpoint does not store it"
    )
    models.add_argument(
        "--num-sampling-steps", type=positive, help="denoising steps of a token (default 100; digits 40)"
    )
    models.add_argument(
        "--device", default="auto", help="auto (the GPU if there is one; default), cpu, cuda, cuda:1 ..."
    )
    models.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads of each process (default: torch's; digits 1)"
    )
    models.add_argument(
        "--dtype", type=dtype("float32", "bfloat16", "float16"), metavar="TYPE",
        help="dtype of matrix products in both models: bf16, fp16 or fp32 (default: bf16 on a GPU, fp32 on a CPU)",
    )  # fmt: skip
    models.add_argument(
        "--vae-dtype",
        type=dtype("float32", "bfloat16"),
        metavar="TYPE",
        default="float32",
        help="dtype of the VAE: fp32 (default) or bf16",
    )

    images = parser.add_argument_group("images")
    images.add_argument(
        "--labels", type=labels, nargs="+", metavar="CLASSES", help="one class per image, such as 207,360,980"
    )
    images.add_argument("--num-images", type=positive, metavar="N", help="draw N images, the same number of each class")
    images.add_argument(
        "--classes", type=positive, metavar="K", help="with --num-images: use classes 0 to K-1 (default: all)"
    )
    images.add_argument("--steps", type=positive, help="autoregressive steps (default 64; digits 16)")
    images.add_argument("--num-iter", type=positive, dest="steps", help=argparse.SUPPRESS)  # its old name
    images.add_argument("--cfg", type=float, default=1.0, help="guidance scale (default 1: no guidance)")
    images.add_argument("--cfg-schedule", choices=("linear", "constant"), default="linear", help="how guidance grows")
    images.add_argument("--temperature", type=float, default=1.0, help="scale of the noise (default 1)")
    images.add_argument("--seed", type=int, default=0, help="the same seed draws the same images (default 0)")
    images.add_argument(
        "--batch-size", type=positive, metavar="B", help="images made together in one process (default: all of them, "
        "at most 64; from a checkpoint on a CPU at most 8)"
    )  # fmt: skip

    drafting = parser.add_argument_group("drafting, with --draft or the digits pair")
    drafting.add_argument(
        "--gamma",
        type=positive,
        default=DRAFTING["gamma"],
        help="steps that the draft draws before the target verifies them (default 8)",
    )
    drafting.add_argument(
        "--prefill",
        type=float,
        default=DRAFTING["prefill"],
        help="fraction of the steps that the target draws alone at the start (default 0.15)",
    )
    drafting.add_argument(
        "--relaxation",
        type=float,
        default=DRAFTING["relaxation"],
        help="how far the accept test is relaxed; 1 is the exact formula (default 42)",
    )
    drafting.add_argument(
        "--residual",
        choices=("rejection", "closed_form"),
        default=DRAFTING["residual"],
        help="how a rejected token is redrawn: rejection (default), or closed_form for heads with a fixed variance, "
        "such as the digits pair's",
    )
    drafting.add_argument(
        "--target-sigma",
        action="store_true",
        help="use the target's sigma for both models: closed_form and several candidates need it with learned variance",
    )
    drafting.add_argument(
        "--verify",
        choices=("window", "strict"),
        default=DRAFTING["verify"],
        help="window (default): judge all steps of a window at once and keep them all. strict: judge every step given "
        "the tokens before it, and draft the steps after a rejected token again",
    )
    drafting.add_argument(
        "--candidates",
        type=positive,
        default=DRAFTING["candidates"],
        metavar="K",
        help="candidates of every drafted token, tried in order; at most 16 (default 1)",
    )
    drafting.add_argument(
        "--branches",
        type=positive,
        default=DRAFTING["branches"],
        metavar="W",
        help="candidates of a window's first step that are drafted on; above 1 needs --verify strict (default 1)",
    )
    drafting.add_argument(
        "--criterion",
        choices=("trajectory", "last_step"),
        default="trajectory",
        help="trajectory (default): judge whole trajectories. last_step: the last denoising step adds noise and is "
        "judged, also without a draft. last_step is exact with --verify strict, --relaxation 1 and one sigma",
    )
    drafting.add_argument(
        "--parallel-tol",
        type=tolerance,
        default="auto",
        metavar="{auto,off,NUMBER}",
        help="compute all denoising steps at once, in sweeps, until nothing changes by more than NUMBER (in (0, 1), "
        "relative to the largest value). off: step by step. auto (default): sweeps to rounding where they were "
        "measured to be faster",
    )

    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for 000000.png ... and run.json")
    output.add_argument(
        "--latents", action="store_true", help="also write 000000.safetensors ...; without --vae only these"
    )
    output.add_argument("--grid", type=Path, metavar="PNG", help="write the first 64 images as one picture")
    output.add_argument("--npz", type=Path, metavar="FILE", help="write all images as one array, for FID evaluators")
    parser.set_defaults(run=_run)


def _run(args) -> int:
    if "RANK" in os.environ:  # read when torch is imported: its own words on connections that end with another process
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from .generate.run import generate

    generate(args)
    return 0
