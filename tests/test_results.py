"""results.ipynb on invented runs in temporary folders: what it writes, and that what was not run says so."""

import itertools
import json

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from scipy.stats import ttest_1samp

import faic.components
import faic.phases
from faic.core import pick_device, read_json, repo_root, write_json
from faic.drawing import save_figure
from faic.figures import figure7, figure11, figure_steps, paper_figure
from faic.first_stages import VQGANS
from faic.metrics import METRICS, column_name
from faic.paper import PAPER_TABLES
from faic.presets import ARCHITECTURES
from faic.runs import open_run, read_runs, sample_file
from faic.score_tables import phase2_table, training_table, variants_table
from faic.selection import RunSelection, model_components, select_runs, winner_of
from faic.time_tables import steps_table, times_table
from faic.verdict import hypothesis_sentences, judge_hypothesis, model_seconds, verdict

LABEL = "EfficientNet-Lite0"
CAUTION = "Invented for a test."
DATA = dict(name="embedded", fingerprint="f00dfacade", side=8)
TABLES = ("table1", "table2", "table3", "table4", "table_phase2", "table_sizes", "table_steps", "table_training")
FILES = [f"{t}.{e}" for t in TABLES for e in ("csv", "md")]
FILES += [f"figure{n}.{e}" for n in (*range(1, 12), "_steps") for e in ("png", "pdf")] + ["hypothesis.md"]


def scores(fid, width=2.0, only=METRICS):
    value = {
        name: fid if name == "FID" else fid + 90 if "FID" in name else fid / 1e4 if name == "KID" else 7.5
        for name in METRICS
    }
    half = {name: width * (1e-4 if name == "KID" else 1) for name in METRICS}
    ends = {"": 0, "low": -1, "high": 1}
    return {"n": 48, "dimension": 1280} | {
        column_name(m, LABEL, e): value[m] + s * half[m] if m in only else np.nan
        for m in METRICS
        for e, s in ends.items()
    }


def run(
    phase, model, variant, rows, data=DATA, time="2031-05-05T12:00:00", seed=0, sampling="", components={}, **options
):
    """A run folder as the study writes it: options, rows of metrics, noise as samples."""
    options = (
        dict(phase=phase, model=model, preset="smoke", seed=seed, data=data)
        | options
        | ({"variant": variant} if variant else {})
    )
    made = open_run(options, pick_device("cpu"))
    write_json(
        made.path / "options.json",
        made.options
        | dict(
            made=dict(
                time=time,
                commit="c0ffee1234",
                device="a test's abacus",
                caution=CAUTION,
                credits="Photographs: noise.",
                sampling=sampling,
                components=components,
            )
        ),
    )
    (made.path / "samples").mkdir(exist_ok=True)
    for row in rows:
        made.add_metrics(row)
        if "day" in row:
            np.save(
                sample_file(made, row["day"], row.get("sampling", "")),
                np.random.default_rng(row["day"]).integers(0, 256, (8, 8, 8, 3), np.uint8),
            )
    return made


def baselines():
    for phase in ("phase1", "phase2"):
        run(phase, "baseline", "gray", [dict(day=1, lightness="photograph", **scores(104.0))])
        run(phase, "baseline", "real", [dict(day=1, **scores(7.0, only=("unpaired FID", "IS")))])


def model_runs(model, fid, lightness=("photograph",), seconds=0.05):
    """Both phases and the inference time of a model whose four variants and five days score around `fid`."""
    variants = next(t["FID"] for t in PAPER_TABLES.values() if t.get("model") == model)
    work = lambda day: dict(day=day, step=60 * day, training_seconds=9.5 * day, sampling="default")
    data = DATA | dict(train=120, validation=48, test=48)
    made = [
        run(
            "phase1",
            model,
            v,
            [dict(work(1), lightness=l, **scores(fid + i)) for l in lightness],
            data,
            budget="60 steps",
            train=dict(batch_size=4),
        )
        for i, v in enumerate(variants)
    ]
    made[1].log(event="discriminator won", step=55, began=31)
    days = [dict(work(d), lightness=l, **scores(fid - d)) for d in range(1, 6) for l in lightness]
    run("phase2", model, list(variants)[0], days, data, budget="300 steps", train=dict(batch_size=4))
    stages = [s for m, s in PAPER_TABLES["Table IV"]["hours"] if m == model]
    if model == "bbdm":
        return made  # see time_bbdm
    timing = dict(
        images=16, side=8, gflop_per_image=0.4, peak_share=0.1, cpu_seconds_per_image=seconds, device="a test's abacus"
    )
    run(
        "inference",
        model,
        None,
        [dict(timing, stage=s, times=1, batch_size=b, seconds_per_image=seconds / b) for s in stages for b in (1, 8)],
    )
    return made


