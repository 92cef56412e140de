"""Palette and its modern edition in the phases: two ways to sample, an interruption, pieces of a batch, averages."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from feature_nets import QuarterColors
from phases import CPU, colorized, interrupt, same
from PIL import Image
from safetensors.torch import load_file

import faic.phases
from faic.core import Budget, make_generator
from faic.dataset import load_photos
from faic.days import run_days, study_run
from faic.palette import Palette
from faic.parameters import ParameterError
from faic.phases import run_phase1, run_phase2
from faic.presets import default_sampling, default_variants, make_trainee, model_options
from faic.resume import eval_weights
from faic.train import TrainingState, learning_rate_factor, train_step

MODELS = ("palette", "palette-modern")


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """A folder of runs of its own, and a feature network that costs nothing."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(faic.phases, "efficientnet_lite0", lambda device: QuarterColors())


def test_phase1(photographs):
    """Two of the reference's four variants, and an objective of the modern edition."""
    settings = dict(data=str(photographs), device="cpu", sample_steps=3, budget="1 steps")
    first = run_phase1("palette", variants="l1,saharia", **settings)
    assert [r.options["variant"] for r in first.runs] == ["l1", "saharia"] == default_variants("palette")[1::2]
    (x0,) = run_phase1("palette-modern", variants="x0", **settings).runs
    assert x0.options["train"]["objective"] == "x0" and x0.metrics()["lightness"].tolist() == ["photograph"]


@pytest.mark.parametrize("model", MODELS)
def test_phase2_and_a_photograph(photographs, model):
    settings = dict(data=str(photographs), device="cpu", sample_steps=3)
    second = run_phase2(model, budget="1 steps", sampler="heun", **settings)
    (run,) = second.runs
    assert set(run.metrics()["sampling"]) == {"noise_levels=karras, sample_steps=3, sampler=heun"}
    assert set(run.metrics()["lightness"]) == {"photograph"} | ({"model"} if model == "palette" else set())
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8))
    assert colorized(photo, sample_steps=3).size == (90, 70)
    with pytest.raises(ParameterError, match="expected one of '', 'ddpm', 'ddim', 'heun'"):
        run_phase2(model, budget="1 steps", sampler="euler", **settings)


def test_an_interrupted_run_ends_the_same(photographs, tmp_path, monkeypatch):
    """With dropout, averages that are kept, and a network that is evaluated in their place."""
    photos, sampling = load_photos(photographs), default_sampling("palette", "smoke") | dict(sample_steps=3)

    def phase1(folder, **loop_options):
        monkeypatch.setenv("FAIC_RUNS", str(tmp_path / folder))
        run = study_run("phase1", "palette", "default", "smoke", 0, photos, Budget(6, "steps"), CPU)
        return run_days(run, photos, QuarterColors(), sampling, CPU, {}, **loop_options)

    whole = phase1("whole")
    interrupt(monkeypatch, Palette, 4, lambda **options: phase1("halves", check_every=2, **options))
    again = phase1("halves")
    assert same(*(load_file(run.path / "day-1.safetensors") for run in (whole, again)))


def state_of(model, micro_batches=1, variant="default", **changes):
    """A training state of a tiny edition in float64, and a batch of four images."""
    small = dict(side=16, channels=16, channel_mult=[1, 2], groups=4, head_channels=16, batch_size=4, seed=0)
    options = model_options(model, "smoke", variant) | small | changes
    trainee = make_trainee(model, options)
    trainee.net.double()
    state = TrainingState(trainee, np.arange(4), Budget(12, "steps"), options, micro_batches=micro_batches)
    rgb = torch.rand(4, 3, 16, 16, generator=make_generator("rgb"), dtype=torch.float64)
    return state, dict(index=torch.arange(4), rgb=rgb, gray=rgb.mean(1, keepdim=True))


@pytest.mark.parametrize("model", MODELS)
def test_pieces_of_a_batch_change_nothing(model):
    """Times, noise and dropout are those of the whole batch."""
    found = {}
    for pieces in (1, 3):
        state, batch = state_of(model, pieces)
        loss = train_step(state, batch)["net"]
        found[pieces] = [loss.double(), *(p.grad for p in state.parameters["net"])]
    for whole, summed in zip(*found.values(), strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-6, atol=1e-9)


def test_what_is_evaluated_and_the_warmup():
    for model, averaged in (("palette", False), ("palette-modern", True)):
        state, batch = state_of(model)
        train_step(state, batch)
        evaluated = eval_weights(state, "net", state.networks["net"])
        assert (evaluated is state.ema["net"].module) == averaged and state.ema
    state, _ = state_of("palette", variant="saharia", warmup=0.5)
    rates = []
    for state.step in range(0, 12, 3):
        rates.append(learning_rate_factor(state))
    assert rates == [0, 0.5, 1, 1] and state.options["attention_factors"] == [8, 16, 32]


def test_the_trial_of_learning(photographs, tmp_path, monkeypatch):
    """A row for each item and lightness; items that differ in their sampling share a run."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "trials")
    import learning

    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(learning, "efficientnet_lite0", QuarterColors)
    items = ["palette:sample_steps=3", "palette:sample_steps=3;sampler=heun", "palette:sample_steps=3;target=chroma"]
    words = [str(photographs), *items, "--preset", "smoke", "--steps", "2", "--scored", "4"]
    learning.main([*words, "--out", str(tmp_path / "learning.csv")])
    rows = pd.read_csv(tmp_path / "learning.csv")
    assert rows["lightness"].tolist() == ["model", "photograph"] * 2 + ["photograph"]
    assert {"FID low", "chroma error high"} <= set(rows) and len(list((tmp_path / "runs").glob("phase1-*"))) == 2
    with pytest.raises(SystemExit, match="no option targte"):
        learning.main([str(photographs), "palette:targte=chroma", "--preset", "smoke", "--steps", "2"])
    sys.modules.pop("learning"), sys.modules.pop("throughput", None)
