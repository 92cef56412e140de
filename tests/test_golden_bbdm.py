"""BBDM against numbers of the official code.

A set has arrays.npz and the official last_model.pth; golden.py lists where sets lie. The repository's set has no
checkpoint: the test writes it from weights that follow from each tensor's name and a seed.
"""

import copy
import json

import numpy as np
import pytest
import torch
from golden import DEVICE, Golden, close, close_stats, code_gap, first_stage, recipe, sets, stats_of

from faic.bbdm import Denoiser, bbdm_colorizer
from faic.bbdm_checkpoints import STATISTICS, load_bbdm, save_bbdm
from faic.bridge import Bridge, bridge_target, p_sample_loop, predict_x0, sampling_timesteps
from faic.core import Budget
from faic.layers import UNet, timestep_embedding
from faic.runs import Run
from faic.train import settle, train_step
from faic.trainer import Trainer
from faic.vqgan import VQModel
from faic.first_stages import infer_config

PASS, LOSS, LOOP = 5e-5, 1e-5, 5e-4  # absolute: activations of one pass, losses, the last state of a sampling


def unet_options(config):
    """The keyword arguments of our U-Net for the official ones."""
    u = config["unet"]
    return dict(
        model_channels=u["model_channels"],
        num_res_blocks=u["num_res_blocks"],
        channel_mult=tuple(u["channel_mult"]),
        num_heads=u["num_heads"],
        attention_factors=tuple(u["attention_resolutions"]),
        head_channels=u["num_head_channels"],
        scale_shift=u["use_scale_shift_norm"],
        resblock_updown=u["resblock_updown"],
    )


def stage_of(tensors):
    net = VQModel(**infer_config(tensors, "the file"))
    net.load_state_dict(tensors)
    return net.eval()


def shifted(tensors):
    """Other weights of the same sizes: each tensor is replaced by the next one of its shape."""
    groups = {}
    for name, t in tensors.items():
        groups.setdefault(t.shape, []).append(name)
    found = {}
    for name, t in tensors.items():
        group = groups[t.shape]
        found[name] = tensors[group[(group.index(name) + 1) % len(group)]]
    return found


class BridgeGolden(Golden):
    """A set of BBDM, its file and the model read from it."""

    def __init__(self, folder, scratch):
        super().__init__(folder)
        self.file, self.extra = folder / "last_model.pth", self.config["extra"]
        self.early, self.normal = (bool(self.extra.get(k)) for k in ("latent_before_quant_conv", "normalize_latent"))
        if not self.file.exists():
            self.file = scratch / "last_model.pth"
            state = recipe(json.loads(str(self.arrays["shapes"])), self.config["seed"])
            b = dict(num_timesteps=1000, mt_type="linear", max_var=1.0) | self.config.get("bb", {})
            trained = {n: t for n, t in state.items() if not n.startswith("vqgan.")}
            model = Bridge(b["num_timesteps"], b["mt_type"], b["max_var"]).state_dict() | state
            torch.save(dict(step=1234, epoch=7, model=model, ema=shifted(trained)), self.file)
        self.model = self.load(ema=False)

    def load(self, ema):
        heads = dict(head_channels=self.config["unet"]["num_head_channels"], num_heads=self.config["unet"]["num_heads"])
        model = load_bbdm(self.file, ema, stage_of, before_quant_conv=self.early, **heads)
        for module in (model.net.eval(), model.bridge, model.first_stage):
            module.to(DEVICE)
        return model

    def variant(self, **changes):
        """The same model with other options; most arrays come from latents after quant_conv, not normalized."""
        model = copy.copy(self.model)
        vars(model).update(dict(normalize=False, before_quant_conv=False) | changes)
        return model

    def small(self):
        """The gray image at the latents' size, which conditions the network; None without conditioning."""
        return self.model.net.cond_stage_model.shrink(self["img_cond"]) if "cond_context" in self else None

    def sample(self, steps, **options):
        """All (x, x0_hat) of a sampling that starts at enc_cond and uses the set's noise."""
        noise, model, small = self["loop_noise"], self.model, self.small()

        def predict(x, t):
            return model.net(x, t, small)

        return list(p_sample_loop(predict, model.bridge, self["enc_cond"], steps, iter(noise), **options))


@pytest.fixture(params=sets("bbdm"), scope="module")
def bbdm(request, tmp_path_factory):
    return BridgeGolden(request.param, tmp_path_factory.mktemp("bbdm"))


def shapes(net):
    return {name: t.shape for name, t in net.state_dict().items()}


