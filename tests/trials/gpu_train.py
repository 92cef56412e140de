"""Stage `train`: the whole study with the preset gpu, in days as long as the time allows.

The GPU trains and colorizes. Other processes make the statistics of an evaluation meanwhile: two jackknifed Frechet
distances of 1000 images take a core half a minute. Everything is a run as the notebooks make it.
"""

import copy
import io
import json
import math
import os
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from gpu_models import machine, precision, stage_device, synchronize, untrained
from gpu_photos import unpack
from gpu_stage import Item, Lane, keep, supervise, write_json
from safetensors import safe_open
from safetensors.torch import save

from faic.components import PHASE_DAYS, SCORED_SPLIT, make_trainer, prepare_components, study_photos
from faic.core import pick_device, read_json, runs_dir, set_deterministic, write_bytes
from faic.days import missing_rows, run_baselines, study_run
from faic.evaluate import evaluate, features_of, sample_rows
from faic.intervals import summarize
from faic.metrics import efficientnet_lite0
from faic.presets import (
    PAPER_MODELS,
    PRESETS,
    components_of,
    day_budget,
    default_sampling,
    default_variant,
    default_variants,
    describe_sampling,
    make_colorizer,
    make_trainee,
)
from faic.resume import load_weights, work_done
from faic.runs import keep_samples, primary_rows, read_runs
from faic.selection import phase1_winner
from faic.winner import write_winner
from faic.trainer import train_day

MODELS = PAPER_MODELS
PRESET = "gpu"
EVAL_BATCH = dict(cuda=250, cpu=10)  # photographs that are colorized together when they are scored
SCORED = 1000  # photographs of a split
MIN_DAY = 10.0  # seconds
COMPONENT_SHARE = 0.5  # of a day: what a component gets in each phase
RUN = 1.0  # seconds of a run for what is not measured: its files, its lists
RESERVE = 30.0  # seconds at the end for the last scores and for packing
FILE, BACK = 16 * 2**20 - 2**16, 60 * 2**20  # bytes of a file and of all files that come back


def without_gpu():
    """For processes that only compute on the CPU, a core each."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)


def statistics(per_image, fake, real, other, network_name, seed):
    """In a process of its own: a row of metrics, or half of one."""
    pairs = [pair and tuple(torch.from_numpy(x) for x in pair) for pair in (fake, real, other)]
    return summarize(per_image, *pairs, network_name, seed)


def baselines(phase, data):
    """In a process of its own: score the gray image and the real photographs, on the CPU."""
    cpu = pick_device("cpu")
    run_baselines(phase, PRESET, study_photos(data, PRESET), efficientnet_lite0(cpu), cpu)


def in_float32(forward):
    """A feature network's function without TF32, so that scores do not depend on the device."""

    def exact(rgb):
        with precision("float32"):
            return forward(rgb)

    return exact


