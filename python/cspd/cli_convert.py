"""``cspd convert``: a checkpoint as safetensors."""

from __future__ import annotations

from pathlib import Path

from .errors import InvalidInput


def add_parser(commands) -> None:
    """Add the command to ``argparse``'s subparsers."""
    convert = commands.add_parser("convert", help="write a checkpoint of MAR or of its VAE as safetensors")
    convert.add_argument("input", type=Path, metavar="IN", help="a checkpoint, or a folder that holds one")
    convert.add_argument("output", type=Path, metavar="OUT.safetensors")
    convert.add_argument("--vae", action="store_true", help="IN is a checkpoint of MAR's VAE (kl16.ckpt)")
    convert.add_argument(
        "--weights", choices=("model_ema", "model"), help="which weights to keep (default: model_ema if it is there)"
    )
    convert.add_argument(
        "--patch-size", type=int, metavar="P", help="patch size to store; needed if the file does not state it"
    )
    convert.add_argument(
        "--vae-stride", type=int, metavar="S", help="VAE stride to store, if the file does not state it"
    )
    convert.set_defaults(run=_convert)


def _convert(args) -> int:
    options = {name: getattr(args, name) for name in ("weights", "patch_size", "vae_stride")}
    given = {name: value for name, value in options.items() if value is not None}
    if args.vae:
        if given:
            raise InvalidInput(
                f"expected --vae alone, got --{min(given).replace('_', '-')}, which is for MAR checkpoints"
            )
        from .vae import convert
    else:
        from .checkpoints import convert
    print(f"wrote {args.output}: {convert(args.input, args.output, **given)}")
    return 0