def time_bbdm(seconds, **options):
    """BBDM's inference times: an image takes one encode and decode of 1/4 of the seconds each and 10 steps that make up the rest."""
    timing = dict(images=16, side=8, device="a test's abacus", sampling="eta=1, sample_steps=10", precision="float32")
    stages = dict(encode=(1, 0.25, 3.0), decode=(1, 0.25, 6.0)) | {"U-Net step": (10, 0.05, 2.0)}
    rows = [
        dict(
            timing,
            stage=s,
            times=n,
            batch_size=b,
            seconds_per_image=share * seconds / b,
            cpu_seconds_per_image=share * seconds,
            gflop_per_image=g,
            peak_share=0.5,
        )
        for b in (1, 8)
        for s, (n, share, g) in stages.items()
    ]
    half = [dict(r, precision="bfloat16", seconds_per_image=r["seconds_per_image"] / 100) for r in rows]
    return run("inference", "bbdm", None, rows + half, latent="f4", first_stage="own:1a2b3c", **options)


def bbdm_run(phase, variant, fid, days=(1,), **options):
    rows = [
        dict(day=d, step=60 * d, training_seconds=1.0 * d, sampling="default", lightness=l, **scores(fid - d))
        for d in days
        for l in ("model", "photograph")
    ]
    return run(
        phase,
        "bbdm",
        variant,
        rows,
        budget="300 steps" if phase == "phase2" else "60 steps",
        train=dict(batch_size=4),
        **options,
    )


def part_run(component, phase, steps, seconds, **options):
    """A part as the study leaves it: its work and its loss, no scores."""
    row = dict(day=1, step=steps, training_seconds=seconds, split="validation", n=48, bits=5.0)
    return run(
        "component", component, None, [row], DATA | dict(train=120), of=phase, train=dict(batch_size=24), **options
    )


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FAIC_FIGURES", str(tmp_path / "figures"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def execute(folder, **parameters):
    parameters = dict(budget="60 steps") | parameters
    papermill.execute_notebook(
        repo_root() / "nbs" / "results.ipynb",
        folder / "out.ipynb",
        parameters,
        kernel_name="python3",
        progress_bar=False,
    )
    return {f.name: f for f in (folder / "figures" / "smoke").iterdir()}


def test_nothing_was_run(folders):
    files = execute(folders)
    assert sorted(files) == sorted(FILES)
    for name in TABLES:
        text = files[f"{name}.md"].read_text()
        assert "not run" in text and "no runs" in text and "preset smoke" in text and "commit of this checkout" in text
    assert set(pd.read_csv(files["table1.csv"], comment="#")["status"]) == {"not run"}
    sentences = [l for l in files["hypothesis.md"].read_text().splitlines() if l.startswith("- ")]
    assert sentences and all("not decided" in s or "not run" in s for s in sentences)
    assert min(files[f].stat().st_size for f in FILES) > 100


