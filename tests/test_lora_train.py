"""LoRA training: exact resume, files that this project and diffusers load, training adapters, Decoupled-DMD."""

import json

import pytest
import torch
from diffusers import ZImagePipeline
from lora_cli import succeed
from lora_training import CPU, SHORT, few_step, image_set, run_lora
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from fewstep.config.load import load_recipe
from fewstep.data.training_set.encoded import encode_set
from fewstep.data.training_set.reading import read_training_set
from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.lora_job import open_lora_inputs
from fewstep.methods.lora.models_setup import build_lora_models, frozen_dtype
from fewstep.models.adapters import is_adapter_key
from fewstep.models.lora.bind import read_lora
from fewstep.models.lora.targets import targets_of
from fewstep.models.lora.weights import LowRank
from fewstep.models.pipeline import load

__all__ = ["few_step", "image_set"]  # fixtures

ONE = SamplingParams(seed=5)


def images_of(model, prompt="a picture of 1"):
    return generate(model, [prompt], ONE).images[0]


def by_diffusers(folder, file):
    """The image of diffusers' pipeline with a LoRA file."""
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="one")
    image = pipeline(
        "a picture of 1", height=64, width=64, num_inference_steps=2, guidance_scale=0.0,
        generator=torch.Generator("cpu").manual_seed(5), output_type="pt",
    ).images[0]  # fmt: skip
    return (image.permute(1, 2, 0) * 255).round()


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow), "lokr"])
def test_a_run_resumes_exactly_and_its_file_opens_everywhere(kind, few_step, image_set, tmp_path):
    more = [
        f"model={few_step}",
        f"data.images={image_set}",
        f"adapter.kind={kind}",
        "models.gradient_checkpointing=true",
    ]
    whole = run_lora(tmp_path / "whole", *more, "train.steps=5")
    run_lora(tmp_path / "parts", *more, "train.steps=3")
    parts = run_lora(tmp_path / "parts", *more, "train.steps=5")
    tensors, others = load_file(whole), load_file(parts)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    kept = [file.name for file in sorted(whole.parent.iterdir())]
    assert kept == ["micro-lora-00000002.safetensors", "micro-lora-00000004.safetensors",
                    "micro-lora-00000005.safetensors", "micro-lora.safetensors"]  # fmt: skip

    ours = images_of(load(few_step, CPU, loras={str(whole): 1.0}))
    assert (ours.int() - images_of(load(few_step, CPU)).int()).abs().max() > 4
    assert (ours.float() - by_diffusers(few_step, whole)).abs().max() <= 2
    with safe_open(whole, "pt") as file:
        header = file.metadata()
    assert header["fewstep.trained_on"] == "student"
    assert header["modelspec.description"] == "flow_matching, 5 steps, 5 images"
    printed = succeed("lora", "info", whole, "--model", few_step).stdout
    assert "rank: 3; alpha / rank: 1" in printed  # the scale of 2 is in B, or in LoKr's first factor
    assert "a few-step model" in printed


def test_previews_are_made_by_the_few_step_sampler_of_the_present_weights(few_step, image_set, tmp_path):
    from PIL import Image

    more = [f"model={few_step}", f"data.images={image_set}", "train.steps=2", "train.sample_every=2"]
    file = run_lora(tmp_path, *more, "preview.prompts=[a picture of 1]")
    shown = torch.tensor(bytearray(Image.open(tmp_path / "previews" / "step_000002.png").tobytes())).reshape(64, 64, 3)
    expected = generate(load(few_step, CPU, loras={str(file): 1.0}), ["a picture of 1"]).images[0]
    assert (shown.int() - expected.int()).abs().max() <= 1


def test_files_beyond_keep_files_are_deleted(few_step, image_set, tmp_path):
    more = [f"model={few_step}", f"data.images={image_set}", "train.steps=4", "train.save_every=1", "keep_files=2"]
    file = run_lora(tmp_path, *more)
    assert len(list(file.parent.iterdir())) == 3


def test_encoded_images_and_captions_are_read_from_the_cache(few_step, image_set, tmp_path, monkeypatch):
    model, images = load(few_step, CPU), read_training_set(image_set)
    first = encode_set(images, model, tmp_path, None, CPU)
    assert [one.latent.shape[1:] for one in first].count((4, 12)) == 3
    monkeypatch.setattr(type(model.family), "encode_images", None)  # whoever calls it fails
    again = encode_set(images, model, tmp_path, None, CPU)
    assert all(
        torch.equal(a.latent, b.latent) and torch.equal(a.features, b.features)
        for a, b in zip(first, again, strict=True)
    )
    with pytest.raises(TypeError):
        encode_set(images, model, tmp_path, [32], CPU)  # other sizes are other latents


