"""The conditional GAN of Cao et al. against numbers of the released code.

A set has arrays.npz and a checkpoint of TensorFlow 1; golden.py lists where sets lie. Its weights follow from the
variables' names (`procedural`). Cases that a small set leaves out are skipped.
"""

import numpy as np
import pytest
import torch
from golden import DEVICE, Golden, close, close_loss, close_stats, normal, sets, stats_of, tensor

import faic.cgan
from faic.cgan import CGAN, Critic, Generator, interpolated_slopes, load_official, load_variables, official_names
from faic.color import rgb_to_yuv, yuv_to_rgb
from faic.core import Budget
from faic.layers import count_params
from faic.tf_checkpoints import read_tf_checkpoint
from faic.train import TrainingState, train_step

UNUSED = ("d_h1_conv/biases", "d_h2_conv/biases", "d_h3_conv/biases")  # zero gradient: a norm follows
UNUSED += tuple(f"g_h{k}_conv/biases" for k in range(1, 6))
ORDERS = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}  # axes of TensorFlow among those of PyTorch
LINEAR = ("d_h4_lin/bias", "d_h5_lin/bias")  # zero gradient of the Wasserstein loss


def procedural(name, shape, seed):
    """The set's recipe for one variable."""
    z, kind = normal(name, shape, seed), name.split("/")[-1]
    if kind in ("w", "Matrix"):
        z = z / np.sqrt(np.prod(shape[:-1]))
    elif kind == "gamma":
        z = 1 + 0.3 * z
    elif kind == "moving_variance":
        z = 1 + 0.3 * np.abs(z)
    else:
        z = 0.3 * z
    return z.astype(np.float32)


def tf_shapes(net):
    """Variable -> shape in TensorFlow's order, from our network."""
    state = net.state_dict()
    return {
        theirs: tuple(state[ours].shape[i] for i in ORDERS[state[ours].dim()])
        for ours, theirs in official_names(net).items()
    }


def to_nchw(x):
    return x.permute(0, 3, 1, 2)


def to_unit(pixels):
    """(...,H,W,3) uint8 -> (...,3,H,W) in [0,1]."""
    return pixels.movedim(-1, -3).float() / 255


class CGANGolden(Golden):
    """One set, and networks with the recipe's weights."""

    def networks(self, side, z_size, kernel=5, small=True):
        c = self.config
        if small:
            G = Generator(side, tuple(c["widths_G"][:-1]), z_size=z_size)
            critic = Critic(side, tuple(c["widths_D"]), kernel, c["width_D_lin"])
        else:
            G, critic = Generator(side, z_size=z_size), Critic(side, kernel=kernel)
        for net in (G, critic):
            variables = {n: procedural(n, s, c["seed"]) for n, s in tf_shapes(net).items()}
            load_variables(net, variables, "the recipe").train().to(DEVICE)
        return G, critic

    def model(self, case, **options):
        """A trainee with the networks of a case, 'S' or 'G'."""
        c, model = self.config[case], CGAN(16, 4, 4, **options)
        model.G, model.critic = self.networks(c["image"], c["z"], c["kd"])
        return model

    def needs(self, name):
        if name not in self:
            pytest.skip(f"{self.folder} leaves {name} out")


@pytest.fixture(params=sets("cgan"))
def cgan(request):
    return CGANGolden(request.param)


def gradients(net, loss):
    """Variable -> gradient in TensorFlow's order."""
    names, named = official_names(net), dict(net.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()))
    return {names[ours]: tf_order(g) for ours, g in zip(named, found)}


def tf_order(x):
    """A weight in TensorFlow's order."""
    return x.permute(ORDERS[x.dim()])


def is_zero(name, of_loss):
    zero = UNUSED + (LINEAR if of_loss == "d" else ())
    return name.endswith(zero)


def close_gradients(ours, golden, of_loss, rtol):
    """Relative L2 error of each tensor; those that are zero in exact arithmetic must be nearly so."""
    largest = max(np.linalg.norm(g) for g in golden.values())
    for name, g in golden.items():
        if is_zero(name, of_loss):
            assert ours[name].norm() < 1e-5 * largest, name
            continue
        close((ours[name].cpu() - torch.tensor(g)).norm() / np.linalg.norm(g), 0.0, rtol)


