"""Every test session gets fresh folders for runs and figures, so that no test sees or touches a real run."""
import os
import tempfile

FOLDERS = tempfile.TemporaryDirectory(prefix="faic-tests-")
os.environ["FAIC_RUNS"] = f"{FOLDERS.name}/runs"
os.environ["FAIC_FIGURES"] = f"{FOLDERS.name}/figures"
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: longer than the ten minutes of `make test` allow; run with `pytest -m slow`")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
