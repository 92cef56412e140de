"""Compare ways to enlarge chroma: python tests/trials/upsampling.py FOLDER, with at least 532 photographs of 256x256.

Writes figures/upsampling.csv, which nbs/63_full_size.ipynb shows. The true a and b of Lab at 64x64 are enlarged to
256x256; the error is the mean distance from the true ones there. The first 32 photographs served to choose the
constants of faic.full_size and are not scored.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from faic import full_size
from faic.color import luma, rgb_to_lab
from faic.core import ProgressBar, repo_root
from faic.full_size import _guides, _resize, _squeeze, upsample_chroma
from faic.intervals import bootstrap_interval

SIDE, SMALL, CHOSEN_ON, SCORED = 256, 64, 32, 500


def mean(x, radius):
    """The mean over a square window, smaller at the border."""
    return F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)


def fast_guided_filter(chroma, low, high, radius, eps):
    """He and Sun 2015, algorithm 2, with what they subsample given at the small size."""
    mean_low, mean_chroma = mean(low, radius), mean(chroma, radius)
    covariance = mean(low * chroma, radius) - mean_low * mean_chroma
    a = covariance / (mean(low * low, radius) - mean_low**2 + eps)
    a, b = mean(a, radius), mean(mean_chroma - a * mean_low, radius)
    return _resize(a, SIDE, SIDE, "bilinear") * high + _resize(b, SIDE, SIDE, "bilinear")


def joint_bilateral(chroma, photo, rho, share):
    """The chapter's method with other constants."""
    before = full_size.LIGHTNESS_SPREAD, full_size.SHARE
    full_size.LIGHTNESS_SPREAD, full_size.SHARE = rho, share
    try:
        return upsample_chroma(chroma, photo)
    finally:
        full_size.LIGHTNESS_SPREAD, full_size.SHARE = before


def answers(photo, pixels):
    """Each method's name and its a and b at 256x256."""
    chroma = rgb_to_lab(_squeeze(photo, SMALL, "cpu"))[:, 1:]
    low, high = _guides(photo, SMALL, "cpu")[0], luma(pixels, "lab")
    for mode in ("bilinear", "bicubic"):
        yield mode, _resize(chroma, SIDE, SIDE, mode)
    for radius in (1, 2):
        for eps in (1e-4, 1e-3, 1e-2):
            name = f"fast guided filter, radius {radius}, eps {eps:g}"
            yield name, fast_guided_filter(chroma, low, high, radius, eps)
    for rho, share in ((0.05, 0.25), (0.02, 0.5), (0.05, 0.5), (0.1, 0.5), (0.05, 1)):
        yield f"joint bilateral, rho {rho:g}, s {share:g}", joint_bilateral(chroma, photo, rho, share)


@torch.no_grad()
def measure(files):
    """Name of the method -> its error on each photograph."""
    errors = {}
    for file in ProgressBar(files):
        photo = Image.open(file).convert("RGB")
        if photo.size != (SIDE, SIDE):
            raise SystemExit(f"{file} has {photo.size} pixels; this trial takes photographs of {SIDE}x{SIDE}")
        pixels = torch.tensor(np.array(photo)).permute(2, 0, 1)[None]
        true = rgb_to_lab(pixels)[:, 1:]
        for name, made in answers(photo, pixels):
            errors.setdefault(name, []).append((made - true).norm(dim=1).mean().item())
    return {name: np.array(values) for name, values in errors.items()}


def table(errors):
    """A row for each method: its error, and what it gains over bicubic interpolation on the same photographs."""
    rows = []
    for name, values in errors.items():
        gain = errors["bicubic"] - values
        (error, *ends), (gained, *gained_ends) = bootstrap_interval(values), bootstrap_interval(gain)
        rows.append(
            dict(
                zip(("method", "photographs", "error", "error low", "error high"), (name, len(values), error, *ends)),
                **dict(zip(("gain", "gain low", "gain high"), (gained, *gained_ends))),
                **{"better on": (gain > 0).mean()},
            )
        )
    return pd.DataFrame(rows)


def main():
    files = sorted(f for f in Path(sys.argv[1]).iterdir() if f.suffix == ".jpg")[CHOSEN_ON : CHOSEN_ON + SCORED]
    if len(files) < SCORED:
        raise SystemExit(f"{sys.argv[1]} holds too few photographs: expected {CHOSEN_ON + SCORED} JPEG files")
    file = repo_root() / "figures" / "upsampling.csv"
    table(measure(files)).to_csv(file, index=False, float_format="%.4f")
    print(file)


if __name__ == "__main__":
    main()
