"""Weights for release: trained, chosen and written by one script, opened and used by `faic colorize`."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from feature_nets import QuarterColors
from PIL import Image
from safetensors.torch import load_file, save_file

import faic.released
from faic.colorizer import open_run_colorizer
from faic.components import study_photos
from faic.core import Budget
from faic.dataset import load_photos
from faic.days import study_run
from faic.figures import figure7
from faic.judges import efficientnet_lite2
from faic.metrics import efficientnet_lite0
from faic.phases import Workplace, compare_days, score_trained_before
from faic.presets import default_sampling, make_trainee, model_options
from faic.released import choose_released, open_released, open_weights, pack_release, released_models
from faic.score_tables import phase2_entries
from faic.selection import model_key, select_runs

ROOT = Path(__file__).resolve().parents[1]
TRIALS = ROOT / "tests" / "trials"
sys.path.insert(0, str(TRIALS))

import release  # noqa: E402
import release_card  # noqa: E402

SMALL = {
    "pix2pix": dict(width=4),
    "classifier": dict(width=2),
    "palette-modern": dict(channels=8),
    "bbdm": dict(channels=16),
    "coltran": dict(dim=8, ff=8),
}


def small_release(model, folder, seed=0):
    """A released file of an untrained model, and the model."""
    options = model_options(model, "laptop") | SMALL[model]
    components = {}
    if model == "coltran":
        own = model_options("coltran_color", "laptop") | SMALL[model]
        components["coltran_color"] = make_trainee("coltran_color", own, seed).networks()["net"], own
    networks = {name: network for name, (network, _) in components.items()}
    trainee = make_trainee(model, options, seed, networks)
    sampling = default_sampling(model, "laptop") | dict(precision="float32")
    folder.mkdir(exist_ok=True)
    file = folder / f"{model}.safetensors"
    file.write_bytes(pack_release(model, trainee, options, sampling, components))
    return file, trainee


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An empty folder of released weights, and one of runs."""
    monkeypatch.setenv("FAIC_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    return tmp_path / "weights"


@pytest.fixture
def photo(tmp_path):
    """A gray photograph."""
    file = tmp_path / "grandmother.png"
    Image.fromarray((np.indices((40, 60)).sum(0) + 80).astype(np.uint8)).save(file)
    return file


# the files


@pytest.mark.parametrize("model", SMALL)
def test_a_file_gives_each_weight_back_in_half_precision(model, weights):
    """What only training needs is left out; the rest is exactly the rounded number."""
    file, trainee = small_release(model, weights, seed=3)
    opened = open_weights(file)
    needed = [n for n in trainee.networks() if n not in ("D", "critic")]
    stored = load_file(file)
    assert {name.split(".")[1] for name in stored if name.startswith(f"{model}.")} == set(needed)
    for name in needed:
        ours, theirs = trainee.networks()[name].state_dict(), opened.trainee.networks()[name].state_dict()
        for key, tensor in ours.items():
            expected = tensor.half().float() if tensor.is_floating_point() else tensor
            assert theirs[key].dtype == tensor.dtype and torch.equal(theirs[key], expected), key
    assert opened.side == 64 and set(opened.components) == ({"coltran_color"} if model == "coltran" else set())
    if model in ("pix2pix", "classifier"):
        rgb = opened.colorizer()(torch.full((1, 1, 64, 64), 0.5), None)
        assert rgb.shape == (1, 3, 64, 64) and rgb.isfinite().all()


def test_what_does_not_fit_is_named(weights):
    with pytest.raises(ValueError, match="no released weights in .*weights; train a model with phase2.ipynb"):
        open_released()
    file, trainee = small_release("classifier", weights)
    with pytest.raises(ValueError, match="no released weights of 'bbdm'; expected one of classifier"):
        open_released("bbdm")
    about, tensors = faic.released.read_release(file)
    metadata = dict(faic=json.dumps(about))
    missing = {k: v for k, v in tensors.items() if k != "classifier.net.model1.0.bias"}
    save_file(missing, file, metadata)
    with pytest.raises(ValueError, match=r"does not fit this ECCV16.\nmissing: \['model1.0.bias'\]"):
        open_released("classifier")
    save_file(tensors | {"vgg.net.bias": torch.zeros(1)}, file, metadata)
    with pytest.raises(ValueError, match="no network takes vgg.net.bias; expected classifier.net"):
        open_released("classifier")
    for content in (b"", b"no weights", Path(file).read_bytes()[:-40]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="classifier.safetensors is damaged or holds no released weights"):
            open_released("classifier")
    trainee.net.model1[0].weight.data[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"classifier.net.model1.0.weight has numbers that are not finite"):
        pack_release("classifier", trainee, {}, {})


def test_numbers_too_large_for_half_precision_are_kept(weights):
    file, trainee = small_release("classifier", weights)
    trainee.net.model7[-1].running_var[0] = 88994.5
    about = open_weights(file).about
    file.write_bytes(pack_release("classifier", trainee, about["options"], about["sampling"]))
    assert load_file(file)["classifier.net.model7.6.running_var"].dtype == torch.float32
    assert open_weights(file).trainee.net.model7[-1].running_var[0] == 88994.5


def test_the_released_default_comes_first_and_runs_are_asked_for_by_name(weights):
    assert released_models() == [] and choose_released() == choose_released("pix2pix") == ""
    for model in ("classifier", "pix2pix"):
        small_release(model, weights)
    assert released_models() == ["classifier", "pix2pix"]
    (weights / "default.txt").write_text("pix2pix\n")
    assert released_models() == ["pix2pix", "classifier"]
    chosen = {model: choose_released(model) for model in ("", "classifier", "bbdm", "runs/phase2-pix2pix-0")}
    assert chosen == {"": "pix2pix", "classifier": "classifier", "bbdm": "", "runs/phase2-pix2pix-0": ""}
    assert open_run_colorizer().describe() == "released pix2pix, on cpu" and not open_run_colorizer().caution
    assert open_run_colorizer("classifier").made_with["run"] == "released classifier"
    for asked in (dict(model="bbdm"), dict(first_stage="model.ckpt")):
        with pytest.raises(ValueError, match="run"):
            open_run_colorizer(**asked)


# beside the runs of a study


def test_released_weights_are_scored_once_beside_the_days(weights):
    """A row of the table, a dashed line and a column of pictures; nothing where the weights are of another model."""
    photos = study_photos("embedded", "smoke")
    photos = replace(photos, splits=photos.splits | {s: photos.splits[s][::9] for s in ("validation", "test")})
    place = Workplace(torch.device("cpu"), photos, QuarterColors())
    asked = SimpleNamespace(model="pix2pix", preset="smoke", seed=0, pretrained="")
    assert score_trained_before(asked, place) == {}
    small_release("pix2pix", weights)
    scored = score_trained_before(asked, place)
    images = place.feature_net.images
    assert (
        list(scored) == ["released"] and score_trained_before(asked, place)["released"].path == scored["released"].path
    )
    assert place.feature_net.images == images, "scored again"
    assert score_trained_before(SimpleNamespace(model="bbdm", pretrained=""), place) == {}

    row = scored["released"].metrics().iloc[0].to_dict()
    assert row["split"] == "test" and row["n"] == len(photos.splits["test"])
    run = study_run("phase2", "pix2pix", "default", "smoke", 0, photos, Budget(5, "steps"), place.device)
    for day in (1, 2):
        run.add_metrics(row | dict(day=day, step=day, training_seconds=1.0))
    days = compare_days([run], [row["sampling"]], scored, False, "quarters")
    assert [day for day, _ in days.index] == [1, 2, "released"]
    selection = select_runs("smoke", "embedded", 0)
    entries, _ = phase2_entries(selection)
    assert [entry.title for entry in entries if entry.title.startswith("Pix2Pix")] == ["Pix2Pix", "Pix2Pix, released"]
    lines = {line.get_label(): line.get_linestyle() for line in figure7(selection).axes[0].get_lines()}
    assert lines["Pix2Pix, released"] == "--" and lines["Pix2Pix"] == "-"


def test_weights_on_pixels_stand_next_to_a_model_that_trains_in_latents():
    """The preset smoke trains BBDM in latents; the released BBDM works on pixels."""
    options = dict(model="bbdm", preset="smoke", latent="none", first_stage="")
    assert model_key(options) == "bbdm:none" and model_key(options | dict(variant="released")) == "bbdm"


# from training to a photograph


def test_the_rule_takes_the_best_mean_rank_and_of_equal_ones_the_earlier():
    table = pd.DataFrame({release.KID: [0.04, 0.03, 0.02, 0.02], release.AGREEMENT: [0.5, 0.6, 0.5, 0.4]})
    found = release.ranked(table.assign(step=[1, 2, 3, 4]))
    assert list(found["step"]) == [3, 2, 4, 1] and list(found["mean rank"]) == [1.5, 2, 2.5, 3]
    equal = pd.DataFrame({release.KID: [0.02, 0.03, 0.02], release.AGREEMENT: [0.5, 0.6, 0.5], "step": [9, 7, 8]})
    assert list(release.ranked(equal)["step"]) == [8, 9, 7]


def quick_network(name):
    """A feature network that costs nothing, under the name of one that the rule needs."""

    def make(device):
        network = QuarterColors()
        network.network_name = name
        return network

    return make


def test_two_slices_become_a_release_that_colorizes(weights, photo, tmp_path, monkeypatch, capsys):
    """Train, be killed, train on, choose, write; then the command colorizes in a process without network."""
    monkeypatch.setattr(release, "efficientnet_lite0", quick_network("EfficientNet-Lite0"))
    monkeypatch.setattr(release, "efficientnet_lite2", quick_network("EfficientNet-Lite2"))
    monkeypatch.setattr(release_card, "SHOWN", 3)
    words = ["embedded", "--slices", "2", "--steps", "3", "--scored", "6", "--set", "width=2;batch_size=2"]
    with monkeypatch.context() as patch:
        patch.setattr(release, "score_slice", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            release.main(["train", "classifier", *words])
    release.main(["train", "classifier", *words])
    (run,) = (tmp_path / "runs").glob("release-classifier-laptop-s0-*")
    scores = pd.read_csv(run / "metrics.csv")
    assert list(scores["day"]) == [1, 2] and list(scores["step"]) == [3, 6]
    release.main(["status"])
    release.main(["choose", "classifier"])
    assert "finished, 2 of 2 slices, 2 scored" in capsys.readouterr().out

    release.main(["write", "classifier", "--tested", "4"])
    written = sorted(file.name for file in weights.iterdir())
    assert written == [*(f"classifier.{ending}" for ending in ("jpg", "json", "md", "safetensors")), "default.txt"]
    card = (weights / "classifier.md").read_text()
    assert str(tmp_path) not in card
    for words in ("120 photographs of embedded", "agreement (EfficientNet-Lite2)", "Of 4 test photographs", "license"):
        assert words in card
    with pytest.raises(SystemExit, match="there already; --replace replaces them"):
        release.main(["write", "classifier"])

    shutil.rmtree(tmp_path / "runs")
    offline = os.environ | dict(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    command = [sys.executable, "-m", "faic", "colorize", photo, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert done.returncode == 0 and "released classifier, on cpu: 1 colorized" in done.stderr, done.stderr
    answer = np.asarray(Image.open(tmp_path / "out" / "grandmother.png").convert("RGB")).astype(int)
    assert answer.shape == (40, 60, 3) and np.ptp(answer, axis=2).max() > 0


# the files that come with the package

SHIPPED = sorted((ROOT / "faic" / "weights").glob("*.safetensors"))


def test_the_shipped_files_are_small_and_their_cards_describe_them():
    sizes = {file.stem: file.stat().st_size for file in SHIPPED}
    assert max(sizes.values(), default=0) <= release.MOST and sum(sizes.values()) <= release.MOST_TOGETHER
    for file in SHIPPED:
        card = json.loads(file.with_suffix(".json").read_text())
        assert card["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest() and card["bytes"] == sizes[file.stem]
        commits = [card["commit"], *(c["commit"] for c in card.get("trained before", []))]
        assert card["weakness"] and not all("+changes" in commit for commit in commits)
        assert file.with_suffix(".md").read_text() == release_card.card_text(file.stem, card)
        assert file.with_suffix(".jpg").is_file()
    cards = release_card.read_cards(ROOT / "faic" / "weights")
    assert not cards or (ROOT / "faic" / "weights" / "default.txt").read_text().strip() == release.best_card(cards)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_weights_color_photographs_better_than_gray(file, monkeypatch):
    """On every eighth embedded photograph; none was trained on."""
    monkeypatch.setenv("FAIC_WEIGHTS", str(file.parent))
    photos = load_photos("embedded", 64)
    n = len(photos.array)
    photos = replace(photos, splits=dict(test=np.arange(0, n, 8), validation=np.arange(1, n, 8)))
    scores = release_card.score_on_test(open_weights(file), photos, (efficientnet_lite0(), efficientnet_lite2()))
    gray, ours = scores["gray image"], scores[file.stem]
    assert ours["colorfulness"][0] > 10
    assert ours[release.KID][0] < gray[release.KID][0]
