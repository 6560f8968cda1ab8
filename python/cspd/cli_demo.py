"""The command ``cspd demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli_support import positive

DESCRIPTION = """\
Draw handwritten digits in several ways, and compare them. It takes about a minute on two CPU cores.

The target is a small image model. It draws a digit token by token, in 16 autoregressive steps. The draft is a
still smaller model that imitates it. In speculative decoding the draft draws the tokens of a window of steps.
Then one call of the target accepts or redraws each of them.

The table has one row for each way to draw the digits. It says how often each model was called, how long that
took, and how close the digits are to real ones. The picture shows the digits, and how likely each drafted
token was to be accepted.
"""


def add_parser(commands) -> None:
    """Add the command to the subparsers ``commands``."""
    parser = commands.add_parser(
        "demo",
        help="draw handwritten digits with and without speculative decoding, and compare them",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--num-images", type=positive, default=512, metavar="N", help="images of each row, at least 4 (default 512)"
    )
    parser.add_argument(
        "--gamma",
        type=positive,
        nargs="+",
        default=[4, 8],
        metavar="G",
        help="steps that the draft draws before the target verifies them; one row for each number (default 4 8)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same digits (default 0)")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="add two rows: strict verification, which is exact, and the target that it equals. Takes twice as long",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("cspd_demo.png"), metavar="PNG", help="the picture (default cspd_demo.png)"
    )
    parser.add_argument("--brief", action="store_true", help="a small picture, with the main rows only")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write one web page that explains everything")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.set_defaults(run=_run)


def _run(args) -> int:
    from .demo.pair import one_thread
    from .demo.run import run_demo

    with one_thread():
        run_demo(
            args.num_images, args.gamma, args.seed, args.out, args.json, args.html, strict=args.strict, brief=args.brief
        )
    return 0
