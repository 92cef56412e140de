"""The card of released weights: what they were trained on, how they score, and pictures, good and bad alike."""

import hashlib
import io
import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

from faic.batches import ordered_batches
from faic.color import to_uint8
from faic.components import component_weights
from faic.core import RESULT_SOFTWARE, make_generator
from faic.dataset import load_photos
from faic.days import eval_batch_size
from faic.evaluate import evaluate, gray_baseline, retry_on_oom, sample_rows
from faic.metrics import column_name
from faic.photos import EMBEDDED
from faic.presets import find_architecture, find_description
from faic.resume import work_done

CPU = torch.device("cpu")
SHOWN, ACROSS, SIDE = 30, 10, 96  # pictures in the card, pictures side by side, px of each
LICENSE = (
    "Apache-2.0, as FAIC's code. No photograph is in the file. It was trained on photographs of ImageNet, whose terms "
    "allow research without commercial aims."
)
PLAIN = ("PSNR", "SSIM", "chroma error", "CIEDE2000", "colorfulness")
NETWORKS = (("FID", 0), ("KID", 0), ("KID", 1), ("agreement", 1))  # scores, and the network of each


def score_columns(networks):
    """The columns of metrics that a card states."""
    return [*PLAIN, *(column_name(score, networks[i].network_name) for score, i in NETWORKS)]


def score_on_test(opened, photos, networks):
    """{'gray' and the model's name: {column: [value, low, high]}} of the test photographs; the first network scores."""
    trainee, found = opened.trainee, {}
    size = eval_batch_size(dict(latent="none"), CPU)
    subjects = {"gray image": (gray_baseline, "lab", True)}
    subjects[opened.name] = opened.colorizer(), trainee.gray_kind, trainee.keeps_lightness
    for name, (colorize, kind, keeps) in subjects.items():
        rows, _ = evaluate(colorize, photos, "test", networks[0], kind, keeps, 0, CPU, size, judges=networks[1:])
        row = rows["photograph"]
        found[name] = {c: [row[end] for end in (c, f"{c} low", f"{c} high")] for c in score_columns(networks)}
    return found


def public_command(command):
    """A command without the folders of this machine."""
    return shlex.join(Path(word).name if word.startswith(("/", "~")) else word for word in shlex.split(command))


def make_card(opened, run, chosen, photos, networks, content, weakness, chosen_columns):
    """All that is to be said of a released file, as JSON values; `content` is the file's, `chosen` the row of the
    checkpoint on validation."""
    made, data = run.options["made"], run.options["data"]
    card = dict(model=opened.about["model"], title=find_architecture(opened.about["model"]).title, run=run.path.name)
    card |= dict(data=data["name"], photographs=data["train"], side=data["side"], steps=int(chosen["step"]))
    card |= dict(hours=round(float(chosen["training_seconds"]) / 3600, 2), slice=int(chosen["day"]))
    card |= dict(slices=run.options["slices"], batch_size=run.options["train"]["batch_size"], device=made["device"])
    card |= dict(command=public_command(made["command"]), commit=made["commit"], trained=made["time"])
    card |= dict(bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), license=LICENSE, weakness=weakness)
    validation = {name: float(chosen[name]) for name in chosen_columns}
    card["validation"] = dict(n=int(chosen["n"]), fingerprint=data["fingerprint"], **validation)
    card["test"] = dict(n=len(photos.splits["test"]), scores=score_on_test(opened, photos, networks))
    return card


def component_work(run):
    """How a network was trained that the model samples with, as JSON values."""
    work, made = work_done(component_weights(run)), run.options["made"]
    found = dict(title=find_description(run.options["model"]).title, steps=work["step"], commit=made["commit"])
    return found | dict(batch_size=run.options["train"]["batch_size"], hours=round(work["training_seconds"] / 3600, 2))


def interval(score):
    """'20.1 [19.9, 20.3]'; the number alone where there is no interval."""
    value, low, high = (f"{number:.4g}" for number in score)
    return value if "nan" in (low, high) else f"{value} [{low}, {high}]"


