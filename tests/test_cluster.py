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

import pandas as pd
import psutil
import pytest
from feature_nets import QuarterColors

import faic.cluster
from faic.cluster import NotebookJob, arguments, last_error_line, local_slots, main, run_jobs, run_local
from faic.components import baseline_run
from faic.core import pick_device, runs_dir, write_json
from faic.dataset import load_photos
from faic.days import run_baselines
from faic.jobs import Job, job_row, photograph_counts, study_jobs
from faic.parameters import variants_of
from faic.presets import default_variants, model_options
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
    row = job_row(jobs[1], photograph_counts("smoke", "embedded"))
    assert len(sizes) == 3 and sum(sizes) == pytest.approx(row["bytes"], rel=0.03)
    row = job_row(jobs[1], dict(train_phase1=72, validation=48))
    assert row["evaluation"] > 0, "this run has measured what an evaluation takes"


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
    with pytest.raises(SystemExit, match="goes on from the last checkpoints"):
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


def test_the_command_names_what_failed_and_its_notebook(runs, monkeypatch, capsys):
    monkeypatch.setattr(
        faic.cluster,
        "run_local",
        lambda jobs, slots, logs: {j.name: "ValueError: no" if j.name.endswith("adam") else "" for j in jobs},
    )
    with pytest.raises(SystemExit, match="1 of 8 jobs are not done: phase1-coltran-adam"):
        main(["run", "--preset", "smoke", "--models", "coltran"])
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
    words = "run --preset smoke --models coltran,bbdm --on slurm --partition gpu --account me --time 2-00:00:00"
    main([*words.split(), "--slurm-extra", "constraint=h100", "--slurm-extra", "mail-type=FAIL"])
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
    assert f"{number['results']} faic-results" in capsys.readouterr().out
    again = kept._checkpoint_function()
    assert (again.function.job, again.function.folder) == (kept.function.job, kept.function.folder)


def test_slurm_refuses_half_way(slurm, runs):
    (slurm / "refuse").touch()
    refused = "(?s)phase1-pix2pix-batch32 was not submitted: .*invalid partition.*scancel 100 101"
    with pytest.raises(SystemExit, match=refused):
        main("run --preset smoke --on slurm --partition nowhere".split())


NOT_PRINTED = ("error", "output", "open-mode", "wckey", "nodes")  # options that submitit adds


def test_the_dry_run_shows_what_sbatch_gets(slurm, runs, capsys):
    """The printed options against those of the submitted scripts."""
    main("plan --preset smoke --models pix2pix --on slurm --qos long".split())
    printed = capsys.readouterr().out
    shared, *own = printed[printed.index("sbatch, all jobs:") :].splitlines()
    main("run --preset smoke --models pix2pix --on slurm --qos long".split())
    names = {f.stem: asked(f)["job-name"] for f in slurm.glob("*.sh")}
    for file, line in zip(sorted(slurm.glob("*.sh")), own, strict=True):
        flags = dict(re.findall(r"--([\w-]+)(?:=(\S+))?", f"{shared} {line}"))
        submitted = {k: v for k, v in asked(file).items() if k not in NOT_PRINTED}
        if "dependency" in submitted:
            kind, *numbers = submitted["dependency"].split(":")
            jobs = [f"<{names[number].removeprefix('faic-')}>" for number in numbers]
            submitted |= dict(dependency=":".join([kind, *jobs]))
        assert flags == submitted


# Arguments of the command line.


def test_seeds_are_jobs_of_their_own_and_share_a_winner():
    jobs = {j.name: j for j in study_jobs("smoke", models=("pix2pix",), seeds=(0, 1, 2))}
    assert len(jobs) == 3 * 6 + 2
    variants = [f"phase1-pix2pix-{v}-s{s}" for s in (0, 1, 2) for v in default_variants("pix2pix")]
    for seed in (0, 1, 2):
        for job in [jobs[name] for name in variants if name.endswith(f"s{seed}")]:
            assert job.depends_on == (f"phase1-pix2pix-parts-s{seed}",) and job.parameters["seed"] == seed
        last = jobs[f"phase2-pix2pix-s{seed}"]
        assert last.depends_on == tuple(variants)
        assert (last.parameters["seeds"], last.parameters["only_seed"]) == (3, str(seed))
    assert jobs["inference_time"].depends_on == tuple(f"phase2-pix2pix-s{s}" for s in (0, 1, 2))
    assert jobs["results"].parameters["seeds"] == 3


@pytest.mark.parametrize(
    "words, message",
    [
        ("run", "needs a folder of 100000 photographs"),
        ("run --data /nowhere", "is no folder"),
        ("plan --budget days", "a budget reads like"),
        ("plan --models pix3pix", "'pix2pix', 'coltran', 'bbdm'"),
        ("plan --time soon", "time reads like"),
        ("plan --slurm-extra h100", "expected key=value"),
        ("plan --gpus 0,1 --at-once 2", "no --at-once beside it"),
        ("plan --seeds 0", "expected 1 or more"),
    ],
)
def test_mistakes_are_reported_at_once(words, message, capsys):
    with pytest.raises(SystemExit):
        arguments(words.split())
    assert message in capsys.readouterr().err


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
    error = dict(time="2026-11-26T10:00:00+00:00", step=None, error="ValueError", message="no photographs")
    write_json(failed.path / "error.json", error)
    fresh = made("lr-5e-4")
    table = status().set_index("run")
    states = [table.loc[r.path.name, "state"] for r in (running, stopped, failed, fresh)]
    assert states == ["running", "interrupted", "failed", "not begun"]
    one = table.loc[running.path.name]
    assert one["used"] == "1.2 of 5 days" and one["seconds"] == 9000
    assert one["left"] == 7.5 * 3600, "of a budget in hours the rest is exact"
    assert run_progress(stopped)["left"] == 30, "of a budget in steps the rest is estimated from the steps so far"
    assert table.loc[failed.path.name, "error"] == "ValueError: no photographs (step None, 2026-11-26T10:00:00+00:00)"
    holder.communicate(b"\n")
    assert status().set_index("run").loc[running.path.name, "state"] == "interrupted"


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
