"""Pix2Pix against numbers of the official code.

A set has arrays.npz, latest_net_G.pth and latest_net_D.pth; golden.py lists where sets lie.
"""

import numpy as np
import pytest
import torch
from golden import DEVICE, Golden, close, close_loss, close_stats, sets, stats_of

from faic.color import lab_to_rgb, rgb_to_lab, scale_lab, truncate_uint8, unscale_lab
from faic.pix2pix import PatchDiscriminator, Pix2Pix, gan_loss, load_official, load_unet, official_names
from faic.train import official_linear

FORWARD = 2e-5  # absolute: answers and running statistics of one pass


class Pix2PixGolden(Golden):
    """One set of Pix2Pix, and networks with its weights."""

    def G(self):
        return load_unet(self.folder / "latest_net_G.pth").eval().to(DEVICE)

    def D(self):
        net = PatchDiscriminator(self.config["ic"] + self.config["oc"], self.config["ndf"])
        return load_official(net, self.folder / "latest_net_D.pth").eval().to(DEVICE)


@pytest.fixture(params=sets("pix2pix"))
def pix2pix(request):
    return Pix2PixGolden(request.param)


def sub4(x):
    """Every fourth pixel, as the set stores large images."""
    return x[:, :, 1::4, 2::4]


@torch.no_grad()
def test_generator_eval(pix2pix):
    G, A = pix2pix.G(), pix2pix["A"]
    out = G(A)
    close(out[:, :, 1::2, ::2], pix2pix["G_eval_s2"], FORWARD)
    close(out[:, :, 100:116, 200:216], pix2pix["G_eval_crop16"], FORWARD)


@torch.no_grad()
def test_generator_down_convolutions(pix2pix):
    G, seen = pix2pix.G(), {}
    for k, conv in enumerate(G.down):
        conv.register_forward_hook(lambda _, __, out, k=k: seen.update({k: out}))
    G(pix2pix["A"])
    cases = [k for k in range(len(G.down)) if f"G_eval_down{k}_conv" in pix2pix]
    assert cases
    for k in cases:
        close(seen[k][:1], pix2pix[f"G_eval_down{k}_conv"], FORWARD)


@torch.no_grad()
def test_discriminator(pix2pix):
    pair = torch.cat([pix2pix["A"], pix2pix["B"]], 1)
    close(pix2pix.D()(pair), pix2pix["D_eval"], FORWARD)
    close(pix2pix.D().train()(pair), pix2pix["D_trainbn"], FORWARD)


@torch.no_grad()
def test_batch_norm_modes(pix2pix):
    G, A = pix2pix.G().train(), pix2pix["A"]
    close(sub4(G(A)), pix2pix["G_trainbn_s4"], FORWARD)
    close(G.down_norm[0].running_mean, pix2pix["G_trainbn_rm_after"], FORWARD)
    close(G.down_norm[0].running_var, pix2pix["G_trainbn_rv_after"], FORWARD)
    before = {k: v.clone() for k, v in G.state_dict().items()}
    close(sub4(G(A, per_image=True))[:1], pix2pix["G_trainbn_b0_s4"], FORWARD)
    untouched = all(torch.equal(v, before[k]) for k, v in G.state_dict().items())
    assert untouched, "per-image statistics must leave the running ones alone"


@torch.no_grad()
def test_dropout(pix2pix):
    G, A = pix2pix.G().train(), pix2pix["A"]
    masks = [pix2pix[f"drop_mask{i}"].float() for i in range(len(G.mask_shapes(*A.shape[-2:])))]
    close(sub4(G(A, masks)), pix2pix["G_traindrop_s4"], FORWARD)


@pytest.mark.parametrize("mode", ["vanilla", "lsgan", "wgangp"])
def test_gan_losses(pix2pix, mode):
    for real in (True, False):
        golden = pix2pix[f"ganloss_{mode}_{'real' if real else 'fake'}"]
        close(gan_loss(pix2pix["ganloss_pred"], real, mode), golden, 1e-6 * max(1, abs(golden)))


def test_three_training_steps(pix2pix):
    model = Pix2Pix(dropout=0)
    model.G, model.D = pix2pix.G().train(), pix2pix.D().train()
    networks = model.networks()
    optimizers = {n: torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for n, net in networks.items()}
    A, B = pix2pix["A"], pix2pix["B"]
    batches = [(A, B), (A.flip(3), B.flip(3)), (-A, B.flip(2))]
    official = {ours: theirs for net in networks.values() for ours, theirs in official_names(net).items()}
    names = pix2pix.names("train_loss_names")
    for step, (L, ab) in enumerate(batches):
        losses = {}
        for name, loss in model.make_losses(L, ab):
            losses[name] = loss.item()
            optimizers[name].zero_grad()
            loss.backward(inputs=list(networks[name].parameters()))
            if step == 0 and name == "G":
                gradients = {official[n]: p.grad for n, p in model.G.named_parameters()}
                stats = stats_of(gradients, pix2pix.names("step0_G_grad_names"))
                close_stats(stats, pix2pix["step0_G_grad_stats"])
            optimizers[name].step()
        losses |= {k: v.item() for k, v in model.terms.items()}
        for name, golden in zip(names, pix2pix.arrays["train_losses"][step]):
            close_loss(losses[name], golden, 1e-4)

    for name, net in networks.items():
        state = {official_names(net)[k]: v for k, v in net.state_dict().items()}
        stats = stats_of(state, pix2pix.names(f"after3_{name}_names"))
        close_stats(stats, pix2pix[f"after3_{name}_stats"])
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
    def official(L, ab):
        return lab_to_rgb(unscale_lab(L, ab).double())[0].permute(1, 2, 0)

    close(truncate_uint8(official(pix2pix["rgb2_A"][None], pix2pix["rgb2_B"][None])), pix2pix["roundtrip_u8_trunc"], 0)
    A, B = pix2pix["A"][:1], pix2pix["B"][:1]
    rgb = official(A, B)[1::4, 2::4]
    close(rgb * 255, pix2pix["lab2rgb_float_s4"], 2e-4)
    close(truncate_uint8(rgb), pix2pix["lab2rgb_u8_s4"], 0)
    close(truncate_uint8((A[0][:1] + 1) / 2).permute(1, 2, 0)[1::4, 2::4], pix2pix["real_A_u8_s4"], 0)


def test_learning_rates(pix2pix):
    constant, decay, last = pix2pix.config["ne"], pix2pix.config["nd"], len(pix2pix.arrays["lr_by_epoch"])

    def rates(first):
        return np.array([2e-4 * official_linear(epoch, constant, decay) for epoch in range(first, last + 1)])

    close(rates(1), pix2pix["lr_by_epoch"], 1e-12)
    close(rates(int(pix2pix["lr_resume_epoch_count"])), pix2pix["lr_by_epoch_resumed"], 1e-12)
