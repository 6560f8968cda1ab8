"""The command ``cspd eval``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .files import check_output, write_file


def add_parser(commands) -> None:
    """Add ``eval`` to the commands of :func:`cspd.cli.main`."""
    parser = commands.add_parser("eval", help="compute the FID of generated images with torch-fidelity's Inception")
    parser.add_argument(
        "images",
        type=Path,
        metavar="DIR|FILE.npz",
        help="a folder of PNG files, or a file with arr_0, uint8 N x H x W x 3",
    )
    parser.add_argument(
        "--fid", type=Path, required=True, metavar="STATS.npz", help="reference statistics: mu and sigma"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="torch-fidelity's Inception weights")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="batch size (default 64)")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one; default), cpu, cuda, ...")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.set_defaults(run=run)


def run(args) -> int:
    """Evaluate and print."""
    if args.json:
        check_output(args.json, "--json")
    import torch

    from .evaluate import USUAL_IMAGES, evaluate, is_release

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    progress = sys.stderr is not None and sys.stderr.isatty()
    result = evaluate(args.images, args.fid, args.weights, device=device, batch_size=args.batch_size, progress=progress)
    print(f"FID {result['fid']:.4f} of {result['num_images']} images against {args.fid}")
    if result["inception_score"] is not None:
        print(f"Inception score {result['inception_score']:.3f} +- {result['inception_score_std']:.3f}")
    print(f"Inception: {result['weights']}, sha256 {result['weights_sha256'][:16]}")
    if not is_release(result["weights"], result["weights_sha256"]):
        print("this file's name is not that of torch-fidelity's release: compare only with figures of the same file")
    if result["num_images"] < USUAL_IMAGES:
        print(f"FID is biased upwards for few images; published figures use {USUAL_IMAGES}")
    if args.json:
        write_file(args.json, (json.dumps(result, indent=2) + "\n").encode())
    return 0