def test_pix2pix_alone(folders):
    baselines()
    model_runs("pix2pix", 80.0)
    files = execute(folders, preset="smoke", data="embedded", seed="0")
    assert sorted(files) == sorted(FILES)
    text = files["table1.md"].read_text()
    for said in (
        "80.0 [78.0, 82.0]",
        "| FID, the paper | 16.33 | 27.53 | 17.87 | 18.30 |",
        "winner, undecided",
        "inside the intervals",
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
        assert said in text, said
    table = pd.read_csv(files["table1.csv"], comment="#").set_index("entry")
    fid = column_name("FID", LABEL)
    assert table.loc["default", [fid, f"{fid} low", f"{fid} high", "FID, the paper", "epochs"]].tolist() == [
        80,
        78,
        82,
        16.33,
        2,
    ]
    assert table.loc["real photographs", column_name("unpaired FID", LABEL)] == 97 and np.isnan(
        table.loc["real photographs", fid]
    )
    assert table["status"].tolist() == ["run"] * 4 + ["baseline"] * 2
    assert "# preset smoke" in files["table1.csv"].read_text()
    assert (
        "26.00 | 21.11 | 22.93 | 21.22" in files["table2.md"].read_text()
        and "not run" in files["table2.md"].read_text()
    )
    times = files["table4.md"].read_text()
    assert "projected from 16 images on a test's abacus" in times and "| 0:03 | 2:40 | 6:50 | 0:04 | 0:42 |" in times
    assert pd.read_csv(files["table4.csv"], comment="#")["projected_seconds"].dropna().tolist() == [0.05 / 8 * 5000]
    hypothesis = files["hypothesis.md"].read_text()
    assert (
        "BBDM was not run" in hypothesis
        and f"Pix2Pix beats the gray image by {fid}: 75.0 [73.0, 77.0] against 104.0" in hypothesis
    )
    final = pd.read_csv(files["table_phase2.csv"], comment="#").set_index("entry")
    assert final.loc["Pix2Pix", "day"] == 5 and final.loc["ColTran", "status"] == "not run"


def test_more_models_slot_in(folders):
    baselines()
    model_runs("pix2pix", 80.0)
    model_runs("coltran", 60.0, ("model", "photograph"), seconds=5.0)
    model_runs("bbdm", 61.0, ("model", "photograph"))
    time_bbdm(1.0)
    for component, phase in itertools.product(["coltran_color", "coltran_spatial", "vqgan_f4"], ("phase1", "phase2")):
        part_run(component, phase, 40, 12.0, budget="40 steps")
    selection = select_runs("smoke", "embedded", 0, dict(phase1="60 steps", phase2="300 steps"))
    assert not any(n.startswith("Left out") for n in training_table(selection).notes)
    sentences = hypothesis_sentences(selection)
    assert "is not decided" in sentences[0]
    assert any("ColTran leads with 55.0" in s and "overlaps that of BBDM" in s for s in sentences)
    assert not any(
        "not run" in t.markdown().lower()
        for t in (
            phase2_table(selection),
            times_table(selection),
            training_table(selection),
            variants_table("Table III", selection),
        )
    )
    table = variants_table("Table II", selection)
    assert "factor-0.9, lightness photograph" in table.frame["entry"].tolist() and table.view.columns.tolist() == [
        *PAPER_TABLES["Table II"]["FID"],
        "gray image",
        "real photographs",
    ]
    assert (
        phase2_table(selection).view.loc["PSNR, dB, photograph's L", ["Pix2Pix", "ColTran", "gray image"]].tolist()
        == ["7.50 [5.50, 9.50]"] * 3
    )
    files = [save_figure(paper_figure("Figure 9", selection), folders / str(i), "f") for i in range(2)]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_parts_stand_apart(folders):
    """Steps and time of parts are shown, beside those of the main training; a part is never a model, and another phase's part no rival."""
    model_runs("coltran", 60.0, ("model", "photograph"))
    part_run("coltran_color", "phase1", 40, 12.0, budget="40 steps")
    part_run("coltran_color", "phase2", 60, 3600.0, budget="60 steps")
    part_run("coltran_color", "phase1", 99, 99.0, budget="99 steps", time="2030-01-01")
    table = training_table(select_runs("smoke", "embedded", 0, dict(phase1="60 steps", phase2="300 steps")))
    rows = table.frame.set_index("entry")
    assert rows.loc["ColTran, color upsampler, phase 1", ["step", "epochs", "training_seconds", "budget"]].tolist() == [
        40,
        8,
        12,
        "40 steps",
    ]
    assert rows.loc["ColTran, color upsampler, phase 2", ["step", "training_seconds"]].tolist() == [60, 3600]
    assert rows.loc["ColTran, spatial upsampler, phase 1", "status"] == "not run"
    assert [e for e in rows.index if e.startswith("ColTran, phase")] == [
        f"ColTran, phase 1: {v}" for v in PAPER_TABLES["Table II"]["FID"]
    ] + ["ColTran, phase 2: default"]
    assert (
        "ColTran: 0:01:26 of training in its variants and days, and 1:00:12 on top in its components." in table.notes
    )  # 4 x 9.5 + 47.5 s
    assert sum("is newer" in n for n in table.notes) == 1
    used = part_run("coltran_color", "phase1", 11, 1.0, budget="11 steps", time="2029-01-01")
    run(
        "phase1",
        "coltran",
        "mix-0.9",
        [dict(day=1, **scores(70.0))],
        components=dict(coltran_color=used.path.name[-6:]),
    )
    rows = training_table(select_runs("smoke", "embedded", 0)).frame.set_index("entry")
    assert rows.loc["ColTran, color upsampler, phase 1", "step"] == 11, (
        "the part that the runs name goes before a newer one"
    )
    assert rows.loc["ColTran, color upsampler, phase 2", "step"] == 60
    assert "trained apart" in variants_table("Table II", select_runs("smoke", "embedded", 0)).markdown()
    named = {
        m: {
            component
            for kind, components in model_components("smoke").items()
            if kind.split(":")[0] == m
            for component in components
        }
        for m in ("coltran", "bbdm")
    }
    upsamplers = {c.name for c in ARCHITECTURES["coltran"].components}
    assert named == dict(coltran=upsamplers, bbdm=set(VQGANS)), "every component has a name in tables"


def test_figure11_compares_upsamplers_and_nothing_else(folders):
    baselines()
    own, given, cooler = (
        "norm=row, temperature=1, upsamplers=own:1a",
        "norm=row, temperature=1, upsamplers=official:2b",
        "norm=row, temperature=0, upsamplers=official:2b",
    )
    titles = lambda: [
        ax.get_title().split("\n")[:2] for ax in figure11(select_runs("smoke", "embedded", 0)).axes if ax.get_title()
    ]
    assert titles() == [], "not run"
    made = run(
        "phase2",
        "coltran",
        "default",
        [dict(day=d, sampling=own, lightness=l, **scores(80.0 - d)) for d in (1, 2) for l in ("model", "photograph")],
        sampling=own,
    )
    assert titles() == [["gray"], ["ground truth"], ["own upsamplers", "FID 78.0"]]
    for fid, day, sampling in ((50.0, 1, given), (60.0, 2, given), (40.0, 2, cooler)):
        made.add_metrics(dict(day=day, sampling=sampling, lightness="model", **scores(fid)))
        np.save(sample_file(made, day, sampling), np.zeros((8, 8, 8, 3), np.uint8))
    assert titles()[2:] == [["own upsamplers", "FID 78.0"], ["given upsamplers", "FID 60.0"]]
    selection = select_runs("smoke", "embedded", 0)
    figure = figure11(selection)
    assert figure.axes[2].images[0].get_array().any() and not figure.axes[3].images[0].get_array().any(), (
        "each column shows its own samples"
    )
    entries = phase2_table(selection).frame.set_index("entry")[column_name("FID", LABEL)].to_dict()
    assert entries["ColTran"] == 78 and entries["ColTran, sampling upsamplers=official:2b"] == 60
    assert f"Sampling: {own}." in phase2_table(selection).notes


def test_further_models_are_no_rivals(folders):
    """BBDM in other spaces stands in the tables under names of its own; the verdicts, the common day and Figure 7 know only the three rivals."""
    baselines()
    model_runs("pix2pix", 80.0)
    bbdm_run("phase2", "l2", 70.0, range(1, 6), latent="f4", first_stage="own:1a2b3c")
    before = (
        hypothesis_sentences(select_runs("smoke", "embedded", 0)),
        [ax.lines[0].get_ydata().tolist() for ax in figure7(select_runs("smoke", "embedded", 0)).axes],
    )
    bbdm_run("phase2", "l2", 20.0, (1, 2), latent="f4", first_stage="plain:4d5e6f")
    bbdm_run("phase2", "l2", 10.0, range(1, 6), latent="none", first_stage="")
    bbdm_run("phase2", "l2", 30.0, range(1, 6), latent="f8", first_stage="given:7a8b9c", time="2031-06-06")
    bbdm_run("phase1", "default", 5.0, latent="f8", first_stage="given:7a8b9c")
    component = run(
        "component",
        "vqgan_f4",
        None,
        [],
        DATA | dict(train=120),
        of="phase2",
        budget="40 steps",
        train=dict(batch_size=24),
    )
    for lightness, fid in (("model", 8.0), ("photograph", 6.0)):
        component.add_metrics(
            dict(
                day=1,
                step=40,
                training_seconds=12.0,
                lightness=lightness,
                **scores(fid),
                **{"codebook usage": 0.25, "perplexity": 30.0},
            )
        )
    selection = select_runs("smoke", "embedded", 0)
    assert (
        hypothesis_sentences(selection),
        [ax.lines[0].get_ydata().tolist() for ax in figure7(selection).axes],
    ) == before
    table, fid = phase2_table(selection), column_name("FID", LABEL)
    rows = table.frame.set_index("entry")
    assert rows.loc[
        ["BBDM", "BBDM, f4, no perceptual term", "BBDM, f8, given first stage", "BBDM, pixel space"], ["day", fid]
    ].values.tolist() == [[5, 65], [2, 18], [5, 25], [5, 5]]
    assert (
        rows.loc["VQGAN f4, reconstruction", [fid, "codebook usage"]].tolist() == [8, 0.25]
        and "training_seconds" in rows
    )
    assert np.isnan(rows.loc["VQGAN f4, reconstruction", "training_seconds"]), "its work stands apart"
    assert table.view.loc["FID (EfficientNet-Lite0), photograph's L", "VQGAN f4, reconstruction"] == "6.0 [4.0, 8.0]"
    assert "must not be compared" not in table.markdown()
    assert not variants_table("Table III", selection).frame["status"].eq("run").any(), "Table III is about f4"
    work = training_table(selection).frame.set_index("entry")
    assert (
        work.loc["BBDM, VQGAN f4, phase 2", ["step", "epochs"]].tolist() == [40, 8]
        and work.loc["BBDM, VQGAN f4, phase 1", "status"] == "not run"
    )
    assert (
        "BBDM, f8, given first stage, phase 1: default" in work.index and "BBDM, pixel space, phase 1" not in work.index
    )


def test_at_64_the_rival_works_on_pixels(folders):
    """In laptop and gpu BBDM's latents are the further model, and its pixels the rival."""
    for latent, stage, fid in (("f4", "own:1a2b3c", 20.0), ("none", "", 70.0)):
        run(
            "phase1", "bbdm", "default", [dict(day=1, **scores(fid))], preset="laptop", latent=latent, first_stage=stage
        )
        run(
            "phase2",
            "bbdm",
            "l2",
            [dict(day=d, **scores(fid - d)) for d in range(1, 6)],
            preset="laptop",
            latent=latent,
            first_stage=stage,
        )
    run(
        "component",
        "vqgan_f4",
        None,
        [dict(day=1, step=40, training_seconds=12.0, **scores(8.0), **{"codebook usage": 0.25})],
        of="phase2",
        budget="40 steps",
        preset="laptop",
    )
    selection, fid = select_runs("laptop", "embedded", 0), column_name("FID", LABEL)
    table = phase2_table(selection)
    assert table.frame.set_index("entry").loc[["BBDM", "BBDM, f4", "VQGAN f4, reconstruction"], fid].tolist() == [
        65,
        15,
        8,
    ]
    assert any("works on pixels" in n for n in table.notes)
    assert variants_table("Table III", selection).frame.set_index("entry").loc["default", fid] == 70
    work = training_table(selection).frame["entry"].tolist()
    assert "BBDM, VQGAN f4, phase 2" in work and "BBDM, VQGAN f4, phase 1" not in work


def test_table4_adds_up_stages(folders):
    time_bbdm(4.0)
    table = times_table(select_runs("smoke", "embedded", 0))
    row = table.frame.set_index("entry").loc["BBDM"]
    assert row[
        ["batch_size", "seconds_per_image", "cpu_seconds_per_image", "gflop_per_image", "peak_share"]
    ].tolist() == [8, 0.5, 4.0, 29.0, 0.5], "float32 at batch 8: (1 + 10 x 0.2 + 1)/8 s"
    assert row["projected_seconds"] == 2500 and table.view.loc["here, h:mm:ss", "BBDM"] == "0:41:40"
    assert any("added up (eta=1, sample_steps=10)" in n for n in table.notes)
    run(
        "inference",
        "bbdm",
        None,
        [
            dict(
                stage="U-Net step",
                times=10,
                images=16,
                batch_size=8,
                seconds_per_image=0.1,
                side=8,
                device="a test's abacus",
                sampling="eta=1, sample_steps=10",
            )
        ],
        latent="none",
    )
    assert times_table(select_runs("smoke", "embedded", 0)).view["BBDM, pixel space"].iloc[0] == "n/a", (
        "the paper timed no such model"
    )
    assert model_seconds(select_runs("smoke", "embedded", 0))["BBDM"][0] == 0.5


def test_steps_curve(folders):
    baselines()
    made = run(
        "steps",
        "bbdm",
        None,
        [],
        latent="f4",
        first_stage="own:1a2b3c",
        weights="phase2-bbdm-l2",
        day=5,
        eta=1.0,
        images=48,
        budget="300 steps",
    )
    assert steps_table(select_runs("smoke", "embedded", 0)).frame["status"].tolist() == ["not run"], (
        "without rows there is no curve"
    )
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
    assert (
        table.view.columns.tolist() == ["BBDM, 10 steps", "BBDM, 4 steps", "gray image"]
        and "phase2-bbdm-l2, day 5" in table.markdown()
    )
    curve, gray = figure_steps(selection).axes[0].lines
    assert curve.get_xydata().tolist() == [[4, 90], [10, 60]] and set(gray.get_ydata()) == {104}
    assert steps_table(select_runs("smoke", "embedded", 0, dict(steps="1 steps"))).frame["status"].tolist() == [
        "not run"
    ], "of another budget"


def test_what_is_left_out_is_said(folders):
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
    assert (
        sum("fingerprint 0ddba1" in n for n in left) == 1
        and sum("is newer" in n for n in left) == 2
        and sum("not evaluated yet" in n for n in left) == 1
    )


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
    flip = (lambda s: s) if lower else lambda s: (-s[0], -s[2], -s[1])
    for scores in itertools.permutations({"A": flip(a), "B": flip(b)}.items()):
        found = verdict("FID", dict(scores), lower)
        assert (found.leader, found.decided) == ("A", decided)
        assert ("not decided" in found.sentence) == (not decided) and ("A is best" in found.sentence) == decided


def test_verdict_needs_two():
    assert verdict("FID", {}).sentence == "By FID: not decided, no model has runs."
    alone = verdict("FID", {"A": (1.0, 0.5, 1.5)}, not_run=["B", "C"])
    assert not alone.decided and "only A has runs: 1 [0.5, 1.5]. Not run: B, C." in alone.sentence


def test_conclusion():
    best = lambda who, decided=True: verdict(
        "x", {who: (1, 0.9, 1.1), "other": (2, 1.9, 2.1) if decided else (1.1, 1, 1.2)}
    )
    assert "supported by all 3" in judge_hypothesis([best("B")] * 2, best("A"), "B")
    assert "contradicted by 1 of 3 measures: x (A is best)" in judge_hypothesis([best("B"), best("A")], best("A"), "B")
    assert "contradicted" in judge_hypothesis([best("B")], best("B"), "B"), (
        "a diffusion model that is fastest contradicts 'except speed'"
    )
    assert "not decided: no answer by x" in judge_hypothesis([best("B"), best("B", False)], best("A"), "B")
    assert "B was not run" in judge_hypothesis([best("A")], best("A"), "B", ["B"])
    assert "C was not run" in judge_hypothesis([best("B")], best("A"), "B", ["C"])


# Several seeds: means and spreads, and what must not be averaged.

FID = column_name("FID", LABEL)


def seeded(phase, model, variant, fids, days=1, seeds=(0, 1, 2), width=2.0, **options):
    """The same setting with several seeds, each with a FID of its own that falls by 1 a day."""
    options = dict(budget="60 steps" if phase == "phase1" else "300 steps", train=dict(batch_size=4)) | options
    rows = lambda seed, fid: [
        dict(
            day=d,
            step=60 * d,
            training_seconds=(9.5 + seed) * d,
            sampling="default",
            lightness="photograph",
            **scores(fid - d + 1, width),
        )
        for d in range(1, days + 1)
    ]
    return [
        run(phase, model, variant, rows(s, fid), DATA | dict(train=120), seed=s, **options)
        for s, fid in zip(seeds, fids)
    ]


def test_seeds_give_mean_and_spread(folders):
    baselines()
    seeded("phase1", "pix2pix", "default", [80.0], seeds=[0])
    seeded("phase1", "pix2pix", "batch32", [70.0], seeds=[0])
    alone = variants_table("Table I", select_runs("smoke", "embedded", 0)).csv()
    seeded("phase1", "pix2pix", "default", [84.0, 85.0], seeds=[1, 2])
    seeded("phase1", "pix2pix", "batch32", [99.0], seeds=[1])
    assert variants_table("Table I", select_runs("smoke", "embedded", 0)).csv() == alone, (
        "a page of one seed does not see the others"
    )
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
    assert np.allclose(
        rows.loc["default", [FID, f"{FID} sd", f"{FID} low", f"{FID} high", "seeds"]].astype(float),
        [83, 7**0.5, *wanted, 3],
    )
    assert (
        rows.loc[[f"default, seed {s}" for s in range(3)], FID].tolist() == [80, 84, 85]
        and rows.loc["default, seed 1", f"{FID} low"] == 82
    )
    assert (rows["status"] == "run").sum() == 2 and (rows["status"] == "seed").sum() == 5
    assert (
        winner_of(select_runs("smoke", "embedded", 0), "pix2pix")["variant"] == "batch32"
        and winner_of(selection, "pix2pix")["variant"] == "default"
    )
    said = table.markdown()
    for sentence in (
        "95 % t-interval of the mean over the seeds",
        "Fewer seeds than others: Pix2Pix, batch32 (seeds 0, 1).",
        "seeds 0, 1, 2; commit",
        "Our winner: default, by FID (EfficientNet-Lite0), mean over the seeds (default: 0, 1, 2; batch32: 0, 1); its lead lies inside",
    ):
        assert sentence in said, sentence
    assert "One training run each" not in said and "One training run each (seed 0)" in alone


def save(table, folder):
    (folder / "table.csv").write_text(table.csv())
    return folder / "table.csv"


def test_the_spread_over_seeds_decides(folders):
    """Seed 0 alone would be sure of itself, by its intervals over images; so would three seeds that agree."""
    baselines()
    seeded("phase2", "pix2pix", "default", [60.0, 90.0, 61.0], days=5)
    seeded("phase2", "coltran", "adam", [95.0, 96.0, 97.0], days=5)
    sentence = lambda seeds: next(
        s for s in hypothesis_sentences(select_runs("smoke", "embedded", 0, seeds=seeds)) if s.startswith(f"By {FID}")
    )
    assert "Pix2Pix is best: 56.0 [54.0, 58.0]" in sentence(1)
    assert "Pix2Pix leads with 66.3" in sentence(3) and "overlaps that of ColTran" in sentence(3)
    seeded("phase2", "bbdm", "l2", [10.0, 11.0, 12.0], days=5, width=500.0, latent="f4", first_stage="own:1a2b3c")
    assert "BBDM is best: 7.0 [4.5, 9.5]" in sentence(3), "wide intervals over images do not count"
    sentences = hypothesis_sentences(select_runs("smoke", "embedded", 0, seeds=3))
    assert any(
        f"BBDM beats the gray image by {FID}: 7.0 [4.5, 9.5] against 104.0 [102.0, 106.0]" in s for s in sentences
    )
    table = phase2_table(select_runs("smoke", "embedded", 0, seeds=3))
    assert table.view.loc[FID, ["Pix2Pix", "BBDM", "gray image"]].tolist() == [
        "66.3 ± 17.0 (3 seeds)",
        "7.0 ± 1.0 (3 seeds)",
        "104.0 [102.0, 106.0]",
    ]
    seeded("phase1", "pix2pix", "default", [80.0], seeds=[0])
    table = variants_table("Table I", select_runs("smoke", "embedded", 0, seeds=3))
    assert table.view.loc[FID, "default"] == "80.0 [78.0, 82.0]" and "; seed 0; " in table.footer, (
        "a phase with one seed keeps its intervals over images"
    )


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
    said = figure._supxlabel.get_text().replace("\n", " ")
    assert (
        "Bands: plus and minus the standard deviation over the seeds" in said
        and "Fewer seeds than others: ColTran (seed 0)" in said
    )
    assert (
        "seed 2 has reached day 2" in said
        and phase2_table(selection).frame.set_index("entry").loc["Pix2Pix", "day"] == 2
    )
    picture = paper_figure("Figure 8", selection)._supxlabel.get_text().replace("\n", " ")
    assert "Pictures and their FIDs are of one training run each, not of all seeds (seed 0)" in picture


def test_each_seed_has_parts_of_its_own(folders):
    for seed in (0, 1):
        component = part_run("coltran_color", "phase2", 60 + 20 * seed, 30.0 + seed, seed=seed, budget="60 steps")
        sampling = f"norm=row, upsamplers=own:{component.path.name[-6:]}"
        rows = [dict(day=1, sampling=sampling, lightness=l, **scores(80.0 + 2 * seed)) for l in ("model", "photograph")]
        rows += [dict(r, sampling=sampling.replace("row", "image")) for r in rows]
        run(
            "phase2",
            "coltran",
            "default",
            rows,
            seed=seed,
            sampling=sampling,
            components=dict(coltran_color=component.path.name[-6:]),
        )
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
    lambda e: variants_table("Table I", e),
    phase2_table,
    training_table,
    times_table,
    steps_table,
    figure7,
    hypothesis_sentences,
    lambda e: paper_figure("Figure 8", e),
]


