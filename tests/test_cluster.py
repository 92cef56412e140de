"""The study as jobs: on this machine through submitit's local executor, and under stand-ins for SLURM's commands."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import psutil
import pytest
from feature_nets import QuarterColors

import faic.cluster
from faic.cluster import (
    NotebookJob,
    cluster_options,
    last_error_line,
    local_slots,
    plan_cluster,
    run_cluster,
    run_jobs,
    run_local,
)
from faic.components import baseline_run
from faic.core import pick_device, read_json, runs_dir, write_json
from faic.dataset import load_photos
from faic.days import run_baselines
from faic.jobs import (
    Job,
    budgets_in_steps,
    describe_study_status,
    estimate_job,
    photograph_counts,
    study_jobs,
    study_status,
    trainings,
)
from faic.parameters import variants_of
from faic.presets import DAYS, default_variants, model_options
from faic.results import page_budgets
from faic.runs import open_run, read_runs
from faic.status import describe_status, run_progress, status

submitit = pytest.importorskip("submitit")
CPU = pick_device("cpu")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder of runs that shares only the features of photographs with other tests: these take long."""
    shared = runs_dir() / "data-features"
    shared.mkdir(exist_ok=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "data-features").symlink_to(shared)
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FAIC_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "runs"


# On this machine.


@pytest.mark.slow  # three kernels
def test_a_preempted_chain_ends_as_if_nothing_had_been(runs):
    """Components, then a variant, in two processes; the variant gets SLURM's warning and is started again."""
    jobs = study_jobs("smoke", models=("pix2pix",), budget="60 steps")[:2]
    assert jobs[1].name == "phase1-pix2pix-default" and jobs[1].depends_on == (jobs[0].name,)
    seen = {}

    def first_line():
        for log in runs.glob("phase1-pix2pix-default-*/log.jsonl"):
            if log.read_text().endswith("\n"):
                return log.read_text().splitlines()[0]

    def warn():
        while first_line() is None:
            time.sleep(0.05)
        seen["line"] = first_line()
        for p in psutil.Process().children(recursive=True):
            if "submitit.core._submit" in p.cmdline():
                p.send_signal(signal.SIGUSR2)

    threading.Thread(target=warn, daemon=True).start()
    assert run_local(jobs, [None], runs / "logs") == {j.name: "" for j in jobs}
    (run,) = read_runs(phase="phase1", model="pix2pix")
    assert run.metrics()["step"].tolist() == [60]
    assert "Requeued" in "".join(f.read_text() for f in (runs / "logs").glob("*.out"))
    line = (run.path / "log.jsonl").read_text().splitlines()[0]
    assert line == seen["line"], "it was resumed: begun anew, it would have taken other seconds"
    executed = runs / "study-smoke-embedded-s0"
    assert "no variant was asked for: the baselines" in (executed / "phase1-pix2pix-none.ipynb").read_text()
    assert (executed / "phase1-pix2pix-default.ipynb").exists()
    table = status().set_index("run")
    assert table["state"].eq("finished").all() and len(table) == 3 and table["error"].isna().all()
    assert table.loc[run.path.name, "used"] == "60 of 60 steps" and table.loc[run.path.name, "left"] == 0
    assert max(map(len, describe_status(status()).splitlines())) <= 120
    sizes = [f.stat().st_size for f in run.path.iterdir() if f.suffix in (".pt", ".safetensors")]
    cost = estimate_job(jobs[1], photograph_counts("smoke", "embedded"))
    assert len(sizes) == 3 and sum(sizes) == pytest.approx(cost.bytes, rel=0.03)
    cost = estimate_job(jobs[1], dict(train_phase1=72, validation=48))
    assert cost.evaluation > 0, "this run has measured what an evaluation takes"
    study = study_status("smoke", "embedded", ["pix2pix"], budget="60 steps").set_index("training")
    one = study.loc["phase1-pix2pix-default"]
    assert (one["state"], one["share"], one["left"], one["run"]) == ("done", 1, 0, run.path.name)


KERNEL = """
import signal, sys, time
file = open(sys.argv[2], "w")
def save(*_):
    print("saved", file=file, flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, save)
print("up", file=file, flush=True)
time.sleep(60)
"""


