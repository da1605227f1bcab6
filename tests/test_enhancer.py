"""Prompts revised by a language model: by an endpoint, a local model, or the image model's own text encoder."""

from __future__ import annotations

import time

import openai
import pytest
import torch
from chat_server import running_chat
from language_models import micro_tokenizer, random_model, save_language_model, teach, with_text_encoder
from serve_setup import make_service, open_image, pixels, running
from test_generate_cli import assert_one_error, run
from transformers import Qwen3Model

from fewstep.errors import UserError
from fewstep.inference.enhancer import KEY, TEMPLATE, Endpoint, Enhancer, enhancer_for, parse_answer, quoted
from fewstep.inference.generate import generate
from fewstep.inference.image_metadata import read_metadata
from fewstep.inference.params import SamplingParams
from fewstep.models.language_model import open_language_model, text_encoder_with_head
from fewstep.models.pipeline import load

CPU = torch.device("cpu")
GOOD = "A fox wants snow.</think> <prompt>A red fox in deep snow,\nwith a sign “Café”</prompt>"
REVISED = "A red fox in deep snow, with a sign “Café”"


@pytest.fixture
def server():
    with running_chat() as server:
        yield server


def enhancer(server, tmp_path, **options):
    return Enhancer(Endpoint(server.spec), cache=tmp_path / "cache", **options)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (GOOD, REVISED),
        ("<think><prompt>draft</prompt></think><prompt>final</prompt>", "final"),
        ("<prompt>one</prompt> or <prompt>two</prompt>", "two"),
        ("I put it between <prompt> and </prompt>: <prompt>a fox</prompt>", "a fox"),
    ],
)
def test_the_prompt_is_taken_from_the_answer(answer, expected):
    assert parse_answer(answer) == expected


@pytest.mark.parametrize("answer", ["", "a fox", "<prompt>a fox", "<prompt> </prompt>", "<prompt>a</prompt></think>no"])
def test_an_answer_without_a_prompt(answer):
    with pytest.raises(UserError, match="no revised prompt, or was cut off"):
        parse_answer(answer)


def test_texts_in_quotation_marks():
    assert quoted('a sign "OPEN  24h", „Käse“, 「营业中」, «à», “it’s”, and 6" of 7') == [
        *("OPEN  24h", "Käse", "营业中", "à", "it’s"),
    ]


def test_an_endpoint_revises_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    server.plan = [(200, GOOD, 0.0)]
    for _ in range(2):
        assert enhancer(server, tmp_path)('a fox, "Café"').prompt == REVISED
    (sent,) = server.requests
    assert (sent["model"], sent["messages"][0]["content"]) == ("tiny-vlm", TEMPLATE)
    assert sent["messages"][1]["content"] == 'a fox, "Café"'
    assert server.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        ((200, GOOD, 0.0), "lost the quoted text 'Bar'"),
        ((200, "no idea", 0.0), "no revised prompt"),
        ((200, GOOD, 1.0), "no answer within 0.2 s"),
        ((503, "busy", 0.0), "no answer within"),
        ((401, "who?", 0.0), "was refused: 401"),
    ],
)
def test_the_original_prompt_is_kept(server, tmp_path, plan, problem):
    server.plan = [plan] * 2
    revises = enhancer(server, tmp_path, seconds=0.2)
    prompt = 'a fox, "Bar"'
    assert revises(prompt).prompt == prompt
    assert problem in revises(prompt).problem
    assert len(server.requests) == 2  # nothing was cached


def test_a_prompt_that_the_image_model_cannot_take_is_not_used(server, tmp_path, tiny_folder):
    server.plan = [(200, f"<prompt>{'fox ' * 900}</prompt>", 0.0)]
    revises = enhancer_for(tiny_folder, Endpoint(server.spec))
    revises.cache.folder = tmp_path
    revision = revises("a fox")
    assert (revision.prompt, "at most 512 fit" in revision.problem) == ("a fox", True)


def test_a_local_model_answers_greedily_and_stops_in_time(tmp_path):
    folder = save_language_model(random_model(), tmp_path / "model")
    model = open_language_model(folder, CPU)
    assert model.answer("be brief", "a fox", 8, 60.0) == model.answer("be brief", "a fox", 8, 60.0)
    start = time.monotonic()
    model.answer("be brief", "a fox", 100_000, 0.3)
    assert time.monotonic() - start < 10
    revision = Enhancer(model, cache=tmp_path / "cache", seconds=0.3)("a fox")
    assert (revision.prompt, "or was cut off" in revision.problem) == ("a fox", True)
    with pytest.raises(UserError, match="no causal language model can be loaded"):
        open_language_model(tmp_path, CPU)


