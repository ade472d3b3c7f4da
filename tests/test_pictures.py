"""Images as people have them: formats, depths, metadata, folders."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from mllmfl_lite.data.folders import folder_images
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.pictures import MAX_RATIO, PNG, open_picture


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def png(rows: list[bytes], depth: int, colour: int, transparent: bytes = b"") -> bytes:
    """A PNG 32 pixels wide with rows of that bit depth and colour type (0 grey, 2 RGB, 4 grey and alpha)."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, len(rows), depth, colour, 0, 0, 0))
    key = chunk(b"tRNS", transparent) if transparent else b""
    return (
        PNG + header + key + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b"")
    )


ramp = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)


TEAL = Image.new("RGB", (40, 60), "teal")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1", "LA", "RGBA", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    found = open_picture(saved(TEAL.convert(mode), "TIFF"), "x")
    assert found.mode == "RGB" and found.size == (40, 60)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA"])
def test_every_format_is_read(kind):
    np.testing.assert_allclose(np.asarray(open_picture(saved(TEAL, kind), "x")).mean((0, 1)), (0, 128, 128), atol=4)


def test_inverted_and_plain_cmyk_jpegs():
    found = open_picture(saved(TEAL.convert("CMYK"), "JPEG"), "x")
    np.testing.assert_allclose(found.getpixel((5, 5)), (0, 128, 128), atol=4)


def deep(*channels: np.ndarray) -> list[bytes]:
    return [row.astype(">u2").tobytes() for row in np.stack(channels, -1)]


