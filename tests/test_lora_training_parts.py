"""Parts of LoRA training: noise levels, batches, sizes, losses that reach one adapter alone, the plan."""

import math

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from lora_training import CPU, SHORT, few_step, image_set
from memory import peak_bytes
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.config.load import load_recipe
from fewstep.config.lora_recipe import TimestepSettings
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.registry import lora_methods
from fewstep.data.batch import DistillBatch
from fewstep.data.training_set.batches import epoch_batches, example_batches
from fewstep.data.training_set.encoded import Example
from fewstep.data.training_set.reading import read_training_set
from fewstep.emoji.dataset import EmojiDataset
from fewstep.emoji.lora_set import write_fluent_set
from fewstep.methods.lora.base import LoraSetup
from fewstep.methods.lora.models_setup import build_lora_models
from fewstep.methods.lora.self_distillation import privileged_x0
from fewstep.methods.lora.timesteps import draw_sigma, loss_weight
from fewstep.models.pipeline import load
from fewstep.plan.costs import PROMPT_TOKENS
from fewstep.plan.gpus import parse_gpu
from fewstep.plan.lora import plan_lora
from fewstep.training.train_state import TrainState

__all__ = ["few_step", "image_set"]  # fixtures


def test_noise_levels_have_their_distributions():
    """Means in closed form; the weights of "weighted" have a mean of 1, are largest in the middle and end at 0."""
    shifted = 1.5 - 0.75 * math.log(3)  # the integral of S(u) = 3u / (1 + 2u) from 0 to 1
    for name, mean in {"sigmoid": 0.5, "uniform": 0.5, "weighted": 0.5, "shift": shifted}.items():
        sigma = draw_sigma(TimestepSettings(distribution=name), 100_000, shift=3.0)
        assert sigma.mean() == pytest.approx(mean, abs=0.005), name
        assert 0 <= sigma.min() <= sigma.max() <= 1
    weighted = TimestepSettings(distribution="weighted")
    grid = torch.linspace(0, 1, 10_001)
    weights = loss_weight(weighted, grid)
    assert weights.mean() == pytest.approx(1, abs=1e-3)
    assert weights[0] == weights[-1] == pytest.approx(0, abs=1e-6)
    assert grid[weights.argmax()] == pytest.approx(0.5, abs=1e-3)
    assert torch.equal(loss_weight(TimestepSettings(), grid), torch.ones_like(grid))
    own = TimestepSettings(distribution="shift", shift=1.0)
    assert draw_sigma(own, 100_000, shift=3.0).mean() == pytest.approx(0.5, abs=0.005)


def test_an_epoch_has_every_example_once_in_batches_of_one_shape():
    shapes = [torch.Size([4, 8, 8])] * 7 + [torch.Size([4, 8, 12])] * 4
    batches = epoch_batches(shapes, 2, seed=0, epoch=0)
    assert len(batches) == 4 + 2
    assert all(len({shapes[number] for number in batch}) == 1 for batch in batches)
    assert sorted({number for batch in batches for number in batch}) == list(range(11))
    assert batches != epoch_batches(shapes, 2, seed=0, epoch=1)
    assert batches == epoch_batches(shapes, 2, seed=0, epoch=0)


def test_batches_depend_on_their_position_alone_and_drop_captions():
    examples = [Example(torch.full((4, 8, 8), float(i)), torch.full((3, 5), float(i)), str(i)) for i in range(6)]
    source = example_batches(examples, torch.zeros(2, 5), 4, seed=1, dropout=0.25, device=CPU)
    batches = [source(position) for position in range(200)]
    again = source(17)
    assert torch.equal(again.real, batches[17].real)
    assert torch.equal(again.noise, batches[17].noise)
    dropped = [text == "" for batch in batches for text in batch.texts]
    assert sum(dropped) / len(dropped) == pytest.approx(0.25, abs=0.05)
    for batch in batches[:5]:
        for row, text in enumerate(batch.texts):
            number = batch.real[row, 0, 0, 0]
            assert text in ("", str(int(number)))
            assert int(batch.prompts.lengths[row]) == (3 if text else 2)


def test_an_image_is_trained_at_each_resolution_once(image_set):
    images = read_training_set(image_set)
    wide = images.images[0]
    assert wide.width > wide.height
    sizes = images.sizes(wide, [32, 64, 512])
    assert len(sizes) == len(set(sizes)) >= 1
    assert max(width for width, _ in sizes) <= wide.width
    pixels = wide.pixels((32, 32))
    assert pixels.shape == (3, 32, 32)
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_the_fluent_set_has_different_objects_of_the_training_split(tmp_path):
    write_fluent_set(tmp_path / "set", 6)
    dataset = EmojiDataset.load()
    images = read_training_set(tmp_path / "set").images
    specs = [dataset.parse(image.caption) for image in images]
    assert len({spec.object for spec in specs}) == 6
    assert {spec.style for spec in specs} == {"fluent"}
    assert {dataset.split_of(spec) for spec in specs} == {"train"}
    for image, spec in zip(images, specs, strict=True):
        real = dataset.render([spec], jitter=False)[0]
        assert (image.pixels((64, 64)) - real).abs().mean() < 0.2


