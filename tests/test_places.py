"""Where FAIC runs: in a notebook, from a wheel, inside another repository, with several Pythons."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from papermill.clientwrap import PapermillNotebookClient

import faic.runs
from faic import __version__

ROOT = Path(__file__).resolve().parents[1]

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
            return faic.runs.code_commit()

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