class Study:
    """What the items share: device, photographs, processes for statistics, scores that are still being made."""

    def __init__(self, device, chunks, work, rehearse, plan):
        self.device, self.chunks, self.work, self.rehearse, self.plan = device, chunks, Path(work), rehearse, plan
        self.pending, self.loaded = [], None
        cores = len(os.sched_getaffinity(0))
        self.pool = ProcessPoolExecutor(max(1, cores - 2), mp_context=get_context("fork"), initializer=without_gpu)
        self.pool.submit(int).result()  # all are forked now, before this process opens the GPU

    def place(self):
        """(photographs, feature network), made when they are first asked for."""
        if self.loaded is None:
            set_deterministic(self.device)
            prepared, _, found = unpack(self.chunks, self.work / "photographs", self.pool)
            photos = study_photos(str(prepared), PRESET)
            feature_net = efficientnet_lite0(self.device)
            feature_net.forward = in_float32(feature_net.forward)
            self.loaded, self.data, self.found = (photos, feature_net), str(prepared), found
        return self.loaded

    def summarize_later(self, per_image, fake, real, other, network_name, seed=0):
        """In place of `summarize`: other processes make the row, in halves."""
        fake, real, other = (pair and tuple(x.numpy() for x in pair) for pair in (fake, real, other))
        paired = self.pool.submit(statistics, per_image, fake, real, None, network_name, seed)
        unpaired = self.pool.submit(statistics, None, fake, None, other, network_name, seed)
        return dict(halves=[paired, unpaired])

    def evaluate(self, colorize, trainee, photos, split, seed, summarize):
        """Score a colorizer; random numbers are drawn on the device, as a CPU takes long for ColTran's."""
        numbers = dict(seed=seed, device=self.device, noise_device=self.device)
        gray = dict(gray_kind=trainee.gray_kind, copies_lightness=trainee.keeps_lightness)
        size, (_, feature_net) = EVAL_BATCH[self.device.type], self.place()
        return evaluate(colorize, photos, split, feature_net, batch_size=size, summarize=summarize, **gray, **numbers)

    def day_seconds(self):
        return json.loads((self.work / "day.json").read_text())["seconds"]

    def budget(self):
        return f"{self.day_seconds() / 3600:.4g} hours"

    def score(self, run, day, weights, sampling, components, trainee):
        """Colorize and score with a copy of a trainee; the row is added when its statistics are made."""
        missing = missing_rows(run, trainee, day, sampling)
        if not missing:
            return 0.0
        began, o = time.monotonic(), run.options
        photos, _ = self.place()
        twin = load_weights(copy.deepcopy(trainee), weights, self.device)
        colorize = make_colorizer(o["model"], twin, sampling, components)
        split = SCORED_SPLIT[o["phase"]]
        rows, samples = self.evaluate(colorize, twin, photos, split, o["seed"], self.summarize_later)
        keep_samples(run, samples, day, describe_sampling(sampling))
        for lightness in missing:
            head = dict(day=day, **work_done(weights), sampling=describe_sampling(sampling), lightness=lightness)
            self.pending.append((run, head, rows[lightness]))
        return time.monotonic() - began

    def add_rows(self, wait=False):
        """Add the rows whose statistics are made, in order; with `wait` all of them."""
        while self.pending:
            run, head, row = self.pending[0]
            if not wait and not all(h.done() for h in row["halves"]):
                return
            self.pending.pop(0)
            try:
                paired, unpaired = (h.result() for h in row["halves"])
            except Exception as error:  # a process for statistics is gone; the last item makes the row again if it can
                print(f"train: no scores of {run.path.name}, day {head['day']}: {error}", flush=True)
                continue
            found = paired | {k: v for k, v in unpaired.items() if k.startswith("unpaired") or k == "n other"}
            run.add_metrics(head | {k: v for k, v in row.items() if k != "halves"} | found)

    def components(self, model, phase, seed):
        """(component -> network, sampling with their name); trained where they are not there."""
        (photos, feature_net), sampling = self.place(), default_sampling(model, PRESET)
        return prepare_components(model, phase, PRESET, seed, photos, sampling, feature_net, self.device)


def photographs(study, seconds):
    """Unpack and prepare the photographs and compute their features; score the baselines meanwhile."""
    began = time.monotonic()
    photos, feature_net = study.place()
    ready = time.monotonic() - began
    for split in ("validation", "test"):
        features_of(photos, split, feature_net, study.device)
    study.baselines = [study.pool.submit(baselines, phase, study.data) for phase in ("phase1", "phase2")]
    counts = {split: len(rows) for split, rows in photos.splits.items()}
    line = f"{counts['train']} to train on, {counts['validation']} and {counts['test']} to score, "
    line += f"ready after {ready:.1f} s, fingerprint {photos.fingerprint}"
    return dict(line=line, machine=machine(study.device), counts=counts, **study.found)


def no_statistics(*args):
    """In place of `summarize`, where only the rest of an evaluation is timed."""
    return {}


