"""Pictures: whatever comes, either a whole RGB image or one sentence that names the file and the reason."""

import io
import json
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from mllmfl_lite.data.cc595k import cc595k_source
from mllmfl_lite.data.folders import PictureSource, array_source, folder_source
from mllmfl_lite.data.images import ImageSet
from mllmfl_lite.data.pictures import BadPictureError, open_picture


def encoded(image, form, **options):
    out = io.BytesIO()
    image.save(out, format=form, **options)
    return out.getvalue()


@pytest.fixture
def photo():
    smooth = np.linspace(0, 255, 40 * 30 * 3).reshape(40, 30, 3).astype(np.uint8)
    return Image.fromarray(smooth)


def test_rgb_comes_back_unchanged(photo):
    again = open_picture(encoded(photo, "PNG"), "a.png")
    assert again.mode == "RGB" and np.array_equal(np.asarray(again), np.asarray(photo))


def test_no_picture_and_truncated_jpeg_are_named(photo):
    with pytest.raises(BadPictureError, match=r"notes.jpg is no whole picture"):
        open_picture(b"dear diary", "notes.jpg")
    with pytest.raises(BadPictureError, match=r"cut.jpg is no whole picture"):
        open_picture(encoded(photo, "JPEG")[:-200], "cut.jpg")


def test_too_small_and_a_bomb_are_refused_before_they_are_decoded(tmp_path):
    with pytest.raises(BadPictureError, match=r"dot.png has 1 x 1 pixels; 8 a side"):
        open_picture(encoded(Image.new("RGB", (1, 1)), "PNG"), "dot.png")
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))  # no pixels follow: none are needed
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(BadPictureError, match=r"bomb.png .*too many pixels|bomb.png has 20000 x 20000"):
        open_picture(bomb, "bomb.png")
    with pytest.raises(BadPictureError, match=r"wide.png has 16000 x 5000 pixels, more than 64,000,000"):
        open_picture(encoded(Image.new("1", (16_000, 5_000)), "PNG"), "wide.png")


def test_cmyk_grey_and_16_bit_become_rgb(photo):
    cmyk = open_picture(encoded(photo.convert("CMYK"), "JPEG", quality=98), "a.jpg")
    assert cmyk.mode == "RGB" and np.abs(np.asarray(cmyk, int) - np.asarray(photo, int)).mean() < 8
    grey = np.asarray(open_picture(encoded(photo.convert("L"), "PNG"), "b.png"))
    assert np.array_equal(grey[..., 0], grey[..., 2]) and np.array_equal(grey[..., 0], np.asarray(photo.convert("L")))
    deep = Image.fromarray(np.linspace(1000, 60000, 256).reshape(16, 16).astype(np.uint16))
    values = np.asarray(open_picture(encoded(deep, "PNG"), "c.png"))[..., 0].ravel()
    assert values[0] == 0 and values[-1] >= 254 and np.all(np.diff(values.astype(int)) >= 0)


def test_transparency_is_laid_on_white():
    glass = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    glass.putpixel((0, 0), (255, 0, 0, 255))
    seen = np.asarray(open_picture(encoded(glass, "PNG"), "glass.png"))
    assert tuple(seen[0, 0]) == (255, 0, 0) and tuple(seen[5, 5]) == (255, 255, 255)


