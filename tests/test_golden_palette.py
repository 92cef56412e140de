"""Palette against numbers of the reference implementation.

A set has arrays.npz and the official 10_Network.pth; golden.py lists where sets lie. The repository's set has no
checkpoint: the test writes it from weights that follow from each tensor's name and a seed.
"""

import json

import numpy as np
import pytest
import torch
from golden import DEVICE, Golden, close, close_loss, close_stats, recipe, sets, stats_of

from faic.core import Budget
from faic.diffusion import add_noise, estimate_x0, linear_gammas, p_sample_loop, sampler_calls, sampling_levels
from faic.diffusion import schedule_tables, step_coefficients
from faic.layers import timestep_embedding
from faic.palette import Palette, load_palette, official_names, palette_colorizer, save_palette
from faic.runs import Run
from faic.train import train_step
from faic.trainer import Trainer

PASS, LOSS = 5e-5, 1e-5  # absolute: activations of a pass and the last state of a sampling; relative: losses


class PaletteGolden(Golden):
    """A set of Palette, its file and the model read from it."""

    def __init__(self, folder, scratch):
        super().__init__(folder)
        self.gammas = {name: self.schedule(**self.config[name]) for name in ("train", "test")}
        self.file = folder / "10_Network.pth"
        if not self.file.exists():
            self.file = scratch / "10_Network.pth"
            state = recipe(json.loads(str(self.arrays["shapes"])), self.config["seed"])
            torch.save(schedule_tables(self.gammas["train"]) | state, self.file)
        self.model = self.load()

    def load(self):
        model = load_palette(self.file, self.config["unet"]["num_head_channels"])
        model.net.to(DEVICE).eval()
        return model

    def schedule(self, schedule, n_timestep, linear_start, linear_end):
        assert schedule == "linear"
        return linear_gammas(n_timestep, linear_start, linear_end)

    def denoise(self, x, gamma):
        return self.model.net(torch.cat([self["y_cond"], x], 1), gamma)

    def loss(self, model=None, mask=None):
        model = model or self.model
        gamma = model.level(self["loss_t"], self["loss_u"].flatten())
        return model.loss_at(self["y0"], self["y_cond"], gamma, self["noise"], mask)


@pytest.fixture(params=sets("palette"), scope="module")
def palette(request, tmp_path_factory):
    return PaletteGolden(request.param, tmp_path_factory.mktemp("palette"))


def test_checkpoint(palette, tmp_path):
    """Sizes read off the tensors are the configuration's; each tensor has its place, and is saved under its name."""
    file, u = torch.load(palette.file, weights_only=True), palette.config["unet"]
    with torch.device("meta"):
        expected = Palette(
            channels=u["inner_channel"],
            channel_mult=tuple(u["channel_mults"]),
            num_res_blocks=u["res_blocks"],
            attention_factors=tuple(u["attn_res"]),
            head_channels=u["num_head_channels"],
        ).net
    own = palette.model.net.state_dict()
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in expected.state_dict().items()}
    names = official_names(palette.model.net)
    assert all(torch.equal(own[ours].cpu(), file[theirs]) for ours, theirs in names.items())
    palette.model.train_gammas = palette.gammas["train"]
    save_palette(tmp_path / "10_Network.pth", palette.model)
    again = torch.load(tmp_path / "10_Network.pth", weights_only=True)
    assert list(again) == list(file)
    for name, tensor in file.items():
        close(again[name], tensor, 2e-6 * max(1, tensor.abs().max()))
    torch.save({n: t for n, t in file.items() if n.startswith("denoise_fn.")}, tmp_path / "10_Network_ema.pth")
    assert len(load_palette(tmp_path / "10_Network_ema.pth").train_gammas) == 2000


def test_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in Palette().net.parameters()) == 62_641_347