def stored(cgan, prefix):
    """Name -> array of the arrays whose names begin with a prefix."""
    return {n.removeprefix(prefix): a for n, a in cgan.arrays.items() if n.startswith(prefix)}


def test_color(cgan):
    rgb, net = to_unit(cgan["color_rgb_u8"][None]).double(), to_nchw(cgan["color_net"][None])
    yuv = rgb_to_yuv(rgb)
    close(yuv, net, 1e-6)
    close((yuv + 1) * 127.5, to_nchw(cgan["color_yuv"][None]), 5e-5)
    for name, pixels in (("back_rgb", net), ("wild_rgb", to_nchw(cgan["color_wild_net"][None]))):
        close(yuv_to_rgb(pixels.double()) * 255, to_nchw(cgan[f"color_{name}"][None]), 1e-4)


def test_written_pictures_are_stretched(cgan):
    """SciPy's imsave maps the extremes of a whole file to 0 and 255; ours do not."""

    def stretched(rgb):
        return ((rgb - rgb.min()) / (rgb.max() - rgb.min()) * 255 + 0.5).floor()

    wild = yuv_to_rgb(to_nchw(cgan["color_wild_net"][None]).double())
    close(stretched(wild), to_nchw(cgan["color_wild_png"][None]), 0)
    four = yuv_to_rgb(to_nchw(cgan["color_grid_net"]).double())
    rows = [torch.cat([four[0], four[1]], 2), torch.cat([four[2], four[3]], 2)]
    close(stretched(torch.cat(rows, 1)).movedim(0, -1), cgan["color_grid_png"], 0)


def test_parameters_of_the_published_size(cgan):
    cgan.needs("P_num_params_G")
    with torch.device("meta"):
        G, critic = Generator(), Critic()
    assert count_params(G) == int(cgan["P_num_params_G"]) and count_params(critic) == int(cgan["P_num_params_D"])
    official = dict(zip(cgan.names("P_var_names"), cgan.names("P_var_shapes")))
    ours = {n: s for net in (G, critic) for n, s in tf_shapes(net).items()}
    assert {n.removesuffix(":0"): [int(i) for i in s.strip("()[]").split(",") if i] for n, s in official.items()} == {
        n: list(s) for n, s in ours.items()
    }


def test_checkpoint(cgan):
    if not (cgan.folder / "checkpoint").is_dir():
        pytest.skip(f"{cgan.folder} has no checkpoint")
    (index,) = cgan.folder.rglob("WGAN.model-333.index")
    variables = read_tf_checkpoint(index)
    assert all(np.array_equal(a, procedural(n, a.shape, cgan.config["seed"])) for n, a in variables.items())
    model = cgan.model("S")
    for ours, theirs in zip(load_official(index.parent), (model.G, model.critic)):
        a, b = ours.state_dict(), theirs.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k].cpu()) for k in a)


def test_forward_losses_and_gradients(cgan):
    model = cgan.model("S")
    yuv = rgb_to_yuv(to_unit(cgan["S_rgb_u8"]))
    if "S_images" in cgan:
        close(yuv, to_nchw(cgan["S_images"]), 1e-6)
    seen = {}
    for k, norm in enumerate([model.G.noise_norm[0], *model.G.norm]):
        norm.register_forward_hook(lambda _, __, out, k=k: seen.update({f"G_h{k}": out.relu()}))
    Y, z = yuv[:, :1], cgan["S_z"][:, None]
    close(model.G(Y, z).movedim(1, -1), cgan["S_G_out"], 3e-5)
    for k in range(6):
        row = seen[f"G_h{k}"].movedim(1, -1)[0]
        close(row[5], cgan[f"S_G_h{k}_ex0_row5"], 3e-5)
        close_stats(stats_of(seen, [f"G_h{k}"]), cgan[f"S_G_h{k}_stats"][None], 1e-5)

    loss = model.critic_loss(yuv, z)
    close(loss, cgan["S_d_loss"], 1e-5)
    close(-model.terms["critic_fake"], cgan["S_g_loss"], 1e-5)
    close_gradients(gradients(model.critic, loss), stored(cgan, "S_d_grad/"), "d", 1e-4)
    loss = model.generator_loss(Y, z)
    close(loss, cgan["S_g_loss"], 1e-5)
    close_gradients(gradients(model.G, loss), stored(cgan, "S_g_grad/"), "g", 5e-4)