OPAQUE = np.full_like(ramp, 65535)
DEEP = {
    "grey": png(deep(ramp), 16, 0),
    "grey and alpha": png(deep(ramp, OPAQUE), 16, 4),
    "RGB": png(deep(ramp, ramp, ramp), 16, 2),
    "RGBA": png(deep(ramp, ramp, ramp, OPAQUE), 16, 6),
    "little-endian TIFF": saved(Image.fromarray(ramp), "TIFF"),
    "big-endian TIFF": saved(Image.frombytes("I;16B", (32, 32), ramp.astype(">u2").tobytes()), "TIFF"),
    "32-bit TIFF": saved(Image.fromarray(ramp.astype(np.int32) - 30_000), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_keep_their_values(name):
    values = np.asarray(open_picture(DEEP[name], "x"))
    np.testing.assert_allclose(values, np.repeat(ramp[..., None] / 257, 3, 2), atol=1)


def test_an_even_deep_image_keeps_its_level():
    for level in (0, 30_000, 65535):
        found = open_picture(png(deep(np.full_like(ramp, level)), 16, 0), "x")
        np.testing.assert_allclose(np.asarray(found), level / 257, atol=1)


def test_a_transparent_value_is_white_and_the_others_stay():
    for level in (0, int(ramp[16, 3]), 65535):
        key = struct.pack(">H", level)
        for content in (png(deep(ramp), 16, 0, key), png(deep(ramp, ramp, ramp), 16, 2, 3 * key)):
            values = np.asarray(open_picture(content, "x"))[..., 0]
            other = ramp >> 8 != level >> 8
            assert (values[ramp == level] == 255).all()
            np.testing.assert_allclose(values[other], (ramp / 257)[other], atol=2)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_transparent_values_of_shallow_images(depth):
    values = (np.arange(64).reshape(2, 32) % 2**depth).astype(np.uint8)
    bits = np.unpackbits(values[..., None], axis=2)[..., -depth:].reshape(2, -1)
    found = np.asarray(open_picture(png([*map(bytes, np.packbits(bits, axis=1))] * 4, depth, 0, b"\0\1"), "x"))[
        :2, :, 0
    ]
    assert (found == np.where(values == 1, 255, values * (255 // (2**depth - 1)))).all()


def test_a_float_image_with_a_nan_is_named():
    values = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    np.testing.assert_allclose(
        np.asarray(open_picture(saved(Image.fromarray(values), "TIFF"), "x"))[..., 0], 255 * values, atol=1
    )
    values[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"f.tif has pixels that are not finite numbers"):
        open_picture(saved(Image.fromarray(values), "TIFF"), "f.tif")


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    assert np.asarray(open_picture(saved(image, "PNG"), "x")).min() == 255
    palette = Image.new("P", (10, 10), 3)
    palette.putpalette([7] * 768)
    assert np.asarray(open_picture(saved(palette, "PNG", transparency=3), "x")).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_images_are_upright(kind, orientation):
    image = Image.new("RGB", (60, 40))
    image.paste("white", (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = orientation
    content = saved(image, kind, exif=exif)
    usual = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(np.asarray(open_picture(content, "x")), np.asarray(usual))


def test_broken_metadata_does_not_cost_the_pixels():
    jpeg = saved(TEAL, "JPEG")
    entries = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHII", 0x11A, 10, 1, 38)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0) + struct.pack("<ii", -1, 0)
    broken = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    assert open_picture(broken, "x").size == (60, 40), "upright, though another entry is -1/0"
    notes = PngImagePlugin.PngInfo()
    notes.add_text("workflow", "node " * 300_000, zip=True)
    assert open_picture(saved(TEAL, "PNG", pnginfo=notes), "x").size == (40, 60)


@pytest.mark.parametrize("kind", ["icc", "texts", "international text"])
def test_broken_and_huge_metadata_of_a_png(kind):
    notes = PngImagePlugin.PngInfo()
    for i in range(80 if kind == "texts" else 0):
        notes.add_text(f"note {i}", "x" * 900_000, zip=True)
    if kind == "international text":
        notes.add_itxt("note", "x" * 5_000_000, zip=True)
    more = {"icc_profile": bytes(3_000_000)} if kind == "icc" else {}
    assert open_picture(saved(TEAL, "PNG", pnginfo=notes, **more), "x").getpixel((0, 0)) == (0, 128, 128)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF|Truncated")
def test_broken_metadata_of_a_jpeg():
    """Any byte of its EXIF data, profile, comment and index of more images."""
    exif = TEAL.getexif()
    exif[0x010F] = "maker"
    one = saved(TEAL, "JPEG", exif=exif, comment=b"hello", icc_profile=b"profile" * 9)
    several = saved(TEAL, "MPO", save_all=True, append_images=[TEAL], exif=exif)
    for content in (one, several):
        expected, end = np.asarray(open_picture(content, "x")), content.index(b"\xff\xdb")
        place = 2
        while place < end:
            (length,) = struct.unpack(">H", content[place + 2 : place + 4])
            for i in range(place + 4, place + 2 + length, 3):
                damaged = bytearray(content)
                damaged[i] ^= 0xFF
                np.testing.assert_array_equal(np.asarray(open_picture(bytes(damaged), "x")), expected)
            place += 2 + length


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    moving = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(open_picture(moving, "x").getpixel((0, 0)), (255, 0, 0), atol=5)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "cannot be read as an image"),
        (b"dear diary", "cannot be read as an image"),
        (saved(TEAL, "PNG")[:-60], "cannot be read as an image"),
        (saved(TEAL, "GIF")[:-30], "cannot be read as an image"),
        (saved(TEAL, "EPS"), "PostScript"),
        (saved(TEAL, "JPEG")[:300], "cannot be read as an image"),
        (saved(Image.new("L", (7, 90)), "PNG"), "7 x 90 pixels; at least 8 a side"),
        (saved(Image.new("1", (20_000, 8)), "PNG"), f"20000 x 8 pixels; sides may differ {MAX_RATIO}-fold at most"),
        (saved(Image.new("1", (9_000, 9_000)), "PNG"), "more than 64,000,000"),
        (saved(Image.new("1", (20_000, 20_000)), "PNG"), "pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_usable_image_is_named(content, rule):
    with pytest.raises(ValueError, match=f"^x.png .*{rule}"):
        open_picture(content, "x.png")


def test_a_folder_is_read_by_content_and_hidden_files_are_skipped(tmp_path):
    hidden = (".ipynb_checkpoints/one.png", "._IMG.jpg", ".x/y.png", "__MACOSX/z.jpg", "@eaDir/one.jpg/S.jpg")
    for name in ("b/one.jfif", "b/two.JPG", "without ending", *hidden):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(saved(TEAL, "JPEG"))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "BMW.txt").write_text("BMW: no image")
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42 no image")
    (tmp_path / "broken.png").write_text("no image")
    pool = folder_images(tmp_path)
    assert pool.ids == ["b/one.jfif", "b/two.JPG", "broken.png", "without ending"]
    assert pool.open(0).size == (40, 60)
    with pytest.raises(ValueError, match=r"^broken.png cannot be read"):
        pool.open(2)


def test_what_is_no_regular_file_is_named_and_skipped(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(TEAL, "PNG"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.warns(UserWarning, match=r"no regular files or folders: .*folder.png.*loop.png.*pipe.jpg"):
        assert folder_images(tmp_path).ids == ["a.png"]
    with pytest.raises(ValueError, match=r"pipe.jpg is not a regular file"):
        open_picture(tmp_path / "pipe.jpg", "pipe.jpg")


def test_linked_folders_are_entered_once(tmp_path):
    (pool := tmp_path / "pool").mkdir()
    for name in ("pool/b/one.png", "elsewhere/two.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(saved(TEAL, "PNG"))
    (pool / "a").symlink_to(pool / "b")
    (pool / "up").symlink_to(pool)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    (pool / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"no regular files or folders: .*/a, .*/more/back, .*/up$"):
        assert folder_images(pool).ids == ["b/one.png", "more/two.png"]


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"two\nlines.png"])
def test_unusual_names_are_read_and_said(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    try:
        path.write_bytes(saved(TEAL, "PNG"))
    except OSError:
        pytest.skip("this file system has no such names")
    pool = folder_images(tmp_path)
    assert pool.open(0).size == (40, 60) and len(pool.checksum()) == 64
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        pool.open(0)
    assert "\n" not in str(caught.value) and str(caught.value).encode()


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no image; known endings"):
        folder_images(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        folder_images(tmp_path / "nowhere")


def test_a_folder_of_many_images_opens_none(tmp_path, monkeypatch):
    for i in range(30):
        (tmp_path / f"{i}.png").write_bytes(b"not opened")
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("an image was opened"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(folder_images(tmp_path)) == 30


# ------------------------------------------------------------------------------------------------ image sets

GREY = np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8)
NAMES = ("a", "b")


@pytest.mark.parametrize("images", [GREY, GREY[..., None]])
def test_one_channel_becomes_three(images):
    found = ImageSet(images, np.zeros(4, np.int64), NAMES, "made").images
    assert found.shape == (4, 8, 8, 3) and (found[..., 2] == GREY).all()


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint64, np.int64])
def test_labels_of_any_whole_type_are_int64(kind):
    labels = ImageSet(GREY, np.array([0, 1, 1, 0], kind), NAMES, "made").labels
    assert labels.dtype == np.int64 and labels.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    "labels",
    [
        [0.0, 1.0, 1.0, 0.0],
        [float("nan"), 1, 1, 0],
        [True, False] * 2,
        ["0", "1", "1", "0"],
        [None, 1, 1, 0],
        [2**70] * 4,
    ],
)
def test_labels_that_are_no_whole_numbers_are_refused(labels):
    with pytest.raises(ValueError, match="labels must be whole numbers"):
        ImageSet(GREY, np.array(labels), NAMES, "made")


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        (("a", "a"), "'a' stands 2 times"),
        (("a", " "), "must not be empty"),
        (("a\t", "a"), "stands 2"),
        (("caf\u00e9", "cafe\u0301"), "stands 2"),
        ("ab", "sequence of strings"),
        ((1, 2), "sequence of strings"),
    ],
)
def test_class_names_are_distinct(names, rule):
    with pytest.raises(ValueError, match=rule):
        ImageSet(GREY, np.zeros(4, np.int64), names, "made")


def test_sets_with_other_classes_or_another_order_do_not_meet():
    one, other = (ImageSet(GREY, np.zeros(4, np.int64), names, "made") for names in (NAMES, NAMES[::-1]))
    one.require_same_classes(one)
    with pytest.raises(ValueError, match="the same class names in the same order; the first difference is 'a' and 'b'"):
        one.require_same_classes(other)
    more = ImageSet(GREY, np.zeros(4, np.int64), (*NAMES, "c"), "made")
    with pytest.raises(ValueError, match="None and 'c'"):
        one.require_same_classes(more)


def test_labels_too_large_are_refused():
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1, .* these run from 18446744073709551615"):
        ImageSet(GREY, np.full(4, 2**64 - 1, np.uint64), NAMES, "made")


def test_images_are_contiguous_and_channels_are_last():
    first = np.zeros((4, 3, 8, 8), np.uint8)
    with pytest.raises(ValueError, match="move channels to the end"):
        ImageSet(first, np.zeros(4, np.int64), NAMES, "made")
    assert ImageSet(first.transpose(0, 2, 3, 1), np.zeros(4, np.int64), NAMES, "made").images.flags.c_contiguous