def test_ctrl_c_lets_notebooks_save(runs, monkeypatch):
    """The notebook is a process that writes to a file when it is asked to end."""
    log = runs / "kernel.log"

    def interrupted(jobs, slots, start):
        start(jobs[0], slots[0])
        while not log.exists() or "up" not in log.read_text():
            time.sleep(0.05)
        raise KeyboardInterrupt

    command = [sys.executable, "-c", KERNEL, "ipykernel", str(log)]
    monkeypatch.setattr(faic.cluster, "NotebookJob", lambda job, folder: functools.partial(subprocess.run, command))
    monkeypatch.setattr(faic.cluster, "run_jobs", interrupted)
    with pytest.raises(SystemExit, match="continues from the last checkpoints"):
        run_local(study_jobs("smoke", models=("pix2pix",)), [None], runs / "logs")
    assert log.read_text().split() == ["up", "saved"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_gpu_has_one_job_at_a_time_and_sees_no_other(runs, monkeypatch):
    visible = functools.partial(os.getenv, "CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(faic.cluster, "NotebookJob", lambda job, folder: visible)
    handles = {}

    def keep(jobs, slots, start):
        def started(job, slot):
            assert all(h.done() for s, h in handles.values() if s == slot)
            handles[job.name] = slot, start(job, slot)
            return handles[job.name][1]

        return run_jobs(jobs, slots, started, pause=0.05)

    monkeypatch.setattr(faic.cluster, "run_jobs", keep)
    jobs = [Job(n, "phase1", dict(preset="smoke", data="embedded", seed=0)) for n in "abc"]
    assert run_local(jobs, [3, 5], runs / "logs") == dict(a="", b="", c="")
    assert {n: h.result() for n, (_, h) in handles.items()} == {n: str(s) for n, (s, _) in handles.items()}
    assert {s for s, _ in handles.values()} == {3, 5}


def test_a_failure_is_reported_by_its_last_line(runs, monkeypatch):
    def stopped(*_):
        raise SystemExit(
            "\nphase1 {'model': 'bbdm'} stopped:\nOutOfMemoryError: too small\nThe whole notebook: /out.ipynb"
        )

    monkeypatch.setattr(faic.cluster, "run_notebook", stopped)
    with pytest.raises(RuntimeError) as error:
        NotebookJob(study_jobs()[0], runs)()
    assert last_error_line(str(error.value)) == "OutOfMemoryError: too small"
    handle = submitit.LocalExecutor(runs / "logs").submit(int, "seven")
    assert last_error_line(str(handle.exception())) == "ValueError: invalid literal for int() with base 10: 'seven'"


def test_run_cluster_names_what_failed_and_its_notebook(runs, monkeypatch, capsys):
    monkeypatch.setattr(
        faic.cluster,
        "run_local",
        lambda jobs, slots, logs: {j.name: "ValueError: no" if j.name.endswith("adam") else "" for j in jobs},
    )
    with pytest.raises(SystemExit, match="1 of 8 jobs are not done: phase1-coltran-adam"):
        run_cluster(cluster_options(preset="smoke", models="coltran"))
    notebook = f"{runs}/study-smoke-embedded-s0/phase1-coltran-adam.ipynb"
    assert f"phase1-coltran-adam: ValueError: no; {notebook}" in capsys.readouterr().out


# Under SLURM.


SBATCH = """
n=$(ls "$D"/*.sh 2>/dev/null | wc -l)
if [ -e "$D/refuse" ] && [ $n -ge 2 ]; then
    echo "sbatch: error: invalid partition specified" >&2
    exit 1
fi
cp "$1" "$D/$((100+n)).sh"
echo "Submitted batch job $((100+n))"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder of stand-ins for SLURM's commands: sbatch keeps its script, and fails from the third on if told to."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol"):
        script = f'#!/bin/bash\nD={folder}\necho {name} "$@" >> "$D/calls"\n'
        (folder / name).write_text(script + (SBATCH if name == "sbatch" else ""))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def asked(script):
    """Option -> value of what a script asks SLURM for."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.M))


def test_slurm_gets_every_job_with_its_dependencies(slurm, runs, capsys):
    asked_for = dict(
        partition="gpu", account="me", time="2-00:00:00", slurm_extra=["constraint=h100", "mail-type=FAIL"]
    )
    run_cluster(cluster_options(preset="smoke", models="coltran,bbdm", on="slurm", **asked_for))
    scripts = {asked(f)["job-name"]: (f.stem, asked(f)) for f in sorted(slurm.glob("*.sh"))}
    number = {name.removeprefix("faic-"): n for name, (n, _) in scripts.items()}
    jobs = study_jobs("smoke", models=("coltran", "bbdm"))
    assert list(number) == [j.name for j in jobs] and "phase1-coltran-lr-5e-4" in number
    for job in jobs:
        options = scripts[f"faic-{job.name}"][1]
        wanted = ":".join([job.dependency, *(number[n] for n in job.depends_on)]) if job.depends_on else None
        assert options.get("dependency") == wanted, job.name
        names = ("time", "partition", "account", "constraint", "mail-type")
        assert [options[name] for name in names] == ["2880", "gpu", "me", "h100", "FAIL"]
        assert options["kill-on-invalid-dep"] == "yes" and "requeue" in options and options["signal"] == "USR2@600"
        assert options.get("gpus-per-node") == (None if job.name == "results" else "1")
    assert number["phase1-bbdm-l2"] in scripts["faic-phase2-bbdm-plain"][1]["dependency"]
    (logs,) = (runs / "study-smoke-embedded-s0" / "jobs").iterdir()
    kept = submitit.core.utils.DelayedSubmission.load(logs / f"{number['phase1-bbdm-l2']}_submitted.pkl")
    assert kept.function.job == next(j for j in jobs if j.name == "phase1-bbdm-l2")
    assert (kept._timeout_countdown, kept._timeout_min) == (100, 2880)
    assert type(kept.function).__module__ == "faic.cluster", "a job's process must find what is pickled"
    assert f"{number['results']} faic-results" in capsys.readouterr().out
    again = kept._checkpoint_function()
    assert (again.function.job, again.function.folder) == (kept.function.job, kept.function.folder)


def test_slurm_refuses_half_way(slurm, runs):
    (slurm / "refuse").touch()
    message = "(?s)phase1-pix2pix-batch32 was not submitted: .*invalid partition.*scancel 100 101"
    with pytest.raises(SystemExit, match=message):
        run_cluster(cluster_options(preset="smoke", on="slurm", partition="nowhere"))


OF_SUBMITIT = ("error", "output", "open-mode", "wckey", "nodes")  # options that it adds to each script


def test_the_dry_run_shows_what_sbatch_gets(slurm, runs):
    """The options in the plan against those of the submitted scripts."""
    options = cluster_options(preset="smoke", models="pix2pix", on="slurm", qos="long")
    plan = plan_cluster(options)
    shared, *own = plan[plan.index("sbatch, all jobs:") :].splitlines()
    run_cluster(options)
    names = {f.stem: asked(f)["job-name"].removeprefix("faic-") for f in slurm.glob("*.sh")}
    for file, line in zip(sorted(slurm.glob("*.sh")), own, strict=True):
        planned = dict(re.findall(r"--([\w-]+)(?:=(\S+))?", f"{shared} {line}"))
        submitted = {k: v for k, v in asked(file).items() if k not in OF_SUBMITIT}
        if "dependency" in submitted:
            submitted["dependency"] = re.sub(r"\d+", lambda n: f"<{names[n[0]]}>", submitted["dependency"])
        assert planned == submitted


# The options of a cluster.


def test_seeds_are_jobs_of_their_own_and_share_a_winner():
    jobs = {j.name: j for j in study_jobs("smoke", models=("pix2pix",), seeds=(0, 1, 2))}
    assert len(jobs) == 3 * 6 + 2
    variants = [f"phase1-pix2pix-{v}-s{s}" for s in (0, 1, 2) for v in default_variants("pix2pix")]
    for seed in (0, 1, 2):
        for name in (v for v in variants if v.endswith(f"s{seed}")):
            assert jobs[name].depends_on == (f"phase1-pix2pix-components-s{seed}",)
            assert jobs[name].parameters["seed"] == seed
        last = jobs[f"phase2-pix2pix-s{seed}"]
        assert last.depends_on == tuple(variants)
        assert (last.parameters["seeds"], last.parameters["only_seed"]) == (3, str(seed))
    assert jobs["inference_time"].depends_on == tuple(f"phase2-pix2pix-s{s}" for s in (0, 1, 2))
    assert jobs["results"].parameters["seeds"] == 3


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(), "needs a folder of 100000 photographs"),
        (dict(preset="tiny"), "expected one of smoke, laptop, gpu, paper"),
        (dict(on="moon"), "expected one of local, slurm"),
        (dict(data="/nowhere"), "is no folder"),
        (dict(preset="smoke", budget="days"), "a budget reads like"),
        (dict(models="pix3pix"), "'pix2pix', 'coltran', 'bbdm'"),
        (dict(time="soon"), "time reads like"),
        (dict(slurm_extra=["h100"]), "expected key=value"),
        (dict(gpus="0,1", at_once=2), "no --at-once beside it"),
        (dict(seeds=0), "expected 1 or more"),
    ],
)
def test_mistakes_are_reported_at_once(given, message):
    with pytest.raises(ValueError, match=message):
        cluster_options(**given)


