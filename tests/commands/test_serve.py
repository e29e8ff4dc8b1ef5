"""`serve` through a real server: OpenAI's client, what is refused, limits, and how requests and servers end."""

import http.client
import json
import math
import signal
import socket
import time

import pytest
import torch
from processes import send, start, wait
from processes import until as until_there
from serving import TURNS, Gate, chat_run, serving, until

from trainer.__main__ import dispatch
from trainer.commands.serve import ServeConfig
from trainer.core.errors import UserError
from trainer.data.tokenizers import get_tokenizer
from trainer.inference.decoding import TokenEvent, complete

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from trainer.commands.serve import launch
from trainer.commands.serve.launch import open_models
from trainer.commands.serve.models import ServedModel
from trainer.commands.serve.replies import finite
from trainer.commands.serve.text import Answer, Spelling


@pytest.fixture(scope="module")
def models(finished, tmp_path_factory):
    chat = chat_run(tmp_path_factory.mktemp("conversations"))
    return open_models(ServeConfig(runs=[str(finished), str(chat)], device="cpu"))


@pytest.fixture(scope="module")
def address(models):
    with serving(models, max_body_bytes=4096, max_new_tokens=64, max_texts=4, max_prompt_tokens=60) as found:
        yield found


@pytest.fixture
def client(address):
    openai = pytest.importorskip("openai", reason="needs OpenAI's client")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as found:
        yield found


