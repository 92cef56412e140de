"""Numbers produced by running the official code, against ours.

A set is a folder <root>/<model>/. Pix2Pix's has arrays.npz, latest_net_G.pth and latest_net_D.pth; ColTran's has configs.json and files whose
names begin with a case of it; the VQGAN's and BBDM's have arrays.npz and model.ckpt or last_model.pth. The repo keeps a small set of each in
tests/golden; ../shared/golden is used too where it is there; the environment variable FAIC_GOLDEN replaces both. Shapes, sizes and options come
from the files. Tolerances are those of the set's README, by quantity.

FAIC_GOLDEN_DEVICE names another device than the CPU, FAIC_GOLDEN_REPORT a file that gets a line of JSON for each comparison. With
FAIC_GOLDEN_SLACK tolerances are that many times as large: a device with other rounding is then compared to the end."""

import copy
import json
import os
import pickle
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from faic.axial import ConditioningConfig
from faic.bbdm import Denoiser, bbdm_colorizer
from faic.bbdm_checkpoints import STATISTICS, load_bbdm, save_bbdm
from faic.bridge import Bridge, bridge_target, p_sample_loop, predict_x0, sampling_timesteps
from faic.checkpoints import safe_load
from faic.color import lab_to_rgb, luma, rgb_to_lab, scale_lab, truncate_uint8, unscale_lab
from faic.coltran import (
    Colorizer,
    ColTran,
    Upsampler,
    bins_to_rgb,
    bits_per_symbol,
    center_crop_resize,
    count_all,
    resize_area,
    rgb_to_bins,
    upsample_nearest,
)
from faic.coltran_checkpoints import load_coltran, official_colorizer, official_layout, official_state, renumber_layers
from faic.coltran_sampler import (
    RowBuffers,
    make_cached_sampler,
    outer_decode_row,
    prepare_row,
    sample_naive,
    sample_row,
    upsample,
)
from faic.core import Budget
from faic.layers import UNet, timestep_embedding
from faic.pix2pix import PatchDiscriminator, Pix2Pix, gan_loss, load_official, load_unet, official_names
from faic.runs import Run
from faic.tf_checkpoints import EMA_SUFFIX, read_tf_checkpoint, tensor_places
from faic.train import official_linear, settle, train_step
from faic.trainer import Trainer
from faic.vqgan import VQModel, infer_config, ldm_model, load_ldm, save_ldm

TESTS = Path(__file__).parent
DEVICE = torch.device(os.environ.get("FAIC_GOLDEN_DEVICE", "cpu"))
SLACK = float(os.environ.get("FAIC_GOLDEN_SLACK", 1))
REPORT = os.environ.get("FAIC_GOLDEN_REPORT")
if DEVICE.type == "cuda":  # float32 products, as the official code's were
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
ROOTS = (
    [Path(os.environ["FAIC_GOLDEN"]).resolve()]
    if os.environ.get("FAIC_GOLDEN")
    else [TESTS / "golden", TESTS.parents[1] / "shared" / "golden"]
)


def sets(model, marker="arrays.npz"):
    """All golden sets of a model, as pytest parameters whose ids contain the model's name."""
    found = sorted(
        {
            f.parent
            for root in ROOTS
            for f in root.rglob(marker)
            if any(model in part for part in f.parent.relative_to(root.parent).parts)
        }
    )
    if not found:
        return [
            pytest.param(
                None,
                id=model,
                marks=pytest.mark.skip(reason=f"no golden set of {model} under {', '.join(map(str, ROOTS))}"),
            )
        ]
    return [
        pytest.param(f, id=f"{model}-{f.relative_to(root.parent)}")
        for f in found
        for root in ROOTS
        if root in f.parents
    ]


def tensor(array):
    return torch.tensor(array, device=DEVICE)


class Golden:
    """One set: its arrays as tensors, its configuration, and networks with its weights."""

    def __init__(self, folder):
        self.folder = folder
        self.arrays = dict(np.load(folder / "arrays.npz", allow_pickle=False))
        self.config = json.loads(str(self.arrays["config"]))

    def __getitem__(self, name):
        return tensor(self.arrays[name])

    def __contains__(self, name):
        return name in self.arrays

    def G(self):
        return load_unet(self.folder / "latest_net_G.pth").eval().to(DEVICE)

    def D(self):
        c = self.config
        return (
            load_official(PatchDiscriminator(c["ic"] + c["oc"], c["ndf"]), self.folder / "latest_net_D.pth")
            .eval()
            .to(DEVICE)
        )


@pytest.fixture(params=sets("pix2pix"))
def pix2pix(request):
    return Golden(request.param)


def close(ours, golden, tolerance):
    ours, golden = torch.as_tensor(ours).detach().cpu().double(), torch.as_tensor(golden).cpu().double()
    assert ours.shape == golden.shape
    worst = (ours - golden).abs().max().item()
    report(worst, float(tolerance))
    assert worst <= tolerance * SLACK, f"largest difference {worst:.2e}, tolerance {tolerance:.0e}"


def report(worst, tolerance):
    """A line of JSON for one comparison, where a file for it is named."""
    if REPORT:
        test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].removesuffix(" (call)")
        with open(REPORT, "a") as f:
            f.write(json.dumps(dict(test=test, worst=worst, tolerance=tolerance)) + "\n")


def close_loss(ours, golden, rtol):
    worst = abs(float(ours) - float(golden)) / abs(float(golden))
    report(worst, rtol)
    assert worst <= rtol * SLACK, f"loss {float(ours)}, official {float(golden)}"


def sub4(x):
    return x[:, :, 1::4, 2::4]


def stats_of(state, names):
    """(sum, sum of |x|, L2 norm) of each named tensor in float64."""
    rows = [state[n].double() for n in names]
    return torch.stack([torch.stack([x.sum(), x.abs().sum(), x.norm()]) for x in rows])


def close_stats(ours, golden, rtol=1e-3):
    """Sums may cancel, so they are compared on the scale of the sum of magnitudes."""
    scale = golden[:, 1:2].clamp_min(1e-12)
    sums, sizes = (ours - golden).abs()[:, :1] / scale, (ours - golden).abs()[:, 1:] - 1e-9
    worst = torch.maximum(sums.max(), (sizes / golden[:, 1:].abs().clamp_min(1e-300)).max()).item()
    report(worst, rtol)
    assert worst <= rtol * SLACK


@torch.no_grad()
def test_generator_eval(pix2pix):
    G, A = pix2pix.G(), pix2pix["A"]
    out = G(A)
    close(out[:, :, 1::2, ::2], pix2pix["G_eval_s2"], 2e-5)
    close(out[:, :, 100:116, 200:216], pix2pix["G_eval_crop16"], 2e-5)


@torch.no_grad()
def test_generator_down_convolutions(pix2pix):
    G, seen = pix2pix.G(), {}
    for k, conv in enumerate(G.down):
        conv.register_forward_hook(lambda _, __, out, k=k: seen.update({k: out}))
    G(pix2pix["A"])
    cases = [k for k in range(len(G.down)) if f"G_eval_down{k}_conv" in pix2pix]
    assert cases
    for k in cases:
        close(seen[k][:1], pix2pix[f"G_eval_down{k}_conv"], 2e-5)