def measure_days(study, deadline, seconds):
    """How long scoring and saving take; from that and the time left, how long a day is, and how many variants."""
    photos, _ = study.place()
    rows = {split: photos.splits[split] for split in ("validation", "test")}
    fewer = {split: r[sample_rows(len(r), EVAL_BATCH["cuda"])] for split, r in rows.items()}
    few, scoring, making = replace(photos, splits=photos.splits | fewer), {}, {}
    times = len(rows["validation"]) / len(fewer["validation"])
    for model in study.plan["models"]:
        began = time.monotonic()
        trainee, components = untrained(model, PRESET, study.device)
        making[model] = time.monotonic() - began
        colorize = make_colorizer(model, trainee, default_sampling(model, PRESET), components)
        for _ in range(1 if study.rehearse else 2):  # once to warm up
            began = time.monotonic()
            study.evaluate(colorize, trainee, few, "validation", 0, no_statistics)
            synchronize(study.device)
            scoring[model] = (time.monotonic() - began) * times
        scoring[model] += 2 * writing(trainee, study.work / "weights")  # and reading
    left = deadline - time.monotonic() - RESERVE
    found = dict(day_length(study.plan, scoring, making, left), scoring=scoring, making=making)
    write_json(study.work / "day.json", found)
    short = " (less than wanted: too little time)" if found["short"] else ""
    line = f"{found['seconds']:g} s a day, {found['variants']} variants a model{short}; scoring and saving take "
    return dict(line=line + ", ".join(f"{m} {s:.1f} s" for m, s in scoring.items()), left=left, **found)


def writing(trainee, path):
    """Seconds for writing the weights of a day."""
    began = time.monotonic()
    weights = {f"{n}.{k}": v.contiguous() for n, net in trainee.networks().items() for k, v in net.state_dict().items()}
    write_bytes(path, save(weights))
    path.unlink()
    return time.monotonic() - began


def component_days(model):
    """Days that the training of a model's components takes in both phases together."""
    return 2 * COMPONENT_SHARE * len(components_of(model, preset=PRESET))


def day_length(plan, scoring, making, left):
    """Seconds of a day: what scoring leaves, shared by all days; fewer variants where a day would be too short."""
    least, most = plan["day"]
    for variants in plan["variants"]:
        days, other = 0.0, 0.0
        for model, s in scoring.items():
            number = min(variants, len(default_variants(model))) if model in plan["phase1"] else 0
            components, seeds = component_days(model), len(plan["seeds"])
            days += number + seeds * (PHASE_DAYS["phase2"] + components)
            other += (number + seeds) * (making[model] + RUN) + (number + seeds * PHASE_DAYS["phase2"]) * s
        seconds = 0.97 * (left - other) / days
        if seconds >= least:
            break
    return dict(seconds=float(f"{min(most, max(least, seconds)):.4g}"), variants=variants, short=seconds < least)


def variant(study, model, name, seconds):
    """A variant of phase 1, or nothing where it was left out."""
    known = json.loads((study.work / "day.json").read_text())
    if default_variants(model).index(name) >= known["variants"]:
        return dict(line="left out: too little time")
    return train(study, model, "phase1", name, 0)


def phase2(study, model, seed, deadline, seconds):
    """Five days of the winner; with a further seed only where the time reaches to their end."""
    study.add_rows()
    photos, _ = study.place()
    known, plan = json.loads((study.work / "day.json").read_text()), study.plan
    each = known["seconds"] + known["scoring"][model]
    needs = PHASE_DAYS["phase2"] * each + component_days(model) * known["seconds"]
    if seed != plan["seeds"][0] and deadline - RESERVE - time.monotonic() < needs:
        return dict(line=f"not begun: it takes {needs:.0f} s")
    name, why = plan["winners"].get(model), "as asked for"
    if not name and model in plan["phase1"]:
        while any(r.options["model"] == model and r.options["phase"] == "phase1" for r, _, _ in study.pending):
            time.sleep(0.2)
            study.add_rows()
        name, why = phase1_winner(model, PRESET, 0, photos, str(day_budget(PRESET, study.budget())))
    elif not name:
        name, why = winners().get(model), "the winner of an earlier phase 1 on this machine"
    if not name:
        name, why = default_variant(model), "the paper's winner"
    found = train(study, model, "phase2", name, seed)
    return found | dict(line=f"{found['line']}; {name} is {why}", variant=name, why=why)


