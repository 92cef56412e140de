"""What is prepared for a GPU is rehearsed on the CPU, and nothing that goes wrong there wastes the machine's time."""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faic.dataset import load_photos

TRIALS = Path(__file__).resolve().parent / "trials"
sys.path.insert(0, str(TRIALS))

import gpu_collect  # noqa: E402
import gpu_photos  # noqa: E402
from gpu_stage import Item, Lane, supervise  # noqa: E402


def test_rehearsal(tmp_path):
    """Every stage at toy size, a minute on an idle core; the seconds are printed, not compared."""
    command = [sys.executable, str(TRIALS / "gpu.py"), "--rehearse"]
    environment = os.environ | dict(OMP_NUM_THREADS="1")  # the other worker has a core, too
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    print(done.stdout)
    assert done.returncode == 0 and "everything was done" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    for line in (
        "pack: photos-2.npz",
        "check: 9 of 9 items done",
        "speed: 10 of 10 items done",
        "train: 10 of 10 items done",
    ):
        assert line in done.stdout
    assert "`results` uses 11 runs" in done.stdout and "is phase 1's winner" in done.stdout


def items(*rows):
    """A function that makes items of (name, limit in seconds, work)."""

    def make():
        return [Item(name, work, limit=limit, least=0.1) for name, limit, work in rows]

    return make


def states(report, lane="lane"):
    return {r["name"]: r["state"] for r in report["lanes"][lane]}


def test_a_stage_continues_after_items_that_fail_hang_or_die(tmp_path, monkeypatch):
    """An error, a loop, one that takes no signal, a process that dies, a lost GPU: the item after them is done."""
    monkeypatch.setattr("gpu_stage.GRACE", 1)

    def loop(seconds):
        while True:
            time.sleep(0.01)

    def deaf(seconds):
        import signal

        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        loop(seconds)

    def lost(seconds):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    changes = []
    lane = Lane(
        "lane",
        items(
            ("error", 9, lambda s: 1 / 0),
            ("loop", 0.5, loop),
            ("deaf", 0.5, deaf),
            ("dies", 9, lambda s: os._exit(9)),
            ("lost", 9, lost),
            ("after", 9, lambda s: dict(line="fine", pid=os.getpid())),
        ),
    )
    report = supervise("trial", tmp_path, 60, [lane], changed=lambda: changes.append(1))
    expected = dict.fromkeys(("error", "loop", "deaf", "dies", "lost"), "failed")
    assert states(report) == expected | dict(after="done")
    errors = {r["name"]: r.get("error", "") for r in report["lanes"]["lane"]}
    assert "ZeroDivisionError" in errors["error"] and "longer than" in errors["loop"]
    assert "ended" in errors["deaf"] and "(9)" in errors["dies"]
    assert json.loads((tmp_path / "trial.json").read_text())["lanes"] == json.loads(json.dumps(report["lanes"]))
    assert changes and report["seconds"] < 20


def test_a_stage_ends_in_time_and_keeps_what_it_has(tmp_path):
    """Later items are skipped, lanes run side by side, and a wave waits for the one before."""
    first = Lane(
        "first",
        items(
            ("quick", 9, lambda s: dict(number=np.int64(3))),
            ("slow", 60, lambda s: time.sleep(60)),
            ("last", 9, lambda s: {}),
        ),
    )
    second = Lane("second", items(("beside", 9, lambda s: {})))
    third = Lane("third", items(("afterwards", 9, lambda s: {})), wave=1)
    report = supervise("trial", tmp_path, 4, [first, second, third])  # a busy machine takes seconds to fork
    assert states(report, "first") == dict(quick="done", slow="failed", last="skipped")
    assert states(report, "second") == dict(beside="done") and states(report, "third") == dict(afterwards="skipped")
    assert report["lanes"]["first"][0]["found"] == dict(number=3) and report["seconds"] < 10


@pytest.fixture
def folder(tmp_path):
    """108 photographs: 105 JPEGs of 32x32 and three of another size; two are stored as gray, eight more look gray."""
    for i, pixels in enumerate(load_photos().array[::2]):
        picture = Image.fromarray(pixels).resize((32, 32)) if i % 36 != 5 else Image.fromarray(pixels)
        file = tmp_path / "my photos" / f"class{i % 3}" / f"{i:03}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        (picture.convert("L") if i % 54 == 3 else picture).save(file, quality=75)
    return tmp_path / "my photos"


def test_packed_photographs_are_split_as_their_folder_is(folder, tmp_path, monkeypatch):
    """Together or alone, chunks keep every photograph in its split; JPEGs arrive unchanged, gray ones are left out."""
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    found = gpu_photos.pack(folder, tmp_path / "packed", 32, dict(train=72, validation=4, test=4), [18_000, 40 * 2**20])
    assert len(found["chunks"]) == 2 and sum(c["train"] for c in found["chunks"]) == 72 and found["gray"] == 10
    whole = load_photos(str(folder), 32)
    used = whole.manifest[whole.manifest["row"] >= 0].set_index("row")
    splits = {s: set(used.loc[whole.splits[s], "file"]) for s in gpu_photos.SPLITS}
    gray = set(used.loc[used["gray"], "file"])
    chunks = sorted((tmp_path / "packed").glob("photos-*.npz"))
    with ProcessPoolExecutor(1) as pool:
        for k, some in enumerate((chunks, chunks[:1], chunks[1:])):
            _, photos, about = gpu_photos.unpack(some, tmp_path / f"machine-{k}", pool)
            arrived = photos.manifest.set_index("row")
            for split in gpu_photos.SPLITS:
                files = set(arrived.loc[photos.splits[split], "file"])
                assert len(files) == sum(c[split] for c in found["chunks"] if c["file"] in [f.name for f in some])
                assert files <= splits[split] - gray
            assert photos.name == folder.name and about["whole"]["fingerprint"] == whole.fingerprint
    same = [f for f in arrived["file"] if Image.open(folder / f).size == (32, 32)]
    assert len(same) > 20
    for f in same:
        assert (tmp_path / "machine-2" / "photographs" / f).read_bytes() == (folder / f).read_bytes()


def test_what_comes_back_is_checked(tmp_path):
    """A name that leads out of the folder of runs is refused, and options that are not those of the name."""
    for name, why in (
        ("../evil/options.json", "no file of a run"),
        ("phase1-a-b-gpu-s0-000000/options.json", "other options than its name"),
    ):
        content, file = b'{"phase": "phase1", "made": {"commit": "unknown"}}', tmp_path / f"{len(why)}.tar.xz"
        with tarfile.open(file, "w:xz") as tar:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        with pytest.raises(ValueError, match=why):
            gpu_collect.take_runs(file, tmp_path / "runs")
        assert not (tmp_path / "evil").exists() and not (tmp_path / "runs").exists()
