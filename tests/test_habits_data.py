"""What people keep beside their photographs: results, notebooks, thumbnails, copies, and photographs that are gray."""

import io
import os
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageEnhance, PngImagePlugin

import faic.dataset
import faic.photos
from faic.cli import main
from faic.colorize import find_photographs
from faic.components import data_identity, data_notes, data_options, study_photos
from faic.core import RESULT_SOFTWARE, RESULTS_MARKER, runs_dir
from faic.dataset import load_photos
from faic.evaluate import evaluate, gray_baseline
from faic.jobs import study_jobs
from faic.parameters import ParameterError, notebook_parameters
from faic.photos import GRAY_CHROMA, chroma_of, count_shared, describe, read_photo
from faic.runs import open_run
from faic.selection import select_runs

CPU, SIDE = torch.device("cpu"), 32


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FAIC_FIGURES", str(tmp_path / "figures"))


def photo(seed, size=(40, 36)):
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    for i in range(60):
        photo(i).save(path / f"{i:02}.png")
    return path


def run_with(photos):
    """A run that was made with these photographs."""
    options = dict(phase="phase2", model="pix2pix", preset="smoke", seed=0, data=data_options(photos, "phase2"))
    return open_run(options, CPU, **data_notes(photos))


def contents(photos):
    """The different pixels of each split."""
    hashes = photos.manifest.query("row >= 0").sort_values("row")["sha256"].to_numpy()
    return {split: set(hashes[photos.splits[split]]) for split in ("train", "validation", "test")}


def disjoint(photos):
    found = contents(photos)
    return sum(map(len, found.values())) == len(set.union(*found.values()))


# results


def save_result(image, path):
    """Save a picture as FAIC does: it names FAIC in the metadata."""
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[305] = f"{RESULT_SOFTWARE} 1.0"
    text.add_text("Software", f"{RESULT_SOFTWARE} 1.0")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **dict(pnginfo=text) if path.suffix == ".png" else dict(exif=exif))


@pytest.mark.parametrize("suffix", ("png", "jpg", "tif", "webp"))
def test_pictures_that_faic_made_are_no_photographs(folder, suffix):
    before = load_photos(folder, SIDE)
    run_with(before)
    save_result(photo(99), folder / f"answer.{suffix}")
    save_result(photo(98), folder / "deep" / "er" / f"answer.{suffix}")
    photos = load_photos(folder, SIDE)
    assert (photos.fingerprint, photos.skipped) == (before.fingerprint, {"made by FAIC": 2})
    assert "left out: 2 made by FAIC" in describe(photos)
    assert len(find_photographs(str(folder))) == 60