@pytest.mark.parametrize(
    "other, said",
    [
        (dict(preset="laptop"), "preset laptop"),
        (dict(fingerprint="0ddba11"), "fingerprint 0ddba11"),
        (dict(side=16), "side 16"),
    ],
)
def test_pages_refuse_mixed_runs(folders, other, said):
    (ours,), (theirs,) = (
        seeded("phase2", m, v, [80.0], seeds=[0]) for m, v in (("pix2pix", "default"), ("coltran", "adam"))
    )
    phase2_table(
        RunSelection("smoke", "embedded", 0, {("phase2", "pix2pix", None): ours, ("phase2", "coltran", None): theirs})
    )
    theirs.options |= {k: v for k, v in other.items() if k == "preset"} | dict(
        data=theirs.options["data"] | {k: v for k, v in other.items() if k != "preset"}
    )
    for page in PAGES:
        with pytest.raises(ValueError) as error:
            page(
                RunSelection(
                    "smoke", "embedded", 0, {("phase2", "pix2pix", None): ours, ("phase2", "coltran", None): theirs}
                )
            )
        assert all(s in str(error.value) for s in (said, ours.path.name, theirs.path.name)), str(error.value)


@pytest.mark.parametrize(
    "other, said",
    [
        (dict(train=dict(batch_size=8)), "train.batch_size is 4 and 8"),
        (dict(train=dict(batch_size=4, lr=1)), "train.lr is None and 1"),
        (dict(budget="99 steps"), "budget is 300 steps and 99 steps"),
    ],
)
def test_seeds_of_other_options_are_not_averaged(folders, other, said):
    (first,), (second,) = (
        seeded("phase2", "pix2pix", "default", [80.0], seeds=[0]),
        seeded("phase2", "pix2pix", "default", [80.0], seeds=[1], **other),
    )
    phase2_table(select_runs("smoke", "embedded", 0)), phase2_table(select_runs("smoke", "embedded", 1))
    for page in (phase2_table, training_table, figure7, hypothesis_sentences):
        with pytest.raises(ValueError) as error:
            page(select_runs("smoke", "embedded", 0, seeds=2))
        assert all(s in str(error.value) for s in (said, first.path.name, second.path.name)), str(error.value)


