import io

import numpy as np
import pytest
import torch
from PIL import Image

from dataloading.reading import UndecodableError
from dataloading.torch_decode import crop_and_resize, find_codec, make_decode


def encode(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pil_pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def pil_view(data, box, size, flip):
    x, y, w, h = box
    crop = Image.fromarray(pil_pixels(data)).crop((x, y, x + w, y + h))
    pixels = np.array(crop.resize((size, size), Image.Resampling.BICUBIC))
    return pixels[:, ::-1] if flip else pixels


@pytest.fixture(params=["torchvision", "nvImageCodec"])
def decode(request):
    codec = None if request.param == "torchvision" else find_codec()
    if codec is None and request.param == "nvImageCodec":
        pytest.skip("nvImageCodec is not installed")
    return make_decode(codec)


CASES = {
    "jpeg": ("RGB", "JPEG", {"quality": 92}),
    "jpeg 4:4:4": ("RGB", "JPEG", {"quality": 92, "subsampling": 0}),
    "jpeg progressive": ("RGB", "JPEG", {"progressive": True}),
    "jpeg grey": ("L", "JPEG", {}),
    "png": ("RGB", "PNG", {}),
    "png palette": ("P", "PNG", {}),
    "png alpha": ("RGBA", "PNG", {}),
    "png grey alpha": ("LA", "PNG", {}),
    "png bits": ("1", "PNG", {}),
    "webp": ("RGB", "WEBP", {"lossless": True}),
    "gif": ("P", "GIF", {}),
    "bmp": ("RGB", "BMP", {}),
    "tiff": ("RGB", "TIFF", {}),
    "jpeg 2000": ("RGB", "JPEG2000", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_pillows(decode, picture, case):
    mode, form, options = CASES[case]
    data = encode(picture(3, 61, 43).convert(mode), form, **options)
    got = decode(data)
    assert got.dtype == torch.uint8 and got.shape == (3, 43, 61)
    assert np.array_equal(got.permute(1, 2, 0).numpy(), pil_pixels(data))


def test_cmyk_is_read_in_colour(decode, picture):
    """Conversions differ between libraries; the image must be visually the same."""
    data = encode(picture(3, 64, 48).convert("CMYK"), "JPEG", quality=95)
    got = decode(data).permute(1, 2, 0).numpy().astype(int)
    assert abs(got - pil_pixels(data)).mean() < 8


def test_orientation_is_not_applied(decode, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture(3, 61, 43), "JPEG", exif=exif)
    assert np.array_equal(decode(data).permute(1, 2, 0).numpy(), pil_pixels(data))


def test_sixteen_bits_are_scaled(decode):
    values = np.linspace(0, 65535, 32 * 24).reshape(24, 32).astype(np.uint16)
    got = decode(encode(Image.fromarray(values), "PNG"))
    assert abs(got[0].numpy().astype(float) - values / 257).max() <= 1


def test_animated_pictures_give_their_first_frame(decode, picture):
    frames = [picture(i, 32, 32) for i in range(3)]
    for form in ("GIF", "WEBP"):
        data = encode(frames[0], form, save_all=True, append_images=frames[1:])
        assert np.array_equal(decode(data).permute(1, 2, 0).numpy(), pil_pixels(data))


@pytest.mark.filterwarnings("ignore:.*EXIF data:UserWarning:PIL")  # Pillow also warns, of TIFF
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_truncated_pictures_are_refused(decode, picture, form):
    data = encode(picture(3, 200, 200), form)
    for cut in (0, 10, len(data) // 2):
        with pytest.raises(UndecodableError):
            decode(data[:cut])


@pytest.mark.parametrize("data", [b"", b"hello, world", b"\0" * 1000, b"\xff\xd8\xff\xc0"])
def test_junk_is_refused(decode, data):
    with pytest.raises(UndecodableError):
        decode(data)


@pytest.mark.parametrize(("size", "flip"), [(48, True), (224, False)])
def test_views_are_pillows_crop_and_bicubic_resize(decode, picture, size, flip):
    """Bounds of the measurement: mean 0.027, 99.9 % within one level, worst 7."""
    for seed, box in enumerate([(0, 0, 160, 120), (13, 7, 101, 90), (100, 60, 30, 40)]):
        data = encode(picture(seed, 160, 120), "JPEG", quality=92)
        (view,) = crop_and_resize(decode(data), box, (size,), flip)
        assert view.shape == (size, size, 3) and view.dtype == np.uint8
        difference = abs(view.astype(int) - pil_view(data, box, size, flip))
        assert difference.mean() <= 0.1
        assert np.quantile(difference, 0.999) <= 1
        assert difference.max() <= 8


def test_both_sizes_come_from_the_same_crop(decode, picture):
    data = encode(picture(1, 160, 120), "JPEG", quality=92)
    box = (13, 7, 101, 90)
    first, second = crop_and_resize(decode(data), box, (64, 56), True)
    for view, size in ((first, 64), (second, 56)):
        assert np.array_equal(view, crop_and_resize(decode(data), box, (size,), True)[0])
        assert abs(view.astype(int) - pil_view(data, box, size, True)).mean() <= 0.1


def test_photographs_agree_with_pillow(decode):
    """Nearly unscaled boxes are the worst case: rounded filter weights, 0.22 levels measured."""
    data = pytest.importorskip("skimage.data")
    for name in ("astronaut", "coffee", "chelsea"):
        encoded = encode(Image.fromarray(getattr(data, name)()), "JPEG", quality=90)
        assert np.array_equal(decode(encoded).permute(1, 2, 0).numpy(), pil_pixels(encoded))
        for box in ((0, 0, 400, 300), (50, 20, 220, 250)):
            for size in (224, 196):
                (view,) = crop_and_resize(decode(encoded), box, (size,), False)
                difference = abs(view.astype(int) - pil_view(encoded, box, size, False))
                assert difference.mean() <= (0.1 if box[2] == 400 else 0.25)
                assert np.quantile(difference, 0.999) <= 1