def train(study, model, phase, name, seed):
    """A run, day by day."""
    began = time.monotonic()
    photos, _ = study.place()
    set_component_budgets(study)
    components, sampling = study.components(model, phase, seed)
    waited, days, scoring = time.monotonic() - began, PHASE_DAYS[phase], 0.0
    budget = day_budget(PRESET, study.budget()) * days
    run = study_run(phase, model, name, PRESET, seed, photos, budget, study.device)
    # no checkpoints: those of a large network take as long as its day; components have them, as phase 2 needs them
    options = dict(components=components, save_minutes=math.inf)
    trainer = make_trainer(run, photos, phase, days, study.device, **options)
    for day in range(1, days + 1):
        weights = train_day(trainer, day)
        scoring += study.score(run, day, weights, sampling, components, trainer.trainee)
        study.add_rows()
        keep(run=run.path.name, day=day, **work_done(weights))
    done = work_done(weights)
    seen = done["step"] * run.options["train"]["batch_size"]
    rate = seen / max(done["training_seconds"], 1e-9)
    line = f"{run.path.name}: {done['step']:,} steps, {seen:,} photographs in {done['training_seconds']:.1f} s "
    line += f"({rate:.0f}/s), scoring {scoring:.1f} s"
    return dict(
        line=line + (f", components {waited:.1f} s" if components else ""),
        run=run.path.name,
        **done,
        photographs=seen,
        scoring_seconds=scoring,
    )


def set_component_budgets(study):
    """Components get a share of a day, however long that is."""
    share = f"{COMPONENT_SHARE * study.day_seconds() / 3600:.4g} hours"
    PRESETS[PRESET].components = dict.fromkeys(PRESETS[PRESET].components, (share, share))


def scores(study, seconds):
    """Wait for all statistics; score what a broken process left unscored."""
    set_component_budgets(study)
    for run in [r for r in read_runs(preset=PRESET) if r.options["phase"] in PHASE_DAYS and "train" in r.options]:
        o, known = run.options, set(run.metrics().get("day", []))
        known |= {head["day"] for r, head, _ in study.pending if r.path == run.path}
        files = {int(f.stem.split("-")[1]): f for f in run.path.glob("day-*.safetensors")}
        ours = o["budget"] == str(day_budget(PRESET, study.budget()) * PHASE_DAYS[o["phase"]])
        if ours and files.keys() - known:
            components, sampling = study.components(o["model"], o["phase"], o["seed"])
            trainee = make_trainee(o["model"], o["train"], components=components)
            for day in sorted(files.keys() - known):
                study.score(run, day, files[day], sampling, components, trainee)
    study.add_rows(wait=True)
    for task in getattr(study, "baselines", []):
        task.result()
    for model in study.plan["models"]:
        if runs := [r for r in read_runs(preset=PRESET, phase="phase1", model=model) if len(r.metrics())]:
            write_winner(runs)
    rows = {
        r.path.name: primary_rows(r).iloc[-1]
        for r in read_runs(preset=PRESET)
        if r.options["phase"] in ("phase1", "phase2") and len(r.metrics())
    }
    fid = {
        n: next((row[c] for c in row.index if c.startswith("FID (") and c.endswith(")")), float("nan"))
        for n, row in rows.items()
    }
    return dict(line="FID: " + ", ".join(f"{n.rsplit('-gpu', 1)[0]} {v:.1f}" for n, v in fid.items()), fid=fid)


def winners():
    """Model -> variant that phase 1 chose, of the runs there are."""
    return {
        r.options["model"]: read_json(r.path / "winner.json")["variant"]
        for r in read_runs(preset=PRESET, phase="phase1")
        if (r.path / "winner.json").exists()
    }


def lanes(device_text, rehearse, chunks, work, limit, only="", wanted=None, seeds=(0,), day=0.0):
    """The lane of the stage."""
    device, deadline = stage_device(device_text, rehearse), time.monotonic() + limit
    if not rehearse:
        PRESETS[PRESET].scored = SCORED
    plan = dict(models=MODELS, phase1=MODELS, winners=wanted or {}, seeds=seeds, variants=(4, 3, 2))
    plan |= dict(day=(day, day) if day else (MIN_DAY, math.inf))
    if rehearse:
        plan |= dict(day=(0.1, 0.1), variants=(2,), phase1=MODELS[:1])
    if only == "phase2":
        plan |= dict(variants=(0,), phase1=())

    def make():
        study = Study(device, chunks, work, rehearse, plan)
        least, reserve = (0.1, 3) if rehearse else (5, RESERVE)

        def of(name, work, *args, limit=120, reserve=reserve):
            return Item(name, lambda seconds: work(study, *args, seconds=seconds), limit, least, reserve)

        items = [of("photographs", photographs, limit=60), of("day", measure_days, deadline, limit=60)]
        items += [of(f"phase1 {m} {v}", variant, m, v) for m in plan["phase1"] for v in default_variants(m)]
        items += [of(f"phase2 {m} seed {s}", phase2, m, s, deadline, limit=480) for s in seeds for m in MODELS]
        return items + [of("scores", scores, limit=60, reserve=0)]

    return [Lane("study", make)]


