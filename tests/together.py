"""Train every trainee for some steps and score a colorizer, alone or as one of several processes.

test_together.py compares one process with two. Started by torchrun, this file writes what its processes found:

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/together.py OUT.json [float32] [STEPS]
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_nets import QuarterColors

from faic.bbdm import BBDM
from faic.cgan import CGAN
from faic.classifier import Classifier
from faic.coltran import ColTran, ColTranColor, ColTranSpatial
from faic.coltran_latents import LatentColTran
from faic.core import Budget, is_main_process, sample_per_image
from faic.dataset import load_photos
from faic.distributed import all_reduce_sum, init_distributed
from faic.evaluate import evaluate
from faic.gray_decoder import GrayDecoderTrainee
from faic.palette import Palette
from faic.pix2pix import LatentPix2Pix, Pix2Pix
from faic.runs import Run
from faic.train import train_step
from faic.trainer import Trainer, day_batches
from faic.vqgan import VQGAN, VQModel

SIDE, PHOTOGRAPHS = 32, 10  # batches of 3, and at the end of an epoch one of 1: then the second process has no image
ADAM = dict(optimizer="adam", lr=1e-3, beta1=0.5, beta2=0.999, schedule="constant")
PLATEAU = dict(factor=0.5, patience=1, threshold=1e-4, cooldown=1, min_lr=1e-6)


def make_pix2pix():
    return Pix2Pix(SIDE, width=8, dropout=0.5)


def make_coltran():
    return ColTran(SIDE, dim=16, heads=2, ff=16)


def make_color_upsampler():
    return ColTranColor(SIDE, dim=16, heads=2, ff=16)


def make_spatial_upsampler():
    return ColTranSpatial(SIDE, dim=8, heads=2, ff=8)


def make_vqgan():
    widths = dict(ch=16, num_res_blocks=1, n_embed=32, disc_width=8)
    return VQGAN("f4", perceptual_weight=0.0, disc_start=2, codebook="data", **widths)


def make_bbdm():
    return BBDM(4, 3, 8, 32, (1, 2), 1, groups=8)


def make_palette():
    return Palette(SIDE, 16, (1, 2), 1, head_channels=16, groups=4)


def make_palette_modern():
    changes = dict(target="chroma", chroma_scale=4.0, objective="v", min_snr=5.0, init="zero")
    return Palette(SIDE, 16, (1, 2), 1, head_channels=16, groups=4, **changes)


def make_cgan():
    return CGAN(SIDE, width=8, critic_width=4, critic_steps=2)


def make_cgan_with_penalty():
    return CGAN(SIDE, width=8, critic_width=4, critic_steps=2, penalty="image", noise_layers=2)


TF1 = ADAM | dict(optimizer="rmsprop_tf1", lr=1e-2, lr_factors={"critic": 2.0}, clip_weights={"critic": 0.1})


def make_classifier():
    model = Classifier(width=4, train_crop=24)
    model.use_photographs(np.random.default_rng(0).integers(0, 256, (PHOTOGRAPHS, SIDE, SIDE, 3), dtype=np.uint8))
    return model


def frozen_stage():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQModel(ch=16, num_res_blocks=1, n_embed=32, groups=4).eval()


def make_latent_pix2pix():
    return LatentPix2Pix(8, width=8, normalize=False)


def make_latent_coltran():
    return LatentColTran(8, codes=32, dim=16, heads=2, ff=16, first_stage=frozen_stage())


def make_gray_decoder():
    widths = dict(ch=16, num_res_blocks=1, disc_width=8)
    return GrayDecoderTrainee(perceptual_weight=0.0, disc_start=2, first_stage=frozen_stage(), **widths)


TRAINEES = {  # name -> (function that makes it, options)
    "pix2pix": (make_pix2pix, ADAM),
    "coltran": (make_coltran, ADAM | dict(optimizer="rmsprop", ema=dict(decay=0.9, start=0.0, every=1))),
    "coltran_color": (make_color_upsampler, ADAM),
    "coltran_spatial": (make_spatial_upsampler, ADAM),
    "vqgan": (make_vqgan, ADAM | dict(lr=1e-4)),
    "latent_pix2pix": (make_latent_pix2pix, ADAM),
    "latent_coltran": (make_latent_coltran, ADAM),
    "gray_decoder": (make_gray_decoder, ADAM | dict(lr=1e-4)),
    "bbdm": (make_bbdm, ADAM | dict(accumulate=2, schedule="plateau", plateau=PLATEAU)),
    "palette": (make_palette, ADAM | dict(lr=1e-4, schedule="warmup", warmup=0.2)),
    "palette_modern": (make_palette_modern, ADAM | dict(ema=dict(decay=0.9, start=1, every=1))),
    "cgan": (make_cgan, TF1),
    # Not Adam: the biases before a norm have no gradient, and Adam makes steps of their rounding errors
    "cgan_penalty": (make_cgan_with_penalty, TF1 | dict(clip_weights={})),
    "classifier": (make_classifier, ADAM | dict(weight_decay=1e-3, schedule="step", lr_step=0.4, lr_gamma=0.3)),
}


PREPARED = ("bbdm", "latent_pix2pix", "latent_coltran")  # they train on latents


class InPrecision:
    """A trainee whose networks and batches are of another precision."""

    def __init__(self, trainee, dtype):
        self.trainee, self.dtype, self.gray_kind = trainee, dtype, trainee.gray_kind
        if isinstance(trainee, BBDM):
            trainee.bridge.to(dtype)
        stage = getattr(getattr(trainee, "space", trainee), "first_stage", None)
        for net in (*trainee.networks().values(), *filter(None, [stage])):
            net.to(dtype)

    def networks(self):
        return self.trainee.networks()

    def losses(self, batch, generator):
        return self.trainee.losses({k: self.cast(v) for k, v in batch.items()}, generator)

    def cast(self, value):
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(self.dtype) if floating else value


def train(name, dtype, steps, folder):
    """The losses of each step, and the sum of squares of each final weight."""
    make, options = TRAINEES[name]
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (PHOTOGRAPHS, SIDE + 4, SIDE + 4, 3), dtype=np.uint8)
    latents = rng.standard_normal((PHOTOGRAPHS, 2, 6, 8, 8)).astype(np.float16) if name in PREPARED else None
    run, budget = Run(folder / name, {}), Budget(steps, "steps")
    options = dict(options, batch_size=3, crop=SIDE, flip=True, seed=0)
    trainee, indices = InPrecision(make(), dtype), np.arange(PHOTOGRAPHS)
    trainer = Trainer(trainee, run, pixels, indices, budget, options, prepared=latents)
    seen, batches = [], day_batches(trainer)
    for _ in range(steps):
        losses = train_step(trainer, next(batches))
        seen.append({n: all_reduce_sum(v.double()).item() for n, v in losses.items()})
        trainer.step += 1
    batches.close()
    squares = {}
    for n, net in trainer.networks.items():
        squares |= {f"{n}.{k}": v.double().square().sum().item() for k, v in net.state_dict().items()}
    return dict(losses=seen, weights=squares)


def train_all(dtype=torch.float64, steps=12):
    """Name -> results of each trainee."""
    with tempfile.TemporaryDirectory() as folder:
        for name in TRAINEES:
            (Path(folder) / name).mkdir()
        return {name: train(name, dtype, steps, Path(folder)) for name in TRAINEES}


def add_noise(gray, generators):
    """A colorizer whose answers depend on the images' own generators."""
    noise = sample_per_image(torch.randn, (len(gray), 3, *gray.shape[2:]), generators)
    return (gray + 0.1 * noise).clamp(0, 1)


def score(folder):
    """An evaluation of 47 photographs, of which the second process gets fewer than the first."""
    photos = load_photos()
    fewer = dict(test=photos.splits["test"][:47], validation=photos.splits["validation"][:21])
    few = replace(photos, splits=photos.splits | fewer, fingerprint="few" + photos.fingerprint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIC_RUNS", str(folder))
        rows, samples = evaluate(add_noise, few, "test", QuarterColors(), copies_lightness=False, batch_size=10)
    scores = {v: {k: x for k, x in row.items() if "seconds" not in k} for v, row in rows.items()}
    return dict(rows=scores, samples=samples.tolist())


def find_all(folder, dtype=torch.float64, steps=12):
    """Results of all trainees, and the evaluation's; every process needs the same folder."""
    return train_all(dtype, steps) | dict(evaluation=score(folder))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("dtype", nargs="?", default="float64", choices=("float32", "float64"))
    parser.add_argument("steps", nargs="?", default=12, type=int)
    options = parser.parse_args()
    init_distributed(torch.device("cpu"))
    torch.set_num_threads(1)
    found = find_all(options.out.with_suffix(".runs"), getattr(torch, options.dtype), options.steps)
    if is_main_process():
        options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