def test_checkpoint(bbdm, tmp_path):
    """Sizes read off the tensors are the configuration's; each tensor, raw or averaged, has its place and is saved."""
    file, u = torch.load(bbdm.file, weights_only=True), bbdm.config["unet"]
    context = u["in_channels"] - u["out_channels"]
    with torch.device("meta"):
        expected = UNet(u["in_channels"], out_channels=u["out_channels"], **unet_options(bbdm.config))
        stage = first_stage(bbdm.config["vq"])
    for ema in (False, True):
        model = bbdm.load(ema)
        assert list(shapes(model.net.denoise_fn).items()) == list(shapes(expected).items())
        weights = file["model"] | (file["ema"] if ema else {})
        state = model.net.state_dict() | model.bridge.state_dict()
        state |= {f"vqgan.{n}": t for n, t in model.first_stage.state_dict().items()}
        assert state.keys() == file["model"].keys() | (file.keys() - {"step", "epoch", "model", "ema"})
        assert all(torch.equal(t.cpu(), weights[n] if n in weights else file[n]) for n, t in state.items())
        assert (model.conditioning, model.normalize) == ("rescaler" if context else "nocond", bbdm.normal)
    assert shapes(model.first_stage) == shapes(stage)

    save_bbdm(tmp_path / "again.pth", bbdm.model, bbdm.load(ema=True).net, file["step"], file["epoch"])
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == file.keys() and (again["step"], again["epoch"]) == (file["step"], file["epoch"])
    for key in file.keys() - {"step", "epoch"}:
        ours, theirs = (f[key] if isinstance(f[key], dict) else {key: f[key]} for f in (again, file))
        assert ours.keys() == theirs.keys() and all(torch.equal(t, ours[n]) for n, t in theirs.items())


def test_tables(bbdm):
    for name, arguments in json.loads(str(bbdm.arrays["table_names"])).items():
        tables = Bridge(*arguments).state_dict()
        assert len(tables) == 6
        for table, values in tables.items():
            close(values, bbdm[f"table_{name}_{table}"], 1e-6)


def test_steps(bbdm):
    cases = [name for name in bbdm.arrays if name.startswith("steps_T")]
    assert cases
    for name in cases:
        timesteps, count = map(int, name.removeprefix("steps_T").split("_S"))
        close(sampling_timesteps(timesteps, count), bbdm[name], 0)


@torch.no_grad()
def test_unet(bbdm):
    close(timestep_embedding(bbdm["temb_t"], 32), bbdm["temb_dim32"], PASS)
    context = bbdm["unet_context"] if "unet_context" in bbdm else None
    close(bbdm.model.net.denoise_fn(bbdm["unet_x"], bbdm["unet_t"], context), bbdm["unet_out"], 2e-5)


@torch.no_grad()
def test_latents(bbdm):
    """Encode and decode with each of the official options; training and sampling reach the same latents."""
    model, early, x, cond = bbdm.variant(), bbdm.variant(before_quant_conv=True), bbdm["img_x"], bbdm["img_cond"]
    rescaler = getattr(bbdm.model.net, "cond_stage_model", None)
    denoiser = Denoiser(bbdm.model.net.denoise_fn, rescaler, bbdm.config["vq"]["embed_dim"]).to(DEVICE)
    normal = bbdm.variant(normalize=True, net=denoiser)
    normal.net.load_state_dict({n: bbdm[n] for n in STATISTICS}, strict=False)
    ex, ec = bbdm["enc_x"], bbdm["enc_cond"]
    close(model.encode(x), ex, PASS)
    close(model.encode(cond), ec, PASS)
    close(early.encode(x), bbdm["enc_x_before_quant_conv"], PASS)
    close(early.decode(bbdm["enc_x_before_quant_conv"]), bbdm["dec_before_quant_conv"], PASS)
    close(model.decode(ex), bbdm["dec_x"], PASS)
    close(normal.normalized(ex), bbdm["enc_x_normalized"], PASS)
    close(normal.normalized(ec, "cond"), bbdm["enc_cond_normalized"], PASS)
    close(normal.decode(bbdm["enc_x_normalized"]), bbdm["dec_x_normalized"], PASS)
    _, idx, loss = model.first_stage.quantize(model.encode(x))
    close(idx, bbdm["vq_idx"], 0)
    close(loss, bbdm["vq_loss"], LOSS)
    close(code_gap(model.first_stage, model.encode(x)), bbdm["vq_margin_min"], PASS)

    batch = dict(rgb=(x + 1) / 2, gray=(cond[:, :1] + 1) / 2)
    for m, suffix in ((model, ""), (normal, "_normalized")):
        x0, y, _ = m.ends(batch)
        close(x0, bbdm["enc_x" + suffix], PASS)
        close(y, bbdm["enc_cond" + suffix], PASS)
    if "cond_context" in bbdm:
        close(model.net.cond_stage_model(cond), bbdm["cond_context"], PASS)
        small = model.ends(batch)[2].expand(-1, 3, -1, -1)
        close(model.net.cond_stage_model.channel_mapper(small), bbdm["cond_context"], PASS)