def pack_runs(out):
    """Options, rows of metrics, logs and samples of all runs in one file; its size."""
    kept = ("options.json", "metrics.csv", "log.jsonl", "winner.json", "error.json")
    files = [
        f for run in read_runs() for f in sorted(run.path.rglob("*")) if f.name in kept or f.parent.name == "samples"
    ]
    return write_tar(out / "runs.tar.xz", [(f.relative_to(runs_dir()).as_posix(), f) for f in files], "xz")


def write_tar(path, files, kind):
    unfinished = path.with_name(f".{path.name}.part")
    with tarfile.open(unfinished, f"w:{kind}", **(dict(preset=6) if kind == "xz" else {})) as tar:
        for name, file in files:
            tar.add(file, name, recursive=False)
    os.replace(unfinished, path)
    return path.stat().st_size


def half(path):
    """The bytes of a file of weights, floats in half precision, with its metadata."""
    with safe_open(path, "pt") as f:
        metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    return save(
        {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}, metadata | dict(precision="float16")
    )


def pack_weights(out, room):
    """The last day's weights of phase 2 and of components in half precision, as far as they fit; what was left out."""
    runs = [
        r
        for r in read_runs(preset=PRESET)
        if r.options["phase"] in ("phase2", "component") and list(r.path.glob("day-*.safetensors"))
    ]

    def rank(run):
        o = run.options
        return o["seed"], o.get("of") == "phase1", MODELS[::-1].index(o["model"]) if o["model"] in MODELS else 0

    stream, left = io.BytesIO(), []
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for run in sorted(runs, key=rank):
            file = max(run.path.glob("day-*.safetensors"), key=lambda f: int(f.stem.split("-")[1]))
            size = file.stat().st_size // 2  # nearly: all numbers are floats
            if stream.tell() + size + 2**16 > room:
                left.append(f"{run.path.name}: {size / 2**20:.0f} MiB")
                continue
            content = half(file)
            info = tarfile.TarInfo(f"{run.path.name}/{file.name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    data = stream.getvalue()
    for k in range(0, len(data), FILE):
        (out / f"weights.tar.{k // FILE + 1}").write_bytes(data[k : k + FILE])
    return left


def train_stage(out, device, rehearse, limit, chunks, work, **plan):
    """Run the stage and pack what it made; its report. `plan`: see lanes."""
    began, out, work = time.monotonic(), Path(out), Path(work)
    work.mkdir(parents=True, exist_ok=True)
    os.environ["FAIC_RUNS"] = str(work / "runs")
    packed, limit = [0.0], limit - min(20, limit / 10)

    def changed():
        if time.monotonic() - packed[0] > 20:
            packed[0] = time.monotonic()
            pack_runs(out)

    report = supervise("train", out, limit, lanes(device, rehearse, chunks, work, limit, **plan), changed=changed)
    size = pack_runs(out)
    left = pack_weights(out, BACK - size - 2**20)
    report |= dict(winners=winners(), weights_left_out=left, seconds_with_packing=round(time.monotonic() - began, 1))
    write_json(out / "train.json", report)
    files = {f.name: f.stat().st_size for f in sorted(out.iterdir()) if f.name.startswith(("runs", "weights", "train"))}
    print(
        f"train: {', '.join(f'{n} {s / 2**20:.1f} MiB' for n, s in files.items())}; "
        f"weights left out: {', '.join(left) or 'none'}; winners: {report['winners']}",
        flush=True,
    )
    return report
