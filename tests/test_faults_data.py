"""What goes wrong with data: folders that change between two days, arrays that are damaged, disks that are full or read-only, loaders that fail. Images are made here, from seeds."""

import errno
import itertools
import os
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import faic.dataset
import faic.photos
from faic.batches import latent_batches, training_batches
from faic.components import prepare_latents
from faic.core import Budget, runs_dir
from faic.dataset import load_photos, resized_for_crops, verify
from faic.days import study_run
from faic.evaluate import evaluate, features_of, gray_baseline
from faic.runs import open_run, read_runs
from faic.study import data_name, results_folder

CPU, SIDE = torch.device("cpu"), 32
PHOTO = 3 * SIDE**2  # bytes


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIC_RUNS", str(tmp_path / "runs"))


def photo(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(
        (40, 36), Image.BICUBIC
    )


def save(folder, seed, name=None):
    photo(seed).save(folder / (name or f"{seed:02}.bmp"))  # BMP: all of the same size


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    for i in range(40):
        save(path, i)
    return path


def run_with(photos):
    """A run that was made with these photographs."""
    return open_run(
        dict(
            phase="phase2",
            model="pix2pix",
            preset="smoke",
            seed=0,
            data=dict(name=photos.name, fingerprint=photos.fingerprint, side=photos.side),
        ),
        CPU,
    )


# the folder changed


def test_a_changed_folder_is_refused_where_runs_need_it_and_the_prepared_one_goes_on(folder, tmp_path):
    first = load_photos(folder, SIDE)
    run_with(first)
    (folder / "07.bmp").unlink()
    save(folder, 99)
    photo(11).resize((50, 36)).save(folder / "11.bmp")
    with pytest.raises(ValueError) as error:
        load_photos(folder, SIDE)
    for said in (
        "removed: 1 (07.bmp)",
        "added: 1 (99.bmp)",
        "changed: 1 (11.bmp)",
        f"To continue with the old photographs, give {first.folder} as data; it needs the files no more",
        "move",
    ):
        assert said in str(error.value)
    assert len(list(runs_dir().glob("data-*"))) == 1, "nothing was prepared"
    shutil.rmtree(folder)
    again = load_photos(first.folder, SIDE)
    assert (again.name, again.fingerprint, again.side) == (first.name, first.fingerprint, SIDE) and (
        again.array == first.array
    ).all()
    assert data_name(str(first.folder)) == "photos" and results_folder("laptop", str(first.folder)) == results_folder(
        "laptop", str(folder)
    )


def test_the_way_to_begin_anew(folder, tmp_path, capsys):
    first = load_photos(folder, SIDE)
    run_with(first)
    save(folder, 99)
    first.folder.rename(tmp_path / "away")
    assert len(load_photos(folder, SIDE).array) == 41


def test_a_changed_folder_that_no_run_needs_is_prepared_anew_and_said(folder, capsys):
    first = load_photos(folder, SIDE)
    (folder / "07.bmp").unlink()
    save(folder, 98)
    second = load_photos(folder, SIDE)
    assert second.fingerprint != first.fingerprint
    assert (
        f"not what it was when {first.folder.name} was prepared. removed: 1 (07.bmp); added: 1 (98.bmp). No run was made with that"
        in capsys.readouterr().out
    )


def test_a_folder_prepared_in_the_order_of_names_goes_on_as_data_and_is_said(folder, monkeypatch, capsys):
    """As versions did that shuffled nothing."""
    with monkeypatch.context() as m:
        m.setattr(faic.dataset, "hash_order", sorted)
        first = load_photos(folder, SIDE)
    run_with(first)
    second = load_photos(folder, SIDE)
    assert (
        f"{first.folder.name} has the same photographs in another order" in capsys.readouterr().out
        and second.fingerprint != first.fingerprint
    )
    assert load_photos(first.folder, SIDE).fingerprint == first.fingerprint


def test_same_size_other_content(folder):
    first = load_photos(folder, SIDE)
    size = (folder / "05.bmp").stat().st_size
    save(folder, 77, "05.bmp")
    os.utime(folder / "05.bmp", (1, 1))  # older than what it replaces
    assert (folder / "05.bmp").stat().st_size == size
    with pytest.raises(ValueError, match=r"changed: 1 \(05.bmp\).*move"):
        load_photos(folder, SIDE)
    assert load_photos(first.folder, SIDE).fingerprint == first.fingerprint


def test_only_files_of_another_time_are_read_again_and_once(folder, monkeypatch):
    first, read, original = load_photos(folder, SIDE), [], faic.photos.read_photo
    monkeypatch.setattr(
        faic.dataset, "read_photo", lambda path, side, file: read.append(file) or original(path, side, file)
    )
    for name in ("03.bmp", "30.bmp"):
        os.utime(folder / name)
    for wanted in (["03.bmp", "30.bmp"], []):
        read.clear()
        assert load_photos(folder, SIDE).fingerprint == first.fingerprint and sorted(read) == wanted


def make_older(photos):
    """A prepared folder as earlier versions left it."""
    manifest = pd.read_csv(photos.folder / "manifest.csv", na_filter=False).drop(columns=["size", "modified"])
    manifest.to_csv(photos.folder / "manifest.csv", index=False)
    for f in (photos.folder / "source.json", *photos.folder.glob("*.sums")):
        f.unlink()


def test_folders_prepared_by_older_versions(folder, monkeypatch):
    first = load_photos(folder, SIDE)
    big = np.array(resized_for_crops(first, 40))
    make_older(first)
    monkeypatch.setattr(faic.dataset, "_append", None)  # nothing is prepared again
    monkeypatch.setattr(faic.dataset, "_make_rows", None)
    for where in (folder, first.folder):
        photos = load_photos(where, SIDE)
        assert photos.fingerprint == first.fingerprint and (resized_for_crops(photos, 40) == big).all()
    save(folder, 77, "05.bmp")
    with pytest.raises(ValueError, match=r"changed: 1 \(05.bmp\)"):
        load_photos(folder, SIDE)
    (folder / "05.bmp").unlink()
    run_with(first)
    with pytest.raises(ValueError, match=r"removed: 1 \(05.bmp\)"):
        load_photos(folder, SIDE)


def test_the_same_command_does_not_leave_an_unfinished_run_behind(folder, tmp_path):
    """Also where what was prepared is gone."""
    save(folder, 50)
    ask = lambda: study_run(
        "phase2", "pix2pix", "default", "smoke", 0, load_photos(folder, 64), Budget(5, "steps"), CPU
    )
    run = ask()
    (run.path / "last.pt").touch()
    assert ask().path == run.path
    (folder / "07.bmp").rename(tmp_path / "07.bmp")
    shutil.rmtree(next(runs_dir().glob("data-photos-*")))
    with pytest.raises(
        ValueError, match=rf"{run.path.name} is not finished.*removed: 1 \(07.bmp\).*move {run.path} away"
    ):
        ask()
    assert [r.path.name for r in read_runs()] == [run.path.name]
    (run.path / "day-5.safetensors").touch()  # then it is finished, and other photographs are another study
    assert ask().path != run.path


# the array is damaged


def cut(path, rows, row_bytes=PHOTO):
    os.truncate(path, rows * row_bytes + 5)


def overwrite(path, first, row_bytes=PHOTO, rows=None):
    with open(path, "r+b") as f:
        f.seek(first * row_bytes)
        f.write(bytes((rows * row_bytes) if rows else path.stat().st_size - first * row_bytes))


@pytest.mark.parametrize(
    "damage", [lambda p: cut(p, 3), lambda p: overwrite(p, 3), Path.unlink, lambda p: p.write_bytes(b"")]
)
@pytest.mark.parametrize("given", ["photographs", "prepared"])
def test_a_damaged_array_is_repaired_from_the_photographs(folder, damage, given, capsys):
    first = load_photos(folder, SIDE)
    whole = (first.folder / "pixels.u8").read_bytes()
    damage(first.folder / "pixels.u8")
    again = load_photos(folder if given == "photographs" else first.folder, SIDE)
    assert (
        again.fingerprint == first.fingerprint
        and (first.folder / "pixels.u8").read_bytes() == whole
        and not (first.folder / "pixels.u8.damaged").exists()
    )
    assert "pixels.u8 is damaged" in capsys.readouterr().out


def test_a_damaged_array_without_its_photographs_is_an_error(folder):
    first = load_photos(folder, SIDE)
    cut(first.folder / "pixels.u8", 3)
    save(folder, 77, "20.bmp")
    for _ in range(2):  # the second time the array has its rows again up to the one that is lost
        with pytest.raises(
            ValueError,
            match=r"damaged, \d+ of 40 photographs, and 20.bmp cannot be made again: .*Restore that or .*pixels.u8 from a copy",
        ):
            load_photos(first.folder, SIDE)
    (first.folder / "source.json").unlink()
    with pytest.raises(ValueError, match="is not known: give the folder of photographs as data"):
        load_photos(first.folder, SIDE)


def test_a_repair_that_was_killed_is_taken_up(folder):
    first = load_photos(folder, SIDE)
    whole = (first.folder / "pixels.u8").read_bytes()
    overwrite(first.folder / "pixels.u8", 20, rows=1)
    (first.folder / "pixels.u8.damaged").touch()
    load_photos(folder, SIDE)
    assert (first.folder / "pixels.u8").read_bytes() == whole


def test_a_cut_manifest_is_an_error(folder):
    first = load_photos(folder, SIDE)
    text = (first.folder / "manifest.csv").read_text()
    (first.folder / "manifest.csv").write_text("".join(text.splitlines(keepends=True)[:30]))
    with pytest.raises(ValueError, match="manifest.csv is damaged: it lists 29 files"):
        load_photos(folder, SIDE)


def test_verify_finds_one_wrong_row_which_is_then_repaired(folder):
    photos = load_photos(folder, SIDE)
    name = f"train-40-{photos.fingerprint[:6]}.u8"
    whole, big = np.array(photos.array), np.array(resized_for_crops(photos, 40))
    assert verify(photos) == {"pixels.u8": [], name: []}
    overwrite(photos.folder / "pixels.u8", 17, rows=1)
    overwrite(photos.folder / name, 35, 3 * 40**2, rows=1)
    assert verify(photos) == {"pixels.u8": [17], name: [35]}
    again = load_photos(folder, SIDE)
    assert (
        (again.array == whole).all()
        and (resized_for_crops(again, 40) == big).all()
        and verify(again) == {"pixels.u8": [], name: []}
    )


@pytest.mark.parametrize(
    "damage", [lambda p: cut(p, 5, 3 * 40**2), lambda p: overwrite(p, 5, 3 * 40**2), lambda p: p.write_bytes(b"")]
)
def test_a_damaged_enlarged_array_is_made_again_from_the_first_wrong_row(folder, damage, monkeypatch, capsys):
    photos = load_photos(folder, SIDE)
    whole = np.array(resized_for_crops(photos, 40))
    (path,) = photos.folder.glob("train-40-*.u8")
    damage(path)
    kept, work = path.stat().st_size > 0, []
    original = faic.dataset._in_chunks
    monkeypatch.setattr(
        faic.dataset,
        "_in_chunks",
        lambda w, items, done, desc: (
            work.append(len(items) if "enlarging" in desc else 0) or original(w, items, done, desc)
        ),
    )
    assert (resized_for_crops(photos, 40) == whole).all() and "is damaged" in capsys.readouterr().out
    assert sum(work) == (36 - 5 if kept else 36)
    assert verify(photos)[path.name] == []


class FewPixels:
    """A trainee whose latents are every fourth pixel."""

    def prepare(self, pixels, mirrored):
        return pixels[:, None, :, ::4, ::4].half() / 7


@pytest.mark.parametrize(
    "damage", [lambda p: cut(p, 5, 24), lambda p: overwrite(p, 5, 24), lambda p: p.write_bytes(b"")]
)
def test_damaged_latents_are_made_again(tmp_path, damage, capsys):
    array, path = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8), tmp_path / "latents.f16"
    make = lambda: prepare_latents(FewPixels(), array, path)
    whole = np.array(make())
    damage(path)
    assert np.array_equal(make(), whole) and "latents.f16 is damaged" in capsys.readouterr().out
    assert np.array_equal(make(), whole) and "damaged" not in capsys.readouterr().out


