"""Stage `check`: does the GPU compute what the CPU and the official code do, and what does half precision change?"""

import contextlib
import io
import json
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
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
from gpu_stage import Item, Lane, keep, sentence
from safetensors.torch import load_file
from throughput import photographs

from faic.benchmark import matrix_rate
from faic.color import to_uint8
from faic.coltran import Colorizer, init_weights
from faic.coltran_sampler import make_cached_sampler, sample_naive
from faic.core import Budget, make_generator, set_deterministic
from faic.metrics import efficientnet_lite0, fid
from faic.presets import PAPER_MODELS, default_sampling, make_colorizer, make_trainee, model_options
from faic.runs import Run
from faic.trainer import Trainer, train_day

TESTS = Path(__file__).resolve().parents[1]
NARROW = dict(pix2pix=dict(width=32), bbdm=dict(channels=64))  # where checkpoints are written all the time
STEPS = 50  # whose losses are compared in each precision
CASES = tuple((temperature, norm) for temperature in (0.0, 1.0) for norm in ("row", "image"))
SLACK = 1e9  # of the goldens' tolerances, so that every comparison is made; what is above 1 is counted


class Outcomes:
    """A plugin that keeps what pytest found: test -> passed, failed or skipped, and why."""

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            reason = str(report.longrepr).strip().splitlines()[-1][-200:] if report.failed else ""
            self.found[report.nodeid.split("::")[-1]] = (report.outcome, reason)


def goldens(device, model, words, seconds):
    """The official code's numbers on this device: for each test the worst share of its tolerance."""
    with tempfile.TemporaryDirectory() as folder:
        file, outcomes = Path(folder) / "report.jsonl", Outcomes()
        os.environ |= dict(
            FAIC_GOLDEN=str(TESTS / "golden"),
            FAIC_GOLDEN_DEVICE=str(device),
            FAIC_GOLDEN_REPORT=str(file),
            FAIC_GOLDEN_SLACK=str(SLACK),
            PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        )
        with contextlib.redirect_stdout(io.StringIO()) as output:
            options = ["-q", "-k", words, "-p", "no:cacheprovider", "--rootdir", str(TESTS)]
            code = pytest.main([str(TESTS / f"test_golden_{model}.py"), *options], plugins=[outcomes])
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not outcomes.found:
        raise RuntimeError(f"pytest ended with {code} and ran nothing: {output.getvalue()[-300:]}")
    groups = {}
    for line in lines:
        group = groups.setdefault(line["test"], dict(comparisons=0, worst=0.0, tolerance=0.0, share=0.0))
        share = line["worst"] / line["tolerance"] if line["tolerance"] else float(line["worst"] > 0) * SLACK
        group["comparisons"] += 1
        if share >= group["share"]:
            group |= dict(worst=line["worst"], tolerance=line["tolerance"], share=share)
    broken = {name: why for name, (outcome, why) in outcomes.found.items() if outcome == "failed"}
    above = {name: g for name, g in groups.items() if g["share"] > 1}
    passed = sum(outcome == "passed" for outcome, _ in outcomes.found.values())
    worst = max((g["share"] for g in groups.values()), default=0.0)
    names = "".join(f"; {n}: {g['worst']:.1e} where {g['tolerance']:.0e} holds on a CPU" for n, g in above.items())
    comparisons = sum(g["comparisons"] for g in groups.values())
    line = f"{passed} tests ran, {len(broken)} failed, {comparisons} comparisons, "
    line += f"the worst {worst:.2g} of its tolerance{names}"
    return dict(line=line, groups=groups, failed=broken, above_tolerance=above)


