"""The command ``cspd demo``."""

from __future__ import annotations

from pathlib import Path

from .cli_support import positive


def add_parser(commands) -> None:
    """Add the command to the subparsers ``commands``."""
    parser = commands.add_parser("demo", help="digits by speculative decoding, beside the target alone at fewer steps")
    parser.add_argument("--num-images", type=positive, default=512, metavar="N", help="images per row (default 512)")
    parser.add_argument("--gamma", type=positive, nargs="+", default=[4, 8], help="steps of a window (default 4 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("cspd_demo.png"), metavar="PNG")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures as JSON too")
    parser.add_argument(
        "--strict", action="store_true", help="two rows more, one of strict verification; takes about twice as long"
    )
    parser.set_defaults(run=_run)


def _run(args) -> int:
    from .demo.pair import one_thread
    from .demo.run import run_demo

    with one_thread():
        run_demo(args.num_images, args.gamma, args.seed, args.out, args.json, strict=args.strict)
    return 0
