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


def png16(*extra: bytes) -> bytes:
    """A 32 x 32 ramp of 16-bit grey from 0 to 65535."""
    ramp = np.linspace(0, 65535, 1024).reshape(32, 32).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in ramp)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 0, 0, 0, 0))
    return PNG + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


TEAL = Image.new("RGB", (40, 60), "teal")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1", "LA", "RGBA", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = TEAL.convert("L").point(lambda v: v * 256, "I").convert("I;16") if mode == "I;16" else TEAL.convert(mode)
    found = open_picture(saved(image, "TIFF"), "x")
    assert found.mode == "RGB" and found.size == (40, 60)


def test_16_bit_grey_keeps_its_values_with_and_without_transparency():
    for extra, first in (((), 0), ((chunk(b"tRNS", b"\0\0"),), 255)):
        values = np.asarray(open_picture(png16(*extra), "x"))[..., 0].flatten()
        np.testing.assert_allclose(values[1:], np.linspace(0, 255, 1024)[1:], atol=1)
        assert values[0] == first, "a transparent value is white"


def test_a_float_image_with_a_nan_is_named():
    values = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    np.testing.assert_allclose(
        np.asarray(open_picture(saved(Image.fromarray(values), "TIFF"), "x"))[..., 0], 255 * values, atol=1
    )
    values[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"f.tif cannot be read .*not finite numbers"):
        open_picture(saved(Image.fromarray(values), "TIFF"), "f.tif")


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    assert np.asarray(open_picture(saved(image, "PNG"), "x")).min() == 255
    palette = Image.new("P", (10, 10), 3)
    palette.putpalette([7] * 768)
    assert np.asarray(open_picture(saved(palette, "PNG", transparency=3), "x")).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation):
    image = Image.new("RGB", (60, 40))
    image.paste("white", (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = orientation
    content = saved(image, "JPEG", exif=exif)
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


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    moving = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_picture(moving, "x").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "cannot be read as an image"),
        (b"dear diary", "cannot be read as an image"),
        (saved(TEAL, "PNG")[:-60], "cannot be read as an image"),
        (saved(TEAL, "JPEG")[:300], "cannot be read as an image"),
        (saved(Image.new("L", (7, 90)), "PNG"), "7 x 90 pixels; at least 8 a side"),
        (saved(Image.new("1", (20_000, 8)), "PNG"), f"20000 x 8 pixels; .* at most {MAX_RATIO} times"),
        (saved(Image.new("1", (9_000, 9_000)), "PNG"), "more than 64,000,000"),
        (saved(Image.new("1", (20_000, 20_000)), "PNG"), "pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_usable_image_is_named(content, rule):
    with pytest.raises(ValueError, match=f"^x.png .*{rule}"):
        open_picture(content, "x.png")


def test_a_folder_is_read_by_content_and_hidden_files_are_skipped(tmp_path):
    for name in ("b/one.jfif", "b/two.JPG", "without ending", ".ipynb_checkpoints/one.png", "._IMG.jpg", ".x/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(saved(TEAL, "JPEG"))
    (tmp_path / "notes.txt").write_text("no image")
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
    with pytest.warns(UserWarning, match=r"no regular files: .*folder.png.*loop.png.*pipe.jpg"):
        assert folder_images(tmp_path).ids == ["a.png"]


def test_names_that_are_no_utf8_are_read(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(saved(TEAL, "PNG"))
    pool = folder_images(tmp_path)
    assert pool.open(0).size == (40, 60) and len(pool.checksum()) == 64


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
    "labels", [[0.0, 1.0, 1.0, 0.0], [True, False, True, False], ["0", "1", "1", "0"], [None, 1, 1, 0]]
)
def test_labels_that_are_no_whole_numbers_are_refused(labels):
    with pytest.raises(ValueError, match="labels must be whole numbers"):
        ImageSet(GREY, np.array(labels), NAMES, "made")


@pytest.mark.parametrize(
    ("names", "rule"),
    [(("a", "a"), "'a' stands 2 times"), (("a", " "), "must not be empty"), (("a\t", "a"), "stands 2")],
)
def test_class_names_are_distinct(names, rule):
    with pytest.raises(ValueError, match=rule):
        ImageSet(GREY, np.zeros(4, np.int64), names, "made")


def test_sets_with_other_classes_or_another_order_do_not_meet():
    one, other = (ImageSet(GREY, np.zeros(4, np.int64), names, "made") for names in (NAMES, NAMES[::-1]))
    one.require_same_classes(one)
    with pytest.raises(ValueError, match="the same class names in the same order"):
        one.require_same_classes(other)
