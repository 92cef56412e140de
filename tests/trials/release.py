"""Weights for release: train for hours, score each slice on validation, choose by a rule, write the file and its card.

    python tests/trials/release.py train MODEL FOLDER [--slices N] [--steps S] [--set 'lambda_l1=200;ema=null']
    python tests/trials/release.py status
    python tests/trials/release.py choose MODEL
    python tests/trials/release.py write MODEL [--replace]

Everything lies in FAIC_RUNS; a folder of its own keeps the study's pages quick to read. FOLDER is Tiny-ImageNet's
`train` folder (100 000 JPEGs); the training split of the study, 90 %, is trained on.

`train` makes slices of steps. After each slice it keeps the weights (`day-<slice>.safetensors`) and scores them on the
study's 500 validation photographs. A killed training continues where its last checkpoint was, five minutes ago at
most: call it again with the same words. It uses one thread, and bfloat16 where the CPU computes that natively
(`--device cuda` uses a GPU). The rate is constant for the first half of the steps and falls linearly to zero in the
second half (`half_then_linear`). Networks that sampling needs, such as ColTran's color
upsampler, are trained first, in a run of their own. Without `--slices` and `--steps` a model gets four to eight hours.

`status` prints a line for each training. `choose` prints the checkpoints of a model, the best one first. `write` puts
the best one into `faic/weights/`: `<model>.safetensors` in half precision, its card `<model>.md` and `<model>.json`,
and the pictures of 30 free photographs, `<model>.jpg`. It scores what it wrote on 1000 test photographs. It replaces
nothing without `--replace`. It also names the default model in `default.txt`.

**The rule**, fixed before any training. Checkpoints of a model are ranked twice on validation: by KID
(EfficientNet-Lite0, paired, lower is better) and by agreement (EfficientNet-Lite2 sees in the colorized photograph the
class that it sees in the true one, higher is better). The best mean of both ranks wins, of equal ones the checkpoint
with fewer steps. All checkpoints are scored with the photograph's own lightness, as `faic colorize` writes it, and with
the preset's sampling. The default model is the released one that wins the same way.

**Why these sizes and options.** A released file holds at most 4.0 million numbers (8 MB in half precision), all files
together 24 MB. The laptop preset has 4.17 million in Pix2Pix's generator and 8.08 in the classifier, which is too
many, 2.96 in BBDM and in Palette, 0.17 in ColTran and 0.04 in its color upsampler. Here all five have 12.7 together,
which is 1.5 MB too much if all were released.

pix2pix, 3.19 million (the generator alone, width 28). Batch 16: in six core-minutes batch 4 gave the better FID (83.4
after 4023 steps, against 89.9 after 2187 of batch 16), because it steps more often. In hours the number of photographs
seen decides, and batch 16 sees twice as many a minute. Splotches move from step to step, so that the average of the
weights removes most of them. lambda 100 as published: a larger one gives brown pictures. L1 alone comes not first: the
losses would then differ a hundredfold, and Adam's mean squares (0.999) need 9000 steps to forget that.

classifier, 3.17 million (width 20). Cross-entropy does not average colors, and the annealed mean keeps them saturated.
Batch 16. The published rebalancing of rare colors stays, which makes the answers vivid.

palette-modern, 3.04 million (channels 16, four levels, attention at 8x8). It generates chroma alone: the network
spends nothing on lightness. The preset's 32 channels at 64x64 cost most of a step and serve sharp edges, which come
from the photograph's lightness here. Half as wide with a level more, it sees more than twice the photographs in the
same time, and keeps its numbers for what a photograph shows.

coltran, 0.31 + 0.07 million (dim 48). Small, as each of its 4096 pixels costs a step when it samples. The color
upsampler gets half as many steps, and a short average (decay 0.99). A first training gave it 1500 steps and decay
0.999, so that a fifth of its average was the weights before it had learned. Of 200 validation photographs its colorizer
then had KID 0.0313; with an upsampler that had 3281 steps and decay 0.99, the same colorizer has 0.0195.

bbdm, 2.96 million, the preset's network. In pixels, as a first stage would cost megabytes. It predicts the difference
of gray and color (`ysubx`): after six core-minutes that gave FID 62, the published objective 75 (chapter 41). A
narrower and deeper network, 2.04 million, was trained first; it needed 38,400 photographs for about the KID that
this one has, with the published objective, after 8000. BBDM generates the lightness, too, which `faic colorize`
replaces.

All models evaluate the running average of their weights (decay 0.999): a checkpoint then depends little on the last
steps. The conditional GAN and the published Palette are left out: Pix2Pix and the modern Palette take their places.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from release_card import card_text, component_work, make_card, picture, read_cards
from throughput import option_value

from faic.components import component_weights, data_notes, data_options, load_component, make_trainer
from faic.core import Budget, pick_device, runs_dir, set_deterministic, write_bytes, write_json
from faic.dataset import load_photos
from faic.days import eval_batch_size
from faic.evaluate import evaluate, sample_rows
from faic.judges import efficientnet_lite2
from faic.metrics import column_name, efficientnet_lite0
from faic.presets import (
    PRESETS,
    components_of,
    default_sampling,
    make_colorizer,
    make_trainee,
    model_options,
    preset_side,
)
from faic.released import open_weights, pack_release, released_models, weights_dir
from faic.resume import load_weights, work_done
from faic.runs import evaluated, is_locked, keep_samples, open_run, read_runs
from faic.selection import space_options
from faic.trainer import train_day

CPU = torch.device("cpu")
KID, AGREEMENT = column_name("KID", "EfficientNet-Lite0"), column_name("agreement", "EfficientNet-Lite2")
MOST, MOST_TOGETHER = 8_000_000, 24_000_000  # bytes of a released file, and of all
AVERAGE = dict(decay=0.999, start=0.02, every=1)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained for release; the rest is the preset's."""

    changes: dict  # options of the training
    slices: int = 24
    steps: int = 4000  # of a slice
    components: dict = field(default_factory=dict)  # name -> options; each gets half as many steps
    weakness: str = ""  # what it is bad at, in a sentence written after a look at its pictures


