"""Photographs on their way to a machine without network, in chunks that are split there as the whole folder is here.

A chunk holds one photograph of the validation split and one of the test split for every 18 training photographs. The
photographs keep their names, and so their order: `load_photos` makes the same splits of one chunk or of all, and no
photograph that is scored there was trained on. JPEGs of the right side travel as they are, but without their headers:
the chunk keeps one header of each kind. Other photographs become WebP.
"""

import io
import json
import os
import shutil
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from faic.core import runs_dir, short_hash, write_bytes, write_json
from faic.dataset import hash_order, load_photos
from faic.evaluate import sample_rows
from faic.metrics import chroma_error, psnr
from faic.photos import list_hashes, read_photo

TRAIN_TO_ONE = 18  # training photographs for one of validation and one of test: load_photos splits 90, 5 and 5 percent
SPLITS = ("train", "validation", "test")
CHUNK = 40 * 2**20  # bytes at most
QUALITY = 92  # of WebP
DECODED = 250  # photographs that a process decodes at a time
COMPARED = 200  # recompressed photographs whose error is measured


def without_header(data):
    """(all up to the scan, the scan) of a baseline JPEG; None for anything else."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        kind, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        at += 2 + size
        if kind == 0xDA:
            return data[:at], data[at:]
        if kind == 0xC2:  # progressive: scans have headers of their own
            return None
    return None


def packed(path, side, quality):
    """(header, data) of a photograph: a JPEG of this side as it is, else WebP."""
    data = path.read_bytes()
    split = without_header(data)
    if split and Image.open(io.BytesIO(data)).size == (side, side):
        return split
    pixels, _ = read_photo(path, side, path.name)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "WEBP", quality=quality, method=6)
    return b"", content.getvalue()


def chosen(photos, counts):
    """Files that are not gray: the first ones of training, in the study's order, and evenly spread others."""
    found, manifest = {}, photos.manifest[photos.manifest["row"] >= 0].set_index("row")
    for split in SPLITS:
        rows, count = manifest.loc[photos.splits[split]], counts[split]
        files = rows.loc[rows["gray"].astype(str) != "True", "file"].tolist()
        if len(files) < count:
            raise ValueError(f"{photos.name} has {len(files)} {split} photographs that are not gray; expected {count}")
        chosen_rows = range(count) if split == "train" else sample_rows(len(files), count)
        found[split] = [files[i] for i in chosen_rows]
    return found


def share(files, first, count):
    """The photographs of a chunk: `count` of each scored split from `first` on, and 18 times as many to train on."""
    times = dict(train=TRAIN_TO_ONE, validation=1, test=1)
    return [f for split in SPLITS for f in files[split][first * times[split] : (first + count) * times[split]]]


def write_chunk(path, root, files, side, quality, about):
    """Write a file of photographs that np.load opens without pickle; returns its size in bytes."""
    files = sorted(files)
    contents = [packed(root / f, side, quality) for f in files]
    headers = sorted({h for h, _ in contents})
    if len(headers) > 255:
        raise ValueError(f"{path.name}: {len(headers)} kinds of JPEG headers; expected few. Recompress the photographs")
    lengths = np.array([len(d) for _, d in contents], np.uint32)
    header = np.array([headers.index(h) for h, _ in contents], np.uint8)
    names = np.frombuffer(zlib.compress("\n".join(files).encode(errors="surrogateescape"), 9), np.uint8)
    content = io.BytesIO()
    np.savez(
        content,
        about=json.dumps(about | dict(side=side)),
        names=names,
        lengths=lengths,
        header=header,
        headers=np.frombuffer(b"".join(headers), np.uint8),
        header_lengths=np.array([len(h) for h in headers], np.uint32),
        data=np.frombuffer(b"".join(d for _, d in contents), np.uint8),
    )
    write_bytes(path, content.getvalue())
    return path.stat().st_size


def recompression(root, files, side, quality):
    """How many of some files are recompressed, and their mean PSNR in dB and chroma error in Lab afterwards."""
    pairs = []
    for f in files:
        header, data = packed(root / f, side, quality)
        if not header:
            pairs.append((np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), read_photo(root / f, side, f)[0]))
    if not pairs:
        return dict(compared=len(files), recompressed=0)
    ours, theirs = (torch.tensor(np.stack(x)).permute(0, 3, 1, 2) / 255 for x in zip(*pairs))
    return dict(
        compared=len(files),
        recompressed=len(pairs),
        PSNR=float(psnr(ours, theirs).mean()),
        chroma_error=float(chroma_error(ours, theirs).mean()),
    )


