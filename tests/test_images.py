"""Pictures of every kind go in upright and RGB, or one sentence says why not; ids and pixels go round."""
import io

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from common.pictures import open_image
from common.weights import UserError
from model import Libra
from tokenizer import MEAN_COLOUR, ImageTokenizer, prepare, to_picture, to_rgb
from train_tokenizer import vq_loss


def saved(image, ending, **options):
    file = io.BytesIO()
    image.save(file, ending, **options)
    file.seek(0)
    return file


def half_red():
    """Left half red, right half blue, 40 x 20"""
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    return image


def colour(image, x, y):
    return tuple(round(v / 32) for v in image.getpixel((x, y)))


def test_odd_pictures():
    red, blue, white, grey = (8, 0, 0), (0, 0, 8), (8, 8, 8), (4, 4, 4)
    assert colour(open_image(saved(half_red().convert("P"), "PNG")), 5, 5) == red
    assert colour(open_image(saved(half_red().convert("CMYK"), "JPEG", quality=95)), 5, 5) == red
    glass = half_red().convert("RGBA")
    glass.paste((0, 0, 0, 0), (0, 0, 20, 20))
    shown = open_image(saved(glass, "PNG"))
    assert colour(shown, 5, 5) == white and colour(shown, 35, 5) == blue
    assert colour(open_image(saved(glass.convert("LA"), "PNG")), 5, 5) == white
    deep = Image.fromarray(np.full((20, 40), 32768, dtype=np.uint16))
    assert colour(open_image(saved(deep, "PNG")), 5, 5) == grey
    assert colour(open_image(Image.new("1", (9, 9), 1)), 5, 5) == white
    assert colour(open_image(saved(Image.fromarray(np.full((20, 40), 255, np.uint16)), "PNG")), 5, 5) == (0, 0, 0)
    assert colour(open_image(Image.new("I", (9, 9), 32768)), 5, 5) == grey
    assert colour(open_image(Image.new("F", (9, 9), 0.5)), 5, 5) == grey
    assert colour(open_image(Image.new("F", (9, 9), 1.01)), 5, 5) == white                    # resampled a bit too far
    levels = Image.fromarray(np.linspace(0, 255, 81, dtype=np.float32).reshape(9, 9))
    assert colour(open_image(levels), 4, 4) == grey and colour(open_image(levels), 8, 8) == white
    exif = Image.Exif()
    exif[274] = 3                                         # upside down
    assert colour(open_image(saved(half_red(), "JPEG", exif=exif, quality=95)), 5, 5) == blue
    exif[274] = 6
    assert open_image(saved(half_red(), "JPEG", exif=exif)).size == (20, 40)


def test_broken_exif_does_not_cost_the_picture():
    text_as_rotation = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0"
    assert open_image(saved(half_red(), "JPEG", exif=text_as_rotation)).size == (40, 20)


def test_sizes_from_a_point_to_a_strip():
    for size in ((1, 1), (20000, 10), (10, 20000), (3, 500), (57, 56)):
        for square in (True, False):
            pixels = prepare(Image.new("RGB", size, "red"), 56, square)
            assert pixels.shape == (3, 56, 56) and torch.isfinite(pixels).all()
            centre = (to_rgb(pixels)[:, 28, 28] + 1) / 2
            assert square or torch.allclose(centre, torch.tensor([1.0, 0.0, 0.0]), atol=0.01)


def test_padding_keeps_all_and_has_the_mean_colour():
    rgb = ((to_rgb(prepare(half_red(), 40)) + 1) * 127.5).round()
    assert rgb[:, 2, 20].tolist() == list(MEAN_COLOUR) == [122, 116, 104]
    assert rgb[:, 20, 2].tolist() == [255, 0, 0] and rgb[:, 20, 37].tolist() == [0, 0, 255]
    cropped = ((to_rgb(prepare(half_red(), 40, square=False)) + 1) * 127.5).round()
    assert cropped[:, 2, 2].tolist() == [255, 0, 0] and cropped[:, 37, 37].tolist() == [0, 0, 255]


def test_what_is_no_picture_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "text.jpg").write_text("hello")
    whole = saved(half_red(), "PNG").getvalue()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    for name in ("gone.jpg", "text.jpg", "cut.png"):
        with pytest.raises(UserError, match=name):
            open_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(UserError, match="800 pixels|40 x 20 pixels, at most 300"):
        open_image(saved(half_red(), "PNG"))


