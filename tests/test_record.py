"""What training cost, the record, and the sheet to print: right values on invented runs."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import faic.benchmark
import faic.presets
from faic.benchmark import mean_costs, photographs_seen, run_flop, training_costs
from faic.color import forget_constants, rgb_to_lab
from faic.core import RESULT_SOFTWARE, write_json
from faic.drawing import save_figure
from faic.figures import COST_AXES, figure_costs
from faic.metrics import column_name
from faic.notes import example_run, example_scores
from faic.presets import model_options, training_flop
from faic.results import draw_report, page_tables
from faic.selection import RunSelection, select_runs
from faic.time_tables import costs_table, record_table, record_target

FID = column_name("FID", "EfficientNet-Lite0")
SIDE = 8
FORWARD = (2 * 2 * 1 * 9 * SIDE**2, 2 * 1 * 2 * 9 * SIDE**2)  # of two convolutions with 1 to 2 and 2 to 1 channels


class TwoConvolutions:
    """A trainee whose arithmetic is known; with turns, its second network is trained every other step alone."""

    gray_kind = "lab"

    def __init__(self, turns=1):
        self.cycle = turns
        self.first = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.second = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def networks(self):
        return {"first": self.first, "second": self.second}

    def losses(self, batch, generator):
        answer = self.second(self.first(batch["rgb"][:, :1]))
        yield "first" if batch["step"] == 0 else "second", answer.mean()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FAIC_FIGURES", str(tmp_path / "figures"))
    yield tmp_path / "runs"
    plt.close("all")


def test_arithmetic_of_two_convolutions(monkeypatch):
    """Forward counts once; a gradient of weights and one of an input cost as much again; the photograph needs none."""
    turns = []
    made = SimpleNamespace(make=lambda *_: TwoConvolutions(*turns))
    monkeypatch.setattr(faic.presets, "find_description", lambda name: made)
    one, two = FORWARD
    assert training_flop("any", dict(side=SIDE)) == one + two + two + one  # the gradient of the first runs through two
    turns.append(2)
    last = one + two + two  # the turn of the second network
    assert training_flop("any", dict(side=SIDE)) == (2 * one + 2 * two + last) / 2


def place(folder, model, fids, seed=0, device="an abacus, 2 threads", phase="phase2", digits="", **options):
    """A run of phase 2 with a FID a day, 50 steps of 4 photographs and 30 seconds each."""
    rows = [
        example_scores(fid, day) | dict(step=50 * day, training_seconds=30.0 * day) for day, fid in enumerate(fids, 1)
    ]
    run = example_run(folder, phase, model, options.pop("variant", "default"), rows, seed, **options)
    made = dict(time=f"2031-05-05T12:00:0{seed}", commit="c0ffee1234", device=device, components={})
    run.options["made"] = made | options.get("made", {})
    path = run.path.with_name(f"{run.path.name}-{digits or options.get('budget', 'own').replace(' ', '')}")
    run.path.rename(path)
    run.path = path
    write_json(path / "options.json", run.options)
    return run


@pytest.fixture
def flop(monkeypatch):
    """Each photograph costs as many FLOP as the model's name has letters, from a step on a thousand more."""
    counted = []

    def count(model, options, components, step):
        counted.append((model, step))
        return len(model) + (1000 if step else 0)

    monkeypatch.setattr(faic.benchmark, "training_flop", count)
    faic.benchmark._step_flop.cache_clear()
    yield counted
    faic.benchmark._step_flop.cache_clear()


def test_photographs_and_arithmetic_of_a_run(folder, flop):
    run = place(folder, "pix2pix", [9.0, 8.0], data=dict(train=121))
    assert [photographs_seen(run, steps) for steps in (1, 30, 31, 32)] == [4, 120, 121, 125]  # the 31st step has one
    assert run_flop(run, 10) == 7 * 40
    run.options["train"]["disc_start"] = 8
    assert run_flop(run, 10) == pytest.approx(40 * (0.8 * 7 + 0.2 * 1007))
    assert run_flop(run, 10, before=8) == pytest.approx(40 * 1007)
    costs = training_costs(place(folder, "bbdm", [9.0, 8.0], data=dict(train=120), seed=1))
    assert costs["photographs"].tolist() == [200, 400] and costs["flop"].tolist() == [800, 1600]


