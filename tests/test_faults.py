"""What days of training meet: full and read-only disks, too little memory, damaged checkpoints, those of other models.

Nothing that was finished is lost.
"""

import contextlib
import errno
import re
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from faic.core import Budget, pick_device, read_json, sample_per_image
from faic.evaluate import retry_on_oom
from faic.resume import TrainingStopped
from faic.runs import open_run
from faic.trainer import Trainer, train_day

PHOTOGRAPHS = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
OPTIONS = dict(
    batch_size=4, optimizer="adam", lr=0.01, beta1=0.9, beta2=0.999, schedule="half", crop=8, flip=True, seed=0
)


class Wide:
    """A trainee of 256 KiB, so that its checkpoints can fill a small disk; it learns the mean color, with noise."""

    gray_kind = "lab"

    def __init__(self, at=None, do=None):
        self.net, self.calls, self.at, self.do = nn.Linear(1, 2**16, bias=False), 0, at, do
        nn.init.zeros_(self.net.weight)

    def networks(self):
        return {"net": self.net}

    def losses(self, batch, generator):
        self.calls += 1
        if self.calls == self.at:
            self.do()
        target = batch["rgb"].mean((1, 2, 3))[:, None] + 0.1 * sample_per_image(
            torch.rand, (len(batch["index"]), 1), generator
        )
        yield "net", (self.net(torch.ones(1, 1)) - target).square().mean()


def trainer(folder, monkeypatch, trainee=None, **more):
    """Two days of 50 steps, with a checkpoint at every look."""
    monkeypatch.setenv("FAIC_RUNS", str(folder))
    run = open_run(dict(phase="test", model="wide", preset="none", seed=0), pick_device("cpu"))
    trainee, budget = trainee or Wide(), Budget(100, "steps")
    return Trainer(trainee, run, PHOTOGRAPHS, np.arange(8), budget, OPTIONS, 2, save_minutes=0, **more).resume()


def train(trainer):
    return [train_day(trainer, day) for day in (1, 2)]


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """The weights of both days of a run that nothing happens to."""
    return [load_file(f) for f in train(trainer(tmp_path / "whole", monkeypatch))]


def same(files, whole):
    return all(torch.equal(load_file(f)[k], w[k]) for f, w in zip(files, whole, strict=True) for k in w)


@contextlib.contextmanager
def small_disk(folder, size="6m"):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk; run as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    """Leave no room on a disk; the file that takes it."""
    path, block = folder / "filler", 2**20
    with open(path, "wb", buffering=0) as f:
        while block:
            try:
                f.write(bytes(block))
            except OSError as e:
                assert e.errno == errno.ENOSPC
                block //= 2
    return path


def test_a_full_disk_costs_checkpoints_but_no_day(tmp_path, monkeypatch, whole, capsys):
    """On a disk that is full from step 60 on, training continues to the end of day 2 and stops; with room it ends.

    The weights are those of an undisturbed run to the bit.
    """
    with small_disk(tmp_path / "disk") as disk:
        filled = []
        t = trainer(disk, monkeypatch, Wide(at=60, do=lambda: filled.append(fill(disk))))
        full = "No space left on device .* MB are free.*the same command then (goes on|continues) from last.pt, step 50"
        with pytest.raises(TrainingStopped, match=full):
            train(t)
        assert "no checkpoint, No space left on device" in capsys.readouterr().out and t.step == 100
        assert t.day_weights(1).exists() and not t.day_weights(2).exists() and not list(t.run.path.glob(".*.part"))
        with pytest.raises(
            TrainingStopped, match="needs .* GB for its checkpoints and days, and .* GB left; free some"
        ):
            trainer(disk, monkeypatch)
        filled[0].unlink()
        again = trainer(disk, monkeypatch)
        assert again.step == 50 and same(train(again), whole)
        assert not (again.run.path / "error.json").exists()


def test_a_folder_that_became_read_only_keeps_its_days(tmp_path, monkeypatch, whole):
    with small_disk(tmp_path / "disk") as disk:

        def remount(mode):
            subprocess.run(["mount", "-o", f"remount,{mode}", disk], check=True, capture_output=True)

        t = trainer(disk, monkeypatch)
        train_day(t, 1)
        from faic.resume import _LOCKS

        _LOCKS.pop(t.run.path.resolve() / "lock").release()
        remount("ro")
        unwritable = r"cannot be written \(Read-only file system\); make it writable, or name another place"
        with pytest.raises(TrainingStopped, match=unwritable):
            trainer(disk, monkeypatch)
        remount("rw")
        assert same(train(trainer(disk, monkeypatch)), whole)


