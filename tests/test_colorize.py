"""A user's photographs: what is never replaced, where results go, what they carry, what stops and what does not."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageCms

import faic.colorize
import faic.full_size
from faic.cli import main
from faic.color import luma, rgb_to_lab
from faic.colorize import _targets, read_record, run_colorize
from faic.colorizer import RunColorizer
from faic.core import RESULT_SOFTWARE, RESULTS_MARKER
from faic.evaluate import gray_baseline
from faic.full_size import colorize_photo

ORIENTATION, MAKER, SOFTWARE = 0x0112, 271, 305


def paint(gray, generators):
    """Colors that depend on the place and on the random numbers, as a model's do."""
    ramp = torch.linspace(0, 1, gray.shape[-1]).expand_as(gray)
    level = torch.rand(1, generator=generators[0])
    return torch.cat([gray * ramp, gray, gray * (1 - ramp) * level], 1)


@pytest.fixture
def colorizer(monkeypatch):
    """Stands for a trained run."""

    def use(colorize=paint, run="a run"):
        made = RunColorizer(None, 1, colorize, 32, "lab", torch.device("cpu"), dict(run=run))
        monkeypatch.setattr(faic.colorize, "open_run_colorizer", lambda *arguments: made)

    use()
    return use


@pytest.fixture
def album(tmp_path):
    """A folder with three photographs and a letter."""
    folder = tmp_path / "album"
    folder.mkdir()
    for i, name in enumerate(("a.jpg", "a.tif", "grandmother.png")):
        noise = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    (folder / "letter.txt").write_text("Dear grandmother")
    return folder


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("out", ["folder", "another spelling", "symbolic link", "linked target", "hard link"])
def test_a_result_never_replaces_its_photograph(album, colorizer, tmp_path, out, overwrite):
    photo, target = album / "grandmother.png", tmp_path / "out"
    if out == "folder":
        target = album
    elif out == "another spelling":
        target = album / ".." / "album"
    elif out == "symbolic link":
        target.symlink_to(album)
    else:
        target.mkdir()
        (os.symlink if out == "linked target" else os.link)(photo, target / "grandmother.png")
    before = contents(album)
    with pytest.raises(ValueError, match="is a photograph, which no result replaces; give another folder as out"):
        run_colorize(str(photo), out=str(target), overwrite=overwrite)
    assert contents(album) == before and not list(tmp_path.rglob("*.part"))


def test_results_do_not_go_among_the_photographs_of_a_folder(album, colorizer, tmp_path, monkeypatch):
    monkeypatch.chdir(album)
    before = contents(album)
    (tmp_path / "link").symlink_to(album)
    for out in (".", str(album), "../album/", str(tmp_path / "link")):
        with pytest.raises(ValueError, match="is the folder of the photographs, and results do not go among them"):
            run_colorize(".", out=out)
    assert contents(album) == before


@pytest.mark.parametrize("there", ["file", "photograph", "dangling link", "link", "folder"])
def test_a_file_that_is_there_stays(album, colorizer, tmp_path, there):
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    taken = out / "grandmother.png"
    other.write_text("precious")
    if there == "folder":
        taken.mkdir()
    elif "link" in there:
        taken.symlink_to(other if there == "link" else tmp_path / "none")
    elif there == "file":
        taken.write_text("precious")
    else:
        Image.new("RGB", (9, 9)).save(taken)
    before = contents(out)
    found = run_colorize(str(album), out=str(out))
    assert {f.name for f in found.done} == {"a.jpg", "a.tif"}
    assert "is there already and is no result of FAIC" in found.failed[album / "grandmother.png"]
    assert before.items() <= contents(out).items() and other.read_text() == "precious"
    before = contents(out)
    again = run_colorize(str(album), out=str(out), overwrite=True)
    assert "no result of FAIC; give another folder as out" in again.failed[album / "grandmother.png"]
    assert contents(out) == before and other.read_text() == "precious"


def test_overwrite_replaces_no_other_photograph_of_the_folder(album, colorizer):
    """The result of a.jpg would be a.png, which is another photograph and no input of this call."""
    Image.new("L", (9, 9)).save(album / "a.png")
    before = contents(album)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="a.png is there already and is no result of FAIC") as e:
            run_colorize(str(album / "a.jpg"), out=str(album), overwrite=overwrite)
        assert "or overwrite" not in str(e.value) and contents(album) == before


