"""Stage `speed`: Table IV and training at the paper's size, what each means for the GPU, and what each trick brings."""

import copy
import math
import time

import numpy as np
import torch
from gpu_models import (
    PRECISIONS,
    generators,
    gray_images,
    machine,
    peak_gb,
    precision,
    stage_device,
    steps,
    synchronize,
    trainer_of,
    untrained,
)
from gpu_stage import Item, Lane, keep
from throughput import Item as Timed
from torch.utils.flop_counter import FlopCounterMode

import faic.coltran_sampler
from faic.benchmark import count_flop, matrix_rate, stages_of
from faic.coltran_sampler import RowBuffers, sample_row, sampling_cost
from faic.core import device_name
from faic.dataset import load_photos
from faic.presets import PAPER_MODELS, default_sampling, describe_sampling, make_colorizer, model_options
from faic.runs import provenance

IMAGES = 512  # that each component works on, at least
PAPER = 5000  # images in Table IV
GOALS = dict(pix2pix=10, coltran=90, bbdm=600)  # seconds for these on one H200
BATCHES = dict(pix2pix=256, coltran=256, bbdm=64)


def rates(device, rehearse, seconds):
    """What the machine can do: matrix products in each precision, and copies."""
    found = machine(device)
    for name in PRECISIONS:
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        with precision(name):
            if rehearse:
                a = torch.rand(256, 256).to(dtype)
                found[name] = 2 * 256**3 / clocked(lambda: a @ a, device, 2)["seconds"]
            else:
                found[name] = matrix_rate(device, dtype)
    block = torch.empty(2**20 if rehearse else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    found["copy"] = 2 * len(block) / clocked(lambda: target.copy_(block), device, 5)["seconds"]
    line = (
        f"{found['device']}, torch {found['torch']}: "
        + ", ".join(f"{n} {found[n] / 1e12:.1f} TFLOP/s" for n in PRECISIONS)
        + f", copies {found['copy'] / 1e12:.2f} TB/s"
    )
    return dict(line=line, **found)


def clocked(f, device, calls, patience=math.inf):
    """Seconds of a call after one to warm up: median, least, most; and how many calls the patience allowed."""
    f()
    synchronize(device)
    times, began = [], time.monotonic()
    while len(times) < calls and (not times or time.monotonic() - began + times[-1] < patience):
        start = time.perf_counter()
        f()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return dict(seconds=float(np.median(times)), low=min(times), high=max(times), calls=len(times))


def stage_flop(model, name, f):
    """Floating-point operations of a stage for an image; the colorizer's by arithmetic, as it is a captured graph."""
    if (model, name) != ("coltran", "colorizer"):
        return count_flop(f)
    o = model_options("coltran", "paper")
    layers = {k: o[k] for k in ("encoder_layers", "outer_layers", "inner_layers")}
    return 2 * sum(sampling_cost(o["side"] // 4, o["dim"], o["ff"], **layers).values())


def sampling(device, model, rehearse, best, seconds):
    """Table IV: each stage of a colorizer at the paper's size in each precision, projected to 5000 images."""
    began, want = time.monotonic(), 4 if rehearse else IMAGES
    size = 2 if rehearse else BATCHES[model]
    trainee, components = untrained(model, "paper", device)
    gray, chosen = gray_images(model, "paper", size, device), default_sampling(model, "paper")
    rows, order = [], [n for n in ("bfloat16", "TF32", "float32") if n in PRECISIONS]  # the one that matters first
    for k, name in enumerate(order):
        patience = math.inf if k == 0 else (seconds - (time.monotonic() - began)) * 0.4
        if patience < 1:
            break
        with precision(name) as cast:
            colorize = make_colorizer(model, trainee, chosen | dict(precision=cast), components)
            stages, before = stages_of(colorize), None
            for stage, f in stages.items():
                made, given = [], before

                def work(f=f, given=given, made=made):
                    made[:] = [f(gray, given, generators(size, device))]

                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                timed = clocked(work, device, max(1, -(-want // size)), patience / len(stages))
                times = getattr(colorize, "times", {}).get(stage, 1)
                one = first_image(given)
                flop = next((r["flop"] for r in rows if r["stage"] == stage), None) or stage_flop(
                    model, stage, lambda f=f, one=one: f(gray[:1], one, generators(1, device))
                )
                each = timed["seconds"] / size
                rows.append(
                    dict(
                        stage=stage,
                        times=times,
                        precision=name,
                        batch_size=size,
                        images=size * timed["calls"],
                        seconds_per_image=each,
                        low=timed["low"] / size,
                        high=timed["high"] / size,
                        flop=flop,
                        share=flop / each / best(name),
                        share_of_bfloat16=flop / each / best("bfloat16"),
                        peak_gb=peak_gb(device),
                    )
                )
                before = made[0]
                keep(rows=rows)
    whole = {
        n: sum(r["seconds_per_image"] * r["times"] for r in rows if r["precision"] == n) * PAPER
        for n in dict.fromkeys(r["precision"] for r in rows)
    }
    run = inference_run(model, chosen, rows, device, best)
    each = ", ".join(
        f"{r['stage']} {1e3 * r['seconds_per_image']:.3g} ms x {r['times']} "
        f"({100 * r['share_of_bfloat16']:.0f} % of the bfloat16 rate)"
        for r in rows
        if r["precision"] == order[0]
    )
    line = (
        f"{PAPER} images: "
        + ", ".join(f"{n} {s:.1f} s" for n, s in whole.items())
        + f" (goal {GOALS[model]} s); bfloat16, an image: {each}"
    )
    return dict(line=line, rows=rows, projected_seconds=whole, goal=GOALS[model], run=run)


def first_image(value):
    """What a stage made, of the first image only."""
    if isinstance(value, torch.Tensor):
        return value[:1]
    return tuple(first_image(v) for v in value) if isinstance(value, tuple) else value


def inference_run(model, chosen, rows, device, best):
    """The run that these times are, as the notebook inference_time makes it: options, provenance, metrics."""
    try:
        photos = load_photos(
            "embedded", model_options("pix2pix", "paper")["side"]
        )  # times do not depend on the photographs; a run names some
    except Exception:
        return None
    options = dict(
        phase="inference",
        model=model,
        preset="paper",
        seed=0,
        sampling=chosen,
        device=device.type,
        data=dict(name=photos.name, fingerprint=photos.fingerprint, side=photos.side),
    )
    options |= dict(latent="f4") if model == "bbdm" else {}
    metrics = [
        dict(
            stage=r["stage"],
            times=r["times"],
            batch_size=r["batch_size"],
            images=r["images"],
            precision=r["precision"],
            side=photos.side,
            sampling=describe_sampling(chosen),
            device=device_name(device),
            gflop_per_image=r["flop"] / 1e9,
            peak_share=r["share"],
            peak_gb=r["peak_gb"],
            cpu_seconds_per_image=float("nan"),
            **{
                f"seconds_per_image{end}": r[k]
                for end, k in (("", "seconds_per_image"), (" low", "low"), (" high", "high"))
            },
        )
        for r in rows
    ]
    return dict(
        options=options, made=provenance(device) | dict(caution=photos.caution, credits=photos.credits), metrics=metrics
    )


def training(device, model, rehearse, best, seconds):
    """Photographs per second of training at the paper's size and batch, in each precision and memory format."""
    rows, flop, began = [], None, time.monotonic()
    formats = (False,) if rehearse or model == "coltran" else (False, True)  # ColTran has no convolutions
    cases = [(name, last) for last in formats for name in ("bfloat16", "float32", "TF32") if name in PRECISIONS]
    for name, last in cases:
        if rows and time.monotonic() - began + rows[-1]["took"] > seconds:
            break
        start = time.monotonic()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with precision(name) as cast, trainer_of(model, "paper", device, precision=cast, channels_last=last) as trainer:
            if last and not rehearse:  # an option of the loop where it has one; else the networks are converted here
                for net in trainer.networks.values():
                    net.to(memory_format=torch.channels_last)
            if flop is None:
                with FlopCounterMode(display=False) as counter:
                    steps(trainer, 1)
                flop = counter.get_total_flops() / trainer.options["batch_size"]
            timed = Timed({}, trainer, torch.get_num_threads())
            timed.run(0.05 if rehearse else 1, 1 if rehearse else 3)  # to warm up
            rate = timed.run(0.05 if rehearse else 2, 1 if rehearse else 3)
            timed.batches.close()
            rows.append(
                dict(
                    precision=name,
                    channels_last=last,
                    photographs_per_second=rate,
                    share=flop * rate / best(name),
                    share_of_bfloat16=flop * rate / best("bfloat16"),
                    flop=flop,
                    batch_size=trainer.options["batch_size"],
                    peak_gb=peak_gb(device),
                    took=time.monotonic() - start,
                )
            )
            keep(rows=rows)
    names = [r["precision"] + (", channels last" if r["channels_last"] else "") for r in rows]
    rates = [f"{r['photographs_per_second']:.1f}/s ({100 * r['share_of_bfloat16']:.0f} %)" for r in rows]
    line = "; ".join(f"{name} {rate}" for name, rate in zip(names, rates))
    return dict(line=f"batch {rows[0]['batch_size']}, {flop / 1e9:.0f} GFLOP a photograph: {line}", rows=rows)


def graphs(device, rehearse, seconds):
    """A row of ColTran's pixels, and a step of BBDM's U-Net: launched one by one, and as a captured graph."""
    found, times = {}, 2 if rehearse else 10
    trainee, _ = untrained("coltran", "paper", device)
    with torch.no_grad():
        s = RowBuffers(trainee.net, 2 if rehearse else 256, 0.0)
        found["coltran, a row"] = launched(lambda: sample_row(s), device, times, seconds / 6)
        keep(seconds=found)
        for size in (1, 8) if rehearse else (1, 8, 64):
            step = denoising(device, size, torch.bfloat16, True)
            found[f"U-Net step, batch {size}"] = launched(step, device, times, seconds / 6)
    each = [f"{n}: {1e3 * t['eager']:.2f} ms, as a graph {t.get('graph', 'not tried')}" for n, t in found.items()]
    return dict(line="; ".join(each), seconds=found)


def launched(f, device, times, patience):
    """Seconds of a call, and milliseconds of its replay as a graph, or why it cannot be captured."""
    found = dict(eager=clocked(f, device, times, patience)["seconds"])
    if device.type == "cuda":
        try:
            replay = faic.coltran_sampler._graph(f, device)
            found["graph"] = f"{1e3 * clocked(replay, device, times)['seconds']:.2f} ms"
        except RuntimeError as error:
            found["graph"] = f"not captured: {str(error).splitlines()[0][:100]}"
    return found


def denoising(device, size, dtype, last):
    """A function that makes a step of BBDM's U-Net on fixed latents."""
    trainee, _ = untrained("bbdm", "paper", device)
    net = copy.deepcopy(trainee.net).to(dtype).eval()
    if last:
        net = net.to(memory_format=torch.channels_last)
    o = model_options("bbdm", "paper")
    side = o["side"] // o["factor"]
    x = torch.rand(size, o["latent_channels"], side, side, device=device).to(dtype)
    t = torch.full((size,), 500, device=device)
    context = None if o["conditioning"] == "nocond" else x

    @torch.no_grad()
    def step():
        return net(x, t, context)

    return step


def formats(device, rehearse, seconds):
    """A U-Net step and a Pix2Pix answer in each precision and memory format."""
    found, size, times = {}, 2 if rehearse else 64, 1 if rehearse else 5
    for name, dtype, last in (
        ("float32", torch.float32, False),
        ("bfloat16", torch.bfloat16, False),
        ("bfloat16, channels last", torch.bfloat16, True),
    ):
        with precision("float32"):
            found[f"U-Net step, {name}"] = (
                clocked(denoising(device, size, dtype, last), device, times, seconds / 8)["seconds"] / size
            )
            found[f"generator, {name}"] = (
                clocked(generating(device, size, dtype, last), device, times, seconds / 8)["seconds"] / size
            )
    return dict(line="; ".join(f"{n} {1e3 * s:.3g} ms an image" for n, s in found.items()), seconds_per_image=found)


def generating(device, size, dtype, last):
    """A function that makes Pix2Pix's answers to fixed gray images."""
    trainee, _ = untrained("pix2pix", "paper", device)
    net = copy.deepcopy(trainee.G).to(dtype).eval()
    L = (gray_images("pix2pix", "paper", size, device) * 2 - 1).to(dtype)
    if last:
        net, L = net.to(memory_format=torch.channels_last), L.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def answer():
        return net(L)

    return answer


def compiled(device, which, rehearse, seconds):
    """What torch.compile brings, and how long it takes; in a rehearsal with the backend that generates no code."""
    size, times = (1, 1) if rehearse else (64, 5)
    make = denoising if which == "U-Net step" else generating
    found = {}
    f = make(device, size, torch.bfloat16, True)
    found["eager"] = clocked(f, device, times, seconds / 4)["seconds"] / size
    began = time.monotonic()
    g = torch.compile(f, backend="eager" if rehearse else "inductor")
    g()
    synchronize(device)
    found["compiling"] = time.monotonic() - began
    found["compiled"] = clocked(g, device, times, seconds / 4)["seconds"] / size
    line = f"{1e3 * found['eager']:.3g} ms an image, compiled {1e3 * found['compiled']:.3g} ms, "
    return dict(line=line + f"after {found['compiling']:.1f} s", seconds=found)


def lanes(device_text, rehearse):
    """The lanes of the stage, one after the other, as they are timed; compiling, which may take minutes, comes last."""
    device = stage_device(device_text, rehearse)
    known = {}

    def best(name):
        """The machine's rate in a precision; measured again where the first item failed."""
        if name not in known:
            with precision(name):
                dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
                known[name] = 1e9 if rehearse else matrix_rate(device, dtype)
        return known[name]

    def of(name, work, *args, limit=60, least=2):
        limit = 4 * limit if rehearse else limit  # where other work slows it down
        return Item(name, lambda seconds: work(device, *args, seconds=seconds), limit, least)

    def main():
        items = [of("machine", rates, rehearse, limit=20)]
        for m, limit in (("pix2pix", 15), ("coltran", 45), ("bbdm", 35)):
            items.append(of(f"sampling {m}", sampling, m, rehearse, best, limit=limit))
        items += [of(f"training {m}", training, m, rehearse, best, limit=25) for m in PAPER_MODELS]
        return items + [of("graphs", graphs, rehearse, limit=15), of("formats", formats, rehearse, limit=15)]

    def compiling():
        names, least = (("generator",), 1) if rehearse else (("U-Net step", "generator"), 15)
        return [of(f"compile {n}", compiled, n, rehearse, limit=45, least=least) for n in names]

    return [Lane("main", main), Lane("compile", compiling, wave=1)]
