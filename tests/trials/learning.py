"""What a network learns in a given time or number of steps: trained on phase 1's photographs, scored on validation.

    python tests/trials/learning.py FOLDER [--preset laptop] [--minutes 6 | --steps 1500] [--out learning.csv]
        pix2pix 'coltran:dim=64;ff=64' 'bbdm:channels=48;precision=float32' ...

Each item is a model with changed options. A line states the photographs seen, FID, chroma error and colorfulness; the
same rows go into the CSV file. Runs lie in FAIC_RUNS; an item whose run is there already is not trained again. All
items share ColTran's color upsampler, which is the preset's. `--scored` sets how many validation photographs are
colorized.
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
from faic.presets import PRESETS, default_sampling, model_options
from faic.runs import open_run
from faic.trainer import train_day

COLUMNS = ("PSNR", "chroma error", "colorfulness")


def item(text):
    """'bbdm:channels=48;loss=l2' -> (model, changes); options are JSON values or words, ';' between them."""
    model, _, changes = text.partition(":")
    pairs = [p.split("=", 1) for p in changes.replace(";", "\n").splitlines() if p]
    return model, {k: option_value(v) for k, v in pairs}


def train_and_score(model, changes, args, photos, feature_net, device):
    """A row: what was trained, on how many photographs, and its scores."""
    options, sampling = model_options(model, args.preset) | changes, default_sampling(model, args.preset)
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
    scores = run.metrics().iloc[0]
    row = dict(model=model, changes=json.dumps(changes), steps=int(scores["step"]), batch=options["batch_size"])
    row |= dict(photographs=row["steps"] * row["batch"], training_seconds=round(float(scores["training_seconds"]), 1))
    row |= dict(wall=round(wall, 1), FID=round(float(scores[column_name("FID", feature_net.network_name)]), 1))
    return row | {name: round(float(scores[name]), 2) for name in COLUMNS}


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
        row = train_and_score(model, changes, args, photos, feature_net, device)
        print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        pd.DataFrame([row]).to_csv(args.out, mode="a", header=not args.out.exists(), index=False)


if __name__ == "__main__":
    main()