def test_a_base_model_trains_a_base_lora(tiny_folder, few_step, image_set, tmp_path, capsys):
    file = run_lora(tmp_path, f"model={tiny_folder}", f"data.images={image_set}", "train.steps=1")
    load(few_step, CPU, loras={str(file): 0.8})
    assert "trained on a multi-step model, and this is a few-step one" in capsys.readouterr().err


def test_a_training_adapter_is_added_in_training_and_left_out_afterwards(few_step, image_set, tmp_path):
    """One is made by the command. A model with it in training computes what the merged model computes."""
    (tmp_path / "prompts.txt").write_text("a fox\na bear\na cat\n")
    settings = [*SHORT[:-1], "optim.lora.lr=0.02", "data.own_images.count=3", "train.steps=2"]
    words = [word for one in settings for word in ("-s", one)]
    file = tmp_path / "undo.safetensors"
    succeed("lora", "adapter", few_step, "--out", file, "--prompts", tmp_path / "prompts.txt",
            "--run", tmp_path / "run", *words)  # fmt: skip
    assert "of its own images" in succeed("lora", "info", file, "--model", few_step).stdout

    more = [f"model={few_step}", f"data.images={image_set}", f"method.training_adapter={file}"]
    recipe = load_recipe("micro-lora", [*SHORT, *more, "method.training_adapter_strength=0.5"])
    model, plain = load(few_step, CPU), images_of(load(few_step, CPU))
    models = build_lora_models(recipe, model, CPU, files=open_lora_inputs(recipe, tmp_path).files)
    x, sigma, prompts = torch.randn(1, 16, 8, 8), torch.tensor([0.7]), model.encode(["a fox"])
    merged = load(few_step, CPU, loras={str(file): 0.5})
    with torch.no_grad():
        assert_close(models.denoiser(x, sigma, prompts), merged.denoiser(x, sigma, prompts), atol=1e-5, rtol=1e-4)
    assert torch.equal(images_of(model), plain)
    trained = [name for name, p in models.denoiser.named_parameters() if p.requires_grad]
    assert trained
    assert not any("training_adapter" in name for name in trained)
    made = run_lora(tmp_path / "with", *more, "train.steps=2")
    assert len(load_file(made)) == len(load_file(file))


def test_an_added_lora_of_several_ranks_is_as_merged(few_step, tmp_path):
    import lora_files as made

    from fewstep.models.adapters import active_adapters
    from fewstep.models.lora.trained import add_frozen_adapter

    model = load(few_step, CPU)
    file = made.save(tmp_path / "a.safetensors", made.kohya(made.adapter_for(model.transformer)))
    merged = load(few_step, CPU, loras={str(file): 1.0})
    add_frozen_adapter(model.transformer, "added", read_lora(file, targets_of(merged.transformer, merged.family)))
    x, sigma, prompts = torch.randn(1, 16, 8, 8), torch.tensor([0.7]), model.encode(["a fox"])
    with torch.no_grad(), active_adapters(model.transformer, {"added": 1.0}):
        assert_close(model.denoiser(x, sigma, prompts), merged.denoiser(x, sigma, prompts), atol=1e-5, rtol=1e-4)


