"""Stage `collect`: what came back from the GPU becomes runs, and tables of what was checked and timed."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pandas as pd
import torch
from gpu_stage import write_json
from safetensors import safe_open
from safetensors.torch import load, save

from faic.components import PHASE_DAYS
from faic.core import Budget, runs_dir, short_hash, write_bytes
from faic.presets import PAPER_MODELS
from faic.results import results_folder
from faic.runs import code_commit
from faic.selection import select_runs

STAGES = ("check", "speed", "train")


def safe_members(tar):
    """Plain files of runs: <run>/<file> or <run>/samples/<file>."""
    for member in tar:
        path = Path(member.name)
        if not member.isfile() or len(path.parts) not in (2, 3) or ".." in path.parts or path.is_absolute():
            raise ValueError(f"{member.name} is no file of a run")
        yield member


def take_runs(file, target):
    """Unpack runs beside those that are there; a run that has more rows there stays as it is."""
    taken, kept = [], []
    with tarfile.open(file) as tar:
        contents = {m.name: tar.extractfile(m).read() for m in safe_members(tar)}
    for run in sorted({Path(n).parts[0] for n in contents}):
        mine = {n: c for n, c in contents.items() if Path(n).parts[0] == run}
        options = json.loads(mine[f"{run}/options.json"])
        plain = {k: v for k, v in options.items() if k != "made"}
        if not run.endswith(short_hash(plain)):
            raise ValueError(f"{run} holds other options than its name says")
        there, rows = target / run / "metrics.csv", rows_of(mine.get(f"{run}/metrics.csv", b""))
        if there.exists() and rows_of(there.read_bytes()) > rows:
            kept.append(run)
            continue
        if options["made"]["commit"].startswith("unknown"):  # no git on that machine
            options["made"]["commit"] = code_commit()
        for name, content in mine.items():
            write_bytes(target / name, content)
        write_json(target / run / "options.json", options)
        taken.append(run)
    return taken, kept


def rows_of(content):
    return max(0, content.count(b"\n") - 1)


def take_weights(folder, target):
    """Weights in half precision become files as the study writes them, in single precision again."""
    pieces = sorted(folder.glob("weights.tar.*"), key=lambda f: int(f.suffix[1:]))
    if not pieces:
        return []
    found = []
    with tarfile.open(fileobj=io.BytesIO(b"".join(f.read_bytes() for f in pieces))) as tar:
        for member in safe_members(tar):
            content = tar.extractfile(member).read()
            file = target / member.name
            file.parent.mkdir(parents=True, exist_ok=True)
            scratch = file.with_name(f".{file.name}.half")
            scratch.write_bytes(content)
            with safe_open(scratch, "pt") as f:
                metadata = f.metadata()
            scratch.unlink()
            tensors = {k: v.float() if v.dtype == torch.float16 else v for k, v in load(content).items()}
            write_bytes(file, save(tensors, metadata))
            found.append(member.name)
    return found


def take_times(report, target):
    """The runs of inference times that a report of the stage speed holds."""
    taken = []
    for record in [r for records in report["lanes"].values() for r in records]:
        run = (record.get("found") or {}).get("run")
        if not run:
            continue
        options = run["options"]
        name = f"inference-{options['model']}-{options['preset']}-s{options['seed']}-{short_hash(options)}"
        made = run["made"] | (dict(commit=code_commit()) if run["made"]["commit"].startswith("unknown") else {})
        write_json(target / name / "options.json", options | dict(made=made))
        write_bytes(target / name / "metrics.csv", pd.DataFrame(run["metrics"]).to_csv(index=False).encode())
        taken.append(name)
    return taken


def table(report):
    """A stage's items as Markdown: what each found, or why it did not."""
    records = [r for records in report["lanes"].values() for r in records]
    devices = [r["found"]["device"] for r in records if "device" in (r.get("found") or {})]
    device = devices[0] if devices else report.get("device", "")
    lines = [
        f"# {report['stage']}",
        "",
        f"{device}; {report['seconds']:.0f} s of {report['limit']:.0f} s.",
        "",
        "| item | seconds | found |",
        "|---|---|---|",
    ]
    for r in records:
        state = "" if r["state"] == "done" else f"{r['state']}: "
        what = (r.get("line") or r.get("error") or "").replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {r['name']} | {r['seconds']:.1f} | {state}{what} |")
    return "\n".join(lines) + "\n"


def collect(came, name):
    """Take in what a GPU machine sent back, in `came` or folders in it; where everything is now."""
    came, target = Path(came), runs_dir()
    found = dict(runs=[], weights=[], times=[], tables=[], kept=[])
    for file in sorted(came.rglob("runs.tar.xz")):
        taken, kept = take_runs(file, target)
        found["runs"] += taken
        found["kept"] += kept
        found["weights"] += take_weights(file.parent, target)
    for stage in STAGES:
        for file in sorted(came.rglob(f"{stage}.json")):
            report = json.loads(file.read_text())
            if stage == "speed":
                found["times"] += take_times(report, target)
            folder = results_folder("gpu", name)
            there = folder / f"{stage}.json"
            taken = there.exists() and there.read_bytes() != file.read_bytes()
            number = f"-{short_hash(report)}" if taken else ""  # another report of this stage keeps its name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / f"{stage}{number}.json")
            write_bytes(folder / f"{stage}{number}.md", table(report).encode())
            found["tables"].append(f"{folder / stage}{number}.md")
    if not any(found.values()):
        raise ValueError(f"{came} holds no check.json, speed.json, train.json or runs.tar.xz; give the folder of them")
    print(f"collect: {len(found['runs'])} runs and {len(found['times'])} of times into {target}")
    print(f"collect: {len(found['weights'])} files of weights; tables: {', '.join(found['tables'])}")
    options = [json.loads((target / r / "options.json").read_text()) for r in found["runs"]]
    days = {o["phase"]: Budget.parse(o["budget"]) for o in options if o["phase"] in PHASE_DAYS and "budget" in o}
    for budget in sorted({str(b * (1 / PHASE_DAYS[phase])) for phase, b in days.items()}):
        found["selection"] = selection_of(name, budget, sorted({o["seed"] for o in options if o["phase"] == "phase2"}))
        print(f"collect: faic run results -p preset gpu -p data {name} -p budget '{budget}'")
    return found


def selection_of(name, budget, seeds):
    """How many of the runs `results` would use with this budget, and why not the others."""
    days = str(Budget.parse(budget) * PHASE_DAYS["phase2"])
    budgets = {(phase, m): b for m in PAPER_MODELS for phase, b in (("phase1", budget), ("phase2", days))}
    selection = select_runs("gpu", name, seeds[0], budgets, len(seeds))
    used, skipped = len(selection.all_runs()), [sentence for *_, sentence in selection.skipped]
    print(f"collect: with the budget {budget}, `results` uses {used} runs", *skipped, sep="\n  ")
    return dict(used=used, skipped=skipped)
