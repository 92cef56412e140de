"""Numbers produced by running the official code, against ours.

A set is a folder <root>/<model>/ with arrays.npz and, for Pix2Pix, latest_net_G.pth and latest_net_D.pth. The repo keeps a small set in
tests/golden; ../shared/golden is used too where it is there; the environment variable FAIC_GOLDEN replaces both. Shapes, sizes and options
come from the files. Tolerances are those of the set's README, by quantity."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from faic.color import lab_to_rgb, rgb_to_lab, scale_lab, truncate_uint8, unscale_lab
from faic.pix2pix import PatchDiscriminator, Pix2Pix, gan_loss, load_official, official_names, unet_of
from faic.train import official_linear

TESTS = Path(__file__).parent
ROOTS = [Path(os.environ["FAIC_GOLDEN"]).resolve()] if os.environ.get("FAIC_GOLDEN") else [TESTS / "golden", TESTS.parents[1] / "shared" / "golden"]


def sets(model):
    """All golden sets of a model, as pytest parameters whose ids contain the model's name."""
    found = sorted({f.parent for root in ROOTS for f in root.rglob("arrays.npz") if any(model in part for part in f.parent.relative_to(root.parent).parts)})
    if not found:
        return [pytest.param(None, id=model, marks=pytest.mark.skip(reason=f"no golden set of {model} under {', '.join(map(str, ROOTS))}"))]
    return [pytest.param(f, id=f"{model}-{f.relative_to(root.parent)}") for f in found for root in ROOTS if root in f.parents]


class Golden:
    """One set: its arrays as tensors, its configuration, and networks with its weights."""

    def __init__(self, folder):
        self.folder = folder
        self.arrays = dict(np.load(folder / "arrays.npz", allow_pickle=False))
        self.config = json.loads(str(self.arrays["config"]))

    def __getitem__(self, name):
        return torch.tensor(self.arrays[name])

    def __contains__(self, name):
        return name in self.arrays

    def G(self):
        return unet_of(self.folder / "latest_net_G.pth").eval()

    def D(self):
        c = self.config
        return load_official(PatchDiscriminator(c["ic"] + c["oc"], c["ndf"]), self.folder / "latest_net_D.pth").eval()


@pytest.fixture(params=sets("pix2pix"))
def pix2pix(request):
    return Golden(request.param)


def close(ours, golden, tolerance):
    ours, golden = torch.as_tensor(ours).detach().double(), torch.as_tensor(golden).double()
    assert ours.shape == golden.shape
    worst = (ours - golden).abs().max().item()
    assert worst <= tolerance, f"largest difference {worst:.2e}, tolerance {tolerance:.0e}"


def sub4(x):
    return x[:, :, 1::4, 2::4]


def stats_of(state, names):
    """(sum, sum of |x|, L2 norm) of each named tensor in float64."""
    rows = [state[n].double() for n in names]
    return torch.stack([torch.stack([x.sum(), x.abs().sum(), x.norm()]) for x in rows])


def close_stats(ours, golden, rtol=1e-3):
    """Sums may cancel, so they are compared on the scale of the sum of magnitudes."""
    scale = golden[:, 1:2].clamp_min(1e-12)
    assert ((ours - golden).abs()[:, :1] <= rtol * scale).all()
    assert torch.allclose(ours[:, 1:], golden[:, 1:], rtol=rtol, atol=1e-9)


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
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items()), "per-image statistics must leave the running ones alone"


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
    parts = model.parts()
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
                close_stats(stats_of(grads, [str(n) for n in pix2pix.arrays["step0_G_grad_names"]]), pix2pix["step0_G_grad_stats"])
            optimizers[part].step()
        losses |= {k: v.item() for k, v in model.terms.items()}
        for name, golden in zip(names, pix2pix.arrays["train_losses"][step]):
            assert losses[name] == pytest.approx(golden, rel=1e-4), (step, name)

    for part, net in parts.items():
        state = {official_names(net)[k]: v for k, v in net.state_dict().items()}
        close_stats(stats_of(state, [str(n) for n in pix2pix.arrays[f"after3_{part}_names"]]), pix2pix[f"after3_{part}_stats"])
    close(sub4(model.G.eval()(A[:1])), pix2pix["after3_G_eval_b0_s4"], 5e-3)
    close(model.G.down[0].weight, pix2pix["after3_G_w_first"], 3e-4)
    close(model.G.up[0].weight, pix2pix["after3_G_w_last"], 3e-4)
    close(model.G.up[0].bias, pix2pix["after3_G_b_last"], 3e-4)
    close(model.D.conv[0].weight, pix2pix["after3_D_w0"], 3e-4)
    close(model.D.conv[4].bias, pix2pix["after3_D_b_last"], 7e-4)


def test_data_and_colour(pix2pix):
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