@torch.no_grad()
def test_discriminator(cgan):
    model, seen = cgan.model("S"), {}
    for k, layer in enumerate([model.critic.conv[0], *model.critic.norm]):
        layer.register_forward_hook(
            lambda _, __, out, k=k: seen.update({f"D_h{k}_real": torch.nn.functional.leaky_relu(out, 0.2)})
        )
    real = rgb_to_yuv(to_unit(cgan["S_rgb_u8"]))
    close(model.critic(real), cgan["S_D_real"], 3e-5)
    for k in range(4):
        ours = seen[f"D_h{k}_real"][0].movedim(0, -1)
        close(ours[3] if k == 0 else ours, cgan[f"S_D_h{k}_real_ex0"], 3e-5)
        close_stats(stats_of(seen, [f"D_h{k}_real"]), cgan[f"S_D_h{k}_real_stats"][None], 1e-5)
    fake = torch.cat([real[:, :1], model.G(real[:, :1], cgan["S_z"][:, None])], 1)
    close(model.critic(fake), cgan["S_D_fake"], 3e-5)


@torch.no_grad()
def test_moving_averages(cgan):
    yuv = rgb_to_yuv(to_unit(cgan["S_rgb_u8"]))

    def averages(net):
        names = official_names(net)
        return {names[k]: v for k, v in net.state_dict().items() if k.endswith(("mean", "var"))}

    def compare(net, golden):
        ours = averages(net)
        assert golden
        for name, array in golden.items():
            close(ours[name], tensor(array), 5e-6)

    model = cgan.model("S")
    fake = torch.cat([yuv[:, :1], model.G(yuv[:, :1], cgan["S_z"][:, None])], 1)
    compare(model.G, stored(cgan, "S_bn_g/"))
    for case, passes in (("real_only", [yuv]), ("fake_only", [fake]), ("both", [yuv, fake])):
        critic = cgan.model("S").critic
        for images in passes:
            critic(images)
        compare(critic, stored(cgan, f"S_bn_d_{case}/"))


# Training: the loop's own steps, on the set's batches and noise.


class Given:
    """Hands out the set's noise and interpolation weights in place of random ones."""

    def __init__(self, cgan, case, monkeypatch):
        z = iter(cgan[f"{case}_z"][:, :, None])
        monkeypatch.setattr(faic.cgan, "sample_noise", lambda G, count, generator: next(z))
        shared = "GT_alphas"
        alphas = iter(cgan[shared] if case.startswith("GT") else ())

        def alpha(kind, shape, generator):
            assert kind == "official"
            return next(alphas).view(1, 1, 1, -1)

        monkeypatch.setattr(faic.cgan, "sample_alpha", alpha)


TRAINED = {  # case -> networks, pictures, options, (losses, first weights, final weights, statistics) tolerances
    "W1": ("S", "W_images_u8", (1e-5, 2e-6, 1e-7)),
    "W2": ("S", "W_images_u8", (1e-5, 2e-6, 2e-6)),
    "GT": ("G", "GT_images_u8", (1e-4, 3e-5, 5e-5)),
    "GT2": ("G", "GT_images_u8", (3e-4, 3e-4, 5e-4)),
}


def options_of(cgan, case):
    """Options of the network and of the loop."""
    w2, w3 = cgan.config["W2"], cgan.config["W3"]
    loop = dict(faic.cgan.ARCHITECTURE.paper, seed=0)
    if case == "W2":
        loop |= dict(lr=w2["g_lr"], lr_factors={"critic": w2["d_lr"] / w2["g_lr"]}, clip_weights={"critic": w2["clip"]})
    if case.startswith("GT"):
        loop |= faic.cgan.ARCHITECTURE.variants["penalty"] | dict(penalty_weight=cgan.config["lam"])
    if case == "GT2":
        loop |= dict(lr=w3["g_lr"], lr_factors={"critic": w3["d_lr"] / w3["g_lr"]}, penalty_weight=w3["lam"])
    return loop


