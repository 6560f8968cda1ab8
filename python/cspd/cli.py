"""The command ``cspd``: demo, generate, info."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from .files import check_output, write_file

INTERRUPTED = 130  # what shells report of a command that Ctrl-C has ended


def main(argv: list[str] | None = None) -> int:
    """Run a command. Wrong input, or what cannot be written, ends with one line on stderr and status 2; Ctrl-C with
    one line and status 130.
    """
    command = "cspd"
    try:
        args = _parser().parse_args(argv)
        command = f"cspd {args.command}"
        status = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        status, message = INTERRUPTED, "interrupted"
    except BrokenPipeError as error:  # nobody reads what is printed any more, as with `| head`
        status, message = 2, error.filename and _one_line(error)
    except (OSError, ValueError, RuntimeError) as error:
        status, message = 2, _one_line(error)
    # Out here the frames of the command are gone: a progress bar has ended its line.
    _discard_output()
    if message:
        print(f"{command}: {message}", file=sys.stderr)
    return status


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # without the number
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _discard_output() -> None:
    """What stdout still holds goes nowhere if it cannot be written: Python would try again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, ValueError):  # there is none, or it is closed
        pass


@contextlib.contextmanager
def _one_thread():
    """One CPU thread for the digits pair, unless OMP_NUM_THREADS says otherwise; the caller's number afterwards.

    Its tensors are so small that more threads gain nothing, and on a busy machine they wait for each other, spinning.
    """
    import torch

    before = torch.get_num_threads()
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cspd", description="Continuous speculative decoding for MAR-like models.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="digits by speculative decoding, beside the target alone at fewer steps")
    demo.add_argument("--num-images", type=_positive, default=512, metavar="N", help="images per row (default 512)")
    demo.add_argument("--gamma", type=_positive, nargs="+", default=[4, 8], help="draft steps per window (default 4 8)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", type=Path, default=Path("cspd_demo.png"), metavar="PNG")
    demo.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures as JSON too")
    demo.set_defaults(run=_demo)

    generate = commands.add_parser("generate", help="images from MAR checkpoints, or from the digits pair")
    generate.add_argument("--target", type=Path, metavar="CKPT", help="MAR checkpoint; without it the digits pair")
    generate.add_argument("--draft", type=Path, metavar="CKPT", help="draft checkpoint; without it the target alone")
    generate.add_argument(
        "--patch-size", type=_positive, metavar="P", help="of the checkpoints, whose weights do not tell it"
    )
    generate.add_argument("--labels", type=int, nargs="+", required=True, help="one class per image")
    generate.add_argument("--num-iter", type=_positive, help="autoregressive steps (default 64; digits 16)")
    generate.add_argument("--gamma", type=_positive, default=8, help="draft steps per window (default 8)")
    generate.add_argument("--relaxation", type=float, default=42.0, help="of the accept test (default 42)")
    generate.add_argument(
        "--residual",
        choices=("rejection", "closed_form"),
        default="rejection",
        help="how a rejected token is redrawn; closed_form is for heads with a fixed variance (the digits pair's)",
    )
    generate.add_argument(
        "--target-sigma", action="store_true", help="closed_form with learned variances: the target's sigma for both"
    )
    generate.add_argument(
        "--parallel-tol",
        type=_tolerance,
        default="auto",
        metavar="{auto,off,NUMBER}",
        help="make all denoising steps at once, until nothing changes by more than this, in (0, 1), relative to the "
        "largest value; off: one after the other; auto: to rounding where that was measured to be faster",
    )
    generate.add_argument("--prefill", type=float, default=0.15, help="fraction of the steps that is the target's")
    generate.add_argument("--num-sampling-steps", type=_positive, help="denoising steps (default 100; digits 40)")
    generate.add_argument("--cfg", type=float, default=1.0, help="guidance scale (default 1, none)")
    generate.add_argument("--cfg-schedule", choices=("linear", "constant"), default="linear")
    generate.add_argument("--temperature", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--device", default="cpu")
    generate.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the head's matrix products")
    generate.add_argument("--out", type=Path, required=True, help=".safetensors (latents, labels); .png for digits")
    generate.set_defaults(run=_generate)

    info = commands.add_parser("info", help="versions, devices and backends")
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=_info)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {text}")
    return value


