"""What all tests share: folders for runs and figures, which tests run, and in which order."""

import os
import shutil
import subprocess
import tempfile

import pytest

FOLDERS = tempfile.TemporaryDirectory(prefix="faic-tests-")  # no test sees or touches a real run
os.environ["FAIC_RUNS"] = f"{FOLDERS.name}/runs"
os.environ["FAIC_FIGURES"] = f"{FOLDERS.name}/figures"
os.environ["FAIC_WEIGHTS"] = f"{FOLDERS.name}/weights"  # and none the released weights, unless it names them
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

# The files that take longest, longest first: with two workers neither of them waits long for the other at the end.
LONGEST = (
    "test_project.py",
    "test_phases.py",
    "test_phases_bbdm.py",
    "test_phases_coltran.py",
    "test_places.py",
    "test_study.py",
    "test_results.py",
    "test_trials.py",
    "test_together.py",
    "test_phase_functions.py",
    "test_loop.py",
    "test_metrics.py",
    "test_golden_coltran.py",
)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: too long for `make test`; run with `pytest -m slow`")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
    if hasattr(config.option, "loadscopereorder"):  # xdist would begin with the files of the most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Begin with the longest files; the others follow in the order of their names."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A user's folder: a third of the embedded photographs as 72 files, so that an evaluation scores few images."""
    from PIL import Image

    from faic.dataset import load_photos

    folder = tmp_path_factory.mktemp("data") / "photographs"
    folder.mkdir()
    for i, pixels in enumerate(load_photos().array[::3]):
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of some bytes and returns its folder."""
    mounted = []

    def mount(size, options="rw"):
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        done = (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size},{options}", "tmpfs", str(path)], capture_output=True
            )
            if shutil.which("mount")
            else None
        )
        if done is None or done.returncode:
            pytest.skip("no small disk can be mounted here: that needs the rights of an administrator")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)