@pytest.mark.parametrize("case", TRAINED)
def test_three_iterations(cgan, case, monkeypatch):
    """Eighteen batches: five for the discriminator and one for the generator, three times."""
    cgan.needs(f"{case}_z")
    networks, pictures, (losses_tol, stats_tol, weights_tol) = TRAINED[case]
    loop = options_of(cgan, case)
    model = cgan.model(networks, penalty=loop["penalty"], penalty_weight=loop["penalty_weight"])
    batches, size = cgan[f"{case}_batch_index"].long(), len(cgan[f"{case}_z"][0])
    Given(cgan, case, monkeypatch)
    indices = np.arange(size * len(batches))
    state = TrainingState(model, indices, Budget(len(batches), "steps"), loop | dict(batch_size=size), DEVICE)
    names = {n: official_names(net) for n, net in state.networks.items()}

    def variables():
        return {
            names[n][k]: tf_order(v).clone()
            for n, net in state.networks.items()
            for k, v in net.state_dict().items()
            if k in names[n]
        }

    def compare(stats, order):
        ours = variables()
        wanted = [n.removesuffix(":0") for n in order]
        keep = [i for i, n in enumerate(wanted) if "moving" not in n and not (case[0] == "G" and is_zero(n, "d"))]
        close_stats(stats_of(ours, [wanted[i] for i in keep]), stats[keep], stats_tol)

    critic_steps, kinds = 0, str(cgan.arrays[f"{case}_kinds"])
    for step, rows in enumerate(batches):
        found = train_step(state, dict(index=rows, rgb=to_unit(cgan[pictures][rows])))
        state.step += 1
        turn = "G" if "G" in found else "D"
        assert turn == kinds[step]
        if turn == "D":
            golden = cgan[f"{case}_d_step_losses"][critic_steps]
            close(-found["critic_fake"], golden[0], losses_tol)
            close(found["critic"], golden[1], losses_tol)
            critic_steps += 1
        if step == 0:
            clipped = f"{case}_d_first_clipped_stats"
            compare(cgan[clipped if clipped in cgan else f"{case}_d_first_stats"], cgan.names(f"{case}_d_var_names"))
            slots(cgan, case, state)
        if turn == "G":
            iteration = (step + 1) // model.cycle - 1
            compare(cgan[f"{case}_iter_stats"][iteration], cgan.names(f"{case}_var_names"))
    final = variables()
    for name, array in stored(cgan, f"{case}_final/").items():
        moving = "moving" in name
        if case[0] == "G" and is_zero(name, "d"):  # Adam makes steps of rounding noise
            continue
        close(final[name], tensor(array), 5e-6 if moving else weights_tol)


def slots(cgan, case, state):
    """The optimizer's averages after the first step of the discriminator."""
    kinds = dict(RMSProp="square_avg", Adam="exp_avg", Adam_1="exp_avg_sq")
    parameters = {
        official_names(state.networks["critic"])[n]: p for n, p in state.networks["critic"].named_parameters()
    }
    compared = 0
    for name, array in stored(cgan, f"{case}_slot/").items():
        variable, kind = name.removesuffix(":0").rsplit("/", 1)
        if kind not in kinds or variable not in parameters:
            continue
        ours = state.optimizers["critic"].state[parameters[variable]][kinds[kind]]
        close((tf_order(ours).cpu() - torch.tensor(array)).norm() / np.linalg.norm(array), 0.0, 1e-4)
        compared += 1
    assert compared
    smallest_largest = cgan.arrays[f"{case}_slot_init_min_max"]
    first = [
        r for n, r in zip(cgan.names(f"{case}_slot_init_names"), smallest_largest) if "RMSProp" in n and "_1" not in n
    ]
    assert all(tuple(r) == (1, 1) for r in first) and bool(first) == (case[0] == "W")


# The gradient penalty.


def test_gradient_penalty(cgan):
    cgan.needs("G_alpha")
    model = cgan.model("G", penalty="official", penalty_weight=cgan.config["lam"])
    yuv, z = rgb_to_yuv(to_unit(cgan["G_rgb_u8"])), cgan["G_z"][:, None]
    alpha = cgan["G_alpha"].view(1, 1, 1, -1)
    fake = torch.cat([yuv[:, :1], model.G(yuv[:, :1], z)], 1).detach()
    close(fake[0, 1:].movedim(0, -1), cgan["G_G_out_ex0"], 3e-5)
    slopes = interpolated_slopes(model.critic, yuv, fake, alpha, "official")
    close(slopes.transpose(1, 2), cgan["G_slopes"], 1e-5)
    loss = model.critic_loss(yuv, z, alpha)
    close(loss, cgan["G_d_loss"], 1e-5)
    close(model.terms["penalty"], cgan["G_gradient_penalty"], 1e-5)
    close(-model.terms["critic_fake"], cgan["G_g_loss"], 1e-5)
    close_gradients(gradients(model.critic, loss), stored(cgan, "G_d_grad/"), "d", 5e-4)
    found, names = gradients(model.G, model.generator_loss(yuv[:, :1], z)), cgan.names("G_g_grad_names")
    keep = [i for i, n in enumerate(names) if not is_zero(n, "g")]
    close_stats(stats_of(found, [names[i] for i in keep]), cgan["G_g_grad_stats"][keep], 5e-4)