@torch.no_grad()
def test_discriminator(pix2pix):
    pair = torch.cat([pix2pix["A"], pix2pix["B"]], 1)
    close(pix2pix.D()(pair), pix2pix["D_eval"], 2e-5)
    close(pix2pix.D().train()(pair), pix2pix["D_trainbn"], 2e-5)


@torch.no_grad()
def test_batch_norm_modes(pix2pix):
    G, A = pix2pix.G().train(), pix2pix["A"]
    close(sub4(G(A)), pix2pix["G_trainbn_s4"], 2e-5)
    close(G.down_norm[0].running_mean, pix2pix["G_trainbn_rm_after"], 2e-5)
    close(G.down_norm[0].running_var, pix2pix["G_trainbn_rv_after"], 2e-5)
    before = {k: v.clone() for k, v in G.state_dict().items()}
    close(sub4(G(A, per_image=True))[:1], pix2pix["G_trainbn_b0_s4"], 2e-5)
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items()), (
        "per-image statistics must leave the running ones alone"
    )


@torch.no_grad()
def test_dropout(pix2pix):
    G, A = pix2pix.G().train(), pix2pix["A"]
    masks = [pix2pix[f"drop_mask{i}"].float() for i in range(len(G.mask_shapes(*A.shape[-2:])))]
    close(sub4(G(A, masks)), pix2pix["G_traindrop_s4"], 2e-5)


@pytest.mark.parametrize("mode", ["vanilla", "lsgan", "wgangp"])
def test_gan_losses(pix2pix, mode):
    for real in (True, False):
        golden = pix2pix[f"ganloss_{mode}_{'real' if real else 'fake'}"]
        close(gan_loss(pix2pix["ganloss_pred"], real, mode), golden, 1e-6 * max(1, abs(golden)))


def test_three_training_steps(pix2pix):
    model = Pix2Pix(dropout=0)
    model.G, model.D = pix2pix.G().train(), pix2pix.D().train()
    parts = model.networks()
    optimizers = {n: torch.optim.Adam(p.parameters(), lr=2e-4, betas=(0.5, 0.999)) for n, p in parts.items()}
    A, B = pix2pix["A"], pix2pix["B"]
    batches = [(A, B), (A.flip(3), B.flip(3)), (-A, B.flip(2))]
    official = {ours: theirs for net in parts.values() for ours, theirs in official_names(net).items()}
    names = [str(n) for n in pix2pix.arrays["train_loss_names"]]
    for step, (L, ab) in enumerate(batches):
        losses = {}
        for part, loss in model.adversarial_losses(L, ab):
            losses[part] = loss.item()
            optimizers[part].zero_grad()
            loss.backward(inputs=list(parts[part].parameters()))
            if step == 0 and part == "G":
                grads = {official[n]: p.grad for n, p in model.G.named_parameters()}
                close_stats(
                    stats_of(grads, [str(n) for n in pix2pix.arrays["step0_G_grad_names"]]),
                    pix2pix["step0_G_grad_stats"],
                )
            optimizers[part].step()
        losses |= {k: v.item() for k, v in model.terms.items()}
        for name, golden in zip(names, pix2pix.arrays["train_losses"][step]):
            close_loss(losses[name], golden, 1e-4)

    for part, net in parts.items():
        state = {official_names(net)[k]: v for k, v in net.state_dict().items()}
        close_stats(
            stats_of(state, [str(n) for n in pix2pix.arrays[f"after3_{part}_names"]]), pix2pix[f"after3_{part}_stats"]
        )
    close(sub4(model.G.eval()(A[:1])), pix2pix["after3_G_eval_b0_s4"], 5e-3)
    close(model.G.down[0].weight, pix2pix["after3_G_w_first"], 3e-4)
    close(model.G.up[0].weight, pix2pix["after3_G_w_last"], 3e-4)
    close(model.G.up[0].bias, pix2pix["after3_G_b_last"], 3e-4)
    close(model.D.conv[0].weight, pix2pix["after3_D_w0"], 3e-4)
    close(model.D.conv[4].bias, pix2pix["after3_D_b_last"], 7e-4)


def test_data_and_color(pix2pix):
    rgb = pix2pix["rgb_u8"].permute(2, 0, 1)[None].double() / 255
    lab = rgb_to_lab(rgb)
    close(lab[0].permute(1, 2, 0), pix2pix["lab_f32"], 1e-4)
    L, ab = scale_lab(lab)
    close(L[0], pix2pix["rgb2_A"], 2e-6)
    close(ab[0], pix2pix["rgb2_B"], 2e-6)


def test_conversion_to_8_bit(pix2pix):
    official = lambda L, ab: lab_to_rgb(unscale_lab(L, ab).double())[0].permute(1, 2, 0)
    close(truncate_uint8(official(pix2pix["rgb2_A"][None], pix2pix["rgb2_B"][None])), pix2pix["roundtrip_u8_trunc"], 0)
    A, B = pix2pix["A"][:1], pix2pix["B"][:1]
    rgb = official(A, B)[1::4, 2::4]
    close(rgb * 255, pix2pix["lab2rgb_float_s4"], 2e-4)
    close(truncate_uint8(rgb), pix2pix["lab2rgb_u8_s4"], 0)
    close(truncate_uint8((A[0][:1] + 1) / 2).permute(1, 2, 0)[1::4, 2::4], pix2pix["real_A_u8_s4"], 0)


def test_learning_rates(pix2pix):
    ne, nd, n = pix2pix.config["ne"], pix2pix.config["nd"], len(pix2pix.arrays["lr_by_epoch"])
    rates = lambda first, last: np.array([2e-4 * official_linear(e, ne, nd) for e in range(first, last + 1)])
    close(rates(1, n), pix2pix["lr_by_epoch"], 1e-12)
    close(rates(int(pix2pix["lr_resume_epoch_count"]), n), pix2pix["lr_by_epoch_resumed"], 1e-12)


# ColTran. A key of configs.json is <case>_<network>; its files are <key>_variables.npz, <key>_io.npz and others.

LOGITS, PROBABILITIES, LOSS, TIE = (
    2e-4,
    1e-5,
    1e-5,
    1e-3,
)  # absolute, absolute, relative; gap of logits below which an argmax is not compared


