"""ColTran in the phases: a model with parts. Phase 2 comes first here, on a fresh folder of runs, so that it has to train phase 1's parts itself."""

import ast
import json
import shutil

import numpy as np
import pytest
import torch
from phases import (
    CPU,
    NBS,
    TINY,
    Judge,
    colorized,
    copy_runs,
    interrupt,
    papermill,
    printed,
    same,
    small_parts,
    weights,
)
from PIL import Image
from safetensors.torch import load_file

import faic.coltran
import faic.coltran_checkpoints
import faic.tf_checkpoints
from faic.coltran import Colorizer, Upsampler
from faic.coltran_checkpoints import external_checkpoints, official_networks
from faic.components import find_components, prepare_components, train_component
from faic.core import runs_dir
from faic.dataset import load_photos
from faic.days import run_days, run_pretrained
from faic.parameters import check_params
from faic.presets import ARCHITECTURES, PRESETS, default_sampling
from faic.resume import TrainingStopped
from faic.runs import primary_rows, read_runs

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


@pytest.fixture
def coltran_runs(coltran, monkeypatch):
    monkeypatch.setenv("FAIC_RUNS", str(coltran / "runs"))
    return coltran


@pytest.fixture
def copied_runs(coltran, tmp_path, monkeypatch):
    return copy_runs(coltran, tmp_path, monkeypatch)


def test_phase2_alone_trains_the_parts_of_both_phases(coltran_runs):
    said = printed(coltran_runs)
    for component in UPSAMPLERS:
        first, second = (read_runs(phase="component", model=component, of=phase)[0] for phase in ("phase1", "phase2"))
        steps, more = (int(PRESETS["smoke"].components[component][i].split()[0]) for i in (0, 1))
        assert (first.options["data"]["train"], second.options["data"]["train"]) == (36, 66), (
            "phase 1's part sees phase 1's photographs only"
        )
        assert (first.metrics()["step"].item(), second.metrics()["step"].item()) == (
            steps,
            more,
        ) and 0 < first.metrics()["bits"].item() < 10
        begun = second.events()[0]
        assert (begun["event"], begun["run"], begun["steps"]) == ("continues", first.path.name, steps)
        assert f"{component}: trained {first.path.name}: {steps} steps on the 36 photographs" in said
        assert (
            f"{component}: trained, after {steps} steps of phase 1, {second.path.name}: {more} steps on the 66 photographs"
            in said
        )


def test_each_day_has_a_row_for_either_lightness(coltran_runs):
    (run,) = read_runs(phase="phase2", model="coltran")
    assert run.options["variant"] == "factor-0.9", "the paper's winner, as phase 1 was not run"
    table = run.metrics()
    assert (
        table["day"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
        and table["lightness"].tolist() == ["model", "photograph"] * 5
    )
    (sampling,) = table["sampling"].unique()
    own = "+".join(read_runs(phase="component", model=p, of="phase2")[0].path.name[-6:] for p in UPSAMPLERS)
    assert sampling == f"norm=row, temperature=1, upsamplers=own:{own}" == run.options["made"]["sampling"]
    assert primary_rows(run)["lightness"].tolist() == ["model"] * 5
    assert (table.groupby("lightness")["PSNR"].mean().diff().dropna() > 0).all(), "a copied lightness raises the PSNR"
    assert len({np.load(f).tobytes() for f in run.path.glob("samples/day-*.npy")}) == 5


def test_phase1_finds_the_parts_and_trains_only_the_variants(photographs, coltran_runs, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in runs_dir().glob("component-*/*")}
    done = papermill("phase1", tmp_path, model="coltran", variants="default,mix-0.9", data=photographs, **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert before == {f: f.stat().st_mtime_ns for f in runs_dir().glob("component-*/*")}
    assert printed(tmp_path).count(": found component-coltran_") == 2
    runs = read_runs(phase="phase1", model="coltran")
    assert sorted(
        (r.options["variant"], r.options["train"]["auto_weight"], r.options["train"]["aux_weight"]) for r in runs
    ) == [("default", 0.99, 0.01), ("mix-0.9", 0.9, 0.1)]
    assert sum((r.path / "winner.json").exists() for r in runs) == 1


def test_a_part_does_not_depend_on_which_notebook_was_first(photographs, coltran, tmp_path, monkeypatch):
    """Phase 1's notebook and then phase 2's, against phase 2 alone."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    photos = load_photos(photographs)
    first, second = (
        train_component("coltran_color", phase, "smoke", 0, photos, Judge(), CPU) for phase in ("phase1", "phase2")
    )
    for run in (first, second):
        alone = load_file(coltran / "runs" / run.path.name / "day-1.safetensors")
        assert same(weights(run), alone)
    assert not same(weights(first), weights(second))


def test_an_interrupted_part_ends_the_same(photographs, tmp_path, monkeypatch):
    """Stopped in phase 2, between two checkpoints; started again, it needs phase 1's run no more."""
    small_parts(monkeypatch, 60)
    photos = load_photos(photographs)
    train = lambda: train_component("coltran_color", "phase2", "smoke", 0, photos, Judge(), CPU)
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "whole"))
    whole = train()
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "stopped"))
    interrupt(monkeypatch, faic.coltran.ColTranColor, 60 + 40, train)
    (stopped,) = read_runs(of="phase2")
    assert torch.load(stopped.path / "last.pt")["step"] == 25 and not (stopped.path / "day-1.safetensors").exists()
    shutil.rmtree(read_runs(of="phase1")[0].path)
    again = train()
    assert again.path.name == whole.path.name and same(weights(again), weights(whole))
    assert [e["event"] for e in again.events() if "seconds" not in e] == ["continues", "resumed"] and whole.events()[
        0
    ] == again.events()[0]