def forked(work, errors):
    """Do some work in a process of its own, whose number this is. What went wrong is in the file `errors`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
        work()
        code = 0
    except BaseException as error:
        errors.write_text(sentence(error))
    finally:
        os._exit(code)


def resumed(device, model, rehearse, seconds):
    """The same training three times: left alone twice, and killed with SIGKILL in the middle and started again."""
    count, every = (6, 2) if rehearse else (60, 10)

    def work(folder):
        set_deterministic(device)
        options = model_options(model, "gpu") | ({} if rehearse else NARROW.get(model, {}))
        options |= dict(crop=options["side"], seed=0)
        array = photographs(64, options["load_side"])
        trainee, run, budget = make_trainee(model, options), Run(folder, dict(model=model)), Budget(count, "steps")
        often = dict(save_minutes=0, check_every=every)
        trainer = Trainer(trainee, run, array, np.arange(len(array)), budget, options, 1, device, **often)
        train_day(trainer.resume(), 1)

    with tempfile.TemporaryDirectory() as root:
        folders = {name: Path(root) / name for name in ("alone", "again", "killed")}
        for folder in folders.values():
            folder.mkdir()
        running = {name: forked(partial(work, folder), folder / "error") for name, folder in folders.items()}
        log, began = folders["killed"] / "log.jsonl", time.monotonic()
        wanted = random.Random(0).randint(count // 3, 2 * count // 3)
        while last_step(log) < wanted and time.monotonic() - began < seconds / 2:
            if os.waitpid(running["killed"], os.WNOHANG)[0]:
                error = folders["killed"] / "error"
                why = error.read_text() if error.exists() else "it was too quick"
                done = f"after step {last_step(log)} of {count}"
                raise RuntimeError(f"the run to be killed ended by itself {done}: {why}")
            time.sleep(0.005)
        os.kill(running["killed"], signal.SIGKILL)
        os.waitpid(running["killed"], 0)
        hit = last_step(log)
        running["killed"] = forked(partial(work, folders["killed"]), folders["killed"] / "error")
        codes = {name: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for name, pid in running.items()}
        if any(codes.values()):
            errors = [f"{n}: {(f / 'error').read_text()}" for n, f in folders.items() if (f / "error").exists()]
            raise RuntimeError(f"a run failed: {'; '.join(errors)}")
        events = [json.loads(line) for line in log.read_text().splitlines()]
        came_back = next((e["step"] for e in events if e.get("event") == "resumed"), None)
        if came_back is None:
            raise RuntimeError(f"killed at step {hit}, it began anew: there was no checkpoint")
        weights = {name: load_file(folder / "day-1.safetensors") for name, folder in folders.items()}
    differences = {name: far(weights["alone"], weights[name]) for name in ("again", "killed")}
    found = dict(equal=not differences["killed"], differences=differences, killed_after=hit, resumed_at=came_back)
    result = "the same weights, bit by bit"
    if not found["equal"]:
        result = f"weights differ by up to {differences['killed']:.1e}"
    if differences["again"]:
        result += f"; two runs that were left alone differ by {differences['again']:.1e}"
    return dict(line=f"killed after step {hit}, resumed at {came_back} of {count}: {result}", **found)


def last_step(log):
    """The last step in a log that is being written."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, IndexError):
        return max([json.loads(line).get("step", 0) for line in log.read_text().split("\n")[:-1]], default=0)
    return 0


def far(a, b):
    """The largest difference of two sets of weights; 0 where all bits are the same."""
    return max(0.0 if torch.equal(v, b[n]) else (v.double() - b[n].double()).abs().max().item() for n, v in a.items())


@dataclass(frozen=True)
class Sampled:
    """What the two samplers of ColTran's colorizer are compared on."""

    size: int
    dim: int
    images: int
    cases: tuple  # of (temperature, norm)
    dtype: torch.dtype = torch.float64

    def __str__(self):
        return f"{self.size}x{self.size}, {self.dim} channels, {str(self.dtype).removeprefix('torch.')}"


