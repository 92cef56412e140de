"""Pix2Pix and ColTran in latents, and a decoder that sees the gray photograph: phases, resume, tables, colorizing."""

import numpy as np
import pytest
import torch
from feature_nets import QuarterColors
from phases import CPU, TINY, colorized, copy_runs, interrupt, same, short_components
from PIL import Image
from safetensors.torch import load_file

import faic.coltran_latents
import faic.phases
import faic.pix2pix
from faic.components import component_options, find_components, prepare_components
from faic.core import Budget, make_generator, short_hash
from faic.dataset import load_photos
from faic.days import run_days, study_run
from faic.parameters import ParameterError
from faic.phases import run_phase1, run_phase2
from faic.presets import ARCHITECTURES, components_of, default_sampling, make_colorizer, make_trainee, model_options
from faic.resume import load_weights
from faic.runs import read_runs
from faic.score_tables import phase2_table, training_table
from faic.selection import last_day, newest_run, select_runs, space_options

OWNERS = {"pix2pix": faic.pix2pix.LatentPix2Pix, "coltran": faic.coltran_latents.LatentColTran}


@pytest.fixture(scope="module")
def photographs(photographs, tmp_path_factory):
    """Two thirds of the shared photographs: fewer evaluations."""
    folder = tmp_path_factory.mktemp("data") / "fewer"
    folder.mkdir()
    for file in sorted(photographs.iterdir())[:48]:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def latents(photographs, tmp_path_factory):
    """Phase 2 of Pix2Pix and ColTran in the latents of one first stage; its folder has runs/."""
    folder = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIC_RUNS", str(folder / "runs"))
        patch.setattr(faic.phases, "efficientnet_lite0", lambda device: QuarterColors())
        short_components(patch, "bbdm", 2)
        for model in OWNERS:
            run_phase2(model, data=str(photographs), latent="f4", **TINY)
    return folder


@pytest.fixture
def runs(latents, tmp_path, monkeypatch):
    """A copy of these runs, and the same short components."""
    monkeypatch.setattr(faic.phases, "efficientnet_lite0", lambda device: QuarterColors())
    short_components(monkeypatch, "bbdm", 2)
    return copy_runs(latents, tmp_path, monkeypatch) / "runs"


def test_models_share_a_first_stage_and_its_latents(runs, photographs):
    stages = read_runs(phase="component")
    assert [r.options["model"] for r in stages] == ["vqgan_f4"] * 2
    digits = next(r.path.name[-6:] for r in stages if r.options["of"] == "phase2")
    for model in OWNERS:
        (run,) = read_runs(phase="phase2", model=model)
        assert (run.options["latent"], run.options["first_stage"]) == ("f4", f"own:{digits}")
        assert run.metrics()["day"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5], model
        assert set(run.metrics()["lightness"]) == {"model", "photograph"}
    files = sorted(runs.glob("data-fewer-*/*.f16"))
    assert sorted(f.stem.endswith("flip") for f in files) == [False, True]  # Pix2Pix mirrors; BBDM reads ColTran's file


def test_tables_name_the_further_spaces(runs, photographs):
    page = select_runs("smoke", photographs.name, 0)
    entries = phase2_table(page).frame["entry"].tolist()
    assert {"Pix2Pix, f4", "ColTran, f4"} <= set(entries)
    work = training_table(page).frame["entry"].tolist()
    assert work.count("BBDM, VQGAN f4, phase 2") == 1 and "ColTran, f4, phase 2, lr-5e-4" not in work


@pytest.mark.parametrize("model", OWNERS)
def test_an_interrupted_model_in_latents_ends_the_same(model, runs, latents, photographs, monkeypatch):
    """Stopped between two checkpoints and started again; the fixture's phase 2 was not stopped."""
    (done,) = read_runs(phase="phase2", model=model)
    kept = {day: load_file(done.path / f"day-{day}.safetensors") for day in range(1, 6)}
    for file in [*done.path.glob("*.safetensors"), *done.path.glob("*.pt"), done.path / "log.jsonl"]:
        file.unlink()
    photos, sampling = load_photos(photographs), default_sampling(model, "smoke")

    def phase2(**loop_options):
        components, named = prepare_components(
            model, "phase2", "smoke", 0, photos, sampling, QuarterColors(), CPU, "f4", **loop_options
        )
        variant, budget = done.options["variant"], Budget(15, "steps")
        run = study_run("phase2", model, variant, "smoke", 0, photos, budget, CPU, "f4")
        assert run.path == done.path
        return run_days(run, photos, QuarterColors(), named, CPU, components, **loop_options)

    interrupt(monkeypatch, OWNERS[model], 8, phase2)
    phase2()
    for day, weights in kept.items():
        assert same(load_file(done.path / f"day-{day}.safetensors"), weights), day


def test_phase1_in_latents_compares_variants(runs, photographs):
    data = dict(data=str(photographs), latent="f4", **TINY)
    first = run_phase1("coltran", variants="default,factor-0.9", **data)
    assert first.winner.variant in ("default", "factor-0.9")
    codes = model_options("coltran", "smoke", latent="f4")["codes"]
    state = load_file(first.runs[0].path / "day-1.safetensors")
    assert state["net.head.weight"].shape[0] == state["net.gray.weight"].shape[0] == codes
    assert not read_runs(phase="component", model="coltran_color")


