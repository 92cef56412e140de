"""Every test session gets fresh folders for runs and figures, so that no test sees or touches a real run."""

import os
import tempfile

import pytest

FOLDERS = tempfile.TemporaryDirectory(prefix="faic-tests-")
os.environ["FAIC_RUNS"] = f"{FOLDERS.name}/runs"
os.environ["FAIC_FIGURES"] = f"{FOLDERS.name}/figures"
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: longer than the ten minutes of `make test` allow; run with `pytest -m slow`"
    )
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A user's folder: a third of the embedded photographs as 72 files, so that an evaluation has few images to score."""
    from PIL import Image

    from faic.dataset import load_photos

    folder = tmp_path_factory.mktemp("data") / "photographs"
    folder.mkdir()
    for i, pixels in enumerate(load_photos().array[::3]):
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder
