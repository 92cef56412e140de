"""Image files: color profiles, deep samples, damaged metadata, transparency, and what a result carries.

Files are made here, byte by byte where no writer makes their kind.
"""

import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, TiffImagePlugin
from skimage.color import rgb2lab
from skimage.data import astronaut

from faic.core import RESULT_SOFTWARE
from faic.image_files import UnsupportedImage, open_image, read_image, to_rgb

D65 = (0.3127, 0.3290)
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
SRGB = (D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
SPACES = {  # white and primaries, exponent or parameters of the curve
    "Adobe RGB": ((D65, (0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), (563 / 256,)),
    "Display P3": ((D65, (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)), SRGB_CURVE),
    "ProPhoto RGB": (((0.3457, 0.3585), (0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)), (1.8,)),
    "linear": (SRGB, (1.0,)),
}


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(astronaut()).resize((128, 128), Image.LANCZOS)


def lab_difference(image, other):
    """Mean distance in Lab."""
    return np.linalg.norm(rgb2lab(np.asarray(image)) - rgb2lab(np.asarray(other)), axis=-1).mean()


# profiles


def linear(levels, curve):
    """Undo a curve: [0,1] to linear light."""
    if len(curve) == 1:
        return levels ** curve[0]
    exponent, a, b, c, foot = curve
    return np.where(levels < foot, c * levels, (a * levels + b) ** exponent)


def encoded(light, curve):
    """The inverse of `linear`, by interpolation."""
    grid = np.linspace(0, 1, 200_001)
    return np.interp(light, linear(grid, curve), grid)


def to_xyz(space):
    """(3,3): linear RGB to XYZ, adapted to D50 by Bradford's matrix."""
    white, *primaries = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in space)
    columns = np.stack(primaries, 1)
    cone = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1, 0.8249])
    adapt = np.linalg.inv(cone) @ np.diag(cone @ d50 / (cone @ white)) @ cone
    return adapt @ (columns * np.linalg.solve(columns, white))


def icc(space, curve, name="a test profile"):
    """An ICC profile of version 2, with tables for curves: of RGB, or of gray where `space` is None."""
    table = (linear(np.linspace(0, 1, 1024), curve) * 65535).round().astype(">u2").tobytes()
    trc = b"curv\0\0\0\0" + struct.pack(">I", 1024) + table
    d50 = struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    text = name.encode() + b"\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78), b"wtpt": b"XYZ \0\0\0\0" + d50}
    if space is None:
        tags[b"kTRC"] = trc
    else:
        for channel, column in zip("rgb", to_xyz(space).T):
            numbers = struct.pack(">3i", *(round(v * 65536) for v in column))
            tags[f"{channel}XYZ".encode()] = b"XYZ \0\0\0\0" + numbers
            tags[f"{channel}TRC".encode()] = trc
    index, data = b"", b""
    for tag, value in tags.items():
        index += tag + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    body = struct.pack(">I", len(tags)) + index + data
    kind = b"mntr" + (b"GRAY" if space is None else b"RGB ") + b"XYZ "
    head = struct.pack(">I4xI12s12x4s28x12s", 128 + len(body), 0x02400000, kind, b"acsp", d50)
    return head.ljust(128, b"\0") + body


def in_space(picture, space, curve):
    """The numbers that a picture has in another space, computed in float64."""
    light = linear(np.asarray(picture) / 255, SRGB_CURVE)
    light = light @ (np.linalg.inv(to_xyz(space)) @ to_xyz(SRGB)).T
    return Image.fromarray((255 * encoded(light.clip(0, 1), curve)).round().astype(np.uint8))


@pytest.mark.parametrize("name", SPACES)
def test_rgb_profile_is_applied(tmp_path, picture, name):
    there = in_space(picture, *SPACES[name])
    limit = {"ProPhoto RGB": 0.5, "linear": 1}.get(name, 0.3)  # 8 bits of a wide or a linear space lose more
    assert lab_difference(there, picture) > 3
    for extension in ("png", "tif", "webp"):
        there.save(tmp_path / f"x.{extension}", icc_profile=icc(*SPACES[name], name), lossless=True)
        read = read_image(tmp_path / f"x.{extension}")
        assert lab_difference(read.rgb, picture) < limit and read.note == f"ICC profile {name} applied"


def test_profile_of_other_modes(tmp_path, picture):
    there, profile = in_space(picture, *SPACES["Display P3"]), icc(*SPACES["Display P3"])
    lossy = dict(quality=100, subsampling=0)
    there.save(tmp_path / "x.jpg", icc_profile=profile, **lossy)
    picture.save(tmp_path / "plain.jpg", **lossy)
    loss = lab_difference(Image.open(tmp_path / "plain.jpg"), picture)
    assert lab_difference(read_image(tmp_path / "x.jpg").rgb, picture) < loss + 0.3
    there.convert("RGBA").save(tmp_path / "alpha.png", icc_profile=profile)
    assert lab_difference(read_image(tmp_path / "alpha.png").rgb, picture) < 0.3
    palette = picture.quantize(64)
    expected = palette.convert("RGB")
    palette.putpalette(
        np.asarray(
            in_space(Image.frombytes("RGB", (64, 1), bytes(palette.getpalette()[:192])), *SPACES["Display P3"])
        ).tobytes()
    )
    palette.save(tmp_path / "palette.png", icc_profile=profile)
    assert lab_difference(read_image(tmp_path / "palette.png").rgb, expected) < 0.3


def dot_gain(percent):
    """The light of a gray that is printed with dot gain: Yule and Nielsen's paper and ink, seen through a parabola."""
    levels = np.linspace(0, 1, 1024)
    ink = 1 - levels
    return levels, 1 - (ink + 4 * percent / 100 * ink * (1 - ink)).clip(0, 1)


@pytest.mark.parametrize("curve", (1.8, 2.2, "dot gain"))
@pytest.mark.parametrize("deep", (False, True))
def test_gray_profile_is_applied(tmp_path, picture, curve, deep):
    gray = picture.convert("L")
    light = linear(np.asarray(gray) / 255, SRGB_CURVE)
    if curve == "dot gain":
        levels, reflected = dot_gain(20)
        profile = icc(None, (1.0,))
        table = (reflected * 65535).round().astype(">u2").tobytes()
        straight = (np.linspace(0, 1, 1024) * 65535).round().astype(">u2").tobytes()
        profile = profile.replace(straight, table)
        there = np.interp(light, reflected, levels)
    else:
        profile, there = icc(None, (curve,)), light ** (1 / curve)
    scale, dtype = (65535, np.uint16) if deep else (255, np.uint8)
    Image.fromarray((scale * there).round().astype(dtype)).save(tmp_path / "x.tif", icc_profile=profile)
    read = read_image(tmp_path / "x.tif")
    assert lab_difference(read.rgb, gray.convert("RGB")) < 0.3
    assert (np.ptp(np.asarray(read.rgb), axis=-1) == 0).all() and "ICC profile" in read.note
    if curve != 2.2:
        ignored = Image.fromarray((255 * there).round().astype(np.uint8)).convert("RGB")
        assert lab_difference(ignored, gray.convert("RGB")) > 2


@pytest.mark.parametrize("kind", ("lcms", "table", "gray table"))
def test_srgb_is_left_as_it_is(tmp_path, picture, kind):
    profile = {
        "lcms": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "table": icc(SRGB, SRGB_CURVE, "sRGB IEC61966-2.1"),
        "gray table": icc(None, SRGB_CURVE, "sGray"),
    }[kind]
    image = picture.convert("L") if kind.startswith("gray") else picture
    image.save(tmp_path / "x.png", icc_profile=profile)
    read = read_image(tmp_path / "x.png")
    assert (np.asarray(read.rgb) == np.asarray(image.convert("RGB"))).all()
    assert read.note == ("gray" if kind.startswith("gray") else "")


def test_rgb_profile_on_gray_stays_gray(tmp_path, picture):
    gray = picture.convert("L")
    gray.save(tmp_path / "x.jpg", quality=100, icc_profile=icc(*SPACES["Adobe RGB"]))
    pixels = np.asarray(read_image(tmp_path / "x.jpg").rgb)
    assert (np.ptp(pixels, axis=-1) == 0).all() and abs(pixels[..., 0].astype(int) - gray).max() > 1


def test_conversion_is_done_once(tmp_path, picture):
    there = in_space(picture, *SPACES["Adobe RGB"])
    there.save(tmp_path / "x.png", icc_profile=icc(*SPACES["Adobe RGB"]))
    with open_image(tmp_path / "x.png") as image:
        before = np.asarray(image).copy()
        once, note = to_rgb(image)
        again, silent = to_rgb(once)
        assert (np.asarray(image) == before).all() and note and not silent
    assert (np.asarray(once) == np.asarray(again)).all() and not once.info


def chunk(name, data, crc=None):
    crc = zlib.crc32(name + data) if crc is None else crc
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def with_chunks(image, *chunks, last=False):
    """A PNG file with more chunks, before its pixels or after them."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    data = stream.getvalue()
    at = data.index(b"IEND" if last else b"IDAT") - 4
    return data[:at] + b"".join(chunks) + data[at:]


def gama(gamma):
    return chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000)))


def chrm(space):
    return chunk(b"cHRM", struct.pack(">8I", *(round(v * 100_000) for xy in space for v in xy)))


@pytest.mark.parametrize("name", ("Adobe RGB", "linear", "gamma 1.8"))
@pytest.mark.parametrize("mode", ("RGB", "L"))
def test_gama_and_chrm_are_applied(tmp_path, picture, name, mode):
    space, curve = {**SPACES, "gamma 1.8": (SRGB, (1.8,))}[name]
    image = picture.convert(mode).convert("RGB")
    there = in_space(image, space, curve).convert(mode)
    chunks = [gama(1 / curve[0])] + [chrm(space)] * (space != SRGB)
    (tmp_path / "x.png").write_bytes(with_chunks(there, *chunks))
    read = read_image(tmp_path / "x.png")
    assert lab_difference(read.rgb, image) < (1 if name == "linear" else 0.3) and "gAMA and cHRM applied" in read.note


def test_what_means_srgb_in_a_png(tmp_path, picture):
    srgb = chunk(b"sRGB", b"\0")
    for chunks in ([srgb, gama(1)], [gama(0.45455)], [gama(0.45455), chrm(SRGB)], [chrm(SRGB)], [gama(0)], []):
        (tmp_path / "x.png").write_bytes(with_chunks(picture, *chunks))
        assert (np.asarray(read_image(tmp_path / "x.png").rgb) == np.asarray(picture)).all()


def test_profile_goes_before_gama(tmp_path, picture):
    there = in_space(picture, *SPACES["Display P3"])
    iccp = chunk(b"iCCP", b"P3\0\0" + zlib.compress(icc(*SPACES["Display P3"])))
    (tmp_path / "x.png").write_bytes(with_chunks(there, gama(1), iccp))
    assert lab_difference(read_image(tmp_path / "x.png").rgb, picture) < 0.3


def test_unusable_profiles_are_ignored_and_noted(tmp_path, picture):
    cut = icc(*SPACES["Adobe RGB"])[:300]
    for profile in (b"nonsense", cut, bytes(5000), icc(None, (1.8,))):
        for extension in ("png", "jpg", "tif", "webp"):
            picture.save(tmp_path / f"x.{extension}", icc_profile=profile, lossless=True, quality=100)
            picture.save(tmp_path / f"y.{extension}", lossless=True, quality=100)
            read, plain = (read_image(tmp_path / f"{name}.{extension}") for name in "xy")
            assert (np.asarray(read.rgb) == np.asarray(plain.rgb)).all()
            assert read.note == "unusable ICC profile ignored"


# deep samples


def tiff(array, bits, photometric=1, kind=1, order="<", packed=None, more=()):
    """A TIFF file of one strip; `packed` are its bytes where NumPy has no type for them."""
    data = array.astype(array.dtype.newbyteorder(order)).tobytes() if packed is None else packed
    height, width = array.shape[:2]
    channels = array.shape[2] if array.ndim == 3 else 1
    entries = [
        (256, 3, (width,)),
        (257, 3, (height,)),
        (258, 3, (bits,) * channels),
        (259, 3, (1,)),
        (262, 3, (photometric,)),
        (273, 4, (8,)),
        (277, 3, (channels,)),
        (278, 3, (height,)),
        (279, 4, (len(data),)),
        (339, 3, (kind,) * channels),
        *more,
    ]
    data += bytes(len(data) % 2)
    directory, beyond, at = struct.pack(order + "H", len(entries)), b"", 8 + len(data) + 6 + 12 * len(entries)
    for tag, field, values in sorted(entries):
        value = struct.pack(f"{order}{len(values)}{ {3: 'H', 4: 'I', 12: 'd'}[field] }", *values)
        if len(value) > 4:
            value, beyond = struct.pack(order + "I", at + len(beyond)), beyond + value
        directory += struct.pack(order + "HHI", tag, field, len(values)) + value.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "I", 8 + len(data)) + data + directory + bytes(4) + beyond


RAMP = np.arange(256, dtype=np.uint8).reshape(8, 32)


def gray_levels(path, content=None):
    if content is not None:
        path.write_bytes(content)
    pixels = np.asarray(read_image(path).rgb).astype(int)
    assert (np.ptp(pixels, axis=-1) == 0).all()
    return pixels[..., 0]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("zero_is_white", (False, True))
@pytest.mark.parametrize("bits", (8, 12, 16))
def test_unsigned_tiff(tmp_path, order, zero_is_white, bits):
    values = (RAMP.astype(float) * (2**bits - 1) / 255).round().astype(np.uint16)
    stored = 2**bits - 1 - values if zero_is_white else values
    packed = stored.astype(np.uint8).tobytes() if bits == 8 else None
    if bits == 12:
        pairs = stored.reshape(-1, 2).astype(int)
        packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
        packed = packed.astype(np.uint8).tobytes()
    content = tiff(stored, bits, photometric=1 - zero_is_white, order=order, packed=packed)
    assert (gray_levels(tmp_path / "x.tif", content) == RAMP).all()


@pytest.mark.parametrize("bits", (1, 2, 4))
@pytest.mark.parametrize("zero_is_white", (False, True))
def test_few_bits(tmp_path, bits, zero_is_white):
    levels = np.arange(32).reshape(2, 16) % 2**bits
    rows = np.unpackbits(levels.astype(np.uint8)[..., None], axis=-1)[..., -bits:].reshape(2, -1)
    content = tiff(levels, bits, photometric=1 - zero_is_white, packed=np.packbits(rows, axis=-1).tobytes())
    expected = levels * 255 // (2**bits - 1)
    assert (gray_levels(tmp_path / "x.tif", content) == (255 - expected if zero_is_white else expected)).all()


def test_compressed_16_bit_white_is_zero(tmp_path):
    values = 65535 - RAMP.astype(np.uint16) * 257
    Image.fromarray(values).save(tmp_path / "x.tif", compression="tiff_lzw", tiffinfo={262: 0})
    assert (gray_levels(tmp_path / "x.tif") == RAMP).all()


@pytest.mark.parametrize("order", "<>")
def test_orientation_of_deep_tiff(tmp_path, order):
    content = tiff(RAMP.T.astype(np.uint16) * 257, 16, order=order, more=[(274, 3, (5,))])
    assert (gray_levels(tmp_path / "x.tif", content) == RAMP).all()
    assert read_image(tmp_path / "x.tif").note == "EXIF rotation applied, 16 bit, gray"


def test_32_bit_unsigned(tmp_path):
    content = tiff(RAMP.astype(np.uint32) * 0x01010101, 32)
    assert (gray_levels(tmp_path / "x.tif", content) == RAMP).all()


@pytest.mark.parametrize("dtype", ("i1", "i2", "i4", "f4"))
@pytest.mark.parametrize("zero_is_white", (False, True))
def test_signed_and_float_need_a_stated_range(tmp_path, dtype, zero_is_white):
    if zero_is_white and dtype != "f4":
        pytest.skip("Pillow does not open it: the reason is tested below")
    bits, kind = 8 * int(dtype[1]), 3 if dtype == "f4" else 2
    values = (RAMP - 128.0).astype(dtype)
    stored = -1 - values if zero_is_white else values
    stated = [(340, 12, (-128.0,)), (341, 12, (127.0,))]
    content = tiff(stored, bits, 1 - zero_is_white, kind, more=stated)
    assert (gray_levels(tmp_path / "x.tif", content) == RAMP).all()
    (tmp_path / "x.tif").write_bytes(tiff(stored, bits, 1 - zero_is_white, kind))
    with pytest.raises(UnsupportedImage, match="samples, and the file does not state which are black and white"):
        read_image(tmp_path / "x.tif")


def test_statistics_change_nothing(tmp_path):
    more = [(280, 3, (100,)), (281, 3, (4095,))]
    content = tiff(RAMP.astype(np.uint16) * 257, 16, more=more)
    assert (gray_levels(tmp_path / "x.tif", content) == RAMP).all()


@pytest.mark.parametrize(
    "bits, photometric, kind, dtype, words",
    (
        (10, 1, 1, "u2", "1 x 10 bit, unsigned"),
        (14, 1, 1, "u2", "1 x 14 bit, unsigned"),
        (8, 0, 2, "i1", "1 x 8 bit, signed"),
        (64, 1, 3, "f8", "1 x 64 bit, floating-point"),
        (16, 1, 3, "f2", "1 x 16 bit, floating-point"),
        (16, 1, 4, "u2", "1 x 16 bit, undefined"),
    ),
)
def test_what_pillow_does_not_open_is_described(tmp_path, bits, photometric, kind, dtype, words):
    (tmp_path / "x.tif").write_bytes(tiff(RAMP.astype(dtype), bits, photometric, kind))
    with pytest.raises(UnsupportedImage, match=f"unreadable TIFF file: no decoder for {words}"):
        read_image(tmp_path / "x.tif")


def test_deep_colors(tmp_path, picture):
    deep = np.asarray(picture).astype(np.uint16) * 257
    (tmp_path / "x.tif").write_bytes(tiff(deep, 16, 2))
    (tmp_path / "big.tif").write_bytes(tiff(deep, 16, 2, order=">"))
    body = deep.astype(">u2")
    (tmp_path / "x.ppm").write_bytes(b"P6 128 128 65535\n" + body.tobytes())
    rows = np.concatenate([np.zeros((128, 1), np.uint8), body.reshape(128, -1).view(np.uint8)], 1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 128, 128, 16, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows.tobytes()))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    for name in ("x.tif", "big.tif", "x.ppm", "x.png"):
        assert (np.asarray(read_image(tmp_path / name).rgb) == np.asarray(picture)).all(), name


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("channels", (3, 4))
def test_deep_planes(tmp_path, order, channels):
    deep = np.random.default_rng(0).integers(0, 2**16, (channels, 16, 16)).astype(np.uint16)
    more = dict(extrasamples=["unassalpha"]) if channels == 4 else {}
    for tile in (None, (16, 16)):
        options = dict(photometric="rgb", planarconfig="separate", byteorder=order, tile=tile, **more)
        tifffile.imwrite(tmp_path / "x.tif", deep, **options)
        pixels = np.asarray(read_image(tmp_path / "x.tif").rgb).transpose(2, 0, 1)
        visible = deep[3:].all(0) | True if channels == 3 else deep[3] >= 256
        assert (abs(pixels - deep[:3] / 257.0) * visible).max() <= 1
    tifffile.imwrite(tmp_path / "x.tif", deep[[0, 1, 2, 0]], photometric="separated", planarconfig="separate")
    with pytest.raises(UnsupportedImage, match="no decoder for planes of 16-bit CMYK"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("highest", (1, 15, 100, 255, 1023, 4095, 65535))
def test_maximum_of_netpbm(tmp_path, highest):
    levels = (np.arange(256).reshape(8, 32) * highest / 255).round().astype(int)
    expected = np.floor(levels * 255 / highest + 0.5)
    binary = levels.astype(">u2" if highest > 255 else "u1").tobytes()
    text = "\n".join(str(v) for v in levels.ravel()).encode()
    for magic, body in ((b"P5", binary), (b"P2", text)):
        content = magic + b" 32 8 %d\n" % highest + body
        assert abs(gray_levels(tmp_path / "x.pgm", content) - expected).max() <= (highest not in (1, 15, 255, 65535))


# transparency


def test_first_frame_has_its_pixels(tmp_path, picture):
    frames = [picture.quantize(64), picture.rotate(90).quantize(64)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    read = read_image(tmp_path / "x.gif")
    assert (np.asarray(read.rgb) == np.asarray(frames[0].convert("RGB"))).all() and read.note == "first frame, palette"
    data = (tmp_path / "x.gif").read_bytes()
    (tmp_path / "x.gif").write_bytes(data[: len(data) * 3 // 4])  # the second frame is cut
    assert (np.asarray(read_image(tmp_path / "x.gif").rgb) == np.asarray(frames[0].convert("RGB"))).all()


def test_pages_are_noted_and_further_views_are_not(tmp_path, picture):
    small = picture.resize((32, 32))
    for extension, note in (("tif", "first frame"), ("mpo", "")):
        small.save(tmp_path / f"x.{extension}", save_all=True, append_images=[small.rotate(90)])
        assert read_image(tmp_path / f"x.{extension}").note == note


def test_the_thumbnail_of_a_raw_camera_file_is_refused(tmp_path):
    for kind in (0, 1):
        (tmp_path / f"{kind}.nef").write_bytes(tiff(RAMP, 8, more=[(254, 4, (kind,))]))
    assert read_image(tmp_path / "0.nef").rgb.size == (32, 8)
    with pytest.raises(UnsupportedImage, match="begins with a thumbnail.*; convert it to TIFF or JPEG first"):
        read_image(tmp_path / "1.nef")


def test_hidden_pixels_are_white(tmp_path, picture):
    alpha = Image.linear_gradient("L").resize(picture.size).point(lambda a: 0 if a < 64 else a)
    hidden = np.asarray(alpha) == 0
    image = picture.copy()
    image.putalpha(alpha)
    for extension in ("png", "tif", "webp"):
        image.save(tmp_path / f"x.{extension}", lossless=True, exact=True)
        read = read_image(tmp_path / f"x.{extension}")
        pixels = np.asarray(read.rgb)
        assert (pixels[hidden] == 255).all() and (pixels[~hidden] == np.asarray(picture)[~hidden]).all()
        assert "transparent pixels made white" in read.note and (np.asarray(read.alpha) == np.asarray(alpha)).all()


def test_transparent_colors(tmp_path):
    gray = Image.fromarray(RAMP)
    gray.save(tmp_path / "gray.png", transparency=7)
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "deep.png", transparency=7 * 257)
    gray.convert("RGB").save(tmp_path / "rgb.png", transparency=(7, 7, 7))
    gray.convert("P").save(tmp_path / "palette.png", transparency=7)
    gray.convert("P").save(tmp_path / "palette.gif", transparency=7)
    for name in ("gray.png", "deep.png", "rgb.png", "palette.png", "palette.gif"):
        read = read_image(tmp_path / name)
        assert (np.asarray(read.alpha) == np.where(RAMP == 7, 0, 255)).all(), name
        assert (np.asarray(read.rgb)[RAMP == 7] == 255).all(), name


def small_png(bits, color_type, row, *chunks):
    width = {(2, 0): 4, (4, 0): 2, (16, 2): 2}[bits, color_type]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, color_type, 0, 0, 0))
    parts = [header, *chunks, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    "bits, color_type, row, color, alpha",
    (
        (2, 0, b"\x1b", b"\0\2", [255, 255, 0, 255]),
        (4, 0, b"\x3a", b"\0\x0a", [255, 0]),
        (16, 2, b"\xff" * 6 + b"\xfe\xff" * 3, b"\xff" * 6, [0, 255]),
    ),
)
def test_transparent_color_in_other_units(tmp_path, bits, color_type, row, color, alpha):
    (tmp_path / "x.png").write_bytes(small_png(bits, color_type, row, chunk(b"tRNS", color)))
    assert np.asarray(read_image(tmp_path / "x.png").alpha).tolist() == [alpha]


def test_nothing_visible(tmp_path, picture):
    image = picture.copy()
    image.putalpha(0)
    image.save(tmp_path / "x.png")
    with pytest.raises(UnsupportedImage, match="fully transparent"):
        read_image(tmp_path / "x.png")
    image.save(tmp_path / "x.tga")  # many writers leave the fourth byte 0
    read = read_image(tmp_path / "x.tga")
    assert (np.asarray(read.rgb) == np.asarray(picture)).all() and read.alpha is None


# metadata

BOMB = zlib.compress(bytes(3_000_000))
TEXT = b"Comment\0\0"
BAD_CHUNKS = {
    "text bomb": [chunk(b"zTXt", TEXT + BOMB)],
    "international text bomb": [chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB)],
    "many texts": [chunk(b"zTXt", TEXT + zlib.compress(bytes(1_000_000)))] * 70,
    "profile bomb": [chunk(b"iCCP", b"x\0\0" + BOMB)],
    "profile without a name": [chunk(b"iCCP", b"")],
    "profile of another compression": [chunk(b"iCCP", b"x\0\7abc")],
    "text checksum": [chunk(b"tEXt", b"Comment\0hello", crc=1)],
    "private checksum": [chunk(b"prVt", b"hello", crc=1)],
    "profile checksum": [chunk(b"iCCP", b"x\0\0" + BOMB, crc=1)],
    "short gAMA": [chunk(b"gAMA", b"\0")],
    "short cHRM": [chunk(b"cHRM", b"\0" * 7)],
    "short sRGB": [chunk(b"sRGB", b"")],
    "short pHYs": [chunk(b"pHYs", b"\0\1")],
    "short tRNS": [chunk(b"tRNS", b"\0")],
    "broken eXIf": [chunk(b"eXIf", b"not a TIFF directory")],
    "text of no encoding": [chunk(b"iTXt", b"\xff\0\1\7\xff\xff\0\xff\0\xff")],
    "no name": [chunk(b"\0\1\2\3", b"")],
    "animation of no frames": [chunk(b"acTL", struct.pack(">II", 0, 0))],
    "short animation": [chunk(b"acTL", b"")],
    "short frame": [chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", b"")],
    "length too large": [struct.pack(">I", 40) + b"tEXtComment\0hello" + bytes(4)],
    "length beyond the file": [struct.pack(">I", 2**31 - 1) + b"tEXtComment\0hello" + bytes(4)],
    "negative length": [struct.pack(">I", 2**32 - 1) + b"tEXtComment\0hello" + bytes(4)],
    "length too small": [struct.pack(">I", 2) + b"tEXtComment\0hello" + bytes(4)],
}


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_chunks_of_png_do_not_cost_pixels(tmp_path, picture, name, last):
    (tmp_path / "x.png").write_bytes(with_chunks(picture, *BAD_CHUNKS[name], last=last))
    assert (np.asarray(read_image(tmp_path / "x.png").rgb) == np.asarray(picture)).all()


def test_good_chunks_survive_bad_ones(tmp_path, picture):
    there, profile = in_space(picture, *SPACES["Display P3"]), icc(*SPACES["Display P3"])
    profile += np.random.default_rng(0).bytes(2_000_000)  # larger than Pillow reads
    exif = Image.Exif()
    exif[271] = "A camera"
    chunks = (chunk(b"tEXt", b"Comment\0hello", crc=1), chunk(b"iCCP", b"P3\0\0" + zlib.compress(profile)))
    chunks += chunk(b"eXIf", exif.tobytes()), chunk(b"pHYs", struct.pack(">IIB", 11811, 11811, 1))
    (tmp_path / "x.png").write_bytes(with_chunks(there, *chunks))
    read = read_image(tmp_path / "x.png")
    assert lab_difference(read.rgb, picture) < 0.3 and read.metadata["dpi"] == pytest.approx((300, 300), abs=0.01)
    kept = Image.Exif()
    kept.load(read.metadata["exif"])
    assert kept[271] == "A camera"


def test_large_png_without_an_end(tmp_path):
    """A chunk of a wrong length after the pixels: the search for more pixels ends at once."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8))
    data = with_chunks(noise, chunk(b"tEXt", b"Comment\0hello", crc=1))
    bad = struct.pack(">I", 2**31) + b"tEXt" + np.random.default_rng(1).bytes(5_000_000)
    (tmp_path / "x.png").write_bytes(data[:-12] + bad)
    assert (np.asarray(read_image(tmp_path / "x.png").rgb) == np.asarray(noise)).all()


