"""The notebooks as a user starts them: papermill on the command line, from another folder, in the order of the study."""
import ast
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import faic.bbdm
import faic.coltran
import faic.study
import faic.vqgan
from faic.coltran import Colorizer, Upsampler
from faic.core import Budget, check_params, pick_device, read_runs, runs_dir
from faic.data import load_photos
from faic.plots import main_rows
from faic.presets import PARTS, PRESETS, SAMPLING, UPSAMPLERS, given, notebook_parameters
from faic.study import find_parts, ready_parts, refuse_other_data, run_days, run_pretrained, study_run, train_part
from faic.train import TrainingStopped

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


@pytest.fixture(scope="module")
def phase1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phase1")
    done = papermill("phase1", folder, model="pix2pix", variants="lr-5e-4,default", **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def phase2(phase1, tmp_path_factory):
    folder = tmp_path_factory.mktemp("phase2")
    done = papermill("phase2", folder, model="pix2pix", **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_phase1_chooses_the_lowest_fid(phase1):
    runs = read_runs(phase="phase1", model="pix2pix")
    assert sorted(r.options["variant"] for r in runs) == ["default", "lr-5e-4"]
    fid = {r.options["variant"]: r.metrics()["FID (EfficientNet-Lite0)"].iloc[-1] for r in runs}
    crowned = [r for r in runs if (r.path / "winner.json").exists()]
    assert [r.options["variant"] for r in crowned] == [min(fid, key=fid.get)]
    assert all(r.metrics()["step"].tolist() == [3] for r in runs)
    assert "device: cpu" in printed(phase1)
    assert "says nothing about the models" in (phase1 / "out.ipynb").read_text()


def test_phase1_scores_the_baselines(phase1):
    gray, real = (read_runs(phase="phase1", model="baseline", variant=v)[0].metrics().iloc[0] for v in ("gray", "real"))
    assert gray["FID (EfficientNet-Lite0)"] > 0 and gray["colourfulness"] < 1
    assert np.isnan(real["FID (EfficientNet-Lite0)"]) and real["unpaired FID (EfficientNet-Lite0)"] > 0


def test_phase2_trains_the_winner_for_five_days(phase2):
    (run,) = read_runs(phase="phase2", model="pix2pix")
    (winner,) = [r for r in read_runs(phase="phase1", model="pix2pix") if (r.path / "winner.json").exists()]
    assert run.options["variant"] == winner.options["variant"]
    assert "phase 1's winner" in printed(phase2)
    assert run.metrics()["day"].tolist() == [1, 2, 3, 4, 5]
    assert run.metrics()["step"].tolist() == [3, 6, 9, 12, 15]
    assert len({np.load(f).tobytes() for f in run.path.glob("samples/day-*.npy")}) == 5


def test_what_is_done_is_not_done_again(phase2, tmp_path):
    (run,) = read_runs(phase="phase2", model="pix2pix")
    before = {f: f.stat().st_mtime_ns for f in run.path.rglob("*") if f.name != "last.pt"}
    done = papermill("phase2", tmp_path, model="pix2pix", **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert before == {f: f.stat().st_mtime_ns for f in run.path.rglob("*") if f.name != "last.pt"}


def test_another_sampling_is_a_row_of_its_own(phase2, tmp_path):
    (run,) = read_runs(phase="phase2", model="pix2pix")
    pictures = {f: f.read_bytes() for f in run.path.glob("samples/*")}
    done = papermill("phase2", tmp_path, model="pix2pix", batch_norm="running", **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = run.metrics().groupby("sampling")["step"].apply(list).to_dict()
    assert steps == {"batch_norm=image": [3, 6, 9, 12, 15], "batch_norm=running": [3, 6, 9, 12, 15]}
    assert main_rows(run)["sampling"].unique().tolist() == ["batch_norm=image"], "the tables use what the study uses"
    assert all(f.read_bytes() == content for f, content in pictures.items())


def test_killed_and_started_again_it_ends_the_same(phase2, tmp_path, monkeypatch):
    """SIGKILL after the second day, in a second folder of runs; then the same command."""
    (whole,) = read_runs(phase="phase2", model="pix2pix")
    for folder in runs_dir().glob("phase1-*"):
        shutil.copytree(folder, tmp_path / "runs" / folder.name)
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    started = subprocess.Popen(command("phase2", model="pix2pix", **TINY), cwd=tmp_path, stderr=subprocess.DEVNULL)
    while started.poll() is None and not list(tmp_path.glob("runs/phase2-pix2pix-*/day-2.safetensors")):
        time.sleep(0.05)
    for process in [*psutil.Process(started.pid).children(recursive=True), started]:
        process.kill()
    started.wait()
    (killed,) = read_runs(phase="phase2", model="pix2pix")
    assert not (killed.path / "day-5.safetensors").exists(), "it was too fast to be killed"
    done = papermill("phase2", tmp_path, model="pix2pix", **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert killed.path.name == whole.path.name
    same = [c for c in whole.metrics() if "seconds" not in c]
    wanted = main_rows(whole)[same].reset_index(drop=True)
    pd.testing.assert_frame_equal(killed.metrics()[same], wanted, check_exact=True)
    for day in range(1, 6):
        ours, theirs = (load_file(r.path / f"day-{day}.safetensors") for r in (killed, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs), day


def test_a_folder_of_41_photographs_is_enough(tmp_path, monkeypatch):
    """Two validation images: no intervals, and nothing breaks."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    noise = np.random.default_rng(0)
    (tmp_path / "few").mkdir()
    for i in range(41):
        Image.fromarray(noise.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(tmp_path / "few" / f"{i}.png")
    done = papermill("phase1", tmp_path, data=tmp_path / "few", variants="default,beta1-0.7", **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "too few images for intervals" in printed(tmp_path)
    assert "37 train, 2 validation, 2 test" in printed(tmp_path)


def test_inference_time(phase2, tmp_path):
    done = papermill("inference_time", tmp_path, images=4, device="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_runs(phase="inference", model="coltran")) == 1
    (run,) = read_runs(phase="inference", model="pix2pix")
    table = pd.read_csv(run.path / "metrics.csv")
    assert table["batch_size"].tolist() == [1, 8]
    assert (table["seconds_per_image"] > 0).all() and (table["gflop_per_image"] > 0).all() and table["peak_share"].between(0, 1.5).all()


def test_colorize_keeps_size_and_leaves_out_what_is_no_photograph(phase2, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grandmother.png")
    (tmp_path / "letter.txt").write_text("no photograph")
    (run,) = read_runs(phase="phase2", model="pix2pix")
    done = papermill("colorize", tmp_path, photo=tmp_path, run=run.path, device="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left out: letter.txt" in printed(tmp_path)
    with Image.open(tmp_path / "colorized" / "grandmother.png") as result:
        assert result.size == (90, 70) and result.mode == "RGB"


def test_wrong_parameters_stop_at_once_with_the_valid_ones(tmp_path):
    began = time.monotonic()
    done = papermill("phase2", tmp_path, model="colrtan", sede=3, batch_norm="off", budget="two days", temperature=-1)
    assert done.returncode != 0 and time.monotonic() - began < 30
    for expected in ("one of 'pix2pix', 'coltran', 'bbdm'", "sede: no such parameter", "'image', 'running'", "a budget reads like", "a number, 0 or more"):
        assert expected in done.stderr, done.stderr[-2000:]


def test_other_photographs_are_refused(phase2):
    (run,) = read_runs(phase="phase2", model="pix2pix")
    photos = load_photos("embedded", 32)
    with pytest.raises(ValueError, match="was made with other data"):
        refuse_other_data(run, photos)


# ColTran: a model with parts. Phase 2 comes first here, on a fresh folder of runs, so that it has to train phase 1's parts itself.


@pytest.fixture(scope="module")
def coltran(tmp_path_factory):
    """Phase 2 of ColTran alone; its folder has runs/ and the executed notebook."""
    folder = tmp_path_factory.mktemp("coltran")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIC_RUNS", str(folder / "runs"))
        done = papermill("phase2", folder, model="coltran", **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def coltran_runs(coltran, monkeypatch):
    monkeypatch.setenv("FAIC_RUNS", str(coltran / "runs"))
    return coltran


@pytest.fixture
def copied_runs(coltran, tmp_path, monkeypatch):
    return copy_runs(coltran, tmp_path, monkeypatch)


def copy_runs(source, tmp_path, monkeypatch):
    """Runs in a folder of their own, to be changed by a test."""
    shutil.copytree(source / "runs", tmp_path / "runs")
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    return tmp_path


def interrupt(monkeypatch, owner, call, work):
    """Do some work, with a checkpoint whenever the loop asks whether it is time for one, until Ctrl-C at a call of the losses."""
    calls = []

    class Trainer(faic.study.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, save_minutes=0, **kwargs)

    def losses(self, batch, generator, original=owner.losses):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        yield from original(self, batch, generator)

    with monkeypatch.context() as patch:
        patch.setattr(faic.study, "Trainer", Trainer)
        patch.setattr(owner, "losses", losses)
        with pytest.raises(KeyboardInterrupt):
            work()


def small_parts(monkeypatch, steps):
    """Parts of a few steps, for tests inside this process."""
    monkeypatch.setitem(PRESETS["smoke"], "parts", {p: (f"{steps} steps", f"{steps} steps") for p in PARTS["coltran"]})


def weights(run):
    return load_file(run.path / "day-1.safetensors")


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


class Judge(torch.nn.Module):
    """A feature network that costs nothing: the mean colours of four quarters."""

    label, num_features = "quarters", 12

    def forward(self, rgb):
        quarters = torch.nn.functional.adaptive_avg_pool2d(rgb, 2).flatten(1)
        return quarters, quarters.softmax(1)


def test_phase2_alone_trains_the_parts_of_both_phases(coltran_runs):
    said = printed(coltran_runs)
    for part in PARTS["coltran"]:
        first, second = (read_runs(phase="part", model=part, of=phase)[0] for phase in ("phase1", "phase2"))
        steps, more = (int(PRESETS["smoke"]["parts"][part][i].split()[0]) for i in (0, 1))
        assert (first.options["data"]["train"], second.options["data"]["train"]) == (72, 120), "phase 1's part sees phase 1's photographs only"
        assert (first.metrics()["step"].item(), second.metrics()["step"].item()) == (steps, more) and 0 < first.metrics()["bits"].item() < 10
        begun = second.events()[0]
        assert (begun["event"], begun["run"], begun["steps"]) == ("continues", first.path.name, steps)
        assert f"{part}: trained {first.path.name}: {steps} steps on the 72 photographs" in said
        assert f"{part}: trained, after {steps} steps of phase 1, {second.path.name}: {more} steps on the 120 photographs" in said


def test_each_day_has_a_row_for_either_lightness(coltran_runs):
    (run,) = read_runs(phase="phase2", model="coltran")
    assert run.options["variant"] == "factor-0.9", "the paper's winner, as phase 1 was not run"
    table = run.metrics()
    assert table["day"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and table["lightness"].tolist() == ["model", "photograph"] * 5
    (sampling,) = table["sampling"].unique()
    own = "+".join(read_runs(phase="part", model=p, of="phase2")[0].path.name[-6:] for p in PARTS["coltran"])
    assert sampling == f"norm=row, temperature=1, upsamplers=own:{own}" == run.options["made"]["sampling"]
    assert main_rows(run)["lightness"].tolist() == ["model"] * 5
    assert (table.groupby("lightness")["PSNR"].mean().diff().dropna() > 0).all(), "a copied lightness raises the PSNR"
    assert len({np.load(f).tobytes() for f in run.path.glob("samples/day-*.npy")}) == 5


def test_phase1_finds_the_parts_and_trains_only_the_variants(coltran_runs, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in runs_dir().glob("part-*/*")}
    done = papermill("phase1", tmp_path, model="coltran", variants="default,mix-0.9", **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert before == {f: f.stat().st_mtime_ns for f in runs_dir().glob("part-*/*")}
    assert printed(tmp_path).count(": found part-coltran_") == 2
    runs = read_runs(phase="phase1", model="coltran")
    assert sorted((r.options["variant"], r.options["train"]["auto_weight"], r.options["train"]["aux_weight"]) for r in runs) == [("default", 0.99, 0.01), ("mix-0.9", 0.9, 0.1)]
    assert sum((r.path / "winner.json").exists() for r in runs) == 1


def test_a_part_does_not_depend_on_which_notebook_was_first(coltran, tmp_path, monkeypatch):
    """Phase 1's notebook and then phase 2's, against phase 2 alone."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    photos = load_photos()
    first, second = (train_part("coltran_color", phase, "smoke", 0, photos, Judge(), CPU) for phase in ("phase1", "phase2"))
    for run in (first, second):
        alone = load_file(coltran / "runs" / run.path.name / "day-1.safetensors")
        assert same(weights(run), alone)
    assert not same(weights(first), weights(second))


def test_an_interrupted_part_ends_the_same(tmp_path, monkeypatch):
    """Stopped in phase 2, between two checkpoints; started again, it needs phase 1's run no more."""
    small_parts(monkeypatch, 60)
    photos = load_photos()
    train = lambda: train_part("coltran_color", "phase2", "smoke", 0, photos, Judge(), CPU)
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "whole"))
    whole = train()
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "stopped"))
    interrupt(monkeypatch, faic.coltran.ColTranColor, 60 + 40, train)
    (stopped,) = read_runs(of="phase2")
    assert torch.load(stopped.path / "last.pt")["step"] == 25 and not (stopped.path / "day-1.safetensors").exists()
    shutil.rmtree(read_runs(of="phase1")[0].path)
    again = train()
    assert again.path.name == whole.path.name and same(weights(again), weights(whole))
    assert [e for e in again.events() if "seconds" not in e] == [e for e in whole.events() if "seconds" not in e]


def test_a_part_whose_beginning_is_gone_says_so(tmp_path, monkeypatch):
    small_parts(monkeypatch, 2)
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    photos = load_photos()
    first = train_part("coltran_color", "phase1", "smoke", 0, photos, Judge(), CPU)
    (first.path / "last.pt").unlink()
    with pytest.raises(TrainingStopped, match="is missing; restore it, or move its folder away"):
        train_part("coltran_color", "phase2", "smoke", 0, photos, Judge(), CPU)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder with TensorFlow checkpoints of small networks for 64x64, made by the writer in the ColTran notebook."""
    cells = json.loads((NBS / "21_coltran.ipynb").read_text())["cells"]
    wanted = {"as_varint", "write_table", "write_checkpoint", "write_official"}
    trees = [ast.parse("".join(c["source"])) for c in cells if c["cell_type"] == "code" and any(f"def {w}(" in "".join(c["source"]) for w in wanted)]
    namespace = dict(vars(faic.coltran), np=np, rng=np.random.default_rng(0))
    functions = [f for t in trees for f in t.body if isinstance(f, ast.FunctionDef) and f.name in wanted]
    exec(compile(ast.Module(functions, []), "writer", "exec"), namespace)
    folder = tmp_path_factory.mktemp("official")
    nets = dict(colorizer=Colorizer(16, 16, 8, 2, 8), color_upsampler=Upsampler("color", 16, 16, 8, 2, 8), spatial_upsampler=Upsampler("spatial", 64, 64, 8, 2, 8))
    for name, net in nets.items():
        namespace["write_official"](folder / name, net)
    return folder


def test_given_upsamplers_score_the_days_again_and_train_nothing(copied_runs, official):
    (run,) = read_runs(phase="phase2", model="coltran")
    kept = {f: f.stat().st_mtime_ns for f in runs_dir().rglob("*") if f.suffix in (".safetensors", ".pt", ".npy", ".jsonl")}
    photos, chosen = load_photos(), SAMPLING["coltran"] | dict(upsamplers=f"official:{official}")
    parts, sampling = ready_parts("coltran", "phase2", "smoke", 0, photos, chosen, Judge(), CPU)
    run_days(run, photos, Judge(), sampling, CPU, parts)
    rows = run.metrics().groupby("sampling")["day"].apply(list).to_dict()
    assert list(rows.values()) == [[1, 1, 2, 2, 3, 3, 4, 4, 5, 5]] * 2 and sum("upsamplers=official:" in name for name in rows) == 1
    assert "upsamplers=own:" in main_rows(run)["sampling"].unique().item(), "the tables use the model's own parts"
    assert kept.items() <= {f: f.stat().st_mtime_ns for f in runs_dir().rglob("*")}.items()
    assert len(list(run.path.glob("samples/day-*.npy"))) == 10


def test_one_given_upsampler_and_one_of_ours(copied_runs, official, tmp_path):
    shutil.copytree(official / "color_upsampler", tmp_path / "one" / "color_upsampler")
    photos, chosen = load_photos(), SAMPLING["coltran"] | dict(upsamplers=f"official:{tmp_path / 'one'}")
    parts, sampling = ready_parts("coltran", "phase2", "smoke", 0, photos, chosen, Judge(), CPU)
    own, _ = ready_parts("coltran", "phase2", "smoke", 0, photos, SAMPLING["coltran"], Judge(), CPU)
    assert list(parts) == list(own) and parts["coltran_color"].head.in_features == 8, "the given color upsampler ..."
    assert torch.equal(parts["coltran_spatial"].head.weight, own["coltran_spatial"].head.weight), "... with our spatial one"
    (spatial,) = [r.path.name[-6:] for r in read_runs(phase="part", model="coltran_spatial", of="phase2")]
    assert sampling["upsamplers"].startswith("official:") and sampling["upsamplers"].endswith(f"+own:{spatial}")


def test_a_given_model_is_scored_once_beside_ours(official, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    photos = load_photos()
    for _ in range(2):
        run = run_pretrained("coltran", f"official:{official}", "smoke", 0, photos, Judge(), SAMPLING["coltran"] | dict(temperature=0.0), CPU)
    assert run.path.name.startswith("phase2-coltran-pretrained-smoke-s0-")
    assert run.metrics()["lightness"].tolist() == ["model", "photograph"] and (run.metrics()["day"] == 1).all()
    assert run.metrics()["sampling"].iloc[0].startswith("norm=row, temperature=0, upsamplers=official:")
    assert not read_runs(phase="part"), "a given model needs no parts of ours"


def test_given_checkpoints_are_looked_at_first(official, tmp_path):
    def refused(value, networks=UPSAMPLERS, side=64):
        with pytest.raises(ValueError) as error:
            check_params(dict(upsamplers=value), upsamplers=given("own", networks, side))
        return str(error.value)

    assert given("own", ("colorizer", *UPSAMPLERS), 64)(f"official:{official}") == f"official:{official}"
    assert "color_upsampler is for 16x16 pixels, not 64x64" in refused(f"official:{official}", side=256)
    assert "need the preset paper" in refused(f"official:{official}", side=256)
    shutil.copytree(official, tmp_path / "cut")
    (data,) = (tmp_path / "cut" / "spatial_upsampler").glob("*.data-00002*")
    data.write_bytes(data.read_bytes()[:-1])
    assert "is cut off" in refused(f"official:{tmp_path / 'cut'}")
    assert "not there: colorizer" in refused(f"official:{tmp_path}/nothing", ("colorizer", *UPSAMPLERS))


def test_colorize_with_coltran(coltran_runs, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grandmother.png")
    done = papermill("colorize", tmp_path, photo=tmp_path / "grandmother.png", frame="square", device="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    with Image.open(tmp_path / "colorized" / "grandmother.png") as result:
        assert result.size == (64, 64) and result.mode == "RGB"


def test_a_run_without_its_parts_says_what_is_missing(copied_runs):
    (run,) = read_runs(phase="phase2", model="coltran")
    assert find_parts(run, SAMPLING["coltran"], CPU).keys() == set(PARTS["coltran"])
    for folder in runs_dir().glob("part-coltran_spatial-*"):
        shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="needs its part coltran_spatial"):
        find_parts(run, SAMPLING["coltran"], CPU)


# BBDM: a part that training itself needs, latents that are prepared once, samplings that differ in steps.


@pytest.fixture(scope="module")
def bbdm(tmp_path_factory):
    """Phase 2 of BBDM alone; its folder has runs/ and the executed notebook."""
    folder = tmp_path_factory.mktemp("bbdm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIC_RUNS", str(folder / "runs"))
        done = papermill("phase2", folder, model="bbdm", sample_steps=3, **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def bbdm_runs(bbdm, tmp_path, monkeypatch):
    copy_runs(bbdm, tmp_path, monkeypatch)
    return bbdm


def test_phase2_of_bbdm_trains_its_first_stage_and_prepares_latents(bbdm_runs):
    said = printed(bbdm_runs)
    first, second = (read_runs(phase="part", model="vqgan_f4", of=phase)[0] for phase in ("phase1", "phase2"))
    assert second.events()[0]["run"] == first.path.name
    for r, part in ((first, "validation"), (second, "test")):
        m = r.metrics()
        assert m["part"].tolist() == [part] * 2 and m["lightness"].tolist() == ["model", "photograph"]
        assert 0 < m["codebook usage"].iloc[0] <= 1 <= m["perplexity"].iloc[0] and m["FID (EfficientNet-Lite0)"].iloc[0] > 0
    (run,) = read_runs(phase="phase2", model="bbdm")
    assert (run.options["latent"], run.options["first_stage"]) == ("f4", f"own:{second.path.name[-6:]}")
    (file,) = runs_dir().glob("data-embedded-*/*.f16")
    assert file.stat().st_size == 2 * 120 * 6 * 16 * 16 and "latents of train: made" in said
    table = run.metrics()
    assert table["day"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and table["sampling"].unique().tolist() == ["eta=1, sample_steps=3"]
    assert table["step"].tolist() == [3, 3, 6, 6, 9, 9, 12, 12, 15, 15]


def test_more_steps_are_rows_of_the_same_run(bbdm_runs):
    (run,) = read_runs(phase="phase2", model="bbdm")
    kept = {f: f.stat().st_mtime_ns for f in runs_dir().rglob("*") if f.suffix in (".safetensors", ".pt", ".npy", ".jsonl", ".f16")}
    parts = find_parts(run, dict(sample_steps=4, eta=0.0), CPU)
    run_days(run, load_photos(), Judge(), dict(sample_steps=4, eta=0.0), CPU, parts)
    assert run.metrics().groupby("sampling")["day"].nunique().to_dict() == {"eta=0, sample_steps=4": 5, "eta=1, sample_steps=3": 5}
    assert kept.items() <= {f: f.stat().st_mtime_ns for f in runs_dir().rglob("*")}.items()


@pytest.mark.parametrize("stage", ["first stage", "bbdm"])
def test_an_interrupted_bbdm_ends_the_same(bbdm, stage, tmp_path, monkeypatch):
    """Stopped between two checkpoints, in its first stage or in its own training; the whole runs are phase 2's of the fixture."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    owner, stop = (faic.vqgan.VQGAN, 100 + 60) if stage == "first stage" else (faic.bbdm.BBDM, 8)
    if stage == "bbdm":
        for folder in (bbdm / "runs").glob("part-*"):
            shutil.copytree(folder, tmp_path / "runs" / folder.name)
    photos = load_photos()

    def phase2():
        parts, sampling = ready_parts("bbdm", "phase2", "smoke", 0, photos, dict(sample_steps=3, eta=1.0), Judge(), CPU)
        return run_days(study_run("phase2", "bbdm", "beta1-0.7", "smoke", 0, photos, Budget(15, "steps"), CPU), photos, Judge(), sampling, CPU, parts)

    interrupt(monkeypatch, owner, stop, phase2)
    run = phase2()
    parts = [r.path.name for r in read_runs(phase="part")]
    assert len(parts) == 2 and parts == sorted(f.name for f in (bbdm / "runs").glob("part-*"))
    for name in [f"{p}/day-1.safetensors" for p in parts] + [f"{run.path.name}/day-{d}.safetensors" for d in range(1, 6)]:
        assert same(load_file(tmp_path / "runs" / name), load_file(bbdm / "runs" / name)), name


@pytest.mark.parametrize("latent", ["f4", "f8", "none"])
def test_other_spaces_train_and_colorize(latent, tmp_path, monkeypatch):
    """A given first stage, another factor, and no latent space at all."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setitem(PRESETS["smoke"], "parts", dict.fromkeys(PARTS["bbdm"], ("2 steps", "2 steps")))
    photos, stage = load_photos(), ""
    if latent == "f4":
        stage = str(tmp_path / "model.ckpt")
        faic.vqgan.save_ldm(faic.vqgan.VQModel(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, n_embed=16), stage)
    parts, sampling = ready_parts("bbdm", "phase1", "smoke", 0, photos, dict(sample_steps=3, eta=1.0), Judge(), CPU, latent, stage)
    run = study_run("phase1", "bbdm", "default", "smoke", 0, photos, Budget(2, "steps"), CPU, latent, stage)
    run_days(run, photos, Judge(), sampling, CPU, parts)
    assert run.options["first_stage"].split(":")[0] == dict(f4="given", f8="own", none="")[latent]
    assert len(read_runs(phase="part")) == (latent == "f8") and len(parts) == (latent != "none")
    assert run.metrics()["lightness"].tolist() == ["model", "photograph"]
    assert bool(list(runs_dir().glob("data-embedded-*/*.f16"))) == (latent != "none")


def test_first_stages_that_do_not_fit_are_refused_at_once(tmp_path):
    file = tmp_path / "model.ckpt"
    faic.vqgan.save_ldm(faic.vqgan.VQModel(ch=32, ch_mult=(1, 1), num_res_blocks=1, n_embed=16), file)
    for stage, latent, said in ((file, "f4", "by the factor 2"), (tmp_path / "no.ckpt", "f4", "is no file"), ("plain", "none", "has no first stage"), (__file__, "f8", "is no VQGAN")):
        given_ = dict(model="bbdm", preset="smoke", latent=latent, first_stage=str(stage), sample_steps=2)
        with pytest.raises(ValueError) as error:
            notebook_parameters(given_, *given_)
        assert said in str(error.value) and "3 to 1000" in str(error.value)


def test_colorize_with_bbdm(bbdm_runs, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grandmother.png")
    done = papermill("colorize", tmp_path, photo=tmp_path / "grandmother.png", sample_steps=3, device="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    with Image.open(tmp_path / "colorized" / "grandmother.png") as result:
        assert result.size == (90, 70) and result.mode == "RGB"