def test_a_plan_needs_no_photographs():
    options = cluster_options(for_run=False)
    assert (options.preset, options.data, options.models) == ("paper", "embedded", ["pix2pix", "coltran", "bbdm"])


@pytest.mark.parametrize(
    "seen, gpus, at_once, slots", [("", "2,5", 0, [2, 5]), ("4,6", "", 0, [4, 6]), ("", "", 3, [None] * 3)]
)
def test_where_jobs_run(seen, gpus, at_once, slots, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert local_slots(gpus, at_once) == slots


def test_no_variant_may_be_asked_for():
    assert variants_of("coltran")("none") == [] and len(variants_of("coltran")("all")) == 4
    with pytest.raises(ValueError, match="expected 'all'"):
        variants_of("coltran")("none,default")


# Notebooks that run at the same time.


def test_baselines_are_scored_once_by_two_at_a_time(runs):
    photos = load_photos()
    for subject in ("gray", "real"):
        baseline_run("phase1", subject, "smoke", photos, CPU)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run_baselines, "phase1", "smoke", photos, QuarterColors(), CPU) for _ in range(2)]
    assert [b.result() for b in both] == [None, None]
    assert [len(r.metrics()) for r in read_runs(phase="phase1", model="baseline")] == [1, 1]


# Where every run stands.


