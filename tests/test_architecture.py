"""A further architecture is one description: the whole study works with it, and nothing else was told."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_nets import QuarterColors
from phases import TINY
from PIL import Image

import faic.phases
from faic.architecture import Architecture, integer
from faic.full_size import colorize_photo
from faic.components import find_components
from faic.figures import figure7
from faic.parameters import ParameterError
from faic.phases import run_phase1, run_phase2
from faic.presets import ARCHITECTURES, PAPER_MODELS, default_sampling, make_colorizer, make_trainee
from faic.results import page_drawings, page_tables
from faic.resume import load_weights
from faic.score_tables import phase2_table
from faic.selection import all_models, find_run, last_day, select_runs
from faic.status import describe_status, status


class Regression:
    """The colors of a photograph by a small convolutional network and an L1 loss."""

    gray_kind, keeps_lightness = "lab", False

    def __init__(self, width, seed):
        torch.manual_seed(seed)
        layers = torch.nn.Conv2d(1, width, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(width, 3, 3, padding=1)
        self.net = torch.nn.Sequential(*layers)

    def networks(self):
        return {"net": self.net}

    def losses(self, batch, generator):
        yield "net", (self.net(batch["gray"]) - batch["rgb"]).abs().mean()


def make(options, seed=0, components={}):
    return Regression(options["width"], seed)


def colorizer(trainee, sampling, components):
    @torch.no_grad()
    def colorize(gray, generator=None):
        return (trainee.net(gray) * sampling["gain"]).clamp(0, 1)

    return colorize


TOY = Architecture(
    name="toy",
    title="Toy regression",
    paper=dict(
        side=64, load_side=64, flip=True, width=8, batch_size=4,
        optimizer="adam", lr=1e-3, beta1=0.9, beta2=0.999, schedule="constant", ema=None,
    ),
    variants={"default": {}, "wide": dict(width=16)},
    make=make,
    colorizer=colorizer,
    sampling=dict(gain=1),
    parameters=lambda side, components: dict(gain=integer(1, 2)),
)  # fmt: skip


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The one place where the study learns of it, runs of one's own, and a feature network that costs nothing."""
    monkeypatch.setitem(ARCHITECTURES, "toy", TOY)
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(faic.phases, "efficientnet_lite0", lambda device: QuarterColors())
    monkeypatch.setattr(faic.phases, "find_judges", lambda device: ())


def test_the_study_works_with_a_further_architecture(photographs, toy):
    """Phase 1, phase 2, a table, a figure, a colorized photograph and the status."""
    first = run_phase1("toy", data=str(photographs), **TINY)
    assert {r.options["variant"] for r in first.runs} == set(TOY.variants) and first.winner.variant in TOY.variants
    second = run_phase2("toy", data=str(photographs), gain=1, **TINY)
    (run,) = second.runs
    assert second.variant == first.winner.variant and second.reason.startswith("phase 1's winner")
    assert sorted(set(run.metrics()["day"])) == [1, 2, 3, 4, 5]

    page = select_runs("smoke", photographs.name, 0)
    assert all_models(page) == [*PAPER_MODELS, "toy"] and "toy" not in all_models(select_runs("smoke", "embedded", 0))
    assert "table_variants_toy" in page_tables(page) and {"figure_variants_toy", "figure_days_toy"} <= {
        *page_drawings(page)
    }
    table = phase2_table(page)
    scores = table.frame.set_index("entry")
    assert np.isfinite(scores.loc["Toy regression", "PSNR"]) and "Toy regression" in table.markdown()
    legends = [*figure7(page).legends, *(ax.get_legend() for ax in figure7(page).axes if ax.get_legend())]
    assert "Toy regression" in [t.get_text() for legend in legends for t in legend.get_texts()]

    found = find_run(run.path.name)
    o, (_, weights) = found.options, last_day(found)
    sampling = default_sampling("toy", "smoke")
    components = find_components(found, sampling, "cpu")
    trainee = load_weights(make_trainee("toy", o["train"], components=components), weights, "cpu")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8))
    result = colorize_photo(make_colorizer("toy", trainee, sampling, components), photo, 64, trainee.gray_kind)
    assert result.size == (90, 70) and result.mode == "RGB"

    rows = status().set_index("run")
    assert rows.loc[run.path.name, "state"] == "finished" and run.path.name in describe_status(status())


def test_its_own_parameters_are_checked(photographs, toy):
    with pytest.raises(ParameterError, match="expected an integer from 1 to 2"):
        run_phase2("toy", data=str(photographs), gain=3, **TINY)
    with pytest.raises(ParameterError, match="temprature: no such parameter"):
        run_phase2("toy", data=str(photographs), temprature=1, **TINY)
    with pytest.raises(ParameterError, match="'coltran', 'bbdm', .*'toy'"):
        run_phase2("colrtan", data=str(photographs), **TINY)


OWN = {name.replace("-", "_") for name in ARCHITECTURES} | {"vqgan", "presets", "paper", "coltran_sampler"}
NAMES = rf"{'|'.join(ARCHITECTURES)}|coltran_\w+"
COMPARISON = re.compile(rf"""[!=]=\s*['"]({NAMES}|vqgan\w*)['"]|['"]({NAMES})['"]\s*(==|in\b)""")


def test_no_code_asks_for_an_architecture_by_name():
    """Outside a model's own chapters, the presets and the paper's data."""
    package = Path(faic.phases.__file__).parent
    found = []
    for file in sorted(package.glob("*.py")):
        if file.stem in OWN or file.stem.startswith("_") or file.stem.endswith("_checkpoints"):
            continue
        lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        found += [f"{file.name}:{n}: {line.strip()}" for n, line in lines if COMPARISON.search(line)]
    assert not found, "\n".join(found)