def test_damaged_pixels_stay_an_error(tmp_path, picture):
    data = with_chunks(picture, chunk(b"tEXt", b"Comment\0hello", crc=1))
    (tmp_path / "x.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UnsupportedImage, match="truncated"):
        read_image(tmp_path / "x.png")


def metadata_file(picture, extension):
    """A file full of metadata, and where in it they are."""
    exif = Image.Exif()
    exif[271], exif[315], exif[282] = "CAMERACAMERA", "ARTIST" * 20, 300
    exif.get_ifd(0x8769)[0x9286] = b"COMMENT" * 20
    exif.get_ifd(0x8825)[1] = "N"
    profile = icc(SRGB, SRGB_CURVE)
    stream = io.BytesIO()
    options = dict(exif=exif, icc_profile=profile, dpi=(300, 300), lossless=True, quality=95, xmp=b"<x/>" * 50)
    picture.save(stream, {"jpg": "JPEG", "tif": "TIFF"}.get(extension, extension.upper()), **options)
    data = stream.getvalue()
    marks = (exif.tobytes()[:8], b"CAMERACAMERA", b"COMMENT" * 20, profile[:64])
    return data, [data.find(mark) for mark in marks if data.find(mark) > 0]


@pytest.mark.parametrize("extension", ("jpg", "tif", "webp", "png", "avif"))
def test_damaged_metadata_do_not_cost_pixels(tmp_path, picture, extension):
    small = picture.resize((32, 32))
    data, spots = metadata_file(small, extension)
    (tmp_path / "good").write_bytes(data)
    expected, rng = np.asarray(read_image(tmp_path / "good").rgb), np.random.default_rng(0)
    for attempt in range(60):
        bad = bytearray(data)
        at = spots[attempt % len(spots)]
        for i in rng.integers(at, at + 80, 8):
            bad[i] = rng.integers(256)
        (tmp_path / "bad").write_bytes(bad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = read_image(tmp_path / "bad")
        turned = [np.asarray(read.rgb.transpose(t)) for t in Image.Transpose] + [np.asarray(read.rgb)]
        assert any(lab_difference(t, expected) < 5 for t in turned)


# reasons


def test_reasons_are_words(tmp_path, picture):
    picture.save(tmp_path / "x.jpg")
    data = bytearray((tmp_path / "x.jpg").read_bytes())
    frame = data.index(b"\xff\xc0")
    data[frame + 4] = 12
    cases = {
        bytes(data): "unreadable JPEG file: cannot handle 12-bit layers",
        b"": "empty file",
        b"hello": "not an image",
        b"\x89PNG\r\n\x1a\nhello": "unreadable PNG file: damaged header",
    }
    for content, words in cases.items():
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(UnsupportedImage, match=words) as e:
            read_image(tmp_path / "x")
        assert not any(name in str(e.value) for name in ("Error", "Exception", "BytesIO", str(tmp_path)))


def test_no_warning_of_a_size_that_is_read(tmp_path, picture):
    picture.save(tmp_path / "x.png")
    code = (
        "import sys\nfrom PIL import Image\nfrom faic.image_files import UnsupportedImage, read_image\n"
        "size = read_image(sys.argv[1]).size\n"
        "Image.MAX_IMAGE_PIXELS = size[0]*size[1] - 1\nread_image(sys.argv[1])\n"
        "Image.MAX_IMAGE_PIXELS //= 2\n"
        "try: read_image(sys.argv[1])\nexcept UnsupportedImage as e: print(e)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "x.png"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (answer.stdout, answer.stderr) == ("too large\n", "")


def test_missing_decoders_are_named(tmp_path):
    heif, jxl = (
        "HEIC needs a decoder: pip install pillow-heif",
        "JPEG XL needs a decoder: pip install pillow-jxl-plugin",
    )
    heads = {
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": heif,
        b"\0\0\0\x18ftypmsf1\0\0\0\0msf1hevc": heif,
        b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf": heif,
        b"\xff\x0a" + bytes(30): jxl,
        b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(30): jxl,
    }
    for i, head in enumerate(heads):
        (tmp_path / str(i)).write_bytes(head)
    code = (
        "import sys; sys.modules.update(pillow_heif=None, pillow_jxl=None)\n"
        "from faic.image_files import UnsupportedImage, read_image\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_image(path)\n"
        "    except UnsupportedImage as e: print(e)\n"
    )
    command = [sys.executable, "-c", code, *(tmp_path / str(i) for i in range(len(heads)))]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines() == list(heads.values())


@pytest.mark.parametrize("format, module", (("HEIF", "pillow_heif"), ("JXL", "pillow_jxl"), ("AVIF", "PIL")))
def test_optional_formats(tmp_path, picture, format, module):
    pytest.importorskip(module)
    read_image_of(tmp_path, picture)  # registers the decoders
    exif = Image.Exif()
    exif[271] = "A camera"
    there, profile = in_space(picture, *SPACES["Display P3"]), icc(*SPACES["Display P3"])
    options = dict(quality=100, lossless=True, subsampling="4:4:4", chroma=444)
    there = picture if format == "JXL" else there  # its plugin writes no profile
    there.save(tmp_path / "x", format, icc_profile=profile, exif=exif.tobytes(), **options)
    picture.save(tmp_path / "plain", format, **options)
    loss, read = lab_difference(read_image(tmp_path / "plain").rgb, picture), read_image(tmp_path / "x")
    assert loss < 1 and lab_difference(read.rgb, picture) < loss + 0.3
    kept = Image.Exif()
    kept.load(read.metadata["exif"])
    assert kept[271] == "A camera"


def read_image_of(tmp_path, picture):
    picture.save(tmp_path / "any.png")
    return read_image(tmp_path / "any.png")


# what a result carries


def exif_of_source():
    exif = Image.Exif()
    exif[0x0112], exif[271], exif[305], exif[33432] = 6, "A camera", "An editor", "Grandmother"
    exif.get_ifd(0x8769).update({0x9003: "1999:12:31 23:59:59", 0xA001: 65535, 0xA002: 8, 0x927C: b"maker" * 9})
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.0)})
    return exif


