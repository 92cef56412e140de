"""results.ipynb on invented runs in temporary folders: what it writes, and that it states what was not run."""

import itertools
import json
import shutil
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import papermill
import pytest
from feature_nets import QuarterColors
from scipy.stats import ttest_1samp

import faic.components
import faic.phases
from faic.core import RESULTS_MARKER, pick_device, read_json, repo_root, write_json
from faic.drawing import save_figure
from faic.figures import figure7, figure11, figure_steps, paper_figure
from faic.first_stages import VQGANS
from faic.metrics import METRICS, column_name
from faic.paper import PAPER_TABLES
from faic.presets import ARCHITECTURES
from faic.runs import open_run, read_runs, sample_file
from faic.score_tables import SIGNED, judges_table, phase2_table, training_table, variants_table
from faic.selection import RunSelection, model_components, select_runs, winner_of
from faic.time_tables import sizes_table, steps_table, times_table
from faic.verdict import answer_sentences, answers_of, hypothesis_sentences, judge_hypothesis, model_seconds, verdict

LABEL = "EfficientNet-Lite0"
CAUTION = "Invented for a test."
DATA = dict(name="embedded", fingerprint="f00dfacade", side=8)
TABLES = ("table1", "table2", "table3", "table4", "table_judges", "table_phase2", "table_sizes", "table_steps")
TABLES += ("table_training", "table_costs", "record")
FILES = [f"{t}.{e}" for t in TABLES for e in ("csv", "md")]
FILES += [f"figure{n}.png" for n in (*range(1, 12), "_steps", "_costs", "_models")] + ["hypothesis.md", "report.pdf"]


def scores(fid, width=2.0, only=METRICS):
    """A row of metrics around a FID, with intervals of a width; metrics that are not in `only` are missing."""
    values = {name: 7.5 for name in METRICS} | {"FID": fid, "unpaired FID": fid + 90, "KID": fid / 1e4}
    row = {"n": 48, "dimension": 1280}
    for name in METRICS:
        half = width * (1e-4 if name == "KID" else 1)
        for end, sign in (("", 0), ("low", -1), ("high", 1)):
            row[column_name(name, LABEL, end)] = values[name] + sign * half if name in only else np.nan
    return row


def run(
    phase, model, variant, rows, data=DATA, time="2031-05-05T12:00:00", seed=0, sampling="", components={}, **options
):
    """A run folder as the study writes it: options, rows of metrics, noise as samples."""
    options = dict(phase=phase, model=model, preset="smoke", seed=seed, data=data) | options
    if variant:
        options |= dict(variant=variant)
    made = open_run(options, pick_device("cpu"))
    notes = dict(time=time, commit="c0ffee1234", device="a test's abacus", caution=CAUTION)
    notes |= dict(credits="Photographs: noise.", sampling=sampling, components=components)
    write_json(made.path / "options.json", made.options | dict(made=notes))
    (made.path / "samples").mkdir(exist_ok=True)
    for row in rows:
        made.add_metrics(row)
        if "day" in row:
            noise = np.random.default_rng(row["day"]).integers(0, 256, (8, 8, 8, 3), np.uint8)
            np.save(sample_file(made, row["day"], row.get("sampling", "")), noise)
    return made


def baselines():
    for phase in ("phase1", "phase2"):
        run(phase, "baseline", "gray", [dict(day=1, lightness="photograph", **scores(104.0))])
        run(phase, "baseline", "real", [dict(day=1, **scores(7.0, only=("unpaired FID", "IS")))])


def model_runs(model, fid, lightness=("photograph",), seconds=0.05):
    """Both phases and the inference time of a model whose four variants and five days score around `fid`."""
    variants = next(t["FID"] for t in PAPER_TABLES.values() if t.get("model") == model)
    data, train = DATA | dict(train=120, validation=48, test=48), dict(batch_size=4)

    def rows(day, fid):
        work = dict(day=day, step=60 * day, training_seconds=9.5 * day, sampling="default")
        return [dict(work, lightness=mode, **scores(fid)) for mode in lightness]

    made = [
        run("phase1", model, variant, rows(1, fid + i), data, budget="60 steps", train=train)
        for i, variant in enumerate(variants)
    ]
    made[1].log(event="discriminator won", step=55, began=31)
    days = [row for day in range(1, 6) for row in rows(day, fid - day)]
    run("phase2", model, list(variants)[0], days, data, budget="300 steps", train=train)
    if model != "bbdm":  # see time_bbdm
        time_model(model, seconds)
    return made


def time_model(model, seconds):
    """A model's inference times: each stage takes an image these seconds, in a batch of 8 an eighth of them."""
    timing = dict(images=16, side=8, gflop_per_image=0.4, peak_share=0.1, cpu_seconds_per_image=seconds)
    timing |= dict(device="a test's abacus", times=1)
    rows = []
    for stage in [s for m, s in PAPER_TABLES["Table IV"]["hours"] if m == model]:
        rows += [dict(timing, stage=stage, batch_size=b, seconds_per_image=seconds / b) for b in (1, 8)]
    return run("inference", model, None, rows)


def time_bbdm(seconds, **options):
    """BBDM's inference times: encode and decode take a quarter of the seconds each, 10 steps the other half."""
    timing = dict(images=16, side=8, device="a test's abacus", sampling="eta=1, sample_steps=10", precision="float32")
    stages = dict(encode=(1, 0.25, 3.0), decode=(1, 0.25, 6.0)) | {"U-Net step": (10, 0.05, 2.0)}
    rows = []
    for size, (stage, (times, share, gflop)) in itertools.product((1, 8), stages.items()):
        row = dict(timing, stage=stage, times=times, batch_size=size, gflop_per_image=gflop, peak_share=0.5)
        rows.append(row | dict(seconds_per_image=share * seconds / size, cpu_seconds_per_image=share * seconds))
    half = [dict(r, precision="bfloat16", seconds_per_image=r["seconds_per_image"] / 100) for r in rows]
    return run("inference", "bbdm", None, rows + half, latent="f4", first_stage="own:1a2b3c", **options)


def bbdm_run(phase, variant, fid, days=(1,), **options):
    """A run of BBDM whose days have a row for either lightness."""
    rows = []
    for day in days:
        row = dict(day=day, step=60 * day, training_seconds=1.0 * day, sampling="default", **scores(fid - day))
        rows += [dict(row, lightness=mode) for mode in ("model", "photograph")]
    budget = "300 steps" if phase == "phase2" else "60 steps"
    return run(phase, "bbdm", variant, rows, budget=budget, train=dict(batch_size=4), **options)


