from __future__ import annotations

import itertools

import openai
import pytest

MESSAGES = [{"role": "user", "content": "one two three"}]
PATHS = ["/v1/models", "/v1/models/fake/model", "/metrics", "/nothing", "/v1/chat/completions"]
WRONG_KEYS = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "Bearer sesamé".encode()},
    {"Authorization": "Basic sesame"},
    {"x-api-key": "wrong"},
]


def test_models_say_how_long_a_context_may_be(server):
    (model,) = server.openai.models.list().data
    assert (model.id, model.object) == ("fake/model", "model")
    assert model.context_length == model.max_model_len == 64
    assert not hasattr(model, "max_tokens")
    assert server.openai.models.retrieve("fake/model").context_length == 64


def test_an_unknown_model_is_not_found(server):
    with pytest.raises(openai.NotFoundError) as error:
        server.openai.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found"
    assert "'fake/model'" in error.value.message


def test_health(server):
    assert server.http.get("/health").json() == {"status": "ok", "model": "fake/model"}


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/api/v1/models", "/api/tags", "/v1/chat", "/v1/chat/completions/", "/%00"]
)
def test_an_unknown_path_is_a_404_in_openais_shape(server, path):
    answer = server.http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_a_wrong_method_is_a_405_that_names_the_right_one(server, method):
    answer = server.http.request(method, "/v1/chat/completions")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_other_origins_get_no_permission(server):
    answer = server.http.get("/v1/models", headers={"Origin": "http://evil.example"})
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_without_the_key_nothing_but_health_is_open(start):
    server = start(api_key="sesame")
    for path, headers in itertools.product(PATHS, WRONG_KEYS):
        answer = server.http.get(path, headers=headers)
        assert answer.status_code == 401, (path, headers)
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert "sesame" not in answer.text
        assert server.http.get("/health", headers=headers).status_code == 200


def test_the_key_opens(start):
    server = start(api_key="sesame")
    assert server.openai.chat.completions.create(model="any", messages=MESSAGES).choices
    assert server.http.get("/v1/models", headers={"x-api-key": "sesame"}).status_code == 200
    assert server.http.get("/v1/models", headers={"Authorization": "bearer sesame"}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.openai.with_options(api_key="wrong").models.list()


def test_metrics_add_up(start):
    server = start()
    for stream in (False, True):
        server.http.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": stream})
    server.http.post("/v1/chat/completions", json={})
    server.http.get("/nothing/here")
    expected = {
        'requests_total{path="/v1/chat/completions",status="200"}': 2,
        'requests_total{path="/v1/chat/completions",status="400"}': 1,
        'requests_total{path="other",status="404"}': 1,
        'answers_total{reason="stop"}': 2,
        "prompt_tokens_total": 6,
        "cached_tokens_total": 2,
        "scored_tokens_total": 200,
        "kept_tokens_total": 50,
        "completion_tokens_total": 10,
        "verify_steps_total": 8,
        "committed_tokens_total": 28,
        "time_to_first_token_seconds_count": 2,
        "answer_seconds_count": 2,
        'accept_length_bucket{le="3.0"}': 0,
        'accept_length_bucket{le="4.0"}': 2,
        "keep_ratio_sum": 0.5,
        "pages_used": 3,
        "pages_total": 10,
        "queue_depth": 0,
    }
    assert {name: server.metric(f"dflash_jax_{name}") for name in expected} == expected
    assert server.http.get("/metrics").headers["content-type"].startswith("text/plain")
