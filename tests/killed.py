"""Kill phase 2 of each model with SIGKILL at random moments, start it again until it is done, and count the bits that differ from a run that was left alone.

    python tests/killed.py [KILLS A MODEL, 8] [SEED, 0] [PRECISION, float32 or bfloat16]

Prints a line a kill (where it hit) and a line a model; exits with 1 where a bit differs. Budgets are small, checkpoints frequent, so that kills hit all stages: parts, latents, days, checkpoints, evaluations.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

MODELS = ("pix2pix", "coltran", "bbdm")
STEPS = 60  # a part; a day has a third of that


def work(model, precision):
    """Phase 2 of a model, in this process; says when the imports are over."""
    from phases import Judge

    import faic.components
    import faic.trainer
    from faic.components import prepare_components
    from faic.core import Budget, pick_device
    from faic.dataset import load_photos
    from faic.days import run_days, study_run
    from faic.presets import PRESETS, all_components, default_sampling

    class Saving(faic.trainer.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, save_minutes=0, **kwargs)

    faic.components.Trainer, faic.trainer.CHECK_EVERY = Saving, 3
    PRESETS["smoke"].components = {c: (f"{STEPS} steps",) * 2 for c in all_components()}
    for changes in PRESETS["smoke"].changes.values():
        changes["precision"] = precision
    print("ready", flush=True)
    photos, cpu = load_photos(), pick_device("cpu")
    sampling = default_sampling(model, "smoke") | (dict(sample_steps=3) if model == "bbdm" else {})
    components, sampling = prepare_components(model, "phase2", "smoke", 0, photos, sampling, Judge(), cpu)
    run_days(
        study_run("phase2", model, "default", "smoke", 0, photos, Budget(5 * STEPS // 3, "steps"), cpu),
        photos,
        Judge(),
        sampling,
        cpu,
        components,
    )
    print("done", flush=True)


def start(model, runs, precision):
    environment = dict(os.environ, FAIC_RUNS=str(runs), OMP_NUM_THREADS="1")
    started = subprocess.Popen(
        [sys.executable, __file__, "--work", model, precision],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout.readline() == "ready\n", started.stderr.read()
    return started


def stage(runs):
    """Where a kill hit: the run folder that was written last, and its newest file."""
    files = [f for f in runs.glob("*/*") if f.is_file()]
    newest = max(files, key=lambda f: f.stat().st_mtime_ns, default=runs / "nothing" / "yet")
    return f"{newest.parent.name.rsplit('-smoke', 1)[0]}: {newest.name}"


def outcome(runs):
    """All weights and metrics of all runs."""
    found = {
        f"{f.parent.name}/{f.name}/{k}": v for f in runs.glob("*/day-*.safetensors") for k, v in load_file(f).items()
    }
    for f in runs.glob("*/metrics.csv"):
        lines = [line.split(",") for line in f.read_text().splitlines()]
        kept = [i for i, name in enumerate(lines[0]) if "seconds" not in name]
        found[f"{f.parent.name}/metrics"] = np.frombuffer(
            "\n".join(",".join(line[i] for i in kept) for line in lines).encode(), np.uint8
        )
    return found


def bits(a, b):
    if a.shape != b.shape or a.dtype != b.dtype:
        return 8 * max(a.nbytes, b.nbytes)
    return int(np.unpackbits(np.frombuffer(a.tobytes(), np.uint8) ^ np.frombuffer(b.tobytes(), np.uint8)).sum())


def trial(model, kills, rng, folder, precision):
    """(kills made, bits compared, bits that differ)"""
    began = time.monotonic()
    whole = start(model, folder / "whole", precision)
    began = time.monotonic()
    said, errors = whole.communicate()
    assert "done" in said, errors
    seconds, made = time.monotonic() - began, 0
    while True:
        started = start(model, folder / "killed", precision)
        try:
            started.wait(rng.uniform(0, 2 * seconds / kills) if made < kills else None)
            assert started.returncode == 0, started.stderr.read()
            if made >= kills:
                break
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
            made += 1
            print(f"  {model}, kill {made}: {stage(folder / 'killed')}", flush=True)
            continue
        if made < kills:  # it was faster than the kills: the rest hits a fresh start
            (folder / "killed").rename(folder / f"done-{made}")
            check(model, outcome(folder / "whole"), outcome(folder / f"done-{made}"))
    compared, differing = check(model, outcome(folder / "whole"), outcome(folder / "killed"))
    return made, compared, differing


def check(model, whole, killed):
    assert whole.keys() == killed.keys(), whole.keys() ^ killed.keys()
    return sum(8 * v.nbytes for v in whole.values()), sum(bits(v, killed[k]) for k, v in whole.items())


def main(kills=8, seed=0, precision="float32"):
    rng, total, wrong = random.Random(int(seed)), 0, 0
    for model in MODELS:
        with tempfile.TemporaryDirectory() as d:
            made, compared, differing = trial(model, int(kills), rng, Path(d), precision)
        print(f"{model}: {made} kills, {compared:,} bits compared, {differing:,} differ", flush=True)
        total, wrong = total + made, wrong + differing
    print(json.dumps(dict(kills=total, differing_bits=wrong)))
    return wrong


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        sys.exit(1 if main(*sys.argv[1:]) else 0)