def component_run(component, phase, steps, seconds, **options):
    """A component as the study leaves it: its work and its loss, no scores."""
    row = dict(day=1, step=steps, training_seconds=seconds, split="validation", n=48, bits=5.0)
    options = dict(of=phase, train=dict(batch_size=24)) | options
    return run("component", component, None, [row], DATA | dict(train=120), **options)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FAIC_FIGURES", str(tmp_path / "figures"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plt.close("all")


def written(folder):
    """Name -> path of what `results` has written."""
    return {f.name: f for f in (folder / "figures" / "smoke").iterdir() if f.name != RESULTS_MARKER}


def in_this_process(notebook, **parameters):
    """Run a notebook's code cells with parameters in place of its own, without a kernel."""
    namespace = {"display": lambda shown: None}
    for cell in json.loads((repo_root() / "nbs" / f"{notebook}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
            namespace |= parameters if "parameters" in cell["metadata"].get("tags", []) else {}


def test_nothing_was_run(folders):
    in_this_process("results", budget="60 steps")
    files = written(folders)
    assert sorted(files) == sorted(FILES)
    for name in TABLES:
        text = files[f"{name}.md"].read_text()
        for phrase in ("not run", "no runs", "preset smoke", "commit of this checkout"):
            assert phrase in text, f"{name}: {phrase}"
    assert set(pd.read_csv(files["table1.csv"], comment="#")["status"]) == {"not run"}
    lines = files["hypothesis.md"].read_text().splitlines()
    sentences = [line for line in lines if line.startswith("- ")]
    assert sentences and all("not decided" in s or "not run" in s for s in sentences)
    assert min(files[f].stat().st_size for f in FILES) > 100


def test_pix2pix_alone(folders):
    baselines()
    model_runs("pix2pix", 80.0)
    parameters = dict(budget="60 steps", preset="smoke", data="embedded", seed="0")
    options = dict(kernel_name="python3", progress_bar=False)
    papermill.execute_notebook(repo_root() / "nbs" / "results.ipynb", folders / "out.ipynb", parameters, **options)
    files = written(folders)
    assert sorted(files) == sorted(FILES)
    text = files["table1.md"].read_text()
    for phrase in (
        "80.0 [78.0, 82.0]",
        "| FID, the paper | 16.33 | 27.53 | 17.87 | 18.30 |",
        "winner, undecided",
        "does not tell it apart",
        "grouped jackknife",
        "BCa bootstrap",
        "n = 48 images in 1280 dimensions",
        "since step 31",
        CAUTION,
        "commit c0ffee1234",
        "preset smoke",
        "data embedded (48 validation, 48 test images, 8x8",
        "gray image",
        "real photographs",
        "60 steps",
    ):
        assert phrase in text, phrase
    table = pd.read_csv(files["table1.csv"], comment="#").set_index("entry")
    fid = column_name("FID", LABEL)
    columns = [fid, f"{fid} low", f"{fid} high", "FID, the paper", "epochs"]
    assert table.loc["default", columns].tolist() == [80, 78, 82, 16.33, 2]
    assert table.loc["real photographs", column_name("unpaired FID", LABEL)] == 97
    assert np.isnan(table.loc["real photographs", fid])
    assert table["status"].tolist() == ["run"] * 4 + ["baseline"] * 2
    assert "# preset smoke" in files["table1.csv"].read_text()
    table2 = files["table2.md"].read_text()
    assert "26.00 | 21.11 | 22.93 | 21.22" in table2 and "not run" in table2
    times = files["table4.md"].read_text()
    assert "projected from 16 images on a test's abacus" in times and "| 0:03 | 2:40 | 6:50 | 0:04 | 0:42 |" in times
    assert pd.read_csv(files["table4.csv"], comment="#")["projected_seconds"].dropna().tolist() == [0.05 / 8 * 5000]
    hypothesis = files["hypothesis.md"].read_text()
    assert "BBDM was not run" in hypothesis
    assert f"By {fid}, the gray image has 104.0 [102.0, 106.0]. Better: Pix2Pix 75.0 [73.0, 77.0]." in hypothesis
    assert "By PSNR, the gray image has 7.50 [5.50, 9.50]. Not decided: Pix2Pix" in hypothesis
    final = pd.read_csv(files["table_phase2.csv"], comment="#").set_index("entry")
    assert final.loc["Pix2Pix", "day"] == 5 and final.loc["ColTran", "status"] == "not run"


def test_more_models_slot_in(folders):
    baselines()
    model_runs("pix2pix", 80.0)
    model_runs("coltran", 60.0, ("model", "photograph"), seconds=5.0)
    model_runs("bbdm", 61.0, ("model", "photograph"))
    time_bbdm(1.0)
    for component, phase in itertools.product(["coltran_color", "coltran_spatial", "vqgan_f4"], ("phase1", "phase2")):
        component_run(component, phase, 40, 12.0, budget="40 steps")
    selection = select_runs("smoke", "embedded", 0, dict(phase1="60 steps", phase2="300 steps"))
    assert not any(n.startswith("Left out") for n in training_table(selection).notes)
    sentences = hypothesis_sentences(selection)
    assert "is not decided" in sentences[0]
    assert any("ColTran leads with 55.0" in s and "overlaps that of BBDM" in s for s in sentences)
    tables = [make(selection) for make in (phase2_table, times_table, training_table)]
    for table in [*tables, variants_table("Table III", selection)]:
        assert "not run" not in table.markdown().lower()
    table = variants_table("Table II", selection)
    assert "factor-0.9, lightness photograph" in table.frame["entry"].tolist()
    assert table.view.columns.tolist() == [*PAPER_TABLES["Table II"]["FID"], "gray image", "real photographs"]
    psnr = phase2_table(selection).view.loc["PSNR, dB, photograph's L"]
    assert psnr[["Pix2Pix", "ColTran", "gray image"]].tolist() == ["7.50 [5.50, 9.50]"] * 3
    files = [save_figure(paper_figure("Figure 9", selection), folders / str(i), "f") for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_components_are_listed_apart(folders):
    """Tables show components' steps and times apart from those of the main training; a component is never a model."""
    model_runs("coltran", 60.0, ("model", "photograph"))
    component_run("coltran_color", "phase1", 40, 12.0, budget="40 steps")
    component_run("coltran_color", "phase2", 60, 3600.0, budget="60 steps")
    component_run("coltran_color", "phase1", 99, 99.0, budget="99 steps", time="2030-01-01")
    table = training_table(select_runs("smoke", "embedded", 0, dict(phase1="60 steps", phase2="300 steps")))
    rows = table.frame.set_index("entry")
    columns = ["step", "epochs", "training_seconds", "budget"]
    assert rows.loc["ColTran, color upsampler, phase 1", columns].tolist() == [40, 8, 12, "40 steps"]
    assert rows.loc["ColTran, color upsampler, phase 2", ["step", "training_seconds"]].tolist() == [60, 3600]
    assert rows.loc["ColTran, spatial upsampler, phase 1", "status"] == "not run"
    variants = [f"ColTran, phase 1: {v}" for v in PAPER_TABLES["Table II"]["FID"]]
    entries = [e for e in rows.index if e.startswith("ColTran, phase")]
    assert entries == [*variants, "ColTran, phase 2: default"]
    (note,) = [n for n in table.notes if "1:00:12" in n]
    assert note.startswith("ColTran: 0:01:26 of training in its variants and days")  # 4 x 9.5 + 47.5 s
    assert sum("is newer" in n for n in table.notes) == 1
    used = component_run("coltran_color", "phase1", 11, 1.0, budget="11 steps", time="2029-01-01")
    components = dict(coltran_color=used.path.name[-6:])
    run("phase1", "coltran", "mix-0.9", [dict(day=1, **scores(70.0))], components=components)
    rows = training_table(select_runs("smoke", "embedded", 0)).frame.set_index("entry")
    steps = rows.loc["ColTran, color upsampler, phase 1", "step"]
    assert steps == 11, "a component that the runs name is preferred to a newer one"
    assert rows.loc["ColTran, color upsampler, phase 2", "step"] == 60
    assert "trained apart" in variants_table("Table II", select_runs("smoke", "embedded", 0)).markdown()
    upsamplers, plain = {c.name for c in ARCHITECTURES["coltran"].components}, {"vqgan_f4", "vqgan_f4_plain"}
    components = dict(pix2pix=plain, coltran=upsamplers | set(VQGANS), bbdm=set(VQGANS))
    named = {model: set() for model in components}
    for kind, names in model_components("smoke").items():
        named[kind.split(":")[0]].update(names)
    for model, names in components.items():
        assert named[model] == set(names), "every component has a name in tables"


def test_figure11_compares_upsamplers_and_nothing_else(folders):
    baselines()
    own, given, cooler = (
        "norm=row, temperature=1, upsamplers=own:1a",
        "norm=row, temperature=1, upsamplers=official:2b",
        "norm=row, temperature=0, upsamplers=official:2b",
    )

    def titles():
        axes = figure11(select_runs("smoke", "embedded", 0)).axes
        return [ax.get_title().split("\n")[:2] for ax in axes if ax.get_title()]

    assert titles() == [], "not run"
    rows = []
    for day, mode in itertools.product((1, 2), ("model", "photograph")):
        rows.append(dict(day=day, sampling=own, lightness=mode, **scores(80.0 - day)))
    made = run("phase2", "coltran", "default", rows, sampling=own)
    assert titles() == [["gray"], ["ground truth"], ["own upsamplers", "FID 78.0"]]
    for fid, day, sampling in ((50.0, 1, given), (60.0, 2, given), (40.0, 2, cooler)):
        made.add_metrics(dict(day=day, sampling=sampling, lightness="model", **scores(fid)))
        np.save(sample_file(made, day, sampling), np.zeros((8, 8, 8, 3), np.uint8))
    assert titles()[2:] == [["own upsamplers", "FID 78.0"], ["given upsamplers", "FID 60.0"]]
    selection = select_runs("smoke", "embedded", 0)
    ours, theirs = (ax.images[0].get_array() for ax in figure11(selection).axes[2:4])
    assert ours.any() and not theirs.any(), "each column shows its own samples"
    entries = phase2_table(selection).frame.set_index("entry")[column_name("FID", LABEL)].to_dict()
    assert entries["ColTran"] == 78 and entries["ColTran, sampling upsamplers=official:2b"] == 60
    assert f"Sampling: {own}." in phase2_table(selection).notes


def comparison(selection):
    """The verdict's sentences and the curves of Figure 7."""
    curves = [ax.lines[0].get_ydata().tolist() for ax in figure7(selection).axes]
    return hypothesis_sentences(selection), curves


def test_extra_models_are_not_compared(folders):
    """BBDM in other spaces has its own entries in tables; verdicts and Figure 7 know only the three models."""
    baselines()
    model_runs("pix2pix", 80.0)
    bbdm_run("phase2", "l2", 70.0, range(1, 6), latent="f4", first_stage="own:1a2b3c")
    before = comparison(select_runs("smoke", "embedded", 0))
    bbdm_run("phase2", "l2", 20.0, (1, 2), latent="f4", first_stage="plain:4d5e6f")
    bbdm_run("phase2", "l2", 10.0, range(1, 6), latent="none", first_stage="")
    bbdm_run("phase2", "l2", 30.0, range(1, 6), latent="f8", first_stage="given:7a8b9c", time="2031-06-06")
    bbdm_run("phase1", "default", 5.0, latent="f8", first_stage="given:7a8b9c")
    options = dict(of="phase2", budget="40 steps", train=dict(batch_size=24))
    component = run("component", "vqgan_f4", None, [], DATA | dict(train=120), **options)
    work = {"day": 1, "step": 40, "training_seconds": 12.0, "codebook usage": 0.25, "perplexity": 30.0}
    for lightness, fid in (("model", 8.0), ("photograph", 6.0)):
        component.add_metrics(dict(work, lightness=lightness, **scores(fid)))
    selection = select_runs("smoke", "embedded", 0)
    assert comparison(selection) == before
    table, fid = phase2_table(selection), column_name("FID", LABEL)
    rows = table.frame.set_index("entry")
    entries = ["BBDM", "BBDM, f4, no perceptual term", "BBDM, f8, given first stage", "BBDM, pixel space"]
    assert rows.loc[entries, ["day", fid]].values.tolist() == [[5, 65], [2, 18], [5, 25], [5, 5]]
    assert rows.loc["VQGAN f4, reconstruction", [fid, "codebook usage"]].tolist() == [8, 0.25]
    assert np.isnan(rows.loc["VQGAN f4, reconstruction", "training_seconds"]), "its work is in another table"
    assert table.view.loc["FID (EfficientNet-Lite0), photograph's L", "VQGAN f4, reconstruction"] == "6.0 [4.0, 8.0]"
    assert "must not be compared" not in table.markdown()
    assert not variants_table("Table III", selection).frame["status"].eq("run").any(), "Table III is about f4"
    work = training_table(selection).frame.set_index("entry")
    assert work.loc["BBDM, VQGAN f4, phase 2", ["step", "epochs"]].tolist() == [40, 8]
    assert work.loc["BBDM, VQGAN f4, phase 1", "status"] == "not run"
    assert "BBDM, f8, given first stage, phase 1: default" in work.index
    assert "BBDM, pixel space, phase 1" not in work.index


def test_at_64_bbdm_works_on_pixels(folders):
    """In laptop and gpu the compared BBDM works on pixels, and BBDM in latents is the extra model."""
    for latent, stage, fid in (("f4", "own:1a2b3c", 20.0), ("none", "", 70.0)):
        options = dict(preset="laptop", latent=latent, first_stage=stage)
        run("phase1", "bbdm", "default", [dict(day=1, **scores(fid))], **options)
        run("phase2", "bbdm", "l2", [dict(day=d, **scores(fid - d)) for d in range(1, 6)], **options)
    row = {"day": 1, "step": 40, "training_seconds": 12.0, "codebook usage": 0.25} | scores(8.0)
    run("component", "vqgan_f4", None, [row], of="phase2", budget="40 steps", preset="laptop")
    selection, fid = select_runs("laptop", "embedded", 0), column_name("FID", LABEL)
    table = phase2_table(selection)
    entries = table.frame.set_index("entry")
    assert entries.loc[["BBDM", "BBDM, f4", "VQGAN f4, reconstruction"], fid].tolist() == [65, 15, 8]
    assert any("works on pixels" in n for n in table.notes)
    assert variants_table("Table III", selection).frame.set_index("entry").loc["default", fid] == 70
    work = training_table(selection).frame["entry"].tolist()
    assert "BBDM, VQGAN f4, phase 2" in work and "BBDM, VQGAN f4, phase 1" not in work


def test_table4_adds_up_stages(folders):
    time_bbdm(4.0)
    table = times_table(select_runs("smoke", "embedded", 0))
    row = table.frame.set_index("entry").loc["BBDM"]
    columns = ["batch_size", "seconds_per_image", "cpu_seconds_per_image", "gflop_per_image", "peak_share"]
    assert row[columns].tolist() == [8, 0.5, 4.0, 29.0, 0.5], "float32 at batch 8: (1 + 10 x 0.2 + 1)/8 s"
    assert row["projected_seconds"] == 2500 and table.view.loc["here, h:mm:ss", "BBDM"] == "0:41:40"
    assert any("added up (eta=1, sample_steps=10)" in n for n in table.notes)
    step = dict(stage="U-Net step", times=10, images=16, batch_size=8, seconds_per_image=0.1, side=8)
    step |= dict(device="a test's abacus", sampling="eta=1, sample_steps=10")
    run("inference", "bbdm", None, [step], latent="none")
    pixels = times_table(select_runs("smoke", "embedded", 0)).view["BBDM, pixel space"]
    assert pixels.iloc[0] == "n/a", "the paper timed no such model"
    assert model_seconds(select_runs("smoke", "embedded", 0))["BBDM"][0] == 0.5


def test_palette_is_timed_with_all_of_its_network_calls(folders):
    """A model that the paper did not time, in stages: 1 + 10 + 1 calls make an answer."""
    row = dict(images=16, side=8, batch_size=8, device="a test's abacus", sampling="sample_steps=10")
    row |= dict(precision="float32", peak_share=0.5, cpu_seconds_per_image=0.03)
    stages = (("noise", 1, 0.0, 0.001), ("U-Net step", 10, 3.6, 0.0324), ("color", 1, 0.0, 0.002))
    rows = [
        dict(row, stage=stage, times=times, gflop_per_image=gflop, seconds_per_image=seconds)
        for stage, times, gflop, seconds in stages
    ]
    run("inference", "palette", None, rows)
    selection = select_runs("smoke", "embedded", 0)
    assert model_seconds(selection)["Palette"][0] == pytest.approx(0.327)
    tables = {"table4": times_table, "table_phase2": phase2_table, "table_training": training_table}
    answers = answers_of({name: make(selection).frame for name, make in tables.items()})
    assert answers.seconds["Palette"] == pytest.approx(0.327)
    assert sizes_table(selection, dict(palette=1000)).view.loc["GFLOP an image", "Palette"] == "36"


def test_steps_curve(folders):
    baselines()
    options = dict(latent="f4", first_stage="own:1a2b3c", weights="phase2-bbdm-l2", day=5, eta=1.0)
    made = run("steps", "bbdm", None, [], images=48, budget="300 steps", **options)
    status = steps_table(select_runs("smoke", "embedded", 0)).frame["status"]
    assert status.tolist() == ["not run"], "without rows there is no curve"
    for steps, fid, lightness in (
        (10, 60.0, "model"),
        (10, 55.0, "photograph"),
        (4, 90.0, "model"),
        (4, 80.0, "photograph"),
        (np.nan, 104.0, "photograph"),
    ):
        made.add_metrics(dict(sample_steps=steps, lightness=lightness, seconds_per_image=steps / 100, **scores(fid)))
    selection = select_runs("smoke", "embedded", 0, dict(steps="300 steps"))
    table = steps_table(selection)
    assert table.view.loc[column_name("FID", LABEL)].tolist() == [
        "60.0 [58.0, 62.0]",
        "90.0 [88.0, 92.0]",
        "104.0 [102.0, 106.0]",
    ]
    assert table.view.columns.tolist() == ["BBDM, 10 steps", "BBDM, 4 steps", "gray image"]
    assert "phase2-bbdm-l2, day 5" in table.markdown()
    curve, gray = figure_steps(selection).axes[0].lines
    assert curve.get_xydata().tolist() == [[4, 90], [10, 60]] and set(gray.get_ydata()) == {104}
    status = steps_table(select_runs("smoke", "embedded", 0, dict(steps="1 steps"))).frame["status"]
    assert status.tolist() == ["not run"], "of another budget"


def test_skipped_runs_are_listed(folders):
    baselines()
    fid = column_name("FID", LABEL)
    others = (
        (1.0, dict(data=DATA | dict(fingerprint="0ddba11"), time="2030-01-01")),
        (2.0, dict(seed=1)),
        (3.0, dict(data=DATA | dict(name="else"))),
    )
    for value, options in (
        (70.0, dict(time="2031-05-04", budget="a")),
        (80.0, dict(time="2031-05-06", budget="b")),
        (90.0, dict(time="2031-05-05", budget="c")),
        *others,
    ):
        run("phase1", "pix2pix", "default", [dict(day=1, **scores(value))], **options)
    run("phase1", "pix2pix", "batch32", [])
    table = variants_table("Table I", select_runs("smoke", "embedded", 0))
    assert table.frame[fid].dropna().tolist() == [80, 104]
    left = [n for n in table.notes if n.startswith("Left out")]
    assert len(left) == 4
    counts = [sum(reason in n for n in left) for reason in ("fingerprint 0ddba1", "is newer", "not evaluated yet")]
    assert counts == [1, 2, 1]


def test_a_variant_without_a_fid_never_wins(folders):
    for variant, fid in (("default", 80.0), ("batch32", 70.0), ("beta1-0.7", np.nan)):
        for seed in (0, 1):
            run("phase1", "pix2pix", variant, [dict(day=1, **scores(fid + seed))], seed=seed, budget="60 steps")
    for seeds in (1, 2):
        winner = winner_of(select_runs("smoke", "embedded", 0, seeds=seeds), "pix2pix")
        assert winner.variant == "batch32" and list(winner.compared)[-1] == "beta1-0.7"
        assert winner.compared["beta1-0.7"] is None
    for made in read_runs(phase="phase1", variant="batch32") + read_runs(phase="phase1", variant="default"):
        shutil.rmtree(made.path)
    run("phase1", "pix2pix", "default", [dict(day=1, **scores(np.nan))], budget="60 steps")
    assert winner_of(select_runs("smoke", "embedded", 0), "pix2pix") is None


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize(
    "a,b,decided",
    [
        ((10, 9, 11), (20, 19, 21), True),
        ((10, 5, 15), (14, 12, 16), False),
        ((10, np.nan, np.nan), (20, 19, 21), False),
        ((10, 9, 12), (14, 12, 16), False),
        ((10, 9, 11), (20, np.nan, np.nan), False),
    ],
)
def test_verdict(a, b, decided, lower):
    if not lower:
        a, b = ((-value, -high, -low) for value, low, high in (a, b))
    for scores in itertools.permutations({"A": a, "B": b}.items()):
        found = verdict("FID", dict(scores), lower)
        assert (found.leader, found.decided) == ("A", decided)
        assert ("not decided" in found.sentence) == (not decided) and ("A is best" in found.sentence) == decided


def test_verdict_needs_two():
    assert verdict("FID", {}).sentence == "By FID: not decided, no model was judged."
    alone = verdict("FID", {"A": (1.0, 0.5, 1.5)}, unjudged={"Not run": ["B", "C"]})
    assert not alone.decided and "only A was judged: 1 [0.5, 1.5]. Not run: B, C." in alone.sentence


def test_conclusion():
    def best(model, decided=True, rival="other"):
        return verdict("x", {model: (1, 0.9, 1.1), rival: (2, 1.9, 2.1) if decided else (1.1, 1, 1.2)})

    slow = best("A", rival="B")
    assert "supported by all 3" in judge_hypothesis([best("B")] * 2, slow, ["B"])
    found = judge_hypothesis([best("B"), best("A", rival="B")], slow, ["B"])
    assert "contradicted by 1 of 3 measures: x (A leads)" in found
    fastest = judge_hypothesis([best("B")], best("B"), ["B"])
    assert "contradicted" in fastest, "a diffusion model that is fastest contradicts 'except speed'"
    assert "not decided: no answer by x" in judge_hypothesis([best("B"), best("B", False)], slow, ["B"])
    assert "not decided: no answer by x" in judge_hypothesis([best("B"), best("A")], slow, ["B"]), "B has no value"
    assert "B was not run" in judge_hypothesis([best("A")], best("A"), ["B"], ["B"])
    assert "C was not run" in judge_hypothesis([best("B")], slow, ["B"], ["C"])


# Several seeds: means and spreads, and what must not be averaged.

FID = column_name("FID", LABEL)


def seeded(phase, model, variant, fids, days=1, seeds=(0, 1, 2), width=2.0, **options):
    """The same setting with several seeds, each with its own FID, which falls by 1 per day."""
    options = dict(budget="60 steps" if phase == "phase1" else "300 steps", train=dict(batch_size=4)) | options
    made = []
    for seed, fid in zip(seeds, fids):
        rows = []
        for day in range(1, days + 1):
            work = dict(day=day, step=60 * day, training_seconds=(9.5 + seed) * day, sampling="default")
            rows.append(dict(work, lightness="photograph", **scores(fid - day + 1, width)))
        made.append(run(phase, model, variant, rows, DATA | dict(train=120), seed=seed, **options))
    return made


def test_seeds_give_mean_and_spread(folders):
    baselines()
    seeded("phase1", "pix2pix", "default", [80.0], seeds=[0])
    seeded("phase1", "pix2pix", "batch32", [70.0], seeds=[0])
    alone = variants_table("Table I", select_runs("smoke", "embedded", 0)).csv()
    seeded("phase1", "pix2pix", "default", [84.0, 85.0], seeds=[1, 2])
    seeded("phase1", "pix2pix", "batch32", [99.0], seeds=[1])
    again = variants_table("Table I", select_runs("smoke", "embedded", 0)).csv()
    assert again == alone, "a table of one seed does not depend on the others"
    selection = select_runs("smoke", "embedded", 0, seeds=3)
    table = variants_table("Table I", selection)
    assert table.view.loc[FID].tolist() == [
        "83.0 ± 2.6 (3 seeds)",
        "84.5 ± 20.5 (2 seeds)",
        "not run",
        "not run",
        "104.0 [102.0, 106.0]",
        "n/a",
    ]
    assert table.view.loc["training, s", ["default", "batch32"]].tolist() == ["10.5 [9.5, 11.5]", "10.0 [9.5, 10.5]"]
    rows = pd.read_csv(save(table, folders), comment="#").set_index("entry")
    wanted = ttest_1samp([80, 84, 85], 0).confidence_interval()
    summary = rows.loc["default", [FID, f"{FID} sd", f"{FID} low", f"{FID} high", "seeds"]]
    assert np.allclose(summary.astype(float), [83, 7**0.5, *wanted, 3])
    assert rows.loc[[f"default, seed {s}" for s in range(3)], FID].tolist() == [80, 84, 85]
    assert rows.loc["default, seed 1", f"{FID} low"] == 82
    assert (rows["status"] == "run").sum() == 2 and (rows["status"] == "seed").sum() == 5
    winners = [winner_of(s, "pix2pix").variant for s in (select_runs("smoke", "embedded", 0), selection)]
    assert winners == ["batch32", "default"]
    text = table.markdown()
    for sentence in (
        "95 % t-interval of the mean over the seeds",
        "Fewer seeds than others: Pix2Pix, batch32 (seeds 0, 1).",
        "seeds 0, 1, 2; commit",
        "Our winner: default, by FID (EfficientNet-Lite0), mean over the seeds (default: 0, 1, 2; batch32: 0, 1); Welch",
    ):
        assert sentence in text, sentence
    assert "One training run each" not in text and "One training run each (seed 0)" in alone


def save(table, folder):
    (folder / "table.csv").write_text(table.csv())
    return folder / "table.csv"


def test_the_spread_over_seeds_decides(folders):
    """Seed 0 alone would be sure of itself, by its intervals over images; so would three seeds that agree."""
    baselines()
    seeded("phase2", "pix2pix", "default", [60.0, 90.0, 61.0], days=5)
    seeded("phase2", "coltran", "adam", [95.0, 96.0, 97.0], days=5)

    def sentence(seeds):
        found = hypothesis_sentences(select_runs("smoke", "embedded", 0, seeds=seeds))
        return next(s for s in found if s.startswith(f"By {FID}"))

    assert "Pix2Pix leads on these photographs: 56.0 [54.0, 58.0]" in sentence(1)
    assert "Pix2Pix leads with 66.3" in sentence(3) and "not told apart from ColTran (p = 0.12)" in sentence(3)
    seeded("phase2", "bbdm", "l2", [10.0, 11.0, 12.0], days=5, width=500.0, latent="f4", first_stage="own:1a2b3c")
    assert "BBDM is best: 7.0 [4.5, 9.5]" in sentence(3), "wide intervals over images do not count"
    assert "told apart from ColTran (p < 0.001) and Pix2Pix (p = 0.026)" in sentence(3), "Holm's correction"
    sentences = hypothesis_sentences(select_runs("smoke", "embedded", 0, seeds=3))
    beaten = f"By {FID}, the gray image has 104.0 [102.0, 106.0]. Better: ColTran 92.0 [89.5, 94.5] and BBDM 7.0"
    assert any(s.startswith(beaten) for s in sentences)
    assert sentences[-1].endswith("over its photographs; of times the range over repetitions.")
    table = phase2_table(select_runs("smoke", "embedded", 0, seeds=3))
    assert table.view.loc[FID, ["Pix2Pix", "BBDM", "gray image"]].tolist() == [
        "66.3 ± 17.0 (3 seeds)",
        "7.0 ± 1.0 (3 seeds)",
        "104.0 [102.0, 106.0]",
    ]
    seeded("phase1", "pix2pix", "default", [80.0], seeds=[0])
    table = variants_table("Table I", select_runs("smoke", "embedded", 0, seeds=3))
    assert table.view.loc[FID, "default"] == "80.0 [78.0, 82.0]", "one seed keeps its intervals over images"
    assert "; seed 0; " in table.footer


def page_answers(seeds):
    """What README's answer reads, of the invented runs."""
    selection = select_runs("smoke", "embedded", 0, seeds=seeds)
    makers = dict(table_phase2=phase2_table, table_training=training_table, table4=times_table)
    return answers_of({name: make(selection).frame for name, make in makers.items()})


def test_one_model_with_one_seed_blocks_no_decision(folders):
    seeded("phase2", "pix2pix", "default", [80.0, 80.5, 81.0], days=5)
    seeded("phase2", "coltran", "adam", [90.0, 90.5, 91.0], days=5)
    seeded("phase2", "bbdm", "l2", [20.0, 20.5, 21.0], days=5, latent="f4", first_stage="own:1a2b3c")
    seeded("phase2", "cgan", "default", [150.0], days=5, seeds=[0])
    quality = hypothesis_sentences(select_runs("smoke", "embedded", 0, seeds=3))
    assert f"By {FID}, BBDM is best: 16.5" in quality[1]
    assert "One seed only, not judged: Conditional GAN 146.0." in quality[1]
    claim, detail, _ = answer_sentences(page_answers(3))
    assert claim.startswith("Of the models with several seeds, BBDM has the lowest FID")
    assert "146" not in claim and "BBDM is told apart from ColTran (p < 0.001) and Pix2Pix (p < 0.001)." in detail
    assert "One seed only, not judged: Conditional GAN 146.0." in detail
    seeded("phase2", "palette", "default", [10.0], days=5, seeds=[0])
    best = "One seed only, not judged: Conditional GAN 146.0, Palette 6.0 (better than all that were judged)."
    assert best in hypothesis_sentences(select_runs("smoke", "embedded", 0, seeds=3))[1]
    assert best in answer_sentences(page_answers(3))[1]


def test_any_diffusion_model_may_be_best(folders):
    seeded("phase2", "pix2pix", "default", [80.0], seeds=[0])
    seeded("phase2", "coltran", "adam", [85.0], seeds=[0])
    seeded("phase2", "bbdm", "l2", [60.0], seeds=[0], latent="f4", first_stage="own:1a2b3c")
    seeded("phase2", "palette", "default", [40.0], seeds=[0])
    conclusion = hypothesis_sentences(select_runs("smoke", "embedded", 0))[0]
    assert "contradicted" not in conclusion and f"Diffusion models that lead: Palette by {FID} and KID" in conclusion
    assert {name for name, a in ARCHITECTURES.items() if a.diffusion} == {"bbdm", "palette", "palette-modern"}


def test_a_model_without_a_value_was_run(folders):
    seeded("phase2", "pix2pix", "default", [60.0], seeds=[0])
    seeded("phase2", "coltran", "adam", [90.0], seeds=[0])
    without = dict(day=1, **scores(50.0, only=[m for m in METRICS if m != "FID"]))
    run("phase2", "bbdm", "l2", [without], budget="300 steps", latent="f4", first_stage="own:1a2b3c")
    conclusion, by_fid, *_ = hypothesis_sentences(select_runs("smoke", "embedded", 0))
    assert "No value: BBDM." in by_fid and "Not run" not in by_fid
    assert "contradicted" not in conclusion and f"no answer by {FID}" in conclusion
    assert conclusion.endswith("This is one training run each; other seeds may differ.")


def test_judges_that_disagree_are_named(folders):
    """In the verdict second, and in the answer of README and report; FID and KID of one network may disagree, too."""
    fid2, agreement = "FID (EfficientNet-Lite2)", "agreement (EfficientNet-Lite2)"
    pix2pix = {fid2: 95.0, agreement: 0.3, f"KID ({LABEL})": 6e-3}
    coltran = {fid2: 60.0, agreement: 0.5, f"KID ({LABEL})": 4e-3}
    places = (("pix2pix", "default", 60.0, pix2pix), ("coltran", "adam", 70.0, coltran))
    for (model, variant, fid, judged), seed in itertools.product(places, (0, 1)):
        last = scores(fid + seed) | judged
        options = dict(budget="300 steps", train=dict(batch_size=4), seed=seed)
        run("phase2", model, variant, [dict(day=1, lightness="photograph", **last)], **options)
    wanted = f"The judges disagree: by {FID} Pix2Pix leads; by KID ({LABEL}), {fid2} and {agreement} ColTran leads."
    for seeds in (1, 2):
        assert hypothesis_sentences(select_runs("smoke", "embedded", 0, seeds=seeds))[1] == wanted
        assert wanted in answer_sentences(page_answers(seeds))[1]


def test_models_worse_than_gray_and_worsening(folders):
    baselines()
    for model, variant, fid in (("pix2pix", "default", 120.0), ("coltran", "adam", 140.0)):
        rows = [dict(day=d, lightness="photograph", **scores(fid + 5 * d)) for d in (1, 2, 3)]
        run("phase2", model, variant, rows, budget="300 steps", train=dict(batch_size=4))
    sentences = hypothesis_sentences(select_runs("smoke", "embedded", 0))
    earlier = "Pix2Pix on day 1 (125.0) and ColTran on day 1 (145.0)"
    assert f"By {FID}, the last day was not the best: {earlier}." in sentences
    worse = f"By {FID}, the gray image has 104.0 [102.0, 106.0]. Worse: Pix2Pix 135.0 [133.0, 137.0] and ColTran"
    assert any(s.startswith(worse) for s in sentences)
    assert "The gray image has 104.0, lower than every model." in answer_sentences(page_answers(1))[1]


def test_figure7_shows_the_seeds(folders):
    seeded("phase2", "pix2pix", "default", [60.0, 90.0], days=5, seeds=[0, 1])
    seeded("phase2", "pix2pix", "default", [63.0], days=2, seeds=[2])
    seeded("phase2", "coltran", "adam", [95.0], days=5)
    selection = select_runs("smoke", "embedded", 0, seeds=3)
    figure = figure7(selection)
    pix2pix, coltran = figure.axes[0].lines[:2]
    assert pix2pix.get_ydata().tolist() == [71, 70, 73, 72, 71] and coltran.get_ydata().tolist() == [95, 94, 93, 92, 91]
    band = np.concatenate([p.vertices[:, 1] for c in figure.axes[0].collections for p in c.get_paths()])
    assert np.isclose(band.max(), 73 + 450**0.5) and np.isclose(band.min(), 71 - 450**0.5), "one seed has no band"
    notes = figure._supxlabel.get_text().replace("\n", " ")
    assert "Bands: plus and minus the standard deviation over the seeds" in notes
    assert "Fewer seeds than others: ColTran (seed 0)" in notes and "seed 2 has reached day 2" in notes
    assert phase2_table(selection).frame.set_index("entry").loc["Pix2Pix", "day"] == 2
    picture = paper_figure("Figure 8", selection)._supxlabel.get_text().replace("\n", " ")
    assert "Pictures and their FIDs are of one training run each, not of all seeds (seed 0)" in picture


def test_each_seed_has_its_own_components(folders):
    for seed in (0, 1):
        component = component_run("coltran_color", "phase2", 60 + 20 * seed, 30.0 + seed, seed=seed, budget="60 steps")
        sampling = f"norm=row, upsamplers=own:{component.path.name[-6:]}"
        row = dict(day=1, sampling=sampling, **scores(80.0 + 2 * seed))
        rows = [dict(row, lightness=mode) for mode in ("model", "photograph")]
        rows += [dict(r, sampling=sampling.replace("row", "image")) for r in rows]
        components = dict(coltran_color=component.path.name[-6:])
        run("phase2", "coltran", "default", rows, seed=seed, sampling=sampling, components=components)
    selection = select_runs("smoke", "embedded", 0, seeds=2)
    assert not selection.skipped
    table = phase2_table(selection)
    assert table.view.loc[FID, ["ColTran", "ColTran, sampling norm=image"]].tolist() == ["81.0 ± 1.4 (2 seeds)"] * 2
    assert "Sampling: norm=row, upsamplers=own." in table.notes
    work = training_table(selection)
    assert work.view.loc["ColTran, color upsampler, phase 2", ["seeds", "steps", "time, h:mm:ss"]].tolist() == [
        "2",
        "70 [60, 80]",
        "0:00:30 [0:00:30, 0:00:31]",
    ]


PAGES = [
    partial(variants_table, "Table I"),
    phase2_table,
    training_table,
    times_table,
    steps_table,
    figure7,
    hypothesis_sentences,
    partial(paper_figure, "Figure 8"),
]


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(preset="laptop"), "preset laptop"),
        (dict(fingerprint="0ddba11"), "fingerprint 0ddba11"),
        (dict(side=16), "side 16"),
    ],
)
def test_pages_refuse_mixed_runs(folders, other, message):
    (ours,) = seeded("phase2", "pix2pix", "default", [80.0], seeds=[0])
    (theirs,) = seeded("phase2", "coltran", "adam", [80.0], seeds=[0])
    runs = {("phase2", "pix2pix", None): ours, ("phase2", "coltran", None): theirs}
    phase2_table(RunSelection("smoke", "embedded", 0, dict(runs)))
    if "preset" in other:
        theirs.options |= other
    else:
        theirs.options |= dict(data=theirs.options["data"] | other)
    for page in PAGES:
        with pytest.raises(ValueError) as error:
            page(RunSelection("smoke", "embedded", 0, dict(runs)))
        assert all(s in str(error.value) for s in (message, ours.path.name, theirs.path.name)), str(error.value)


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(train=dict(batch_size=8)), "train.batch_size is 4 and 8"),
        (dict(train=dict(batch_size=4, lr=1)), "train.lr is None and 1"),
        (dict(budget="99 steps"), "budget is 300 steps and 99 steps"),
    ],
)
def test_seeds_of_other_options_are_not_averaged(folders, other, message):
    (first,) = seeded("phase2", "pix2pix", "default", [80.0], seeds=[0])
    (second,) = seeded("phase2", "pix2pix", "default", [80.0], seeds=[1], **other)
    for seed in (0, 1):
        phase2_table(select_runs("smoke", "embedded", seed))
    for page in (phase2_table, training_table, figure7, hypothesis_sentences):
        with pytest.raises(ValueError) as error:
            page(select_runs("smoke", "embedded", 0, seeds=2))
        assert all(s in str(error.value) for s in (message, first.path.name, second.path.name)), str(error.value)