def made(variant, budget="100 steps", phase="phase1"):
    """A run's folder with its options alone."""
    options = dict(phase=phase, model="pix2pix", variant=variant, preset="smoke", seed=0, budget=budget)
    return open_run(options | dict(train=model_options("pix2pix", "smoke")), CPU)


LOCK = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(1, flush=True)
input()
"""


NO_PHOTOGRAPHS = dict(time="2026-11-26T10:00:00+00:00", step=None, error="ValueError", message="no photographs")


def test_status_of_every_kind_of_run(runs):
    running = made("default", "10 hours", "phase2")
    running.log(step=40, fraction=0.25, seconds=9000.0)
    running.log(event="continues", steps=3)
    command = [sys.executable, "-c", LOCK, str(running.path / "lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    stopped = made("batch32")
    stopped.log(step=25, fraction=0.25, seconds=10.0)
    (stopped.path / "lock").touch()
    failed = made("beta1-0.7")
    write_json(failed.path / "error.json", NO_PHOTOGRAPHS)
    write_json(running.path / "error.json", NO_PHOTOGRAPHS)
    fresh = made("lr-5e-4")
    table = status().set_index("run")
    states = [table.loc[r.path.name, "state"] for r in (running, stopped, failed, fresh)]
    assert states == ["running", "interrupted", "failed", "not begun"]
    one = table.loc[running.path.name]
    assert one["used"] == "1.2 of 5 days" and one["seconds"] == 9000
    assert one["left"] == 7.5 * 3600, "of a budget in hours the rest is exact"
    assert pd.isna(one["error"]), "an error of an earlier attempt is over"
    assert run_progress(stopped).left == 30, "of a budget in steps the rest is estimated from the steps so far"
    assert table.loc[failed.path.name, "error"] == "ValueError: no photographs (step None, 2026-11-26T10:00:00+00:00)"
    assert table.loc[fresh.path.name, "left"] == 100 * 10 / 25, "a run that has not begun goes by its like"
    holder.communicate(b"\n")
    (running.path / "error.json").unlink()
    assert status().set_index("run").loc[running.path.name, "state"] == "interrupted"


STOPPED = """
import os, signal
import numpy as np
import faic.trainer, together
from faic.core import Budget, pick_device
from faic.runs import open_run
from faic.trainer import Trainer, train_day