def sampler(device, what, seconds):
    """The cached sampler, on a GPU a captured graph, against the naive one, symbol by symbol."""
    net = Colorizer(what.size, what.size, what.dim, 4, what.dim, outer_layers=2, inner_layers=2)
    net = init_weights(net).to(device, what.dtype)
    gray = torch.randint(256, (what.images, what.size, what.size), generator=make_generator(1)).to(device)
    found, times = {}, dict(naive=0.0, cached=0.0)
    for temperature, norm in what.cases:
        fast = make_cached_sampler(net, what.images, temperature, norm)
        for first in (0, what.images):  # the graph is replayed for a second batch
            numbers = [[make_generator(0, i) for i in range(first, first + what.images)] for _ in range(2)]
            began = time.monotonic()
            naive = sample_naive(net, gray, numbers[0], temperature, norm)
            synchronize(device)
            between = time.monotonic()
            cached = fast(gray, numbers[1])
            synchronize(device)
            times["naive"] += between - began
            times["cached"] += time.monotonic() - between
            name = f"temperature {temperature}, norm {norm}, from image {first}"
            found[name] = first_differences(naive, cached)
            keep(cases=found)
    pictures, apart = len(found) * what.images, [d for case in found.values() for d in case]
    line = f"{pictures * what.size**2:,} symbols, naive {times['naive']:.1f} s, cached {times['cached']:.1f} s: "
    if apart:
        gap = max(d["gap"] for d in apart)
        line += f"{len(apart)} of {pictures} pictures differ from somewhere on; "
        line += f"the best two logits are {gap:.1e} apart there, or less"
    else:
        line += "all the same"
    return dict(line=line, cases=found, seconds=times, equal=not apart)


def first_differences(naive, cached):
    """Where each picture's symbols begin to differ, if they do, and how far apart the two best logits are there."""
    found = []
    for image, (a, b) in enumerate(zip(naive["symbols"].flatten(1).cpu(), cached.flatten(1).cpu())):
        where = (a != b).nonzero().flatten()
        if len(where):
            best, second = naive["logits"].flatten(1, 2)[image, where[0]].topk(2).values.tolist()
            found.append(dict(image=image, pixel=int(where[0]), gap=best - second))
    return found


def largest_difference(ours, theirs, term):
    """The largest relative difference of a term of the losses over the steps of two trainings."""
    return max(abs(a[term] - b[term]) / max(abs(a[term]), 1e-6) for a, b in zip(ours, theirs))


def precisions(device, model, rehearse, seconds):
    """Losses of the same steps, and answers of the same weights, in float32, TF32 and bfloat16."""
    count, images = (6, 2) if rehearse else (STEPS, 16)
    losses, peaks = {}, {}
    for name in PRECISIONS:
        with precision(name) as cast, trainer_of(model, "gpu", device, precision=cast) as trainer:
            losses[name], peaks[name] = steps(trainer, count), peak_gb(device)
            if name == "float32":
                state = {
                    n: {k: v.clone() for k, v in net.state_dict().items()}
                    for n, net in trainer.trainee.networks().items()
                }
    trainee, components = untrained(model, "gpu", device)
    for n, net in trainee.networks().items():
        net.load_state_dict(state[n])
    gray, answers = gray_images(model, "gpu", images, device), {}
    sampling = default_sampling(model, "gpu") | (dict(temperature=0.0) if model == "coltran" else {})
    for name in PRECISIONS:
        with precision(name) as cast:
            colorize = make_colorizer(model, trainee, sampling | dict(precision=cast), components)
            answers[name] = to_uint8(colorize(gray, generators(images)))
    others = [n for n in PRECISIONS if n != "float32"]
    terms = losses["float32"][0]
    apart = {o: {t: largest_difference(losses["float32"], losses[o], t) for t in terms} for o in others}
    ends = {n: {t: float(np.mean([step[t] for step in losses[n][-10:]])) for t in terms} for n in losses}
    pictures = {o: compare(answers["float32"], answers[o]) for o in others}
    sentences = [
        f"{o}: losses of {count} steps within {100 * max(apart[o].values()):.2g} %, "
        f"pictures {pictures[o]['mean']:.2f} levels apart (at most {pictures[o]['most']})"
        for o in others
    ]
    if model == "coltran":
        symbols = {o: greedy(device, trainee, gray, o) for o in others}
        sentences += [f"{o}: {100 * share:.2f} % of greedy symbols the same" for o, share in symbols.items()]
        pictures |= dict(greedy=symbols)
    return dict(
        line="; ".join(sentences),
        losses=losses,
        largest_relative_difference=apart,
        mean_of_last_10=ends,
        pictures=pictures,
        peak_gb=peaks,
    )


def compare(a, b):
    levels = (a.float() - b.float()).abs()
    return dict(mean=levels.mean().item(), most=int(levels.max()))


