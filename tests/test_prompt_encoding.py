"""Prompts are encoded in parts, each once, and their features are kept once: in bounded memory, or on disk."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep import api
from fewstep.config.load import load_recipe
from fewstep.core.method import Shard
from fewstep.data import text_prompts
from fewstep.data.prepare_prompts import prepare_prompts
from fewstep.data.prompt_batches import prompt_batches
from fewstep.data.prompt_shards import PromptShards
from fewstep.data.teacher_trajectories import make_cache
from fewstep.data.text_prompts import FeatureList, encodable
from fewstep.emoji.dataset import EmojiDataset
from fewstep.errors import UserError
from fewstep.inference import prompt_parts
from fewstep.methods.base import DataSetup, MethodSetup
from fewstep.methods.dmd.data import dmd_sources, teacher_latent_stats
from fewstep.methods.models_setup import build_models
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.text import FeatureCache, PromptEncoder
from fewstep.training.distributed import DistContext


class Counted:
    """The texts that an encoder encoded, and the most at once."""

    def __init__(self) -> None:
        self.texts: Counter[str] = Counter()
        self.most = 0

    @property
    def again(self) -> list[str]:
        return [text for text, count in self.texts.items() if count > 1]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    found = Counted()
    plain = PromptEncoder.encode_uncached

    def encode(self: PromptEncoder, texts: Sequence[str], **options: str | None) -> list[Tensor]:
        found.texts.update(texts)
        found.most = max(found.most, len(texts))
        return plain(self, texts, **options)

    monkeypatch.setattr(PromptEncoder, "encode_uncached", encode)
    return found


@pytest.fixture
def fresh(tiny: TextToImagePipeline) -> TextToImagePipeline:
    """The tiny model with an encoder whose cache is empty."""
    return tiny.with_transformer(tiny.transformer, tiny.generation_config)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_prompts, "MEMORY_BYTES", 5000)
    monkeypatch.setattr(text_prompts, "PART", 4)


@pytest.fixture
def bf16(fresh: TextToImagePipeline) -> Iterator[TextToImagePipeline]:
    saved = copy.deepcopy(fresh.text_encoder.state_dict())  # of the model that all tests share
    fresh.text_encoder.to(torch.bfloat16)
    yield fresh
    fresh.text_encoder.to(torch.float32).load_state_dict(saved)


def numbered(count: int) -> list[str]:
    return [f"a fox and {i} dogs" for i in range(count)]


def test_the_cache_drops_what_was_not_used_for_the_longest_time() -> None:
    cache = FeatureCache(capacity=300)
    for key in "abc":
        cache.add(key, torch.zeros(25))
    assert cache.get("a") is not None
    cache.add("d", torch.zeros(25))
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]
    cache.add("large", torch.zeros(1000))
    assert cache.bytes == 0
    assert cache.get("large") is None


def test_an_encoder_keeps_a_bounded_number_of_bytes(fresh: TextToImagePipeline, counted: Counted) -> None:
    fresh.encoder._cache.capacity = 20_000
    whole = fresh.encode(numbered(60))  # more than fits: the batch is complete all the same
    assert 0 < fresh.encoder._cache.bytes <= 20_000
    again = fresh.encode(numbered(60)[-3:])
    assert not counted.again
    assert torch.equal(again.features, whole[[57, 58, 59]].features)


def test_features_are_kept_in_the_encoders_precision(bf16: TextToImagePipeline, tmp_path: Path) -> None:
    stored = encodable(bf16, numbered(5)).stored()
    assert isinstance(stored, FeatureList)
    assert {feature.dtype for feature in stored.features} == {torch.bfloat16}
    assert all(feature.untyped_storage().nbytes() == feature.nbytes for feature in stored.features)  # no padded batch
    assert {feature.dtype for feature in bf16.encoder._cache._entries.values()} == {torch.bfloat16}
    assert stored.encoded([0, 1]).features.dtype == torch.float32
    assert torch.equal(stored.encoded([3, 1]).features, bf16.encode([numbered(5)[3], numbered(5)[1]]).features)


def test_cached_prompts_are_the_stored_ones(fresh: TextToImagePipeline) -> None:
    """Not a second copy."""
    stored = encodable(fresh, numbered(5)).stored()
    assert isinstance(stored, FeatureList)
    cached = {feature.data_ptr() for feature in fresh.encoder._cache._entries.values()}
    assert cached == {feature.data_ptr() for feature in stored.features}


def test_only_the_prompts_of_the_training_are_encoded_beforehand(fresh: TextToImagePipeline, counted: Counted) -> None:
    some = prompt_batches(fresh, numbered(60), size=4, seed=1, batches=3)
    early = set(counted.texts)
    assert {text for position in range(3) for text in some(position, Shard()).texts} == early
    assert set(counted.texts) == early
    late = some(3, Shard())
    assert set(counted.texts) == early | set(late.texts)
    fresh.encoder._cache = FeatureCache(2**28)
    every = prompt_batches(fresh, numbered(60), size=4, seed=1)
    for position in (0, 2, 3):
        one, other = some(position, Shard()), every(position, Shard())
        assert one.texts == other.texts
        torch.testing.assert_close(one.prompts.features, other.prompts.features, atol=1e-5, rtol=1e-5)


def test_many_prompts_are_on_disk(
    fresh: TextToImagePipeline, tmp_path: Path, counted: Counted, little_memory: None
) -> None:
    texts, folder = numbered(30), tmp_path / "encoded"
    batches = prompt_batches(fresh, encodable(fresh, texts, folder), size=4, seed=1)
    assert counted.most <= 4
    assert not counted.again
    fresh.encoder._cache = FeatureCache(2**28)
    expected = prompt_batches(fresh, texts, size=4, seed=1)  # without a folder, in memory
    for position in range(3):
        one, other = batches(position, Shard()), expected(position, Shard())
        torch.testing.assert_close(one.prompts.features, other.prompts.features, atol=1e-5, rtol=1e-5)
        assert torch.equal(one.noise, other.noise)
    assert len(list(folder.iterdir())) == 1
    counted.texts.clear()
    again = encodable(fresh, texts, folder).stored()
    assert isinstance(again, PromptShards)
    assert list(again) == texts
    assert not counted.texts
    encodable(fresh, [*texts, "a hen"], folder).stored()  # other prompts: another folder
    assert len(list(folder.iterdir())) == 2


def test_interrupted_encoding_resumes(
    fresh: TextToImagePipeline, tmp_path: Path, counted: Counted, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = text_prompts.write_prompt_shard

    def interrupted(folder: Path, number: int, texts: Sequence[str], features: Sequence[Tensor]) -> None:
        if number == 5:
            raise KeyboardInterrupt
        written(folder, number, texts, features)

    monkeypatch.setattr(text_prompts, "write_prompt_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encodable(fresh, numbered(30), tmp_path / "encoded").stored()
    monkeypatch.setattr(text_prompts, "write_prompt_shard", written)
    counted.texts.clear()
    fresh.encoder._cache = FeatureCache(2**28)
    stored = encodable(fresh, numbered(30), tmp_path / "encoded").stored()
    assert set(counted.texts) == set(numbered(30)[20:])
    assert list(stored) == numbered(30)


RUN = ["train.steps=1", "train.batch_size=2", "train.sample_every=0", "train.precision=fp32", "evaluate.enabled=false",
       "evaluate.validate_every=0", "method.fake_score_start=0",
       "trajectory.num_trajectories=12",
       "trajectory.teacher_steps_per_student_step=1"]  # fmt: skip


@pytest.mark.parametrize(
    ("terms", "capacity"), [("trajectory_mse: {}", 2**28), ("mean_variance: {}", 0), ("mmd: {}", 2**28)]
)
def test_trajectories_statistics_and_batches_share_features(
    fresh: TextToImagePipeline, tiny_folder: Path, tmp_path: Path, counted: Counted, terms: str, capacity: int
) -> None:
    """Where all prompts are encoded, that does not depend on the encoder's cache."""
    more = [f"teacher={tiny_folder}", f"method.terms={{cfg_augmentation: {{}}, distribution_matching: {{}}, {terms}}}"]
    recipe = load_recipe("micro-aligned", [*RUN, *more])
    fresh.encoder._cache.capacity = capacity
    prompts = encodable(fresh, numbered(20), tmp_path / "encoded")
    sources = dmd_sources(DataSetup(recipe, fresh, prompts, tmp_path / "cache"))
    for source in sources.values():
        source(0, Shard())
    models = build_models(recipe, fresh, recipe.method.extra_models(), DistContext())
    teacher_latent_stats(MethodSetup(recipe, models, fresh.encode([""]), {}, prompts, DistContext()))
    assert [text for text in counted.again if text] == []
    assert set(counted.texts) <= {"", *numbered(20)}