def test_ids_and_pixels_go_round(tmp_path):
    tokenizer = tiny.image_tokenizer()
    pixels = torch.stack([prepare(half_red(), 32), torch.randn(3, 32, 32)])
    ids, signal = tokenizer.encode(pixels)
    assert ids.shape == (2, 16, 2) and ids.dtype == torch.long and ids.min() >= 0 and ids.max() < 16
    assert signal.shape == (2, 16, 64)
    quantized, grid_ids, projected = tokenizer.quantized(signal)
    assert torch.equal(grid_ids.flatten(1, 2), ids)
    assert torch.equal(tokenizer.quantize.signs(ids), torch.where(projected > 0, 1.0, -1.0).flatten(1, 2))
    expected = tokenizer.decoder(tokenizer.post_quant_conv(quantized))
    drawn = tokenizer.decode(ids)
    assert drawn.shape == (2, 3, 32, 32) and (drawn - expected).abs().max() < 1e-5
    assert to_picture(drawn[0]).size == (32, 32)
    with pytest.raises(AssertionError, match="no codes"):
        tokenizer.decode(ids + 10)
    tokenizer.save_pretrained(tmp_path)
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.encode(pixels), (ids, signal)))
    assert not any(p.requires_grad for p in again.parameters())


def test_ids_do_not_depend_on_the_precision(tmp_path):
    """Training has autocast and a float32 tokenizer, inference a model in bfloat16: the ids must be the same."""
    tiny.whole(tmp_path).save_pretrained(tmp_path)
    pixels = torch.randn(8, 3, 32, 32)
    models = [Libra.from_pretrained(tmp_path, dtype=dtype) for dtype in (None, torch.bfloat16)]
    expected = models[0].tokenizers.image.encode(pixels)
    for model in models:
        images = model.tokenizers.image
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                assert all(torch.equal(a, b) for a, b in zip(images.encode(pixels), expected))
                assert torch.equal(images.quantized(images.signal(pixels))[1].flatten(1, 2), expected[0])
                assert images.decode(expected[0]).shape == (8, 3, 32, 32)
    models[1].save_pretrained(tmp_path / "half")
    assert torch.equal(ImageTokenizer.from_pretrained(tmp_path / "half").encode(pixels)[0], expected[0])


@pytest.fixture
def tf32():
    """-> the switches of TF32, all on"""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = True
    yield switches
    for switch, allowed in zip(switches, before):
        switch.allow_tf32 = allowed


def test_ids_are_made_without_tf32(tf32):
    """in which a GPU's convolutions, and where it is allowed its products, keep ten bits; elsewhere it stays allowed"""
    seen = []
    for encoder in ("clip", "scratch"):
        tokenizer = tiny.image_tokenizer(encoder=encoder)
        first = tokenizer.encoder.conv_in if encoder == "scratch" else tokenizer.clip.embeddings.patch_embedding
        for module in (first, tokenizer.quant_conv, tokenizer.quantize):
            module.register_forward_hook(lambda *_: seen.append([switch.allow_tf32 for switch in tf32]))
        tokenizer.encode(torch.randn(1, 3, 32, 32))
        assert all(switch.allow_tf32 for switch in tf32)
    assert seen == [[False, False]] * 6


def test_a_learned_table_takes_the_nearest_vector(tmp_path):
    """--quantizer vq, the baseline of Fig. 2: nearest by brute force, gradients pass straight through"""
    torch.manual_seed(0)
    tokenizer = tiny.image_tokenizer(quantizer="vq").requires_grad_(True)
    torch.nn.init.normal_(tokenizer.quantize.tables)
    x = torch.randn(2, 32, 4, 4, requires_grad=True)
    quantized, ids, projected = tokenizer.quantize(x)
    for k, table in enumerate(tokenizer.quantize.tables):
        parts = x.permute(0, 2, 3, 1)[..., 16 * k:16 * (k + 1)]
        assert torch.equal(ids[..., k], (parts[..., None, :] - table).norm(dim=-1).argmin(-1))
        assert torch.allclose(quantized[:, 16 * k:16 * (k + 1)].permute(0, 2, 3, 1), table[ids[..., k]], atol=1e-5)
    loss = vq_loss(projected, tokenizer.quantize.vectors(ids))
    (quantized.sum() + loss["loss"]).backward()
    pull = 2 * 0.25 * (projected - tokenizer.quantize.vectors(ids)).permute(0, 3, 1, 2) / x.numel()
    assert torch.allclose(x.grad, 1 + pull.detach(), atol=1e-6) and tokenizer.quantize.tables.grad.abs().sum() > 0
    tokenizer.save_pretrained(tmp_path)
    again, pixels = ImageTokenizer.from_pretrained(tmp_path), torch.randn(1, 3, 32, 32)
    assert torch.equal(again.decode(again.encode(pixels)[0]), tokenizer.decode(tokenizer.encode(pixels)[0]))


def test_only_picture_formats_are_opened(tmp_path, monkeypatch):
    """PostScript would start Ghostscript; a file of few bytes must not become gigabytes."""
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    with pytest.raises(UserError, match="eps.jpg: cannot be read as a picture"):
        open_image(tmp_path / "eps.jpg")
    large = saved(Image.new("1", (10_000, 10_000)), "PNG")
    with pytest.raises(UserError, match="10000 x 10000 pixels, at most 89,478,485 are read"):
        open_image(large)