def press_ctrl_c():
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, monkeypatch, whole, capsys, damage):
    t = trainer(tmp_path / "runs", monkeypatch, Wide(at=90, do=press_ctrl_c))
    with pytest.raises(KeyboardInterrupt):
        train(t)
    content = bytearray(t.checkpoint.read_bytes())
    if damage == "cut":
        t.checkpoint.write_bytes(content[:-100])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        t.checkpoint.write_bytes(content)
    else:
        t.checkpoint.unlink()
    again = trainer(tmp_path / "runs", monkeypatch)
    output = capsys.readouterr().out
    assert again.step == 50 and re.search("damaged or missing: (going on|continuing) from previous.pt, step 50", output)
    assert same(train(again), whole)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, monkeypatch):
    t = trainer(tmp_path / "runs", monkeypatch)
    train_day(t, 1)
    other = Wide()
    other.net = nn.Linear(1, 3)
    with pytest.raises(TrainingStopped, match="(?s)of other networks than test-wide.*move .* away to train it again"):
        trainer(tmp_path / "runs", monkeypatch, other)
    assert t.day_weights(1).exists()


def test_too_little_memory_is_met_by_pieces(tmp_path, monkeypatch, whole):
    """Stopped by an allocator that has not enough, the run goes on in two pieces and keeps its days."""
    t = trainer(tmp_path / "runs", monkeypatch, Wide(at=60, do=lambda: torch.empty(2**60, dtype=torch.uint8)))
    with pytest.raises(
        TrainingStopped,
        match="step 60: out of memory on cpu. Start again with -p micro_batches 2.*Last checkpoint: last.pt, step 50",
    ):
        train(t)
    assert read_json(t.run.path / "error.json")["error"] == "TrainingStopped"
    first, second = train(trainer(tmp_path / "runs", monkeypatch, micro_batches=2))
    assert same([first], whole[:1])
    torch.testing.assert_close(load_file(second), whole[1], rtol=1e-5, atol=1e-6)


def test_an_evaluation_that_does_not_fit_is_cut_in_halves():
    sizes = []

    def colorize(gray, generators):
        sizes.append(len(gray))
        if len(gray) > 3:
            torch.empty(2**60, dtype=torch.uint8)
        return gray.expand(-1, 3, -1, -1) + torch.stack([torch.rand(1, 1, 1, generator=g) for g in generators])

    gray, seeds = torch.rand(10, 1, 4, 4), lambda: [torch.Generator().manual_seed(i) for i in range(10)]
    halves = retry_on_oom(colorize, gray, seeds())
    assert sizes == [10, 5, 2, 3, 5, 2, 3]
    assert torch.equal(halves, torch.cat([colorize(gray[i : i + 1], [g]) for i, g in enumerate(seeds())]))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        retry_on_oom(lambda gray, generators: torch.empty(2**60, dtype=torch.uint8), gray, seeds())


def test_a_kill_while_a_checkpoint_is_written_leaves_no_litter(tmp_path, monkeypatch, whole):
    t = trainer(tmp_path / "runs", monkeypatch)
    train_day(t, 1)
    (t.run.path / ".next.pt.12345.part").write_bytes(b"half of a checkpoint")
    again = trainer(tmp_path / "runs", monkeypatch)
    assert not list(again.run.path.glob(".*.part")) and same(train(again), whole)


def test_nothing_but_the_steps_own_generator_is_drawn_from(tmp_path, monkeypatch):
    """So there is no random state that a checkpoint would have to hold."""
    import together

    step, states = (
        together.train_step,
        lambda: (torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64))),
    )

    def watched(trainer, batch):
        before = states()
        losses = step(trainer, batch)
        assert all(map(torch.equal, before, states())), type(trainer.trainee.trainee)
        return losses

    monkeypatch.setattr(together, "train_step", watched)
    for name in together.TRAINEES:
        (tmp_path / name).mkdir()
        together.train(name, torch.float32, 6, tmp_path)
