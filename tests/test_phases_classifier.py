"""The classifier in the phases: weights of classes that come from the training photographs, and a temperature."""

import numpy as np
import pytest
import torch
from feature_nets import QuarterColors
from phases import CPU, TINY, colorized, interrupt, same
from PIL import Image
from safetensors.torch import load_file

import faic.classifier
import faic.phases
from faic.classifier import Classifier, count_classes, random_crops
from faic.components import make_trainer
from faic.core import BatchGenerator, Budget, make_generator
from faic.dataset import load_photos
from faic.days import run_days, study_run
from faic.parameters import ParameterError
from faic.phases import run_phase1, run_phase2
from faic.presets import PRESETS, default_sampling, default_variants, make_trainee, model_options

SAMPLING = default_sampling("classifier", "smoke")


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """A network that is even narrower than that of `smoke`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS["smoke"].changes["classifier"], "width", 4)
        yield


@pytest.fixture(scope="module")
def phases(photographs, tmp_path_factory):
    """Both phases of a narrow network, in a folder of their own, with a feature network that costs nothing."""
    folder = tmp_path_factory.mktemp("classifier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIC_RUNS", str(folder / "runs"))
        patch.setattr(faic.phases, "efficientnet_lite0", lambda device: QuarterColors())
        first = run_phase1("classifier", data=str(photographs), variants="default,no-rebalancing", **TINY)
        second = run_phase2("classifier", data=str(photographs), **TINY)
    return folder, first, second


def test_both_phases(phases):
    _, first, second = phases
    variants = {r.options["variant"]: r.options["train"] for r in first.runs}
    assert variants["default"] | dict(alpha=0) == variants["no-rebalancing"]
    assert second.variant == first.winner.variant
    (run,) = second.runs
    table = run.metrics()
    assert table["day"].tolist() == [1, 2, 3, 4, 5] and table["lightness"].unique().tolist() == ["photograph"]
    assert table["sampling"].unique().tolist() == ["annealing=0.38"]
    assert {"step", "net", "weighted"} <= set(second.losses[0].columns)


def test_variants():
    """Four; each changes one option, by the published ratio."""
    options = {v: model_options("classifier", "smoke", v) for v in default_variants("classifier")}
    assert list(options) == ["default", "beta1-0.7", "lr-1e-4", "no-rebalancing"]
    changed = [[k for k in o if o[k] != options["default"][k]] for o in options.values()]
    assert changed == [[], ["beta1"], ["lr"], ["alpha"]]
    assert options["lr-1e-4"]["lr"] / options["default"]["lr"] == pytest.approx(1e-4 / 3.16e-5, rel=1e-3)


def test_colorize(phases, monkeypatch):
    folder, _, _ = phases
    monkeypatch.setenv("FAIC_RUNS", str(folder / "runs"))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8))
    results = [colorized(photo, annealing=annealing) for annealing in (0.38, 1.0)]
    assert all(result.size == (90, 70) and result.mode == "RGB" for result in results)
    assert results[0].tobytes() != results[1].tobytes()


def test_a_negative_temperature_is_refused(photographs):
    with pytest.raises(ParameterError, match="annealing = -1: expected a number, 0 or more"):
        run_phase2("classifier", data=str(photographs), annealing=-1, **TINY)


def test_an_interrupted_run_ends_the_same(phases, photographs, tmp_path, monkeypatch):
    """Stopped between two checkpoints and started again, it derives the same factors, and the weights are the same."""
    folder, _, second = phases
    (undisturbed,) = second.runs
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    photos, budget = load_photos(photographs), Budget(15, "steps")

    def phase2(**loop_options):
        run = study_run("phase2", "classifier", second.variant, "smoke", 0, photos, budget, CPU)
        return run_days(run, photos, QuarterColors(), SAMPLING, CPU, **loop_options)

    interrupt(monkeypatch, Classifier, 8, phase2)
    run = phase2()
    assert run.path.name == undisturbed.path.name
    for day in range(1, 6):
        files = (runs / run.path.name / f"day-{day}.safetensors" for runs in (tmp_path / "runs", folder / "runs"))
        assert same(*map(load_file, files)), day


def test_the_factors_are_the_training_split_s(photographs, tmp_path, monkeypatch):
    """Each phase has its own; a sample of the photographs is spread evenly over all."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    photos, factors = load_photos(photographs), {}
    for phase in ("phase1", "phase2"):
        run = study_run(phase, "classifier", "default", "smoke", 0, photos, Budget(1, "steps"), CPU)
        factors[phase] = make_trainer(run, photos, phase, 1, CPU).trainee.factors
    assert not torch.equal(*factors.values()) and all(f.max() > 2 * f.min() > 0 for f in factors.values())
    untouched = make_trainee("classifier", run.options["train"]).factors
    assert torch.equal(untouched, torch.ones(313, dtype=torch.float64))
    array = photos.array[photos.splits["train"]]
    few = count_classes(array, limit=7)
    assert np.array_equal(few, count_classes(array[np.arange(7) * len(array) // 7]))


def test_crops_do_not_depend_on_pieces():
    """The corners of a batch's photographs, all at once and in two pieces."""
    rgb = torch.rand(5, 3, 40, 48, generator=make_generator("rgb"))
    batch = dict(gray=rgb[:, :1], rgb=rgb)
    whole = random_crops(batch, 16, BatchGenerator(make_generator("crops"), slice(0, 5), 5))
    for rows in (slice(0, 2), slice(2, 5)):
        piece = {k: v[rows] for k, v in batch.items()}
        crops = random_crops(piece, 16, BatchGenerator(make_generator("crops"), rows, 5))
        assert all(torch.equal(a, b[rows]) for a, b in zip(crops, whole, strict=True))
    assert torch.equal(whole[0], whole[1][:, :1]) and len({x.numpy().tobytes() for x in whole[0]}) == 5