def test_a_file_that_appears_while_colorizing_stays(album, colorizer):
    target = album.with_name("album-colorized") / "a.png"

    def save_meanwhile(gray, generators):
        target.write_text("precious")
        return paint(gray, generators)

    colorizer(save_meanwhile)
    with pytest.raises(ValueError, match="none of the files was colorized"):
        run_colorize(str(album / "a.jpg"), overwrite=True)
    assert target.read_text() == "precious"


def test_the_same_command_gives_the_same_answer(album, colorizer):
    found = run_colorize(str(album))
    folder = album.with_name("album-colorized")
    before, times = contents(folder), {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    again = run_colorize(str(album))
    assert again.done == found.done and not again.failed
    assert contents(folder) == before and {f: f.stat().st_mtime_ns for f in folder.iterdir()} == times
    run_colorize(str(album), overwrite=True)
    assert contents(folder) == before


@pytest.mark.parametrize("change", ["seed", "frame", "run", "photograph"])
def test_another_command_does_not_replace_a_result(album, colorizer, change):
    run_colorize(str(album))
    folder, options = album.with_name("album-colorized"), {}
    before = contents(folder)
    if change == "run":
        colorizer(run="another run")
    elif change == "photograph":
        for i, name in enumerate(("a.jpg", "a.tif", "grandmother.png"), 5):
            Image.new("L", (30 + i, 30)).save(album / name)
    else:
        options = dict(seed=7) if change == "seed" else dict(frame="square")
    with pytest.raises(ValueError, match="a result of another photograph, version, run or parameter"):
        run_colorize(str(album), **options)
    assert contents(folder) == before
    assert len(run_colorize(str(album), overwrite=True, **options).done) == 3
    after = contents(folder)
    assert after.keys() == before.keys() and after["grandmother.png"] != before["grandmother.png"]


def test_two_photographs_never_share_a_target(tmp_path):
    names = ["a.jpg", "A.jpg", "a.JPG", "a.tif", "a.tif.jpg", "é.jpg", "e\u0301.jpg", "b/x.jpg", "B/x.jpg", "a.png"]
    targets = _targets([tmp_path / n for n in names], tmp_path, tmp_path / "out")
    targets = {file: target for file, (target,) in targets.items()}
    keys = {str(t).casefold().replace("e\u0301", "é") for t in targets.values()}
    assert len(keys) == len(names) and targets[tmp_path / "a.jpg"] == tmp_path / "out" / "a.png"


def test_two_folders_into_one(tmp_path, colorizer):
    """Cameras call their pictures alike."""
    for i, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        Image.new("L", (20, 20), 50 * i).save(tmp_path / name / "IMG_0001.jpg")
    for _ in range(2):
        for name in ("first", "second"):
            assert len(run_colorize(str(tmp_path / name), out=str(tmp_path / "out")).done) == 1
    assert set(contents(tmp_path / "out")) == {RESULTS_MARKER, "IMG_0001.png", "IMG_0001.jpg.png"}


def test_results_are_marked_and_not_colorized_again(album, colorizer):
    before = contents(album)
    found = run_colorize(str(album))
    folder = album.with_name("album-colorized")
    assert {t.parent for (t,) in found.done.values()} == {folder} and contents(album) == before
    assert (folder / RESULTS_MARKER).exists()
    for (target,) in found.done.values():
        with Image.open(target) as result:
            assert result.info["Software"].startswith(RESULT_SOFTWARE)
    with pytest.raises(ValueError, match="holds no photograph, only results of FAIC"):
        run_colorize(str(folder))
    with pytest.raises(ValueError, match="only results of FAIC"):
        run_colorize(str(next(iter(found.done.values()))[0]))
    inside = run_colorize(str(album), out=str(album / "colored"))
    assert {t.parent.name for (t,) in inside.done.values()} == {"colored"}
    (album / "colored" / RESULTS_MARKER).unlink()  # the metadata alone tell it, too
    assert set(run_colorize(str(album)).done) == set(found.done)


def test_the_marker_does_not_hide_a_folder_of_photographs(album, colorizer):
    run_colorize(str(album / "a.jpg"), out=str(album))
    assert (album / "a.png").exists() and not (album / RESULTS_MARKER).exists()
    assert len(run_colorize(str(album)).done) == 3


def test_photographs_in_a_home_folder_have_their_results_in_it(album, colorizer, monkeypatch):
    """Nobody may write beside it; what lies in it is marked, so the next call does not take it for photographs."""
    monkeypatch.setattr(faic.colorize.os, "access", lambda folder, mode: folder != album.parent)
    for _ in range(2):
        done = run_colorize(str(album)).done
        assert len(done) == 3 and {target.parent for (target,) in done.values()} == {album / "album-colorized"}
    assert (album / "album-colorized" / RESULTS_MARKER).exists()


def test_a_photograph_at_the_root_needs_a_folder(colorizer, monkeypatch):
    monkeypatch.setattr(faic.colorize, "_is_result", lambda *arguments: False)
    monkeypatch.setattr(faic.colorize, "list_files", lambda folder: [["a.jpg", 1]])
    with pytest.raises(ValueError, match="has no folder beside it for the results; give a folder as out"):
        run_colorize("/")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_result_carries_what_its_photograph_did(tmp_path, colorizer, suffix):
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKER], exif[SOFTWARE] = 6, "Kodak", "Photo Editor 5"
    Image.new("RGB", (60, 40), "gray").save(tmp_path / f"p.{suffix}", exif=exif, dpi=(300, 300))
    ((target,),) = run_colorize(str(tmp_path / f"p.{suffix}"), out=str(tmp_path / "out")).done.values()
    with Image.open(target) as result:
        assert result.size == (40, 60) and result.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        kept = result.getexif()
        assert kept.get(ORIENTATION, 1) == 1 and kept[MAKER] == "Kodak" and kept[SOFTWARE].startswith(RESULT_SOFTWARE)
        profile = ImageCms.ImageCmsProfile(io.BytesIO(result.info["icc_profile"]))
        assert "sRGB" in ImageCms.getProfileDescription(profile)