def greedy(device, trainee, gray, name):
    """The share of ColTran's greedy symbols that another precision leaves as they are in float32."""
    levels, found = (gray * 255).round().long()[:, 0], {}
    if levels.shape[-1] != trainee.low:
        levels = levels[:, :: levels.shape[-1] // trainee.low, :: levels.shape[-1] // trainee.low]
    for n in ("float32", name):
        with precision(n) as cast:
            found[n] = make_cached_sampler(trainee.net, len(levels), 0.0, "row", cast)(levels)
    return (found["float32"] == found[name]).double().mean().item()


def memory(device, preset, seconds):
    """Peak memory of a training step of each model."""
    found = {}
    for model in PAPER_MODELS:
        for cast in ("float32", "bfloat16"):
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            with trainer_of(model, preset, device, precision=cast) as trainer:
                steps(trainer, 2)
                found[f"{model}, {cast}"] = dict(peak_gb=peak_gb(device), batch_size=trainer.options["batch_size"])
                del trainer
    line = "; ".join(f"{n} {f['peak_gb']} GB (batch {f['batch_size']})" for n, f in found.items())
    return dict(line=line, found=found)


def scoring(device, rehearse, seconds):
    """Do scores depend on the device? FID of gray images from photographs, its network in each precision."""
    count = 6 if rehearse else 250
    pixels = torch.from_numpy(photographs(count, 64)).permute(0, 3, 1, 2) / 255
    gray = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    found = {}
    for name, where in (("CPU", torch.device("cpu")), *((n, device) for n in ("float32", "TF32") if n in PRECISIONS)):
        net = efficientnet_lite0(where)
        with precision("float32" if name == "CPU" else name):
            features = [net(x.to(where))[0].cpu() for x in (pixels, gray)]
        found[name] = dict(fid=float(fid(*features)), features=features[0])
    sizes = {n: f.pop("features") for n, f in found.items()}
    apart = {n: (f - sizes["CPU"]).norm().item() / sizes["CPU"].norm().item() for n, f in sizes.items()}
    line = ", ".join(f"{n} {f['fid']:.4f} (features {apart[n]:.1e} from the CPU's)" for n, f in found.items())
    return dict(line=f"FID of {count} gray images: {line}", found=found, features_apart=apart)


def about_machine(device, rehearse, seconds):
    found = machine(device)
    if not rehearse:
        for name in PRECISIONS:
            with precision(name):
                dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
                found[f"{name} TFLOP/s"] = round(matrix_rate(device, dtype) / 1e12, 1)
    return dict(line=", ".join(f"{k} {v}" for k, v in found.items()), **found)


def lanes(device_text, rehearse):
    """The lanes of the stage. A process that only forks others opens no GPU."""
    device = stage_device(device_text, rehearse)
    words = "discriminator or dropout" if rehearse else ""
    models = PAPER_MODELS[:1] if rehearse else PAPER_MODELS
    golden_models = ("pix2pix",) if rehearse else ("pix2pix", "coltran", "vqgan", "bbdm")

    def of(name, work, *args, limit=60):
        limit = 4 * limit if rehearse else limit  # where other work slows it down
        return Item(name, lambda seconds: work(device, *args, seconds=seconds), limit)

    def main():
        tiny = Sampled(8, 8, 2, CASES[1:3])
        small, paper = Sampled(16, 64, 4, CASES), Sampled(64, 512, 4, CASES[:3:2])
        exact = [tiny] if rehearse else [small]
        late = [] if rehearse else [paper, replace(paper, cases=CASES[:1], dtype=torch.float32)]
        items = [of("machine", about_machine, rehearse), of("scoring", scoring, rehearse, limit=20)]
        items += [of(f"sampler {s}", sampler, s, limit=45) for s in exact]
        items += [of(f"precision {model}", precisions, model, rehearse, limit=45) for model in PAPER_MODELS]
        items += [of(f"sampler {s}", sampler, s, limit=45) for s in late]
        return items + [of("memory", memory, "paper", limit=40)]

    return [
        Lane("main", main),
        Lane("goldens", lambda: [of(f"goldens {m}", goldens, m, words, limit=90) for m in golden_models]),
        Lane("resume", lambda: [of(f"resume {m}", resumed, m, rehearse, limit=90) for m in models]),
    ]
