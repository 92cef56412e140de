"""What the tests of the phases share: papermill as a user starts it, interruptions, small components."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from faic.full_size import colorize_photo
from faic.components import find_components
from faic.core import make_generator, pick_device
from faic.presets import PRESETS, all_components, default_sampling, make_colorizer, make_trainee
from faic.resume import load_weights
from faic.selection import find_run, last_day

NBS = Path(__file__).resolve().parents[1] / "nbs"
CPU = pick_device("cpu")
TINY = dict(budget="3 steps", device="cpu")


def command(notebook, **parameters):
    """The command line that runs a notebook through papermill."""
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    start = [sys.executable, "-m", "papermill", str(NBS / f"{notebook}.ipynb"), "out.ipynb", "--no-progress-bar"]
    return start + options


def papermill(notebook, folder, **parameters):
    """Run a notebook through papermill's command line; returns the result of subprocess.run."""
    return subprocess.run(command(notebook, **parameters), cwd=folder, capture_output=True, text=True)


def printed(folder):
    """What an executed notebook has printed."""
    cells = json.loads((folder / "out.ipynb").read_text())["cells"]
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    return "".join("".join(output.get("text", "")) for output in outputs)


def copy_runs(source, tmp_path, monkeypatch):
    """Copy runs to a folder where a test may change them."""
    shutil.copytree(source / "runs", tmp_path / "runs")
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    return tmp_path


def interrupt(monkeypatch, owner, call, work):
    """Call work(save_minutes=0), which writes many checkpoints, and press Ctrl-C at a call of the owner's losses."""
    calls = []

    def losses(self, batch, generator, original=owner.losses):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        yield from original(self, batch, generator)

    with monkeypatch.context() as patch:
        patch.setattr(owner, "losses", losses)
        with pytest.raises(KeyboardInterrupt):
            work(save_minutes=0)


def short_components(monkeypatch, model, steps):
    """Give a model's components a few steps, for tests inside this process."""
    budgets = (f"{steps} steps", f"{steps} steps")
    names = [name for name in PRESETS["smoke"].components if name in all_components()]
    monkeypatch.setattr(PRESETS["smoke"], "components", dict.fromkeys(names, budgets))


def weights(run):
    """The weights at the end of a run's first day."""
    return load_file(run.path / "day-1.safetensors")


def same(ours, theirs):
    """Are two sets of weights equal to the bit?"""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def colorized(photo, frame="whole", **sampling):
    """Colorize a photograph with the newest run of phase 2, as the notebook colorize does it."""
    run = find_run()
    o = run.options
    sampling = default_sampling(o["model"], o["preset"]) | sampling
    components = find_components(run, sampling, CPU)
    trainee = load_weights(make_trainee(o["model"], o["train"], components=components), last_day(run)[1])
    colorize, side = make_colorizer(o["model"], trainee, sampling, components), o["train"]["side"]
    return colorize_photo(colorize, photo, side, trainee.gray_kind, make_generator(0), CPU, frame)
