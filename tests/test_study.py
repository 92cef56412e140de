"""The whole study in one command."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from faic.study import _check_finished, _notebook_process

COMMAND = [sys.executable, "-m", "faic", "study", "--models", "pix2pix,coltran", "--side-by-side", "2"]


@pytest.fixture
def folders(tmp_path):
    return os.environ | {"FAIC_RUNS": str(tmp_path / "runs"), "FAIC_FIGURES": str(tmp_path / "figures")}


def test_a_study_that_fails_says_why_and_stops_its_other_notebook(folders, tmp_path):
    missing = tmp_path / "nowhere"
    done = subprocess.run([*COMMAND, "--data", str(missing)], env=folders, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert f"found nothing at {missing}" in done.stderr and done.stderr.count(" stopped:") == 1
    executed = sorted(f.name for f in Path(folders["FAIC_RUNS"]).rglob("*.ipynb"))
    assert set(executed) <= {"phase1-pix2pix.ipynb", "phase1-coltran.ipynb"}


def has_ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # ended, and its new parent has not asked yet
    except psutil.NoSuchProcess:
        return True


def test_a_notebook_that_is_stopped_while_its_kernel_starts_leaves_no_kernel(folders, tmp_path):
    failure, end = multiprocessing.Pipe(duplex=False)
    arguments = "phase1", {"data": str(tmp_path / "nowhere")}, tmp_path, None, folders, end
    process = multiprocessing.get_context("spawn").Process(target=_notebook_process, args=arguments)
    process.start()
    deadline = time.monotonic() + 120
    while not (kernels := psutil.Process(process.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    process.join()
    assert kernels and all(has_ended(kernel) for kernel in kernels)
    assert process.exitcode == 143 and not failure.poll()


def notebooks_that_train(folder):
    """Of the notebooks whose bars are mirrored in the study's temporary folder."""
    found = 0
    for mirror in folder.glob("*/bars-*.json"):
        with suppress(FileNotFoundError):  # it is being replaced
            found += any(bar["unit"] == "step" for bar in json.loads(mirror.read_text()).values())
    return found


def test_a_study_that_is_stopped_stops_its_notebooks(folders, tmp_path):
    folders["TMPDIR"] = str(tmp_path)
    with open(tmp_path / "log", "w") as log:
        study = subprocess.Popen([*COMMAND, "--budget", "100000 steps"], env=folders, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while notebooks_that_train(tmp_path) < 2 and study.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        assert study.poll() is None, (tmp_path / "log").read_text()
        study.send_signal(signal.SIGTERM)
        assert study.wait(120) == 143
    finally:
        study.kill()
    assert "continues from the last checkpoint" in (tmp_path / "log").read_text()
    begun = {file.parent for file in (tmp_path / "runs").glob("*/last.pt")}
    finished = {file.parent for file in (tmp_path / "runs").glob("*/day-1.safetensors")}  # at most a component's
    assert len(begun - finished) == 2


@pytest.mark.parametrize("reason, expected", [("because", "because"), (None, "phase1 was stopped .exit code 7.")])
def test_a_notebook_that_ends_early_has_a_reason(reason, expected):
    context = multiprocessing.get_context("spawn")
    failure, end = context.Pipe(duplex=False)
    process = context.Process(target=sys.exit, args=(7,))
    process.start()
    if reason:
        end.send(reason)
    end.close()
    with pytest.raises(SystemExit, match=expected):
        _check_finished(SimpleNamespace(name="phase1", process=process, failure=failure))


def test_a_single_notebook_shows_its_bar_in_a_terminal(folders):
    parent, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    command = [sys.executable, "-m", "faic", "run", "phase1", "-p", "budget", "nonsense"]
    run = subprocess.Popen(command, env=folders, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    with suppress(OSError):  # the terminal is closed at the end
        while chunk := os.read(parent, 4096):
            shown += chunk
    os.close(parent)
    assert run.wait(60) == 1
    assert all(words in shown for words in (b"phase1:   0%|", b"phase1, starting: ", b"budget = 'nonsense'")), shown
