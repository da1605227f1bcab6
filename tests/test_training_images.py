"""Every kind of image file as upright 8-bit RGB; what cannot be opened has a reason."""

import numpy as np
import pytest
from pictures import jpeg, picture, pixels
from PIL import Image, ImageCms

from fewstep.data.training_set.opening import Unreadable, open_rgb


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """By the definition of each of the eight values."""
    upright = picture()
    turned = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned.save(tmp_path / "a.png", exif=exif)
    before = (tmp_path / "a.png").read_bytes()
    assert np.array_equal(pixels(open_rgb(tmp_path / "a.png")), pixels(upright))
    assert (tmp_path / "a.png").read_bytes() == before


def test_alpha_is_flattened_onto_white(tmp_path):
    own = Image.new("RGBA", (40, 40), (200, 0, 0, 255))
    own.paste((0, 0, 200, 0), (0, 0, 20, 40))
    own.paste((0, 0, 200, 128), (20, 20, 40, 40))
    own.save(tmp_path / "a.png")
    found = pixels(open_rgb(tmp_path / "a.png"))
    assert found[5, 5].tolist() == [255, 255, 255]
    assert found[5, 30].tolist() == [200, 0, 0]
    assert np.abs(found[30, 30] - [127, 127, 227]).max() <= 2
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 255, 0, 255, 0, 0])
    palette.save(tmp_path / "b.png", transparency=1)
    assert pixels(open_rgb(tmp_path / "b.png"))[0, 0].tolist() == [255, 255, 255]


def test_cmyk_16_bit_gray_and_one_bit(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    red = pixels(open_rgb(tmp_path / "red.jpg"))[8, 8]
    assert red[0] > 230
    assert red[1:].max() < 40
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for name in ("wide.png", "wide.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        found = pixels(open_rgb(tmp_path / name))
        assert np.abs(found[:, :, 0] - ramp / 257).max() <= 1
    Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)).save(tmp_path / "int.tif")
    assert pixels(open_rgb(tmp_path / "int.tif"))[15, 15].tolist() == [255, 255, 255]
    Image.new("1", (16, 16), 1).save(tmp_path / "one.png")
    assert pixels(open_rgb(tmp_path / "one.png")).min() == 255


def test_color_profiles_are_converted_to_srgb(tmp_path):
    """The middle gray of linear light, sRGB's profile with a gamma of 1 in place of 2.4, is brighter in sRGB."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    linear = srgb.replace(bytes.fromhex("00026666"), bytes.fromhex("00010000"))
    Image.new("RGB", (8, 8), (128, 128, 128)).save(tmp_path / "linear.png", icc_profile=linear)
    assert pixels(open_rgb(tmp_path / "linear.png"))[4, 4].min() > 180
    picture().save(tmp_path / "srgb.png", icc_profile=srgb)
    assert np.abs(pixels(open_rgb(tmp_path / "srgb.png")) - pixels(picture())).max() <= 1
    picture().save(tmp_path / "broken.png", icc_profile=b"no profile at all")
    assert np.array_equal(pixels(open_rgb(tmp_path / "broken.png")), pixels(picture()))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jpg", jpeg(picture())[:900], "damaged"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(50), "damaged|no image"),
        ("a.webp", b"<html>not found</html>", "no image"),
        ("a.heic", b"\x00\x00\x00\x18ftypheic" + bytes(50), "no image"),
        ("a.jpg", b"", "no image"),
    ],
)
def test_what_cannot_be_opened_has_a_reason(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Unreadable, match=reason):
        open_rgb(tmp_path / name)


def test_floating_point_and_huge_images_are_refused(tmp_path, monkeypatch):
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(Unreadable, match="floating point"):
        open_rgb(tmp_path / "a.tif")
    picture().save(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Unreadable, match="more than 2,000 pixels"):
        open_rgb(tmp_path / "b.png")
