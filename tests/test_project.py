"""The project holds together: exports, notebooks, README, imports, and the notebooks' own checks."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = {nb.stem.split("_", 1)[1]: int(nb.stem[:2]) for nb in NOTEBOOKS if nb.stem[:2].isdigit()}
MODULES["__main__"] = MODULES.pop("main")
PAPERMILL = ("phase1", "phase2", "inference_time", "results", "failures", "colorize")


def run(*command, programs=(), **kwargs):
    """Run a command with this interpreter's programs first in PATH, and those of further folders before them."""
    places = os.pathsep.join(map(str, [*programs, Path(sys.executable).parent, os.environ["PATH"]]))
    environment = {**os.environ, "PATH": places}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, **kwargs)


def cells(notebook, kind="code"):
    """The cells of a kind of a notebook."""
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == kind]


@pytest.fixture
def copy(tmp_path):
    """A copy of the sources that nbdev may write into."""
    for name in ("nbs", "faic"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def differing(a, b, pattern):
    """Names of files that only one of two folders has, or that differ."""
    ours, theirs = ({f.name: f.read_bytes() for f in folder.glob(pattern)} for folder in (a, b))
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def test_package_is_a_fresh_export(copy):
    for f in (copy / "faic").glob("*.py"):
        if f.name != "__init__.py":
            f.unlink()
    (copy / "faic" / "weights").mkdir(exist_ok=True)
    (copy / "faic" / "weights" / "default.txt").touch()
    assert run("nbdev_export", cwd=copy).returncode == 0
    assert (copy / "faic" / "weights" / "default.txt").exists()
    assert not differing(copy / "faic", ROOT / "faic", "*.py"), "run nbdev_export and commit faic/"


def test_notebooks_are_clean(copy):
    assert run("nbdev_clean", cwd=copy).returncode == 0
    assert not differing(copy / "nbs", ROOT / "nbs", "*.ipynb"), "run nbdev_clean and commit nbs/"


def test_readme_is_the_index_notebook():
    words = ["--to", "markdown", "--no-input", "--stdout", ROOT / "nbs" / "index.ipynb"]
    made = run(sys.executable, "-m", "nbconvert", *words)
    assert made.returncode == 0, made.stderr
    squeezed = re.sub(r"\n{3,}", "\n\n", made.stdout)
    assert squeezed == (ROOT / "README.md").read_text(), "run make readme and commit README.md"


def test_papermill_notebooks_have_one_parameters_cell():
    """Without the tag papermill warns, and the notebook's own values silently win over the user's."""
    for name in PAPERMILL:
        nb = ROOT / "nbs" / f"{name}.ipynb"
        assert sum("parameters" in c["metadata"].get("tags", []) for c in cells(nb)) == 1, name
        assert "skip_exec: true" in "".join(cells(nb, "markdown")[0]["source"]), name


def test_a_notebook_imports_only_from_smaller_numbers():
    numbers = [nb.stem[:2] for nb in NOTEBOOKS if nb.stem[:2].isdigit()]
    assert len(set(numbers)) == len(numbers)
    for nb in NOTEBOOKS:
        if not nb.stem[:2].isdigit():
            continue
        sources = ["".join(cell["source"]) for cell in cells(nb)]
        source = "\n".join(s for s in sources if re.search(r"^#\| export", s, re.M))
        for module in re.findall(r"^\s*(?:from|import) faic\.(\w+)", source, re.M):
            assert MODULES[module] < int(nb.stem[:2]), f"{nb.name} imports faic.{module}"
        assert "import *" not in source, nb.name


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=[nb.stem for nb in NOTEBOOKS])
def test_a_cell_imports_or_computes(nb):
    """nbdev's documentation tools run every cell that imports, and no cell that only computes."""
    for cell in cells(nb):
        source = "".join(cell["source"])
        body, imports = ast.parse(source).body, (ast.Import, ast.ImportFrom)
        importing = [isinstance(node, imports) for node in body]
        assert all(importing) or not any(importing), f"split the cell {cell['id']}:\n{source}"
        inner = any(isinstance(node, imports) for node in ast.walk(ast.Module(body, [])))
        assert all(importing) or not inner or "#| export" in source, f"move the import of {cell['id']} up:\n{source}"


@pytest.mark.slow
def test_documentation_tools_run_through(copy, tmp_path_factory):
    shutil.copy(ROOT / "README.md", copy)
    quarto = tmp_path_factory.mktemp("programs") / "quarto"  # where there is none, nbdev would install it, and the copy
    quarto.write_text("#!/bin/sh\n")
    quarto.chmod(0o755)
    done = run("nbdev_proc_nbs", "--n_workers", "0", cwd=copy, programs=[quarto.parent])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "imports and other code" not in done.stderr, done.stderr[-3000:]
    assert {f.stem for f in (copy / "_proc").glob("*.ipynb")} == {nb.stem for nb in NOTEBOOKS}


def test_package_needs_neither_nbdev_nor_papermill():
    """Models, loop and metrics run where only torch, ignite and the scientific stack are installed."""
    modules = ", ".join(f"faic.{m}" for m in MODULES if m != "ignite_metrics")
    blocked = "nbdev fastcore execnb papermill nbformat nbclient jupyterlab IPython ipykernel".split()
    blocked += ["torchvision", "submitit", "psutil", "gradio", "ipywidgets"]
    code = f"import sys\nfor m in {blocked}: sys.modules[m] = None\nimport {modules}"
    code += "\nassert 'ignite' not in sys.modules, 'ignite takes 1.5 s to import, and only a training needs it'"
    code += "\nimport faic.ignite_metrics"
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def package(specifier):
    """The name in a requirement such as 'torch>=2.6.0,<3'."""
    return re.split(r"[<>=!~\[]", specifier)[0].lower().replace("_", "-")


def test_every_direct_dependency_is_pinned():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    named = set()
    for extra in ("", "dev_", "cluster_", "watch_", "formats_", "onnx_", "docs_", "app_"):
        named |= {package(specifier) for specifier in shlex.split(config["DEFAULT"][f"{extra}requirements"])}
    pinned = {package(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert named <= pinned, f"not in constraints.txt: {sorted(named - pinned)}"


def test_every_requirement_states_a_lower_bound(monkeypatch):
    """The bounds that tests/trials/floors.py has proved."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "trials")
    from floors import floors

    bounds, lines = floors(), (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {package(line): line.partition("==")[2] for line in lines}
    assert Version(bounds["torch"]) >= Version("2.6"), "weights_only is unsafe before (CVE-2025-32434)"
    assert Version(bounds["scipy"]) >= Version("1.15"), "bootstrap lacks rng before"
    above = {name: bound for name, bound in bounds.items() if Version(bound) > Version(pinned[package(name)])}
    assert not above, f"constraints.txt pins lower versions: {above}"


def test_nbdev_test_runs_every_notebook():
    """nbdev_test exits with 0 when it finds nothing to run, so what it ran is counted."""
    done = run("nbdev_test", "--do_print", cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ran = set(re.findall(r"Completed .*?([\w]+)\.ipynb", done.stdout + done.stderr))
    assert ran == {nb.stem for nb in NOTEBOOKS} - set(PAPERMILL)