def test_seeds_of_other_variants_or_samplings_are_not_averaged(folders):
    run("phase1", "pix2pix", "default", [dict(day=1, sampling="batch_norm=image", **scores(80.0))])
    run("phase1", "pix2pix", "default", [dict(day=1, sampling="batch_norm=running", **scores(80.0))], seed=1)
    with pytest.raises(ValueError, match="different sampling"):
        variants_table("Table I", select_runs("smoke", "embedded", 0, seeds=2))
    seeded("phase2", "pix2pix", "default", [80.0], seeds=[0]), seeded("phase2", "pix2pix", "batch32", [80.0], seeds=[1])
    with pytest.raises(ValueError, match="variant is default and batch32"):
        phase2_table(select_runs("smoke", "embedded", 0, seeds=2))


class Judge(torch.nn.Module):
    """A feature network that costs nothing: the mean colors of four quarters."""

    network_name, num_features = "quarters", 12

    def forward(self, rgb):
        quarters = torch.nn.functional.adaptive_avg_pool2d(rgb, 2).flatten(1)
        return quarters, quarters.softmax(1)


def in_this_process(notebook, **parameters):
    """The notebook's code cells, with parameters in place of its own, without a kernel."""
    namespace = {"display": lambda shown: None}
    for cell in json.loads((repo_root() / "nbs" / f"{notebook}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
            namespace |= parameters if "parameters" in cell["metadata"].get("tags", []) else {}


def test_the_phases_train_every_seed(folders, monkeypatch):
    """Both notebooks, with two days in place of five and a judge that costs nothing."""
    monkeypatch.setattr(faic.phases, "efficientnet_lite0", lambda device: Judge())
    monkeypatch.setattr(faic.phases, "DAYS", 2)
    monkeypatch.setitem(faic.components.PHASE_DAYS, "phase2", 2)
    given = dict(seed=3, seeds=2, budget="1 steps", device="cpu")
    in_this_process("phase1", variants="default,lr-5e-4", **given)
    runs = read_runs(phase="phase1", model="pix2pix")
    assert sorted((r.options["variant"], r.options["seed"]) for r in runs) == [
        ("default", 3),
        ("default", 4),
        ("lr-5e-4", 3),
        ("lr-5e-4", 4),
    ]
    mean = {
        v: np.mean([r.metrics()["FID (quarters)"].item() for r in runs if r.options["variant"] == v])
        for v in ("default", "lr-5e-4")
    }
    best = min(mean, key=mean.get)
    (crowned,) = (r for r in runs if (r.path / "winner.json").exists())
    winner = read_json(crowned.path / "winner.json")
    assert (crowned.options["variant"], crowned.options["seed"], winner["variant"], winner["seeds"][best]) == (
        best,
        3,
        best,
        [3, 4],
    ) and np.isclose(winner["value"], mean[best])
    (crowned.path / "winner.json").write_text("half of a fi")
    in_this_process("phase2", **given)
    assert sorted(
        (r.options["variant"], r.options["seed"], len(r.metrics())) for r in read_runs(phase="phase2", model="pix2pix")
    ) == [(best, 3, 2), (best, 4, 2)]
    selection = select_runs("smoke", "embedded", 3, dict(phase1="1 steps", phase2="2 steps"), seeds=2)
    for table, entry in ((variants_table("Table I", selection), best), (phase2_table(selection), "Pix2Pix")):
        assert (
            "± " in table.view.loc["FID (quarters)", entry] and "(2 seeds)" in table.view.loc["FID (quarters)", entry]
        )
        assert {f"{entry}, seed 3", f"{entry}, seed 4"} < set(table.frame["entry"])
