"""A whole image with and without the drop-in: ``python benchmarks/end_to_end.py [--num-iter 64] [--json FILE]``.

MAR-B with random weights (time does not depend on their values), 256 tokens, guidance, one image; the
same code samples eagerly and through ``cspd.patch``, in float32 and under autocast to bfloat16.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch

import cspd
from cspd.models import mar_base, mar_huge, mar_large
from cspd_kernels.testing import randomize_, relative_error

from common import measure, spread
from report import Report, Row

MODELS = {"mar_base": mar_base, "mar_large": mar_large, "mar_huge": mar_huge}


def sample(model, num_iter: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """One guided image; the seed fixes the order and the noise."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    labels = torch.tensor([207], device=model.fake_latent.device)
    autocast = torch.autocast(labels.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.no_grad(), autocast:
        return model.sample_tokens(1, num_iter, cfg=3.0, labels=labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="mar_base")
    parser.add_argument("--num-iter", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3, help="whole images per contender (default 3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = randomize_(MODELS[args.model](), seed=1).to(device).eval()
    models = {False: model, True: cspd.patch(copy.deepcopy(model))}  # patching takes time once, and not an image's
    report = Report(args.json)
    # Under autocast the replaced code rounds its residual stream to bfloat16 and the kernels do not, so
    # there the difference says how far the two roundings are apart, not how far either is from exact.
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 1e-1)):
        images = {}

        def run(patched, seed, dtype=dtype, images=images):
            images[patched] = sample(models[patched], args.num_iter, dtype, seed)

        contenders = {patched: partial(run, patched) for patched in models}
        for patched in contenders:
            sample(models[patched], 2, dtype, seed=0)  # a short one warms up
        seconds = measure(contenders, [(0,)], args.runs, device, warm_up=False)
        error = relative_error(images[True], images[False])
        name = "float32" if dtype == torch.float32 else "autocast bfloat16"
        size = f"{args.model} 256 tokens {args.num_iter} steps cfg"
        timed = (*spread(seconds[True]), *spread(seconds[False]))
        report.add(
            Row("sample_tokens", size, f"patched {name}", f"eager {name}", *timed, args.runs, error, bound, "of max")
        )
    report.finish()


if __name__ == "__main__":
    main()
