"""The command ``cspd``: demo, generate, info."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from . import cli_convert, cli_eval, cli_generate, cli_serve
from .cli_support import one_line, positive

COMMANDS = (cli_generate, cli_serve, cli_convert, cli_eval)  # those with a module of their own
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
    except KeyboardInterrupt as error:
        status, message = INTERRUPTED, str(error) or "interrupted"
    except BrokenPipeError as error:  # nobody reads what is printed any more, as with `| head`
        status, message = 2, error.filename and one_line(error)
    except (OSError, ValueError, RuntimeError) as error:
        status, message = 2, one_line(error)
    # Out here the frames of the command are gone: a progress bar has ended its line.
    _discard_output()
    if message:
        print(f"{command}: {message}", file=sys.stderr)
    return status


def _discard_output() -> None:
    """What stdout still holds goes nowhere if it cannot be written: Python would try again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, ValueError):  # there is none, or it is closed
        pass


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cspd", description="Continuous speculative decoding for MAR-like models.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="digits by speculative decoding, beside the target alone at fewer steps")
    demo.add_argument("--num-images", type=positive, default=512, metavar="N", help="images per row (default 512)")
    demo.add_argument("--gamma", type=positive, nargs="+", default=[4, 8], help="steps of a window (default 4 8)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", type=Path, default=Path("cspd_demo.png"), metavar="PNG")
    demo.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures as JSON too")
    demo.add_argument(
        "--strict", action="store_true", help="two rows more, one of strict verification; takes about twice as long"
    )
    demo.set_defaults(run=_demo)

    for module in COMMANDS:
        module.add_parser(commands)

    info = commands.add_parser("info", help="versions, devices and backends")
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=_info)
    return parser


def _demo(args) -> int:
    from .demo.pair import one_thread
    from .demo.run import run_demo

    with one_thread():
        run_demo(args.num_images, args.gamma, args.seed, args.out, args.json, strict=args.strict)
    return 0


def _info(args) -> int:
    from cspd_kernels.info import render

    print(render(args.json))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
