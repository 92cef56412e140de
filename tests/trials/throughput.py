"""Photographs per second of training: real steps of the loop on synthetic photographs, without disk.

    python tests/trials/throughput.py [pix2pix coltran bbdm coltran_color vqgan_f4 ...] [--preset laptop]
        [--threads 1,2] [--precision float32,bfloat16] [--channels-last false,true] [--set batch_size=32 ...]
        [--device cpu] [--seconds 8] [--rounds 3] [--neighbors 0] [--profile] [--out throughput.json]

Each item is a model with a number of threads, a precision and a memory format. All items are made and warmed up
first. Then each is timed for `--seconds` in each of `--rounds` rounds, so that a change of the machine's speed meets
all of them. A line states the best and the median of the rounds. A step holds all that training does but checkpoints:
batches, losses, gradients, optimizers, averages, and a check of the losses every 25 steps. `--neighbors` keeps that
many cores busy meanwhile. `--profile` states where the time of a step goes.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Events

import faic.train
import faic.trainer
from faic.core import Budget, device_name, pick_device
from faic.presets import PRESETS, make_trainee, model_options
from faic.resume import check_losses
from faic.runs import Run
from faic.trainer import Trainer, day_batches, day_engine

MODELS = ("pix2pix", "coltran", "bbdm")
PHOTOGRAPHS = 256
LATENTS = {"f4": (4, 3), "f8": (8, 4), "f16": (16, 8)}  # factor and channels, for BBDM
SMALL = 0.02  # of a step's time: what takes less is not listed in a profile


def photographs(number, side):
    """Smooth noise, (number,side,side,3) uint8."""
    coarse = torch.rand(number, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return (smooth * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def make_trainer(model, preset, changes, device, folder):
    """A trainer of a preset's model with changed options; its averages are on from the first step."""
    options = model_options(model, preset) | changes
    if options.get("ema"):
        options["ema"] = options["ema"] | dict(start=0.0)
    trainee = make_trainee(model, options)
    array, latents = photographs(PHOTOGRAPHS, options["load_side"]), None
    if model == "bbdm" and options["factor"] > 1:
        side, channels = options["side"] // options["factor"], options["latent_channels"]
        shape = (PHOTOGRAPHS, 2 if options["flip"] else 1, 2 * channels, side, side)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half().numpy()
    folder.mkdir(parents=True)
    options |= dict(crop=options["side"], seed=0)
    run, indices, budget = Run(folder, {}), np.arange(PHOTOGRAPHS), Budget(10**9, "steps")
    return Trainer(trainee, run, array, indices, budget, options, 1, device, prepared=latents)


class Item:
    """A trainer that is timed now and then."""

    def __init__(self, names, trainer, threads):
        self.names, self.trainer, self.threads, self.rates = names, trainer, threads, []
        self.batches, self.engine = day_batches(trainer), day_engine(trainer)
        self.engine.add_event_handler(Events.ITERATION_COMPLETED, self.after_step)

    def after_step(self, engine):
        t = self.trainer
        t.step += 1
        t.pending.append((t.step, t.fraction, engine.state.output))
        self.images += len(engine.state.batch["index"])
        if len(t.pending) >= t.check_every:
            check_losses(t)
        if time.monotonic() >= self.until and self.steps_left <= 0:
            engine.terminate()
        self.steps_left -= 1

    def run(self, seconds, steps=1):
        """Train for some seconds, and for at least so many steps; returns photographs per second."""
        torch.set_num_threads(self.threads)
        self.images, self.steps_left = 0, steps - 1
        began = time.monotonic()
        self.until = began + seconds
        self.engine.run(self.batches, max_epochs=1, epoch_length=2**31)
        check_losses(self.trainer)
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return self.images / (time.monotonic() - began)

    def profile(self):
        """Milliseconds of a step by operation and by stage, from torch's profiler; stages overlap operations."""
        steps = 5
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.trainer.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler, Stages(self):
            self.run(0, steps)
        events, stages, operations = profiler.key_averages(), {}, {}
        total = sum(event.self_cpu_time_total for event in events)
        for event in sorted(events, key=lambda event: -event.self_cpu_time_total):
            if event.key.startswith("stage: "):
                stages[event.key.removeprefix("stage: ")] = event.cpu_time_total / steps / 1000
            elif event.self_cpu_time_total > SMALL * total:
                operations[event.key] = event.self_cpu_time_total / steps / 1000
        return dict(stages=stages, operations=operations)