def test_a_picture_lying_on_its_side_is_put_upright(photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright = open_picture(encoded(photo, "JPEG", exif=exif), "side.jpg")
    assert upright.size == (photo.size[1], photo.size[0])


def test_a_folder_is_read_with_its_subfolders_in_order(tmp_path, photo):
    (tmp_path / "inner").mkdir()
    photo.save(tmp_path / "b.PNG", format="PNG")
    photo.save(tmp_path / "inner" / "a.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    source = folder_source(tmp_path)
    assert source.ids == ["b.PNG", "inner/a.jpg"] and source.open("b.PNG").size == photo.size


def test_a_folder_that_is_none_or_holds_nothing(tmp_path):
    with pytest.raises(BadPictureError, match="is not a folder"):
        folder_source(tmp_path / "nowhere")
    with pytest.raises(BadPictureError, match="holds no picture; known endings"):
        folder_source(tmp_path)


def test_arrays_keep_their_pixels_and_ids_sort_like_numbers():
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    source = array_source(ImageSet(images, np.zeros(12, np.int64), ("x",), "test"))
    assert source.ids == sorted(source.ids) and source.ids[3] == "03"
    assert np.array_equal(np.asarray(source.open("03")), images[3])


def test_ids_must_be_unique():
    with pytest.raises(BadPictureError, match="'a' stands 2 times"):
        PictureSource(["a", "b", "a"], ["1", "2", "3"], None)


# ---------------------------------------------------------------------------------------------------- CC-595K


def cc_files(folder, entries, pictures):
    (folder / "chat.json").write_text(json.dumps(entries))
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name, content in pictures.items():
            archive.writestr(name, content)
    return folder / "chat.json", folder / "images.zip"


def entry(name, **more):
    turns = [{"from": "human", "value": "<image>\nGive a caption."}, {"from": "gpt", "value": "a thing"}]
    return {"id": name, "image": f"{name}.jpg", "conversations": turns} | more


def test_cc595k_is_read_in_place(tmp_path, photo):
    files = cc_files(
        tmp_path, [entry("GCC_1"), entry("GCC_2")], {f"GCC_{i}.jpg": encoded(photo, "JPEG") for i in (1, 2)}
    )
    source = cc595k_source(*files)
    assert source.ids == ["GCC_1", "GCC_2"] and source.open("GCC_2").size == photo.size and not source.problems
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chat.json", "images.zip"]  # nothing was unpacked


def test_cc595k_names_what_it_leaves_out(tmp_path, photo):
    entries = [entry("a"), entry("a"), entry("gone"), {"id": "c"}, entry("d", blip_caption="x")]
    source = cc595k_source(*cc_files(tmp_path, entries, {n: encoded(photo, "JPEG") for n in ("a.jpg", "d.jpg")}))
    assert source.ids == ["a", "d"]
    assert source.problems == [
        "entry 1: id 'a' stands twice; the first one is used",
        "entry 2: 'gone.jpg' is not in images.zip",
        "entry 3 lacks 'id' or 'image'",
        "field 'blip_caption' is not known and ignored, in 1 entries",
    ]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b.jpg"])
def test_an_archive_whose_names_lead_out_is_refused(tmp_path, photo, name):
    files = cc_files(tmp_path, [entry("a")], {"a.jpg": encoded(photo, "JPEG"), name: b"x"})
    with pytest.raises(BadPictureError, match="lead out of it"):
        cc595k_source(*files)


def test_broken_files_of_cc595k(tmp_path, photo):
    chat, images = cc_files(tmp_path, [entry("a")], {"a.jpg": encoded(photo, "JPEG")})
    (tmp_path / "cut.zip").write_bytes(images.read_bytes()[:-30])
    with pytest.raises(BadPictureError, match=r"cut.zip cannot be opened as a zip"):
        cc595k_source(chat, tmp_path / "cut.zip")
    (tmp_path / "flipped.zip").write_bytes(images.read_bytes().replace(encoded(photo, "JPEG")[100:110], b"0123456789"))
    with pytest.raises(BadPictureError, match=r"a.jpg is damaged in flipped.zip"):
        cc595k_source(chat, tmp_path / "flipped.zip").open("a")
    (tmp_path / "bad.json").write_text('{"id": 1}')
    with pytest.raises(BadPictureError, match="must hold one JSON list; it holds a dict"):
        cc595k_source(tmp_path / "bad.json", images)
    with pytest.raises(BadPictureError, match="no picture in common"):
        cc595k_source(*cc_files(tmp_path, [entry("b")], {"a.jpg": b"x"}))