check, options = faic.trainer.check_losses, dict(batch_size=2, optimizer="adam", lr=1e-3, beta1=0.5, beta2=0.999)
options |= dict(schedule="constant", crop=together.SIDE, flip=False, seed=0)
pixels = np.zeros((4, together.SIDE, together.SIDE, 3), np.uint8)

def train_and_stop(seed, number):
    def stop_after_3(trainer):
        check(trainer)
        if trainer.step == 3:
            os.kill(os.getpid(), number)

    faic.trainer.check_losses = stop_after_3
    make, changes = together.TRAINEES["pix2pix"]
    train = options | changes
    named = dict(phase="phase1", model="pix2pix", preset="smoke", seed=seed, budget="50 steps", train=train)
    run = open_run(named, pick_device("cpu"))
    train_day(Trainer(make(), run, pixels, np.arange(4), Budget(50, "steps"), train, check_every=1).resume(), 1)

try:
    train_and_stop(0, signal.SIGINT)
except KeyboardInterrupt:
    train_and_stop(1, signal.SIGTERM)
"""


def test_a_signal_interrupts_a_run_and_an_error_fails_it(runs):
    """Two real runs, one stopped by Ctrl-C, one by SIGTERM: both leave error.json, and neither has failed."""
    ended = subprocess.run([sys.executable, "-c", STOPPED], cwd=Path(__file__).parent, stdout=subprocess.PIPE)
    assert ended.returncode == -signal.SIGTERM
    table = status()
    assert table["state"].tolist() == ["interrupted", "interrupted"] and table["step"].tolist() == [3, 3]
    assert table["error"].str.contains("stopped after step 3, which is saved").all()
    error = next(runs.glob("*-s1-*/error.json"))
    assert read_json(error)["error"] == "TrainingStopped", "the word that an error of training has, too"
    write_json(error, read_json(error) | dict(message="the loss D is not finite"))
    assert status()["state"].tolist() == ["interrupted", "failed"]


def test_status_survives_damage_and_names_it(runs):
    cut, weights, rows, options = (made(variant) for variant in ("default", "batch32", "beta1-0.7", "lr-5e-4"))
    early = made("default", "7 steps")
    (cut.path / "log.jsonl").write_text('{"step": 1, "fra\n{"step": 2, "fraction": 0.5, "seconds": 3}\n')
    (weights.path / "day-1.safetensors").write_bytes(b"\x07half a file")
    (rows.path / "metrics.csv").write_text("")
    (options.path / "options.json").write_text('{"phase": "pha')
    (early.path / "options.json").unlink()
    (runs / "data-embedded-64-abcdef").mkdir()
    whole = made("default", "9 steps")
    table = status().set_index("run")
    assert len(table) == 6 and pd.isna(table.loc[whole.path.name, "error"])
    for run, message in (
        (cut, "JSONDecodeError"),
        (weights, "Safetensor"),
        (rows, "EmptyDataError"),
        (options, "not valid JSON"),
        (early, "options.json"),
    ):
        assert message in table.loc[run.path.name, "error"], run.path.name
    assert table.loc[early.path.name, "state"] == "damaged" and json.dumps(describe_status(table.reset_index()))


# What remains of a study.


def scored(run, day, seconds):
    """Let a run look trained and scored up to this day."""
    row = dict(day=day, step=100 * day, training_seconds=seconds * 100 * day, n=48, evaluation_seconds=24.0)
    run.add_metrics(row | {"FID (X)": 5.0})


def study_run_of(variant, phase="phase1", seed=0, **changes):
    options = dict(phase=phase, model="pix2pix", variant=variant, preset="smoke", seed=seed, data=dict(name="embedded"))
    budget = "100 steps" if phase == "phase1" else f"{100 * DAYS} steps"
    train = model_options("pix2pix", "smoke", variant)
    return open_run(options | dict(budget=budget, train=train) | changes, CPU)


def test_a_study_states_what_remains(runs):
    photographs = photograph_counts("smoke", "embedded")
    variants = default_variants("pix2pix")
    for variant in variants[:3]:
        scored(study_run_of(variant), 1, seconds=0.5)
    scored(study_run_of(variants[3], budget="99 steps"), 1, seconds=0.5)  # of another study,
    scored(study_run_of(variants[3], data=dict(name="others")), 1, seconds=0.5)  # as are these two
    scored(study_run_of(variants[3], seed=1), 1, seconds=0.5)
    winner = study_run_of(variants[1], "phase2")  # not the variant that the paper's winner is
    scored(winner, 1, seconds=0.75)
    scored(winner, 2, seconds=0.75)

    table = study_status("smoke", "embedded", ["pix2pix"], budget="100 steps").set_index("training")
    assert table["state"].tolist() == ["done"] * 3 + ["to do"] * 2
    last, phase2 = table.iloc[3], table.loc["phase2-pix2pix"]
    assert (last["share"], last["left"], last["run"]) == (0, 50, ""), "100 steps of half a second"
    assert last["evaluation"] == photographs["validation"] * 24 / 48
    assert (phase2["share"], phase2["run"]) == (2 / DAYS, winner.path.name)
    assert phase2["left"] == pytest.approx((DAYS - 2) * 75)
    assert phase2["evaluation"] == (DAYS - 2) * photographs["test"] * 24 / 48
    words = describe_study_status(table.reset_index())
    assert "5 trainings: 3 done, 2 to do." in words and "4 min 35 s of training" in words
    assert max(map(len, words.splitlines())) <= 120

    several = study_status("smoke", "embedded", ["pix2pix"], seeds=2, budget="100 steps")
    assert several.groupby("seed")["state"].apply(lambda s: (s == "done").sum()).tolist() == [3, 1]
    assert set(several["training"]) == set(table.index)


def test_a_study_lists_each_component_once(runs):
    table = study_status("smoke", "embedded", ["bbdm"])
    assert table["training"].is_unique and (table["state"] == "to do").all()
    components = [t for t in table["training"] if "vqgan" in t]
    assert components == [f"{p}-vqgan_f4{kind}" for kind in ("", "_plain") for p in ("phase1", "phase2")]
    words = describe_study_status(table)
    assert re.search(r'the training of \d+ marked "\?": no run here has measured it', words)


def test_each_model_may_have_its_own_budget():
    budget = "pix2pix=20 steps, bbdm=5/10 steps"
    jobs = study_jobs("smoke", models=["pix2pix", "bbdm"], budget=budget)
    found = {(t.phase, t.name): str(t.budget) for job in jobs for t in trainings(job)}
    expected = {"pix2pix": ("20 steps", "100 steps"), "bbdm": ("5 steps", "50 steps")}
    for model, (variant, days) in expected.items():
        assert (found["phase1", model], found["phase2", model]) == (variant, days)
    assert page_budgets("smoke", budget) == {
        (phase, model): days if phase != "phase1" else variant
        for model, (variant, days) in expected.items()
        for phase in ("phase1", "phase2", "steps")
    }


def test_a_trial_turns_hours_into_steps(runs):
    with pytest.raises(ValueError, match="faic run phase1 -p model pix2pix -p preset laptop"):
        budgets_in_steps("laptop", 0.5)
    trial = dict(phase="phase1", variant="default", preset="laptop", seed=0, budget="200 steps")
    for name, seconds in (("pix2pix", 0.25), ("coltran_color", 0.5)):
        run = open_run(trial | dict(model=name, train=model_options(name, "laptop")), pick_device())
        run.log(step=200, fraction=1, seconds=200 * seconds)
    found = budgets_in_steps("laptop", 0.5)
    assert found["pix2pix"] == "7200 steps" and found["bbdm"] is None
    assert found["coltran_color"] == ("720 steps", "1440 steps"), "six minutes, and twelve more"
    elsewhere = read_json(run.path / "options.json")
    elsewhere["made"]["device"] = "another machine"
    write_json(run.path / "options.json", elsewhere)
    assert budgets_in_steps("laptop", 0.5)["coltran_color"] == (None, None)
    assert budgets_in_steps("laptop", 0.5, read_runs(model="coltran_color"))["coltran_color"][0] == "720 steps"