class Stages:
    """Marks the stages of a step for the profiler, as long as it is entered."""

    def __init__(self, item):
        self.item, self.before = item, []

    def mark(self, owner, name, stage):
        plain = getattr(owner, name)

        def marked(*args, **kwargs):
            with torch.profiler.record_function(f"stage: {stage}"):
                return plain(*args, **kwargs)

        self.before.append((owner, name, plain))
        setattr(owner, name, marked)

    def __enter__(self):
        self.mark(torch.Tensor, "backward", "backward")
        self.mark(faic.train, "update_averages", "averages")
        self.mark(faic.trainer, "train_step", "step, with forward")
        for optimizer in self.item.trainer.optimizers.values():
            self.mark(optimizer, "step", "optimizer")
        batches = self.item.batches

        def marked():
            while True:
                with torch.profiler.record_function("stage: batch"):
                    batch = next(batches)
                yield batch

        self.plain, self.item.batches = batches, marked()

    def __exit__(self, *error):
        for owner, name, plain in self.before:
            setattr(owner, name, plain)
        self.item.batches = self.plain


def items_of(args, device, folder):
    """All trainers, warm."""
    choices = itertools.product(args.models, args.threads, args.precision, args.channels_last)
    for k, (model, threads, precision, channels_last) in enumerate(choices):
        changes = dict(args.set)
        if precision:
            changes |= dict(precision=precision)
        if channels_last is not None:
            changes |= dict(channels_last=channels_last)
        trainer = make_trainer(model, args.preset, changes, device, folder / str(k))
        item = Item(dict(model=model, threads=threads) | changes, trainer, threads)
        item.run(1, args.warmup)
        yield item


def findings(item, profiled):
    """What was measured of an item, which is also printed."""
    rates = [round(r, 2) for r in item.rates]
    found = item.names | dict(best=max(rates), median=round(statistics.median(item.rates), 2), rates=rates)
    named = ", ".join(f"{k} {v}" for k, v in item.names.items() if k != "model")
    summary = f"{found['best']:.2f} photographs/s (median {found['median']:.2f})"
    print(f"{item.names['model']:14} {named}: {summary}", flush=True)
    if profiled:
        found |= dict(profile=item.profile())
        for kind, times in found["profile"].items():
            listed = ", ".join(f"{n} {ms:.1f}" for n, ms in times.items())
            print(f"    {kind}, ms a step: {listed}", flush=True)
    return found


def option_value(text):
    """A value of an option: JSON, or a word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def comma_list(convert):
    """A function that reads a list with commas."""

    def read(text):
        return [convert(item) for item in text.split(",")]

    return read


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--preset", default="laptop", choices=tuple(PRESETS))
    parser.add_argument("--threads", type=comma_list(int), default=[torch.get_num_threads()])
    parser.add_argument("--precision", type=comma_list(str), default=[None], help="without it the preset's")
    parser.add_argument("--channels-last", type=comma_list(json.loads), default=[None], help="without it the preset's")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=5, help="steps, and at least a second")
    parser.add_argument("--neighbors", type=int, default=0, help="processes that keep a core busy each")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    args.set = {k: option_value(v) for k, v in (s.split("=", 1) for s in args.set)}
    return args


def main(words=None):
    args = parse(words)
    device = pick_device(args.device)
    neighbors = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.neighbors)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            items = list(items_of(args, device, Path(folder)))
            for _ in range(args.rounds):
                for item in items:
                    item.rates.append(item.run(args.seconds))
            found = [findings(item, args.profile) for item in items]
            for item in items:
                item.batches.close()
    finally:
        for process in neighbors:
            process.kill()
            process.wait()
    report = dict(device=device_name(device), torch=torch.__version__, preset=args.preset)
    report |= dict(neighbors=args.neighbors, seconds=args.seconds, items=found)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