def procedural(name, shape, seed):
    """The weights that the sets' README describes: random numbers that depend on the variable's name and a seed."""
    z = (
        np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
        .standard_normal(int(np.prod(shape)))
        .reshape(shape)
    )
    kind, logits = name.rsplit("/", 1)[1].removesuffix(":0"), "auto_logits" in name or "parallel_logits" in name
    if kind == "kernel":
        z = z / np.sqrt(shape[0] * (shape[1] if name.endswith("/output/kernel:0") else 1)) * (3 if logits else 1)
    elif kind == "spatial_average":
        z = 1 + 0.5 * z
    elif kind == "gamma":
        z = 1 + 0.3 * z
    else:
        z = {"bias": 0.3, "beta": 0.3, "position_embedding": 0.5, "relative_attention_bias": 0.7}[
            kind.rstrip("_01")
        ] * z
        if kind == "bias" and "conditional_layer_norm" in name:
            z[: len(z) // 2] += 1
    return z.astype(np.float32)


def network(config):
    """An untrained network of the official configuration."""
    model, size = config["model"], (config["height"], config["width"])
    if "decoder" not in model:
        return Upsampler(
            model["name"].split("_")[0],
            *size,
            model["hidden_size"],
            model["num_heads"],
            model["ff_size"],
            model["num_encoder_layers"],
        )
    e, d = model["encoder"], model["decoder"]
    conditions = ConditioningConfig(
        "".join(t for t in "qkv" if d[f"cond_att_{t}"]),
        d["cond_att_scale"],
        d["cond_att_act"],
        d["cond_mlp"] or "",
        d["cond_mlp_act"],
        d["cond_ln_sp_ave"] if d["cond_ln"] else "",
        d["cond_ln_seq"],
        d["cond_ln_act"],
    )
    return Colorizer(
        *size,
        model["hidden_size"],
        d["num_heads"],
        d["ff_size"],
        e["num_encoder_layers"],
        d["num_outer_layers"],
        d["num_inner_layers"],
        e["num_heads"],
        e["ff_size"],
        conditions,
        d["skip"],
        "encoder" in model["stage"],
    )


class Case:
    """One network of one case: its configuration, weights and files."""

    def __init__(self, folder, key):
        self.folder, self.key, self.config = folder, key, json.loads((folder / "configs.json").read_text())[key]

    def load(self, suffix):
        file = self.folder / f"{self.key}_{suffix}.npz"
        if not file.exists():
            pytest.skip(f"no {file.name} in {self.folder}")
        return dict(np.load(file))

    def variables(self, net):
        """The official arrays: from a file or, where the set has none, made by the recipe, for which the other file tells the names."""
        if (self.folder / f"{self.key}_variables.npz").exists():
            return self.load("variables")
        names = renumber_layers(str(n) for n in self.load("io")["variable_names"])
        return {
            names[n]: procedural(names[n], shape, self.config["weight_seed"])
            for _, parts, _ in official_layout(net)
            for n, shape in parts.items()
        }

    def net(self):
        net = network(self.config)
        net.load_state_dict(official_state(self.variables(net), net, self.key))
        return net.eval().to(DEVICE)


def cases(*networks):
    """All cases of these networks in all sets, as pytest parameters."""
    folders = [(s.values[0], s.id) for s in sets("coltran", "configs.json") if s.values[0]]
    found = [
        (Case(f, key), f"{name}-{key}")
        for f, name in folders
        for key in json.loads((f / "configs.json").read_text())
        if key.endswith(networks)
    ]
    return parameters(found, f"configuration of a {' or '.join(networks)}")


def files(pattern):
    """(folder, what the star stands for) of all files of this pattern in all sets, as pytest parameters."""
    folders, (start, _, end) = (
        [(s.values[0], s.id) for s in sets("coltran", "configs.json") if s.values[0]],
        pattern.partition("*"),
    )
    found = [
        ((f, file.name.removeprefix(start).removesuffix(end)), f"{name}-{file.name}")
        for f, name in folders
        for file in sorted(f.glob(pattern))
    ]
    return parameters(found, pattern)


def parameters(found, what):
    nothing = pytest.param(
        None, id="coltran", marks=pytest.mark.skip(reason=f"no {what} of coltran under {', '.join(map(str, ROOTS))}")
    )
    return [pytest.param(value, id=name) for value, name in found] or [nothing]


def channels_first(images):
    """(B,H,W,3) of a file to (B,3,H,W) long."""
    return tensor(images).long().movedim(-1, 1)


def gray_of(pixels):
    """(B,3,H,W) long to ColTran's gray, (B,H,W) long."""
    return (luma(pixels.to(torch.uint8), "coltran") * 255).round().long()[:, 0]


def compare(golden, tolerance, **ours):
    """Those of ours that the file has, perhaps of the first images only; returns how many that were."""
    stored = [(value, golden[n]) for name, value in ours.items() for n in (name, f"{name}_ex0") if n in golden]
    for value, array in stored:
        close(value[: len(array)], array, tolerance)
    return len(stored)


def compare_losses(golden, **ours):
    assert any(name in golden for name in ours)
    for name, value in ours.items():
        if name in golden:
            close_loss(value, golden[name], LOSS)


def top_gap(logits):
    first, second = logits.topk(2, -1).values.unbind(-1)
    return first - second


@torch.no_grad()
def check_teacher_forcing(net, golden):
    rgb = channels_first(golden["rgb"])
    gray, labels = gray_of(rgb), rgb_to_bins(rgb)
    close(gray[..., None], golden["gray"], 0)
    close(labels, golden["labels"], 0)
    z = net.encode(gray)
    out = net(z, labels)
    assert not out["above"][:, 0].any()
    assert compare(golden, LOGITS, z=z, h_upper=out["above"], h_inner=out["inner"], dec_logits=out["logits"])
    losses = dict(loss_auto=bits_per_symbol(out["logits"], labels))
    if net.aux is not None:
        logits = net.aux(z)
        losses["loss_encoder"] = bits_per_symbol(logits, labels)
        losses["total_loss_099_001"] = 0.99 * losses["loss_auto"] + 0.01 * losses["loss_encoder"]
        compare(golden, LOGITS, enc_logits=logits)
        close(bins_to_rgb(logits.argmax(-1)).movedim(1, -1), golden["parallel_image"], 0)
    compare_losses(golden, **losses)


@torch.no_grad()
def check_greedy(net, golden):
    """Greedy symbols of the plain and of the fast sampler, exactly; float64 may not change a symbol either."""
    gray, symbols = tensor(golden["gray"])[..., 0].long(), tensor(golden["argmax_bins"]).long()
    plain = sample_naive(net, gray, temperature=0)
    close(plain["symbols"], symbols, 0)
    close(bins_to_rgb(plain["symbols"]).movedim(1, -1), golden["argmax_image"], 0)
    close(make_cached_sampler(net, len(gray), temperature=0)(gray), symbols, 0)
    probabilities = plain["logits"].softmax(-1)
    compare(golden, PROBABILITIES, argmax_proba=probabilities)
    compare(golden, LOGITS, argmax_logit_gap=top_gap(plain["logits"]))
    if "teacher_forced_vs_sampler_max_dproba" in golden:
        forced = net(net.encode(gray), symbols)["logits"].softmax(-1)
        close((forced - probabilities).abs().max(), golden["teacher_forced_vs_sampler_max_dproba"], PROBABILITIES)
    double = net.double()
    close(sample_naive(double, gray, temperature=0)["symbols"], symbols, 0)
    close(make_cached_sampler(double, len(gray), temperature=0)(gray), symbols, 0)


@pytest.mark.parametrize("case", cases("_colorizer"))
def test_coltran_teacher_forcing(case):
    check_teacher_forcing(case.net(), case.load("io"))


@pytest.mark.parametrize("case", cases("_colorizer"))
def test_coltran_greedy(case):
    check_greedy(case.net(), case.load("io"))


@pytest.mark.parametrize("case", cases("_upsampler"))
@torch.no_grad()
def test_coltran_upsampler(case):
    net, golden = case.net(), case.load("io")
    rgb, step = channels_first(golden["rgb"]), int(golden.get("logit_stride", 1))
    gray, strided = gray_of(rgb), "_strided" if "logit_stride" in golden else ""
    close(gray[..., None], golden["gray"], 0)
    if net.kind == "color":
        coarse = rgb // 32
        compare(golden, 0, bits=coarse.movedim(1, -1))
    else:
        low = resize_area(rgb, rgb.shape[2] // 4, rgb.shape[3] // 4)
        coarse = upsample_nearest(low)
        compare(golden, 0, low=low.movedim(1, -1), low_up=coarse.movedim(1, -1))
    channel, images = tensor(golden["channel_index"]).long(), torch.arange(len(rgb), device=DEVICE)
    train = net(coarse[images, channel], channel, gray)
    each = torch.stack([net(coarse[:, c], torch.full((len(rgb),), c, device=DEVICE), gray) for c in range(3)], 3)
    compare(
        golden,
        LOGITS,
        **{f"logits_train{strided}": train[:, ::step, ::step, None], f"logits_eval{strided}": each[:, ::step, ::step]},
    )
    compare_losses(
        golden,
        loss_train=bits_per_symbol(train, rgb[images, channel]),
        loss_eval=bits_per_symbol(each, rgb.movedim(1, -1)),
    )
    sure = torch.tensor(golden["argmax_logit_gap"]).float() >= TIE
    for ours in (each.argmax(-1), upsample(net, coarse if net.kind == "color" else low, gray).movedim(1, -1)):
        close(ours[sure], golden["argmax"][sure.numpy()], 0)


@pytest.mark.parametrize("found", files("*_end_to_end.npz"))
@torch.no_grad()
def test_coltran_end_to_end(found):
    folder, name = found
    golden = dict(np.load(folder / f"{name}_end_to_end.npz"))
    nets = [
        Case(folder, f"{name}_{network}").net() for network in ("colorizer", "color_upsampler", "spatial_upsampler")
    ]
    rgb = center_crop_resize(channels_first(golden["image"][None]), golden["gray"].shape[1])
    gray, gray_low = gray_of(rgb), gray_of(resize_area(rgb, *golden["gray_low"].shape[1:3]))
    stage1 = bins_to_rgb(make_cached_sampler(nets[0], 1, temperature=0)(gray_low))
    stage2 = upsample(nets[1], stage1 // 32, gray_low)
    ours = dict(
        gray=gray[:, None],
        gray_low=gray_low[:, None],
        stage1=stage1,
        stage2=stage2,
        stage2_up=upsample_nearest(stage2),
        final=upsample(nets[2], stage2, gray),
    )
    for n, image in ours.items():
        close(image.movedim(1, -1), golden[n], 0)


@pytest.mark.parametrize("found", files("*_colorizer_gradients.npz"))
def test_coltran_gradients(found):
    folder, name = found
    case, golden = Case(folder, f"{name}_colorizer"), dict(np.load(folder / f"{name}_colorizer_gradients.npz"))
    net, rgb = case.net(), channels_first(np.load(folder / f"{name}_train_io.npz")["batches"][0])
    z, symbols = net.encode(gray_of(rgb)), rgb_to_bins(rgb)
    (
        0.99 * bits_per_symbol(net(z, symbols)["logits"], symbols) + 0.01 * bits_per_symbol(net.aux(z), symbols)
    ).backward()
    frozen = {n: np.zeros_like(a) for n, a in case.variables(net).items() if n not in golden}
    expected, trained = (
        official_state(golden | frozen, net),
        {n: p.grad for n, p in net.named_parameters() if p.requires_grad},
    )
    assert sum(g.numel() for g in trained.values()) == sum(a.size for a in golden.values())
    for n, g in trained.items():
        scale = expected[n].abs().max()
        close(g / scale, expected[n] / scale, 3e-5)


def trained_states(case, final_variables):
    """Our state dicts of the final weights and of their averages, from two files or, where the set has none, from the checkpoint."""
    if not final_variables.exists():
        return [
            load_coltran(network(case.config), case.folder / f"{case.key}_checkpoint", ema=ema).state_dict()
            for ema in (False, True)
        ]
    net, final = network(case.config), dict(np.load(final_variables))
    averages = dict(np.load(str(final_variables).replace("variables", "ema")))
    return official_state(final, net), official_state(final | averages, net)


@pytest.mark.parametrize("found", files("*_train_io.npz"))
def test_coltran_training_steps(found, tmp_path):
    """Official steps of RMSprop and of the moving average, made by the training loop. RMSprop divides a gradient by its own size, rounding included."""
    folder, name = found
    case, golden = Case(folder, f"{name}_colorizer"), dict(np.load(folder / f"{name}_train_io.npz"))
    if case.config["height"] != case.config["width"]:
        pytest.skip("ColTran trains on squares")
    model = ColTran(4 * case.config["height"], dim=8, heads=1, ff=8)
    model.net = case.net()
    batches, lr = [channels_first(b).float() / 255 for b in golden["batches"]], 3e-4
    options = dict(
        optimizer="rmsprop",
        lr=lr,
        schedule="constant",
        batch_size=len(batches[0]),
        seed=0,
        ema=dict(decay=0.999, start=0, every=1),
    )
    trainer = Trainer(
        model,
        Run(tmp_path, options),
        np.zeros((1, 1, 1, 3), np.uint8),
        np.arange(1),
        Budget(len(batches), "steps"),
        options,
        device=DEVICE,
    )
    tiny = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.net.named_parameters()}
    for rgb, losses in zip(batches, golden["losses_auto_enc_total"]):
        seen = train_step(trainer, dict(index=torch.arange(len(rgb)), rgb=rgb))
        trainer.step += 1
        for term, value in zip(("auto", "aux", "net"), losses):
            close_loss(seen[term], value, LOSS)
        for n, p in trainer.networks["net"].named_parameters():
            tiny[n] |= (p.grad != 0) & (p.grad.abs() < 1e-5) if p.requires_grad else False
    final, average = trained_states(case, folder / f"{name}_train_final_variables.npz")
    for ours, expected, tolerance, tolerance_of_tiny in (
        (trainer.networks["net"], final, 1e-5, 2 * len(batches) * lr),
        (trainer.ema["net"].module, average, 1e-6, 1e-5),
    ):
        for n, p in ours.named_parameters():
            difference = (p.detach() - expected[n].to(DEVICE)).abs()
            assert (difference <= torch.where(tiny[n], tolerance_of_tiny, tolerance)).all(), (
                n,
                difference.max().item(),
            )


@pytest.mark.parametrize("found", files("*_colorizer_checkpoint"))
def test_coltran_checkpoint(found):
    """A checkpoint that TensorFlow wrote: every key and number, and what the official code computes after restoring it."""
    folder, name = found
    case, path = Case(folder, f"{name}_colorizer"), folder / f"{name}_colorizer_checkpoint"
    if (keys := folder / f"{path.name}_keys.json").exists():
        assert {k: list(place.shape) for k, place in tensor_places(path)[0].items()} == json.loads(keys.read_text())
    arrays = read_tf_checkpoint(path)
    for kind, ending in (("variables", ":0"), ("ema", EMA_SUFFIX)):
        if (file := folder / f"{name}_train_final_{kind}.npz").exists():
            golden = dict(np.load(file))
            assert len(golden) and all(np.array_equal(arrays[n.replace(":0", ending)], a) for n, a in golden.items())
    net, raw = official_colorizer(path).to(DEVICE), load_coltran(network(case.config), path, ema=False)
    assert {n: t.shape for n, t in net.state_dict().items()} == {n: t.shape for n, t in raw.state_dict().items()}
    assert not torch.equal(net.head.weight.cpu(), raw.head.weight)
    golden = dict(np.load(folder / f"{name}_restored_ema_io.npz"))
    check_teacher_forcing(net, golden)
    check_greedy(net, golden)


@pytest.mark.parametrize("folder", sets("coltran", "configs.json"))
def test_coltran_recipe_of_the_weights(folder):
    """The weights in the files are those of the recipe, so a set can do without them."""
    configs = json.loads((folder / "configs.json").read_text())
    stored = {key: dict(np.load(f)) for key in configs if (f := folder / f"{key}_variables.npz").exists()}
    if not stored:
        pytest.skip(f"no weights in {folder}")
    for key, arrays in stored.items():
        for n, a in arrays.items():
            assert np.array_equal(a, procedural(n, a.shape, configs[key]["weight_seed"])), (key, n)


@pytest.mark.parametrize("found", files("variables_*.json"))
def test_coltran_variables(found):
    """Every official variable has its place in our network, of the same shape; nothing of either is left over."""
    golden = json.loads((found[0] / f"variables_{found[1]}.json").read_text())
    shapes = {v["name"]: tuple(v["shape"]) for v in golden["variables"]}
    height, width = (next(s[0] for n, s in shapes.items() if n.endswith(f"position_embedding_{i}:0")) for i in (0, 1))
    with torch.device("meta"):
        net = network(dict(model=golden["config"], height=height, width=width))
    ours = {n: tuple(shape) for _, parts, _ in official_layout(net) for n, shape in parts.items()}
    assert ours == {n: shapes[official] for n, official in renumber_layers(shapes).items()}
    assert count_all(net) == (golden["total"], golden["trainable"])


@pytest.mark.parametrize("found", files("preprocess_*.npz"))
def test_coltran_preprocessing(found):
    folder, name = found
    golden = dict(np.load(folder / f"preprocess_{name}.npz"))
    image = channels_first(golden["image"][None])
    ours = dict(square=center_crop_resize(image), graymode_square=center_crop_resize(image[:, :1]))
    ours |= dict(
        low=resize_area(ours["square"], *golden["low"].shape[:2]),
        graymode_low=resize_area(ours["graymode_square"], *golden["low"].shape[:2]),
    )
    ours["gray_low"] = gray_of(ours["low"])[:, None]
    assert len(ours.keys() & golden.keys()) >= 3
    for n in ours.keys() & golden.keys():
        close(ours[n][0].movedim(0, -1), golden[n], 0)


def paper_size(folder, net, table, seed):
    """The network with the procedural weights of the paper's size; names come from a table of a network with as many layers or more."""
    file = folder / f"variables_{table}.json"
    if not file.exists():
        pytest.skip(f"no {file.name} in {folder}")
    names = renumber_layers(v["name"] for v in json.loads(file.read_text())["variables"])
    arrays = {
        names[n]: procedural(names[n], shape, seed)
        for _, parts, _ in official_layout(net)
        for n, shape in parts.items()
    }
    net.load_state_dict(official_state(arrays, net))
    return net.eval().to(DEVICE), sum(np.abs(a, dtype=np.float64).sum() for a in arrays.values())


def at(logits, positions):
    return logits[0, positions[:, 0], positions[:, 1]]


@pytest.mark.parametrize("found", files("P_paper_size.npz"))
@torch.no_grad()
def test_coltran_paper_size_colorizer(found):
    """Teacher forcing, and two greedy rows: the plain sampler's by teacher forcing on its symbols, which is the same by induction."""
    folder = found[0]
    golden = dict(np.load(folder / "P_paper_size.npz"))
    net, total = paper_size(folder, Colorizer(), "colorizer_paper_1layer", 5100)
    assert count_all(net) == tuple(golden["colorizer_num_params"]) and total == pytest.approx(
        float(golden["colorizer_abs_sum"]), rel=1e-9
    )
    rgb = channels_first(golden["rgb"])
    gray, labels = gray_of(rgb), rgb_to_bins(rgb)
    z = net.encode(gray)
    logits, enc_logits = net(z, labels)["logits"], net.aux(z)
    close(at(logits, golden["positions"]), golden["dec_logits_at"], LOGITS)
    close(at(enc_logits, golden["positions"]), golden["enc_logits_at"], LOGITS)
    compare_losses(golden, loss_auto=bits_per_symbol(logits, labels), loss_encoder=bits_per_symbol(enc_logits, labels))
    for ours, name in ((logits, "dec_argmax"), (enc_logits, "enc_argmax")):
        sure = (top_gap(ours)[0] >= TIE).cpu()
        close(ours.argmax(-1)[0][sure], golden[name][sure.numpy()], 0)

    symbols = tensor(golden["greedy_first_rows_bins"]).long()
    rows = len(symbols)
    canvas = torch.zeros_like(labels)
    canvas[0, :rows] = symbols
    forced = net(z, canvas, "row")["logits"][0, :rows]
    close(forced.argmax(-1), symbols, 0)
    close(top_gap(forced), golden["greedy_first_rows_gap"], LOGITS)

    s, terms = (
        RowBuffers(net, 1, temperature=0),
        [[b.norm_terms(z, n) for b in blocks] for blocks, n in ((net.inner, "row"), (net.outer, "image"))],
    )
    kept, upper = (
        [[z.new_zeros(1, *z.shape[2:0:-1], z.shape[3]) for _ in range(2)] for _ in net.outer[::2]],
        torch.zeros_like(z[:, 0]),
    )
    for r in range(rows):
        prepare_row(s, r, z, upper, terms[0], torch.no_grad)
        sample_row(s)
        close(s.drawn.T, symbols[r : r + 1], 0)
        upper = outer_decode_row(net, r, s.drawn.T, z, terms[1], kept)


@pytest.mark.parametrize("found", files("P_paper_size.npz"))
@torch.no_grad()
def test_coltran_paper_size_color_upsampler(found):
    folder = found[0]
    golden = dict(np.load(folder / "P_paper_size.npz"))
    net, _ = paper_size(folder, Upsampler("color", 64, 64), "color_upsampler", 5101)
    assert count_all(net)[0] == golden["color_num_params"]
    rgb = channels_first(golden["rgb"])
    logits = torch.stack([net(rgb[:, c] // 32, tensor([c]), gray_of(rgb)) for c in range(3)], 3)
    close(at(logits, golden["positions"]), golden["color_logits_at"], LOGITS)
    sure = torch.tensor(golden["color_gap"]).float() >= TIE
    close(logits.argmax(-1)[0][sure], golden["color_argmax"][sure.numpy()], 0)


@pytest.mark.slow
@pytest.mark.parametrize("found", files("P_paper_size.npz"))
@torch.no_grad()
def test_coltran_paper_size_spatial_upsampler(found):
    folder = found[0]
    golden = dict(np.load(folder / "P_paper_size.npz"))
    net, _ = paper_size(folder, Upsampler("spatial", 256, 256), "spatial_upsampler", 5102)
    assert count_all(net)[0] == golden["spatial_num_params"]
    rgb = channels_first(golden["rgb256"])
    logits = net(upsample_nearest(resize_area(rgb, 64, 64))[:, 1], tensor([1]), gray_of(rgb))
    close(at(logits, golden["positions256"]), golden["spatial_logits_at_channel1"], LOGITS)
    logits = logits[:, ::4, ::4]
    sure = (top_gap(logits)[0] >= TIE).cpu()
    close(logits.argmax(-1)[0][sure], golden["spatial_argmax_channel1_strided4"][sure.numpy()], 0)


# VQGAN and BBDM. A set is arrays.npz and the official checkpoint, model.ckpt or last_model.pth; the repo's sets have no checkpoint: it is
# written here from weights that follow from a tensor's name and a seed.

PASS, LOSS_OF_BRIDGE, LOOP = 5e-5, 1e-5, 5e-4  # absolute: activations of one pass, losses, the end of the way back


def recipe(shapes, seed):
    """name -> tensor of random numbers that depend on the tensor's name and a seed: norms around 1, other weights by their number of inputs."""
    state = {}
    for name, shape in shapes.items():
        z = (
            np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
            .standard_normal(int(np.prod(shape)))
            .reshape(shape)
        )
        if name.endswith("embedding.weight"):
            z = 0.7 * z
        elif len(shape) > 1:
            z = z / np.sqrt(np.prod(shape[1:]))
        else:
            z = 1 + 0.2 * z if name.endswith("weight") else 0.1 * z
        state[name] = torch.tensor(z.astype(np.float32))
    return state


def write_model_ckpt(path, state):
    """A file as LDM's training framework writes it: with the discriminator's tensors, and a class of the framework as a key."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), dict(__module__=module.__name__))
    loss = {
        "loss.discriminator.main.0.weight": torch.ones(4, 3, 4, 4),
        "loss.discriminator.main.3.num_batches_tracked": torch.tensor(11),
    }
    parents = {n: types.ModuleType(n) for n in ("pytorch_lightning", "pytorch_lightning.callbacks")}
    with pytest.MonkeyPatch.context() as patch:
        for name, m in (parents | {module.__name__: module}).items():
            patch.setitem(sys.modules, name, m)
        torch.save(
            dict(
                epoch=12,
                global_step=3456,
                state_dict=state | loss,
                callbacks={module.ModelCheckpoint: dict(best_model_score=torch.tensor(0.5))},
            ),
            path,
        )
    return path


@pytest.fixture(params=sets("vqgan"), scope="module")
def vqgan(request, tmp_path_factory):
    golden = Golden(request.param)
    golden.file = request.param / "model.ckpt"
    if not golden.file.exists():
        state = recipe(json.loads(str(golden.arrays["shapes"])), golden.config["seed"])
        golden.file = write_model_ckpt(tmp_path_factory.mktemp("vqgan") / "model.ckpt", state)
    golden.net = ldm_model(golden.file).to(DEVICE)
    return golden


def first_stage(config):
    """An untrained first stage of LDM's configuration: a level attends where its share of the NOMINAL resolution says so."""
    c, attends = config["ddconfig"], config["ddconfig"].get("attn_type") != "none"
    levels = [i for i in range(len(c["ch_mult"])) if attends and c["resolution"] // 2**i in c["attn_resolutions"]]
    return VQModel(
        c["ch"],
        tuple(c["ch_mult"]),
        c["num_res_blocks"],
        tuple(levels),
        c["z_channels"],
        config["embed_dim"],
        config["n_embed"],
        attends,
        c["in_channels"],
        c["out_ch"],
    )


def code_gap(net, z):
    """Smallest difference between the second smallest and the smallest squared distance to a code."""
    distances = torch.cdist(z.movedim(1, -1).flatten(0, 2).double(), net.quantize.embedding.weight.double()) ** 2
    first, second = distances.topk(2, 1, largest=False).values.unbind(1)
    return (second - first).min()


def test_vqgan_checkpoint(vqgan, tmp_path):
    """Read without running what is in it; what belongs to the training is counted; the sizes in the file are those of the configuration."""
    with pytest.raises(pickle.UnpicklingError):
        torch.load(vqgan.file, weights_only=True)
    state = safe_load(vqgan.file)["state_dict"]
    net = first_stage(vqgan.config)
    assert load_ldm(net, vqgan.file) == sum(n.startswith("loss.") for n in state) > 0
    ours = net.state_dict()
    assert list(ours) == list(vqgan.net.state_dict()) and ours.keys() == {n for n in state if not n.startswith("loss.")}
    assert all(torch.equal(t, state[n]) and torch.equal(t, vqgan.net.state_dict()[n].cpu()) for n, t in ours.items())
    save_ldm(net, tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    assert again.keys() == ours.keys() and all(torch.equal(t, state[n]) for n, t in again.items())
    assert (net.factor, net.latent_channels) == (
        2 ** (len(vqgan.config["ddconfig"]["ch_mult"]) - 1),
        vqgan.config["embed_dim"],
    )


@torch.no_grad()
def test_vqgan_forward(vqgan):
    net, seen, modules = vqgan.net, {}, dict(vqgan.net.named_modules())
    probes = [n.removeprefix("probe_") for n in vqgan.arrays if n.startswith("probe_")]
    hooks = [
        modules[n].register_forward_hook(lambda _, __, out, n=n: seen.setdefault(n, []).append(out)) for n in probes
    ]
    z = net.encode(vqgan["x"])
    close(net.encoder(vqgan["x"]), vqgan["encoder_out"], PASS)
    for name in ("prequant", "interface_encode"):
        close(z, vqgan[name], PASS)
    zq, idx, loss = net.quantize(z)
    close(idx, vqgan["idx"], 0)
    close(zq, vqgan["quant"], PASS)
    close(loss, vqgan["vq_loss_legacy"], PASS)
    close(code_gap(net, z), vqgan["vq_margin_min"], PASS)
    close(net.post_quant_conv(zq), vqgan["post_quant_conv"], PASS)
    close(net.decode(zq, quantize=False), vqgan["decode_quant"], PASS)
    close(net.decode(z), vqgan["interface_decode"], PASS)
    close(net.decode(z, quantize=False), vqgan["interface_decode_noquant"], PASS)
    for name in probes:
        close(seen[name][0][:1, :8, 1::2, ::2], vqgan[f"probe_{name}"], PASS)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_vqgan_reconstruction(vqgan):
    """Also in float64, from which the official float32 is no further away than it says itself, by more than the other way of adding up."""
    rec, loss = vqgan.net(vqgan["x"])
    close(rec, vqgan["forward_rec"], PASS)
    close(loss, vqgan["forward_diff"], PASS)
    exact, _ = copy.deepcopy(vqgan.net).double()(vqgan["x"].double())
    close(exact, vqgan["forward_rec"], 1.5 * float(vqgan["rec_f64_minus_f32_maxabs"]))


def test_vqgan_straight_through_gradient(vqgan):
    z = vqgan["prequant"].requires_grad_()
    zq, _, loss = vqgan.net.quantize(z)
    (gradient,) = torch.autograd.grad(0.1 * zq.sum() + loss, z)
    close(gradient, vqgan["ste_grad_z"], PASS)


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
    """Each tensor's place taken by the next one of its shape: weights of the same size that are others."""
    groups = {}
    for name, t in tensors.items():
        groups.setdefault(t.shape, []).append(name)
    return {name: tensors[g[(g.index(name) + 1) % len(g)]] for name, t in tensors.items() for g in [groups[t.shape]]}


class BridgeGolden(Golden):
    """A set of BBDM, its file and the model read from it."""

    def __init__(self, folder, scratch):
        super().__init__(folder)
        self.file, self.extra = folder / "last_model.pth", self.config["extra"]
        if not self.file.exists():
            self.file = scratch / "last_model.pth"
            state = recipe(json.loads(str(self.arrays["shapes"])), self.config["seed"])
            b = dict(num_timesteps=1000, mt_type="linear", max_var=1.0) | self.config.get("bb", {})
            trained = {n: t for n, t in state.items() if not n.startswith("vqgan.")}
            model = Bridge(b["num_timesteps"], b["mt_type"], b["max_var"]).state_dict() | state
            torch.save(dict(step=1234, epoch=7, model=model, ema=shifted(trained)), self.file)
        self.model = self.load(ema=False)
        self.early, self.normal = (
            bool(self.extra.get("latent_before_quant_conv")),
            bool(self.extra.get("normalize_latent")),
        )

    def load(self, ema):
        u = self.config["unet"]
        early = bool(self.extra.get("latent_before_quant_conv"))
        model = load_bbdm(
            self.file,
            ema,
            stage_of,
            head_channels=u["num_head_channels"],
            num_heads=u["num_heads"],
            before_quant_conv=early,
        )
        for part in (model.net.eval(), model.bridge, model.first_stage):
            part.to(DEVICE)
        return model

    def variant(self, **changes):
        """The same model with other options: most arrays are made without normalization, from the latents after quant_conv."""
        model = copy.copy(self.model)
        vars(model).update(dict(normalize=False, before_quant_conv=False) | changes)
        return model

    def small(self):
        """What the network is shown of the gray image."""
        return self.model.net.cond_stage_model.shrink(self["img_cond"]) if "cond_context" in self else None

    def walk(self, steps, **options):
        """All (x, x0_hat) on the way back from enc_cond with the set's noise."""
        Z, model, small = self["loop_noise"], self.model, self.small()
        return list(
            p_sample_loop(
                lambda x, t: model.net(x, t, small), model.bridge, self["enc_cond"], steps, lambda k: Z[k], **options
            )
        )


@pytest.fixture(params=sets("bbdm"), scope="module")
def bbdm(request, tmp_path_factory):
    return BridgeGolden(request.param, tmp_path_factory.mktemp("bbdm"))


def test_bbdm_checkpoint(bbdm, tmp_path):
    """The sizes read off the tensors are the configuration's; every tensor of the file, raw or averaged, is in its place, and saved as it was."""
    file, u = torch.load(bbdm.file, weights_only=True), bbdm.config["unet"]
    context = u["in_channels"] - u["out_channels"]
    with torch.device("meta"):
        expected = UNet(u["in_channels"], out_channels=u["out_channels"], **unet_options(bbdm.config))
        stage = first_stage(bbdm.config["vq"])
    for ema in (False, True):
        model = bbdm.load(ema)
        ours = {n: t.shape for n, t in model.net.denoise_fn.state_dict().items()}
        assert list(ours.items()) == [(n, t.shape) for n, t in expected.state_dict().items()]
        weights = file["model"] | (file["ema"] if ema else {})
        state = (
            model.net.state_dict()
            | model.bridge.state_dict()
            | {f"vqgan.{n}": t for n, t in model.first_stage.state_dict().items()}
        )
        assert state.keys() == file["model"].keys() | (file.keys() - {"step", "epoch", "model", "ema"})
        assert all(torch.equal(t.cpu(), weights[n] if n in weights else file[n]) for n, t in state.items())
        assert (model.conditioning, model.normalize) == ("rescaler" if context else "nocond", bbdm.normal)
    assert {n: t.shape for n, t in model.first_stage.state_dict().items()} == {
        n: t.shape for n, t in stage.state_dict().items()
    }

    save_bbdm(tmp_path / "again.pth", bbdm.model, bbdm.load(ema=True).net, file["step"], file["epoch"])
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == file.keys() and (again["step"], again["epoch"]) == (file["step"], file["epoch"])
    for part in file.keys() - {"step", "epoch"}:
        (ours, theirs) = (dict(f[part] if isinstance(f[part], dict) else {part: f[part]}) for f in (again, file))
        assert ours.keys() == theirs.keys() and all(torch.equal(t, ours[n]) for n, t in theirs.items())


def test_bbdm_tables(bbdm):
    for name, arguments in json.loads(str(bbdm.arrays["table_names"])).items():
        tables = Bridge(*arguments).state_dict()
        assert len(tables) == 6
        for table, values in tables.items():
            close(values, bbdm[f"table_{name}_{table}"], 1e-6)


def test_bbdm_steps(bbdm):
    cases = [name for name in bbdm.arrays if name.startswith("steps_T")]
    assert cases
    for name in cases:
        timesteps, count = map(int, name.removeprefix("steps_T").split("_S"))
        close(sampling_timesteps(timesteps, count), bbdm[name], 0)


@torch.no_grad()
def test_bbdm_unet(bbdm):
    close(timestep_embedding(bbdm["temb_t"], 32), bbdm["temb_dim32"], PASS)
    context = bbdm["unet_context"] if "unet_context" in bbdm else None
    close(bbdm.model.net.denoise_fn(bbdm["unet_x"], bbdm["unet_t"], context), bbdm["unet_out"], 2e-5)


@torch.no_grad()
def test_bbdm_latents(bbdm):
    """Into the latent space and back, with the official options; of the same images in the ways that training and sampling go."""
    model, early, x, cond = bbdm.variant(), bbdm.variant(before_quant_conv=True), bbdm["img_x"], bbdm["img_cond"]
    rescaler = getattr(bbdm.model.net, "cond_stage_model", None)
    normal = bbdm.variant(
        normalize=True, net=Denoiser(bbdm.model.net.denoise_fn, rescaler, bbdm.config["vq"]["embed_dim"]).to(DEVICE)
    )
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
    close(loss, bbdm["vq_loss"], LOSS_OF_BRIDGE)
    close(code_gap(model.first_stage, model.encode(x)), bbdm["vq_margin_min"], PASS)

    batch = dict(rgb=(x + 1) / 2, gray=(cond[:, :1] + 1) / 2)
    for m, suffix in ((model, ""), (normal, "_normalized")):
        x0, y, _ = m.ends(batch)
        close(x0, bbdm["enc_x" + suffix], PASS)
        close(y, bbdm["enc_cond" + suffix], PASS)
    if "cond_context" in bbdm:
        close(model.net.cond_stage_model(cond), bbdm["cond_context"], PASS)
        close(
            model.net.cond_stage_model.channel_mapper(model.ends(batch)[2].expand(-1, 3, -1, -1)),
            bbdm["cond_context"],
            PASS,
        )


@pytest.mark.parametrize("objective", ["grad", "noise", "ysubx"])
@torch.no_grad()
def test_bbdm_bridge_and_losses(bbdm, objective):
    x0, y, t, noise, bridge = bbdm["enc_x"], bbdm["enc_cond"], bbdm["unet_t"], bbdm["noise"], bbdm.model.bridge
    x_t, at = bridge.q_sample(x0, y, t, noise), bridge.at(t)
    target, golden = bridge_target(objective, x0, y, noise, *at), bbdm[f"q_{objective}_x0rec_of_target"]
    close(x_t, bbdm[f"q_{objective}_xt"], PASS)
    close(target, bbdm[f"q_{objective}_target"], PASS)
    close(predict_x0(objective, target, x_t, y, *at), golden, 1e-3 * golden.std() if objective == "noise" else PASS)
    for loss in ("l1", "l2"):
        model = bbdm.variant(objective=objective, loss=loss)
        close(model.loss_at(x0, y, bbdm.small(), t, noise), bbdm[f"loss_{objective}_{loss}"], LOSS_OF_BRIDGE)
    if objective == "grad":
        answer = bbdm.model.net(x_t, t, bbdm.small())
        close(predict_x0("grad", answer, x_t, y, *at), bbdm["p_losses_x0_recon"], PASS)


def test_bbdm_gradients(bbdm):
    """Tensors whose gradient is zero in exact arithmetic (constants that a norm removes) hold rounding errors: only that they are small is compared."""
    model = bbdm.variant(objective="grad", loss="l1")
    loss = model.loss_at(bbdm["enc_x"], bbdm["enc_cond"], bbdm.small(), bbdm["unet_t"], bbdm["noise"])
    parameters = dict(model.net.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values())))
    names = [str(n) for n in bbdm.arrays["grad_names"]]
    assert names == [n for n in parameters if n.startswith("denoise_fn.")]
    ours, golden = stats_of(gradients, names), bbdm["grad_stats"]
    real = golden[:, 2] >= 1e-5 * golden[:, 2].max()
    assert real.float().mean() > 0.5 and (ours[~real, 2] < 1e-5 * golden[:, 2].max()).all()
    close_stats(ours[real], golden[real])
    close(gradients["denoise_fn.out.2.weight"], bbdm["grad_out_conv"], PASS)


@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("objective", ["grad", "noise", "ysubx"])
@torch.no_grad()
def test_bbdm_way_back(bbdm, objective, eta):
    steps = sampling_timesteps(bbdm.model.bridge.timesteps, bbdm.extra["S"])
    close(steps, bbdm["loop_steps"], 0)
    golden, way = bbdm[f"loop_{objective}_eta{eta}"], bbdm.walk(steps, eta=eta, objective=objective)
    close(way[-1][0], golden, 1e-3 * golden.std() if objective == "noise" else LOOP)
    if objective == "grad":
        close(torch.stack([x[:1] for x, _ in way]), bbdm[f"loop_grad_eta{eta}_traj"], LOOP)
        close(torch.stack([x0[:1] for _, x0 in way]), bbdm[f"loop_grad_eta{eta}_x0"], LOOP)
        if eta == 1:
            close(bbdm.walk(steps, clip=True)[-1][0], bbdm["loop_grad_eta1_clip"], LOOP)


@pytest.mark.parametrize("ema", [False, True])
@torch.no_grad()
def test_bbdm_colorizer(bbdm, ema, monkeypatch):
    """From the gray image to the color image as a user calls it, with the set's noise; the end of the walk decodes to the same codes."""
    model, cond, Z = bbdm.load(ema), bbdm["img_cond"], bbdm["loop_noise"]
    golden, steps = bbdm["sample_image_ema" if ema else "sample_image"], bbdm.extra["S"]
    drawn = iter(Z.flatten(0, 1))
    colorize = bbdm_colorizer(model, steps)
    gray, ends = (cond[:, :1] + 1) / 2, []
    decode, model.decode = model.decode, lambda z: (ends.append(z), decode(z))[1]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda shape, generator=None, device=None: next(drawn).reshape(shape))
        rgb = colorize(gray, [torch.Generator()] * len(gray))
    assert next(drawn, None) is None
    close(rgb, ((golden + 1) / 2).clamp(0, 1), PASS)
    close(decode(torch.cat(ends)), golden, PASS)
    if not ema:
        z = model.normalized(torch.cat(ends), back=True)
        gaps = [code_gap(model.first_stage, model.first_stage.quant_conv(z) if model.before_quant_conv else z)]
        close(gaps[0], bbdm["sample_margin"], LOOP)
        assert min(gaps) >= bbdm["all_latents_margin_min"] - LOOP


class GivenNoise:
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
    options = (
        dict(optimizer="adam", lr=1e-4, beta1=0.9, beta2=0.999, schedule="constant", batch_size=1, seed=0) | options
    )
    return Trainer(
        trainee,
        Run(folder, options),
        np.zeros((1, 1, 1, 3), np.uint8),
        np.arange(1),
        Budget(steps, "steps"),
        options,
        device=DEVICE,
    )


def test_bbdm_training_steps(bbdm, tmp_path):
    """Batches whose gradients are summed, and Adam's steps, made by the training loop from stored latents."""
    model, T, Z = bbdm.load(ema=False), bbdm["train_t"], bbdm["train_noise"]
    model.normalize = False
    latents = torch.cat(
        [z for z in (bbdm["enc_x"], bbdm["enc_cond"], model.small(bbdm["img_cond"])) if z is not None], 1
    )
    trainer, last, seen = (
        loop_of(GivenNoise(model), tmp_path, len(T), accumulate=int(bbdm["train_accumulate"])),
        model.net.denoise_fn.out[2].weight,
        [],
    )
    last.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    for t, noise, golden in zip(T, Z, bbdm["train_losses"]):
        z = latents.flip(3) if trainer.step % 2 else latents
        close(
            train_step(trainer, dict(index=torch.arange(len(z)), latents=z, t=t, noise=noise))["net"],
            golden,
            LOSS_OF_BRIDGE,
        )
        trainer.step += 1
    close(seen[1], bbdm["train_accumulated_grad_out_conv_after2"], PASS)
    names = [str(n) for n in bbdm.arrays["train_after_names"]]
    assert names == [n for n, _ in model.net.named_parameters()]
    close_stats(stats_of(dict(model.net.named_parameters()), names), bbdm["train_after_stats"])
    close(last, bbdm["train_after_out_conv_w"], PASS)


def test_bbdm_averages(bbdm, tmp_path):
    """Copies first, then the moving average, taken by the training loop."""
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


def test_bbdm_learning_rates(bbdm, tmp_path):
    losses, golden = bbdm["plateau_losses"], bbdm.arrays["plateau_lr"]
    trainer = loop_of(
        Scripted(torch.zeros(1)),
        tmp_path,
        len(losses),
        schedule="plateau",
        plateau=dict(factor=0.5, patience=3, threshold=1e-4, cooldown=2, min_lr=5e-7),
    )
    for loss, rate in zip(losses, golden):
        train_step(trainer, dict(index=torch.arange(1), loss=loss))
        trainer.step += 1
        settle(trainer, "net")  # the plateau sees the loss at the latest before the next step
        assert trainer.optimizers["net"].param_groups[0]["lr"] == rate
