"""Differentiable rewards of real models, on random checkpoints in the published layouts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reward_checkpoints import save_head, save_image_reward, save_open_clip
from tiny_checkpoints import save_clip
from torch import Tensor
from torch.nn.functional import normalize
from transformers import BertTokenizer, BlipImageProcessor, CLIPImageProcessor, CLIPModel, CLIPProcessor

from fewstep.data.images import to_uint8
from fewstep.errors import UserError
from fewstep.rewards.image_reward import MEAN, STD
from fewstep.rewards.open import open_reward
from fewstep.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, from_processor
from fewstep.rewards.protocol import Reward
from fewstep.rewards.srpo import SRPOReward

PROMPTS = ["a cat", "a red dog"]
#: Pillow rounds to 8 bits after each of its two passes; in pixels.
ROUNDING = 2 / 255


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    save_clip(folder / "clip")
    save_open_clip(folder / "hps")
    save_head(folder / "head.safetensors", 8)
    save_image_reward(folder / "image_reward")
    return folder


def smooth_images(height: int = 64, width: int = 64, count: int = 2) -> Tensor:
    """8-bit images in [0, 1] of smooth shapes and sharp edges."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, height // 4, width // 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    images[:, :, : height // 3, : width // 3] = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1)
    return to_uint8(images).permute(0, 3, 1, 2).float() / 255


def pillow(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.numpy()) for image in to_uint8(images)]


SIZES = [(64, 64), (224, 224), (300, 200), (97, 161)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("size", [28, 112])
def test_preprocessing_is_that_of_clips_processor(height: int, width: int, size: int) -> None:
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    images = smooth_images(height, width)
    expected = processor(images=pillow(images), return_tensors="pt").pixel_values
    found = from_processor(processor.to_dict(), "here")(images)
    difference = float((found - expected).abs().max()) * max(CLIP_STD)
    assert difference < ROUNDING


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_preprocessing_is_that_of_blips_processor(height: int, width: int) -> None:
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    images = smooth_images(height, width)
    expected = processor(images=pillow(images), return_tensors="pt").pixel_values
    found = from_processor(processor.to_dict(), "here")(images)
    difference = float((found - expected).abs().max()) * max(CLIP_STD)
    assert difference < ROUNDING


@pytest.mark.parametrize(("height", "width"), [(64, 64), (300, 200), (96, 160)])
def test_hps_fits_the_longer_side_and_adds_black_bars(height: int, width: int) -> None:
    images, size = smooth_images(height, width), 56
    found = Preprocess(size, size, fit="longest")(images)
    scale = size / max(height, width)
    small = (round(width * scale), round(height * scale))
    for image, one in zip(pillow(images), found, strict=True):
        square = Image.new("RGB", (size, size))
        square.paste(image.resize(small, Image.Resampling.BICUBIC), ((size - small[0]) // 2, (size - small[1]) // 2))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
        mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
        difference = float((one * std + mean - pixels).abs().max())
        assert difference < ROUNDING


def test_preprocessing_has_a_gradient_everywhere() -> None:
    images = (0.25 + 0.5 * smooth_images()).requires_grad_()
    Preprocess(28, 28)(images).square().sum().backward()
    assert bool((images.grad != 0).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 20, "width": 30}}, "not that of a square image"),
        ({"size": {"shortest_edge": 20}, "resample": 0}, None),
        ({"size": {"shortest_edge": 20}, "resample": 1}, "resample 1"),
        ({}, "not that of a square image"),
    ],
)
def test_other_preprocessing_is_refused(settings: dict, message: str | None) -> None:
    if message is None:
        assert from_processor(settings, "here").mode == "bicubic"  # 0 is unset in some files
        return
    with pytest.raises(UserError, match=message):
        from_processor(settings, "here")


def test_clip_and_pickscore_are_transformers_own(checkpoints: Path) -> None:
    images, folder = smooth_images(), checkpoints / "clip"
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=PROMPTS, images=pillow(images), return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal()
        scale = float(model.logit_scale.exp())
    pick, clip = open_reward(f"pickscore:{folder}"), open_reward(f"clip:{folder}")
    torch.testing.assert_close(pick(images, PROMPTS), logits, rtol=0, atol=0.01 * scale)
    torch.testing.assert_close(clip(images, PROMPTS), 100 * logits / scale, rtol=0, atol=1.0)
    assert clip.info.range == (-100.0, 100.0)
    assert clip.info.parameters == sum(4 * p.numel() for p in model.parameters())


@pytest.mark.parametrize("with_config", [True, False])
def test_hps_in_open_clips_layout_is_open_clips(tmp_path: Path, with_config: bool) -> None:
    model = save_open_clip(tmp_path, with_config)
    reward, images = open_reward(f"hpsv2:{tmp_path}"), smooth_images()
    mean, std = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]) if with_config else (CLIP_MEAN, CLIP_STD)
    pixels = Preprocess(28, 28, mean, std)(images)
    ids = torch.tensor([[0, *(28 + ord(c) - 97 for c in prompt.replace(" ", "")), 1] for prompt in ("a", "b")])
    expected = normalize(model.encode_image(pixels), dim=-1) * normalize(model.encode_text(ids, 1), dim=-1)
    torch.testing.assert_close(reward(images, ["a", "b"]), expected.sum(1), rtol=0, atol=1e-5)
    assert reward.info.range == (-1.0, 1.0)


