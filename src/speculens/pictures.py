"""A picture from wherever it is, as upright RGB of 8 bits; whatever is none is refused in one sentence."""

from __future__ import annotations

import base64
import contextlib
import io
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn, TypeAlias

import numpy as np
import PIL.Image
from PIL import ImageOps, UnidentifiedImageError

from speculens.errors import UserError

Image: TypeAlias = PIL.Image.Image
Source: TypeAlias = str | Path | bytes | Image

MAX_PIXELS = 64 * 2**20  # 8192 x 8192; far above what any processor keeps
MAX_BYTES = 64 * 2**20
TIMEOUT = 20.0  # seconds, for the whole download
# Pillow knows many more. These are pictures people have; the others include PostScript, which runs a program.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF")


def load_image(
    source: Source, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT
) -> Image:
    """The picture as upright RGB: from a path, an http(s) URL, a data URI, "-" (stdin), encoded bytes or a PIL picture.

    Transparency is laid on white, 16-bit values are scaled to 8, of an animation the first frame is taken. `timeout`,
    in seconds, holds for the whole download. Raises UserError, naming the source, for all that is not a picture.
    """
    if isinstance(source, PIL.Image.Image):
        return _to_rgb(lambda: source, "the given image", max_pixels)
    data, name = _read(source, max_bytes, timeout)
    if not data:
        _refuse(name, "it is empty")
    if len(data) > max_bytes:
        _refuse(name, f"it is larger than {max_bytes:,} bytes")
    return _to_rgb(lambda: PIL.Image.open(io.BytesIO(data), formats=_formats()), name, max_pixels)


def _refuse(name: str, why: str, cause: BaseException | None = None) -> NoReturn:
    raise UserError(f"Cannot use {name} as a picture: {why}.") from cause


def _read(source: str | Path | bytes, max_bytes: int, timeout: float) -> tuple[bytes, str]:
    """The encoded bytes (at most one more than `max_bytes`), and a name for the source in messages."""
    if isinstance(source, bytes):
        return source, "the given bytes"
    if isinstance(source, str):
        if source == "-":
            return sys.stdin.buffer.read(max_bytes + 1), "standard input"
        scheme = source[:8].lower()
        if scheme.startswith(("http://", "https://")):
            return _download(source, max_bytes, timeout), _short(source)
        if scheme.startswith("data:"):
            return decode_data_uri(source), _short(source)
    if isinstance(source, (str, Path)):
        return _read_file(source, max_bytes), _short(str(source))
    raise UserError(f"A picture must be a path, a URL, bytes or a PIL image, not {kind_of(source)}.")


def _read_file(path: str | Path, max_bytes: int) -> bytes:
    name = _short(str(path))
    try:
        with Path(path).open("rb") as file:
            return file.read(max_bytes + 1)
    except FileNotFoundError as error:
        _refuse(name, "there is no such file", error)
    except IsADirectoryError as error:
        _refuse(name, "it is a directory", error)
    except PermissionError as error:
        _refuse(name, "you have no permission to read it", error)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        _refuse(name, f"it cannot be read ({_reason(error)})", error)


def decode_data_uri(uri: str) -> bytes:
    """What a data URI holds, base64 or percent-encoded. Raises UserError if it is malformed."""
    header, comma, payload = uri.partition(",")
    if not comma:
        _refuse(_short(uri), "the data URI has no comma before its data")
    try:
        data = urllib.parse.unquote_to_bytes(payload)
        if not header.lower().endswith(";base64"):
            return data
        return base64.b64decode(b"".join(data.split()), validate=True)
    except ValueError as error:  # also of half a character, a lone surrogate
        _refuse(_short(uri), "its data is broken", error)


def _download(url: str, max_bytes: int, timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    headers = {"User-Agent": "speculens", "Accept": "image/*"}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the opener below knows http and https only
    data = bytearray()
    try:
        with _http_only().open(request, timeout=timeout) as response:
            while len(data) <= max_bytes and (chunk := response.read1(65536)):
                data += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError  # noqa: TRY301 - late in the body is as late as in the header
            missing = response.length  # of what was announced, or None
    except TimeoutError as error:
        _refuse(_short(url), f"it did not arrive within {timeout:g} seconds", error)
    except urllib.error.HTTPError as error:
        error.close()
        _refuse(_short(url), f"the server answered {error.code} {_reason(error)}", error)
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):
            _refuse(_short(url), f"it did not arrive within {timeout:g} seconds", error)
        _refuse(_short(url), f"the download failed ({_reason(error)})", error)
    if missing and len(data) <= max_bytes:
        _refuse(_short(url), f"the download broke off {missing:,} bytes before its end")
    return bytes(data)


def _http_only() -> urllib.request.OpenerDirector:
    """The usual opener also follows redirects to ftp; this one knows http and https alone."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _formats() -> list[str]:
    PIL.Image.init()
    return [name for name in FORMATS if name in PIL.Image.OPEN]


def _to_rgb(open_image: Callable[[], Image], name: str, max_pixels: int) -> Image:
    """Open, check the size before decoding, decode, turn upright, convert; every failure becomes one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs are measured here; the rest is about metadata that is not used
            image = open_image()
            pixels = image.width * image.height
            if pixels > max_pixels:
                _refuse(name, f"{image.width} x {image.height} is more than {max_pixels:,} pixels")
            if pixels == 0:
                _refuse(name, f"its size is {image.width} x {image.height}")
            image.load()
            with contextlib.suppress(Exception):  # broken EXIF data must not cost the picture
                image = ImageOps.exif_transpose(image)
            return _flatten(image)
    except UserError:
        raise
    except PIL.Image.DecompressionBombError as error:
        _refuse(name, "it has more pixels than Pillow will decode", error)
    except UnidentifiedImageError as error:
        _refuse(name, f"it is not in a known picture format ({', '.join(_formats())})", error)
    except Exception as error:  # noqa: BLE001 - decoders of broken files raise nearly anything
        _refuse(name, f"it is damaged or cut short ({_reason(error)})", error)


def _flatten(image: Image) -> Image:
    """Any mode to RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bit(image: Image) -> Image:
    """Grey values of 16 or 32 bits, or floats, scaled into 0..255; Pillow's own conversion clips them to white."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(min=0)
    peak = float(values.max())
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    top = next((top for top in ranges if peak <= top), peak)
    return PIL.Image.fromarray((values * (255 / top)).round().astype(np.uint8))


def _short(name: str) -> str:
    """Quoted, and short enough for a message: a data URI may be megabytes long."""
    return repr(name if len(name) <= 120 else f"{name[:80]}...{name[-20:]}")


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
    return text.strip().split("\n")[0] or type(error).__name__


def kind_of(value: object) -> str:
    """What a value is, as a reader of JSON calls it."""
    return "null" if value is None else type(value).__name__
