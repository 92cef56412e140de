"""What the stages share: models with synthetic photographs, precisions, presets shrunk for a rehearsal."""

import contextlib
import functools
import tempfile
from pathlib import Path

import torch
from throughput import make_trainer, photographs

from faic.batches import Batch
from faic.components import PHASE_DAYS
from faic.core import device_name, make_generator, pick_device
from faic.presets import PRESETS, components_of, make_trainee, model_options
from faic.train import train_step
from faic.trainer import day_batches

PRECISIONS = {  # name -> (TF32 for products and convolutions?, autocast's precision)
    "float32": (False, "float32"),
    "TF32": (True, "float32"),
    "bfloat16": (False, "bfloat16"),
}


def stage_device(device_text, rehearse):
    """The device that a stage works on; a rehearsal uses the CPU and small models."""
    if not rehearse:
        return torch.device(device_text)
    shrink()
    return pick_device("cpu")


def shrink():
    """Make presets gpu and paper so small that a CPU core rehearses every stage in seconds."""
    tiny = dict(side=32, load_side=32, batch_size=2)
    coltran = tiny | dict(dim=8, heads=2, ff=8)
    vqgan = tiny | dict(ch=16, num_res_blocks=1, n_embed=16, disc_width=8, codebook="data", disc_start=0)
    bbdm = tiny | dict(channels=32, channel_mult=[1, 2], num_res_blocks=1, accumulate=1)
    bbdm |= dict(ema=dict(decay=0.9, start=0.05, every=1))
    changes = dict(pix2pix=tiny | dict(load_side=36, width=4), bbdm=bbdm)
    changes |= dict.fromkeys(("coltran", "coltran_color", "coltran_spatial"), coltran)
    changes |= {f"vqgan_{latent}{kind}": vqgan for latent in ("f4", "f8", "f16") for kind in ("", "_plain")}
    for preset, low in (("gpu", dict(low=32)), ("paper", {})):
        mine = {m: c | (low if m in ("coltran", "coltran_color") else {}) for m, c in changes.items()}
        PRESETS[preset].changes, PRESETS[preset].sampling = mine, dict(bbdm=dict(sample_steps=3))
    PRESETS["gpu"].scored = 4
    PHASE_DAYS["phase2"] = 2
    PRECISIONS.pop("TF32", None)  # a CPU has none


@contextlib.contextmanager
def precision(name):
    """What autocast gets, with TF32 as the name says, and as it was afterwards."""
    tf32, cast = PRECISIONS[name]
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield cast
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gb(device):
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else float("nan")


@contextlib.contextmanager
def trainer_of(model, preset, device, **changes):
    """A trainer on synthetic photographs, with a folder that goes with it."""
    with tempfile.TemporaryDirectory() as folder:
        yield make_trainer(model, preset, changes, device, Path(folder) / "run")


def steps(trainer, count):
    """Make training steps; the losses of each, on the CPU: a list of dicts."""
    batches, seen = day_batches(trainer), []
    for _ in range(count):
        seen.append({n: v.detach() for n, v in train_step(trainer, next(batches)).items()})
        trainer.step += 1
    batches.close()
    return [{n: float(v) for n, v in losses.items()} for losses in seen]


def components(model, preset, device):
    """The untrained networks that a model needs in addition to its own."""
    names = components_of(model, preset=preset)
    return {n: make_trainee(n, model_options(n, preset)).networks()["net"].eval().to(device) for n in names}


@functools.cache
def untrained(model, preset, device):
    """(trainee, components) of a preset, on the device; made once, as large networks take seconds."""
    others = components(model, preset, device)
    trainee = make_trainee(model, model_options(model, preset), components=others if model == "bbdm" else {})
    for net in trainee.networks().values():
        net.eval().to(device)
    return trainee, others


def gray_images(model, preset, count, device):
    """(count,1,side,side) in [0,1]: synthetic photographs in the model's gray."""
    options = model_options(model, preset)
    pixels = torch.from_numpy(photographs(count, options["side"])).permute(0, 3, 1, 2)
    kind = dict(pix2pix="lab", coltran="coltran", bbdm="bbdm")[model]
    return Batch(torch.arange(count), pixels, kind)["gray"].to(device)


def generators(count, device="cpu"):
    """A generator for each image, of numbers that are drawn on this device."""
    return [make_generator(0, "evaluate", i, device=device) for i in range(count)]


def machine(device):
    """The machine's device, software and resources."""
    found = dict(
        device=device_name(device), torch=torch.__version__, cuda=torch.version.cuda, threads=torch.get_num_threads()
    )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= dict(memory_gb=round(properties.total_memory / 1e9, 1), cudnn=torch.backends.cudnn.version())
        found |= dict(multiprocessors=properties.multi_processor_count)
    return found