@pytest.fixture(scope="module")
def taught(tiny_folder, tmp_path_factory):
    """An image model whose text encoder knows one answer."""
    model = teach(random_model(seed=1), "a fox", "<prompt>a red fox</prompt>")
    return with_text_encoder(tiny_folder, model, tmp_path_factory.mktemp("models") / "taught")


def test_the_command_shows_records_and_repeats_the_revised_prompt(taught, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    image, plain, again = (tmp_path / f"{name}.png" for name in ("image", "plain", "again"))
    done = run("generate", taught, "a fox", "--enhance", "--steps", 1, "-o", image)
    assert done.exit_code == 0, done.output
    assert "revised prompt: a red fox" in done.stderr
    made = read_metadata(image)
    assert (made.prompt, made.extras.original_prompt) == ("a red fox", "a fox")
    assert run("generate", taught, "a red fox", "--steps", 1, "-o", plain).exit_code == 0
    assert read_metadata(plain).extras.original_prompt is None
    assert run("generate", "--from", image, "-o", again).exit_code == 0
    assert again.read_bytes() == image.read_bytes() != plain.read_bytes()


def test_a_saved_student_keeps_its_text_encoders_head(taught, tiny_folder, tmp_path):
    student = load(taught, "cpu").save(tmp_path / "student")
    pipeline = load(student, "cpu")
    assert isinstance(pipeline.text_encoder, Qwen3Model)
    model = text_encoder_with_head(student, pipeline.text_encoder, pipeline.tokenizer)
    assert model.answer(TEMPLATE, "a fox", 50, 60.0) == "<prompt>a red fox</prompt>"
    with pytest.raises(UserError, match="has no language head to revise prompts with"):
        text_encoder_with_head(tiny_folder, pipeline.text_encoder, pipeline.tokenizer)


def test_a_head_of_its_own_is_read_from_the_file(tiny_folder, tmp_path):
    model = random_model(seed=2, tie_word_embeddings=False)
    folder = with_text_encoder(tiny_folder, model, tmp_path / "untied")
    encoder = load(folder, "cpu").text_encoder
    shared = text_encoder_with_head(folder, encoder, micro_tokenizer())
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(shared.model(tokens).logits, model(tokens).logits)


def test_the_server_revises_where_a_request_wants_it(taught, tmp_path):
    pipeline = load(taught, "cpu")
    revises = enhancer_for(taught, text_encoder_with_head(taught, pipeline.text_encoder, pipeline.tokenizer))
    revises.cache.folder = tmp_path
    with running(make_service(pipeline, enhancer=revises)) as server:
        options = {"seed": 2, "steps": 1, "enhance": True}
        made = server.client.images.generate(prompt="a fox", extra_body=options)
        assert made.data[0].revised_prompt == "a red fox"
        expected = generate(pipeline, ["a red fox"], SamplingParams(seed=2, steps=1)).images[0]
        assert torch.equal(pixels(open_image(made.data[0].b64_json)), expected)
        (event,) = server.client.images.generate(prompt="a fox", stream=True, extra_body=options)
        assert event.revised_prompt == "a red fox"
        kept = server.client.images.generate(prompt="a bear", extra_body=options)
        assert kept.data[0].revised_prompt is None
        assert server.client.models.list().data[0].enhancer is True


def test_a_server_without_a_language_model_refuses(tiny):
    with running(make_service(tiny)) as server, pytest.raises(openai.BadRequestError, match="no language model for it"):
        server.client.images.generate(prompt="a fox", extra_body={"enhance": True})


def test_mistakes_are_found_before_a_model_is_loaded(tiny_folder, tmp_path):
    words = ("generate", tiny_folder, "a fox", "-o", tmp_path / "a.png", "--enhance")
    assert_one_error(run(*words), "has no language head")
    assert_one_error(run(*words, "--enhancer", tmp_path / "nowhere"), "no such folder")
    assert_one_error(run(*words, "--enhancer", "http://localhost"), "give URL#MODEL")
