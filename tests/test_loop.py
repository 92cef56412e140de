"""The training loop: half precision, averages, learning rates, the number of threads, and the throughput trial."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import together
import torch
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import faic.colorize
import faic.core
import faic.distributed
import faic.resume
import faic.runs
from faic import core
from faic.batches import Batch
from faic.colorize import run_colorize
from faic.colorizer import RunColorizer
from faic.core import Budget, make_generator, pick_device
from faic.pix2pix import Pix2Pix
from faic.runs import Run
from faic.train import average_in, train_step, update
from faic.trainer import Trainer, day_batches, train_day

sys.path.append(str(Path(__file__).with_name("trials")))
SIDE, PHOTOGRAPHS = together.SIDE, 10
CPU = pick_device("cpu")
TINY = dict(
    batch_size=3, optimizer="adam", lr=0.01, beta1=0.5, beta2=0.999, schedule="constant", crop=SIDE, flip=True, seed=0
)


def trainer(folder, name, steps, **changes):
    """A trainer of one of together's trainees, with its own checkpoint after each day."""
    make, options = together.TRAINEES[name]
    pixels = np.random.default_rng(0).integers(0, 256, (PHOTOGRAPHS, SIDE + 4, SIDE + 4, 3), dtype=np.uint8)
    latents = np.random.default_rng(1).standard_normal((PHOTOGRAPHS, 2, 6, 8, 8)).astype(np.float16)
    (folder / name).mkdir(parents=True, exist_ok=True)
    run, budget = Run(folder / name, dict(model=name)), Budget(steps, "steps")
    options, latents = TINY | options | changes, latents if name in together.PREPARED else None
    return Trainer(make(), run, pixels, np.arange(PHOTOGRAPHS), budget, options, 2, prepared=latents).resume()


def weights(trainer):
    return {f"{n}.{k}": v for n, p in trainer.networks.items() for k, v in p.state_dict().items()}


@pytest.mark.parametrize("name", together.TRAINEES)
def test_a_resumed_run_in_half_precision_is_the_same_to_the_bit(tmp_path, name):
    """In bfloat16 with channels last: two days by one trainer, and by two; losses are float32 all the same."""
    half = dict(precision="bfloat16", channels_last=True)
    whole, first = (trainer(tmp_path / f, name, 6, **half) for f in ("whole", "halves"))
    train_day(whole, 1)
    train_day(whole, 2)
    train_day(first, 1)
    second = trainer(tmp_path / "halves", name, 6, **half)
    train_day(second, 2)
    a, b = weights(whole), weights(second)
    assert all(torch.equal(v, b[k]) for k, v in a.items()) and all(v.dtype != torch.bfloat16 for v in a.values())
    four = [p for net in whole.networks.values() for p in net.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in four)
    assert bool(four) == ("coltran" not in name)
    losses = train_step(second, next(day_batches(second)))
    assert {v.dtype for v in losses.values()} == {torch.float32}
    plain = trainer(tmp_path / "plain", name, 6)
    for day in (1, 2):
        train_day(plain, day)
    assert any(not torch.equal(v, weights(plain)[k]) for k, v in a.items())


def test_colors_are_converted_in_full_precision():
    """Also under autocast: bfloat16 would round Pix2Pix's target and the gray."""
    rgb = torch.randint(256, (2, 3, SIDE, SIDE), generator=make_generator("rgb"), dtype=torch.uint8)
    model, seen = Pix2Pix(SIDE, width=8), []
    model.make_losses = lambda L, ab, masks=None, adversarial=True: seen.append((L, ab)) or iter(())
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            batch = Batch(torch.arange(2), rgb, "lab")
            list(model.losses(batch, make_generator(0)))
            seen[-1] += (batch["gray"],)
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(*seen, strict=True))


def test_an_average_is_torchs_own():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ours, theirs = AveragedModel(net), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for k in range(4):
        for p in net.parameters():
            p.data.add_(torch.randn(p.shape, generator=make_generator(k, *p.shape)))
        net[1].running_mean += k
        average_in(ours, net, 0.9)
        theirs.update_parameters(net)
    assert ours.n_averaged == 4 and all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    assert not torch.equal(ours.module[0].weight, net[0].weight)


def test_a_rate_that_follows_the_loss_is_never_a_step_late(tmp_path):
    """The plateau sees a loss just before the next step; the rates are those of a plateau that sees it at once."""
    rule = dict(factor=0.5, patience=1, threshold=1e-4, cooldown=1, min_lr=1e-6)
    t = trainer(tmp_path, "bbdm", 100, schedule="plateau", plateau=rule, accumulate=1)
    once = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=t.options["lr"])
    plateau, used, expected = ReduceLROnPlateau(once, "min", threshold_mode="rel", **rule), [], []
    t.optimizers["net"].step = lambda: used.append(t.optimizers["net"].param_groups[0]["lr"])
    for loss in (5, 4, 4, 4, 4, 4, 3, 3, 3, 3, 3):
        expected.append(once.param_groups[0]["lr"])
        plateau.step(loss)
        update(t, "net", torch.tensor(float(loss)), 1.0)
    assert used == expected and len(set(used)) > 2


def flags(monkeypatch, folder, text):
    (folder / "cpuinfo").write_text(text)
    for module in (faic.core, faic.distributed, faic.runs):
        monkeypatch.setattr(module, "Path", lambda path: folder / "cpuinfo" if path == "/proc/cpuinfo" else Path(path))


CPUINFO = {  # text -> is bfloat16 native?
    "flags\t\t: sse avx512f avx512_bf16 vaes\n": True,
    "flags\t\t: sse avx512f\n": False,
    "processor\t: 0\nflags\t\t: amx_bf16\n": True,
    "Features\t: fp asimd bf16\n": True,
    "Features\t: fp asimd\n": False,
    "": False,
}