def test_seeds_of_other_variants_or_samplings_are_not_averaged(folders):
    run("phase1", "pix2pix", "default", [dict(day=1, sampling="batch_norm=image", **scores(80.0))])
    run("phase1", "pix2pix", "default", [dict(day=1, sampling="batch_norm=running", **scores(80.0))], seed=1)
    with pytest.raises(ValueError, match="different sampling"):
        variants_table("Table I", select_runs("smoke", "embedded", 0, seeds=2))
    for seed, variant in enumerate(("default", "batch32")):
        seeded("phase2", "pix2pix", variant, [80.0], seeds=[seed])
    with pytest.raises(ValueError, match="variant is default and batch32"):
        phase2_table(select_runs("smoke", "embedded", 0, seeds=2))


JUDGED = {"agreement (EfficientNet-Lite2)": 0.5, "FID (EfficientNet-Lite2)": 60.0}  # measured after the last day alone


def judged_runs(model, variant, days, seeds=(0,)):
    """A model of phase 2 whose last day has the scores of a judge."""
    for seed in seeds:
        rows = [dict(day=day, lightness="photograph", **scores(80.0 - day)) for day in range(1, days + 1)]
        rows[-1] |= JUDGED
        run("phase2", model, variant, rows, seed=seed, budget="300 steps", train=dict(batch_size=4))