@pytest.mark.parametrize("objective", ["grad", "noise", "ysubx"])
@torch.no_grad()
def test_bridge_and_losses(bbdm, objective):
    x0, y, t, noise, bridge = bbdm["enc_x"], bbdm["enc_cond"], bbdm["unet_t"], bbdm["noise"], bbdm.model.bridge
    x_t, at = bridge.q_sample(x0, y, t, noise), bridge.at(t)
    target, golden = bridge_target(objective, x0, y, noise, *at), bbdm[f"q_{objective}_x0rec_of_target"]
    close(x_t, bbdm[f"q_{objective}_xt"], PASS)
    close(target, bbdm[f"q_{objective}_target"], PASS)
    tolerance = 1e-3 * golden.std() if objective == "noise" else PASS
    close(predict_x0(objective, target, x_t, y, *at), golden, tolerance)
    for loss in ("l1", "l2"):
        model = bbdm.variant(objective=objective, loss=loss)
        close(model.loss_at(x0, y, bbdm.small(), t, noise), bbdm[f"loss_{objective}_{loss}"], LOSS)
    if objective == "grad":
        answer = bbdm.model.net(x_t, t, bbdm.small())
        close(predict_x0("grad", answer, x_t, y, *at), bbdm["p_losses_x0_recon"], PASS)


def test_gradients(bbdm):
    """All gradients, but those of constants that a norm removes: these are rounding errors and need only be small."""
    model = bbdm.variant(objective="grad", loss="l1")
    loss = model.loss_at(bbdm["enc_x"], bbdm["enc_cond"], bbdm.small(), bbdm["unet_t"], bbdm["noise"])
    parameters = dict(model.net.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values())))
    names = bbdm.names("grad_names")
    assert names == [n for n in parameters if n.startswith("denoise_fn.")]
    ours, golden = stats_of(gradients, names), bbdm["grad_stats"]
    real = golden[:, 2] >= 1e-5 * golden[:, 2].max()
    assert real.float().mean() > 0.5 and (ours[~real, 2] < 1e-5 * golden[:, 2].max()).all()
    close_stats(ours[real], golden[real])
    close(gradients["denoise_fn.out.2.weight"], bbdm["grad_out_conv"], PASS)


@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("objective", ["grad", "noise", "ysubx"])
@torch.no_grad()
def test_sampling(bbdm, objective, eta):
    steps = sampling_timesteps(bbdm.model.bridge.timesteps, bbdm.extra["S"])
    close(steps, bbdm["loop_steps"], 0)
    golden, states = bbdm[f"loop_{objective}_eta{eta}"], bbdm.sample(steps, eta=eta, objective=objective)
    close(states[-1][0], golden, 1e-3 * golden.std() if objective == "noise" else LOOP)
    if objective == "grad":
        close(torch.stack([x[:1] for x, _ in states]), bbdm[f"loop_grad_eta{eta}_traj"], LOOP)
        close(torch.stack([x0[:1] for _, x0 in states]), bbdm[f"loop_grad_eta{eta}_x0"], LOOP)
        if eta == 1:
            close(bbdm.sample(steps, clip=True)[-1][0], bbdm["loop_grad_eta1_clip"], LOOP)


@pytest.mark.parametrize("ema", [False, True])
@torch.no_grad()
def test_colorizer(bbdm, ema, monkeypatch):
    """A user's call, from gray to color, with the set's noise; the last latents decode to the same codes."""
    model, golden = bbdm.load(ema), bbdm["sample_image_ema" if ema else "sample_image"]
    noise, ends, decode = iter(bbdm["loop_noise"].flatten(0, 1)), [], model.decode

    def keep_and_decode(z):
        ends.append(z)
        return decode(z)

    model.decode = keep_and_decode
    colorize, gray = bbdm_colorizer(model, bbdm.extra["S"]), (bbdm["img_cond"][:, :1] + 1) / 2
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda shape, generator=None, device=None: next(noise).reshape(shape))
        rgb = colorize(gray, [torch.Generator()] * len(gray))
    assert next(noise, None) is None
    close(rgb, ((golden + 1) / 2).clamp(0, 1), PASS)
    close(decode(torch.cat(ends)), golden, PASS)
    if not ema:
        z = model.normalized(torch.cat(ends), back=True)
        gap = code_gap(model.first_stage, model.first_stage.quant_conv(z) if model.before_quant_conv else z)
        close(gap, bbdm["sample_margin"], LOOP)
        assert gap >= bbdm["all_latents_margin_min"] - LOOP


