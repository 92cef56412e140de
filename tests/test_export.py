"""Export to ONNX: the file computes what PyTorch computes, or it is not written."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from test_architecture import TOY

import faic.export
from faic.cli import main
from faic.colorizer import RunColorizer
from faic.core import make_generator
from faic.export import (
    TOLERANCE,
    GivenNumbers,
    OnePass,
    RecordedNumbers,
    export_colorizer,
    largest_difference,
    probe_images,
    run_export,
    trace_onnx,
)
from faic.pix2pix import LatentPix2Pix
from faic.presets import ARCHITECTURES, default_sampling, make_colorizer, make_trainee, model_options
from faic.vqgan import VQModel

ONE_PASS = [name for name, architecture in ARCHITECTURES.items() if not architecture.many_passes]
SOME = [pytest.param(name, marks=[pytest.mark.slow] * (i > 0)) for i, name in enumerate(ONE_PASS)]  # seconds each
MANY_PASSES = [name for name in ARCHITECTURES if name not in ONE_PASS]


@pytest.fixture
def onnx():
    """The extra, or a skipped test."""
    for name in faic.export.PACKAGES:
        pytest.importorskip(name, reason=f"{name} is missing: pip install -c constraints.txt -e '.[onnx]'")


def shaken(trainee):
    """Weights, and norm statistics of a training, that are far from the initial ones."""
    generator = make_generator("shaken")
    for network in trainee.networks().values():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point() and tensor.dim() < 2:
                tensor += 0.3 * torch.rand(tensor.shape, generator=generator)
            elif tensor.is_floating_point():
                tensor *= 3
        network.eval()
    return trainee


def opened(model, **sampling):
    """A run's colorizer, as `open_run_colorizer` returns it."""
    options = model_options(model, "smoke") | dict(width=8)
    trainee = shaken(make_trainee(model, options))
    sampling = default_sampling(model, "smoke") | sampling
    colorize, made_with = make_colorizer(model, trainee, sampling), dict(run="a run", day=5)
    cpu = torch.device("cpu")
    return RunColorizer(
        None, 5, colorize, options["side"], trainee.gray_kind, cpu, made_with, trainee, sampling, {}, model
    )


def test_each_architecture_of_one_pass_is_named():
    assert set(ONE_PASS) == {"pix2pix", "classifier", "cgan"}


@pytest.mark.parametrize("model", ONE_PASS)
def test_random_numbers_as_inputs_change_nothing(model):
    found, gray = opened(model), probe_images(2, 64)
    recorded = RecordedNumbers([make_generator(i, "photo") for i in range(2)])
    expected = found.colorize(gray, [make_generator(i, "photo") for i in range(2)])
    assert torch.equal(found.colorize(gray, recorded), expected)
    network = OnePass(found.colorize, found.trainee.networks().values())
    assert torch.equal(network(gray, *recorded.numbers), expected)
    if recorded.numbers:
        assert not torch.equal(found.colorize(gray, GivenNumbers([1 - n for n in recorded.numbers])), expected)


@pytest.mark.parametrize("model", SOME)
def test_a_file_computes_what_faic_colorize_computes(onnx, tmp_path, model):
    found = opened(model)
    made = export_colorizer(found, tmp_path / "new" / "model.onnx")
    assert 0 < made.difference < 1e-5
    for count in (1, 4):
        assert largest_difference(made.file, found.colorize, probe_images(count, 64)) < 1e-5
    assert made.inputs["gray"].startswith("(batch,1,64,64) in [0,1], ")
    assert [f.name for f in made.file.parent.iterdir()] == ["model.onnx"]
    import onnxruntime

    session = onnxruntime.InferenceSession(made.file, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == list(made.inputs)
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["faic"])
    assert metadata == found.made_with | dict(inputs=made.inputs)


@pytest.mark.slow
def test_the_norm_of_the_sampling_is_in_the_file(onnx, tmp_path):
    """Norm statistics of each image and of the training give other colors, and the file of one is not the other's."""
    by_image, running = opened("pix2pix"), opened("pix2pix", batch_norm="running")
    made = export_colorizer(running, tmp_path / "model.onnx")
    assert largest_difference(made.file, running.colorize, probe_images(2, 64)) < 1e-5
    assert largest_difference(made.file, by_image.colorize, probe_images(2, 64)) > 100 * TOLERANCE