def test_judges_show_each_model_on_its_last_judged_day(folders):
    baselines()
    judged_runs("pix2pix", "default", 5)
    judged_runs("cgan", "default", 3)
    table = judges_table(select_runs("smoke", "embedded", 0))
    line = table.view.loc["agreement (EfficientNet-Lite2)"]
    assert line[["Pix2Pix", "Conditional GAN", "ColTran"]].tolist() == ["50.0%", "50.0%", "not run"]
    assert table.view.loc["day", ["Pix2Pix", "Conditional GAN"]].tolist() == ["5", "3"]
    assert "The days differ, and with them the budgets: Pix2Pix 5, Conditional GAN 3." in table.markdown()
    assert "after day" not in table.title
    assert phase2_table(select_runs("smoke", "embedded", 0)).view.loc["day", "Pix2Pix"] == "3"


def test_judges_explain_the_spread_over_seeds(folders):
    baselines()
    judged_runs("pix2pix", "default", 2, seeds=(0, 1))
    table = judges_table(select_runs("smoke", "embedded", 0, seeds=2))
    assert table.view.loc["FID (EfficientNet-Lite2)", "Pix2Pix"] == "60.0 ± 0.0 (2 seeds)"
    assert any("the standard deviation over the seeds" in note for note in table.notes)
    assert any("1280 (EfficientNet-Lite2) dimensions" in note for note in table.notes)
    assert table.title.endswith("after day 2")


