"""The command ``cspd selftest``."""

from __future__ import annotations

import json

from .cli_support import say

_WIDTH = 42  # of a check's name


def add_parser(commands) -> None:
    """Add the command to the subparsers ``commands``."""
    parser = commands.add_parser("selftest", help="compare every available backend with the reference")
    parser.add_argument("--quick", action="store_true", help="float32 only, without speculative decoding")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.set_defaults(run=_run)


def _run(args) -> int:
    """Status 1 where a check failed. What is not here is said, and has not passed."""
    from .selftest import passed, run, summary

    checks = []
    for check in run(args.quick):
        checks.append(check)
        if not args.json:
            say(check.line(_WIDTH))
    if args.json:
        print(json.dumps({"passed": passed(checks), "checks": [check.to_dict() for check in checks]}, indent=2))
    else:
        say(summary(checks))
    return 0 if passed(checks) else 1