def test_latents_continue_where_they_were_killed(tmp_path, monkeypatch):
    """In the middle of an image: only what is missing is made."""
    array, path, made = (
        np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8),
        tmp_path / "latents.f16",
        [],
    )
    whole = np.array(prepare_latents(FewPixels(), array, path))
    (tmp_path / "again.part").write_bytes(whole.tobytes()[: whole.nbytes // 2 + 7])
    (tmp_path / "again.f16.sums").write_bytes((tmp_path / "latents.f16.sums").read_bytes())
    original = FewPixels.prepare
    monkeypatch.setattr(
        FewPixels,
        "prepare",
        lambda self, pixels, mirrored: made.append(len(pixels)) or original(self, pixels, mirrored),
    )
    assert np.array_equal(prepare_latents(FewPixels(), array, tmp_path / "again.f16"), whole)
    assert sum(made) == 1 + 25  # one for the shape


# the disk


def test_a_disk_that_is_too_small_stops_at_once(folder, small_disk, monkeypatch):
    monkeypatch.setenv("FAIC_RUNS", str(small_disk("96k")))
    with pytest.raises(
        OSError,
        match=r"preparing photos, 40 files needs up to 0.1 MB, and .* has 0.\d MB free: make room there .* FAIC_RUNS",
    ):
        load_photos(folder, SIDE)
    assert not list(runs_dir().glob("data-*/pixels.u8"))


def test_a_disk_that_fills_up_while_preparing(folder, small_disk, monkeypatch):
    wanted = load_photos(folder, SIDE)
    disk = small_disk("256k")
    monkeypatch.setenv("FAIC_RUNS", str(disk / "runs"))
    monkeypatch.setattr(faic.photos, "CHUNK", 8)
    filler, original = disk / "filler", faic.photos.read_photo
    late = wanted.manifest["file"].iloc[30]  # of 40; photographs are read a few chunks ahead of what is written

    def read(path, side, file):
        if file == late:
            filler.write_bytes(bytes(shutil.disk_usage(disk).free // 4096 * 4096))
        return original(path, side, file)

    with monkeypatch.context() as patch:
        patch.setattr(faic.dataset, "read_photo", read)
        with pytest.raises(
            OSError,
            match=r"needed up to 0.1 MB, and the disk of .* filled up \(0.0 MB free now\). What is done is kept: make room",
        ):
            load_photos(folder, SIDE)
    assert not list(runs_dir().glob("*/manifest.csv")), "half an array is not a whole one"
    filler.unlink()
    again = []
    monkeypatch.setattr(
        faic.dataset, "read_photo", lambda path, side, file: again.append(file) or original(path, side, file)
    )
    photos = load_photos(folder, SIDE)
    assert photos.fingerprint == wanted.fingerprint and (photos.array == wanted.array).all() and 0 < len(again) < 40


def test_a_disk_that_fills_up_while_enlarging(folder, small_disk, monkeypatch):
    whole = np.array(resized_for_crops(load_photos(folder, SIDE), 60))  # 389 kB
    disk = small_disk("720k")
    monkeypatch.setenv("FAIC_RUNS", str(disk / "runs"))
    monkeypatch.setattr(faic.photos, "CHUNK", 8)
    photos, filler = load_photos(folder, SIDE), disk / "filler"
    filler.write_bytes(bytes(300_000))
    with pytest.raises(OSError, match=r"enlarging photos to 60 needs up to 0.4 MB, and .* has 0.\d MB free"):
        resized_for_crops(photos, 60)
    usage = shutil.disk_usage(disk)
    with monkeypatch.context() as patch:
        patch.setattr(faic.dataset.shutil, "disk_usage", lambda path: usage._replace(free=10**9))
        with pytest.raises(OSError, match="enlarging photos to 60 needed up to 0.4 MB, and the disk of .* filled up"):
            resized_for_crops(photos, 60)
    assert not list(photos.folder.glob("train-60-*.u8"))
    filler.unlink()
    monkeypatch.setattr(
        faic.dataset,
        "_in_chunks",
        lambda work, items, *rest, original=faic.dataset._in_chunks: original(
            work, seen.append(len(items)) or items, *rest
        ),
    )
    seen = []
    assert (resized_for_crops(photos, 60) == whole).all() and 0 < seen[-1] < 36, "what is done is kept"


def test_a_read_only_folder_of_photographs_is_fine_and_read_only_runs_say_so(folder, small_disk, monkeypatch):
    disk = small_disk("4m")
    shutil.copytree(folder, disk / "photos")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    photos = load_photos(disk / "photos", SIDE)
    assert len(photos.array) == 40

    place = small_disk("4m")
    shutil.copytree(runs_dir(), place / "runs")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    monkeypatch.setenv("FAIC_RUNS", str(place / "runs"))
    again = load_photos(disk / "photos", SIDE)
    assert again.fingerprint == photos.fingerprint, "what is prepared needs no writing"
    for work in (
        lambda: load_photos(disk / "photos", 16),
        lambda: resized_for_crops(again, 40),
        lambda: run_with(again),
    ):
        with pytest.raises(OSError, match=f"{place}.* cannot be written .*Read-only file system.*FAIC_RUNS"):
            work()


# the loader


ARRAY = np.random.default_rng(1).integers(0, 256, (23, 12, 12, 3), dtype=np.uint8)


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_workers_changes_nothing(workers):
    images = lambda w: itertools.islice(
        training_batches(ARRAY, np.arange(23), 4, seed=2, crop=8, start_step=3, workers=w), 30
    )
    latents = lambda w: itertools.islice(latent_batches(ARRAY[:, None], np.arange(23), 4, seed=2, workers=w), 30)
    for one, many in itertools.chain(
        zip(images(1), images(workers), strict=True), zip(latents(1), latents(workers), strict=True)
    ):
        assert all(torch.equal(one[k], many[k]) for k in one)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_an_error_of_a_worker_reaches_the_loop_at_its_step(workers):
    class Failing(np.ndarray):
        def __getitem__(self, key):
            if isinstance(key, tuple) and isinstance(key[0], int | np.integer) and key[0] == 13:
                raise OSError(errno.EIO, "Input/output error")
            return super().__getitem__(key)

    order = [
        b["index"].tolist() for b in itertools.islice(training_batches(ARRAY, np.arange(23), 4, seed=2, crop=8), 6)
    ]
    wanted = next(step for step, index in enumerate(order) if 13 in index)
    before, steps = threading.active_count(), []
    with pytest.raises(OSError) as error:
        failing = training_batches(ARRAY.view(Failing), np.arange(23), 4, seed=2, crop=8, workers=workers)
        for batch in itertools.islice(failing, 6):
            steps.append(batch["index"].tolist())
    assert error.value.errno == errno.EIO and steps == order[:wanted] and threading.active_count() == before


def test_no_workers_is_an_error():
    for work in (
        lambda: training_batches(ARRAY, np.arange(23), 4, 0, crop=8, workers=0),
        lambda: latent_batches(ARRAY[:, None], np.arange(23), 4, 0, workers=0),
    ):
        with pytest.raises(ValueError, match="workers is 0; expected at least 1"):
            work()


# evaluation


class Judge(torch.nn.Module):
    network_name, num_features = "quarters", 12
    images = 0

    def forward(self, rgb):
        self.images += len(rgb)
        quarters = torch.nn.functional.adaptive_avg_pool2d(rgb, 2).flatten(1)
        return quarters, quarters.softmax(1)


def test_the_real_photographs_are_looked_at_once_and_again_where_that_was_damaged(folder, capsys):
    photos, counts, rows = load_photos(folder, SIDE), [], []
    for damage in (None, None, "cut", "garbage"):
        (kept, *_) = list(runs_dir().glob("data-features/*-test-*.npz")) or [None]
        if damage == "cut":
            os.truncate(kept, 300)
        if damage == "garbage":
            kept.write_bytes(b"x" * 300)
        feature_net = Judge()
        rows.append(evaluate(gray_baseline, photos, "test", feature_net)[0]["photograph"])
        counts.append(feature_net.images)
        assert ("computing the features of the photographs again" in capsys.readouterr().out) == bool(damage)
    assert counts == [6, 2, 4, 4], "two colorized, two real of the test and two of the validation part"
    same = lambda row: {k: v for k, v in row.items() if k != "evaluation_seconds"}
    assert all(str(same(r)) == str(same(rows[0])) for r in rows)


def test_other_photographs_of_the_same_number_have_features_of_their_own(folder):
    """A script may choose 500 of a split in more than one way."""
    photos = load_photos(folder, SIDE)
    others = replace(photos, splits=photos.splits | dict(test=np.flip(photos.splits["test"]).copy()))
    features, turned = (features_of(p, "test", Judge(), torch.device("cpu"))[0] for p in (photos, others))
    assert torch.equal(turned, features.flip(0)) and not torch.equal(turned, features)