def score_table(card):
    """The scores as a table in Markdown."""
    scores = card["test"]["scores"]
    lines = [f"| {' | '.join(['score', *scores])} |", "|---" * (1 + len(scores)) + "|"]
    for column in next(iter(scores.values())):
        lines.append(f"| {' | '.join([column, *(interval(found[column]) for found in scores.values())])} |")
    return "\n".join(lines)


def card_text(name, card):
    """The card in Markdown."""
    validation = ", ".join(f"{k} {v:.4g}" for k, v in card["validation"].items() if k not in ("n", "fingerprint"))
    weakness = card["weakness"] or "Nobody has written it down yet; see the pictures."
    seen = card["steps"] * card["batch_size"]
    steps = f"{card['steps']:,} steps of {card['batch_size']} photographs"
    before = "".join(
        f"| trained before | {c['title']}: {c['hours']} h, {c['steps']:,} steps of {c['batch_size']} photographs, "
        f"commit {c['commit']} |\n"
        for c in card.get("trained before", [])
    )
    return f"""# {card["title"]}: released weights `{name}`

| | |
|---|---|
| trained on | {card["photographs"]:,} photographs of {card["data"]}, {card["side"]}x{card["side"]} |
| training | {card["hours"]} h on {card["device"]}, {steps}: {seen / card["photographs"]:.2g} epochs |
{before}| command | `{card["command"]}` |
| commit | {card["commit"]}, begun {card["trained"]} |
| chosen | slice {card["slice"]} of {card["slices"]}, {validation} on {card["validation"]["n"]} validation photographs |
| file | {card["bytes"]:,} bytes in half precision, SHA-256 {card["sha256"][:16]}... |
| license | {card["license"]} |

**What it is bad at.** {weakness}

## Scores

Of {card["test"]["n"]} test photographs, with the photograph's own lightness; 95 % intervals in brackets.

{score_table(card)}

## Pictures

Crops of free photographs, evenly spread and not selected. Of each three rows the first is gray, the second colorized,
the third the photograph.

![{SHOWN} photographs in gray, colorized and as they are]({name}.jpg)
"""


def free_rows(photos):
    """Rows of embedded photographs whose license is free, evenly spread."""
    free = [p.name for p in EMBEDDED if "no license" not in p.license]
    rows = np.flatnonzero(photos.manifest["file"].isin(free))
    return rows[sample_rows(len(rows), SHOWN)]


def picture(opened):
    """The card's picture as bytes of a JPEG."""
    photos = load_photos("embedded", opened.side)
    photos = replace(photos, splits=dict(test=free_rows(photos)))
    gray, ours, real = [], [], []
    for batch in ordered_batches(photos, "test", 10, opened.trainee.gray_kind):
        generators = [make_generator(0, "evaluate", int(i)) for i in batch["index"]]
        gray.append(batch["gray"].expand(-1, 3, -1, -1))
        ours.append(retry_on_oom(opened.colorizer(), batch["gray"], generators))
        real.append(batch["rgb"])
    pixels = [to_uint8(torch.cat(kind)).permute(0, 2, 3, 1).numpy() for kind in (gray, ours, real)]
    groups, step = -(-len(pixels[0]) // ACROSS), SIDE + 4
    sheet = Image.new("RGB", (ACROSS * step, groups * (3 * step + 12)), "white")
    for row, images in enumerate(pixels):
        for i, image in enumerate(images):
            place = i % ACROSS * step, i // ACROSS * (3 * step + 12) + row * step
            sheet.paste(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC), place)
    exif, content = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Software] = RESULT_SOFTWARE
    sheet.save(content, "JPEG", quality=92, exif=exif)
    return content.getvalue()


def read_cards(folder):
    """name -> card, of all released weights in a folder."""
    return {f.stem: json.loads(f.read_text()) for f in sorted(folder.glob("*.json"))}