class FixedNoise:
    """BBDM whose times and noise come with the batch instead of from the loop's generator."""

    def __init__(self, model):
        self.model, self.networks = model, model.networks

    def losses(self, batch, generator):
        yield "net", self.model.loss_at(*self.model.ends(batch), batch["t"], batch["noise"])


class Scripted:
    """One tensor of weights that no step moves, and losses that come with the batch."""

    def __init__(self, weights):
        self.net = torch.nn.ParameterDict({"weights": weights.clone()})

    def networks(self):
        return {"net": self.net}

    def losses(self, batch, generator):
        yield "net", batch["loss"] + 0 * self.net["weights"].sum()


def loop_of(trainee, folder, steps, **options):
    """The training loop with the official optimizer."""
    adam = dict(optimizer="adam", lr=1e-4, beta1=0.9, beta2=0.999)
    options = adam | dict(schedule="constant", batch_size=1, seed=0) | options
    array, budget = np.zeros((1, 1, 1, 3), np.uint8), Budget(steps, "steps")
    return Trainer(trainee, Run(folder, options), array, np.arange(1), budget, options, device=DEVICE)


def test_training_steps(bbdm, tmp_path):
    """The training loop, from stored latents: accumulated gradients and Adam's steps."""
    model, timesteps = bbdm.load(ema=False), bbdm["train_t"]
    model.normalize = False
    latents = [z for z in (bbdm["enc_x"], bbdm["enc_cond"], model.small(bbdm["img_cond"])) if z is not None]
    latents, accumulate = torch.cat(latents, 1), int(bbdm["train_accumulate"])
    trainer = loop_of(FixedNoise(model), tmp_path, len(timesteps), accumulate=accumulate)
    last, gradients = model.net.denoise_fn.out[2].weight, []
    last.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
    for t, noise, golden in zip(timesteps, bbdm["train_noise"], bbdm["train_losses"]):
        z = latents.flip(3) if trainer.step % 2 else latents
        batch = dict(index=torch.arange(len(z)), latents=z, t=t, noise=noise)
        close(train_step(trainer, batch)["net"], golden, LOSS)
        trainer.step += 1
    close(gradients[1], bbdm["train_accumulated_grad_out_conv_after2"], PASS)
    names = bbdm.names("train_after_names")
    assert names == [n for n, _ in model.net.named_parameters()]
    close_stats(stats_of(dict(model.net.named_parameters()), names), bbdm["train_after_stats"])
    close(last, bbdm["train_after_out_conv_w"], PASS)


def test_averages(bbdm, tmp_path):
    """The training loop copies the weights before the start, and averages them from there on."""
    values, decays = bbdm["ema_values"], bbdm.arrays["ema_with_decay"]
    start = 1 + int((~decays).sum())
    assert (decays == (np.arange(len(decays)) + 1 >= start)).all()
    trainee = Scripted(values[0])
    trainer = loop_of(trainee, tmp_path, len(decays), ema=dict(decay=0.995, start=start, every=1))
    for value, golden in zip(values[1:], bbdm["ema_shadow"]):
        trainee.net["weights"].data.copy_(value)
        train_step(trainer, dict(index=torch.arange(1), loss=torch.zeros(())))
        trainer.step += 1
        close(trainer.ema["net"].module["weights"], golden, 1e-6)


def test_learning_rates(bbdm, tmp_path):
    losses, golden = bbdm["plateau_losses"], bbdm.arrays["plateau_lr"]
    plateau = dict(factor=0.5, patience=3, threshold=1e-4, cooldown=2, min_lr=5e-7)
    trainer = loop_of(Scripted(torch.zeros(1)), tmp_path, len(losses), schedule="plateau", plateau=plateau)
    for loss, rate in zip(losses, golden):
        train_step(trainer, dict(index=torch.arange(1), loss=loss))
        trainer.step += 1
        settle(trainer, "net")  # as the loop does before the next step
        assert trainer.optimizers["net"].param_groups[0]["lr"] == rate