def test_components_count_in_seconds_and_arithmetic(folder, flop):
    """In both phases; a component that is not there leaves the cost unknown, and not too low."""
    shared = dict(phase="component", data=dict(train=120))
    place(folder, "coltran_color", [9.0], digits="s0-111111", of="phase1", variant=None, **shared)
    place(folder, "coltran_color", [9.0], digits="s0-222222", of="phase2", continues="111111", variant=None, **shared)
    made = dict(components=dict(coltran_color="222222"))
    run = place(folder, "coltran", [9.0, 8.0], data=dict(train=120), made=made)
    assert training_costs(run)["seconds"].tolist() == [90.0, 120.0]
    assert training_costs(run)["flop"].tolist() == [200 * (7 + 2 * 13), 400 * 7 + 400 * 13]
    assert training_costs(run)["photographs"].tolist() == [200, 400]
    lost = place(folder, "coltran", [9.0], seed=1, data=dict(train=120), made=dict(components=dict(vqgan_f4="333333")))
    assert training_costs(lost)[["seconds", "flop"]].isna().all(axis=None)
    assert mean_costs([run, lost]).loc[1, "photographs"] == 200 and np.isnan(mean_costs([run, lost]).loc[1, "flop"])


def study(folder):
    """Pix2Pix with two seeds; ColTran passes its last day on day 2, BBDM never; two more runs that nobody chose."""
    for seed in (0, 1):
        place(folder, "pix2pix", [80.0, 76.0, 70.0 + seed], seed, variant="lr-5e-4", budget="150 steps")
    place(folder, "coltran", [75.0, 70.5, 69.0], budget="150 steps", device="NVIDIA H200")
    place(folder, "bbdm", [90.0, 80.0, 85.0], budget="150 steps")
    fast = dict(budget="100 steps", train=dict(batch_size=4, lr=0.1))
    place(folder, "pix2pix", [70.0, 60.0], **fast)
    place(folder, "pix2pix", [10.0], budget="50 steps", data=dict(name="invented", fingerprint="other", test=48))
    budgets = {"phase2": "150 steps"}
    return select_runs("smoke", "invented", 0, budgets, seeds=2)


def test_the_record_names_the_first_day_that_reaches_the_target(folder, flop):
    selection = study(folder)
    target = record_target(selection)
    assert (target.model, target.value, target.day, target.column) == ("Pix2Pix", 70.5, 3, FID)
    table = record_table(selection)
    rows = table.frame.set_index("entry")
    assert list(table.view.index) == [
        "1. ColTran, default",
        "2. Pix2Pix, default",
        "3. Pix2Pix, lr-5e-4",
        "4. BBDM, default",
    ]
    assert table.view["time"].tolist() == ["60.0 GPU-seconds", "1.0 core-minutes", "3.0 core-minutes", "not reached"]
    assert rows["day"].tolist() == [2, 1, 3, 2] and rows["fid"].tolist() == [70.5, 70.0, 70.5, 80.0]
    assert rows.loc["ColTran, default", "photographs"] == 2 * 200
    assert rows.loc["Pix2Pix, lr-5e-4", "tflop"] == pytest.approx(3 * 200 * 7 / 1e12)
    assert rows.loc["Pix2Pix, lr-5e-4", "seeds"] == "seeds 0, 1"
    assert rows.loc["Pix2Pix, default", "options"] == "budget=100 steps, lr=0.1"
    assert rows["commit"].tolist() == ["c0ffee1234"] * 4
    assert rows.loc["Pix2Pix, lr-5e-4", "run"].count("phase2-pix2pix-lr-5e-4") == 2
    text = table.markdown()
    for phrase in ("fingerprint f00dfacade", "70.50: that of Pix2Pix after day 3, mean of 2 seeds", "To add a row"):
        assert phrase in text, phrase
    assert "other" not in " ".join(rows["run"])
    assert table.view.loc["1. ColTran, default", "FID"] == "70.50 [68.39, 72.61]"


def test_released_weights_have_no_place_in_the_record(folder, flop):
    selection = study(folder)
    place(folder, "bbdm", [50.0], variant="released", digits="aaaaaa")
    place(folder, "bbdm", [50.0], variant="pretrained", digits="bbbbbb")
    place(folder, "bbdm", [np.nan], digits="cccccc", budget="50 steps")
    assert len(record_table(selection).view) == 4


