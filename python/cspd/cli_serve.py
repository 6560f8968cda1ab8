"""The command ``cspd serve``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli_support import dtype
from .errors import InvalidInput


def add_parser(commands) -> None:
    """Add ``serve`` to the commands of :func:`cspd.cli.main`."""
    parser = commands.add_parser(
        "serve", help="open a page in the browser that draws pictures with their acceptance maps"
    )
    parser.add_argument("--target", type=Path, metavar="FILE", help="MAR checkpoint (default: the digits pair)")
    parser.add_argument("--draft", type=Path, metavar="FILE", help="draft checkpoint")
    parser.add_argument("--vae", type=Path, metavar="FILE", help="MAR's VAE, which decodes latents to pictures")
    parser.add_argument(
        "--patch-size", type=_positive, metavar="P", help="patch size, if the checkpoints do not store it"
    )
    parser.add_argument(
        "--vae-stride", type=_positive, metavar="S", help="VAE stride, if the checkpoints do not store it"
    )
    parser.add_argument(
        "--num-sampling-steps", type=_positive, metavar="N", help="denoising steps of a token (default 100)"
    )
    parser.add_argument(
        "--relaxation", type=float, default=42.0, help="relaxation of the accept test in windows (default 42)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (default): the GPU if there is one, for the digits pair the CPU"
    )
    parser.add_argument(
        "--dtype",
        type=dtype("float32", "bfloat16", "float16"),
        metavar="TYPE",
        help="dtype of matrix products: bf16, fp16 or fp32 (default: bf16 on a GPU, fp32 on a CPU)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: only this machine reaches it)"
    )
    parser.add_argument("--port", type=_port, default=7860, help="port to listen on (default 7860)")
    parser.add_argument(
        "--max-steps", type=_positive, metavar="N", help="maximum steps per request (default 256; digits 16)"
    )
    parser.add_argument(
        "--max-images", type=_positive, metavar="N", help="maximum images per request (default 4; digits 16)"
    )
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {text}")
    return value


def _port(text: str) -> int:
    if not 1 <= (value := int(text)) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port in 1..65535, got {text}")
    return value


def run(args) -> int:
    """Load, warm up, and serve until Ctrl-C."""
    files = ("target", "draft", "vae")
    given = [name for name in files if getattr(args, name)]
    if given and len(given) < len(files):
        raise InvalidInput(f"expected --target, --draft and --vae together, got only --{' and --'.join(given)}")
    for name in ("patch_size", "vae_stride", "num_sampling_steps"):
        if not given and getattr(args, name):
            option = f"--{name.replace('_', '-')}"
            raise InvalidInput(f"expected --target together with {option}: the digits pair has a fixed one")
    from .page import build_page, import_gradio, start, wait

    import_gradio()  # said before the models are loaded
    studio = load_studio(args)
    studio.make(0, min(2, studio.limits.steps), 1, 1.0, 0, 1)  # what compiles does it now
    app = build_page(studio)
    address = start(app, args.host, args.port)
    print(f"serving {studio.name} at {address}; Ctrl-C ends it", flush=True)
    wait(app)
    print("stopped")
    return 0


def load_studio(args):
    """The models that the command line names."""
    import torch

    from .devices import usable_device
    from .serve import Limits, Studio

    digits = args.target is None
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not digits else "cpu"
    usable_device(device, "expected a --device")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if digits:
        from .demo.pair import load_pair

        target, draft = (model.to(device) for model in load_pair())
        vae, most, images, name = None, 16, 16, f"Handwritten digits on {device}"
    else:
        from .checkpoints import load_mar
        from .vae import load_vae

        options = dict(patch_size=args.patch_size, num_sampling_steps=args.num_sampling_steps or 100, device=device)
        if args.vae_stride:
            options["vae_stride"] = args.vae_stride
        target, draft = load_mar(args.target, **options), load_mar(args.draft, **options)
        if dtype is None and torch.device(device).type == "cuda":
            dtype = torch.bfloat16
        vae = load_vae(args.vae, device=device, dtype=torch.bfloat16 if dtype is torch.bfloat16 else torch.float32)
        vae.check(target)
        most, images, name = 256, 4, f"{_name(target, args.target)}, with {_name(draft, args.draft)}, on {device}"
    most = min(args.max_steps or most, target.seq_len)
    return Studio(
        target,
        draft,
        vae,
        limits=Limits(steps=most, gamma=min(64, most), images=args.max_images or images),
        steps=min(most, 16 if digits else 64),
        classes=min(target.num_classes, draft.num_classes),
        name=name,
        relaxation=args.relaxation,
        dtype=dtype,
    )


def _name(model, path: Path) -> str:
    """What the model says was loaded; else its file's name."""
    return getattr(model, "loaded", None) or path.name
