"""The one decode function: what it makes of every kind of picture, and what it refuses before decoding."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import ImageError
from llava.prompt.decoding import ImageLimits, decode_image, read_size

BACKGROUND = (122, 116, 104)


def gradient(width: int = 20, height: int = 12) -> PIL.Image.Image:
    values = np.zeros((height, width, 3), dtype=np.uint8)
    values[..., 0] = np.arange(width) * 10
    values[..., 1] = np.arange(height)[:, None] * 20
    return PIL.Image.fromarray(values)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_path_bytes_picture_and_array_give_the_same_pixels(tmp_path: Path) -> None:
    image = gradient()
    (tmp_path / "a.png").write_bytes(encoded(image))
    expected = np.asarray(image)
    for source in (tmp_path / "a.png", encoded(image), image, expected):
        decoded = decode_image(source)
        assert decoded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(decoded), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_the_five_formats_are_read(kind: str) -> None:
    assert decode_image(encoded(gradient(), kind)).size == (20, 12)
    assert read_size(encoded(gradient(), kind)) == (12, 20)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_give_the_upright_picture(orientation: int) -> None:
    upright = gradient()
    inverse = {
        2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
        3: PIL.Image.Transpose.ROTATE_180,
        4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
        5: PIL.Image.Transpose.TRANSPOSE,
        6: PIL.Image.Transpose.ROTATE_90,
        7: PIL.Image.Transpose.TRANSVERSE,
        8: PIL.Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(upright))
    assert read_size(data) == (12, 20)


def test_alpha_is_laid_on_the_mean_colour() -> None:
    clear = PIL.Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    assert decode_image(encoded(clear)).getpixel((0, 0)) == BACKGROUND
    assert decode_image(encoded(clear), background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)
    half = PIL.Image.new("LA", (3, 2), (200, 128))
    assert decode_image(encoded(half)).getpixel((0, 0)) == pytest.approx((161, 158, 152), abs=1)
    palette = PIL.Image.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert decode_image(encoded(palette)).getpixel((0, 0)) == (10, 20, 30)
    assert decode_image(encoded(palette, "PNG", transparency=1)).getpixel((0, 0)) == BACKGROUND
    keyed = encoded(PIL.Image.new("RGB", (3, 2), (9, 9, 9)), "PNG", transparency=(9, 9, 9))
    assert decode_image(keyed).getpixel((0, 0)) == BACKGROUND


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    for source in (encoded(PIL.Image.fromarray(values)), values, PIL.Image.fromarray(values.astype(np.int32))):
        np.testing.assert_array_equal(np.asarray(decode_image(source))[0, :, 0], [0, 1, 128, 255])


def test_grey_one_bit_and_cmyk_become_rgb() -> None:
    assert decode_image(encoded(PIL.Image.new("L", (3, 2), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert decode_image(encoded(PIL.Image.new("1", (3, 2), 1))).getpixel((0, 0)) == (255, 255, 255)
    cmyk = decode_image(encoded(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)).getpixel((4, 4))
    assert cmyk == pytest.approx((255, 0, 0), abs=8)


def test_an_animation_gives_its_first_frame_at_once() -> None:
    frames = [PIL.Image.new("RGB", (8, 8), (index % 256, index // 256, 7)) for index in range(400)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=1)
    assert decode_image(stream.getvalue()).getpixel((0, 0)) == (0, 0, 7)


def test_float_arrays_and_odd_shapes() -> None:
    np.testing.assert_array_equal(np.asarray(decode_image(np.full((2, 3), 0.5)))[0, 0], [128] * 3)
    assert decode_image(np.zeros((2, 3, 1), np.uint8)).size == (3, 2)
    assert decode_image(np.zeros((2, 3, 4), np.uint8)).getpixel((0, 0)) == BACKGROUND
    for wrong in (
        np.zeros((2, 3, 2), np.uint8),
        np.zeros((2,), np.uint8),
        np.zeros((2, 3), np.int64),
        np.full((2, 2), 2.0),
    ):
        with pytest.raises(ImageError, match="array"):
            decode_image(wrong)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0"))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((60000, 1), "longest side may be 8192"),
        ((8000, 8000), "at most 40000000 pixels"),
        ((8000, 30), "ratio may be 200 to 1"),
        ((13000, 13000), "longest side|more than"),
        ((100000, 100000), "longest side|more than"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_from_the_header(size: tuple[int, int], message: str) -> None:
    for ask in (decode_image, read_size):
        with pytest.raises(ImageError, match=message):
            ask(png_header(*size))


def test_a_file_over_the_byte_limit_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    with path.open("wb") as file:
        file.truncate(30 * 1024 * 1024)
    with pytest.raises(ImageError, match=r"big\.png: 31457280 bytes, over the limit of 20971520"):
        decode_image(path)
    with pytest.raises(ImageError, match="over the limit of 10"):
        decode_image(b"x" * 11, ImageLimits(max_bytes=10))


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "EPS", "TGA", "PDF", "PCX"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(ImageError, match="not a JPEG, PNG, WEBP, GIF or BMP"):
        decode_image(encoded(gradient(), kind))


def test_what_is_no_picture_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    for source, message in (
        (tmp_path / "a.png", r"a\.png: empty"),
        (tmp_path / "b.png", r"b\.png: no such file"),
        (tmp_path, "cannot be read"),
        (b"<svg/>", "picture: not a JPEG"),
        (3, "cannot read a int"),
    ):
        with pytest.raises(ImageError, match=message) as raised:
            decode_image(source)  # type: ignore[arg-type]
        assert "\n" not in str(raised.value)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), data=st.data())
def test_a_damaged_file_gives_a_picture_or_one_clean_line(kind: str, data: st.DataObject) -> None:
    whole = encoded(gradient(), kind)
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        place = data.draw(st.integers(0, len(whole) - 1))
        damaged = whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :]
    try:
        assert decode_image(damaged).mode == "RGB"
    except ImageError as problem:
        assert "0x" not in str(problem) and "\n" not in str(problem)