def test_folders_that_faic_writes_to_are_no_photographs(folder):
    before = load_photos(folder, SIDE)
    run_with(before)
    for name in ("colorized/a.png", "colorized/2020/b.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        photo(99).save(folder / name)  # an editor has dropped the metadata
    (folder / "colorized" / RESULTS_MARKER).touch()
    photos = load_photos(folder, SIDE)
    assert (photos.fingerprint, photos.skipped) == (before.fingerprint, {"made by FAIC": 2})
    assert len(find_photographs(str(folder))) == 60
    (folder / RESULTS_MARKER).touch()  # the photographs' own folder: whoever names it wants it read
    assert load_photos(folder, SIDE).fingerprint == before.fingerprint


def test_only_software_that_begins_with_faic_is_ours(tmp_path):
    exif = Image.Exif()
    exif[305] = "Editor of FAIC"
    photo(1).save(tmp_path / "a.jpg", exif=exif)
    content = (tmp_path / "a.jpg").read_bytes()
    at = content.index(b"Exif") + 10
    (tmp_path / "b.jpg").write_bytes(content[:at] + b"\xff" * 8 + content[at + 8 :])  # a broken EXIF
    for name in ("a.jpg", "b.jpg"):
        assert read_photo(tmp_path / name, SIDE, name)[1]["status"] == "used"


def test_a_damaged_png_is_not_read_as_black(tmp_path):
    """Looking for EXIF in a PNG makes Pillow decode it."""
    photo(1, (90, 70)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    middle = content.index(b"IDAT") + 10
    content[middle : middle + 40] = bytes(40)
    (tmp_path / "a.png").write_bytes(content)
    with Image.open(tmp_path / "a.png") as image:
        assert not faic.photos.is_result(image)
        with pytest.raises(OSError):
            image.load()


# what lies beside the photographs


def litter(folder):
    """Everything but photographs."""
    for name in ("out.ipynb", "Thumbs.db", "00.xmp", "00.png.json", ".DS_Store", "desktop.ini", "@eaDir/x", "a/readme"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(os.urandom(100))
    for name in ("@eaDir/00.png/SYNOPHOTO_THUMB_XL.jpg", "IMG_1.THM", "#recycle/00.jpg", "__MACOSX/._00.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo(99, (12, 9)).save(folder / name, "JPEG")


def test_what_is_no_photograph_changes_nothing_and_stops_nothing(folder, monkeypatch, capsys):
    first = load_photos(folder, SIDE)
    run_with(first)
    capsys.readouterr()
    for change in (lambda: litter(folder), lambda: litter(folder), lambda: (folder / "out.ipynb").unlink()):
        change()
        photos = load_photos(folder, SIDE)
        assert (photos.fingerprint, photos.folder) == (first.fingerprint, first.folder)
        assert (photos.array == first.array).all() and photos.source == first.source
    assert "preparing" not in capsys.readouterr().out and len(list(runs_dir().glob("data-*"))) == 1
    assert photos.skipped == {"not an image": 5} and len(photos.manifest) == 65
    read = []
    monkeypatch.setattr(faic.dataset, "read_photo", lambda path, *rest: read.append(path))
    load_photos(folder, SIDE)
    assert not read, "what was read once is not read again"


@pytest.mark.parametrize("name", ("FAIC_RUNS", "FAIC_FIGURES"))
def test_runs_and_figures_inside_the_photographs(folder, monkeypatch, name):
    monkeypatch.setenv(name, str(folder / "mine"))
    first = load_photos(folder, SIDE)
    run = run_with(first)
    (folder / "mine").mkdir(exist_ok=True)
    photo(99).save(folder / "mine" / "figure7.png")  # of a version that wrote no marker
    (run.path / "log.jsonl").write_text("{}")
    again = load_photos(folder, SIDE)
    assert (again.fingerprint, again.folder, again.skipped) == (first.fingerprint, first.folder, {})


def test_new_metadata_are_the_same_photograph(folder, capsys):
    photo(70, (80, 72)).save(folder / "x.jpg", quality=90)
    first = load_photos(folder, SIDE)
    run_with(first)
    content = (folder / "x.jpg").read_bytes()
    (folder / "x.jpg").write_bytes(content[:2] + b"\xff\xfe\x00\x0dgrandmother" + content[2:])  # a comment
    assert load_photos(folder, SIDE).fingerprint == first.fingerprint
    photo(71, (80, 72)).save(folder / "x.jpg", quality=90)
    with pytest.raises(ValueError, match=r"changed: 1 \(x.jpg\)"):
        load_photos(folder, SIDE)


def test_a_new_photograph_among_other_new_files_is_named(folder):
    first = load_photos(folder, SIDE)
    run_with(first)
    litter(folder)
    photo(80).save(folder / "new.png")
    with pytest.raises(ValueError, match=r"added: 1 \(new.png\)\. These runs"):
        load_photos(folder, SIDE)


def test_a_killed_preparation_goes_on_whatever_else_has_come_and_gone(folder, monkeypatch):
    for name in ("gone.txt", "kept.txt"):
        (folder / name).write_text("text")
    (folder / "empty.png").touch()
    wanted, original = load_photos(folder, SIDE), faic.dataset._append
    shutil.rmtree(wanted.folder)

    def killed(root, todo, *rest):
        original(root, todo[:40], *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(faic.dataset, "_append", killed)
        with pytest.raises(KeyboardInterrupt):
            load_photos(folder, SIDE)
    (folder / "gone.txt").unlink()
    (folder / "kept.txt").write_text("other text")
    litter(folder)
    read = []
    monkeypatch.setattr(
        faic.dataset, "read_photo", lambda path, *rest: read.append(path.name) or read_photo(path, *rest)
    )
    photos = load_photos(folder, SIDE)
    assert photos.fingerprint == wanted.fingerprint and (photos.array == wanted.array).all()
    assert sum(name.endswith(".png") for name in set(read)) < 30 and len(list(runs_dir().glob("data-*"))) == 1


# copies


def copy_all(folder, times=1):
    for file in sorted(folder.glob("*.png")):
        for k in range(times):
            shutil.copy(file, folder / f"copy {k} of {file.name}")


def test_equal_photographs_share_a_split(folder):
    copy_all(folder)
    photos = load_photos(folder, SIDE)
    assert disjoint(photos) and count_shared(photos) == 0
    assert {split: len(rows) for split, rows in photos.splits.items()} == dict(
        train=108, validation=6, test=6, train_phase1=60
    )
    assert "with the pixels of another: 60, of which none are in a later split" in describe(photos)
    assert not photos.caution
    for row, file in enumerate(photos.source):  # the array has moved with the names
        assert (photos.array[row] == read_photo(file, SIDE, "")[0]).all()
    assert load_photos(folder, SIDE).folder == photos.folder
    assert load_photos(photos.folder, SIDE).fingerprint == photos.fingerprint


def test_the_same_photograph_in_another_format(folder):
    for i in range(0, 60, 7):
        photo(i).save(folder / f"as bitmap {i}.bmp")
    photos = load_photos(folder, SIDE)
    assert disjoint(photos) and "with the pixels of another: 9," in describe(photos)


@pytest.mark.parametrize("copies", (3, 30))
def test_one_photograph_many_times(folder, copies):
    for i in range(copies):
        shutil.copy(folder / "07.png", folder / f"placeholder {i}.png")
    assert disjoint(load_photos(folder, SIDE))


def test_forty_times_one_photograph_is_an_error(tmp_path):
    (tmp_path / "one").mkdir()
    for i in range(50):
        photo(0).save(tmp_path / "one" / f"{i}.png")
    with pytest.raises(ValueError, match=r"50 usable images \(1 differ\)"):
        load_photos(tmp_path / "one", SIDE)


def test_the_papers_split_keeps_names_counts_equal_photographs_and_warns(folder, monkeypatch):
    monkeypatch.setattr(faic.photos, "PAPER_SPLIT", dict(train=100, validation=10, test=10))
    copy_all(folder)
    photos = load_photos(folder, SIDE, paper_split=True)
    assert [file.name for file in photos.source] == sorted(file.name for file in folder.iterdir())
    assert [len(photos.splits[split]) for split in ("train", "validation", "test")] == [100, 10, 10]
    assert count_shared(photos) == 20
    assert "with the pixels of another: 60, of which 20 are in a later split" in describe(photos)
    assert photos.caution.startswith("20 of the validation and test photographs have the same pixels")
    assert disjoint(load_photos(folder, SIDE))


def test_a_preparation_that_was_killed_while_copies_moved(folder, monkeypatch):
    copy_all(folder)
    wanted = load_photos(folder, SIDE)
    shutil.rmtree(wanted.folder)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(faic.dataset, "write_manifest", killed)  # the array has moved, the manifest is not written
        with pytest.raises(KeyboardInterrupt):
            load_photos(folder, SIDE)
    photos = load_photos(folder, SIDE)
    assert photos.fingerprint == wanted.fingerprint and (photos.array == wanted.array).all()


# gray photographs


def make_gray(folder, numbers):
    for i in numbers:
        Image.open(folder / f"{i:02}.png").convert("L").save(folder / f"{i:02}.png")


class Judge(torch.nn.Module):
    network_name, num_features = "quarters", 12

    def forward(self, rgb):
        quarters = torch.nn.functional.adaptive_avg_pool2d(rgb, 2).flatten(1)
        return quarters, quarters.softmax(1)


def gray_psnr(photos):
    return evaluate(gray_baseline, photos, "test", Judge())[0]["photograph"]["PSNR"]


def test_gray_photographs_are_counted_and_not_scored(folder):
    colored = gray_psnr(load_photos(folder, SIDE))
    shutil.rmtree(runs_dir())
    make_gray(folder, range(0, 60, 3))
    photos, kept = load_photos(folder, SIDE), load_photos(folder, SIDE, gray_photographs="keep")
    assert photos.gray.sum() == 20 and "gray themselves: 20, of which none are scored" in describe(photos)
    assert not any(photos.gray[photos.splits[split]].any() for split in ("validation", "test"))
    assert photos.gray[photos.splits["train"]].any(), "training may see them"
    scored = sum(kept.gray[kept.splits[split]].sum() for split in ("validation", "test"))
    assert scored > 0 and f"gray themselves: 20, of which {scored} are scored" in describe(kept)
    assert kept.caution.startswith(f"{scored} of the validation and test photographs are gray themselves")
    assert not photos.caution and photos.folder == kept.folder
    assert gray_psnr(photos) < colored + 3 and (gray_psnr(kept) > 30 or not kept.gray[kept.splits["test"]].any())


def test_each_gray_photograph_in_a_test_split_is_worth_100_decibels(folder):
    order = [file.name for file in load_photos(folder, SIDE).source]
    shutil.rmtree(runs_dir())
    make_gray(folder, [int(order[-1][:2])])  # one of the three test photographs
    photos, kept = load_photos(folder, SIDE), load_photos(folder, SIDE, gray_photographs="keep")
    assert gray_psnr(kept) > 35 > 25 > gray_psnr(photos)


def test_the_choice_is_hashed_where_it_changes_results(folder):
    same = [data_identity(load_photos(folder, SIDE, gray_photographs=choice)) for choice in ("leave out", "keep")]
    assert same[0] == same[1] and "gray_photographs" not in same[0]
    make_gray(folder, range(0, 60, 5))
    one, other = (load_photos(folder, SIDE, gray_photographs=choice) for choice in ("leave out", "keep"))
    assert one.fingerprint != other.fingerprint and run_with(one).path != run_with(other).path
    assert data_identity(one)["gray_photographs"] == "leave out"
    assert data_notes(other)["gray"]["all"] == 12 and data_notes(one)["gray"]["scored"] == 0
    for run in (run_with(one), run_with(other)):
        run.add_metrics(dict(day=1))
    for choice, photos in (("leave out", one), ("keep", other)):
        selection = select_runs("smoke", "photos", 0, gray_photographs=choice)
        assert {run.options["data"]["fingerprint"] for run in selection.all_runs()} == {photos.fingerprint}
    with pytest.raises(ValueError, match="These runs used it"):  # whichever of the two
        (folder / "01.png").unlink()
        load_photos(folder, SIDE)


def test_a_preset_scores_only_photographs_with_color(folder):
    make_gray(folder, range(0, 60, 5))
    photos = study_photos(str(folder), "smoke")
    assert not photos.gray[photos.splits["test"]].any()
    assert study_photos(str(folder), "smoke", gray_photographs="keep").gray_photographs == "keep"


def test_a_folder_of_gray_photographs_is_an_error_that_names_the_way(folder):
    make_gray(folder, range(25))
    with pytest.raises(ValueError, match=r"60 usable images \(25 are gray themselves, which gray_photographs='keep'"):
        load_photos(folder, SIDE)
    assert len(load_photos(folder, SIDE, gray_photographs="keep").splits["test"]) == 3
    with pytest.raises(ValueError, match="gray_photographs is one of leave out, keep, got 'skip'"):
        load_photos(folder, SIDE, gray_photographs="skip")


def test_the_paper_split_leaves_gray_photographs_out_of_its_scores(folder, monkeypatch):
    monkeypatch.setattr(faic.photos, "PAPER_SPLIT", dict(train=40, validation=10, test=10))
    make_gray(folder, (3, 44, 59))
    photos = load_photos(folder, SIDE, paper_split=True)
    assert [len(photos.splits[split]) for split in ("train", "validation", "test")] == [40, 9, 9]
    kept = load_photos(folder, SIDE, paper_split=True, gray_photographs="keep")
    assert [len(kept.splits[split]) for split in ("train", "validation", "test")] == [40, 10, 10]


def as_jpeg(pixels, quality):
    Image.fromarray(pixels).save(saved := io.BytesIO(), "JPEG", quality=quality)
    return np.asarray(Image.open(saved).convert("RGB"))


@pytest.mark.parametrize("quality", (20, 50, 75, 95))
@pytest.mark.parametrize("noise, cast", ((0, 0), (2, 0), (3, 0), (1, 2)))
def test_a_gray_scan_is_gray(quality, noise, cast):
    rng, photos = np.random.default_rng(quality), load_photos("embedded", 64)
    for row in range(0, len(photos.array), 20):
        gray = np.asarray(Image.fromarray(photos.array[row]).convert("L").convert("RGB"))
        scan = gray + rng.normal(0, noise, gray.shape) + [cast, 0, -cast]
        assert chroma_of(as_jpeg(scan.clip(0, 255).round().astype(np.uint8), quality)) < GRAY_CHROMA


def test_pale_toned_and_small_colors_are_colors():
    photos = load_photos("embedded", 64)
    assert not photos.gray.any()
    pixels = photos.array[photos.splits["test"][0]]
    pale = np.asarray(ImageEnhance.Color(Image.fromarray(pixels)).enhance(0.2))
    gray = np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"))
    sepia = (gray * [1.07, 0.94, 0.73]).clip(0, 255).astype(np.uint8)
    spot, date = gray.copy(), gray.copy()
    spot[:8, :8] = (200, 30, 30)  # 1.6 % of the pixels
    date[:4, :8] = (200, 30, 30)  # 0.8 %
    assert [chroma_of(x) >= GRAY_CHROMA for x in (pale, sepia, spot, date, gray)] == [True, True, True, False, False]


def test_every_command_takes_the_parameter():
    cell = dict(model="pix2pix", preset="smoke", data="embedded", gray_photographs="keep")
    assert notebook_parameters(cell, *cell).gray_photographs == "keep"
    with pytest.raises(ParameterError, match="'leave out', 'keep'"):
        notebook_parameters(cell | dict(gray_photographs="yes"), *cell)
    jobs = study_jobs("smoke", models=("pix2pix",), gray_photographs="keep")
    assert {job.parameters["gray_photographs"] for job in jobs} == {"keep"}
    for command in (["study"], ["status"], ["cluster", "plan"], ["cluster", "run"]):
        assert "--gray-photographs" in CliRunner().invoke(main, [*command, "--help"]).output
    wrong = CliRunner().invoke(main, ["study", "--gray-photographs", "yes"])
    assert wrong.exit_code == 2 and "'leave out', 'keep'" in wrong.output