def test_rendered_images_use_the_stored_features(
    fresh: TextToImagePipeline, tiny_folder: Path, tmp_path: Path, counted: Counted
) -> None:
    dataset = EmojiDataset.load()
    texts = [dataset.prompt(spec) for spec in dataset.specs("train")[:10]]
    more = [f"teacher={tiny_folder}", "method.real_source=emoji", "method.num_real_images=16"]
    more += ["method.terms={cfg_augmentation: {}, distribution_matching: {}, mmd: {}}"]
    recipe = load_recipe("micro-aligned", [*RUN, *more])
    fresh.encoder._cache.capacity = 0
    sources = dmd_sources(DataSetup(recipe, fresh, encodable(fresh, texts), tmp_path / "cache"))
    batch = sources["real"](0, Shard())
    assert len(batch) == 2
    assert set(counted.texts) <= set(texts)
    assert not counted.again


def test_encoded_prompts_are_not_encoded_again_for_trajectories(
    tiny: TextToImagePipeline, fresh: TextToImagePipeline, tiny_folder: Path, tmp_path: Path, counted: Counted
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(numbered(20)))
    prepare_prompts([str(tmp_path / "prompts.txt")], tiny.encoder, tmp_path / "shards")
    counted.texts.clear()
    recipe = load_recipe("micro-cache", [f"teacher={tiny_folder}", f"prompts.source={tmp_path / 'shards'}",
                                         "num_trajectories=6", "teacher_steps_per_student_step=1"])  # fmt: skip
    make_cache(recipe, tmp_path / "cache", teacher=fresh)
    assert set(counted.texts) <= {""}


