"""ColTran in the phases: a model with components.

Phase 2 runs first, on a fresh folder of runs, so that it has to train phase 1's components itself.
"""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from feature_nets import QuarterColors
from phases import (
    CPU,
    TINY,
    colorized,
    copy_runs,
    interrupt,
    papermill,
    printed,
    same,
    short_components,
    weights,
)
from PIL import Image
from safetensors.torch import load_file

import faic.coltran
from faic.coltran import Colorizer, Upsampler
from faic.coltran_checkpoints import external_checkpoints, official_layout, official_networks
from faic.components import find_components, prepare_components, train_component
from faic.core import runs_dir
from faic.dataset import load_photos
from faic.days import run_days, run_pretrained
from faic.parameters import check_params
from faic.presets import ARCHITECTURES, PRESETS, default_sampling
from faic.resume import TrainingStopped
from faic.runs import primary_rows, read_runs
from faic.tf_checkpoints import EMA_SUFFIX, VALUE, variable_key, write_tf_checkpoint

UPSAMPLERS = tuple(c.name for c in ARCHITECTURES["coltran"].components)
SAMPLING = default_sampling("coltran", "smoke")


@pytest.fixture(scope="module")
def coltran(photographs, tmp_path_factory):
    """Phase 2 of ColTran alone; its folder has runs/ and the executed notebook."""
    folder = tmp_path_factory.mktemp("coltran")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIC_RUNS", str(folder / "runs"))
        done = papermill("phase2", folder, model="coltran", data=photographs, **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def train_color_upsampler(phase, photos, **loop_options):
    return train_component("coltran_color", phase, "smoke", 0, photos, QuarterColors(), CPU, **loop_options)


@pytest.fixture
def coltran_runs(coltran, monkeypatch):
    monkeypatch.setenv("FAIC_RUNS", str(coltran / "runs"))
    return coltran


@pytest.fixture
def copied_runs(coltran, tmp_path, monkeypatch):
    return copy_runs(coltran, tmp_path, monkeypatch)


def test_phase2_alone_trains_the_components_of_both_phases(coltran_runs):
    output = printed(coltran_runs)
    for component in UPSAMPLERS:
        first, second = (read_runs(phase="component", model=component, of=phase)[0] for phase in ("phase1", "phase2"))
        steps, more = (int(PRESETS["smoke"].components[component][i].split()[0]) for i in (0, 1))
        photographs = [run.options["data"]["train"] for run in (first, second)]
        assert photographs == [36, 66], "phase 1's component sees phase 1's photographs only"
        assert [run.metrics()["step"].item() for run in (first, second)] == [steps, more]
        assert 0 < first.metrics()["bits"].item() < 10
        begun = second.events()[0]
        assert (begun["event"], begun["run"], begun["steps"]) == ("continues", first.path.name, steps)
        assert f"{component}: trained {first.path.name}: {steps} steps on the 36 photographs" in output
        continued = f"{component}: trained, after {steps} steps of phase 1, {second.path.name}: {more} steps"
        assert f"{continued} on the 66 photographs" in output


def test_each_day_has_a_row_for_either_lightness(coltran_runs):
    (run,) = read_runs(phase="phase2", model="coltran")
    assert run.options["variant"] == "factor-0.9", "the paper's winner, as phase 1 was not run"
    table = run.metrics()
    assert table["day"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert table["lightness"].tolist() == ["model", "photograph"] * 5
    (sampling,) = table["sampling"].unique()
    own = "+".join(read_runs(phase="component", model=p, of="phase2")[0].path.name[-6:] for p in UPSAMPLERS)
    assert sampling == f"norm=row, temperature=1, upsamplers=own:{own}" == run.options["made"]["sampling"]
    assert primary_rows(run)["lightness"].tolist() == ["model"] * 5
    assert (table.groupby("lightness")["PSNR"].mean().diff().dropna() > 0).all(), "a copied lightness raises the PSNR"
    assert len({np.load(f).tobytes() for f in run.path.glob("samples/day-*.npy")}) == 5


def test_phase1_finds_the_components_and_trains_only_the_variants(photographs, coltran_runs, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in runs_dir().glob("component-*/*")}
    done = papermill("phase1", tmp_path, model="coltran", variants="default,mix-0.9", data=photographs, **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert before == {f: f.stat().st_mtime_ns for f in runs_dir().glob("component-*/*")}
    assert printed(tmp_path).count(": found component-coltran_") == 2
    runs = read_runs(phase="phase1", model="coltran")
    trained = {r.options["variant"]: r.options["train"] for r in runs}
    loss_weights = {variant: (o["auto_weight"], o["aux_weight"]) for variant, o in trained.items()}
    assert len(runs) == 2 and loss_weights == {"default": (0.99, 0.01), "mix-0.9": (0.9, 0.1)}
    assert sum((r.path / "winner.json").exists() for r in runs) == 1


def test_a_component_does_not_depend_on_which_notebook_was_first(photographs, coltran, tmp_path, monkeypatch):
    """Phase 1's notebook and then phase 2's, against phase 2 alone."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    photos = load_photos(photographs)
    first, second = (train_color_upsampler(phase, photos) for phase in ("phase1", "phase2"))
    for run in (first, second):
        alone = load_file(coltran / "runs" / run.path.name / "day-1.safetensors")
        assert same(weights(run), alone)
    assert not same(weights(first), weights(second))


def test_an_interrupted_component_ends_the_same(photographs, tmp_path, monkeypatch):
    """Stopped in phase 2, between two checkpoints; started again, it no longer needs phase 1's run."""
    short_components(monkeypatch, "coltran", 60)
    train = partial(train_color_upsampler, "phase2", load_photos(photographs))
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "undisturbed"))
    undisturbed = train()
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "stopped"))
    interrupt(monkeypatch, faic.coltran.ColTranColor, 60 + 40, train)
    (stopped,) = read_runs(of="phase2")
    assert torch.load(stopped.path / "last.pt")["step"] == 25 and not (stopped.path / "day-1.safetensors").exists()
    shutil.rmtree(read_runs(of="phase1")[0].path)
    again = train()
    assert again.path.name == undisturbed.path.name and same(weights(again), weights(undisturbed))
    assert [e["event"] for e in again.events() if "seconds" not in e] == ["continues", "resumed"]
    assert undisturbed.events()[0] == again.events()[0]