def test_a_part_whose_beginning_is_gone_says_so(photographs, tmp_path, monkeypatch):
    small_parts(monkeypatch, 2)
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    photos = load_photos(photographs)
    first = train_component("coltran_color", "phase1", "smoke", 0, photos, Judge(), CPU)
    (first.path / "last.pt").unlink()
    with pytest.raises(TrainingStopped, match="is missing; restore it, or move its folder away"):
        train_component("coltran_color", "phase2", "smoke", 0, photos, Judge(), CPU)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder with TensorFlow checkpoints of small networks for 64x64, made by the writer in the notebook of ColTran's checkpoints."""
    cells = json.loads((NBS / "28_coltran_checkpoints.ipynb").read_text())["cells"]
    wanted = {"as_varint", "write_table", "write_checkpoint", "write_official"}
    trees = [
        ast.parse("".join(c["source"]))
        for c in cells
        if c["cell_type"] == "code" and any(f"def {w}(" in "".join(c["source"]) for w in wanted)
    ]
    namespace = vars(faic.tf_checkpoints) | vars(faic.coltran_checkpoints) | dict(np=np, rng=np.random.default_rng(0))
    functions = [f for t in trees for f in t.body if isinstance(f, ast.FunctionDef) and f.name in wanted]
    exec(compile(ast.Module(functions, []), "writer", "exec"), namespace)
    folder = tmp_path_factory.mktemp("official")
    nets = dict(
        colorizer=Colorizer(16, 16, 8, 2, 8),
        color_upsampler=Upsampler("color", 16, 16, 8, 2, 8),
        spatial_upsampler=Upsampler("spatial", 64, 64, 8, 2, 8),
    )
    for name, net in nets.items():
        namespace["write_official"](folder / name, net)
    return folder


def test_given_upsamplers_score_the_days_again_and_train_nothing(photographs, copied_runs, official):
    (run,) = read_runs(phase="phase2", model="coltran")
    kept = {
        f: f.stat().st_mtime_ns for f in runs_dir().rglob("*") if f.suffix in (".safetensors", ".pt", ".npy", ".jsonl")
    }
    photos, chosen = load_photos(photographs), SAMPLING | dict(upsamplers=f"official:{official}")
    components, sampling = prepare_components("coltran", "phase2", "smoke", 0, photos, chosen, Judge(), CPU)
    run_days(run, photos, Judge(), sampling, CPU, components)
    rows = run.metrics().groupby("sampling")["day"].apply(list).to_dict()
    assert (
        list(rows.values()) == [[1, 1, 2, 2, 3, 3, 4, 4, 5, 5]] * 2
        and sum("upsamplers=official:" in name for name in rows) == 1
    )
    assert "upsamplers=own:" in primary_rows(run)["sampling"].unique().item(), "the tables use the model's own parts"
    assert kept.items() <= {f: f.stat().st_mtime_ns for f in runs_dir().rglob("*")}.items()
    assert len(list(run.path.glob("samples/day-*.npy"))) == 10


def test_one_given_upsampler_and_one_of_ours(photographs, copied_runs, official, tmp_path):
    shutil.copytree(official / "color_upsampler", tmp_path / "one" / "color_upsampler")
    photos, chosen = load_photos(photographs), SAMPLING | dict(upsamplers=f"official:{tmp_path / 'one'}")
    components, sampling = prepare_components("coltran", "phase2", "smoke", 0, photos, chosen, Judge(), CPU)
    own, _ = prepare_components("coltran", "phase2", "smoke", 0, photos, SAMPLING, Judge(), CPU)
    assert list(components) == list(own) and components["coltran_color"].head.in_features == 8, (
        "the given color upsampler ..."
    )
    assert torch.equal(components["coltran_spatial"].head.weight, own["coltran_spatial"].head.weight), (
        "... with our spatial one"
    )
    (spatial,) = [r.path.name[-6:] for r in read_runs(phase="component", model="coltran_spatial", of="phase2")]
    assert sampling["upsamplers"].startswith("official:") and sampling["upsamplers"].endswith(f"+own:{spatial}")


def test_a_given_model_is_scored_once_beside_ours(photographs, official, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    photos = load_photos(photographs)
    for _ in range(2):
        run = run_pretrained(
            "coltran",
            f"official:{official}",
            "smoke",
            0,
            photos,
            Judge(),
            SAMPLING | dict(temperature=0.0),
            CPU,
        )
    assert run.path.name.startswith("phase2-coltran-pretrained-smoke-s0-")
    assert run.metrics()["lightness"].tolist() == ["model", "photograph"] and (run.metrics()["day"] == 1).all()
    assert run.metrics()["sampling"].iloc[0].startswith("norm=row, temperature=0, upsamplers=official:")
    assert not read_runs(phase="component"), "a given model needs no parts of ours"


def test_given_checkpoints_are_looked_at_first(official, tmp_path):
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


def test_a_run_without_its_parts_says_what_is_missing(copied_runs):
    (run,) = read_runs(phase="phase2", model="coltran")
    assert find_components(run, SAMPLING, CPU).keys() == set(UPSAMPLERS)
    for folder in runs_dir().glob("component-coltran_spatial-*"):
        shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="needs its component coltran_spatial"):
        find_components(run, SAMPLING, CPU)