def test_a_run_with_prompts_on_disk_resumes(
    tiny_folder: Path, tmp_path: Path, counted: Counted, little_memory: None
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(numbered(6)))  # all of them are used
    overrides = [*RUN, f"teacher={tiny_folder}", f"prompts.source={tmp_path / 'prompts.txt'}"]
    api.distill("micro-decoupled", tmp_path / "run", overrides=overrides)
    assert len(list((tmp_path / "run" / "encoded-prompts").glob("*/index.json"))) == 1
    counted.texts.clear()
    api.distill("micro-decoupled", tmp_path / "run", overrides=[*overrides, "train.steps=2"])
    assert set(counted.texts) == {""}


def test_generation_holds_one_part_of_the_prompts(
    fresh: TextToImagePipeline, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = api.generate(fresh, numbered(10), steps=1, guidance_scale=0.0, batch_size=2).images
    counted.texts.clear()
    fresh.encoder._cache = FeatureCache(0)
    monkeypatch.setattr(prompt_parts, "PART", 3)
    parts = api.generate(fresh, numbered(10), steps=1, guidance_scale=0.0, batch_size=2).images
    assert torch.equal(parts, whole)
    held = prompt_parts.PromptParts(fresh, numbered(10), None, "")
    counted.texts.clear()
    assert len(held[0:2]) == 2
    assert counted.texts.total() == 3
    assert len(held[2:9]) == 7  # a batch is never divided
    assert counted.texts.total() == 3 + 7


@pytest.mark.parametrize("bad", ["word " * 600, "a cat \ud83d"])
def test_a_prompt_that_cannot_be_encoded_is_refused_before_the_work(
    fresh: TextToImagePipeline, counted: Counted, bad: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"at most 512 fit|not valid Unicode"):
        api.generate(fresh, [*numbered(300), bad], steps=1)
    with pytest.raises(UserError, match=r"at most 512 fit|not valid Unicode"):
        encodable(fresh, [*numbered(300), bad], tmp_path)
    assert not counted.texts


def test_a_cache_of_held_out_prompts_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(numbered(12)))
    (tmp_path / "test.txt").write_text("\n".join(text.upper() for text in numbered(12)[:6]))
    source = [f"teacher={tiny_folder}", f"prompts.source={tmp_path / 'prompts.txt'}"]
    cache = load_recipe("micro-cache", [*source, "num_trajectories=30", "teacher_steps_per_student_step=1"])
    make_cache(cache, tmp_path / "cache")
    more = [f"trajectory.cache={tmp_path / 'cache'}", f"prompts.test_source={tmp_path / 'test.txt'}"]
    more += [f"student.steps={cache.steps}"]
    with pytest.raises(UserError, match=r"cache: \d+ prompts are also test prompts, such as 'a fox and"):
        api.distill("micro-aligned", tmp_path / "run", overrides=[*RUN, *source, *more])
