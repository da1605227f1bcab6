"""fewstep prefs from models to a reward: the images, a judge's votes, the ranking, the head."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner
from voting import LABELS, PROMPTS, write_images

from fewstep.cli.main import app
from fewstep.core.registry import rewards, scorers
from fewstep.data.preferences import preference_pairs, read_votes
from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import parse_params
from fewstep.models.pipeline import load
from fewstep.preferences.contenders import parse_contenders
from fewstep.preferences.pool import generate_images
from fewstep.preferences.schedule import schedule
from fewstep.preferences.session import VotingSession
from fewstep.preferences.vote_log import VoteLog
from fewstep.preferences.voters import Judge, cast_votes, is_human, open_judge
from fewstep.rewards.protocol import RewardInfo


class Brightness:
    """The mean of all pixels; it has embeddings, and no score for a prompt with "ducks"."""

    name, info = "brightness", RewardInfo(True, (0.0, 1.0), "none")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        known = torch.tensor(["ducks" not in prompt for prompt in prompts])
        return torch.where(known, images.mean((1, 2, 3)), math.nan)

    def embeddings(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return images.mean((2, 3)), torch.ones(len(prompts), 3)


class Redness:
    name = "redness"

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        red = images[..., 0].float().mean((1, 2))
        return {"red": red, "nothing": torch.full_like(red, math.nan)}


@pytest.fixture(autouse=True)
def judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rewards._entries, "brightness", Brightness)
    monkeypatch.setitem(scorers._entries, "redness", Redness)
    monkeypatch.setitem(scorers._entries, "brightness", Redness)


def session(folder: Path, log: VoteLog, voter: str = "judge", models: Sequence[str] = LABELS) -> VotingSession:
    return VotingSession(log, schedule(models, len(PROMPTS), 0), PROMPTS, voter)


def invoke(*words: object) -> str:
    done = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "120", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    return done.output


def test_labels_and_settings(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "first-run" / "student"
    run.parent.mkdir()
    run.symlink_to(tiny_folder)
    specs = [str(tiny_folder), f"{tiny_folder}@steps=2,sampler=sde", f"slow={tiny_folder}@steps=9", str(run)]
    found = parse_contenders(specs, seed=5, steps=3)
    name = tiny_folder.name
    assert [one.label for one in found] == [name, f"{name}@steps=2,sampler=sde", "slow", "first-run"]
    assert [one.steps for one in found] == [3, 2, 9, 3]
    assert {one.params.seed for one in found} == {5}
    assert parse_contenders([specs[0], f"{specs[0]}@seed=1000"], seed=5)[1].params.seed == 1000
    assert found[1].params.sampler == "sde"
    assert parse_contenders(specs[:2])[0].steps == 6  # the model's own


def test_images_are_made_once_and_with_one_seed(tiny_folder: Path, tmp_path: Path) -> None:
    specs = [f"a={tiny_folder}@steps=1", f"b={tiny_folder}@steps=2"]
    contenders = parse_contenders(specs, seed=3)
    order = schedule("ab", len(PROMPTS), 3)
    assert generate_images(tmp_path, contenders, PROMPTS, order[:2], "cpu") == 4
    assert generate_images(tmp_path, contenders, PROMPTS, order, "cpu") == 2 * len(PROMPTS) - 4
    assert generate_images(tmp_path, contenders, PROMPTS, order, "cpu") == 0
    expected = generate(load(tiny_folder, "cpu"), PROMPTS, parse_params({"seed": 3, "steps": 2})).images
    for number, image in enumerate(expected):
        with Image.open(tmp_path / "images" / "b" / f"{number:04d}.png") as png:
            difference = torch.from_numpy(np.array(png)).int() - image.int()
        assert difference.abs().max() <= 1  # rounding: the batches are others
    with pytest.raises(UserError, match=r"a: holds images of another generation \(other seed\); use another --out, or"):
        generate_images(tmp_path, parse_contenders(specs, seed=4), PROMPTS, order, "cpu")


def test_a_judge_prefers_higher_scores(tmp_path: Path) -> None:
    write_images(tmp_path, (*LABELS, "copy-of-student"))
    for file in (tmp_path / "images" / "copy-of-student").iterdir():
        file.write_bytes((tmp_path / "images" / LABELS[1] / file.name).read_bytes())
    judge = open_judge("brightness")
    assert judge.name == "reward:brightness"
    with VoteLog(tmp_path / "votes.jsonl") as log:
        own = session(tmp_path, log, judge.name, (*LABELS, "copy-of-student"))
        assert cast_votes(own, judge) == 3  # of the prompt without scores
        assert (own.done, own.total) == (9, 12)
        assert cast_votes(own, judge) == 3  # nothing else is left
    for vote in read_votes(tmp_path):
        models = {"left": vote.left.model, "right": vote.right.model}
        if LABELS[0] in models.values():
            assert models[vote.choice] != LABELS[0]  # the student's images have more red
        else:
            assert vote.choice == "tie"
    assert {pair.winner.parent.name for pair in preference_pairs(tmp_path)} == {LABELS[1], "copy-of-student"}


def test_an_interrupted_judge_continues(tmp_path: Path) -> None:
    write_images(tmp_path)
    calls = 0

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt

    with VoteLog(tmp_path / "votes.jsonl") as log:
        own = session(tmp_path, log)
        prompt, left, right = own.pending()[0]
        own.record(prompt, left, right, "left")
        with pytest.raises(KeyboardInterrupt, match=r"1 of 4 pairs have a vote in .*votes\.jsonl; the same command"):
            cast_votes(own, Judge("judge", score))
        assert calls == 1
        assert [each[0] for each in own.pending()] != [prompt]
        assert len(own.pending()) == 3


def test_names_of_judges() -> None:
    assert open_judge("redness").name == "scorer:redness"
    assert open_judge("scorer:brightness").name == "scorer:brightness"
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0] = 1
    assert open_judge("redness").score(images, ["a", "b"]).tolist() == [0, 255]
    assert is_human("human")
    assert is_human("human:me")
    assert not is_human("redness")


def test_from_models_to_a_reward(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = [f"picture number {number}" for number in range(10)]
    Path("prompts.txt").write_text("\n".join([*prompts, prompts[0]]), encoding="utf-8")  # one twice
    words = [f"a={tiny_folder}@steps=1", f"b={tiny_folder}@steps=2", f"c={tiny_folder}@steps=1,guidance_scale=0"]
    collect = ["prefs", "collect", *words, "--prompts", "prompts.txt", "--out", "votes", "--voter", "brightness"]
    assert "20 of 20 pairs have a vote of reward:brightness" in invoke(*collect, "--count", 20)
    assert "30 of 30 pairs" in invoke(*collect)
    assert len(read_votes("votes")) == 30

    output = invoke("prefs", "rank", "votes")
    assert "30 votes on 10 prompts (reward:brightness 30)" in output
    ranking = json.loads(Path("votes/rank.json").read_text(encoding="utf-8"))
    assert {one["model"] for one in ranking["models"]} == {"a", "b", "c"}
    assert Path("votes/rank.png").is_file()

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the judge is no evaluation scorer
        output = invoke("prefs", "train", "votes", "--out", "head", "--features", "reward:brightness")
    assert "agreement with held-out votes: " in output
    head = json.loads(Path("head/preference.json").read_text(encoding="utf-8"))
    assert head["held_out_agreement"]["share"] >= 0.8
    assert head["voters"] == {"reward:brightness": 30}
    output = invoke(*collect[:-1], "preference:head", "--count", 6)
    assert "6 of 6 pairs have a vote of reward:preference:head" in output