RECIPES = {
    "pix2pix": Recipe(dict(width=28, batch_size=16)),
    "classifier": Recipe(
        dict(width=20, batch_size=16),
        weakness="A pale sky turns yellow, and leaves often turn brown or red. Blotches of blue and red appear on "
        "smooth floors and backgrounds. It predicts colors for every fourth pixel of 64x64, so a small thing such as a "
        "face or a flag takes the color of its surroundings. Its colors help EfficientNet-Lite2 no more than gray "
        "does, as far as the intervals tell.",
    ),
    "palette-modern": Recipe(
        dict(channels=16, channel_mult=[1, 2, 4, 8], attention_factors=[8], batch_size=8), slices=20, steps=2500
    ),
    "coltran": Recipe(
        dict(dim=48, ff=48, batch_size=4, lr=2e-3),
        components=dict(coltran_color=dict(dim=48, ff=48, batch_size=4, lr=2e-3, ema=dict(AVERAGE, decay=0.99))),
        slices=8,
        steps=2500,
        weakness="A color fits its region more than its object: a cat turns green, a night sky red. Parts of one "
        "object take different hues, single pixels of bright color stay in smooth areas, and two answers differ much. "
        "Its colors help EfficientNet-Lite2 no more than gray does, as far as the intervals tell.",
    ),
    "bbdm": Recipe(
        dict(objective="ysubx"),
        slices=8,
        steps=1500,
        weakness="It is pale: most pictures are gray with a brown or yellow tint, and red and blue hardly occur. Where "
        "it colors more, a patch of one hue follows no object, such as yellow fur. Its colors help EfficientNet-Lite2 "
        "no more than gray does, as far as the intervals tell.",
    ),
}


def changes_of(text):
    """'width=8;ema=null' -> dict; values are JSON or words."""
    return {k: option_value(v) for k, v in (pair.split("=", 1) for pair in text.split(";") if pair)}


