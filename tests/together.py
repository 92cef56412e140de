"""Train every trainee for some steps and score a colorizer, alone or as one of several processes, and write what came out.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/together.py OUT.json [float32] [STEPS]
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from phases import Judge

from faic.bbdm import BBDM
from faic.coltran import ColTran, ColTranColor, ColTranSpatial
from faic.core import Budget, is_main_process, sample_per_image
from faic.dataset import load_photos
from faic.distributed import all_reduce_sum, init_distributed
from faic.evaluate import evaluate
from faic.pix2pix import Pix2Pix
from faic.runs import Run
from faic.train import train_step
from faic.trainer import Trainer, day_batches
from faic.vqgan import VQGAN

SIDE, PHOTOGRAPHS = 32, 10  # batches of 3, and at the end of an epoch one of 1: then the second process has no image
ADAM = dict(optimizer="adam", lr=1e-3, beta1=0.5, beta2=0.999, schedule="constant")
TRAINEES = {  # name -> (function of nothing, options)
    "pix2pix": (lambda: Pix2Pix(SIDE, width=8, dropout=0.5), ADAM),
    "coltran": (
        lambda: ColTran(SIDE, dim=16, heads=2, ff=16),
        ADAM | dict(optimizer="rmsprop", ema=dict(decay=0.9, start=0.0, every=1)),
    ),
    "coltran_color": (lambda: ColTranColor(SIDE, dim=16, heads=2, ff=16), ADAM),
    "coltran_spatial": (lambda: ColTranSpatial(SIDE, dim=8, heads=2, ff=8), ADAM),
    "vqgan": (
        lambda: VQGAN(
            "f4",
            ch=16,
            num_res_blocks=1,
            n_embed=32,
            disc_width=8,
            perceptual_weight=0.0,
            disc_start=4,
            codebook="data",
        ),
        ADAM | dict(lr=1e-4),
    ),
    "bbdm": (
        lambda: BBDM(4, 3, 8, 32, (1, 2), 1, groups=8),
        ADAM
        | dict(
            accumulate=2,
            schedule="plateau",
            plateau=dict(factor=0.5, patience=2, threshold=1e-4, cooldown=1, min_lr=1e-6),
        ),
    ),
}


class InPrecision:
    """A trainee whose networks and batches are of another precision."""

    def __init__(self, trainee, dtype):
        self.trainee, self.dtype, self.gray_kind = trainee, dtype, trainee.gray_kind
        if isinstance(trainee, BBDM):
            trainee.bridge.to(dtype)
        for part in trainee.networks().values():
            part.to(dtype)

    def networks(self):
        return self.trainee.networks()

    def losses(self, batch, generator):
        cast = lambda v: v.to(self.dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        return self.trainee.losses({k: cast(v) for k, v in batch.items()}, generator)


def train(name, dtype, steps, folder):
    """The losses of each step, and the sums of squares of the last weights."""
    make, options = TRAINEES[name]
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (PHOTOGRAPHS, SIDE + 4, SIDE + 4, 3), dtype=np.uint8)
    latents = rng.standard_normal((PHOTOGRAPHS, 2, 6, 8, 8)).astype(np.float16) if name == "bbdm" else None
    trainer = Trainer(
        InPrecision(make(), dtype),
        Run(folder / name, {}),
        pixels,
        np.arange(PHOTOGRAPHS),
        Budget(steps, "steps"),
        dict(options, batch_size=3, crop=SIDE, flip=True, seed=0),
        prepared=latents,
    )
    seen, batches = [], day_batches(trainer)
    for _ in range(steps):
        losses = train_step(trainer, next(batches))
        seen.append({n: all_reduce_sum(v.double()).item() for n, v in losses.items()})
        trainer.step += 1
    batches.close()
    return dict(
        losses=seen,
        weights={
            f"{n}.{k}": v.double().square().sum().item()
            for n, p in trainer.networks.items()
            for k, v in p.state_dict().items()
        },
    )


def train_all(dtype=torch.float64, steps=20):
    """Results of every trainee by name."""
    with tempfile.TemporaryDirectory() as folder:
        for name in TRAINEES:
            (Path(folder) / name).mkdir()
        return {name: train(name, dtype, steps, Path(folder)) for name in TRAINEES}


def score(folder):
    """An evaluation of 48 photographs whose answers are drawn from the images' own generators; the second process gets fewer than the first."""
    photos = load_photos()
    few = replace(
        photos,
        splits=photos.splits | {part: photos.splits[part][:n] for part, n in (("test", 47), ("validation", 21))},
        fingerprint="few" + photos.fingerprint,
    )
    noisy = lambda gray, generators: (
        gray + 0.1 * sample_per_image(torch.randn, (len(gray), 3, *gray.shape[2:]), generators)
    ).clamp(0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIC_RUNS", str(folder))
        rows, samples = evaluate(noisy, few, "test", Judge(), copies_lightness=False, batch_size=10)
    return dict(
        rows={v: {k: x for k, x in row.items() if "seconds" not in k} for v, row in rows.items()},
        samples=samples.tolist(),
    )


def find_all(folder, dtype=torch.float64, steps=20):
    """Everything, by name; every process needs the same folder."""
    return train_all(dtype, steps) | dict(evaluation=score(folder))


if __name__ == "__main__":
    init_distributed(torch.device("cpu"))
    torch.set_num_threads(1)
    found = find_all(
        Path(sys.argv[1]).with_suffix(".runs"),
        torch.float32 if "float32" in sys.argv else torch.float64,
        next((int(a) for a in sys.argv[2:] if a.isdigit()), 20),
    )
    if is_main_process():
        Path(sys.argv[1]).write_text(json.dumps(found))
