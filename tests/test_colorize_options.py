"""What a user may ask of `faic colorize`: strength, several answers, side by side, a model, many inputs; no leaks."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from skimage.data import astronaut

import faic.colorize
from faic.cli import colorize as command
from faic.cli import main
from faic.color import rgb_to_lab
from faic.colorize import read_record, run_colorize
from faic.colorizer import RunColorizer, choose_run
from faic.core import RESULT_SOFTWARE, write_json
from faic.full_size import UPSAMPLING, colorize_photo, scale_chroma, upsample_chroma
from faic.parameters import ParameterError
from faic.runs import Run

CPU = torch.device("cpu")


def paint(gray, generators):
    """A faint color of each random number."""
    color = torch.rand(1, 3, 1, 1, generator=generators[0]) * 0.2 - 0.1
    return (gray + color).clamp(0, 1)


@pytest.fixture
def opened(monkeypatch):
    """Stands for a trained run; lists how it was opened."""
    calls = []

    def open_run_colorizer(model, *arguments):
        calls.append(model)
        return RunColorizer(None, 1, paint, 32, "lab", CPU, dict(run="a run"))

    monkeypatch.setattr(faic.colorize, "open_run_colorizer", open_run_colorizer)
    return calls


@pytest.fixture
def photo(tmp_path):
    """A gray photograph that is neither black nor white anywhere."""
    file = tmp_path / "grandmother.jpg"
    light = np.indices((40, 60)).sum(0) + 80
    Image.fromarray(light.astype(np.uint8)).save(file, quality=95)
    return file


def lab(file):
    """L (H,W) and ab (2,H,W) of an image file or picture."""
    picture = file if isinstance(file, Image.Image) else Image.open(file)
    pixels = torch.tensor(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
    found = rgb_to_lab(pixels)[0]
    return found[0], found[1:]


def only(found):
    """The PNGs of the only photograph."""
    (targets,) = found.done.values()
    return targets


@pytest.mark.parametrize("upsampling", UPSAMPLING)
@pytest.mark.parametrize("frame", ["whole", "square"])
def test_strength_scales_the_chroma(photo, opened, tmp_path, frame, upsampling):
    ab, lightness = {}, {}
    for strength in (0, 0.5, 1):
        options = dict(out=str(tmp_path / f"{strength}"), strength=strength, frame=frame, upsampling=upsampling)
        (target,) = only(run_colorize(str(photo), **options))
        lightness[strength], ab[strength] = lab(target)
        assert read_record(target)["strength"] == strength
    assert ab[0].abs().max() < 0.1 and ab[1].norm(dim=0).min() > 3
    assert (ab[0.5].mean((1, 2)) / ab[1].mean((1, 2)) - 0.5).abs().max() < 0.05
    assert (lightness[0] - lightness[1]).abs().max() < 1
    if frame == "whole":
        assert (lab(photo)[0] - lightness[1]).abs().max() < 1


def test_scaled_chroma_is_that_of_lab():
    rgb = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.35
    half = rgb_to_lab(scale_chroma(rgb, 0.5))
    assert torch.allclose(half[:, 1:], rgb_to_lab(rgb)[:, 1:] / 2, atol=0.02)
    assert torch.allclose(half[:, :1], rgb_to_lab(rgb)[:, :1], atol=0.02)
    assert scale_chroma(rgb, 1) is rgb


@pytest.mark.parametrize("strength", ["1.1", -0.1, "much", float("nan"), True])
def test_a_strength_outside_0_to_1_is_refused(photo, opened, strength):
    with pytest.raises(ParameterError, match="strength = .*expected a number"):
        run_colorize(str(photo), strength=strength)
    assert not opened


def test_several_answers_are_those_of_their_seeds(photo, opened, tmp_path):
    targets = only(run_colorize(str(photo), seed=8, samples=3, compare=True))
    names = [f"grandmother-{end}.png" for end in ("seed08", "seed09", "seed10", "compare")]
    assert [t.name for t in targets] == names and sorted(names[:3]) == names[:3]
    answers = [np.asarray(Image.open(t)) for t in targets[:3]]
    for seed, answer in zip((8, 9, 10), answers):
        (alone,) = only(run_colorize(str(photo), seed=seed, out=str(tmp_path / f"{seed}")))
        assert np.array_equal(np.asarray(Image.open(alone)), answer)
        assert read_record(alone)["seed"] == seed == read_record(targets[seed - 8])["seed"]
    assert not np.array_equal(answers[0], answers[1])


def test_equal_answers_are_explained(photo, opened, monkeypatch):
    monkeypatch.setattr(faic.colorizer.RunColorizer, "__call__", lambda self, photo, generator, **options: photo)
    assert "the model draws no random numbers" in run_colorize(str(photo), samples=2).summary()
    assert "random" not in run_colorize(str(photo)).summary()


def test_a_damaged_answer_is_made_again_and_no_other(photo, opened):
    targets = only(run_colorize(str(photo), samples=2))
    before = [t.read_bytes() for t in targets]
    for damaged in (before[0][:-40], before[0][:-60] + bytes(60)):
        targets[0].write_bytes(damaged)
        kept = targets[1].stat().st_mtime_ns
        assert only(run_colorize(str(photo), samples=2)) == targets
        assert [t.read_bytes() for t in targets] == before and targets[1].stat().st_mtime_ns == kept


def test_a_result_is_on_the_disk_before_it_has_its_name(photo, opened, monkeypatch):
    folder, partials = photo.parent.with_name(f"{photo.parent.name}-colorized"), []
    monkeypatch.setattr(faic.colorize.platform, "node", lambda: "container-7")
    monkeypatch.setattr(faic.colorize.os, "fsync", lambda file: partials.extend(folder.glob(".*.part")))
    (target,) = only(run_colorize(str(photo)))
    assert len(partials) == 1 and "container-7" in partials[0].name and not partials[0].exists() and target.exists()


def test_a_lost_answer_is_made_again_and_no_other(photo, opened):
    targets = only(run_colorize(str(photo), samples=2, compare=True))
    before = {t: (t.read_bytes(), t.stat().st_mtime_ns) for t in targets}
    for lost in targets:
        lost.unlink()
        assert only(run_colorize(str(photo), samples=2, compare=True)) == targets
        assert lost.read_bytes() == before[lost][0]
        kept = [t for t in targets if t != lost]
        assert all(t.stat().st_mtime_ns == before[t][1] for t in kept)
        before[lost] = (before[lost][0], lost.stat().st_mtime_ns)


@pytest.mark.parametrize("size", [(60, 40), (3000, 30)])
def test_side_by_side(opened, tmp_path, size):
    Image.new("RGB", size, (200, 60, 90)).save(tmp_path / "p.png")
    answer, sheet = only(run_colorize(str(tmp_path / "p.png"), compare=True))
    assert (answer.name, sheet.name) == ("p.png", "p-compare.png")
    with Image.open(sheet) as pictures, Image.open(answer) as colored:
        width, height = size[0] * min(1, 1024 / size[0]), size[1] * min(1, 1024 / size[0])
        assert pictures.size == (2 * width + 8, round(height)) and colored.size == size
        assert pictures.info["Software"].startswith(RESULT_SOFTWARE) and pictures.info["icc_profile"]
        pixels = np.asarray(pictures).astype(int)
        left, right = pixels[:, : int(width)], pixels[:, int(width) + 8 :]
        assert (np.ptp(left, -1) == 0).all() and (pixels[:, int(width) : int(width) + 8] == 255).all()
        assert np.abs(right - np.asarray(colored)[0, 0]).max() <= 1 and np.ptp(right, -1).max() > 0


def test_what_is_there_is_replaced_by_no_further_answer_or_comparison(photo, opened):
    folder = photo.parent.with_name(f"{photo.parent.name}-colorized")
    folder.mkdir()
    for name in ("grandmother-seed1.png", "grandmother-compare.png"):
        (folder / name).write_text("precious")
        with pytest.raises(ValueError, match=f"{name} is there already and is no result of FAIC"):
            run_colorize(str(photo), samples=2, compare=True)
        assert [f.name for f in folder.iterdir()] == [name], "nothing is computed for a photograph that cannot be done"
        (folder / name).unlink()


def test_a_photograph_with_the_name_of_an_answer(photo, opened):
    other = photo.with_name("grandmother-compare.jpg")
    Image.new("L", (9, 9)).save(other)
    found = run_colorize(str(photo.parent), compare=True)
    targets = sum(found.done.values(), [])
    assert len(set(targets)) == 4 and all(t.exists() for t in targets)
    assert run_colorize([str(other), str(photo)], compare=True).done.keys() == {photo, other}


def test_many_inputs_at_once(photo, opened, tmp_path):
    """One model, one summary; a wrong input costs no other."""
    for folder in ("one", "two"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        Image.new("L", (9, 9), len(folder)).save(tmp_path / folder / "deep" / "IMG_1.png")
    Image.new("L", (8, 8), 5).save(tmp_path / "two" / "deep" / "IMG_1.jpg")
    inputs = [tmp_path / "one", tmp_path / "none.jpg", tmp_path / "two", photo, tmp_path / "one" / "deep" / "IMG_1.png"]
    found = run_colorize([str(path) for path in inputs], out=str(tmp_path / "out"))
    assert len(opened) == 1 and len(found.done) == 4 and list(found.failed) == [tmp_path / "none.jpg"]
    targets = [t for (t,) in found.done.values()]
    assert len(set(targets)) == 4 and all(t.exists() for t in targets)
    assert "4 colorized, 1 failed" in found.summary() and "none.jpg: does not exist" in found.summary()
    again = run_colorize([str(path) for path in inputs], out=str(tmp_path / "out"))
    assert again.done == found.done


def test_the_order_of_the_inputs_is_kept(photo, opened, tmp_path):
    files = [tmp_path / "in" / f"{name}.png" for name in (2, 3, 1)]
    files[0].parent.mkdir()
    for i, file in enumerate(files):
        Image.new("L", (9, 9), i).save(file)
    order = []
    run_colorize([*map(str, files[:2]), str(tmp_path / "in")], report=lambda file, *rest: order.append(file))
    assert order == files


def test_folders_of_results_are_made_where_needed(photo, opened, tmp_path, monkeypatch):
    """Not for photographs that belong to an earlier input, and not if there is no such model."""
    (tmp_path / "album" / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("L", (9, 9)).save(tmp_path / "album" / name)
    found = run_colorize([str(tmp_path / "album"), str(tmp_path / "album" / "sub")])
    assert len(found.done) == 2 and not (tmp_path / "album" / "sub-colorized").exists()
    assert [f.parent for f in tmp_path.rglob(".faic-results")] == [
        tmp_path / "album-colorized",
        tmp_path / "album-colorized" / "sub",
    ]
    monkeypatch.undo()
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    with pytest.raises(ValueError, match="run 'vgg' is no run folder"):
        run_colorize(str(photo), model="vgg", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_caution_accompanies_the_answers(photo, monkeypatch):
    run = Run(photo.parent, dict(made=dict(caution="It was trained with 9 photographs.")))
    made = RunColorizer(run, 1, paint, 32, "lab", CPU, dict(run="a run"))
    monkeypatch.setattr(faic.colorize, "open_run_colorizer", lambda *arguments: made)
    assert "It was trained with 9 photographs." in CliRunner().invoke(main, ["colorize", str(photo)]).stderr


def test_a_linked_photograph_has_its_result_beside_the_link(photo, opened, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "mother.jpg").symlink_to(photo)
    (target,) = only(run_colorize(str(work / "mother.jpg")))
    assert target == tmp_path / "work-colorized" / "mother.png"
    original = photo.with_suffix(".png")
    Image.open(photo).save(original)
    before = original.read_bytes()
    (work / "grandmother.jpg").symlink_to(original)
    with pytest.raises(ValueError, match="is a photograph, which no result replaces"):
        run_colorize(str(work / "grandmother.jpg"), out=str(photo.parent), overwrite=True)
    assert original.read_bytes() == before


def test_a_result_is_never_a_photograph_of_another_input(photo, opened, tmp_path):
    album = tmp_path / "album"
    album.mkdir()
    Image.new("L", (9, 9)).save(album / "grandmother.png")
    before = (album / "grandmother.png").read_bytes()
    found = run_colorize([str(photo), str(album / "grandmother.png")], out=str(album), overwrite=True)
    assert "is a photograph, which no result replaces" in found.failed[photo]
    assert (album / "grandmother.png").read_bytes() == before


def test_out_that_names_a_picture_is_refused(photo, opened, tmp_path):
    with pytest.raises(ValueError, match="out is a folder, got the name of a picture, red.png; give e.g. red"):
        run_colorize(str(photo), out=str(tmp_path / "red.png"))
    (tmp_path / "red.png").mkdir()
    assert run_colorize(str(photo), out=str(tmp_path / "red.png")).done


def test_the_command(photo, opened, tmp_path):
    def faic(*words):
        return CliRunner().invoke(main, ["colorize", *map(str, words)])

    out = tmp_path / "out"
    done = faic(photo, "-o", out, "--samples", 2, "--compare", "--strength", 0.5, "--seed", 3, "--model", "bbdm")
    names = [f"grandmother-{end}.png" for end in ("seed3", "seed4", "compare")]
    assert done.exit_code == 0 and done.stdout.splitlines() == [str(out / name) for name in names]
    assert "a run, day 1, on cpu: 1 colorized, 0 failed" in done.stderr and opened == ["bbdm"]
    record = json.loads(Image.open(out / names[1]).info["Comment"])
    assert (record["seed"], record["strength"], record["upsampling"]) == (4, 0.5, UPSAMPLING[0])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nhello")
    done = faic(photo, tmp_path / "broken.png", tmp_path / "none.jpg", "-o", tmp_path / "other")
    assert done.exit_code == 1 and done.stdout.splitlines() == [str(tmp_path / "other" / "grandmother.png")]
    assert "1 colorized, 2 failed" in done.stderr and "colorizing" in done.stderr, "a bar for several"
    for name in ("broken.png: unreadable PNG file", "none.jpg: does not exist"):
        assert name in done.stderr
    for words in (["--strength", 2], ["--samples", 0], ["--upsampling", "best"], []):
        assert faic(*words, *([photo] if words else [])).exit_code == 2
    wrong = faic(photo, "-p", "temprature", 1)
    assert wrong.exit_code == 1 and "temprature: no such parameter" in wrong.stderr
    for name in ("photo", "report"):
        wrong = faic(photo, "-p", name, "x")
        assert wrong.exit_code == 2 and f"{name}: no such parameter of an architecture" in wrong.stderr
    assert faic(photo, "-p", "temperature", "0.5", "-o", tmp_path / "third").exit_code == 0
    defaults = {o.name: o.default for o in command.params}
    assert defaults["upsampling"] == UPSAMPLING[0], "the command states it without importing torch"


def make_run(folder, model, time):
    folder.mkdir(parents=True)
    options = dict(phase="phase2", model=model, preset="smoke", seed=0, made=dict(time=time))
    write_json(folder / "options.json", options)
    (folder / "day-1.safetensors").touch()


def test_the_model_is_an_architecture_a_run_or_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path))
    with pytest.raises(ValueError, match="has no trained run of phase 2; train one"):
        choose_run()
    for i, model in enumerate(("bbdm", "pix2pix", "bbdm", "coltran")):
        make_run(tmp_path / f"phase2-{model}-{i}", model, f"2026-01-0{i + 1}")
    chosen = {model: choose_run(model).path.name for model in ("", "bbdm", "pix2pix", "phase2-bbdm-0")}
    assert chosen == {
        "": "phase2-coltran-3",
        "bbdm": "phase2-bbdm-2",
        "pix2pix": "phase2-pix2pix-1",
        "phase2-bbdm-0": "phase2-bbdm-0",
    }
    assert choose_run(str(tmp_path / "phase2-bbdm-0")).path == tmp_path / "phase2-bbdm-0"
    with pytest.raises(ValueError, match="run 'vgg' is no run folder"):
        choose_run("vgg")
    with pytest.raises(
        ValueError, match="no trained run of Conditional GAN; train one with: faic run phase2 -p model cgan"
    ):
        choose_run("cgan")


# colors and edges


def halves(edge, size):
    """Light red at the left of a column, dark blue at its right."""
    photo = np.empty((size, size, 3), np.uint8)
    photo[:, :edge], photo[:, edge:] = (230, 150, 150), (40, 40, 120)
    return Image.fromarray(photo)


@pytest.mark.parametrize("edge", [128, 130, 133])
def test_colors_stop_at_an_edge(edge):
    """Cells of 8 pixels, so the edge is at the border of a cell, or within it."""
    photo = halves(edge, 256)
    small = torch.tensor(np.array(photo.resize((32, 32), Image.Resampling.BILINEAR))).permute(2, 0, 1)[None] / 255
    true, errors = lab(photo)[1], {}
    for upsampling in UPSAMPLING:
        made = colorize_photo(lambda gray, generators: small, photo, 32, upsampling=upsampling)
        errors[upsampling] = (lab(made)[1] - true).norm(dim=0).mean()
    assert errors["guided"] < 0.6 * errors["bicubic"], errors


def test_upsampling_follows_the_photograph_and_keeps_flat_colors():
    photo = Image.fromarray(astronaut()).resize((300, 200))
    flat = torch.tensor([20.0, -30.0]).view(1, 2, 1, 1).expand(1, 2, 32, 32)
    made = upsample_chroma(flat, photo)
    assert made.shape == (1, 2, 512, 512) and torch.allclose(made, flat[..., :1, :1].expand_as(made), atol=1e-4)
    chroma = torch.rand(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        upsample_chroma(chroma.flip(3), photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        upsample_chroma(chroma, photo).flip(3),
        atol=1e-4,
    )
    assert upsample_chroma(chroma, photo.resize((32, 20))) is chroma, "a photograph no larger than the model's square"


def test_lightness_stays_with_a_perfect_model():
    """Also where the photograph has texture: the astronaut in gray gets its true colors."""
    photo = Image.fromarray(astronaut())
    small = torch.tensor(np.array(photo.resize((64, 64), Image.Resampling.BILINEAR))).permute(2, 0, 1)[None] / 255
    result = colorize_photo(lambda gray, generators: small, photo.convert("L"), 64)
    difference = (lab(result)[0] - lab(photo.convert("L"))[0]).abs()
    assert result.size == photo.size and difference.mean() < 0.2 and difference.quantile(0.99) < 2
