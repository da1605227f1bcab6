"""Requests drawn from the server's own OpenAPI schema, and its edges: no 500, and answers as the schema has them."""

from __future__ import annotations

import io
import json
import urllib.request

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serve_setup import make_service, running

SMALL = {"prompt": "a fox", "steps": 1, "size": "16x16"}
MOST = 2**40  # of a number without a bound
EDGES = st.sampled_from([None, True, "", "\x00", -1, 0, 1e308, "NaN", [], {}, [[]], {"": 1}, "狐狸" * 50])


@pytest.fixture(scope="module")
def server(tiny):
    with running(make_service(tiny, max_pixels=16 * 32, max_steps=2, max_images=2)) as server:
        server.http = httpx2.Client(base_url=server.url, timeout=60)
        with urllib.request.urlopen(f"{server.url}/openapi.json") as answer:
            server.schema = json.load(answer)
        yield server
        server.http.close()


def png(size):
    buffer = io.BytesIO()
    Image.new("RGBA", size, (9, 9, 9, 0)).save(buffer, "PNG")
    return buffer.getvalue()


FILES = st.sampled_from([png((16, 16)), png((32, 16)), png((17, 16)), png((16, 16))[:60], b""]) | st.binary(max_size=60)


def values(schema):
    """Values of a JSON schema."""
    if "anyOf" in schema:
        return st.one_of([values(each) for each in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    if schema.get("format") == "binary":
        return FILES
    low, high = (schema.get(key, schema.get(f"exclusive{key.title()}")) for key in ("minimum", "maximum"))
    if schema["type"] == "string":
        return st.text(min_size=schema.get("minLength", 0), max_size=min(20, schema.get("maxLength", 20)))
    if schema["type"] == "integer":
        return st.integers(-MOST if low is None else low, MOST if high is None else high)
    if schema["type"] == "number":
        return st.floats(low, high, allow_nan=False, allow_infinity=False)
    if schema["type"] == "object":
        return st.dictionaries(st.text(max_size=5), values(schema["additionalProperties"]), max_size=2)
    return {"boolean": st.booleans(), "null": st.none()}[schema["type"]]


def bodies(server, path):
    """Bodies of an operation: small requests with some fields drawn, most of them as the schema has them."""
    (content,) = server.schema["paths"][path]["post"]["requestBody"]["content"].values()
    schema = content["schema"]
    if "$ref" in schema:
        schema = server.schema["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    drawn = {name: st.one_of(*[values(field)] * 5, EDGES) for name, field in schema["properties"].items()}
    drawn["size"] |= st.sampled_from(["16x16", "32x16", "auto"])
    return st.fixed_dictionaries({}, optional=drawn).map(lambda fields: SMALL | fields)


def check(server, answer):
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert "\n" not in answer.json()["error"]["message"]
    elif answer.headers["content-type"] == "application/json":
        wanted = server.schema["components"]["schemas"]["ImagesAnswer"]
        assert set(wanted["required"]) <= set(answer.json()) <= set(wanted["properties"])
    else:
        assert "internal_error" not in answer.text


QUICK = {"max_examples": 25, "deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(**QUICK)
@given(data=st.data())
def test_generations(server, data):
    body = data.draw(bodies(server, "/v1/images/generations"))
    answer = server.http.post("/v1/images/generations", json=body)
    check(server, answer)


@settings(**QUICK)
@given(data=st.data())
def test_edits(server, data):
    fields = data.draw(bodies(server, "/v1/images/edits"))
    files = {name: fields.pop(name) for name in ("image", "mask") if isinstance(fields.get(name), bytes)}
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    answer = server.http.post("/v1/images/edits", data=form, files={"image": png((16, 16)), **files})
    check(server, answer)


def test_the_schema_names_every_field(server):
    properties = server.schema["components"]["schemas"]["GenerationRequest"]["properties"]
    assert {"lora", "enhance", "seed", "steps", "negative_prompt"} <= set(properties)
    assert all("description" in properties[name] for name in ("lora", "enhance", "seed", "steps"))
