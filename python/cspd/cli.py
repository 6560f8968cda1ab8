"""The command ``cspd``: demo, generate, info."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

from . import cli_convert, cli_demo, cli_eval, cli_generate, cli_selftest, cli_serve
from .cli_support import one_line

COMMANDS = (cli_demo, cli_generate, cli_serve, cli_convert, cli_eval, cli_selftest)  # those with a module of their own
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

    for module in COMMANDS:
        module.add_parser(commands)

    info = commands.add_parser("info", help="print versions, devices and backends")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    return parser


def _info(args) -> int:
    from cspd_kernels.info import render

    print(render(args.json))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