@pytest.mark.parametrize("frame, size", [("whole", (50, 40)), ("square", (32, 32))])
def test_a_result_has_the_alpha_channel(tmp_path, colorizer, frame, size):
    photo = Image.new("RGBA", (50, 40), (90, 90, 90, 255))
    alpha = Image.linear_gradient("L").resize((50, 40)).point(lambda v: max(v, 1))
    photo.putalpha(alpha)
    photo.save(tmp_path / "p.png")
    ((target,),) = run_colorize(str(tmp_path / "p.png"), out=str(tmp_path / "out"), frame=frame).done.values()
    with Image.open(target) as result:
        assert (result.mode, result.size) == ("RGBA", size)
        if frame == "whole":
            assert result.getchannel("A").tobytes() == alpha.tobytes()


SHAPES = [(70, 50), (50, 70), (64, 64), (1, 90), (90, 1), (1, 1), (700, 3), (3, 700), (101, 150)]


@pytest.mark.parametrize("frame", ["whole", "square"])
@pytest.mark.parametrize("shape", SHAPES)
def test_strips_give_what_the_whole_gives(monkeypatch, frame, shape):
    monkeypatch.setattr(faic.full_size, "FINEST", 128)
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)

    def result(strip, colorize, **options):
        monkeypatch.setattr(faic.full_size, "STRIP", strip)
        made = colorize_photo(colorize, Image.fromarray(noise), 32, frame=frame, generator=torch.Generator(), **options)
        return np.asarray(made).astype(int)

    whole = result(10**9, paint)
    for strip in (1, 97, 1000):
        assert np.abs(result(strip, paint) - whole).max() <= 1
    if frame == "whole" and min(shape) > 1:
        plain = result(10**9, paint, upsampling="bicubic")
        assert np.abs(plain - unstripped(noise)).max() <= 1


def unstripped(noise):
    """The computation on whole tensors."""
    from torch.nn.functional import interpolate

    from faic.color import lab_to_rgb, to_uint8

    pixels = torch.tensor(noise).permute(2, 0, 1)[None] / 255
    small = interpolate(pixels, (32, 32), mode="bilinear", antialias=True).clamp(0, 1)
    rgb = paint(luma(to_uint8(small).float() / 255, "lab"), [torch.Generator()])
    ab = interpolate(rgb_to_lab(rgb)[:, 1:], pixels.shape[-2:], mode="bicubic", antialias=True)
    answer = lab_to_rgb(torch.cat([rgb_to_lab(pixels)[:, :1], ab], 1))
    return to_uint8(answer)[0].permute(1, 2, 0).numpy().astype(int)


def test_the_photograph_of_a_caller_is_not_changed():
    photo = Image.new("RGB", (30, 30), "red")
    assert colorize_photo(gray_baseline, photo, 16) is not photo and photo.getpixel((0, 0)) == (255, 0, 0)