def test_offloaded_blocks_train_the_same_lora(few_step, image_set, tmp_path):
    more = [f"model={few_step}", f"data.images={image_set}", "models.gradient_checkpointing=true", "train.steps=2"]
    plain = load_file(run_lora(tmp_path / "plain", *more))
    offloaded = load_file(run_lora(tmp_path / "offloaded", *more, "models.offload_blocks=true"))
    assert all(torch.equal(tensor, offloaded[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("dtype", ["fp32", "fp8", "nf4"])
def test_of_offloaded_blocks_adapters_alone_stay_on_the_device(few_step, dtype):
    """The device is "meta", on which tensors have no contents."""
    more = [f"models.frozen_dtype={dtype}", "models.gradient_checkpointing=true", "models.offload_blocks=true"]
    recipe = load_recipe("micro-lora", [*SHORT, "method={name: self_distillation}", *more])
    models = build_lora_models(recipe, load(few_step, CPU, frozen_dtype(recipe.models)), torch.device("meta"))
    transformer = models.model.transformer
    prompts = models.model.encode(["a fox"]).to("meta")
    devices = set()
    for block in transformer.layers:
        block.attention.to_q.register_forward_pre_hook(
            lambda module, _: devices.update(tensor.device.type for tensor in module.state_dict().values())
        )
    models.denoiser(torch.randn(1, 16, 8, 8, device="meta"), torch.ones(1, device="meta"), prompts).sum().backward()
    assert devices == {"meta"}
    for key, tensor in transformer.state_dict().items():
        at_home = key.startswith(("layers", "noise_refiner", "context_refiner")) and not is_adapter_key(key)
        assert tensor.device.type == ("cpu" if at_home else "meta"), key
    assert all(parameter.grad is not None for parameter in models.denoiser.parameters())


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_self_distillation_resumes_exactly(kind, few_step, image_set, tmp_path):
    more = [f"model={few_step}", f"data.images={image_set}", "method={name: self_distillation, copy_decay: 0.5}"]
    more += [f"adapter.kind={kind}"]
    whole = run_lora(tmp_path / "whole", *more, "train.steps=4")
    run_lora(tmp_path / "parts", *more, "train.steps=2")
    parts = run_lora(tmp_path / "parts", *more, "train.steps=4")
    tensors, others = load_file(whole), load_file(parts)
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert not any("copy" in name for name in tensors)


@pytest.mark.slow
def test_self_distillation_moves_samples_to_the_images(few_step, image_set, tmp_path):
    def distance(file):
        """To the image whose caption it is."""
        model = load(few_step, CPU, loras={str(file): 1.0} if file else None)
        wanted = read_training_set(image_set).images[1].pixels((64, 64)).permute(1, 2, 0) * 255
        return (images_of(model).float() - wanted).square().mean()

    more = [f"model={few_step}", f"data.images={image_set}", "method={name: self_distillation, copy_decay: 0.5}"]
    file = run_lora(tmp_path, *more, "train.steps=60", "data.caption_dropout=0", "train.save_every=60")
    assert distance(file) < distance(None)


def test_decoupled_dmd_trains_three_adapters_and_resumes_exactly(tiny_folder, few_step, image_set, tmp_path):
    more = [f"model={few_step}", f"data.images={image_set}", "optim.teacher.lr=0.01", "optim.fake_score.lr=0.01"]
    more += [f"method={{name: decoupled_dmd, teacher: {tiny_folder}, student_start: 1}}"]
    whole = run_lora(tmp_path / "whole", *more, "train.steps=3")
    run_lora(tmp_path / "parts", *more, "train.steps=2")
    parts = run_lora(tmp_path / "parts", *more, "train.steps=3")
    tensors, others = load_file(whole), load_file(parts)
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert "lora/loss" not in lines[0]
    assert {"lora/loss", "teacher/loss", "fake_score/loss", "lora/dm_abs", "lora/cfg_aug_abs"} <= lines[1].keys()
    update = next(
        iter(read_lora(whole, targets_of(load(few_step).transformer, load(few_step).family)).updates.values())
    )
    assert isinstance(update.change, LowRank)
    assert update.change.norm() > 0


def test_a_lora_of_the_base_is_transported_and_imitated(tiny_folder, few_step, image_set, tmp_path):
    base = run_lora(tmp_path / "base", f"model={tiny_folder}", f"data.images={image_set}", "train.steps=2")
    more = [f"model={few_step}", f"data.images={image_set}", "train.steps=1"]
    source = f"teacher: {tiny_folder}, lora: {base}"
    transport = [*more, f"method={{name: decoupled_dmd, {source}, student_start: 0}}", f"adapter.init={base}"]
    moved = load_file(run_lora(tmp_path / "transport", *transport, "optim.fake_score.lr=0.01"))
    start = load_file(base)
    assert moved.keys() == start.keys()
    steps = max(float((moved[name] - start[name]).abs().max()) for name in moved)
    assert 0 < steps < 0.05  # one update of the base's LoRA, whose scale is twice that of a weight

    imitate = [*more, f"method={{name: trajectory, {source}, teacher_steps_per_student_step: 2}}"]
    file = run_lora(tmp_path / "imitate", *imitate)
    assert any(tensor.abs().max() > 0 for name, tensor in load_file(file).items() if "lora_B" in name)
    with pytest.raises(UserError, match=r"^adapter.init: .*rank and layers must be equal"):
        run_lora(tmp_path / "other", *transport, "optim.fake_score.lr=0.01", "adapter.rank=2")