def test_aesthetic_is_a_chain_of_linear_layers_on_the_unit_embedding(checkpoints: Path) -> None:
    head = save_head(checkpoints / "other.safetensors", 8)
    images, folder = smooth_images(), checkpoints / "clip"
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        pixels = from_processor(CLIPImageProcessor.from_pretrained(folder).to_dict(), "here")(images)
        x = normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)
    for number in (0, 2, 4):
        x = x @ head[f"layers.{number}.weight"].T + head[f"layers.{number}.bias"]
    reward = open_reward(f"aesthetic:{folder}+{checkpoints / 'other.safetensors'}")
    torch.testing.assert_close(reward(images, PROMPTS), x[:, 0], rtol=1e-4, atol=1e-4)


def test_image_reward_is_that_of_the_original_layout(tmp_path: Path) -> None:
    vision, text, head = save_image_reward(tmp_path)
    images = smooth_images()
    seen = vision(Preprocess(32, 32)(images))
    tokens = BertTokenizer.from_pretrained(tmp_path)(PROMPTS, padding=True, return_tensors="pt")
    x = text(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
    ).last_hidden_state[:, 0]
    for number in (0, 2, 4):
        x = x @ head[f"layers.{number}.weight"].T + head[f"layers.{number}.bias"]
    reward = open_reward(f"imagereward:{tmp_path}")
    torch.testing.assert_close(reward(images, PROMPTS), (x[:, 0] - MEAN) / STD, rtol=1e-4, atol=1e-4)


def every_reward(checkpoints: Path) -> list[str]:
    return [
        f"clip:{checkpoints / 'clip'}",
        f"pickscore:{checkpoints / 'clip'}",
        f"hpsv2:{checkpoints / 'clip'}",
        f"hpsv2:{checkpoints / 'hps'}",
        f"imagereward:{checkpoints / 'image_reward'}",
        f"aesthetic:{checkpoints / 'clip'}+{checkpoints / 'head.safetensors'}",
        f"srpo:hpsv2:{checkpoints / 'hps'}",
    ]


@pytest.mark.parametrize("index", range(7))
def test_gradient_is_that_of_finite_differences(checkpoints: Path, index: int) -> None:
    reward: Reward = open_reward(every_reward(checkpoints)[index])
    images = (0.25 + 0.5 * smooth_images(32, 32)).requires_grad_()
    scores = reward(images, PROMPTS)
    assert scores.shape == (2,)
    assert scores.dtype == torch.float32
    assert reward.info.differentiable
    (gradient,) = torch.autograd.grad(scores[0], images)
    assert float(gradient[1].abs().max()) == 0  # of the other image
    # along the gradient the change is largest, and above the rounding of fp32
    step = 0.05 * gradient / gradient.norm()
    with torch.no_grad():
        change = reward(images + step, PROMPTS)[0] - reward(images - step, PROMPTS)[0]
    assert float(change) == pytest.approx(2 * 0.05 * float(gradient.norm()), rel=0.1)


@pytest.mark.parametrize("index", range(7))
def test_on_the_meta_device_rewards_have_shapes_and_no_weights(checkpoints: Path, index: int) -> None:
    reward = open_reward(every_reward(checkpoints)[index], "meta")
    images = torch.empty(2, 3, 48, 48, device="meta", requires_grad=True)
    scores = reward(images, PROMPTS)
    assert scores.is_meta
    assert scores.shape == (2,)
    scores.sum().backward()
    assert images.grad is not None
    assert reward.info.parameters == open_reward(every_reward(checkpoints)[index]).info.parameters


def test_srpo_is_the_difference_of_good_and_bad_words(checkpoints: Path) -> None:
    folder, images = checkpoints / "clip", smooth_images()
    clip = open_reward(f"clip:{folder}")
    better = clip(images, ["Realistic photo, a cat", "Realistic photo, a red dog"])
    worse = clip(images, ["CG render, a cat", "CG render, a red dog"])
    form = open_reward(f"srpo:clip:{folder}")
    torch.testing.assert_close(form(images, PROMPTS), 1.1 * better - worse)
    assert form.info.range == pytest.approx((-210.0, 210.0))
    own = open_reward(f"srpo:sharp|flat, dull:clip:{folder}")
    assert isinstance(own, SRPOReward)
    assert (own.positive, own.negative) == ("sharp, ", "flat, dull, ")
    with pytest.raises(UserError, match="write srpo:REWARD"):
        open_reward("srpo:sharp|:clip:x")


def test_wrong_checkpoints_are_one_line(checkpoints: Path, tmp_path: Path) -> None:
    for name in ("pickled", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "pickled" / "ImageReward.pt").write_bytes(b"x")
    BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}).save_pretrained(
        tmp_path / "pickled"
    )
    clip, head = checkpoints / "clip", checkpoints / "head.safetensors"
    save_head(tmp_path / "wide.safetensors", 9)
    for spec, message in (
        ("clip", "give a checkpoint, as in clip:PATH_OR_HUB_ID"),
        ("clip:./nowhere", "./nowhere: no such folder"),
        (
            f"clip:{tmp_path / 'empty'}",
            "no CLIP model in transformers' or open_clip's layout: there is no safetensors file",
        ),
        (f"imagereward:{tmp_path / 'pickled'}", "ImageReward.pt is a pickle"),
        (f"imagereward:{clip}", "BertTokenizer|no ImageReward"),
        (f"aesthetic:{clip}", r"give CLIP L/14 and the head's file"),
        (f"aesthetic:{clip}+nowhere.safetensors", "nowhere.safetensors: no such file"),
        (f"aesthetic:{clip}+{tmp_path / 'wide.safetensors'}", "takes embeddings of 9 numbers, and .* gives 8"),
        (f"aesthetic:{clip}+{clip / 'model.safetensors'}", "no head of linear layers"),
        (f"aesthetic:{clip}+{clip / 'config.json'}", "a .pth file is a pickle"),
    ):
        with pytest.raises(UserError, match=message):
            open_reward(spec)
    assert head.is_file()