MEMORY = f"""
import resource, sys, time
import numpy as np
import torch
from PIL import Image
sys.path.insert(0, {str(Path(__file__).parent)!r})
import faic.colorize
from test_colorize import paint
made = faic.colorize.RunColorizer(None, 1, paint, 64, "lab", torch.device("cpu"), dict(run="a run"))
faic.colorize.open_run_colorizer = lambda *arguments: made
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
faic.colorize.run_colorize("small.png", out="out")
before, began = peak(), time.process_time()
faic.colorize.run_colorize("large.jpg", out="out")
print(peak() - before, time.process_time() - began)
"""


def test_memory_and_time_for_a_large_photograph_are_bounded(tmp_path):
    """12 megapixels, turned by its EXIF: 46 MB as Pillow holds it; a ninth of what 108 megapixels may take beside it.

    As one tensor it took 1400 MB. The goal is five seconds; a slow or busy machine may take twice as long.
    """
    Image.new("L", (64, 64)).save(tmp_path / "small.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((4000, 3000)).save(tmp_path / "large.jpg", exif=exif)
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    memory, seconds = map(float, done.stdout.split())
    assert memory < 46 + 1000 / 9 and seconds < 10, f"{memory} MB, {seconds} s"


@pytest.mark.parametrize(
    "error, reason",
    [
        (MemoryError(), "too little memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "too little memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "too little memory",
        ),
        (RuntimeError("some trouble\n  in two lines"), "some trouble in two lines"),
        (RecursionError(), "RecursionError"),
    ],
)
def test_the_error_of_one_photograph_stops_no_other(album, colorizer, error, reason):
    calls = []

    def fails_once(gray, generators):
        calls.append(1)
        if len(calls) == 1:
            raise error
        return paint(gray, generators)

    colorizer(fails_once)
    found = run_colorize(str(album))
    assert [f.name for f in found.done] == ["a.tif", "grandmother.png"] and found.failed.keys() == {album / "a.jpg"}
    assert reason in found.failed[album / "a.jpg"] and list(found.skipped) == [album / "letter.txt"]
    assert found.summary().splitlines()[0] == "2 colorized, 1 failed, 1 without a photograph"
    assert f"failed: {album / 'a.jpg'}: " in found.summary()
    with pytest.raises(RuntimeError, match="1 failed"):
        found.check()


def test_only_the_first_page_is_colorized_and_a_note_tells(album, colorizer):
    pages = [Image.new("L", (20, 20), level) for level in (80, 120)]
    pages[0].save(album / "pages.tif", save_all=True, append_images=pages[1:])
    notes = run_colorize(str(album)).notes
    assert notes == {"note: pages.tif has several pages or frames; only the first is colorized"}


def test_a_photograph_beyond_the_limit_has_advice(album, colorizer, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match="a.jpg: it has more than 0 megapixels; make it smaller"):
        run_colorize(str(album / "a.jpg"))


def test_pipes_and_dangling_links_are_no_photographs(album, colorizer):
    """Opening a pipe would wait forever."""
    os.mkfifo(album / "pipe.jpg")
    (album / "link.jpg").symlink_to(album / "none")
    long = album / f"{'x' * 251}.png"
    Image.new("L", (9, 9)).save(long)
    found = run_colorize(str(album))
    assert len(found.done) == 4 and found.done[long][0].exists()
    assert found.failed == {album / "pipe.jpg": "not a file", album / "link.jpg": "not a file"}


def test_the_command_ends_with_1_where_a_photograph_failed(album, colorizer, tmp_path):
    def faic(*words):
        return CliRunner().invoke(main, ["colorize", *map(str, words)])

    done = faic(album)
    assert done.exit_code == 0 and "3 colorized, 0 failed, 1 without a photograph" in done.output
    (album / "broken.jpg").write_bytes((album / "a.jpg").read_bytes()[:700])
    (album / "none.jpg").write_text("no image")
    (album / b"caf\xe9.png".decode(errors="surrogateescape")).write_bytes((album / "grandmother.png").read_bytes())
    done = faic(album)
    assert done.exit_code == 1 and "4 colorized, 2 failed, 1 without a photograph" in done.output
    assert "broken.jpg: truncated" in done.output and "none.jpg: " in done.output
    assert faic(album / "letter.txt", "-o", tmp_path / "out").exit_code == 1
    assert faic(album, "--seed", 3).exit_code == 1 and faic(album, "--seed", 3, "--overwrite").exit_code == 1
    assert json.loads(Image.open(album.with_name("album-colorized") / "a.png").info["Comment"])["seed"] == 3