@pytest.mark.parametrize("text, native", CPUINFO.items())
def test_who_multiplies_bfloat16_itself(tmp_path, monkeypatch, text, native):
    flags(monkeypatch, tmp_path, text)
    assert core.has_bfloat16(CPU) == native
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if native else (7, 5))
    assert core.has_bfloat16(torch.device("cuda")) == native


@pytest.fixture
def four_threads(monkeypatch):
    """A machine of four cores on which nobody has chosen a number of threads; one core is busy."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(faic.core, "USUAL_THREADS", 4)
    monkeypatch.setattr(faic.core, "_THREADS", {4})
    monkeypatch.setattr(faic.core, "usable_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(faic.core, "busy_cores", lambda: 0.9)
    monkeypatch.setattr(core.set_threads, "__defaults__", (4,))
    core.free_cores.cache_clear()
    torch.set_num_threads(4)
    yield monkeypatch
    torch.set_num_threads(before)
    core.free_cores.cache_clear()


def test_busy_cores_are_left_alone(four_threads):
    assert core.leave_busy_cores() and torch.get_num_threads() == 3
    core.free_cores.cache_clear()
    four_threads.setattr(faic.core, "busy_cores", lambda: 0.6)
    assert not core.leave_busy_cores() and torch.get_num_threads() == 4


def test_colorizing_leaves_busy_cores_alone_without_a_word(four_threads, tmp_path, monkeypatch, capsys):
    """One thread too many makes it several times slower: the others wait for the one without a core."""
    used = []

    def paint(gray, generators):
        used.append(torch.get_num_threads())
        return gray.expand(-1, 3, -1, -1)

    made = RunColorizer(None, 1, paint, 32, "lab", torch.device("cpu"), dict(run="a run"))
    monkeypatch.setattr(faic.colorize, "open_run_colorizer", lambda *arguments: made)
    Image.effect_noise((50, 40), 60).save(tmp_path / "a.png")
    run_colorize(str(tmp_path / "a.png"), device="cpu")
    assert set(used) == {3} and "cores busy" not in capsys.readouterr().out


def test_a_number_that_the_user_chose_stays(four_threads):
    torch.set_num_threads(2)
    assert not core.leave_busy_cores() and torch.get_num_threads() == 2
    torch.set_num_threads(4)
    four_threads.setenv("OMP_NUM_THREADS", "4")
    assert not core.leave_busy_cores() and torch.get_num_threads() == 4


def test_a_resumed_run_keeps_its_threads(four_threads, tmp_path, capsys):
    """They decide the last bits of its sums. A run of another time keeps its own, too."""

    four_threads.setattr(faic.resume, "usable_cores", core.usable_cores)
    four_threads.setenv("FAIC_RUNS", str(tmp_path))
    train_day(trainer(tmp_path, "coltran_color", 4), 1)
    said = f"training takes the other {torch.get_num_threads()}. OMP_NUM_THREADS sets another number"
    assert torch.get_num_threads() == 3 and said in capsys.readouterr().out
    four_threads.setattr(faic.core, "busy_cores", lambda: 0.0)
    core.free_cores.cache_clear()
    trainer(tmp_path / "later", "coltran_color", 4)
    assert torch.get_num_threads() == 4
    trainer(tmp_path, "coltran_color", 4)
    assert torch.get_num_threads() == 3


def test_the_load_of_the_cores_is_measured(tmp_path, monkeypatch):
    """Of two measurements the lower one counts; niced processes, idle time and other cores do not."""
    now, ticks, stat = [0.0], iter([30, 40, 40, 40]), tmp_path / "stat"
    for module in (faic.core, faic.distributed, faic.runs):
        monkeypatch.setattr(module, "Path", lambda path: stat if path == "/proc/stat" else Path(path))
    monkeypatch.setattr(faic.core, "usable_cores", lambda: [0, 2])

    def write(n):
        rows = [
            "cpu 9 9 9 9 9 9 9 9",
            f"cpu0 {n} 7 {n} 500 9 0 0 0",
            f"cpu1 {9 * n} 0 0 0 0 0 0 0",
            f"cpu2 0 {n} 5 0 {n} 0 0 {n}",
            "intr 1 2",
        ]
        stat.write_text("\n".join(rows))

    class Clock:
        def sleep(seconds):
            now[0] += seconds
            write(next(ticks))

        def monotonic():
            return now[0]

    monkeypatch.setattr(faic.core, "time", Clock)
    monkeypatch.setattr(core.os, "sysconf", lambda name: 100)
    write(0)
    assert core.busy_cores(0.5) == pytest.approx(3 * (40 - 30) / 100 / 0.5)
    stat.unlink()
    assert core.busy_cores(0.5) == 0.0


def test_the_throughput_trial_runs(tmp_path):
    import throughput

    words = "pix2pix --preset smoke --seconds 0 --rounds 1 --warmup 1 --precision float32,bfloat16 --profile"
    changes = "batch_size=2", 'ema={"decay": 0.9, "start": 0, "every": 1}'
    items = throughput.main([*words.split(), "--set", *changes, "--out", str(tmp_path / "out.json")])["items"]
    assert [(item["model"], item["precision"]) for item in items] == [("pix2pix", "float32"), ("pix2pix", "bfloat16")]
    for item in items:
        stages = item["profile"]["stages"]
        assert item["best"] > 0 and stages["averages"] > 0
        assert {"step, with forward", "backward", "optimizer", "batch"} <= stages.keys()
    assert json.loads((tmp_path / "out.json").read_text())["items"] == items
