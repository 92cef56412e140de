"""The conditional GAN in the phases: networks that take turns, an interruption in the middle of a cycle, a photograph."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from feature_nets import QuarterColors
from phases import CPU, colorized, interrupt, same
from PIL import Image
from safetensors.torch import load_file

import faic.cgan
import faic.phases
from faic.cgan import CGAN
from faic.components import make_trainer
from faic.core import Budget, make_generator
from faic.dataset import load_photos
from faic.days import run_days, study_run
from faic.inference import open_model
from faic.parameters import ParameterError
from faic.phases import run_phase1, run_phase2
from faic.presets import ARCHITECTURES, find_architecture, make_trainee, model_options
from faic.train import TrainingState, train_step
from faic.trainer import train_day


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A folder of runs of its own, and a feature network that costs nothing."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(faic.phases, "efficientnet_lite0", lambda device: QuarterColors())


def test_phase1_phase2_and_a_photograph(photographs, quick):
    """Seven steps and more: each network is updated."""
    settings = dict(data=str(photographs), device="cpu")
    first = run_phase1("cgan", budget="7 steps", **settings)
    assert {r.options["variant"] for r in first.runs} == set(find_architecture("cgan").variants)
    for run in first.runs:
        losses = [e for e in run.events() if "epoch" in e]
        assert {"critic", "G"} <= {name for event in losses for name in event}
        assert not [e for e in run.events() if e.get("event") == "discriminator won"]
    second = run_phase2("cgan", budget="2 steps", statistics="running", **settings)
    (run,) = second.runs
    assert set(run.metrics()["sampling"]) == {"statistics=running"} and run.metrics()["day"].nunique() == 5
    assert set(run.metrics()["lightness"]) == {"model", "photograph"}
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8))
    result = colorized(photo, statistics="image")
    assert result.size == (90, 70) and result.mode == "RGB"
    with pytest.raises(ParameterError, match="expected one of 'image', 'batch', 'running'"):
        run_phase2("cgan", budget="2 steps", statistics="own", **settings)


def test_weights_of_a_winner_with_more_layers_are_timed(photographs, quick):
    photos = load_photos(photographs)
    run = study_run("phase2", "cgan", "noise-3", "smoke", 0, photos, Budget(5, "steps"), CPU)
    weights = load_file(train_day(make_trainer(run, photos, "phase2", 1, CPU), 1))
    timed = open_model("cgan", SimpleNamespace(preset="smoke", seed=0, latent=""), photos)
    assert timed.run.path == run.path
    state = timed.trainee.networks()["G"].state_dict()
    assert same(state, {name.removeprefix("G."): value for name, value in weights.items() if name.startswith("G.")})


@pytest.mark.parametrize("variant", ["default", "noise-3"])
def test_an_interrupted_cycle_ends_the_same(photographs, variant, tmp_path, monkeypatch):
    """Stopped at the third update of the discriminator, in the second cycle, and started again."""
    photos, budget = load_photos(photographs), Budget(13, "steps")

    def phase1(folder, **loop_options):
        monkeypatch.setenv("FAIC_RUNS", str(tmp_path / folder))
        run = study_run("phase1", "cgan", variant, "smoke", 0, photos, budget, CPU)
        sampling = dict(statistics="image")
        return run_days(run, photos, QuarterColors(), sampling, CPU, {}, **loop_options)

    whole = phase1("whole")
    interrupt(monkeypatch, CGAN, 9, lambda **options: phase1("halves", check_every=2, **options))
    again = phase1("halves")
    assert same(*(load_file(run.path / "day-1.safetensors") for run in (whole, again)))
    assert [e for e in again.events() if e.get("event") == "resumed"]


def state_of(variant, micro_batches=1, **changes):
    """A training state of a tiny edition in float64, and a batch of four images."""
    small = dict(side=16, width=8, critic_width=2, batch_size=4, seed=0)
    options = model_options("cgan", "smoke", variant) | small | changes
    trainee = make_trainee("cgan", options)
    for net in trainee.networks().values():
        net.double()
    state = TrainingState(trainee, np.arange(4), Budget(12, "steps"), options, micro_batches=micro_batches)
    rgb = torch.rand(4, 3, 16, 16, generator=make_generator("rgb"), dtype=torch.float64)
    return state, dict(index=torch.arange(4), rgb=rgb)


@pytest.mark.parametrize("variant", ["penalty", "penalty-image", "noise-3"])
def test_pieces_of_a_batch_draw_the_batch_s_numbers(variant, monkeypatch):
    """Noise and interpolation weights, before the norms look at a piece of their own."""
    drawn = {}
    for pieces in (1, 2):
        state, batch = state_of(variant, pieces)
        seen, noise, alpha = [], faic.cgan.sample_noise, faic.cgan.sample_alpha
        with monkeypatch.context() as patch:
            patch.setattr(faic.cgan, "sample_noise", lambda *a: seen.append(noise(*a)) or seen[-1])
            patch.setattr(faic.cgan, "sample_alpha", lambda *a: seen.append(alpha(*a)) or seen[-1])
            train_step(state, batch)
        drawn[pieces] = seen
    z, alphas = drawn[1]
    assert torch.equal(z, torch.cat(drawn[2][0::2]))
    if variant == "penalty":  # the columns of all images
        assert all(torch.equal(alphas, a) for a in drawn[2][1::2])
    else:
        assert torch.equal(alphas, torch.cat(drawn[2][1::2]))


def test_weights_are_clipped_and_rates_differ():
    state, batch = state_of("default")
    for _ in range(6):
        train_step(state, batch)
        state.step += 1
    clipped = [p.abs().max().item() for p in state.parameters["critic"]]
    assert max(clipped) == 0.01 and max(p.abs().max().item() for p in state.parameters["G"]) > 0.9
    rates = {n: o.param_groups[0]["lr"] for n, o in state.optimizers.items()}
    assert rates["critic"] == 2 * rates["G"]


def test_accumulation_is_refused():
    with pytest.raises(ValueError, match="take turns"):
        state_of("default", accumulate=2)


def test_its_presets_share_the_side():
    sides = [model_options("cgan", preset)["side"] for preset in ("smoke", "laptop", "gpu", "paper")]
    assert sides == [64, 64, 64, 256] and "cgan" in ARCHITECTURES