def pack(data, out, side, counts, sizes, quality=QUALITY):
    """Write the chunks and <out>/photos.json; `sizes`: bytes of each chunk at most, the last one's of all others."""
    photos, out = load_photos(str(data), side), Path(out)
    files, root = chosen(photos, counts), Path(data).expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("photos-*.npz"):
        old.unlink()
    whole = dict(fingerprint=photos.fingerprint, photographs=len(photos.array))
    about = dict(name=photos.name, whole=whole, gray_left_out=True)
    total, first, chunks = counts["validation"], 0, []
    sizes_of_some = [len(packed(root / f, side, quality)[1]) + 16 for f in files["train"][:COMPARED]]
    unit = (TRAIN_TO_ONE + 2) * np.mean(sizes_of_some)  # bytes of one photograph each to validate and test, and of 18
    while first < total:
        number, most = len(chunks) + 1, min(CHUNK, sizes[min(len(chunks), len(sizes) - 1)])
        count = min(total - first, int(most // unit))
        while True:
            if count < 1:
                raise ValueError(f"no photograph fits a chunk of {most:,} bytes; give it more")
            some = share(files, first, count)
            size = write_chunk(out / f"photos-{number}.npz", root, some, side, quality, about)
            if size <= most:
                break
            count -= max(1, int((size - most) // unit))
        splits = dict(train=count * TRAIN_TO_ONE, validation=count, test=count)
        chunks.append(dict(file=f"photos-{number}.npz", bytes=size, sha256=short_hash(sorted(some), 12), **splits))
        numbers = ", ".join(f"{n} {split}" for split, n in splits.items())
        print(f"pack: {chunks[-1]['file']}, {size / 2**20:.1f} MiB, {numbers}", flush=True)
        first += count
    gray = int(photos.manifest["gray"].astype(str).eq("True").sum())
    error = recompression(root, files["train"][:COMPARED], side, quality)
    found = about | dict(side=side, gray=gray, chunks=chunks, quality=quality, error=error)
    write_json(out / "photos.json", found)
    return found


def cut(data, lengths):
    """Bytes as pieces of these lengths."""
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    return [data[end - n : end] for n, end in zip(lengths.tolist(), ends)]


def read_chunk(path):
    """(about, [(file, bytes of a file that Pillow opens)]) of a chunk."""
    with np.load(path, allow_pickle=False) as z:
        z = {k: z[k] for k in z.files}
    names = zlib.decompress(z["names"].tobytes()).decode(errors="surrogateescape").split("\n")
    headers = cut(z["headers"].tobytes(), z["header_lengths"])
    bodies = cut(z["data"].tobytes(), z["lengths"])
    return json.loads(str(z["about"])), [(n, headers[h] + d) for n, h, d in zip(names, z["header"], bodies)]


def read_some(folder, pixels_file, first, some, side):
    """In a process of its own: write some photographs, decode them into rows of a file, and describe them."""
    rows, pixels = [], []
    for name, content in some:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        decoded, row = read_photo(path, side, name)
        if decoded is None:
            raise ValueError(f"{name} of a chunk cannot be read: {row['status']}")
        rows.append(row | dict(row=first + len(rows), size=len(content), modified=path.stat().st_mtime_ns))
        pixels.append(decoded.tobytes())
    with open(pixels_file, "r+b") as f:
        os.pwrite(f.fileno(), b"".join(pixels), first * 3 * side**2)
    return rows


def prepare(contents, files, side, photographs, prepared, pool):
    """Decode photographs in many processes into a folder as `load_photos` prepares one."""
    prepared.mkdir(parents=True, exist_ok=True)
    unfinished = prepared / "pixels.part"
    with open(unfinished, "wb") as f:
        f.truncate(len(files) * 3 * side**2)
    firsts = range(0, len(files), DECODED)
    slices = [[(f, contents[f]) for f in files[first : first + DECODED]] for first in firsts]
    decoded = pool.map(partial(read_some, photographs, unfinished), firsts, slices, [side] * len(slices))
    rows = [row for some in decoded for row in some]
    os.replace(unfinished, prepared / "pixels.u8")
    write_bytes(prepared / "manifest.csv", pd.DataFrame(rows).to_csv(index=False).encode(errors="surrogateescape"))


def unpack(chunks, folder, pool):
    """Add chunks to those in `folder` and prepare their photographs: the folder to give as data, the set, a summary."""
    folder = Path(folder)
    kept = folder / "chunks"
    kept.mkdir(parents=True, exist_ok=True)
    for chunk in map(Path, chunks):
        shutil.copyfile(chunk, kept / chunk.name)
    found = sorted(kept.glob("photos-*.npz"))
    if not found:
        raise ValueError(f"no chunk of photographs: expected photos-1.npz, ... as `pack` writes them, or in {kept}")
    read = [read_chunk(f) for f in found]
    about, contents = read[0][0], dict(item for _, items in read for item in items)
    for other, _ in read:
        if other != about:
            raise ValueError(f"chunks of different folders: {about} and {other}")
    side, files = about["side"], hash_order(contents)
    prepared = runs_dir() / f"data-{about['name']}-{side}-{short_hash([about, files])}"
    if not (prepared / "manifest.csv").exists():
        prepare(contents, files, side, folder / "photographs", prepared, pool)
    photos = load_photos(str(prepared), side)
    counts = {split: len(photos.splits[split]) for split in SPLITS}
    if counts["train"] != TRAIN_TO_ONE * counts["validation"] or counts["validation"] != counts["test"]:
        raise ValueError(f"expected {TRAIN_TO_ONE} : 1 : 1 photographs, found {counts}; a chunk is incomplete")
    summary = dict(chunks=[f.name for f in found], splits=counts, fingerprint=photos.fingerprint)
    return prepared, photos, summary | dict(whole=about["whole"], lists=list_hashes(photos))