def test_schedules(palette):
    paper = dict(train=linear_gammas(2000, 1e-6, 0.01), test=linear_gammas(1000, 1e-4, 0.09))
    schedules = palette.gammas | {f"paper_{name}": gammas for name, gammas in paper.items()}
    for name, gammas in schedules.items():
        tables = schedule_tables(gammas)
        assert len(tables) == 6
        for table, values in tables.items():
            golden = palette[f"sched_{name}_{table}"]
            every = -(-len(values) // len(golden))
            scale = golden.abs().double().clamp_min(1).cpu()
            close(values[::every].double() / scale, golden.cpu().double() / scale, 2e-6)


@torch.no_grad()
def test_unet(palette):
    close(
        timestep_embedding(palette["gamma_in"], palette["gamma_embedding"].shape[1]), palette["gamma_embedding"], PASS
    )
    gamma = palette["unet_gamma"]
    answer = palette.denoise(palette["noise"], gamma)
    close(answer, palette["unet_out"], PASS)
    if "unet_out_gamma_b1" in palette:  # levels of shape (B,1) in the reference
        close(answer, palette["unet_out_gamma_b1"], PASS)
    close(add_noise(palette["y0"], gamma[:, None, None, None], palette["noise"]), palette["q_sample"], PASS)


def test_losses_and_gradients(palette):
    """All gradients, but those of constants that a norm removes: these are rounding errors and need only be small."""
    loss = palette.loss()
    close_loss(loss.detach(), palette["loss_l2"], LOSS)
    close_loss(palette.loss(mask=palette["mask"]).detach(), palette["loss_l2_mask"], LOSS)
    l1 = palette.load()
    l1.loss = "l1"
    close_loss(palette.loss(l1).detach(), palette["loss_l1"], LOSS)
    names = official_names(palette.model.net)
    parameters = {names[ours]: p for ours, p in palette.model.net.named_parameters()}
    gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values())))
    golden_names = palette.names("grad_names")
    prefix = "" if golden_names[0].startswith("denoise_fn.") else "denoise_fn."
    golden_names = [prefix + name for name in golden_names]
    assert sorted(golden_names) == sorted(parameters)
    ours, golden = stats_of(gradients, golden_names), palette["grad_stats"]
    real = golden[:, 2] >= 1e-5 * golden[:, 2].max()
    assert real.float().mean() > 0.5 and (ours[~real, 2] < 1e-5 * golden[:, 2].max()).all()
    close_stats(ours[real], golden[real])
    close(gradients["denoise_fn.out.2.weight"], palette["grad_out_conv"], PASS)


class FixedNoise:
    """Palette whose times and noise come with the set instead of from the loop's generator, without dropout."""

    def __init__(self, palette, model):
        self.palette, self.model, self.networks = palette, model, model.networks

    def losses(self, batch, generator):
        self.model.net.eval()
        yield "net", self.palette.loss(self.model)


def test_training_steps(palette, tmp_path):
    """The training loop with the official optimizer."""
    model, losses = palette.load(), palette["train_l2_losses"]
    options = dict(optimizer="adam", lr=5e-5, beta1=0.9, beta2=0.999, schedule="constant", batch_size=2, seed=0)
    array, budget = np.zeros((2, 1, 1, 3), np.uint8), Budget(len(losses), "steps")
    trainee, run = FixedNoise(palette, model), Run(tmp_path, options)
    trainer = Trainer(trainee, run, array, np.arange(2), budget, options, device=DEVICE)
    for golden in losses:
        close_loss(train_step(trainer, dict(index=torch.arange(2)))["net"], golden, LOSS)
        trainer.step += 1
    close(model.net.out[2].weight, palette["after3_out_conv_w"], PASS)


@torch.no_grad()
def test_posterior(palette):
    """The mean and variance of a step back, at two times of the sampling schedule."""
    gammas, times = palette.gammas["test"], palette["psample_t"]
    for row, t in enumerate(times.tolist()):
        x = palette["y_T"]
        x0_hat = estimate_x0(palette.denoise, x, float(gammas[t]))
        c = step_coefficients(gammas[t], gammas[t - 1] if t else 1.0)
        close((c.x0_hat * x0_hat + c.x * x)[row], palette["p_mean"][row], PASS)
        log_variance = 2 * np.log(c.noise) if c.noise else np.log(1e-20)
        close(log_variance, palette["p_logvar"][row].squeeze(), PASS)


@torch.no_grad()
def test_sampling(palette):
    """DDPM's walk back with the set's noise: the end, and the states that the reference keeps on the way."""
    gammas = palette.gammas["test"]
    calls = sampler_calls("ddpm", lambda count: sampling_levels(gammas, count), len(gammas))
    noise = iter(palette["sample_noise"])
    states = [s.x for s in p_sample_loop(palette.denoise, calls, palette["y_T"], noise)]
    assert next(noise, None) is None
    close(states[-1], palette["sample_out"], PASS)
    every = len(gammas) // int(palette["sample_num"])
    kept = [palette["y_T"]] + [x for t, x in zip(range(len(gammas) - 1, -1, -1), states) if t % every == 0]
    close(torch.stack([x[0, 0] for x in kept]), palette["sample_ret_arr_b0c0"], PASS)
    assert len(kept) * len(palette["y_T"]) == int(palette["sample_ret_arr_shape"][0])


@torch.no_grad()
def test_colorizer(palette, monkeypatch):
    """A user's call, from gray to color, with the set's noise."""
    y_cond = palette["y_cond"]
    model, gray = palette.load(), (y_cond[:, :1] + 1) / 2
    if not torch.equal(y_cond, y_cond[:, :1].expand_as(y_cond)):
        model.condition = lambda gray: y_cond
    model.test_gammas = palette.gammas["test"]
    noise = iter([*palette["y_T"], *palette["sample_noise"].flatten(0, 1)])
    colorize = palette_colorizer(model, steps=len(model.test_gammas))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda shape, generator=None, device=None: next(noise).reshape(shape))
        rgb = colorize(gray, [torch.Generator()] * len(gray))
    assert next(noise, None) is None
    close(rgb, ((palette["sample_out"] + 1) / 2).clamp(0, 1), PASS)