def test_on_pixels_runs_are_named_as_before(photographs, tmp_path, monkeypatch):
    """Runs that were made before these models had latents are found again: no option is new, and none is missing."""
    photos = load_photos(photographs)
    for model in OWNERS:
        assert space_options(model, "phase2", "smoke", 0, photos) == {}
        assert not {"factor", "latent_channels", "codes", "normalize"} & set(model_options(model, "smoke"))
    assert components_of("coltran") == ("coltran_color", "coltran_spatial") and components_of("pix2pix") == ()
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path))
    run = study_run("phase2", "pix2pix", "default", "smoke", 0, photos, Budget(1, "steps"), CPU)
    assert not {"latent", "first_stage"} & set(run.options)
    (run.path / "day-1.safetensors").touch()
    assert newest_run("pix2pix", "smoke", 0, photos).path == run.path
    assert newest_run("pix2pix", "smoke", 0, photos, "f4") is None


@pytest.mark.parametrize("model", OWNERS)
def test_a_photograph_is_colorized_in_latents(model, runs, monkeypatch):
    (run,) = read_runs(phase="phase2", model=model)
    monkeypatch.setattr("phases.find_run", lambda: run)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8))
    result = colorized(photo)
    assert result.size == (90, 70) and result.mode == "RGB"


@pytest.mark.parametrize("model", OWNERS)
def test_bfloat16_and_the_batch_change_little(model, runs):
    (run,) = read_runs(phase="phase2", model=model)
    components = find_components(run, default_sampling(model, "smoke"), CPU)
    trainee = make_trainee(model, run.options["train"], components=components)
    load_weights(trainee, last_day(run)[1])
    gray = torch.rand(3, 1, 64, 64, generator=make_generator(1))
    greedy = dict(temperature=0) if model == "coltran" else {}
    answers = {}
    for precision in ("float32", "bfloat16"):
        sampling = default_sampling(model, "smoke") | greedy | dict(precision=precision)
        colorize = make_colorizer(model, trainee, sampling, components)
        answers[precision] = colorize(gray, [make_generator(i) for i in range(3)])
        alone = colorize(gray[1:2], [make_generator(1)])
        tolerance = 1e-4 if precision == "float32" else 0.3
        assert (alone - answers[precision][1:2]).abs().max() < tolerance
    assert (answers["float32"] - answers["bfloat16"]).abs().mean() < 0.1


def test_a_decoder_that_sees_gray_scores_the_same_run_again(runs, photographs):
    """Its component is trained on the run's first stage; the model is not trained again."""
    (run,) = read_runs(phase="phase2", model="pix2pix")
    weights = {f: f.stat().st_mtime_ns for f in run.path.glob("*.safetensors")}
    arguments = dict(data=str(photographs), latent="f4", **TINY)
    (again,) = run_phase2("pix2pix", decoder="gray", **arguments).runs
    assert again.path == run.path and weights == {f: f.stat().st_mtime_ns for f in run.path.glob("*.safetensors")}

    decoders = {r.options["of"]: r for r in read_runs(phase="component", model="vqgan_f4_gray")}
    digits = decoders["phase2"].path.name[-6:]
    base = run.options["first_stage"].removeprefix("own:")
    assert decoders["phase2"].options["base"] == base and set(decoders) == {"phase1", "phase2"}
    assert {"codebook usage", "PSNR"} <= set(decoders["phase2"].metrics())
    rows = again.metrics().groupby("sampling")["day"].nunique().to_dict()
    assert rows == {"batch_norm=image": 5, f"batch_norm=image, decoder=gray:{digits}": 5}
    entries = phase2_table(select_runs("smoke", photographs.name, 0)).frame["entry"].tolist()
    assert f"Pix2Pix, f4, sampling decoder=gray:{digits}" in entries
    assert "VQGAN f4 with a decoder that sees gray, reconstruction" in entries

    found = find_components(run, dict(batch_norm="image", decoder="gray"), CPU)
    assert list(found) == ["vqgan_f4", "vqgan_f4_gray"] and found["vqgan_f4_gray"].sees_gray


def test_a_decoder_needs_the_first_stage_of_its_run(runs, photographs):
    (run,) = read_runs(phase="phase2", model="coltran")
    with pytest.raises(FileNotFoundError, match="has no decoder that sees gray"):
        find_components(run, dict(upsamplers="own", decoder="gray"), CPU)
    photos = load_photos(photographs)
    made = component_options("vqgan_f4_gray", "phase1", "smoke", 0, photos)
    assert made["base"] == short_hash(component_options("vqgan_f4", "phase1", "smoke", 0, photos))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(latent="none", decoder="gray"), "has no decoder"),
        (dict(latent="f4", first_stage="plain", decoder="gray"), "own first stage"),
        (dict(latent="f4", decoder="grey"), "'gray'"),
        (dict(latent="f8"), "expected one of '', 'none', 'f4'"),
    ],
)
def test_wrong_spaces_and_decoders_are_refused(wrong, message):
    with pytest.raises(ParameterError) as error:
        run_phase2("pix2pix", **wrong, **TINY)
    assert message in str(error.value)


def test_the_published_space_of_each_architecture_is_its_first():
    assert {name: next(iter(a.latents)) for name, a in ARCHITECTURES.items() if a.latents} == {
        "pix2pix": "none",
        "coltran": "none",
        "bbdm": "f4",
    }