@pytest.mark.parametrize("source", ("jpg", "png", "tif", "webp", "avif"))
@pytest.mark.parametrize("target", ("png", "jpg", "tif"))
def test_result_carries_what_the_source_says(tmp_path, picture, source, target):
    turned = picture.resize((40, 20))
    turned.save(tmp_path / f"x.{source}", exif=exif_of_source().tobytes(), dpi=(300, 150))
    read = read_image(tmp_path / f"x.{source}")
    read.rgb.save(tmp_path / f"y.{target}", **read.metadata)
    with Image.open(tmp_path / f"y.{target}") as result:
        exif = result.getexif()
        assert result.size == (20, 40) and exif.get(0x0112, 1) == 1
        assert (exif[271], exif[33432]) == ("A camera", "Grandmother") and exif[305].startswith(RESULT_SOFTWARE)
        details, place = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
        assert details[0x9003] == "1999:12:31 23:59:59" and details[0xA001] == 1 and 0xA002 not in details
        assert details[0x927C] == b"maker" * 9 and place[1] == "N" and place[2] == (52, 31, 12)
        profile = ImageCms.ImageCmsProfile(io.BytesIO(result.info["icc_profile"]))
        assert "sRGB" in ImageCms.getProfileDescription(profile)
        if source in ("jpg", "png", "tif"):
            assert result.info["dpi"] == pytest.approx((150, 300), abs=0.1)
    again = read_image(tmp_path / f"y.{target}")
    assert again.note == "" and again.metadata["icc_profile"] == read.metadata["icc_profile"]


