"""What a network learns in a given time or number of steps: trained on phase 1's photographs, scored on validation.

    python tests/trials/learning.py FOLDER [--preset laptop] [--minutes 6 | --steps 1500] [--out learning.csv]
        pix2pix 'coltran:dim=64;ff=64' 'bbdm:channels=48;precision=float32' 'palette:objective=v;sampler=heun' ...

Each item is a model with changed options, of its training or of its sampling. A line states the photographs seen, FID,
chroma error and colorfulness; the same rows go into the CSV file, with the 95 % intervals (' low' and ' high') of FID
and of the scores. A model that generates the lightness is scored with the photograph's lightness, too: its row of that
kind says so under `lightness`. Runs lie in FAIC_RUNS. An item whose run is there already is not trained again, and
items that differ in their sampling alone share a run. All items share ColTran's color upsampler, which is the
preset's. `--scored` sets how many validation photographs are colorized.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from throughput import option_value

from faic.components import data_options, make_trainer, prepare_components, study_photos
from faic.core import Budget
from faic.days import evaluate_day
from faic.evaluate import sample_rows
from faic.metrics import column_name, efficientnet_lite0
from faic.presets import PRESETS, default_sampling, describe_sampling, model_options
from faic.runs import open_run
from faic.trainer import train_day

COLUMNS = ("PSNR", "chroma error", "colorfulness")
# options that not every model has
OPTIONAL = {"precision", "accumulate", "warmup", "weight_decay", "clip_weights", "lr_factors", "l1_first"}


def item(text):
    """'bbdm:channels=48;loss=l2' -> (model, changes); options are JSON values or words, ';' between them."""
    model, _, changes = text.partition(":")
    pairs = [p.split("=", 1) for p in changes.replace(";", "\n").splitlines() if p]
    return model, {k: option_value(v) for k, v in pairs}


def split_changes(model, changes, preset):
    """(options, sampling) of a model with its changes; a name that neither has is a mistake."""
    options, sampling = model_options(model, preset), default_sampling(model, preset)
    unknown = sorted(changes.keys() - options.keys() - sampling.keys() - OPTIONAL)
    if unknown:
        known = ", ".join(sorted(options.keys() | sampling.keys() | OPTIONAL))
        raise SystemExit(f"{model} has no option {', '.join(unknown)}; expected some of {known}")
    sampled = {k: v for k, v in changes.items() if k in sampling}
    trained = {k: v for k, v in changes.items() if k not in sampling or k == "precision"}
    return options | trained, sampling | sampled


def scores_of(metrics, network_name):
    """The scores of a row of metrics, with their intervals."""
    columns = {"FID": column_name("FID", network_name)} | {name: name for name in COLUMNS}
    found = {}
    for name, column in columns.items():
        for ending in ("", " low", " high"):
            found[name + ending] = round(float(metrics[column + ending]), 2)
    return found


def train_and_score(model, changes, args, photos, feature_net, device):
    """Rows, one a lightness: what was trained, on how many photographs, and its scores."""
    options, sampling = split_changes(model, changes, args.preset)
    budget = Budget(args.steps, "steps") if args.steps else Budget(args.minutes / 60, "hours")
    names = dict(phase="phase1", model=model, variant="trial", preset=args.preset, seed=args.seed)
    run = open_run(names | dict(data=data_options(photos, "phase1"), budget=str(budget), train=options), device)
    components, sampling = prepare_components(
        model, "phase1", args.preset, args.seed, photos, sampling, feature_net, device
    )
    began = time.monotonic()
    weights = train_day(make_trainer(run, photos, "phase1", 1, device, components=components), 1)
    wall = time.monotonic() - began
    evaluate_day(run, 1, weights, photos, feature_net, sampling, device, components)
    metrics = run.metrics()
    if "sampling" in metrics:
        metrics = metrics[metrics["sampling"] == describe_sampling(sampling)]
    rows = []
    for scores in metrics.to_dict("records"):
        row = dict(model=model, changes=json.dumps(changes), lightness=scores["lightness"], steps=int(scores["step"]))
        row |= dict(batch=options["batch_size"], photographs=row["steps"] * options["batch_size"])
        row |= dict(training_seconds=round(float(scores["training_seconds"]), 1), wall=round(wall, 1))
        rows.append(row | scores_of(scores, feature_net.network_name))
    return rows


def line(row):
    """A row as text, intervals in brackets."""
    text = []
    for name, value in row.items():
        if f"{name} low" in row:
            value = f"{value} [{row[f'{name} low']}, {row[f'{name} high']}]"
        if not name.endswith((" low", " high")):
            text.append(f"{name} {value}")
    return ", ".join(text)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("items", nargs="+", type=item)
    parser.add_argument("--preset", default="laptop", choices=tuple(PRESETS))
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--scored", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("learning.csv"))
    args = parser.parse_args(words)
    device, feature_net = torch.device("cpu"), efficientnet_lite0()
    photos = study_photos(args.data, args.preset)
    rows = {split: photos.splits[split] for split in ("validation", "test")}
    fewer = {split: r[sample_rows(len(r), args.scored)] for split, r in rows.items()}
    photos = replace(photos, splits=photos.splits | fewer)
    for model, changes in args.items:
        rows = train_and_score(model, changes, args, photos, feature_net, device)
        print("\n".join(map(line, rows)), flush=True)
        pd.DataFrame(rows).to_csv(args.out, mode="a", header=not args.out.exists(), index=False)


if __name__ == "__main__":
    main()