def ask(address, body, path="/v1/completions", method="POST", **headers):
    """The status and content of an answer, without OpenAI's client."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if content[:1] == b"{" else content.decode(), answer.headers


def expected(model, prompts, count, **options):
    return complete(model.opened, model.tokenizer, prompts, count, [], say=lambda line: None, **options)


# -- answers -------------------------------------------------------------------------------------------------------------------


def test_models_are_listed(client, models):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["run", "chat"]
    assert [model.chat for model in listed] == [False, True] and [model.step for model in listed] == [12, 2]
    assert client.models.retrieve("chat").context == models["chat"].context


def test_a_completion_is_what_generate_writes(client, models):
    asked = {"model": "run", "prompt": "the cat", "max_tokens": 20, "seed": 5, "temperature": 0.8}
    found = client.completions.create(**asked, extra_body={"top_k": 9, "min_p": 0.01, "repetition_penalty": 1.1})
    options = {"seed": 5, "temperature": 0.8, "top_k": 9, "min_p": 0.01, "repetition_penalty": 1.1}
    assert [found.choices[0].text] == expected(models["run"], ["the cat"], 20, **options)
    assert found.choices[0].finish_reason == "length" and found.choices[0].logprobs is None
    assert found.usage.to_dict() == {"prompt_tokens": 7, "completion_tokens": 20, "total_tokens": 27}
    assert found.model == "run" and found.system_fingerprint == "run-step-12"
    again = client.completions.create(**asked | {"max_tokens": None, "seed": None})
    assert again.usage.completion_tokens == 16, "OpenAI's default"


def test_prompts_and_n_are_one_batch_in_order(client, models):
    prompts = ["the cat", [100, 111, 103]]
    found = client.completions.create(
        model="run", prompt=prompts[:1], n=2, max_tokens=6, seed=1, echo=True, stop=["zzzz"]
    )
    assert [choice.index for choice in found.choices] == [0, 1]
    texts = expected(models["run"], ["the cat"] * 2, 6, seed=1)
    assert [choice.text for choice in found.choices] == ["the cat" + text for text in texts]
    assert found.usage.prompt_tokens == 7 and found.usage.completion_tokens == 12
    ids = client.completions.create(model="run", prompt=prompts[1], max_tokens=6, temperature=0)
    assert [ids.choices[0].text] == expected(models["run"], ["dog"], 6, temperature=0)
    both = client.completions.create(model="run", prompt=[[100, 111, 103], [97]], max_tokens=6, temperature=0)
    assert [choice.text for choice in both.choices] == expected(models["run"], ["dog", "a"], 6, temperature=0)


def test_a_stream_is_the_whole_in_pieces(client, models):
    asked = {"model": "run", "prompt": "the cat", "max_tokens": 30, "seed": 3, "logprobs": 2, "n": 2}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1
    for row, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == row]
        assert "".join(piece.text for piece in mine) == choice.text
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [x for piece in mine for x in getattr(piece.logprobs, name)] == getattr(choice.logprobs, name)
        assert len(mine) > 5
    assert {len(choice.logprobs.tokens) for choice in whole.choices if choice.finish_reason == "length"} == {30}


def test_log_probabilities_are_those_of_the_model(client, models):
    model = models["run"]
    found = client.completions.create(model="run", prompt="the cat", max_tokens=12, temperature=0, logprobs=3)
    got = found.choices[0].logprobs
    ids = [int(model.tokenizer.encode(token)[0]) for token in got.tokens]
    whole = model.tokenizer.encode("the cat").tolist() + ids
    with torch.no_grad():
        logits = model.opened.model(torch.tensor([whole])).logits[0, 6:-1, : model.tokenizer.vocab_size]
    scores = logits.float().log_softmax(-1)
    assert got.token_logprobs == pytest.approx(scores.max(-1).values.tolist(), abs=1e-4), "greedy"
    for row, likeliest in zip(scores, got.top_logprobs, strict=True):
        assert sorted(likeliest.values()) == pytest.approx(sorted(row.topk(3).values.tolist()), abs=1e-4)
    assert got.text_offset == list(range(12)) and "".join(got.tokens) == found.choices[0].text


def test_a_stop_string_ends_a_text_and_its_tokens(client, models):
    asked = {"model": "run", "prompt": "the cat", "max_tokens": 40, "temperature": 0, "logprobs": 1}
    free = client.completions.create(**asked).choices[0].text
    stop = free[10:13]
    cut = free[: free.index(stop)]
    found = client.completions.create(**asked, stop=stop)
    assert found.choices[0].text == cut and found.choices[0].finish_reason == "stop"
    assert "".join(found.choices[0].logprobs.tokens) == cut
    assert found.usage.completion_tokens == len(cut) + 3, "all that were made"
    pieces = [chunk.choices[0] for chunk in client.completions.create(**asked, stop=["never", stop], stream=True)]
    assert "".join(piece.text for piece in pieces) == cut and pieces[-1].finish_reason == "stop"


def test_a_conversation_is_written_as_in_training(models):
    from trainer.commands.serve.app import conversation

    model = models["chat"]
    [segments] = model.conversations.documents(json.dumps({"messages": TURNS}).encode(), "row")
    end = model.tokenizer.eot_id
    ids = [i for part in segments[:-1] for i in [*model.tokenizer.encode(part.text), *[end] * part.closed]]
    assert conversation(model, TURNS[:-1]) == ids and ids.count(end) == 1


def test_chat(client, models):
    from trainer.commands.serve.app import conversation

    asked = {"model": "chat", "messages": TURNS[:2], "max_completion_tokens": 12, "seed": 4}
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    ids = conversation(models["chat"], TURNS[:2])
    text = models["chat"].tokenizer.decode(ids)
    [message] = expected(models["chat"], [text], 12, seed=4)
    choice = found.choices[0]
    assert choice.message.content == message and choice.message.role == "assistant"
    assert found.usage.prompt_tokens == len(ids)
    assert len(choice.logprobs.content) == found.usage.completion_tokens
    data = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert data.decode("utf-8", "replace") == message
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in choice.logprobs.content)
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert chunks[0].delta.role == "assistant"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == message
    assert chunks[-1].finish_reason == choice.finish_reason
    parts = [{"role": "user", "content": [{"type": "text", "text": "re"}, {"type": "text", "text": "d"}]}]
    assert (
        client.chat.completions.create(**asked | {"messages": [TURNS[0], *parts]}).choices[0].message.content == message
    )


# -- what is refused -----------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "red"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    "path, change, param, words",
    [
        (TEXT, {"foo": 1}, "foo", "not a field of this endpoint"),
        (TEXT, {"foo": None}, "foo", "not a field"),
        (TEXT, {"messages": [USER]}, "messages", "not a field of this endpoint"),
        (TEXT, {"presence_penalty": 0.5}, "presence_penalty", "repetition_penalty"),
        (TEXT, {"logit_bias": {"1": 5}}, "logit_bias", "not supported"),
        (TEXT, {"temperature": "hot"}, "temperature", "number"),
        (TEXT, {"temperature": -1}, "temperature", "greater than or equal to 0"),
        (TEXT, {"top_p": 0}, "top_p", "greater than 0"),
        (TEXT, {"top_k": 1.5}, "top_k", "integer"),
        (TEXT, {"stream": "yes"}, "stream", "boolean"),
        (TEXT, {"n": 0}, "n", "greater than or equal to 1"),
        (TEXT, {"n": 5}, "n", "limit of this server (4)"),
        (TEXT, {"max_tokens": 65}, "max_tokens", "limit of this server (64)"),
        (TEXT, {"max_tokens": -1}, "max_tokens", "at least 0"),
        (TEXT, {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        (TEXT, {"seed": -1}, "seed", "0"),
        (TEXT, {"logprobs": 21}, "logprobs", "20"),
        (TEXT, {"echo": True, "logprobs": 1}, "echo", "not supported"),
        (TEXT, {"repetition_penalty": 1e9}, "repetition_penalty", "less than or equal to 1000"),
        (TEXT, {"stop": ""}, "stop", "none of them empty"),
        (TEXT, {"stop": ["a"] * 17}, "stop", "at most 16"),
        (TEXT, {"stop": [1]}, "stop", "list of texts"),
        (TEXT, {"stream_options": {"include_usage": True}}, "stream_options", "set stream"),
        (TEXT, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not permitted"),
        (TEXT, {"prompt": []}, "prompt", "list"),
        (TEXT, {"prompt": {"a": 1}}, "prompt", "list of token ids"),
        (TEXT, {"prompt": ["a", 1]}, "prompt", "list of token ids"),
        (TEXT, {"prompt": [257]}, "prompt", "257 is not between 0 and 256"),
        (TEXT, {"prompt": [-1]}, "prompt", "-1 is not between"),
        (TEXT, {"prompt": "\ud800"}, "prompt", "UTF-8"),
        (TEXT, {"prompt": "a" * 61}, "prompt", "61 tokens are more than run takes (60)"),
        (TEXT, {"prompt": None}, "prompt", "required"),
        (CHAT, {"messages": []}, "messages", "list of messages"),
        (CHAT, {"messages": [USER, USER]}, "messages", "user, user; after a system message"),
        (CHAT, {"messages": TURNS[:3]}, "messages", "the last message must be of the user"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages", "roles system, user, assistant"),
        (CHAT, {"messages": [{"role": "user", "content": ""}]}, "messages", "is empty"),
        (CHAT, {"messages": [{"role": "user", "content": "<|assistant|>"}]}, "messages", "the chat template writes"),
        (CHAT, {"messages": [USER | {"name": "me"}]}, "messages", "messages[0].name: is not supported"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "only text"),
        (CHAT, {"messages": [{"role": "user", "content": "\udfff"}]}, "messages", "UTF-8"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools", "not supported"),
        (CHAT, {"model": "run"}, "model", "has no chat template"),
    ],
)
def test_a_wrong_field_is_named(address, path, change, param, words):
    good = {"model": "run", "prompt": "a"} if path == TEXT else {"model": "chat", "messages": [USER]}
    status, content, _ = ask(address, good | {"max_tokens": 2} | change, path)
    assert status == 400 and set(content) == {"error"}, content
    error = content["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert words in error["message"] and "\n" not in error["message"]


def test_a_prompt_must_fit_into_the_context(models):
    model = ServedModel("run", models["run"].opened, None, max_requests=2, max_seconds=60)
    model.context = 8
    with serving({"run": model}) as address:
        assert ask(address, {"model": "run", "prompt": "a" * 8, "max_tokens": 20})[0] == 200, (
            "what follows may be longer"
        )
        status, content, _ = ask(address, {"model": "run", "prompt": "a" * 9})
        assert status == 400 and content["error"]["code"] == "context_length_exceeded"


def test_values_that_mean_off_are_taken(client):
    off = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "best_of": 1,
        "suffix": None,
        "logit_bias": {},
        "user": "me",
    }
    assert client.completions.create(model="run", prompt="a", max_tokens=0, extra_body=off).choices[0].text == ""


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"a": 1, "a": 2}', b"\xff", b"[" * 4000])
def test_a_body_that_is_no_object(address, body):
    status, content, _ = ask(address, body)
    assert status == 400 and content["error"]["message"].startswith("body: "), content


def test_openais_client_raises_its_errors(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="there is no nothing here"):
        client.completions.create(model="nothing", prompt="a")
    with pytest.raises(openai.BadRequestError, match="logit_bias: is not supported"):
        client.completions.create(model="run", prompt="a", logit_bias={"1": 2})


def test_other_paths_and_methods(address):
    assert ask(address, None, "/nowhere", "GET")[:2] == (
        404,
        {"error": {"message": "GET /nowhere: Not Found", "type": "invalid_request_error", "param": None, "code": None}},
    )
    assert ask(address, None, TEXT, "GET")[0] == 405
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert ask(address, None, path, "GET")[0] == 404, "these pages load from elsewhere"


def test_a_large_body_is_refused_unread(address):
    status, content, _ = ask(address, b"x" * 5000)
    assert status == 413 and "4,096 bytes" in content["error"]["message"]
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    chunks = (b"x" * 1000 for _ in range(6))  # no length is said
    connection.request("POST", TEXT, chunks, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_only_known_hosts_and_json(address):
    port = address.rpartition(":")[2]
    for host in ("127.0.0.1", f"localhost:{port}", f"[::1]:{port}", "192.168.1.5", "LOCALHOST"):
        assert ask(address, None, "/v1/models", "GET", Host=host)[0] == 200, host
    for host in ("evil.example", f"evil.example:{port}", "", "localhost.evil.example", "127.0.0.1.evil.example"):
        status, content, _ = ask(address, None, "/", "GET", Host=host)
        assert status == 403 and "--allowed_hosts" in content["error"]["message"], host
    good = json.dumps({"model": "run", "prompt": "a"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert ask(address, good, **{"Content-Type": kind})[0] == 415
    assert ask(address, good, **{"Content-Type": "application/json; charset=utf-8"})[0] == 200
    headers = ask(address, good, Origin="http://evil.example")[2]
    assert not [name for name in headers if name.lower().startswith("access-control")], "CORS is off"


def test_the_api_key(models):
    with serving(models, api_key="sesame", allowed_hosts=["My.Lab"]) as address:
        assert ask(address, None, "/", "GET")[0] == 200, "the page asks for the key"
        assert ask(address, None, "/v1/models", "GET", Host="my.lab:80")[0] == 401
        for value in ("", "Bearer", "Bearer wrong", "Basic sesame", "sesame", "Bearer s\xe9same"):
            status, content, _ = ask(address, {"model": "run", "prompt": "a"}, Authorization=value)
            assert status == 401 and content["error"]["code"] == "invalid_api_key", value
        body = {"model": "run", "prompt": "a", "max_tokens": 1}
        assert ask(address, body, Authorization="Bearer sesame", Host="my.lab")[0] == 200


# -- limits, and clients that leave --------------------------------------------------------------------------------------------


@pytest.fixture
def gate(models, address):
    found = Gate(models["run"])
    yield found
    found.remove()
    until(lambda: not models["run"]._jobs)


def open_request(address, **changes):
    """A connection whose request waits for its answer."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    body = {"model": "run", "prompt": "the cat", "max_tokens": 60, "seed": 1} | changes
    connection.request("POST", TEXT, json.dumps(body), {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_decoding(address, models, gate, stream):
    connection = open_request(address, stream=stream)
    gate.permits.release(10)  # the check of the cache, the prompt, some tokens
    until(lambda: gate.passes == 10)
    connection.close()
    job = next(iter(models["run"]._jobs))
    until(job.cancelled)
    gate.open()
    until(lambda: not models["run"]._jobs)
    assert gate.passes <= 12, "of about 66"


@pytest.fixture
def limited(models):
    """The model under limits of its own, gated, and the address of its server."""
    model = ServedModel("run", models["run"].opened, None, max_requests=2, max_seconds=0.5)
    gate = Gate(model)
    with serving({"run": model}) as address:
        yield model, gate, address
        gate.remove()


def test_the_queue_is_limited_and_in_order(limited, models):
    model, gate, address = limited
    model._max_seconds = 60
    connections = [open_request(address, max_tokens=4)]
    until(lambda: len(model._jobs) == 1)
    waiting = open_request(address, max_tokens=4)
    until(lambda: len(model._jobs) == 2)
    status, content, _ = ask(address, {"model": "run", "prompt": "a"})
    assert status == 429 and content["error"]["type"] == "rate_limit_error" and "try again later" in str(content)
    waiting.close()  # frees its place at once, though the first is still computed
    until(lambda: len(model._jobs) == 1)
    connections.append(open_request(address, max_tokens=4, seed=2))
    until(lambda: len(model._jobs) == 2)
    assert gate.passes == 0, "one after the other"
    gate.open()
    for seed, connection in enumerate(connections, 1):
        answer = connection.getresponse()
        assert json.loads(answer.read())["choices"][0]["text"] == expected(model, ["the cat"], 4, seed=seed)[0]
        connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_long_computation_ends_with_an_error(limited, stream):
    model, gate, address = limited
    connection = open_request(address, stream=stream)
    gate.permits.release(8)
    time.sleep(0.6)
    gate.open()
    answer = connection.getresponse()
    content = answer.read().decode()
    assert answer.status == (200 if stream else 504)
    last = json.loads(content.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "timeout" and "after 0.5 s" in last["error"]["message"]
    connection.close()


def test_a_body_that_does_not_come(models, capfd):
    with serving(models, max_seconds=0.3) as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        for ends in (False, True):
            connection.putrequest("POST", TEXT)
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", "100")
            connection.endheaders(b'{"model":')
            if not ends:
                assert connection.getresponse().status == 408
            connection.close()
    assert capfd.readouterr().err.strip() == "", "a client that leaves is no error"


def test_a_fault_of_the_server_is_an_error_object_and_a_traceback(models, monkeypatch, capfd):
    monkeypatch.setattr(models["run"], "opened", None)
    with serving(models) as address:
        status, content, _ = ask(address, None, "/v1/models", "GET")
    assert status == 500 and content["error"]["code"] == "failed"
    assert "AttributeError" in capfd.readouterr().err


def test_a_model_that_fails_is_an_error_and_serves_on(models, address, monkeypatch, capfd):
    def fails(*args, **options):
        raise RuntimeError("broken kernel")

    monkeypatch.setattr(models["run"].opened, "predict", fails)
    status, content, _ = ask(address, {"model": "run", "prompt": "a"})
    assert status == 500 and content["error"]["type"] == "server_error" and "broken" not in str(content)
    assert "broken kernel" in capfd.readouterr().err, "the terminal has the traceback"
    monkeypatch.undo()
    assert ask(address, {"model": "run", "prompt": "a"})[0] == 200


# -- the text of tokens --------------------------------------------------------------------------------------------------------


def answer_of(tokens, stops=(), prompt=b"x"):
    """The pieces of an answer of these byte tokens, and the answer."""
    made = Answer(get_tokenizer("bytes"), 0, list(prompt), list(stops))
    pieces = [made.add(TokenEvent(0, token)) for token in tokens]
    return [piece for piece in pieces if piece is not None] + [made.finish("length")], made


@pytest.mark.parametrize(
    "data, offsets",
    [
        (b"ab", [0, 1]),
        ("a\u20acb".encode(), [0, 1, 1, 1, 2]),
        (b"\x80\x80a", [0, 1, 2]),  # no characters at all
        (b"\xe2a\xf0\x9f", [0, 1, 2, 2]),  # unfinished in the middle and at the end
        (bytes(range(97, 123)) * 9, list(range(234))),  # more than is decoded together
        (b"a" * 62 + "\u20ac!".encode(), [*range(62), 62, 62, 62, 63]),  # whose end is within a character
    ],
)
def test_each_token_has_its_place_in_the_text(data, offsets):
    pieces, made = answer_of(data)
    text = "".join(piece.text for piece in pieces)
    assert text == data.decode("utf-8", "replace") and made.count == len(data)
    assert [token.event.token for piece in pieces for token in piece.tokens] == list(data)
    assert [token.offset for piece in pieces for token in piece.tokens] == offsets
    shown = 0
    for piece in pieces[:-1]:
        shown += len(piece.text)
        assert all(token.offset < shown for token in piece.tokens), "never before its text"


def test_tokens_of_a_stop_string_are_left_out():
    pieces, made = answer_of(b"abcENDxyz"[:6], ["END"])
    assert made.stopped and pieces[-1].finish == "stop"
    assert "".join(piece.text for piece in pieces) == "abc"
    assert bytes(token.event.token for piece in pieces for token in piece.tokens) == b"abc"
    pieces, made = answer_of(b"abcEN", ["END"])
    assert not made.stopped and pieces[-1].finish == "length"
    assert [piece.text for piece in pieces] == ["a", "b", "c", "EN"]
    assert bytes(token.event.token for token in pieces[-1].tokens) == b"EN"


def test_a_prompt_that_ends_within_a_character():
    pieces, _ = answer_of(b"\x82\xac!", prompt=b"x\xe2")
    assert "".join(piece.text for piece in pieces) == "\u20ac!"


def test_tokens_are_spelled_as_openai_does():
    spelling = Spelling(get_tokenizer("bytes"))
    assert [spelling.text_of(token) for token in (97, 0xE2, 256)] == ["a", "bytes:\\xe2", "<|endoftext|>"]
    assert finite(-math.inf) == -9999.0 and finite(-1.5) == -1.5


# -- the command ---------------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_a_busy_server_within_a_second(finished):
    started = start(
        "-m", "trainer", "serve", str(finished), "--port", "0", "--device", "cpu", "--max_new_tokens", "100000"
    )
    until_there(lambda: "Ctrl-C stops it" in (started / "stderr").read_text())
    address = (started / "stderr").read_text().split()[0]
    connection = open_request(address, stream=True, max_tokens=100_000)
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    begin = time.monotonic()
    send(started, signal.SIGINT)
    rest = answer.read().decode()
    ended = wait(started)
    assert time.monotonic() - begin < 5, "a second, on a machine that has nothing else to do; the text takes minutes"
    assert json.loads(rest.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "stopped"
    assert ended.returncode == 130 and ended.stderr.splitlines()[-1] == "stopped"
    assert "Traceback" not in ended.stderr and "warning" not in ended.stderr


def test_what_is_wrong_with_the_command_is_one_line(finished, tmp_path, monkeypatch):
    def refused(*words):
        with pytest.raises(UserError) as caught:
            dispatch(["serve", *map(str, words)])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "runs: name the folders" in refused()
    assert f"{tmp_path} is not a run's folder" in refused(tmp_path, "--port", "0")
    assert "two are named run" in refused(finished, finished, "--port", "0", "--device", "cpu")
    assert "has no checkpoint of step 7" in refused(f"{finished}@7", "--port", "0")
    assert "host: is empty" in refused(finished, "--host", " ")
    assert "api_key: is empty" in refused(finished, "--api_key", " ")
    assert "is not an address of this machine" in refused(finished, "--host", "no.such.host.invalid")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port: cannot listen on 127.0.0.1:{port} (Address already in use)" in refused(finished, "--port", port)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'crescendo-lm[serve]'" in refused(finished)


def test_steps_of_one_run_are_models(finished):
    found = open_models(ServeConfig(runs=[f"{finished}@8", str(finished)], device="cpu"))
    assert {name: model.opened.step for name, model in found.items()} == {"run@8": 8, "run": 12}


def test_what_quantize_wrote_is_served(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.commands.quantize.DECODED", 1)
    monkeypatch.setattr("trainer.commands.quantize.REPEATS", 1)
    dispatch(["quantize", str(finished), "--to", "int8", "--out", str(tmp_path / "int8"), "--device", "cpu"])
    [model] = open_models(ServeConfig(runs=[str(tmp_path / "int8")], device="cpu")).values()
    with serving({"int8": model}) as address:
        body = {"model": "int8", "prompt": "the cat", "max_tokens": 3, "temperature": 0}
        assert ask(address, body)[1]["choices"][0]["text"] == expected(model, ["the cat"], 3, temperature=0)[0]


def test_others_are_told_that_there_is_no_key():
    def lines(**changes):
        return launch.ready_lines(ServeConfig(**changes), {}, "http://x:1")

    assert len(lines()) == len(lines(host="::1")) == len(lines(host="0.0.0.0", api_key="k")) == 2
    assert "without authentication" in lines(host="0.0.0.0")[1]
