"""Photographs on their way to a machine without network, in chunks that are split there as the whole folder is here.

A chunk holds, for every 18 training photographs, one of the validation and one of the test part of the whole folder.
They keep their names, and with them their order, so that `load_photos` makes the same parts of one chunk or of all:
nothing that is scored there was trained on, here or there. JPEGs of the right side travel as they are, without their
headers, of which the chunk keeps one of each kind; other photographs become WebP.
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

TRAIN_TO_ONE = (
    18  # training photographs for one of validation and one of test: load_photos' split of 90, 5 and 5 percent
)
PARTS = ("train", "validation", "test")
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
    for part in PARTS:
        rows = manifest.loc[photos.splits[part]]
        files = rows.loc[rows["gray"].astype(str) != "True", "file"].tolist()
        if len(files) < counts[part]:
            raise ValueError(
                f"{photos.name} has {len(files)} {part} photographs that are not gray; {counts[part]} are wanted"
            )
        found[part] = (
            files[: counts[part]] if part == "train" else [files[i] for i in sample_rows(len(files), counts[part])]
        )
    return found


def share(files, first, count):
    """The photographs of a chunk: `count` of each scored part from `first` on, and 18 times as many to train on."""
    times = dict(train=TRAIN_TO_ONE, validation=1, test=1)
    return [f for part in PARTS for f in files[part][first * times[part] : (first + count) * times[part]]]


def write_chunk(path, root, files, side, quality, about):
    """A file of photographs; its size in bytes. np.load opens it without pickle."""
    files = sorted(files)
    parts = [packed(root / f, side, quality) for f in files]
    headers = sorted({h for h, _ in parts})
    if len(headers) > 255:
        raise ValueError(f"{path.name}: {len(headers)} kinds of JPEG headers; expected few. Recompress the photographs")
    lengths = np.array([len(d) for _, d in parts], np.uint32)
    header = np.array([headers.index(h) for h, _ in parts], np.uint8)
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
        data=np.frombuffer(b"".join(d for _, d in parts), np.uint8),
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
    """Write the chunks and <out>/photos.json; `sizes`: the most bytes of each chunk, the last one's of all others."""
    photos, out = load_photos(str(data), side), Path(out)
    files, root = chosen(photos, counts), Path(data).expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("photos-*.npz"):
        old.unlink()
    about = dict(
        name=photos.name, whole=dict(fingerprint=photos.fingerprint, photographs=len(photos.array)), gray_left_out=True
    )
    total, first, chunks = counts["validation"], 0, []
    each = (TRAIN_TO_ONE + 2) * np.mean(
        [len(packed(root / f, side, quality)[1]) + 16 for f in files["train"][:COMPARED]]
    )  # bytes of a unit
    while first < total:
        number, most = len(chunks) + 1, min(CHUNK, sizes[min(len(chunks), len(sizes) - 1)])
        count = min(total - first, int(most // each))
        while True:
            if count < 1:
                raise ValueError(f"no photograph fits a chunk of {most:,} bytes; give it more")
            some = share(files, first, count)
            size = write_chunk(out / f"photos-{number}.npz", root, some, side, quality, about)
            if size <= most:
                break
            count -= max(1, int((size - most) // each))
        parts = dict(train=count * TRAIN_TO_ONE, validation=count, test=count)
        chunks.append(dict(file=f"photos-{number}.npz", bytes=size, sha256=short_hash(sorted(some), 12), **parts))
        print(
            f"pack: {chunks[-1]['file']}, {size / 2**20:.1f} MiB, " + ", ".join(f"{n} {p}" for p, n in parts.items()),
            flush=True,
        )
        first += count
    gray = int(photos.manifest["gray"].astype(str).eq("True").sum())
    found = about | dict(
        side=side,
        gray=gray,
        chunks=chunks,
        quality=quality,
        error=recompression(root, files["train"][:COMPARED], side, quality),
    )
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
    part = prepared / "pixels.part"
    with open(part, "wb") as f:
        f.truncate(len(files) * 3 * side**2)
    firsts = range(0, len(files), DECODED)
    slices = [[(f, contents[f]) for f in files[first : first + DECODED]] for first in firsts]
    parts = pool.map(partial(read_some, photographs, part), firsts, slices, [side] * len(slices))
    rows = [row for some in parts for row in some]
    os.replace(part, prepared / "pixels.u8")
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
    parts = {p: len(photos.splits[p]) for p in PARTS}
    if parts["train"] != TRAIN_TO_ONE * parts["validation"] or parts["validation"] != parts["test"]:
        raise ValueError(f"the parts are {parts}; a chunk is incomplete")
    summary = dict(
        chunks=[f.name for f in found], components=parts, fingerprint=photos.fingerprint, whole=about["whole"]
    )
    return prepared, photos, summary | dict(lists=list_hashes(photos))