def test_the_record_counts_only_days_that_all_seeds_have(folder, flop):
    """The mean of the first two seeds after day 3 is far lower than that of all three after day 2."""
    for seed, fids in enumerate(([80.0, 70.0, 60.0], [80.0, 70.0, 60.0], [130.0, 100.0])):
        place(folder, "pix2pix", fids, seed, budget="150 steps")
    selection = select_runs("smoke", "invented", 0, {"phase2": "150 steps"}, seeds=3)
    target = record_target(selection)
    assert (target.value, target.day, target.seeds) == (80.0, 2, 3)
    table = record_table(selection)
    assert table.view.loc["1. Pix2Pix, default", ["time", "day"]].tolist() == ["2.0 core-minutes", "2"]
    assert "after day 2, mean of 3 seeds" in table.notes[0]


def test_no_record_where_the_gray_image_reaches_the_target(folder, flop):
    study(folder)
    place(folder, "baseline", [70.0], variant="gray", digits="gray")
    table = record_table(select_runs("smoke", "invented", 0, {"phase2": "150 steps"}, seeds=2))
    assert table.view.empty and table.frame.empty
    assert "the gray image has FID (EfficientNet-Lite0) 70.00" in table.notes[0]
    assert "whole days" in table.markdown()


def test_curves_and_table_of_costs(folder, flop):
    selection = study(folder)
    frame = costs_table(selection).frame.set_index("entry")
    assert frame.loc["Pix2Pix, day 2", ["photographs", "seconds", "flop", FID]].tolist() == [400, 60, 2800, 76]
    fig = figure_costs(selection)
    lines = {ax.get_xlabel(): ax.get_lines()[0].get_xdata().tolist() for ax in fig.axes[:4]}
    assert list(lines) == list(COST_AXES.values())
    assert list(lines.values()) == [[30, 60, 90], [200, 400, 600], [1400, 2800, 4200], [1, 2, 3]]
    assert [ax.get_xscale() for ax in fig.axes[:4]] == ["log", "log", "log", "linear"]


def test_the_sheet_is_one_page_with_the_same_bytes(folder, flop, tmp_path):
    selection = study(folder)
    tables = page_tables(selection)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (700, 500), "navy").save(pictures / "figure8_free.png")
    files = [
        save_figure(draw_report(selection, tables, pictures), tmp_path / str(i), "report", "pdf") for i in range(2)
    ]
    content = files[0].read_bytes()
    assert content == files[1].read_bytes()
    assert content.startswith(b"%PDF") and b"/Count 1" in content
    assert RESULT_SOFTWARE.encode() in content and b"CreationDate" not in content
    texts = [text.get_text() for text in draw_report(selection, tables, pictures).texts]
    assert any("several seeds, Pix2Pix has the lowest FID after three days: 70.5" in text for text in texts)
    assert any("failures_pix2pix.png: not made yet" in text for text in texts)
    tall = Image.new("RGB", (700, 5000), "navy")
    for name in ("figure8_free", "failures_pix2pix"):
        tall.save(pictures / f"{name}.png")
    sheet = draw_report(selection, tables, pictures)
    assert min(text.get_window_extent().y0 for text in sheet.texts) > 0 and len(sheet.axes) == 7
    empty = draw_report(
        RunSelection("gpu", "nowhere", 0, {}), page_tables(RunSelection("gpu", "nowhere", 0, {})), pictures
    )
    assert any("No answer yet" in text.get_text() for text in empty.texts)


def test_counting_leaves_no_tables_without_content():
    """Colors that are converted for the first time while tensors have no content must not be kept."""
    forget_constants()
    assert training_flop("pix2pix", model_options("pix2pix", "smoke")) > 0
    assert rgb_to_lab(torch.ones(1, 3, 2, 2))[0, 0].mean().item() == pytest.approx(100, abs=1e-3)


@pytest.mark.parametrize("variant", ["penalty", "penalty-image", "noise-3"])
def test_the_arithmetic_of_a_gradient_penalty_is_counted(variant):
    plain, counted = (training_flop("cgan", model_options("cgan", "smoke", v)) for v in ("default", variant))
    assert counted > 1.4 * plain  # the penalty is a gradient of a gradient
