"""The phases as functions: what the notebooks call, without papermill and Jupyter."""

import inspect
import os
import subprocess
import sys

import nbformat
import pytest
from feature_nets import QuarterColors
from phases import NBS, TINY

import faic.phases
from faic.parameters import ParameterError, own_parameters
from faic.phases import run_phase1, run_phase2
from faic.presets import ARCHITECTURES
from faic.results import make_results

JUPYTER = ("papermill", "nbdev", "IPython", "ipykernel", "nbclient", "nbformat", "fastcore", "execnb")


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A folder of runs of its own, and a feature network that costs nothing."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(faic.phases, "efficientnet_lite0", lambda device: QuarterColors())
    monkeypatch.setattr(faic.phases, "find_judges", lambda device: ())


def parameters(notebook):
    cells = nbformat.read(NBS / f"{notebook}.ipynb", 4).cells
    (cell,) = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    values = {}
    exec(cell.source, values)
    return {name: values[name] for name in values["__annotations__"]}


@pytest.mark.parametrize("notebook, function", [("phase1", run_phase1), ("phase2", run_phase2)])
def test_a_function_has_its_notebook_s_parameters(notebook, function):
    shown = parameters(notebook)
    own = {n for a in ARCHITECTURES.values() for n in own_parameters(a)}
    shared = {n: p.default for n, p in inspect.signature(function).parameters.items() if n != "own"}
    assert {n: v for n, v in shown.items() if n not in own} == shared and own <= set(shown)


def test_the_page_of_results_has_its_notebook_s_parameters():
    assert parameters("results") == {n: p.default for n, p in inspect.signature(make_results).parameters.items()}


def test_phase1_and_phase2_return_what_the_notebooks_show(photographs, quick):
    first = run_phase1("pix2pix", data=str(photographs), variants="default,lr-5e-4", **TINY)
    variants = ["default", "lr-5e-4"]
    assert [r.options["variant"] for r in first.runs] == variants and first.winner.variant in first.scores.index
    assert first.scores["FID (quarters)"].is_monotonic_increasing
    assert list(first.pictures) == ["gray", "ground truth", *variants]
    assert first.messages[0].startswith(f"winner: {first.winner.variant}, FID (quarters)")
    second = run_phase2("pix2pix", data=str(photographs), **TINY)
    (run,) = second.runs
    assert second.variant == run.options["variant"] == first.winner.variant
    assert second.reason.startswith("phase 1's winner")
    assert second.scores.index.tolist() == [(day, "photograph") for day in range(1, 6)]
    assert second.scores["step"].tolist() == [3, 6, 9, 12, 15]
    assert list(second.pictures) == ["gray", "ground truth", *(f"day {d}" for d in range(1, 6))]
    assert "step" in second.losses[0] and len(second.losses[0].columns) > 2


def test_phase1_without_a_variant_scores_the_baselines(quick, capsys):
    """On the embedded photographs, whose caution is printed."""
    found = run_phase1("pix2pix", variants="none", **TINY)
    assert not found.runs and found.scores.empty and found.winner is None
    assert list(found.pictures) == ["gray", "ground truth"]
    assert "says nothing about the models" in capsys.readouterr().out


def test_wrong_arguments_are_reported_all_at_once(quick):
    with pytest.raises(ParameterError) as error:
        run_phase2("colrtan", budget="two days", temperature=-1)
    for message in ("one of 'pix2pix', 'coltran', 'bbdm'", "a budget reads like", "a number, 0 or more"):
        assert message in str(error.value)


WITHOUT_JUPYTER = f"""
import sys
for name in {JUPYTER}:
    sys.modules[name] = None
sys.path.insert(0, {str(NBS.parent / "tests")!r})
import faic.phases
from faic.results import make_results
from feature_nets import QuarterColors
faic.phases.efficientnet_lite0 = lambda device: QuarterColors()
faic.phases.find_judges = lambda device: ()
found = faic.phases.run_phase1("pix2pix", data=sys.argv[1], variants="default", budget="1 steps", device="cpu")
print(found.messages)
page = make_results(data=sys.argv[1], budget="1 steps")
print(len(page.tables), "tables", len(page.figures), "figures")
"""


def test_the_functions_need_no_jupyter(photographs, tmp_path):
    """In a process in which none of these packages can be imported."""
    environment = dict(os.environ, FAIC_RUNS=str(tmp_path / "runs"), FAIC_FIGURES=str(tmp_path / "figures"))
    command = [sys.executable, "-c", WITHOUT_JUPYTER, str(photographs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "a single variant cannot win" in done.stdout, done.stderr[-2000:]
    assert "11 tables 14 figures" in done.stdout and len(list((tmp_path / "figures").glob("*/figure*.png"))) == 14