def test_a_component_whose_phase_1_is_gone_is_an_error(photographs, tmp_path, monkeypatch):
    short_components(monkeypatch, "coltran", 2)
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    photos = load_photos(photographs)
    first = train_color_upsampler("phase1", photos)
    (first.path / "last.pt").unlink()
    with pytest.raises(TrainingStopped, match="is missing; restore it, or move its folder away"):
        train_color_upsampler("phase2", photos)


def write_official(folder, net, rng):
    """Random official arrays of a network, their averages and an optimizer, written as TensorFlow would."""
    folder.mkdir()
    shapes = {name: shape for mapping in official_layout(net) for name, shape in mapping.shapes.items()}
    arrays = {name: rng.normal(size=tuple(shape)).astype("<f4") for name, shape in shapes.items()}
    averages = {name.replace(":0", EMA_SUFFIX): array + 1 for name, array in arrays.items() if "normalize" not in name}
    stored = {variable_key(name): array for name, array in (arrays | averages).items()}
    stored |= {
        variable_key(name).replace(VALUE, f"/.OPTIMIZER_SLOT/optimizer/rms{VALUE}"): array
        for name, array in arrays.items()
    }
    stored |= {f"optimizer/iter{VALUE}": np.array(9), f"save_counter{VALUE}": np.array(2)}
    write_tf_checkpoint(folder, stored, shards=3)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder with TensorFlow checkpoints of small networks for 64x64."""
    folder, rng = tmp_path_factory.mktemp("official"), np.random.default_rng(0)
    nets = dict(
        colorizer=Colorizer(16, 16, 8, 2, 8),
        color_upsampler=Upsampler("color", 16, 16, 8, 2, 8),
        spatial_upsampler=Upsampler("spatial", 64, 64, 8, 2, 8),
    )
    for name, net in nets.items():
        write_official(folder / name, net, rng)
    return folder


def times(*suffixes):
    """File -> time of the last change of all files of runs, or of those with these suffixes."""
    files = [f for f in runs_dir().rglob("*") if not suffixes or f.suffix in suffixes]
    return {f: f.stat().st_mtime_ns for f in files}


def test_external_upsamplers_score_the_days_again_and_train_nothing(photographs, copied_runs, official):
    (run,) = read_runs(phase="phase2", model="coltran")
    before = times(".safetensors", ".pt", ".npy", ".jsonl")
    photos, chosen = load_photos(photographs), SAMPLING | dict(upsamplers=f"official:{official}")
    components, sampling = prepare_components("coltran", "phase2", "smoke", 0, photos, chosen, QuarterColors(), CPU)
    run_days(run, photos, QuarterColors(), sampling, CPU, components)
    rows = run.metrics().groupby("sampling")["day"].apply(list).to_dict()
    assert list(rows.values()) == [[1, 1, 2, 2, 3, 3, 4, 4, 5, 5]] * 2
    assert sum("upsamplers=official:" in name for name in rows) == 1
    own = primary_rows(run)["sampling"].unique().item()
    assert "upsamplers=own:" in own, "the tables use the model's own components"
    assert before.items() <= times().items()
    assert len(list(run.path.glob("samples/day-*.npy"))) == 10


def test_one_external_upsampler_and_one_of_ours(photographs, copied_runs, official, tmp_path):
    shutil.copytree(official / "color_upsampler", tmp_path / "one" / "color_upsampler")
    photos, chosen = load_photos(photographs), SAMPLING | dict(upsamplers=f"official:{tmp_path / 'one'}")
    components, sampling = prepare_components("coltran", "phase2", "smoke", 0, photos, chosen, QuarterColors(), CPU)
    own, _ = prepare_components("coltran", "phase2", "smoke", 0, photos, SAMPLING, QuarterColors(), CPU)
    assert list(components) == list(own)
    assert components["coltran_color"].head.in_features == 8, "not the external color upsampler"
    spatial_heads = [nets["coltran_spatial"].head.weight for nets in (components, own)]
    assert torch.equal(*spatial_heads), "not our own spatial upsampler"
    (spatial,) = [r.path.name[-6:] for r in read_runs(phase="component", model="coltran_spatial", of="phase2")]
    assert sampling["upsamplers"].startswith("official:") and sampling["upsamplers"].endswith(f"+own:{spatial}")


def test_an_external_model_is_scored_once_beside_ours(photographs, official, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    photos, sampling = load_photos(photographs), SAMPLING | dict(temperature=0.0)
    for _ in range(2):
        run = run_pretrained("coltran", f"official:{official}", "smoke", 0, photos, QuarterColors(), sampling, CPU)
    assert run.path.name.startswith("phase2-coltran-pretrained-smoke-s0-")
    assert run.metrics()["lightness"].tolist() == ["model", "photograph"] and (run.metrics()["day"] == 1).all()
    assert run.metrics()["sampling"].iloc[0].startswith("norm=row, temperature=0, upsamplers=official:")
    assert not read_runs(phase="component"), "an external model needs no components of ours"


def test_external_checkpoints_are_checked_first(official, tmp_path):
    def refused(value, networks=UPSAMPLERS, side=64):
        with pytest.raises(ValueError) as error:
            check_params(dict(upsamplers=value), upsamplers=external_checkpoints("own", networks, side))
        return str(error.value)

    assert external_checkpoints("own", ("coltran", *UPSAMPLERS), 64)(f"official:{official}") == f"official:{official}"
    assert "color_upsampler is for 16x16 pixels, not 64x64" in refused(f"official:{official}", side=256)
    assert "need the preset paper" in refused(f"official:{official}", side=256)
    shutil.copytree(official, tmp_path / "cut")
    (data,) = (tmp_path / "cut" / "spatial_upsampler").glob("*.data-00002*")
    data.write_bytes(data.read_bytes()[:-1])
    assert "is cut off" in refused(f"official:{tmp_path / 'cut'}")
    assert "not there: colorizer" in refused(f"official:{tmp_path}/nothing", ("coltran", *UPSAMPLERS))
    native = ("coltran", "coltran_color")  # of a ColTran that works at the photographs' side: these are for 16x16
    assert list(official_networks(f"official:{official}", native, 16)) == list(native)
    assert "colorizer is for 16x16 pixels, not 64x64" in refused(f"official:{official}", native)


def test_colorize_with_coltran(coltran_runs):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8))
    result = colorized(photo, "square")
    assert result.size == (64, 64) and result.mode == "RGB"


def test_a_run_without_its_components_names_what_is_missing(copied_runs):
    (run,) = read_runs(phase="phase2", model="coltran")
    assert find_components(run, SAMPLING, CPU).keys() == set(UPSAMPLERS)
    for folder in runs_dir().glob("component-coltran_spatial-*"):
        shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="needs its (part|component) coltran_spatial"):
        find_components(run, SAMPLING, CPU)
