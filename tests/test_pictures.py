from __future__ import annotations

import base64
import contextlib
import io
import struct
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from speculens.errors import UserError
from speculens.pictures import load_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def picture(colour=RED, size=(6, 4), mode="RGB"):
    return Image.new(mode, size, colour)


def encoded(image=None, kind="PNG", **options: object):
    buffer = io.BytesIO()
    (image or picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(source, at=(0, 0), **options: object):
    return load_image(source, **options).getpixel(at)


def png(width, height, data=b"\0", bit_depth=8, colour_type=0):
    """A PNG written by hand, so that its header can lie."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# --- where a picture may come from


def test_a_path_bytes_a_data_uri_stdin_and_a_pil_image_are_the_same_picture(tmp_path, monkeypatch):
    data = encoded()
    path = tmp_path / "red.png"
    path.write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = [path, str(path), data, uri, uri.replace("+", "%2B").replace("/", "%2F"), "-", picture()]
    for source in sources:
        image = load_image(source)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (6, 4), RED)


def test_the_given_pil_image_is_not_changed():
    given = picture((255, 0, 0, 0), mode="RGBA")
    assert pixel(given) == WHITE
    assert given.mode == "RGBA"


# --- what is no picture

NASTY = {
    "empty": (b"", "it is empty"),
    "text": (b"hello, I am a text", "not in a known picture format"),
    "script": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not in a known picture format"),
    "cut header": (encoded()[:20], "not in a known picture format|damaged or cut short"),
    "cut png": (encoded(picture(size=(64, 64)))[:-30], "damaged or cut short"),
    "cut jpeg": (encoded(picture(size=(64, 64)), "JPEG")[:-40], "damaged or cut short"),
    "too few rows": (png(8, 8), "damaged or cut short"),
    "bad pixels": (encoded(picture(size=(64, 64))).replace(b"IDATx", b"IDATy"), "damaged or cut short|not in a known"),
    "zero size": (png(0, 5), "its size is 0 x 5|damaged or cut short|not in a known picture format"),
    "bomb": (png(30_000, 30_000), "more pixels than Pillow|more than"),
    "large": (png(10_000, 9_000), "10000 x 9000 is more than 67,108,864 pixels"),
}


@pytest.mark.parametrize(("data", "why"), NASTY.values(), ids=NASTY)
def test_a_bad_file_is_refused_in_one_sentence_that_names_it(tmp_path, data, why):
    path = tmp_path / "nasty.png"
    path.write_bytes(data)
    with pytest.raises(UserError, match=why) as caught:
        load_image(path)
    message = str(caught.value)
    assert "nasty.png" in message
    assert "\n" not in message
    with pytest.raises(UserError, match="the given bytes"):
        load_image(data)


def test_paths_that_lead_nowhere(tmp_path):
    for path, why in [
        (tmp_path / "gone.png", "there is no such file"),
        (tmp_path, "it is a directory"),
        (tmp_path / "a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("", "a directory|no such file"),
    ]:
        with pytest.raises(UserError, match=why) as caught:
            load_image(path)
        assert len(str(caught.value)) < 300


def test_a_file_without_permission(tmp_path, monkeypatch):
    def refuse(*_args: object):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so a real mode would not do
    with pytest.raises(UserError, match="no permission to read"):
        load_image(tmp_path / "secret.png")


@pytest.mark.parametrize("source", [None, 3, ["a.png"], {"path": "a.png"}])
def test_what_is_no_source_at_all(source):
    with pytest.raises(UserError, match="must be a path, a URL, bytes or a PIL image"):
        load_image(source)


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,@@@", "its data is broken"),
        ("data:image/png;base64,iVBO", "not in a known"),
        ("data:,\ud800", "its data is broken"),
        ("data:image/png;base64,\ud800", "its data is broken"),
    ],
)
def test_broken_data_uris(uri, why):
    with pytest.raises(UserError, match=why):
        load_image(uri)


def test_empty_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(UserError, match="standard input as a picture: it is empty"):
        load_image("-")


def test_limits_are_arguments_and_pillows_own_stay_as_they_are():
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match="6 x 4 is more than 23 pixels"):
        load_image(encoded(), max_pixels=23)
    with pytest.raises(UserError, match="6 x 4 is more than 23 pixels"):
        load_image(picture(), max_pixels=23)
    with pytest.raises(UserError, match="larger than 10 bytes"):
        load_image(encoded(), max_bytes=10)
    assert pixel(encoded(), max_pixels=24) == RED
    assert before == Image.MAX_IMAGE_PIXELS


def test_above_pillows_warning_a_larger_limit_holds(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # it would warn above 20 and fail above 40
    assert load_image(encoded()).size == (6, 4)
    with pytest.raises(UserError, match="more pixels than Pillow will decode"):
        load_image(encoded(picture(size=(9, 9))))


def test_a_zero_size_pil_image():
    with pytest.raises(UserError, match="its size is 0 x 3"):
        load_image(Image.new("RGB", (0, 3)))


# --- every kind of picture becomes upright RGB


def test_cmyk():
    assert pixel(encoded(picture((0, 255, 255, 0), mode="CMYK"), "TIFF")) == RED
    red, green, blue = pixel(encoded(picture((0, 255, 255, 0), (16, 16), "CMYK"), "JPEG"))
    assert red > 200
    assert max(green, blue) < 60


def test_greyscale_and_one_bit():
    assert pixel(encoded(picture(100, mode="L"))) == (100, 100, 100)
    assert pixel(encoded(picture(1, mode="1"))) == WHITE


def test_transparency_is_laid_on_white():
    assert pixel(encoded(picture((255, 0, 0, 0), mode="RGBA"))) == WHITE
    assert pixel(encoded(picture((0, 0), mode="LA"))) == WHITE
    half = pixel(encoded(picture((255, 0, 0, 128), mode="RGBA")))
    assert half[0] == 255
    assert 120 < half[1] < 135
    palette = picture(RED).convert("P")
    index = palette.getpixel((0, 0))
    assert pixel(encoded(palette, transparency=index)) == WHITE
    assert pixel(encoded(palette, "GIF", transparency=index)) == WHITE
    assert pixel(encoded(palette)) == RED
    assert pixel(encoded(picture(RED), transparency=RED)) == WHITE  # a colour declared transparent


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = load_image(encoded(Image.fromarray(values), kind))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_wide_integers_and_floats_are_scaled():
    def greys(values):
        image = load_image(Image.fromarray(values))
        return [image.getpixel((x, 0))[0] for x in range(values.shape[1])]

    assert greys(np.array([[-5, 0, 32896, 65535]], dtype=np.int32)) == [0, 0, 128, 255]
    assert greys(np.array([[0, 2**30]], dtype=np.int32)) == [0, 255]
    assert greys(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)) == [0, 128, 255]
    assert greys(np.array([[0.0, 128.0, 255.0]], dtype=np.float32)) == [0, 128, 255]
    assert greys(np.array([[np.nan, 0.0]], dtype=np.float32)) == [0, 0]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame(kind):
    data = encoded(picture(RED), kind, save_all=True, append_images=[picture(BLUE)])
    red, _green, blue = pixel(data)
    assert red > 200
    assert blue < 60


def test_exif_rotation_is_applied():
    image = picture(BLUE, (6, 4))
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    upright = load_image(encoded(image, exif=exif))
    assert upright.size == (4, 6)
    assert upright.getpixel((3, 0)) == RED
    image.getexif()[0x0112] = 6
    assert load_image(image).size == (4, 6)


def test_broken_exif_does_not_cost_the_picture():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert load_image(data).size == (6, 4)


# --- pictures from the web


class Site(BaseHTTPRequestHandler):
    """A server that does what is asked for in the path."""

    def do_GET(self):
        what = self.path.strip("/")
        if what == "missing":
            self.send_error(404)
        elif what in {"loop", "ftp"}:
            self.send_response(302)
            self.send_header("Location", "/loop" if what == "loop" else "ftp://127.0.0.1/cat.png")
            self.end_headers()
        else:
            body = {"page": b"<html>", "empty": b""}.get(what, encoded())
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + (what == "cut")))
            self.end_headers()
            if what == "slow":
                with contextlib.suppress(ConnectionError):  # the client leaves before the end
                    for byte in body:
                        time.sleep(0.05)
                        self.wfile.write(bytes([byte]))
            else:
                self.wfile.write(body[: -20 if what == "cut" else None])

    def log_message(self, *_args: object):
        pass


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_picture_from_the_web(site):
    assert pixel(f"{site}/red.png") == RED


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("missing", "the server answered 404 Not Found"),
        ("loop", "the server answered 302"),
        ("ftp", "unknown url type: ftp"),
        ("page", "not in a known picture format"),
        ("empty", "it is empty"),
        ("cut", "the download broke off 21 bytes before its end"),
    ],
)
def test_a_web_page_that_is_no_picture(site, what, why):
    with pytest.raises(UserError, match=why) as caught:
        load_image(f"{site}/{what}")
    assert f"{site}/{what}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_web_has_limits(site):
    with pytest.raises(UserError, match=r"did not arrive within 0\.1 seconds"):
        load_image(f"{site}/slow", timeout=0.1)
    with pytest.raises(UserError, match="larger than 10 bytes"):
        load_image(f"{site}/red.png", max_bytes=10)


def test_no_server(site):
    with pytest.raises(UserError, match="the download failed"):
        load_image("http://127.0.0.1:1/cat.png", timeout=1)
    with pytest.raises(UserError, match="the download failed"):
        load_image("http://", timeout=1)
    assert pixel(f"{site}/red.png") == RED