def training_options(model, preset, changes):
    """The options of a training for release; a name that the model does not have is a mistake."""
    options = model_options(model, preset) | dict(schedule="half", ema=AVERAGE)
    unknown = sorted(changes.keys() - options.keys())
    if unknown:
        raise SystemExit(f"{model} has no option {', '.join(unknown)}; expected some of {', '.join(sorted(options))}")
    return options | changes


def release_photos(folder, preset, scored):
    """The study's photographs and split; of a scored split at most `scored`, whatever number the preset scores."""
    photos = load_photos(folder, preset_side(preset), preset == "paper")
    fewer = {s: photos.splits[s][sample_rows(len(photos.splits[s]), scored)] for s in ("validation", "test")}
    return replace(photos, splits=photos.splits | fewer)


def train_component(name, args, photos):
    """A network that the model's sampling needs: (its run, the network)."""
    options = training_options(name, args.preset, RECIPES[args.model].components.get(name, {}) | args.component)
    budget = str(Budget(max(1, args.slices * args.steps // 2), "steps"))
    names = dict(phase="component", model=name, of="release", preset=args.preset, seed=args.seed)
    names |= dict(data=data_options(photos, "phase2"), budget=budget, train=options)
    run = open_run(names, args.device, **data_notes(photos))
    weights = train_day(make_trainer(run, photos, "phase2", 1, args.device), 1)
    return run, load_component(weights, run, args.device)


def open_training(args, photos, component_runs):
    """The run of a model's training; the same arguments find the same run."""
    names = dict(phase="release", model=args.model, preset=args.preset, seed=args.seed, slices=args.slices)
    names |= dict(data=data_options(photos, "phase2"), budget=str(Budget(args.slices * args.steps, "steps")))
    names |= dict(train=training_options(args.model, args.preset, RECIPES[args.model].changes | args.set))
    names |= space_options(args.model, "phase2", args.preset, args.seed, photos)
    digits = {name: run.path.name[-6:] for name, run in component_runs.items()}
    if digits:
        names["components"] = digits
    return open_run(names, args.device, components=digits, **data_notes(photos))


def score_slice(run, number, weights, photos, components, networks, device):
    """Add the row of a slice to the run's metrics, unless it is there."""
    if evaluated(run, day=number):
        return
    o = run.options
    sampling = default_sampling(o["model"], o["preset"])
    trainee = load_weights(make_trainee(o["model"], o["train"], components=components), weights, device)
    colorize = make_colorizer(o["model"], trainee, sampling, components)
    kind, keeps, size = trainee.gray_kind, trainee.keeps_lightness, eval_batch_size(o, device)
    rows, samples = evaluate(
        colorize, photos, "validation", networks[0], kind, keeps, o["seed"], device, size, judges=networks[1:]
    )
    keep_samples(run, samples, number)
    run.add_metrics(dict(day=number, **work_done(weights), lightness="photograph", **rows["photograph"]))


def train(args):
    """Train a model slice by slice, and score each."""
    set_deterministic(args.device)
    photos = release_photos(args.folder, args.preset, args.scored)
    trained = {n: train_component(n, args, photos) for n in components_of(args.model, "none", preset=args.preset)}
    components = {name: network for name, (_, network) in trained.items()}
    run = open_training(args, photos, {name: run for name, (run, _) in trained.items()})
    print(f"{run.path}: {args.slices} slices of {args.steps} steps", flush=True)
    trainer = make_trainer(run, photos, "phase2", args.slices, args.device, components=components)
    networks = efficientnet_lite0(args.device), efficientnet_lite2(args.device)
    for number in range(1, args.slices + 1):
        weights = train_day(trainer, number)
        score_slice(run, number, weights, photos, components, networks, args.device)
        print(slice_line(run.metrics(), number), flush=True)


def slice_line(metrics, number):
    """The scores of a slice as text."""
    row = metrics[metrics["day"] == number].iloc[-1]
    return (
        f"slice {number}: step {row['step']:.0f}, {row['training_seconds'] / 3600:.2f} h, KID {row[KID]:.5f}, "
        f"agreement {row[AGREEMENT]:.3f}, chroma error {row['chroma error']:.2f}, colorfulness "
        f"{row['colorfulness']:.1f}, PSNR {row['PSNR']:.2f}"
    )


def ranked(table):
    """Checkpoints, or models, by the rule: the best one first. Needs the columns KID, agreement and step."""
    ranks = table[KID].rank(method="min") + table[AGREEMENT].rank(method="min", ascending=False)
    return table.assign(**{"mean rank": ranks / 2}).sort_values(["mean rank", "step"], kind="stable")


def checkpoints(model):
    """All scored checkpoints of a model, the best one first."""
    tables, kinds = [], set()
    for run in read_runs(phase="release", model=model):
        metrics = run.metrics()
        if len(metrics):
            tables.append(metrics.assign(run=run.path.name))
            kinds |= {(run.options["data"]["fingerprint"], n) for n in metrics["n"]}
    if not tables:
        raise SystemExit(f"no slice of {model} is scored yet; begin with: release.py train {model} FOLDER")
    if len(kinds) > 1:
        raise SystemExit(f"the trainings of {model} were scored on different photographs; move some of them away")
    return ranked(pd.concat(tables, ignore_index=True))


def choose(args):
    """Print the checkpoints of a model by the rule."""
    columns = {"run": "run", "day": "slice", "step": "step", KID: "KID", AGREEMENT: "agreement", "mean rank": "rank"}
    columns |= {name: name for name in ("chroma error", "colorfulness", "PSNR")}
    table = checkpoints(args.model)[list(columns)].rename(columns=columns)
    print(table.to_string(index=False, float_format="{:.5g}".format))


def status(args):
    """Print a line for each training."""
    found = read_runs(phase="release")
    if not found:
        print("no training for release in FAIC_RUNS")
    for run in found:
        state, metrics, o = "running" if is_locked(run.path) else "stopped", run.metrics(), run.options
        done = len(list(run.path.glob("day-*.safetensors")))
        state = "finished" if done == o["slices"] == len(metrics) else state
        print(f"{run.path.name}: {state}, {done} of {o['slices']} slices, {len(metrics)} scored")
        if len(metrics):
            print(f"  newest {slice_line(metrics, metrics['day'].max())}")
            print(f"  best   {slice_line(metrics, ranked(metrics)['day'].iloc[0])}")


def photos_to_test(run, most):
    """The photographs of a run, with at most so many of the test split; its prepared copy must be in FAIC_RUNS."""
    data = run.options["data"]
    folders = ["embedded", *map(str, runs_dir().glob(f"data-{data['name']}-{data['side']}-*"))]
    for folder in folders if data["name"] == "embedded" else folders[1:]:
        photos = load_photos(folder, data["side"], gray_photographs=data.get("gray_photographs", "leave out"))
        if photos.fingerprint == data["fingerprint"]:
            rows = photos.splits["test"]
            return replace(photos, splits=photos.splits | dict(test=rows[sample_rows(len(rows), most)]))
    raise SystemExit(f"FAIC_RUNS has no prepared copy of {data['name']} that {run.path.name} was trained on")


def component_runs(run):
    """(name, run) of the networks that a run's model samples with."""
    found = run.options.get("components", {}).items()
    return [(n, r) for n, digits in found for r in read_runs(phase="component", model=n) if r.path.name[-6:] == digits]


def load_chosen(model):
    """The best checkpoint of a model: (its run, its row of metrics, the trainee, component -> (network, options))."""
    chosen = checkpoints(model).iloc[0]
    (run,) = (r for r in read_runs(phase="release", model=model) if r.path.name == chosen["run"])
    components = {n: (load_component(component_weights(r), r, CPU), r.options["train"]) for n, r in component_runs(run)}
    networks = {name: network for name, (network, _) in components.items()}
    trainee = make_trainee(model, run.options["train"], components=networks)
    return run, chosen, load_weights(trainee, run.path / f"day-{chosen['day']}.safetensors", CPU), components


def write(args):
    """Write the best checkpoint of a model with its card into the folder of released weights."""
    targets = {ending: weights_dir() / f"{args.model}.{ending}" for ending in ("safetensors", "json", "md", "jpg")}
    taken = [str(file) for file in targets.values() if file.exists()]
    if taken and not args.replace:
        raise SystemExit(f"{', '.join(taken)}: there already; --replace replaces them")
    run, chosen, trainee, components = load_chosen(args.model)
    sampling = default_sampling(args.model, run.options["preset"])
    sampling.pop("precision", None)  # float32 gives the same picture on every CPU
    content = pack_release(
        args.model, trainee, run.options["train"], sampling, components, step=int(chosen["step"]), run=run.path.name
    )
    others = sum(f.stat().st_size for f in weights_dir().glob("*.safetensors") if f.stem != args.model)
    if len(content) > MOST or others + len(content) > MOST_TOGETHER:
        raise SystemExit(f"{len(content):,} bytes, and {others:,} in other files; at most {MOST:,}, {MOST_TOGETHER:,}")
    photos, networks = photos_to_test(run, args.tested), (efficientnet_lite0(CPU), efficientnet_lite2(CPU))
    with tempfile.TemporaryDirectory() as folder:
        opened = open_weights(write_bytes(Path(folder) / f"{args.model}.safetensors", content))
        weakness = RECIPES[args.model].weakness
        card = make_card(opened, run, chosen, photos, networks, content, weakness, (KID, AGREEMENT))
        card["trained before"] = [component_work(r) for _, r in component_runs(run)]
        pictures = picture(opened)
    default = best_card(read_cards(weights_dir()) | {args.model: card})
    write_bytes(targets["jpg"], pictures)
    write_json(targets["json"], card)
    write_bytes(targets["md"], card_text(args.model, json.loads(targets["json"].read_text())).encode())
    write_bytes(targets["safetensors"], content)
    write_bytes(weights_dir() / "default.txt", f"{default}\n".encode())
    print(*targets.values(), f"default: {released_models()[0]}", sep="\n")


def best_card(cards):
    """The name of the released model that wins by the rule on validation."""
    rows = [dict(name=name, step=card["steps"], **card["validation"]) for name, card in cards.items()]
    table = pd.DataFrame(rows)
    if len(table[["n", "fingerprint"]].drop_duplicates()) > 1:
        raise SystemExit("the released models were chosen on different photographs; write them again")
    return ranked(table)["name"].iloc[0]


def parse(words):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    begin = commands.add_parser("train", help="train a model, or continue its training")
    begin.add_argument("model", choices=RECIPES)
    begin.add_argument("folder", help="of photographs, or 'embedded'")
    begin.add_argument("--slices", type=int, help="that are kept and scored; else the model's own number")
    begin.add_argument("--steps", type=int, help="of a slice; else the model's own number")
    begin.add_argument("--scored", type=int, default=500, help="validation photographs, at most")
    begin.add_argument("--preset", default="laptop", choices=tuple(PRESETS))
    begin.add_argument("--device", type=pick_device, default="cpu", help="cpu, cuda or auto")
    begin.add_argument("--seed", type=int, default=0)
    begin.add_argument("--set", type=changes_of, default={}, help="changed options, e.g. 'lambda_l1=200;width=16'")
    begin.add_argument("--component", type=changes_of, default={}, help="changed options of its components")
    commands.add_parser("status", help="a line for each training")
    commands.add_parser("choose", help="the checkpoints by the rule").add_argument("model", choices=RECIPES)
    ready = commands.add_parser("write", help="the best checkpoint becomes a released file with its card")
    ready.add_argument("model", choices=RECIPES)
    ready.add_argument("--replace", action="store_true", help="what is there already")
    ready.add_argument("--tested", type=int, default=1000, help="test photographs that are scored, at most")
    args = parser.parse_args(words)
    if args.command == "train":
        args.slices = args.slices or RECIPES[args.model].slices
        args.steps = args.steps or RECIPES[args.model].steps
    return args


def main(words=None):
    args = parse(words)
    torch.set_num_threads(1)
    {"train": train, "status": status, "choose": choose, "write": write}[args.command](args)


if __name__ == "__main__":
    main()
