"""Training of the micro text encoder: a small Qwen3, trained contrastively with the latents of images."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from fewstep.atomic import atomic_folder
from fewstep.core import seeds
from fewstep.core.method import Batch, Method, Shard, Trainable
from fewstep.emoji.dataset import NUM_TEMPLATES, STYLES, EmojiDataset
from fewstep.emoji.latents import build_bank, image_key
from fewstep.emoji.recipes import TextEncoderRecipe, TextEncoderSettings
from fewstep.models.components import component_folder, load_component
from fewstep.models.family import get_family
from fewstep.models.text import apply_chat_template
from fewstep.models.vae import encode_images, to_channels_last
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]

#: Gives the same text as Qwen3's template for plain messages: turns between im_start and im_end, and an empty <think>
#: block when thinking is off.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def build_tokenizer(vocab_size: int) -> Qwen2Tokenizer:
    """A byte-level BPE trained on the emoji dataset's prompts, as a Qwen2Tokenizer with Z-Image's chat template."""
    pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    trained.train_from_iterator(_corpus(), trainer)
    learned = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=merges, model_max_length=4096)  # type: ignore[arg-type]
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})  # type: ignore[dict-item]
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "right"
    return tokenizer


def _corpus() -> list[str]:
    """Prompts on two of the backgrounds, which share all other words, and each name on its own."""
    dataset = EmojiDataset.load_all()
    lines = ["user\n", "assistant\n", "system\n"] * 64
    for spec in dataset.specs(styles=STYLES):
        if spec.background in ("red", "blue"):
            lines += [dataset.prompt(spec, template) for template in range(NUM_TEMPLATES)]
    for item in dataset.objects:  # so that merges cover rare names too
        lines += [item.en, item.zh] * 8
    return lines


def build_text_encoder(settings: TextEncoderSettings, tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    """A text encoder with fresh weights, in Qwen3's architecture."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.head_dim,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3Model(config)


class EmojiCLIP(nn.Module):
    """A text tower and an image tower with a shared embedding space; only the text encoder is kept after training.

    The text embedding is computed from the mean of ``hidden_states[-2]`` over a prompt's tokens, the features that
    condition the transformer. The image tower is a small convolutional network on latents.
    """

    def __init__(self, text_encoder: Qwen3Model, latent_channels: int, width: int, temperature: float) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        hidden = text_encoder.config.hidden_size
        self.text_head = nn.Sequential(nn.RMSNorm(hidden), nn.Linear(hidden, width))
        self.image_tower = nn.Sequential(
            nn.Conv2d(latent_channels, 96, 3, padding=1),
            nn.GroupNorm(8, 96),
            nn.SiLU(),
            nn.Conv2d(96, 192, 3, stride=2, padding=1),
            nn.GroupNorm(8, 192),
            nn.SiLU(),
            nn.Conv2d(192, 192, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(192 * 4, width),
        )
        self.log_scale = nn.Parameter(torch.tensor(1 / temperature).log())

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask: [B, L] -> unit vectors [B, width]."""
        hidden = self.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        mean = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return F.normalize(self.text_head(mean).float(), dim=-1)

    def image(self, latents: Tensor) -> Tensor:
        """latents: [B, C, 8, 8] -> unit vectors [B, width]."""
        return F.normalize(self.image_tower(latents).float(), dim=-1)


class ContrastiveTraining(Method):
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020); all prompts of the same (object, style, background) are positives."""

    def __init__(self, model: EmojiCLIP) -> None:
        self.model = model
        self.trainables = [Trainable("text_encoder", model, self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        ids, mask, latents, image = batch
        scores = self.model.log_scale.exp().clamp(max=100) * self.model.text(ids, mask) @ self.model.image(latents).T
        same = (image[:, None] == image[None, :]).float()
        target = same / same.sum(dim=1, keepdim=True)
        loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        accuracy = same.gather(1, scores.argmax(dim=1, keepdim=True)).mean()
        return loss, {"accuracy": accuracy.detach()}


def train(recipe: TextEncoderRecipe, run: RunDir) -> Path:
    """Train on the training split, as the teacher; save to ``<run>/text_encoder`` and ``<run>/tokenizer``."""
    dataset = EmojiDataset.load(recipe.data.num_objects)
    specs = dataset.specs("train")
    vae = to_channels_last(
        load_component(component_folder(recipe.vae), "vae", torch.float32, get_family("ZImagePipeline"))
    )
    augmentations = recipe.data.augmentations_per_object
    bank = build_bank(dataset, specs, lambda images: encode_images(vae, images), augmentations, seed=1)
    tokenizer = build_tokenizer(recipe.model.vocab_size)
    torch.manual_seed(recipe.train.seed)
    text_encoder = build_text_encoder(recipe.model, tokenizer)
    model = EmojiCLIP(text_encoder, bank.latents.shape[2], recipe.model.hidden_size, recipe.temperature)

    def data(position: int, shard: Shard = Shard()) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: B008  # frozen
        generator = seeds.generator("batch", recipe.train.seed, position)
        chosen = torch.randint(len(specs), (recipe.train.batch_size,), generator=generator).tolist()
        batch = [specs[i] for i in chosen]
        templates = torch.randint(NUM_TEMPLATES, (len(batch),), generator=generator).tolist()
        rows = shard.rows(len(batch))
        pairs = zip(batch[rows], templates[rows], strict=True)
        texts = [apply_chat_template(tokenizer, dataset.prompt(spec, template)) for spec, template in pairs]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        image = torch.tensor([bank.row[image_key(spec)] for spec in batch[rows]])
        return tokens.input_ids, tokens.attention_mask, bank.draw(batch, generator)[rows], image

    trainer = Trainer(ContrastiveTraining(model), data, run, train=recipe.train, optim={"text_encoder": recipe.optim})
    trainer.fit()
    with trainer.ema_weights(), atomic_folder(run.directory / "text_encoder") as aside:
        text_encoder.save_pretrained(aside)
    with atomic_folder(run.directory / "tokenizer") as aside:
        tokenizer.save_pretrained(aside)
    return run.directory
