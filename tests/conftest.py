"""Every test session gets fresh folders for runs and figures, so that no test sees or touches a real run."""
import os
import tempfile

FOLDERS = tempfile.TemporaryDirectory(prefix="faic-tests-")
os.environ["FAIC_RUNS"] = f"{FOLDERS.name}/runs"
os.environ["FAIC_FIGURES"] = f"{FOLDERS.name}/figures"
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: longer than the ten minutes of `make test` allow; run with `pytest -m slow`")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
