"""The fleet's parts without Ray's processes: settings, lost replicas, the application in a replica."""

from __future__ import annotations

import asyncio
import builtins
import json

import pytest

from fewstep.errors import UserError
from fewstep.serve.fleet import FleetSettings, app, fitted
from fewstep.serve.settings import read_settings

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request
from starlette.responses import StreamingResponse

from fewstep.serve.gateway import ATTEMPTS, Gateway, answered, event_key, joined_metrics, lora_names
from fewstep.serve.images import AS_URLS
from fewstep.serve.replica import messages

START = {"type": "http.response.start", "status": 200, "headers": []}


def event(kind, **content):
    data = json.dumps({"type": f"image_generation.{kind}", **content})
    return {"type": "http.response.body", "body": f"event: image_generation.{kind}\ndata: {data}\n\n".encode()}


class Replicas:
    """Each attempt sends the next list of messages; an exception in it is raised."""

    def __init__(self, *attempts):
        self.attempts, self.sent = list(attempts), []

    async def __call__(self, scope, body, loras):
        self.sent.append((scope, body, loras))
        for message in self.attempts.pop(0):
            if isinstance(message, Exception):
                raise message
            yield message


def collect(replicas, body=b"{}"):
    async def run():
        return [message async for message in answered(replicas, {}, body)]

    return asyncio.run(run())


def test_a_lost_replica_is_replaced_and_nothing_is_sent_twice():
    partial, progress = event("partial_image", index=0, partial_image_index=0), event("progress", index=0, step=1)
    queued, done = event("queued", images_ahead=0), event("completed", index=0)
    replicas = Replicas(
        [START, queued, progress, partial, ActorDiedError()],
        [ActorDiedError()],
        [START, queued, progress, partial, done],
    )
    assert collect(replicas, b'{"lora": {"b": 1, "a": 0.5}}') == [START, queued, progress, partial, queued, done]
    assert [loras for _, _, loras in replicas.sent] == ['["a", "b"]'] * 3


def test_a_request_that_ends_every_replica_is_given_up():
    with pytest.raises(ActorDiedError):
        collect(Replicas(*[[ActorDiedError()]] * ATTEMPTS, [START]))
    last = collect(Replicas(*[[START, ActorDiedError()]] * ATTEMPTS))[-1]["body"].decode()
    assert last.startswith("event: error\n")
    assert json.loads(last.partition("data: ")[2])["error"]["code"] == "replicas_lost"


def test_a_full_queue_is_no_reason_to_try_again():
    full = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    replicas = Replicas([full], [START])
    with pytest.raises(BackPressureError):
        collect(replicas)
    assert len(replicas.sent) == 1
    assert collect(Replicas([START, ActorDiedError()], [full]))[-1]["body"].startswith(b"event: error\n")


def test_an_error_after_a_stream_began_is_its_last_event():
    error = {"type": "http.response.body", "body": b'{"error": {"code": "timeout"}}'}
    sent = collect(Replicas([START, ActorDiedError()], [{**START, "status": 504}, error]))
    assert sent == [START, {**error, "body": b'event: error\ndata: {"error": {"code": "timeout"}}\n\n'}]


class Handle:
    """Replicas as the gateway calls them: each request gets these messages, after some seconds."""

    def __init__(self, *sent, seconds=0.0):
        self.sent, self.seconds, self.requests, self.cancelled = sent, seconds, [], 0

    def options(self, **options):
        return self

    def remote(self, scope, body):
        self.requests.append((dict(scope["headers"]), body))
        return self

    async def __aiter__(self):
        await asyncio.sleep(self.seconds)
        for message in self.sent:
            if isinstance(message, Exception):
                raise message
            yield message

    def cancel(self):
        self.cancelled += 1


def through_gateway(handle, body=b"{}", headers=(), timeout=60.0, gateway=None, path=None):
    """Status, headers and content of the answer; with a path, to a GET request."""

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def run():
        scope = {"type": "http", "method": "POST", "path": "/v1/images/generations", "headers": [*headers]}
        scope |= {} if path is None else {"method": "GET", "path": path}
        scope |= {"query_string": b"", "server": ("127.0.0.1", 8000), "scheme": "http"}
        answer = await (gateway or Gateway(handle, timeout))(Request(scope, receive))
        if not isinstance(answer, StreamingResponse):
            return answer.status_code, answer.headers, answer.body
        return answer.status_code, answer.headers, b"".join([part async for part in answer.body_iterator])

    return asyncio.run(run())


def test_the_gateway_passes_answers_on_and_gives_each_request_a_key():
    start = {**START, "status": 400, "headers": [(b"content-type", b"application/json")]}
    handle = Handle(start, {"type": "http.response.body", "body": b'{"error": 1}'})
    status, headers, content = through_gateway(handle, b'{"prompt": ""}')
    assert (status, headers["content-type"], content) == (400, "application/json", b'{"error": 1}')
    through_gateway(handle, headers=[(b"idempotency-key", b"mine")])
    keys = [sent[b"idempotency-key"] for sent, _ in handle.requests]
    assert len(keys[0]) == 32
    assert keys[1] == b"mine"