@pytest.mark.parametrize("photographs, shown", [(10.0, "-2.5"), (5.0, "+2.5"), (np.nan, "n/a")])
def test_colorfulness_minus_that_of_the_photographs_has_a_sign(folders, photographs, shown):
    """Runs from before the photographs' own colorfulness was measured have no difference."""
    row = dict(day=1, **scores(7.0, only=("unpaired FID", "IS"))) | dict(colorfulness=photographs)
    run("phase2", "baseline", "real", [row])
    judged_runs("pix2pix", "default", 1)
    selection = select_runs("smoke", "embedded", 0)
    assert judges_table(selection).view.loc[SIGNED, ["Pix2Pix", "ColTran"]].tolist() == [shown, "not run"]
    known = "n/a" if np.isnan(photographs) else f"{photographs:.1f}"
    assert phase2_table(selection).view.loc["colorfulness", "real photographs"] == known


def test_the_phases_train_every_seed(folders, monkeypatch):
    """Both notebooks, with two days in place of five and a feature network that costs nothing."""
    monkeypatch.setattr(faic.phases, "efficientnet_lite0", lambda device: QuarterColors())
    monkeypatch.setattr(faic.phases, "find_judges", lambda device: ())
    monkeypatch.setattr(faic.phases, "DAYS", 2)
    monkeypatch.setitem(faic.components.PHASE_DAYS, "phase2", 2)
    parameters = dict(seed=3, seeds=2, budget="1 steps", device="cpu")
    in_this_process("phase1", variants="default,lr-5e-4", **parameters)
    runs = read_runs(phase="phase1", model="pix2pix")
    names = itertools.product(("default", "lr-5e-4"), (3, 4))
    assert sorted((r.options["variant"], r.options["seed"]) for r in runs) == list(names)
    fids = {variant: [] for variant in ("default", "lr-5e-4")}
    for r in runs:
        fids[r.options["variant"]].append(r.metrics()["FID (quarters)"].item())
    best = min(fids, key=lambda variant: np.mean(fids[variant]))
    (winning,) = (r for r in runs if (r.path / "winner.json").exists())
    winner = read_json(winning.path / "winner.json")
    assert (winning.options["variant"], winning.options["seed"]) == (best, 3)
    assert (winner["variant"], winner["seeds"][best]) == (best, [3, 4])
    assert np.isclose(winner["value"], np.mean(fids[best]))
    (winning.path / "winner.json").write_text("half of a fi")
    in_this_process("phase2", **parameters)
    runs = read_runs(phase="phase2", model="pix2pix")
    days = sorted((r.options["variant"], r.options["seed"], len(r.metrics())) for r in runs)
    assert days == [(best, 3, 2), (best, 4, 2)]
    selection = select_runs("smoke", "embedded", 3, dict(phase1="1 steps", phase2="2 steps"), seeds=2)
    for table, entry in ((variants_table("Table I", selection), best), (phase2_table(selection), "Pix2Pix")):
        fid = table.view.loc["FID (quarters)", entry]
        assert "± " in fid and "(2 seeds)" in fid
        assert {f"{entry}, seed 3", f"{entry}, seed 4"} < set(table.frame["entry"])