@pytest.mark.slow
def test_dropout_masks_and_latents(onnx, tmp_path):
    """Where the U-Net is deep its dropout needs numbers; in latents a first stage encodes and decodes."""
    deep = make_trainee("pix2pix", model_options("pix2pix", "smoke") | dict(side=128, width=4, dropout=0.5))
    sampling = default_sampling("pix2pix", "smoke")
    colorize = make_colorizer("pix2pix", deep, sampling)
    made_with, cpu = dict(run="a run", day=5), torch.device("cpu")
    found = RunColorizer(None, 5, colorize, 128, "lab", cpu, made_with, deep, sampling, {}, "pix2pix")
    made = export_colorizer(found, tmp_path / "deep.onnx")
    assert made.inputs["numbers0"].endswith("random, uniform in [0,1)") and made.difference < 1e-5

    torch.manual_seed(0)
    stage = VQModel(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, n_embed=32).eval()
    latent = LatentPix2Pix(side=8, width=4, first_stage=stage)
    colorize, parts = make_colorizer("pix2pix", latent, sampling), dict(stage=stage)
    found = RunColorizer(None, 5, colorize, 32, "bbdm", cpu, made_with, latent, sampling, parts, "pix2pix")
    made = export_colorizer(found, tmp_path / "latent.onnx")
    assert made.difference < TOLERANCE and made.inputs["gray"].startswith("(1,1,32,32)")  # it encodes 16 at a time
    assert largest_difference(made.file, colorize, probe_images(1, 32)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("way", ["the size as a number", "a few at a time"])
def test_a_fixed_batch_size_becomes_one_image(onnx, way):
    """A file for any number of images would drop those after the sixteenth."""
    net = torch.nn.Conv2d(1, 3, 1)

    def colorize(gray, generator):
        if way == "a few at a time":
            return torch.cat([net(some) for some in gray.split(16)])
        return net(gray) * len(gray)

    inputs = trace_onnx(OnePass(colorize, [net]), probe_images(2, 8), []).model.graph.inputs
    assert list(inputs[0].shape) == [1, 1, 8, 8]


def test_a_further_architecture_is_exported_from_its_run(onnx, tmp_path, monkeypatch):
    """The command, from a run folder on."""
    monkeypatch.setitem(ARCHITECTURES, "toy", TOY)
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    folder, options = tmp_path / "runs" / "phase2-toy", TOY.paper | dict(width=4)
    folder.mkdir(parents=True)
    made = dict(time="2026-01-01", components={})
    (folder / "options.json").write_text(
        json.dumps(
            dict(phase="phase2", model="toy", preset="smoke", train=options, data=dict(side=64), made=made, seed=0)
        )
    )
    network = make_trainee("toy", options).net
    save_file({f"net.{name}": tensor for name, tensor in network.state_dict().items()}, folder / "day-5.safetensors")
    done = CliRunner().invoke(main, ["export", "toy", "model.onnx", "-p", "gain", "2"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("model.onnx: phase2-toy, day 5\n") and "largest difference" in done.output
    again = CliRunner().invoke(main, ["export", "toy", "model.onnx"])
    assert again.exit_code == 1 and "is there already and is not replaced" in again.output
    wrong = CliRunner().invoke(main, ["export", "toy", "other.onnx", "-p", "gain", "3"])
    assert wrong.exit_code == 1 and "expected an integer from 1 to 2" in wrong.output


@pytest.mark.parametrize("model", MANY_PASSES)
def test_a_model_of_many_passes_says_why(model, tmp_path):
    done = CliRunner().invoke(main, ["export", model, str(tmp_path / "model.onnx")])
    assert done.exit_code == 1 and ARCHITECTURES[model].many_passes in done.output
    assert done.output.endswith(f"give a model of one pass: {', '.join(ONE_PASS)}\n") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("taken", ["file", "dangling link"])
def test_a_file_that_is_there_stays(tmp_path, taken):
    file = tmp_path / "model.onnx"
    if taken == "file":
        file.write_text("precious")
    else:
        file.symlink_to(tmp_path / "none")
    with pytest.raises(FileExistsError, match="is not replaced; give another name"):
        run_export("pix2pix", file)
    assert list(tmp_path.iterdir()) == [file] and (taken != "file" or file.read_text() == "precious")
    with pytest.raises(ValueError, match=r"ends in .onnx, got '.*model.pth'"):
        run_export("pix2pix", tmp_path / "model.pth")


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """And its partial name differs between two machines that share a folder and a PID."""
    shape = SimpleNamespace(inputs=[SimpleNamespace(shape=[1])])
    program = SimpleNamespace(model=SimpleNamespace(graph=shape), save=lambda file, **options: file.write_text("model"))
    partials, target = [], tmp_path / "model.onnx"
    monkeypatch.setattr(faic.export, "largest_difference", lambda *arguments: 0.0)
    monkeypatch.setattr(faic.export.platform, "node", lambda: "container-7")
    monkeypatch.setattr(faic.export.os, "fsync", lambda file: partials.extend(tmp_path.iterdir()))
    faic.export._write_checked(program, None, 8, target)
    assert len(partials) == 1 and "container-7" in partials[0].name
    assert list(tmp_path.iterdir()) == [target] and target.read_text() == "model"


@pytest.mark.slow
def test_a_wrong_file_is_not_kept(onnx, tmp_path, monkeypatch):
    monkeypatch.setattr(faic.export, "largest_difference", lambda *arguments: float("nan"))
    with pytest.raises(ValueError, match="differs from PyTorch by nan"):
        export_colorizer(opened("classifier"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"not installed: .*onnxruntime.*Run pip install .*\[onnx\]"):
        faic.export.require_onnx()
