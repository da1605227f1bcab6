"""Malformed requests: every field of the API, and bodies of any kind. No answer is a 500, and the server lives."""

from __future__ import annotations

import http.client
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_setup import make_service, running

from fewstep.serve.schema import GenerationRequest

FIELDS = sorted(GenerationRequest.model_fields)
SMALL = {"prompt": "a fox", "steps": 1, "size": "16x16"}

text = st.text(st.characters(), max_size=40)  # lone surrogates included
scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(-2, 3) | st.floats() | text
    | st.sampled_from([2**64, 2**63, -1, 10**400, "16x16", "0x16", "99999x16", "16X16", "auto", "png", "b64_json", ""])
)  # fmt: skip
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3))
fields = st.dictionaries(st.sampled_from(FIELDS) | text, values, max_size=4)


@pytest.fixture(scope="module")
def server(tiny):
    """Images of a few pixels, so that valid requests among the others are quick."""
    with running(make_service(tiny, max_pixels=16 * 32, max_steps=2, max_images=2)) as server:
        yield server


def send(server, body, path="/v1/images/generations", content_type="application/json", method="POST"):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path, body, {"Content-Type": content_type})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def check(server, body, **more):
    status, content = send(server, body, **more)
    assert status in (200, 400, 401, 404, 405, 413), (status, content, body)
    if status >= 400:
        error = json.loads(content)["error"]
        assert isinstance(error["message"], str)
        assert "\n" not in error["message"]
        assert len(error["message"]) < 2000
    elif b"event: error" in content:
        assert b"internal_error" not in content, (content, body)


def fuzz_fields(server, changes):
    check(server, json.dumps(SMALL | changes))


def fuzz_bodies(server, body):
    check(server, body)


quick = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=40, derandomize=True, **quick)
@given(changes=fields)
def test_fields(server, changes):
    fuzz_fields(server, changes)


@settings(max_examples=20, derandomize=True, **quick)
@given(body=st.binary(max_size=100) | values.map(lambda value: json.dumps(value).encode()))
def test_bodies(server, body):
    fuzz_bodies(server, body)


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_with_values_of_every_type(server, field):
    for value in (None, True, -1, 10**400, 1.5, float("nan"), "", "\ud800", "x" * 5000, [], [1], {}, {"a": None}):
        if field != "prompt" or not isinstance(value, str):
            check(server, json.dumps({**SMALL, field: value}))


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/models", "/images/x", "/", "/health", "/v1/none"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_methods_and_paths(server, path, method):
    check(server, b"{}", path=path, method=method)


@pytest.mark.slow
@settings(max_examples=3000, **quick)
@given(changes=fields)
def test_many_fields(server, changes):
    fuzz_fields(server, changes)


@pytest.mark.slow
@settings(max_examples=2000, **quick)
@given(body=st.binary() | values.map(lambda value: json.dumps(value).encode()))
def test_many_bodies(server, body):
    fuzz_bodies(server, body)
