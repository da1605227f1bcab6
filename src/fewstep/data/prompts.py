"""Prompts from text files, and those of the emoji world."""

from collections.abc import Sequence
from pathlib import Path

from fewstep.config.sections import PromptSettings
from fewstep.data.prompt_shards import PromptShards
from fewstep.emoji.dataset import TEMPLATES, EmojiDataset
from fewstep.errors import UserError


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a UTF-8 text file, one a line; blank lines are left out.

    Raises: UserError if the file cannot be read, is not UTF-8 or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a UTF-8 text file") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path}: no prompts in it; write one a line")
    return prompts


def training_prompts(settings: PromptSettings) -> Sequence[str]:
    """The emoji world's prompts in every wording, the lines of a text file, or what ``fewstep prompts`` made."""
    if settings.source != "emoji":
        folder = Path(settings.source)
        return PromptShards(folder) if folder.is_dir() else read_prompts(folder)
    world = EmojiDataset.load()
    concepts = world.concepts(settings.split)
    return [world.prompt(concept, wording) for concept in concepts for wording in range(len(TEMPLATES["en"]))]
