"""Kill phase 2 of each model at random moments, and count the bits that differ from a run that was left alone.

    python tests/trials/killed.py [--kills 8] [--seed 0] [--precision float32]

`--kills` is the number of SIGKILLs a model; after each the same command is started again, until it is done. A line
states where each kill hit, another one the result of each model. The exit code is 1 where a bit differs. Budgets are
small and checkpoints frequent, so that kills hit all stages: components, latents, days, checkpoints, evaluations.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

MODELS = ("pix2pix", "coltran", "bbdm")
STEPS = 60  # of a component; a day has a third of that


def work(model, precision):
    """Phase 2 of a model, in this process; prints when the imports are over."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from feature_nets import QuarterColors

    from faic.components import prepare_components
    from faic.core import Budget, pick_device
    from faic.dataset import load_photos
    from faic.days import run_days, study_run
    from faic.presets import PRESETS, all_components, default_sampling

    names = list(all_components())
    PRESETS["smoke"].components = dict.fromkeys(names, (f"{STEPS} steps", f"{STEPS} steps"))
    for changes in PRESETS["smoke"].changes.values():
        changes["precision"] = precision
    print("ready", flush=True)
    photos, cpu, feature_net = load_photos(), pick_device("cpu"), QuarterColors()
    often, budget = dict(save_minutes=0, check_every=3), Budget(5 * STEPS // 3, "steps")
    sampling = default_sampling(model, "smoke") | (dict(sample_steps=3) if model == "bbdm" else {})
    components, sampling = prepare_components(model, "phase2", "smoke", 0, photos, sampling, feature_net, cpu, **often)
    run = study_run("phase2", model, "default", "smoke", 0, photos, budget, cpu)
    run_days(run, photos, feature_net, sampling, cpu, components, **often)
    print("done", flush=True)


def start(model, runs, precision):
    """Start the work in a process of its own; returns when its imports are over."""
    environment = dict(os.environ, FAIC_RUNS=str(runs), OMP_NUM_THREADS="1")
    command = [sys.executable, __file__, "--work", model, "--precision", precision]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = subprocess.Popen(command, env=environment, **pipes)
    assert started.stdout.readline() == "ready\n", started.stderr.read()
    return started


def stage(runs):
    """Where a kill hit: the run folder that was written last, and its newest file."""
    files = [f for f in runs.glob("*/*") if f.is_file()]
    newest = max(files, key=lambda f: f.stat().st_mtime_ns, default=runs / "nothing" / "yet")
    return f"{newest.parent.name.rsplit('-smoke', 1)[0]}: {newest.name}"


def comparable(metrics):
    """The bytes of a table of metrics without its columns of seconds."""
    rows = [line.split(",") for line in metrics.read_text().splitlines()]
    columns = [i for i, name in enumerate(rows[0]) if "seconds" not in name]
    return "\n".join(",".join(row[i] for i in columns) for row in rows).encode()


def outcome(runs):
    """Name -> array: all weights and metrics of all runs."""
    found = {}
    for f in runs.glob("*/day-*.safetensors"):
        found |= {f"{f.parent.name}/{f.name}/{k}": v for k, v in load_file(f).items()}
    for f in runs.glob("*/metrics.csv"):
        found[f"{f.parent.name}/metrics"] = np.frombuffer(comparable(f), np.uint8)
    return found


def differing_bits(a, b):
    if a.shape != b.shape or a.dtype != b.dtype:
        return 8 * max(a.nbytes, b.nbytes)
    return int(np.unpackbits(np.frombuffer(a.tobytes(), np.uint8) ^ np.frombuffer(b.tobytes(), np.uint8)).sum())


@dataclass
class Result:
    kills: int
    compared: int  # bits
    differing: int  # bits


def compare(undisturbed, killed, kills):
    """The result of comparing two outcomes."""
    assert undisturbed.keys() == killed.keys(), undisturbed.keys() ^ killed.keys()
    compared = sum(8 * v.nbytes for v in undisturbed.values())
    return Result(kills, compared, sum(differing_bits(v, killed[k]) for k, v in undisturbed.items()))


def trial(model, kills, rng, folder, precision):
    """Run phase 2 undisturbed and with kills; the result of the worst comparison."""
    process = start(model, folder / "undisturbed", precision)
    began = time.monotonic()
    output, errors = process.communicate()
    assert "done" in output, errors
    seconds, made, results = time.monotonic() - began, 0, []
    undisturbed = outcome(folder / "undisturbed")
    while True:
        process = start(model, folder / "killed", precision)
        try:
            process.wait(rng.uniform(0, 2 * seconds / kills) if made < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            made += 1
            print(f"  {model}, kill {made}: {stage(folder / 'killed')}", flush=True)
            continue
        assert process.returncode == 0, process.stderr.read()
        results.append(compare(undisturbed, outcome(folder / "killed"), made))
        if made >= kills:
            return max(results, key=lambda result: (result.differing, result.kills))
        (folder / "killed").rename(folder / f"done-{len(results)}")  # the other kills hit a fresh start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=8, help="of each model")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--work", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.precision)
        return 0
    rng, total, wrong = random.Random(options.seed), 0, 0
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            result = trial(model, options.kills, rng, Path(folder), options.precision)
        print(
            f"{model}: {options.kills} kills, {result.compared:,} bits compared, {result.differing:,} differ",
            flush=True,
        )
        total, wrong = total + options.kills, wrong + result.differing
    print(json.dumps(dict(kills=total, differing_bits=wrong)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