# The published widths.


def published(cgan, **options):
    model = CGAN(16, 4, 4, **options)
    model.G, model.critic = cgan.networks(64, 100, small=False)
    return model


def test_published_size(cgan):
    cgan.needs("P_z")
    model, yuv, z = published(cgan), rgb_to_yuv(to_unit(cgan["P_rgb_u8"])), cgan["P_z"][:, None]
    out = {"uv": model.G(yuv[:, :1], z)}
    close(out["uv"][0].movedim(0, -1), cgan["P_G_out_ex0"], 5e-5)
    close_stats(stats_of(out, ["uv"]), cgan["P_G_out_stats"][None], 1e-5)
    with torch.no_grad():
        close(model.critic(yuv), cgan["P_D_real"], 5e-5)
    with torch.no_grad():
        close(model.critic_loss(yuv, z), cgan["P_d_loss"], 1e-5)
        close(model.generator_loss(yuv[:, :1], z), cgan["P_g_loss"], 1e-5)


def test_gradients_of_the_published_size(cgan):
    cgan.needs("P_d_grad_stats")
    model, yuv, z = published(cgan), rgb_to_yuv(to_unit(cgan["P_rgb_u8"])), cgan["P_z"][:, None]
    for of_loss, net in (("d", model.critic), ("g", model.G)):
        loss = model.critic_loss(yuv, z) if of_loss == "d" else model.generator_loss(yuv[:, :1], z)
        found, names = gradients(net, loss), cgan.names(f"P_{of_loss}_grad_names")
        keep = [i for i, n in enumerate(names) if not is_zero(n, of_loss)]
        close_stats(stats_of(found, [names[i] for i in keep]), cgan[f"P_{of_loss}_grad_stats"][keep], 1e-2)
        close_gradients(found, stored(cgan, f"P_{of_loss}_grad/"), of_loss, 5e-3)


@pytest.mark.slow
def test_published_size_with_penalty(cgan):
    """64 images of 64x64 through the published discriminator and its second derivative."""
    cgan.needs("PG_d_loss")
    r = np.random.RandomState(cgan.config["seed"] + 11)
    rgb = tensor(r.randint(0, 256, (64, 64, 64, 3)).astype(np.uint8))
    z = tensor(r.uniform(-1, 1, (64, 100)).astype(np.float32))
    alpha = tensor(r.uniform(0, 1, (64, 1)).astype(np.float32))
    assert int(rgb.long().sum()) == int(cgan["PG_rgb_sum"])
    close(alpha[:3], cgan["PG_alpha_ex3"], 0)
    model, yuv = published(cgan, penalty="official", penalty_weight=10.0), rgb_to_yuv(to_unit(rgb))
    loss = model.critic_loss(yuv, z[:, None], alpha.view(1, 1, 1, -1))
    close(loss, cgan["PG_d_loss"], 5e-4)
    close(model.terms["penalty"], cgan["PG_gradient_penalty"], 5e-4)
    close(-model.terms["critic_fake"], cgan["PG_g_loss"], 5e-4)
    found, names = gradients(model.critic, loss), cgan.names("PG_d_grad_names")
    keep = [i for i, n in enumerate(names) if not is_zero(n, "d")]
    close_stats(stats_of(found, [names[i] for i in keep]), cgan["PG_d_grad_stats"][keep], 1e-2)


def test_the_sum_of_both_losses(cgan):
    """The total that the released code prints depends on photographs only."""
    model = cgan.model("S")
    model.critic_loss(rgb_to_yuv(to_unit(cgan["S_rgb_u8"])), cgan["S_z"][:, None])
    close_loss(-model.terms["critic_real"], cgan["S_total_loss"], 1e-4)
