"""What `read_image` makes of the pictures people have, and what it says about files that are none."""

import contextlib
import http.server
import logging
import struct
import threading
import time
import zlib

import cv2
import numpy as np
import PIL.Image
import pytest

from errors import InputError, UsageError
from preprocess import image as image_module
from preprocess.image import read_image, write_png

RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def save(path, picture, mode=None, **options):
    PIL.Image.fromarray(np.asarray(picture, np.uint8), mode).save(path, **options)
    return path


def png_header(width, height):
    """A PNG that claims a size and holds no pixel: decoding it would fail, so an error about size came before."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9) + b"IDAT"


# ------------------------------------------------------------------------------------------ pictures


def test_plain_rgb_is_returned_as_it_is(tmp_path):
    picture = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    for source in (save(tmp_path / "a.png", picture), str(tmp_path / "a.png"), PIL.Image.fromarray(picture)):
        np.testing.assert_array_equal(read_image(source), picture)


def test_wrong_extension_does_not_matter(tmp_path):
    save(tmp_path / "really_png.jpg", np.full((4, 4, 3), 77), format="PNG")
    assert (read_image(tmp_path / "really_png.jpg") == 77).all()


def test_alpha_is_composited_on_white(tmp_path):
    # Hidden black behind alpha 0 must not show; half transparent red is pink.
    rgba = [[(0, 0, 0, 0), (255, 0, 0, 255), (255, 0, 0, 51)]]
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", rgba)), [[WHITE, RED, (255, 204, 204)]])
    np.testing.assert_array_equal(
        read_image(save(tmp_path / "a.webp", np.repeat(rgba, 4, 0), lossless=True, exact=True))[0, 0], WHITE
    )
    grey = [[(0, 0), (0, 255), (0, 51)]]
    np.testing.assert_array_equal(read_image(save(tmp_path / "la.png", grey)), [[WHITE, BLACK, (204,) * 3]])


def test_palette_with_transparent_entry(tmp_path):
    image = PIL.Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([*BLACK, *RED, *BLUE])
    for name in ("p.png", "p.gif"):
        image.save(tmp_path / name, transparency=0)
        np.testing.assert_array_equal(read_image(tmp_path / name), [[WHITE, RED, BLUE]])


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    cv2.imwrite(str(tmp_path / name), np.array([[0, 257, 128 * 257, 65535]], np.uint16))
    np.testing.assert_array_equal(read_image(tmp_path / name)[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bit_color(tmp_path, name):
    blue_green_red = np.array([[(0, 64 * 257, 65535), (200 * 257, 0, 0)]], np.uint16)
    cv2.imwrite(str(tmp_path / name), blue_green_red)
    np.testing.assert_array_equal(read_image(tmp_path / name), [[(255, 64, 0), (0, 0, 200)]])


@pytest.mark.parametrize(
    ("values", "expected"), [([0, 0.2, 1, 1.5], [0, 51, 255, 255]), ([-3, 51, 128, 255], [0, 51, 128, 255])]
)
def test_float_tiff_of_either_range(tmp_path, values, expected):
    values = np.array([values], np.float32)
    cv2.imwrite(str(tmp_path / "grey.tiff"), values)
    np.testing.assert_array_equal(read_image(tmp_path / "grey.tiff")[0, :, 0], expected)
    cv2.imwrite(str(tmp_path / "rgb.tiff"), np.dstack([values * 0, values * 0, values]))  # OpenCV writes BGR
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.tiff")[0], [(v, 0, 0) for v in expected])


def test_float_tiff_with_nan_or_unknown_scale(tmp_path):
    for value, reason in ((np.nan, "NaN"), (1e6, "no known scale")):
        cv2.imwrite(str(tmp_path / "bad.tiff"), np.array([[0.5, value]], np.float32))
        with pytest.raises(InputError, match=reason):
            read_image(tmp_path / "bad.tiff")


def test_cmyk(tmp_path):
    inks = np.zeros((16, 32, 4), np.uint8)
    inks[:, 16:] = (0, 255, 255, 0)  # magenta + yellow = red
    PIL.Image.fromarray(inks, "CMYK").save(tmp_path / "a.jpg", quality=100)
    picture = read_image(tmp_path / "a.jpg").astype(int)
    assert abs(picture[8, 4] - WHITE).max() < 4
    assert abs(picture[8, 28] - RED).max() < 4


def test_hdr(tmp_path):
    cv2.imwrite(str(tmp_path / "a.hdr"), np.array([[(0, 0, 4), (0.2140, 0.2140, 0.2140)]], np.float32))
    picture = read_image(tmp_path / "a.hdr").astype(int)
    assert abs(picture - [[RED, (127, 127, 127)]]).max() <= 2  # linear 0.214 is sRGB 0.5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_exif_rotation(tmp_path, dtype):
    stored = PIL.Image.fromarray(np.array([[0, 0, 255, 255]] * 2, dtype) * dtype(np.iinfo(dtype).max // 255))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show the left column on top
    stored.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[..., 0], [[0, 0], [0, 0], [255, 255], [255, 255]])


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animation_gives_its_first_frame_and_a_warning(tmp_path, caplog, name):
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / name)[4, 4], RED)
    assert "2 frames; the first is used" in caplog.text


def test_camera_mpo_is_one_picture(tmp_path, caplog):
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    frames[0].save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.mpo")[4, 4, 0] > 250
    assert not caplog.records


# ------------------------------------------------------------------------------------------ no pictures


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
        (b"\n <HTML>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "video"),
        (b"just text", "no known picture format"),
        (b"\x89PNG\r\n\x1a\nrubbish", "damaged|cannot be decoded"),
        (b"II*\0\xff\xff\xff\x7f", "cannot be decoded"),
        (b"#?RADIANCE\nrubbish", "cannot be decoded"),
    ],
)
def test_files_that_are_no_picture(tmp_path, content, reason):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as error:
        read_image(path, argument="--ip_image")
    assert str(error.value).startswith(f"--ip_image {str(path)!r}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff"])
def test_truncated_file(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    data = save(tmp_path / name, noise).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot be decoded"):
        read_image(tmp_path / name)


def test_missing_folder_and_unreadable_names(tmp_path):
    for source, reason in (
        (tmp_path / "none.jpg", "no such file"),
        (tmp_path, "not a file"),
        ("x" * 300 + ".jpg", "cannot be read"),
        ("nul\0byte.jpg", "cannot be read"),
    ):
        with pytest.raises(InputError, match=reason):
            read_image(source)


@pytest.mark.parametrize("size", [(60_000, 60_000), (13_000, 10_000)])  # above Pillow's own limit, and below it
def test_decompression_bomb_is_refused_by_its_header(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    with pytest.raises(InputError, match="at most 128 (megapixels )?are accepted"):
        read_image(tmp_path / "bomb.png")


def test_bombs_of_the_formats_that_opencv_decodes(tmp_path):
    cv2.imwrite(str(tmp_path / "a.tiff"), np.zeros((4, 4, 3), np.float32))
    data = bytearray((tmp_path / "a.tiff").read_bytes())
    start = int.from_bytes(data[4:8], "little") + 2
    for i in range(12):  # the directory's entries; 256 is the width, 257 the height
        entry = start + 12 * i
        if int.from_bytes(data[entry : entry + 2], "little") in (256, 257):
            data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, 60_000)
    (tmp_path / "a.tiff").write_bytes(data)
    (tmp_path / "a.hdr").write_bytes(b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 60000 +X 60000\n")
    for name in ("a.tiff", "a.hdr"):
        with pytest.raises(InputError, match="60000x60000 is 3600 megapixels"):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "mode"), [("a.png", "RGB"), ("b.png", "RGBA"), ("c.png", "P"), ("d.png", "I;16"), ("e.jpg", "RGB")]
)
def test_what_is_larger_than_of_use_is_scaled_down(tmp_path, monkeypatch, caplog, name, mode):
    monkeypatch.setattr(image_module, "WORK_PIXELS", 100 * 60)
    picture = PIL.Image.new("RGB", (360, 240), (204, 102, 51))  # a colour of the web palette
    picture = PIL.Image.new(mode, picture.size, 40000) if mode == "I;16" else picture.convert(mode)
    picture.save(tmp_path / name)
    pixels = read_image(tmp_path / name)
    assert pixels.shape == (60, 90, 3)
    assert abs(pixels.astype(int) - ([156] * 3 if mode == "I;16" else [204, 102, 51])).max() <= 3
    assert "360x240 is more than is of use here: scaled down by 4" in caplog.text


@pytest.mark.parametrize(("name", "dtype"), [("a.tiff", np.float32), ("b.tiff", np.int32), ("c.hdr", np.float32)])
def test_so_is_what_opencv_decodes(tmp_path, monkeypatch, caplog, name, dtype):
    monkeypatch.setattr(image_module, "WORK_PIXELS", 100 * 60)
    level = 0.5 if dtype is np.float32 else 32768
    cv2.imwrite(str(tmp_path / name), np.full((240, 360, 3), level, dtype))
    pixels = read_image(tmp_path / name)
    assert pixels.shape == (60, 90, 3)
    assert abs(pixels.astype(int) - (188 if name == "c.hdr" else 128)).max() <= 1  # linear 0.5 is sRGB 0.735
    assert "360x240 is more than is of use here: scaled down by 4" in caplog.text


def tiff_32(values) -> bytes:
    """A TIFF of one channel of unsigned 32-bit numbers, (H, W)."""
    height, width = values.shape
    tags = {256: width, 257: height, 258: 32, 259: 1, 262: 1, 273: 0, 277: 1, 278: height, 279: values.nbytes, 339: 1}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the pixels begin
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + values.astype("<u4").tobytes()


@pytest.mark.parametrize(
    ("largest", "shown"), [(200, 200), (40_000, 156), (70_000, None), (2**31 + 5, None), (2**32 - 1, None)]
)
def test_32_bit_tiff_is_scaled_by_what_it_holds_or_refused(tmp_path, largest, shown):
    """Pillow reads 2^31 and more as negative, which was black without a word."""
    (tmp_path / "a.tiff").write_bytes(tiff_32(np.array([[0, largest]], np.uint32)))
    if shown is None:
        with pytest.raises(InputError, match="have no known scale; save it with 8 or 16 bits"):
            read_image(tmp_path / "a.tiff")
    else:
        np.testing.assert_array_equal(read_image(tmp_path / "a.tiff")[0, :, 0], [0, shown])


@pytest.mark.parametrize(("largest", "shown"), [(200, 200), (40_000, 156), (70_000, None), (-5, None)])
def test_32_bit_color_too(tmp_path, largest, shown):
    cv2.imwrite(str(tmp_path / "a.tiff"), np.array([[[0] * 3, [largest] * 3]], np.int32))
    if shown is None:
        with pytest.raises(InputError, match="have no known scale"):
            read_image(tmp_path / "a.tiff")
    else:
        np.testing.assert_array_equal(read_image(tmp_path / "a.tiff"), [[[0] * 3, [shown] * 3]])


def test_what_opencv_cannot_read_is_one_line(tmp_path, capfd):
    cv2.imwrite(str(tmp_path / "a.hdr"), np.full((40, 40, 3), 0.5, np.float32))
    whole = (tmp_path / "a.hdr").read_bytes()
    (tmp_path / "a.hdr").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.hdr").write_bytes(whole.replace(b"rgbe", b"xyze"))
    data = bytearray(tiff_32(np.zeros((4, 4), np.uint32)))
    at = data.index(struct.pack("<HHI", 258, 4, 1)) + 8
    data[at : at + 4] = struct.pack("<I", 24)  # bits a sample
    (tmp_path / "c.tiff").write_bytes(data)
    for name in ("a.hdr", "b.hdr", "c.tiff"):
        with pytest.raises(InputError, match="cannot be decoded"):
            read_image(tmp_path / name)
    assert capfd.readouterr().err == ""


def test_a_photo_is_decoded_once(tmp_path, monkeypatch):
    decoded = []
    decode = image_module._to_rgb
    monkeypatch.setattr(image_module, "_to_rgb", lambda image, name: decoded.append(name) or decode(image, name))
    path = save(tmp_path / "a.png", [[RED, BLUE]])
    read_image(path)[:] = 0  # what one reader does to it is not seen by the next
    np.testing.assert_array_equal(read_image(path), [[RED, BLUE]])
    assert len(decoded) == 1
    save(path, [[BLUE, RED, RED]])
    np.testing.assert_array_equal(read_image(path), [[BLUE, RED, RED]])


def test_a_scaled_down_photo_stays_upright(tmp_path, monkeypatch):
    monkeypatch.setattr(image_module, "WORK_PIXELS", 100 * 60)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (360, 240)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (90, 60, 3)


def test_a_line_is_no_picture(tmp_path):
    PIL.Image.new("RGB", (1, 20_000)).save(tmp_path / "line.png")
    with pytest.raises(InputError, match="1x20000 is a line, no picture"):
        read_image(tmp_path / "line.png")


def test_formats_that_start_programs_are_not_opened(tmp_path):
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="of no known picture format"):
        read_image(tmp_path / "a.eps")


# ------------------------------------------------------------------------------------------ URLs


class Pictures(http.server.BaseHTTPRequestHandler):
    content: dict[str, bytes] = {}
    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/slow.png":
            time.sleep(1)
        body = self.content.get(self.path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may be gone
            self.wfile.write(body or b"<html>not here</html>")

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    png = save(tmp_path / "a.png", [[RED, BLUE]]).read_bytes()
    Pictures.content = {"/a.png": png, "/two%20words.png": png, "/slow.png": png, "/page.jpg": b"<html>hello</html>"}
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    image_module._read.cache_clear()  # a port may come back
    Pictures.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


def test_url(server):
    np.testing.assert_array_equal(read_image(f"{server}/a.png"), [[RED, BLUE]])
    np.testing.assert_array_equal(read_image(f"{server}/two words.png"), [[RED, BLUE]])


def test_url_is_fetched_once_and_a_failure_is_not_kept(server):
    """A photo is looked at by the model and by the face score; an address may give another picture each time."""
    for _ in range(3):
        np.testing.assert_array_equal(read_image(f"{server}/a.png"), [[RED, BLUE]])
    assert Pictures.asked == ["/a.png"]
    with pytest.raises(InputError):
        read_image(f"{server}/later.png")
    Pictures.content["/later.png"] = Pictures.content["/a.png"]
    assert read_image(f"{server}/later.png").shape == (1, 2, 3)


def test_url_that_fails(server, monkeypatch):
    monkeypatch.setattr(image_module, "URL_TIMEOUT", 0.2)
    for url, reason in (
        (f"{server}/none.png", "answered 404"),
        (f"{server}/page.jpg", "web page"),
        (f"{server}/slow.png", "timed out"),
        ("http://127.0.0.1:1/a.png", "refused"),
        ("http://", "cannot be fetched"),
    ):
        with pytest.raises(InputError, match=reason) as error:
            read_image(url, argument="--ip_image")
        assert f"--ip_image {url!r}" in str(error.value)


def test_url_larger_than_the_cap(server, monkeypatch):
    monkeypatch.setattr(image_module, "URL_MAX_BYTES", 10)
    with pytest.raises(InputError, match="larger than"):
        read_image(f"{server}/a.png")


# ------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("channels", [3, 4])
def test_write_png_keeps_every_value(tmp_path, channels):
    picture = np.random.default_rng(0).integers(0, 256, (6, 5, channels), dtype=np.uint8)
    write_png(tmp_path / "new" / "a.png", picture[:, ::-1])
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(tmp_path / "new" / "a.png")), picture[:, ::-1])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_write_png_replaces_only_when_told(tmp_path):
    path = save(tmp_path / "a.png", [[RED]])
    blue = np.array([[BLUE]], np.uint8)
    with pytest.raises(UsageError, match="exists already"):
        write_png(path, blue)
    assert (read_image(path) == RED).all()
    write_png(path, blue, overwrite=True)
    assert (read_image(path) == BLUE).all()


def test_write_png_to_places_that_take_none(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "a.png", tmp_path / ("x" * 300 + ".png")):
        with pytest.raises(UsageError, match="output"):
            write_png(path, np.zeros((2, 2, 3), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_write_png_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_png(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(autouse=True)
def _see_warnings(caplog):
    caplog.set_level(logging.WARNING, logger="selfsame")