def setup_of(recipe, few_step, teacher_folder):
    model = load(few_step, CPU)
    transformer = load(teacher_folder, CPU).transformer
    teacher = model.with_transformer(transformer, load(teacher_folder, CPU).generation_config)
    models = build_lora_models(recipe, model, CPU, teacher if recipe.method.teacher_model else None)
    width = model.family.prompt_features(model.components)
    prompts = EncodedPrompts(torch.randn(2, PROMPT_TOKENS, width), torch.full((2,), PROMPT_TOKENS))
    noise = torch.randn(2, *model.latent_shape(64, 64))
    batch = DistillBatch(noise, prompts, torch.randn_like(noise)[:, None], ["", ""])
    return lora_methods.get(recipe.method.name).build(LoraSetup(recipe, models, prompts[:1])), batch


def dmd_recipe(few_step, teacher, *more):
    method = f"method={{name: decoupled_dmd, teacher: {teacher}}}"
    rates = ("optim.teacher.lr=0.01", "optim.fake_score.lr=0.01")
    return load_recipe("micro-lora", [*SHORT, f"model={few_step}", method, *rates, *more])


def test_each_loss_reaches_its_own_adapter_alone(few_step, tiny_folder):
    method, batch = setup_of(dmd_recipe(few_step, tiny_folder), few_step, tiny_folder)
    assert [part.name for part in method.trainables] == ["teacher", "lora", "fake_score"]
    method.before_step(0)
    for part in method.trainables:
        loss, _ = part.loss(batch)
        loss.backward()
        reached = {
            other.name
            for other in method.trainables
            for p in other.module.parameters()
            if p.grad is not None and p.grad.abs().max() > 0
        }
        assert reached == {part.name}
        part.module.zero_grad()


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("models.gradient_checkpointing=true",), marks=pytest.mark.slow),
    ],
)
def test_a_step_takes_the_planned_memory(few_step, tiny_folder, more, monkeypatch):
    """Within 3% on a CPU, for each part of the method."""
    fused = lambda query, key, value, *_: dispatch_attention_fn(query, key, value)  # noqa: E731
    monkeypatch.setattr("fewstep.models.zimage.block.attention_fn", fused)  # in bf16 too, as on a GPU
    monkeypatch.setattr("fewstep.plan.passes.DRAWS", 1)
    for recipe in (
        load_recipe("micro-lora", [*SHORT, f"model={few_step}", *more]),
        dmd_recipe(few_step, tiny_folder, *more),
    ):
        planned = plan_lora(recipe, "cpu").memory
        method, batch = setup_of(recipe, few_step, tiny_folder)
        method.before_step(0)
        peaks = []
        for part in method.trainables:
            learner = TrainState(part, recipe.optim[part.name], recipe.train)
            learner.update([batch], 1)
            learner.optimizer.zero_grad()
            peaks.append(peak_bytes(lambda learner=learner, both=[batch, batch]: learner.update(both, 2)))
            learner.optimizer.zero_grad()
            assert planned[f"{part.name.replace('_', ' ')} adapter"] == sum(w.nbytes for w in learner.weights.values())
        names = ("gradients", "saved activations", "temporaries")
        assert sum(planned[name] for name in names) == pytest.approx(max(peaks), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        *(("lora-character-24gb", "24GB"), ("lora-character-16gb", "16GB"), ("lora-character-12gb", "12GB")),
        *(("lora-style", "24GB"), ("lora-micro-rank", "12GB"), ("training-adapter", "24GB"), ("lora-dmd-24gb", "24GB")),
        ("lora-opsd-24gb", "24GB"),
    ],
)
def test_recipes_fit_their_gpus(name, gpu, monkeypatch):
    monkeypatch.setattr("fewstep.plan.passes.DRAWS", 1)
    found = plan_lora(load_recipe(name, []))
    assert found.fits(parse_gpu(gpu))
    assert found.forwards <= 1 + 7 + 1 + 2 + 7 + 1  # Turbo has 8 steps: rollouts of at most 7, each once for two losses


def test_the_plan_of_a_lora_is_printed(few_step):
    words = ["plan", "micro-lora", "-s", f"model={few_step}", "--gpu", "24GB"]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "flow_matching lora training" in done.output
    assert "24GB (24 GB): fits" in done.output


def test_self_distillation_trains_the_adapter_alone_and_its_copy_follows(few_step):
    """The target is the copy's prediction, moved to the latent: at weight 1 it is the latent."""
    recipe = load_recipe("micro-lora", [*SHORT, "method={name: self_distillation, reference_weight: 1.0}"])
    torch.manual_seed(0)
    models = build_lora_models(recipe, load(few_step, CPU, torch.float32), CPU)
    method = lora_methods.get("self_distillation").build(LoraSetup(recipe, models, models.model.encode([""])))
    noise = torch.randn(2, *models.model.latent_shape(64, 64))
    batch = DistillBatch(noise, models.model.encode(["a", "b"]), torch.full_like(noise, 0.3)[:, None], ["a", "b"])
    target = privileged_x0(method.copy, noise, torch.ones(2), batch, 1.0)
    assert torch.equal(target, batch.real)
    half = privileged_x0(method.copy, noise, torch.ones(2), batch, 0.5)
    own = privileged_x0(method.copy, noise, torch.ones(2), batch, 0.0)
    assert torch.allclose(half, (own + batch.real) / 2, atol=1e-6)

    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.loss(batch)[0].backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in method.student.parameters())
    assert all(parameter.grad is None for parameter in method.copy.parameters())
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1.0)
    method.after_step(0)
    assert all(torch.allclose(value, before[name] + 0.01) for name, value in method.state_dict().items())
    method.load_state_dict(before)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
