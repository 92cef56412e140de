"""Where FAIC runs: in a notebook, from a wheel, inside another repository, with several Pythons."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
from click.testing import CliRunner
from papermill.clientwrap import PapermillNotebookClient

import faic.core
import faic.runs
import faic.study
from faic import __version__
from faic.cli import main
from faic.core import read_json, runs_dir, write_json

ROOT = Path(__file__).resolve().parents[1]
PAPERMILL = ("phase1", "phase2", "inference_time", "results", "failures", "colorize")

BARS = """
import time
from faic.core import ProgressBar
print('before')
for i in ProgressBar(range(3), desc='outer', mininterval=0):
    for j in ProgressBar(range(20), desc=f'inner {i}', leave=False, mininterval=0):
        time.sleep(.01)
"""


def new_notebook(file, *sources):
    """Write a notebook of these code cells."""
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    found = nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(s) for s in sources])
    nbformat.write(found, file)
    return file


def printed(notebook):
    """The lines that an executed notebook has printed."""
    outputs = [output for cell in nbformat.read(notebook, 4).cells for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream").splitlines()


# bars


def test_plain_papermill_shows_bars_and_stores_none(tmp_path, monkeypatch):
    drawn = []

    def watch(client, message, *rest, original=PapermillNotebookClient.process_message):
        if message["msg_type"].endswith("display_data"):
            drawn.append(message["content"]["data"].get("text/plain", ""))
        return original(client, message, *rest)

    monkeypatch.setattr(PapermillNotebookClient, "process_message", watch)
    notebook = new_notebook(tmp_path / "bars.ipynb", BARS, "print('after')", "for _ in ProgressBar(range(3)): pass")
    executed = papermill.execute_notebook(notebook, tmp_path / "out.ipynb", progress_bar=False)
    nbformat.validate(executed)
    outputs = [output for cell in executed.cells for output in cell.outputs]
    assert [o["text"] for o in outputs if o["output_type"] == "stream"] == ["before\n", "after\n"]
    assert [o["data"] for o in outputs if o["output_type"] == "display_data"] == [{}, {}], "one for each cell with bars"
    assert any("outer:  33%" in text and "\ninner 1:  50%" in text for text in drawn), (
        "both bars are shown while it runs"
    )


# provenance


@pytest.fixture
def archive(tmp_path):
    """FAIC unpacked inside another project's repository."""
    place = tmp_path / "project" / "faic"
    for name in ("nbs", "faic"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    git(place.parent, "init")
    (place.parent / "notes.txt").write_text("another project")
    git(place.parent, "add", "notes.txt")
    git(place.parent, "commit", "-m", "of another project")
    return place


def git(folder, *words, **environment):
    """Git's answer; without the settings of whoever runs the tests."""
    author = ["-c", "user.name=A test", "-c", "user.email=test@example.org"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", *author, *words], cwd=folder, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def recorded(monkeypatch):
    """A function that returns the commit that the code in a folder records."""

    def commit(place, **environment):
        with monkeypatch.context() as patch:
            patch.setattr(faic.runs, "clone_root", lambda: place)
            for name, value in environment.items():
                patch.setenv(name, value)
            return faic.runs.code_commit.__wrapped__()  # not what this process has recorded before

    return commit


def test_an_archive_records_no_other_repositorys_commit(archive, recorded):
    project = archive.parent
    unknown = f"unknown (faic {__version__} without a git repository)"
    code = "from faic.runs import code_commit; print(code_commit())"
    done = subprocess.run([sys.executable, "-c", code], cwd=archive, capture_output=True, text=True)
    assert done.stdout.strip() == unknown, done.stderr
    assert recorded(archive) == unknown
    assert recorded(archive, GIT_DIR=str(project / ".git")) == unknown, "git's hooks set this variable"
    git(project, "add", ".")
    git(project, "commit", "-m", "with a copy of FAIC")
    assert recorded(archive) == unknown, "a commit of the other project is none of FAIC's"
    for name in ("nbs", "faic"):
        shutil.copytree(archive / name, project / name, dirs_exist_ok=True)
    shutil.rmtree(archive / "nbs")
    assert recorded(project) == f"unknown (faic {__version__} is not tracked by git)", "unpacked over the other project"


def test_a_repository_of_its_own_is_recorded_and_so_are_changes(archive, recorded, tmp_path):
    git(archive, "init")
    assert recorded(archive) == "unknown (git cannot read the repository)", "nothing is committed"
    git(archive, "add", ".")
    git(archive, "commit", "-m", "FAIC")
    commit = git(archive, "rev-parse", "--short=10", "HEAD")
    assert recorded(archive) == commit
    assert recorded(archive, GIT_DIR=str(archive.parent / ".git"), GIT_INDEX_FILE="/nowhere") == commit
    git(archive, "worktree", "add", tmp_path / "worktree")
    assert recorded(tmp_path / "worktree") == commit
    git(tmp_path, "clone", "--depth", "1", f"file://{archive}", "shallow")
    assert recorded(tmp_path / "shallow") == commit
    (archive / "untracked.txt").write_text("")
    (archive / "faic" / "core.py").chmod(0o755)
    assert recorded(archive) == commit, "neither is a change of the code"
    with open(archive / "faic" / "core.py", "a") as f:
        f.write("# changed")
    assert recorded(archive) == f"{commit}+changes"
    assert recorded(archive, PATH=str(tmp_path)) == "unknown (no git)"


def test_edits_after_the_first_run_are_not_the_code_of_this_process(monkeypatch):
    commit = faic.runs.code_commit()
    monkeypatch.setattr(faic.runs, "_git", lambda clone, *words: "later")
    assert faic.runs.code_commit() == commit


def test_a_clone_that_another_user_owns_is_recorded(archive, recorded):
    """Git refuses it unless its folder is named: the usual case of a container that runs as root."""
    git(archive, "init")
    git(archive, "add", ".")
    git(archive, "commit", "-m", "FAIC")
    commit = git(archive, "rev-parse", "--short=10", "HEAD")
    if os.getuid():
        pytest.skip("only an administrator can give files away")
    for folder, _, files in os.walk(archive):
        for path in (folder, *(os.path.join(folder, f) for f in files)):
            os.chown(path, 12345, 12345)
    refused = subprocess.run(["git", "status"], cwd=archive, capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    assert recorded(archive) == commit


# kernels


def test_a_notebook_runs_in_this_interpreter_with_this_code(tmp_path, monkeypatch):
    """A kernel of the same name that belongs to another Python, and another copy of FAIC in the current folder."""
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    write_json(spec, dict(argv=["/another/python", "-f", "{connection_file}"], display_name="x", language="python"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    (tmp_path / "faic").mkdir()
    (tmp_path / "faic" / "__init__.py").write_text("raise RuntimeError('another copy')")
    monkeypatch.chdir(tmp_path)
    source = "import os, sys, faic\nprint(sys.executable, faic.__file__, os.environ['FAIC_RUNS'], sep='\\n')"
    notebook = new_notebook(tmp_path / "asks.ipynb", source)
    monkeypatch.setattr(faic.study, "notebook_path", lambda name: notebook)
    (tmp_path / "out").mkdir()
    executed = faic.study.run_notebook("asks", {}, tmp_path / "out")
    assert printed(executed) == [sys.executable, faic.__file__, str(runs_dir())]


@pytest.mark.parametrize("name", PAPERMILL)
def test_a_notebook_says_which_python_lacks_faic(name, monkeypatch):
    cells = [cell for cell in nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]
    assert "parameters" in cells[0].metadata.tags
    for found in (None, SimpleNamespace(origin=None)):  # the second is a folder of that name, such as a clone
        specs = dict.fromkeys(("torch", "ignite", "skimage"), SimpleNamespace(origin="a file")) | dict(faic=found)
        monkeypatch.setattr("importlib.util.find_spec", specs.get)
        namespace = {}
        exec(cells[1].source, namespace)
        reason = f"{sys.executable} has no faic.*pip install.*papermill -k.*faic run"
        with pytest.raises(ModuleNotFoundError, match=reason):
            exec(cells[2].source, namespace)
    monkeypatch.undo()
    exec(cells[1].source + "\n" + cells[2].source, {})


def test_a_notebook_refuses_the_code_of_another_clone(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(faic.core, "kernel_shell", lambda: "a kernel")
    check = faic.core.require_same_clone
    for folder in (tmp_path, ROOT, ROOT / "nbs"):
        monkeypatch.chdir(folder)
        check()
    for folder in (archive, archive / "nbs"):  # as papermill and JupyterLab start there
        monkeypatch.chdir(folder)
        with pytest.raises(RuntimeError, match=f"the clone {archive}, but {sys.executable} takes faic from {ROOT};"):
            check()
    monkeypatch.setenv("FAIC_NOTEBOOK", "phase1")  # faic run takes its own notebook
    check()


# folders


def test_each_command_names_the_variable_of_a_folder_that_cannot_be_written(small_disk, monkeypatch):
    clone = small_disk("1m")
    for name in ("runs", "figures"):
        (clone / name).mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(clone)], check=True)
    for variable in ("FAIC_RUNS", "FAIC_FIGURES"):
        monkeypatch.delenv(variable)
    monkeypatch.setattr(faic.core, "clone_root", lambda: clone)
    reason = r"cannot be written \(Read-only file system\).* name another .*"
    for words in [("study",), *(("run", name) for name in PAPERMILL), ("cluster", "run", "--preset", "smoke")]:
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 1 and re.search(reason + "FAIC_(RUNS|FIGURES)", done.output), (words, done.output)
        assert done.output.count("\n") == 1, "one sentence, no traceback"
    done = CliRunner().invoke(main, ["run", "phase1", "--function"])
    assert re.search(reason + "FAIC_RUNS", str(done.exception)), done.exception
    for words in (["status"], ["status", "--preset", "smoke"], ["cluster", "plan", "--preset", "smoke"]):
        assert CliRunner().invoke(main, words).exit_code == 0, f"{words} writes nothing"

    monkeypatch.setenv("FAIC_RUNS", str(clone.parent / "elsewhere"))
    done = CliRunner().invoke(main, ["study"])
    assert re.search(rf"Error: {clone}/figures cannot be written .*FAIC_FIGURES", done.output), "before hours of work"


# a wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with FAIC from a wheel; it sees the packages of this one, but not this clone."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("nbs", "faic"):
        shutil.copytree(ROOT / name, place / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / name, place / "source")
    (place / "source" / "faic" / "weights").mkdir(exist_ok=True)
    (place / "source" / "faic" / "weights" / "small.md").write_text("a card")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", place, place / "source"]
    subprocess.run(build, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    python = place / "venv" / "bin" / "python"
    (wheel,) = place.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "--quiet", "--no-deps", "--no-index", "-I", wheel], check=True)
    shutil.rmtree(place / "source")
    (packages,) = (place / "venv").glob("lib/python*/site-packages")
    (packages / "more.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_a_wheel_brings_its_notebooks_and_writes_into_the_current_folder(installed, photographs, tmp_path, monkeypatch):
    for variable in ("FAIC_RUNS", "FAIC_FIGURES", "PYTHONPATH"):
        monkeypatch.delenv(variable, raising=False)
    (package,) = installed.parents[1].glob("lib/python*/site-packages/faic")
    assert (package / "weights" / "small.md").read_text() == "a card"
    for name in PAPERMILL:
        assert (package / "notebooks" / f"{name}.ipynb").read_bytes() == (ROOT / "nbs" / f"{name}.ipynb").read_bytes()

    git(tmp_path, "init")  # a folder with a repository of its own
    start = [installed.with_name("faic"), "run", "phase2", "-p", "model", "pix2pix", "-p", "data", photographs]
    done = subprocess.run([*start, "-p", "budget", "1 steps"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Runs are in {tmp_path}/runs, tables and figures in {tmp_path}/figures" in done.stderr
    (options,) = tmp_path.glob("runs/phase2-pix2pix-*/options.json")
    assert read_json(options)["made"]["commit"] == f"unknown (faic {__version__} without a git repository)"
    assert Path(done.stdout.strip()).parents[1] == tmp_path / "runs"
