"""The notebooks as a user starts them: papermill on the command line, in another folder, in the study's order."""

import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pandas as pd
import psutil
import pytest
from feature_nets import QuarterColors
from phases import CPU, TINY, command, copy_runs, papermill, printed, same
from PIL import Image
from safetensors.torch import load_file

from faic.components import check_same_data
from faic.core import Budget, runs_dir
from faic.dataset import load_photos
from faic.days import run_baselines, run_days, study_run
from faic.phases import run_phase2
from faic.photos import describe
from faic.presets import default_sampling
from faic.runs import primary_rows, read_runs
from faic.winner import describe_lead, write_winner


@pytest.fixture(scope="module")
def phase1(photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("phase1")
    done = papermill("phase1", folder, model="pix2pix", data=photographs, variants="lr-5e-4,default", **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def phase2(phase1, photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("phase2")
    done = papermill("phase2", folder, model="pix2pix", data=photographs, **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_phase1_chooses_the_lowest_fid(phase1):
    runs = read_runs(phase="phase1", model="pix2pix")
    assert sorted(r.options["variant"] for r in runs) == ["default", "lr-5e-4"]
    fid = {r.options["variant"]: r.metrics()["FID (EfficientNet-Lite0)"].iloc[-1] for r in runs}
    winners = [r for r in runs if (r.path / "winner.json").exists()]
    assert [r.options["variant"] for r in winners] == [min(fid, key=fid.get)]
    assert all(r.metrics()["step"].tolist() == [3] for r in runs)
    assert "device: cpu" in printed(phase1)


def test_phase1_scores_the_baselines(phase1):
    gray, real = (read_runs(phase="phase1", model="baseline", variant=v)[0].metrics().iloc[0] for v in ("gray", "real"))
    assert gray["FID (EfficientNet-Lite0)"] > 0 and gray["colorfulness"] < 1
    assert np.isnan(real["FID (EfficientNet-Lite0)"]) and real["unpaired FID (EfficientNet-Lite0)"] > 0


def test_phase2_trains_the_winner_for_five_days(phase2):
    (run,) = read_runs(phase="phase2", model="pix2pix")
    (winner,) = [r for r in read_runs(phase="phase1", model="pix2pix") if (r.path / "winner.json").exists()]
    assert run.options["variant"] == winner.options["variant"]
    assert "phase 1's winner" in printed(phase2)
    assert run.metrics()["day"].tolist() == [1, 2, 3, 4, 5]
    assert run.metrics()["step"].tolist() == [3, 6, 9, 12, 15]
    assert len({np.load(f).tobytes() for f in run.path.glob("samples/day-*.npy")}) == 5


def times(run):
    """File -> time of the last change of a run's files, but for its newest checkpoint."""
    return {f: f.stat().st_mtime_ns for f in run.path.rglob("*") if f.name != "last.pt"}


def test_what_is_done_is_not_done_again(phase2, photographs):
    (run,) = read_runs(phase="phase2", model="pix2pix")
    before = times(run)
    run_phase2("pix2pix", data=str(photographs), **TINY)
    assert before == times(run)


def test_another_sampling_is_a_row_of_its_own(phase2, photographs, tmp_path, monkeypatch):
    copy_runs(runs_dir().parent, tmp_path, monkeypatch)
    (run,) = read_runs(phase="phase2", model="pix2pix")
    pictures = {f: f.read_bytes() for f in run.path.glob("samples/*")}
    run_days(run, load_photos(photographs), QuarterColors(), dict(batch_norm="running"), CPU)
    steps = run.metrics().groupby("sampling")["step"].apply(list).to_dict()
    assert steps == {"batch_norm=image": [3, 6, 9, 12, 15], "batch_norm=running": [3, 6, 9, 12, 15]}
    assert primary_rows(run)["sampling"].unique().tolist() == ["batch_norm=image"], "the tables use what the study uses"
    assert all(f.read_bytes() == content for f, content in pictures.items())


def kernel_of(started):
    """The Jupyter kernel that a papermill process has started."""
    children = psutil.Process(started.pid).children(recursive=True)
    return next((child for child in children if "ipykernel_launcher" in " ".join(child.cmdline())), None)


def start_until(day, folder, photographs):
    """Start phase 2 in a process of its own and wait for the end of a day."""
    words = command("phase2", model="pix2pix", data=photographs, **TINY)
    started = subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, text=True)
    while started.poll() is None and not list(folder.glob(f"runs/phase2-pix2pix-*/day-{day}.safetensors")):
        time.sleep(0.05)
    assert started.poll() is None, started.stderr.read()[-3000:]
    return started, kernel_of(started)


def test_killed_and_started_again_it_ends_the_same(phase2, photographs, tmp_path, monkeypatch):
    """The kernel is killed after day 1, papermill is terminated after day 2, and the third start finishes the run."""
    (undisturbed,) = read_runs(phase="phase2", model="pix2pix")
    for folder in runs_dir().glob("phase1-*"):
        shutil.copytree(folder, tmp_path / "runs" / folder.name)
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    started, kernel = start_until(1, tmp_path, photographs)
    kernel.kill()
    _, errors = started.communicate()
    assert started.returncode == 138 and "Kernel died" in errors, errors[-2000:]
    started, kernel = start_until(2, tmp_path, photographs)
    kernel.suspend()  # else a fast one may be finished before it gets the signal
    started.terminate()  # the kernel outlives papermill until it has saved
    assert started.wait(60) == -signal.SIGTERM
    kernel.resume()
    assert not psutil.wait_procs([kernel], timeout=60)[1], "the kernel did not end"
    (killed,) = read_runs(phase="phase2", model="pix2pix")
    assert not (killed.path / "day-5.safetensors").exists(), "it was too fast to be killed"
    done = papermill("phase2", tmp_path, model="pix2pix", data=photographs, **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert killed.path.name == undisturbed.path.name and not (killed.path / "error.json").exists()
    compared = [column for column in undisturbed.metrics() if "seconds" not in column]
    expected = primary_rows(undisturbed)[compared].reset_index(drop=True)
    pd.testing.assert_frame_equal(killed.metrics()[compared], expected, check_exact=True)
    for day in range(1, 6):
        assert same(*(load_file(r.path / f"day-{day}.safetensors") for r in (killed, undisturbed))), day


def test_a_folder_of_41_photographs_is_enough(tmp_path, monkeypatch):
    """Two validation images: no intervals, and nothing breaks."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    noise = np.random.default_rng(0)
    (tmp_path / "few").mkdir()
    for i in range(41):
        Image.fromarray(noise.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(tmp_path / "few" / f"{i}.png")
    photos = load_photos(tmp_path / "few")
    run_baselines("phase1", "smoke", photos, QuarterColors(), CPU)
    runs, budget = [], Budget(3, "steps")
    for variant in ("default", "beta1-0.7"):
        run = study_run("phase1", "pix2pix", variant, "smoke", 0, photos, budget, CPU)
        runs.append(run_days(run, photos, QuarterColors(), default_sampling("pix2pix", "smoke"), CPU))
    assert "too few images for intervals" in describe_lead(write_winner(runs))
    assert "37 train, 2 validation, 2 test" in describe(photos)


def test_inference_time(phase2, photographs, tmp_path):
    """A model that was trained, and one that was not."""
    names = "pix2pix,classifier"
    done = papermill("inference_time", tmp_path, models=names, data=photographs, images=4, device="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_runs(phase="inference", model="classifier")) == 1
    (run,) = read_runs(phase="inference", model="pix2pix")
    table = pd.read_csv(run.path / "metrics.csv")
    assert all(rows["batch_size"].tolist() == [1, 8] for _, rows in table.groupby("precision"))
    assert "float32" in set(table["precision"])
    assert (table["seconds_per_image"] > 0).all() and (table["gflop_per_image"] > 0).all()
    assert table["peak_share"].between(0, 1.5).all()


def test_colorize_keeps_size_and_skips_what_is_no_photograph(phase2, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grandmother.png")
    (tmp_path / "letter.txt").write_text("no photograph")
    (run,) = read_runs(phase="phase2", model="pix2pix")
    done = papermill("colorize", tmp_path, photo=tmp_path, model=run.path, device="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search("(left out|skipped): letter.txt", printed(tmp_path))
    with Image.open(tmp_path.with_name(f"{tmp_path.name}-colorized") / "grandmother.png") as result:
        assert result.size == (90, 70) and result.mode == "RGB"


def test_failures_compares_with_gray_and_with_untrained_networks(phase2, photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIC_FIGURES", str(tmp_path / "figures"))
    done = papermill("failures", tmp_path, data=photographs, images=12, device="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "figures").iterdir()
    scores = pd.read_csv(folder / "table_untrained.csv", comment="#").set_index("entry")["FID (EfficientNet-Lite0)"]
    (run,) = read_runs(phase="phase2", model="pix2pix")
    gray = read_runs(phase="phase2", model="baseline", variant="gray")[0]
    assert scores["Pix2Pix"] == pytest.approx(run.metrics()["FID (EfficientNet-Lite0)"].iloc[-1])
    assert scores["gray image"] == pytest.approx(gray.metrics()["FID (EfficientNet-Lite0)"].iloc[-1], rel=1e-4)
    assert scores["Pix2Pix, untrained"] != scores["Pix2Pix"]
    errors = pd.read_csv(folder / "table_errors.csv", comment="#").set_index("entry")
    assert errors["lightness steps, share"].round(2).tolist() == [
        1,
        1,
        1,
    ]  # Pix2Pix, gray image, photographs: one lightness
    assert errors["color, share of the photograph's"]["gray image"] < 0.01
    names = ("failures_pix2pix", "failures_mean", "figure4_free", "figure8_free", "figure_models_free")
    figures = {f"{name}.png" for name in names}
    assert figures <= {f.name for f in folder.iterdir()}


def test_wrong_parameters_stop_at_once_with_the_valid_ones(tmp_path):
    began = time.monotonic()
    done = papermill("phase2", tmp_path, model="colrtan", sede=3, batch_norm="off", budget="two days", temperature=-1)
    assert done.returncode != 0 and time.monotonic() - began < 30
    for message in (
        "one of 'pix2pix', 'coltran', 'bbdm'",
        "sede: no such parameter",
        "'image', 'running'",
        "a budget reads like",
        "a number, 0 or more",
    ):
        assert message in done.stderr, done.stderr[-2000:]


def test_other_photographs_are_refused(phase2):
    (run,) = read_runs(phase="phase2", model="pix2pix")
    photos = load_photos("embedded", 32)
    with pytest.raises(ValueError, match="was made with other data"):
        check_same_data(run, photos)