def test_strange_resolutions_are_left_out(tmp_path, picture):
    for dpi in (0, 1e-9, 2**31):
        info = {282: TiffImagePlugin.IFDRational(int(dpi), 1), 283: TiffImagePlugin.IFDRational(int(dpi), 0), 296: 2}
        picture.save(tmp_path / "x.tif", tiffinfo=info)
        read = read_image(tmp_path / "x.tif")
        assert "dpi" not in read.metadata
        read.rgb.save(tmp_path / "y.png", **read.metadata)


def test_large_exif_still_fits_a_jpeg(tmp_path, picture):
    exif = exif_of_source()
    exif.get_ifd(0x8769)[0x927C] = bytes(100_000)
    picture.save(tmp_path / "x.png", exif=exif)
    read = read_image(tmp_path / "x.png")
    read.rgb.save(tmp_path / "y.jpg", **read.metadata)
    assert Image.open(tmp_path / "y.jpg").getexif()[271] == "A camera"


# memory


def test_reading_takes_one_copy(tmp_path):
    """A photograph of 15 million pixels with a profile and a rotation: the decoded image, and its upright copy."""
    image = Image.effect_noise((4800, 3200), 50).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif, icc_profile=icc(*SPACES["Adobe RGB"]))
    code = (
        "import resource, sys\nfrom faic.image_files import read_image\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024\n"
        "before = peak()\nread = read_image(sys.argv[1])\nprint((peak() - before)/(4800*3200))\n"
        "assert read.rgb.size == (3200, 4800) and 'applied' in read.note\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "x.jpg"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(answer.stdout) < 4 + 4 + 1.5, answer.stdout  # bytes a pixel: decoded, upright, and the buffers of both
