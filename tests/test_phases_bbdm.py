"""BBDM in the phases: a component that training needs, latents that are prepared once, samplings of several lengths."""

import shutil
from functools import partial

import numpy as np
import pytest
from feature_nets import QuarterColors
from phases import CPU, TINY, colorized, copy_runs, interrupt, papermill, printed, same, short_components, weights
from PIL import Image
from safetensors.torch import load_file

import faic.bbdm
import faic.vqgan
import faic.first_stages
from faic.components import find_components, prepare_components
from faic.core import Budget, runs_dir
from faic.dataset import load_photos
from faic.days import run_days, study_run
from faic.parameters import notebook_parameters
from faic.presets import PRESETS
from faic.runs import read_runs


@pytest.fixture(scope="module")
def bbdm(photographs, tmp_path_factory):
    """Phase 2 of BBDM alone; its folder has runs/ and the executed notebook."""
    folder = tmp_path_factory.mktemp("bbdm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIC_RUNS", str(folder / "runs"))
        done = papermill("phase2", folder, model="bbdm", sample_steps=3, data=photographs, **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def prepare(phase, photos, **options):
    """BBDM's components, trained where they are not there, and the sampling."""
    sampling = dict(sample_steps=3, eta=1.0)
    return prepare_components("bbdm", phase, "smoke", 0, photos, sampling, QuarterColors(), CPU, **options)


@pytest.fixture
def bbdm_runs(bbdm, tmp_path, monkeypatch):
    copy_runs(bbdm, tmp_path, monkeypatch)
    return bbdm


def test_phase2_of_bbdm_trains_its_first_stage_and_prepares_latents(bbdm_runs):
    output = printed(bbdm_runs)
    first, second = (read_runs(phase="component", model="vqgan_f4", of=phase)[0] for phase in ("phase1", "phase2"))
    assert second.events()[0]["run"] == first.path.name
    for run, split in ((first, "validation"), (second, "test")):
        m = run.metrics()
        assert m["split"].tolist() == [split] * 2 and m["lightness"].tolist() == ["model", "photograph"]
        assert (
            0 < m["codebook usage"].iloc[0] <= 1 <= m["perplexity"].iloc[0]
            and m["FID (EfficientNet-Lite0)"].iloc[0] > 0
        )
    (run,) = read_runs(phase="phase2", model="bbdm")
    assert (run.options["latent"], run.options["first_stage"]) == ("f4", f"own:{second.path.name[-6:]}")
    (file,) = runs_dir().glob("data-photographs-*/*.f16")
    assert file.stat().st_size == 2 * 66 * 6 * 16 * 16 and "latents of train: made" in output
    table = run.metrics()
    assert table["day"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and table["sampling"].unique().tolist() == [
        "eta=1, sample_steps=3"
    ]
    assert table["step"].tolist() == [3, 3, 6, 6, 9, 9, 12, 12, 15, 15]


def test_more_steps_are_rows_of_the_same_run(photographs, bbdm_runs):
    (run,) = read_runs(phase="phase2", model="bbdm")
    kept = {
        f: f.stat().st_mtime_ns
        for f in runs_dir().rglob("*")
        if f.suffix in (".safetensors", ".pt", ".npy", ".jsonl", ".f16")
    }
    components = find_components(run, dict(sample_steps=4, eta=0.0), CPU)
    run_days(run, load_photos(photographs), QuarterColors(), dict(sample_steps=4, eta=0.0), CPU, components)
    assert run.metrics().groupby("sampling")["day"].nunique().to_dict() == {
        "eta=0, sample_steps=4": 5,
        "eta=1, sample_steps=3": 5,
    }
    assert kept.items() <= {f: f.stat().st_mtime_ns for f in runs_dir().rglob("*")}.items()


def test_an_interrupted_bbdm_ends_the_same(photographs, bbdm, tmp_path, monkeypatch):
    """Stopped between two checkpoints and started again; the fixture's phase 2 was not stopped."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    for folder in (bbdm / "runs").glob("component-*"):
        shutil.copytree(folder, tmp_path / "runs" / folder.name)
    photos, budget = load_photos(photographs), Budget(15, "steps")

    def phase2(**loop_options):
        components, sampling = prepare("phase2", photos, **loop_options)
        run = study_run("phase2", "bbdm", "beta1-0.7", "smoke", 0, photos, budget, CPU)
        return run_days(run, photos, QuarterColors(), sampling, CPU, components, **loop_options)

    interrupt(monkeypatch, faic.bbdm.BBDM, 8, phase2)
    run = phase2()
    assert len(read_runs(phase="component")) == 2
    for day in range(1, 6):
        files = (runs / run.path.name / f"day-{day}.safetensors" for runs in (tmp_path / "runs", bbdm / "runs"))
        assert same(*map(load_file, files)), day


def test_an_interrupted_first_stage_ends_the_same(photographs, tmp_path, monkeypatch):
    """Stopped in phase 2, after its discriminator has begun and between two checkpoints."""
    short_components(monkeypatch, "bbdm", 5)
    monkeypatch.setitem(PRESETS["smoke"].changes["vqgan_f4"], "disc_start", 7)
    photos = load_photos(photographs)
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "undisturbed"))
    prepare("phase2", photos)
    undisturbed = {r.path.name: weights(r) for r in read_runs(phase="component")}
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "interrupted"))
    interrupt(monkeypatch, faic.vqgan.VQGAN, 5 + 4, partial(prepare, "phase2", photos))
    prepare("phase2", photos)
    again = {r.path.name: weights(r) for r in read_runs(phase="component")}
    assert len(undisturbed) == 2 and all(same(again[name], undisturbed[name]) for name in undisturbed)
    steps = max(int(w["D.steps"]) for w in undisturbed.values())
    assert steps == 10, "the discriminator, which begins at step 7, was in the interrupted run"


@pytest.mark.parametrize("latent", ["f4", "f8", "none"])
def test_other_spaces_train_and_colorize(photographs, latent, tmp_path, monkeypatch):
    """An external first stage, another downsampling factor, and no latent space at all."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    short_components(monkeypatch, "bbdm", 2)
    photos, stage = load_photos(photographs), ""
    if latent == "f4":
        stage = str(tmp_path / "model.ckpt")
        faic.first_stages.save_ldm(
            faic.vqgan.VQModel(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, n_embed=16), stage
        )
    components, sampling = prepare("phase1", photos, latent=latent, first_stage=stage)
    run = study_run("phase1", "bbdm", "default", "smoke", 0, photos, Budget(2, "steps"), CPU, latent, stage)
    run_days(run, photos, QuarterColors(), sampling, CPU, components)
    assert run.options["first_stage"].split(":")[0] == dict(f4="given", f8="own", none="")[latent]
    assert len(read_runs(phase="component")) == (latent == "f8") and len(components) == (latent != "none")
    assert run.metrics()["lightness"].tolist() == ["model", "photograph"]
    assert bool(list(runs_dir().glob("data-photographs-*/*.f16"))) == (latent != "none")


def test_first_stages_that_do_not_fit_are_refused_at_once(tmp_path):
    file = tmp_path / "model.ckpt"
    faic.first_stages.save_ldm(faic.vqgan.VQModel(ch=32, ch_mult=(1, 1), num_res_blocks=1, n_embed=16), file)
    wrong = [
        (file, "f4", "by the factor 2"),
        (tmp_path / "no.ckpt", "f4", "is no file"),
        ("plain", "none", "has no first stage"),
        (__file__, "f8", "is no VQGAN"),
    ]
    for stage, latent, message in wrong:
        parameters = dict(model="bbdm", preset="smoke", latent=latent, first_stage=str(stage), sample_steps=2)
        with pytest.raises(ValueError) as error:
            notebook_parameters(parameters, *parameters)
        assert message in str(error.value) and "3 to 1000" in str(error.value)


def test_colorize_with_bbdm(bbdm_runs):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8))
    result = colorized(photo, sample_steps=3)
    assert result.size == (90, 70) and result.mode == "RGB"