def _tolerance(text: str) -> float | str | None:
    """``parallel_tol`` from the command line. Not by the ops' own check, with which torch would be imported."""
    if text in ("auto", "off"):
        return text if text == "auto" else None
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < 1:
            return value
    raise argparse.ArgumentTypeError(f"expected auto, off or a number in (0, 1), got {text}")


def _demo(args) -> int:
    from .demo.run import run_demo

    with _one_thread():
        run_demo(args.num_images, args.gamma, args.seed, args.out, args.json)
    return 0


def _generate(args) -> int:
    digits = args.target is None
    wanted = ".png" if digits else ".safetensors"
    if args.out.suffix != wanted:
        raise ValueError(f"expected --out with the ending {wanted}, got {args.out.name}")
    check_output(args.out, "--out")
    for name in ("target", "draft"):
        checkpoint = getattr(args, name)
        if checkpoint and checkpoint.exists() and args.out.exists() and checkpoint.samefile(args.out):
            raise ValueError(f"expected --out as another file than --{name}, got {args.out} for both")
    if digits:
        for name in ("draft", "num_sampling_steps", "patch_size"):
            if getattr(args, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"expected --target together with {option}: the digits pair has its own")
    with _one_thread() if digits else contextlib.nullcontext():
        return _generate_images(args)


def _generate_images(args) -> int:
    import torch
    from safetensors.torch import save

    from .checkpoints import load_mar
    from .speculative import SpecDecodeRunner

    digits = args.target is None
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch without that device asserts
        raise ValueError(f"expected --device as one that torch has here, got {args.device}: {error}") from error
    if digits:
        from .demo.pair import load_pair

        target, draft = (model.to(args.device) for model in load_pair())
    else:
        options = dict(
            patch_size=args.patch_size, num_sampling_steps=args.num_sampling_steps or 100, device=args.device
        )
        target = load_mar(args.target, **options)
        draft = load_mar(args.draft, **options) if args.draft else None
    labels = torch.tensor(args.labels, device=args.device)
    if not all(0 <= label < target.num_classes for label in args.labels):
        raise ValueError(f"expected labels in 0..{target.num_classes - 1}, got {args.labels}")
    runner = SpecDecodeRunner(
        draft or target,
        target,
        args.relaxation,
        args.prefill if draft else 1.0,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        residual=args.residual if draft else "rejection",  # the target alone redraws nothing
        target_sigma=args.target_sigma and draft is not None,
        parallel_tol=args.parallel_tol,
    )
    images = runner.run(
        len(labels),
        args.num_iter or (16 if digits else 64),
        args.gamma,
        args.cfg_schedule,
        labels,
        args.temperature,
        args.cfg,
        progress=sys.stderr is not None and sys.stderr.isatty(),
        seed=args.seed,
    ).cpu()
    if digits:
        from .demo.picture import save_picture

        save_picture(args.out, [("speculative", images, runner.stats.outcome)], labels)
    else:
        write_file(args.out, save({"latents": images.contiguous(), "labels": labels.cpu()}))
    stats = runner.stats
    kept = "" if stats.acceptance is None else f", {100 * stats.acceptance:.1f} % of the drafted tokens kept"
    layout = "" if digits else f", latents of shape {tuple(images.shape)} read with patch size {target.patch_size}"
    print(f"wrote {args.out}: {stats.target_calls} target and {stats.draft_calls} draft calls{kept}{layout}")
    return 0


def _info(args) -> int:
    from cspd_kernels.info import render

    print(render(args.json))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
