"""What the tests of the phases share: papermill as a user starts it, and small stand-ins."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import faic.components
import faic.trainer
from faic.colorize import colorize_photo
from faic.components import find_components
from faic.core import make_generator, pick_device
from faic.presets import ARCHITECTURES, PRESETS, default_sampling, make_colorizer, make_trainee
from faic.resume import load_weights
from faic.selection import find_run, last_day

NBS = Path(__file__).resolve().parents[1] / "nbs"
CPU = pick_device("cpu")
TINY = dict(budget="3 steps", device="cpu")


def command(notebook, **parameters):
    given = [a for k, v in parameters.items() for a in ("-p", k, str(v))]
    return [sys.executable, "-m", "papermill", str(NBS / f"{notebook}.ipynb"), "out.ipynb", "--no-progress-bar", *given]


def papermill(notebook, folder, **parameters):
    """Run a notebook through papermill's command line; the result of subprocess.run."""
    return subprocess.run(command(notebook, **parameters), cwd=folder, capture_output=True, text=True)


def printed(folder):
    cells = json.loads((folder / "out.ipynb").read_text())["cells"]
    return "".join("".join(o.get("text", "")) for c in cells if c["cell_type"] == "code" for o in c["outputs"])


def copy_runs(source, tmp_path, monkeypatch):
    """Runs in a folder of their own, to be changed by a test."""
    shutil.copytree(source / "runs", tmp_path / "runs")
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    return tmp_path


def interrupt(monkeypatch, owner, call, work):
    """Do some work, with a checkpoint whenever the loop asks whether it is time for one, until Ctrl-C at a call of the losses."""
    calls = []

    class Trainer(faic.trainer.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, save_minutes=0, **kwargs)

    def losses(self, batch, generator, original=owner.losses):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        yield from original(self, batch, generator)

    with monkeypatch.context() as patch:
        patch.setattr(faic.components, "Trainer", Trainer)
        patch.setattr(owner, "losses", losses)
        with pytest.raises(KeyboardInterrupt):
            work()


def small_parts(monkeypatch, steps):
    """Parts of a few steps, for tests inside this process."""
    budgets = {c.name: (f"{steps} steps", f"{steps} steps") for c in ARCHITECTURES["coltran"].components}
    monkeypatch.setattr(PRESETS["smoke"], "components", budgets)


def weights(run):
    return load_file(run.path / "day-1.safetensors")


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


class Judge(torch.nn.Module):
    """A feature network that costs nothing: the mean colors of four quarters."""

    network_name, num_features = "quarters", 12

    def forward(self, rgb):
        quarters = torch.nn.functional.adaptive_avg_pool2d(rgb, 2).flatten(1)
        return quarters, quarters.softmax(1)


def colorized(photo, frame="whole", **sampling):
    """A photograph colorized by the newest run of phase 2, as the notebook colorize does it."""
    run = find_run()
    o = run.options
    sampling = default_sampling(o["model"], o["preset"]) | sampling
    components = find_components(run, sampling, CPU)
    trainee = load_weights(make_trainee(o["model"], o["train"], components=components), last_day(run)[1])
    return colorize_photo(
        make_colorizer(o["model"], trainee, sampling, components),
        photo,
        o["train"]["side"],
        trainee.gray_kind,
        make_generator(0),
        CPU,
        frame,
    )
