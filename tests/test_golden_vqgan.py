"""The VQGAN, BBDM's first stage, against numbers of the official code.

A set has arrays.npz and the official model.ckpt; golden.py lists where sets lie. The repository's set has no
checkpoint: the test writes it from weights that follow from each tensor's name and a seed.
"""

import copy
import json
import pickle
import sys
import types

import pytest
import torch
from golden import DEVICE, Golden, close, code_gap, first_stage, recipe, sets

from faic.checkpoints import safe_load
from faic.first_stages import ldm_model, load_ldm, save_ldm

PASS = 5e-5  # absolute: activations of one pass


def write_model_ckpt(path, state):
    """Write a file as LDM's training framework does: with the discriminator's tensors, and with a class as a key."""
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
        callbacks = {module.ModelCheckpoint: dict(best_model_score=torch.tensor(0.5))}
        torch.save(dict(epoch=12, global_step=3456, state_dict=state | loss, callbacks=callbacks), path)
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


def test_checkpoint(vqgan, tmp_path):
    """The checkpoint is read without running its code, tensors of the training are counted, all others have a place."""
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
    assert net.factor == 2 ** (len(vqgan.config["ddconfig"]["ch_mult"]) - 1)
    assert net.latent_channels == vqgan.config["embed_dim"]


@torch.no_grad()
def test_forward(vqgan):
    net, outputs, modules, hooks = vqgan.net, {}, dict(vqgan.net.named_modules()), []
    for name in [n.removeprefix("probe_") for n in vqgan.arrays if n.startswith("probe_")]:
        outputs[name] = []
        hooks.append(modules[name].register_forward_hook(lambda _, __, out, name=name: outputs[name].append(out)))
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
    for name, (first, *_) in outputs.items():
        close(first[:1, :8, 1::2, ::2], vqgan[f"probe_{name}"], PASS)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_reconstruction(vqgan):
    """Float64 is as far from the official float32 as the set says, but for half of that: the order of sums differs."""
    rec, loss = vqgan.net(vqgan["x"])
    close(rec, vqgan["forward_rec"], PASS)
    close(loss, vqgan["forward_diff"], PASS)
    exact, _ = copy.deepcopy(vqgan.net).double()(vqgan["x"].double())
    close(exact, vqgan["forward_rec"], 1.5 * float(vqgan["rec_f64_minus_f32_maxabs"]))


def test_straight_through_gradient(vqgan):
    z = vqgan["prequant"].requires_grad_()
    zq, _, loss = vqgan.net.quantize(z)
    (gradient,) = torch.autograd.grad(0.1 * zq.sum() + loss, z)
    close(gradient, vqgan["ste_grad_z"], PASS)
