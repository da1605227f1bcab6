"""Prior preservation: the model's own images of other prompts beside the training set."""

import pytest
import torch
from lora_cli import succeed
from lora_training import CPU, few_step, image_set, run_lora
from safetensors.torch import load_file

from fewstep.core.seeds import derive_seed
from fewstep.data.training_set.batches import alternating_batches, example_batches
from fewstep.data.training_set.encoded import Example
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import load

__all__ = ["few_step", "image_set"]  # fixtures


def examples(names, size):
    return [Example(torch.zeros(4, size, size), torch.zeros(3, 5), name) for name in names]


def test_batches_alternate_and_none_is_left_out():
    null = torch.zeros(2, 5)
    images = example_batches(examples("abcdef", 8), null, 2, seed=1, dropout=0, device=CPU)
    own = example_batches(examples("xyz", 4), null, 2, seed=1, dropout=0, device=CPU)  # of another size
    source = alternating_batches(images, own, 0.25)
    texts = [source(position).texts for position in range(24)]
    kept = [all(text in "xyz" for text in batch) for batch in texts]
    assert kept == [False, False, False, True] * 6
    assert [batch for batch, is_own in zip(texts, kept, strict=True) if not is_own] == [
        images(position).texts for position in range(18)
    ]
    assert texts[7] == own(1).texts


@pytest.mark.parametrize("kind", ["few-step", "multi-step"])
def test_preserved_images_are_the_models_own_without_any_lora(kind, few_step, tiny_folder, image_set, tmp_path):
    """Those of the model before training, by its own steps and guidance, whatever the LoRA starts from."""
    (tmp_path / "prompts.txt").write_text("a fox\n")
    model = few_step if kind == "few-step" else tiny_folder
    more = [f"model={model}", f"data.images={image_set}", "train.save_every=2", "optim.lora.lr=0.02"]
    first = run_lora(tmp_path / "first", *more, "train.steps=2")
    more += [f"data.preservation={{prompts: {tmp_path / 'prompts.txt'}, count: 2}}", f"adapter.init={first}"]
    whole = run_lora(tmp_path / "whole", *more, "train.steps=4")
    (file,) = (tmp_path / "whole" / "cache").glob("own-images-*.safetensors")
    latents = torch.stack(list(load_file(file).values()))
    plain = load(model, CPU)
    seeds = tuple(derive_seed("own image", 0, index) for index in range(2))
    expected = generate(plain, ["a fox"] * 2, SamplingParams(seeds=seeds)).images
    assert ((plain.decode(latents).permute(0, 2, 3, 1) * 255).round() - expected).abs().max() <= 1

    run_lora(tmp_path / "parts", *more, "train.steps=2")
    again = run_lora(tmp_path / "parts", *more, "train.steps=4")
    one, other = load_file(whole), load_file(again)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert "5 images and 2 of its own images" in succeed("lora", "info", whole, "--model", model).stdout