def test_the_gateway_keeps_images_with_a_url():
    images = [{"b64_json": "Zm94", "seed": 1}, {"seed": 2}]  # of the second one the filter withholds the content
    content = json.dumps({"created": 1, "data": images, "output_format": "webp"}).encode()
    start = {**START, "headers": [(AS_URLS.encode(), b"1")]}
    parts = [{"type": "http.response.body", "body": each} for each in (content[:20], content[20:])]
    gateway = Gateway(Handle(start, *parts), 60.0)
    status, headers, made = through_gateway(None, gateway=gateway)
    first, second = json.loads(made)["data"]
    assert (status, AS_URLS in headers, second) == (200, False, {"seed": 2})
    assert first.keys() == {"seed", "url"}
    path = first["url"].removeprefix("http://127.0.0.1:8000")
    status, headers, found = through_gateway(None, gateway=gateway, path=path)
    assert (status, headers["content-type"], found) == (200, "image/webp", b"fox")
    assert through_gateway(None, gateway=gateway, path="/images/other.webp")[0] == 404
    lost = {"type": "http.response.body", "body": b'event: error\ndata: {"error": {}}\n\n'}
    assert through_gateway(Handle(start, parts[0], lost))[0] == 503


def test_errors_of_the_gateway_have_openais_form():
    full = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    slow = Handle(START, seconds=30)
    answers = [
        through_gateway(Handle(full)),
        through_gateway(slow, timeout=0.1),
        through_gateway(Handle(ActorDiedError())),
        through_gateway(Handle(START), b"x" * 2**19),
    ]
    assert [status for status, _, _ in answers] == [429, 504, 503, 413]
    codes = [json.loads(content)["error"]["code"] for _, _, content in answers]
    assert codes == ["queue_full", "timeout", "replicas_lost", None]
    assert int(answers[0][1]["retry-after"]) >= 1
    assert slow.cancelled == 1


@pytest.mark.parametrize("body", [b"", b"\xff", b"[1]", b"[" * 100_000, b'{"lora": 3}', b'{"lora": {}}', b'{"a": 1}'])
def test_bodies_without_lora_files(body):
    assert lora_names(body) == ""


def test_plain_answers_are_no_events():
    assert event_key(b'{"data": "event: image_generation.completed"}') is None
    assert event_key(b"event: error\ndata: {}\n\n") is None
    assert event_key(event("completed", index=1)["body"]) == event_key(event("completed", index=1, seed=2)["body"])


def test_metrics_of_replicas_are_told_apart():
    page = '# HELP a b\n# TYPE a counter\na{x="}"} 1.0\n# HELP c d\n# TYPE c gauge\nc 2.0\n'
    assert joined_metrics({"one": page, "two": page}).splitlines() == [
        *("# HELP a b", "# TYPE a counter", 'a{replica="one",x="}"} 1.0', 'a{replica="two",x="}"} 1.0'),
        *("# HELP c d", "# TYPE c gauge", 'c{replica="one"} 2.0', 'c{replica="two"} 2.0'),
    ]


def test_an_application_in_a_replica_sees_the_body_and_the_disconnection():
    seen = []

    async def application(scope, receive, send):
        seen.append((await receive())["body"])
        await send(START)
        seen.append((await receive())["type"])

    async def run():
        answer = messages(application, {"type": "http"}, b"body")
        assert await anext(answer) == START
        await answer.aclose()

    asyncio.run(run())
    assert seen == [b"body", "http.disconnect"]


def test_an_application_that_fails_before_it_answers():
    async def application(scope, receive, send):
        raise ZeroDivisionError

    async def run():
        return [message async for message in messages(application, {}, b"")]

    with pytest.raises(ZeroDivisionError):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "model is missing"),
        ({"model": "micro", "replica": "2"}, "unknown key replica; did you mean replicas?"),
        ({"model": "micro", "replicas": "0"}, "replicas: input should be greater than or equal to 1"),
        ({"model": "micro", "replicas": "many"}, "replicas: input should be a valid integer"),
        ({"model": "micro", "replicas": 3, "max_replicas": 2}, "max_replicas: 2 is less than replicas, 3"),
        ({"model": "micro", "gpus": "-1"}, "gpus: input should be greater than or equal to 0"),
        ({"model": "micro", "dtype": "int8"}, "dtype: input should be 'fp32', 'bf16', 'fp8' or 'fp16'"),
        ({"model": "micro", "port": 80}, "unknown key port"),
    ],
)
def test_mistakes_in_the_arguments(args, message):
    with pytest.raises(UserError) as failed:
        app(args)
    assert message in str(failed.value)
    assert "\n" not in str(failed.value)


def test_arguments_of_serve_run_are_text():
    values = {"model": "micro", "replicas": "2", "gpus": "0.5", "log_prompts": "true", "timeout": "9"}
    fleet = read_settings(FleetSettings, values)
    assert (fleet.replicas, fleet.gpus, fleet.log_prompts, fleet.timeout, fleet.most) == (2, 0.5, True, 9.0, 2)


def test_replicas_share_the_machine():
    fleet = FleetSettings(model="micro", replicas=2)
    without, on_gpus = fitted(fleet, 9, 0), fitted(fleet, 8, 2)
    assert [(each.cpus, each.gpus) for each in (without, on_gpus)] == [(4, 0), (4, 1)]
    for cpus, gpus in ((1, 0), (8, 1)):
        with pytest.raises(UserError, match="--replicas: 2 replicas need as many"):
            fitted(fleet, cpus, gpus)


def test_without_ray_the_message_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without_ray(name, *args):
        if name.partition(".")[0] == "ray":
            raise ImportError("no ray", name="ray")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(UserError, match=r"several replicas need the package ray: pip install 'fewstep\[fleet\]'"):
        app({"model": "micro"})
