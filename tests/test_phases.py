"""The notebooks as a user starts them: papermill on the command line, from another folder, in the order of the study."""
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

from faic.core import read_runs, runs_dir
from faic.data import load_photos
from faic.plots import main_rows
from faic.study import refuse_other_data

NBS = Path(__file__).resolve().parents[1] / "nbs"
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
    (run,) = read_runs(phase="inference", model="pix2pix")
    table = pd.read_csv(run.path / "metrics.csv")
    assert table["batch_size"].tolist() == [1, 8]
    assert (table["seconds_per_image"] > 0).all() and (table["gflop_per_image"] > 0).all() and table["peak_share"].between(0, 1.5).all()


def test_colorize_keeps_size_and_leaves_out_what_is_no_photograph(phase2, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grandmother.png")
    (tmp_path / "letter.txt").write_text("no photograph")
    done = papermill("colorize", tmp_path, photo=tmp_path, device="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left out: letter.txt" in printed(tmp_path)
    with Image.open(tmp_path / "colorized" / "grandmother.png") as result:
        assert result.size == (90, 70) and result.mode == "RGB"


def test_wrong_parameters_stop_at_once_with_the_valid_ones(tmp_path):
    began = time.monotonic()
    done = papermill("phase2", tmp_path, model="colrtan", sede=3, batch_norm="off", budget="two days")
    assert done.returncode != 0 and time.monotonic() - began < 30
    for expected in ("one of 'pix2pix'", "sede: no such parameter", "'image', 'running'", "a budget reads like"):
        assert expected in done.stderr, done.stderr[-2000:]


def test_other_photographs_are_refused(phase2):
    (run,) = read_runs(phase="phase2", model="pix2pix")
    photos = load_photos("embedded", 32)
    with pytest.raises(ValueError, match="was made with other data"):
        refuse_other_data(run, photos)
