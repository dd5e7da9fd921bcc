"""Who may come in, how many, what happens when clients leave, and how the server ends."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from scripts.openai_api.model_pool import load_models
from scripts.serve_openai_api import ServeArgs, main
from tests.helpers.checkpoints import ROOT
from tests.helpers.served import Running, refused, small_network, wait_until
from trainer.runtime.arguments import parse_args
from trainer.runtime.process import Compute

HI = [{"role": "user", "content": "hi"}]
ENDLESS = {"model": "chat", "messages": HI, "ignore_eos": True, "temperature": 0}
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def small():
    """A server with two slots, room for three more, a key and a limit for bodies."""
    running = Running(
        max_batch_size=2, max_queue=3, max_len=4000, api_key="secret", max_body_bytes=20_000
    )
    yield running
    running.close()


def ask(server, headers=KEY, timeout=60, **change):
    return httpx.post(
        f"{server.url}/v1/chat/completions",
        json={**ENDLESS, **change},
        headers=headers,
        timeout=timeout,
    )


def stream(server, **change):
    """A context manager: an endless stream."""
    return httpx.stream(
        "POST",
        f"{server.url}/v1/chat/completions",
        json={**ENDLESS, "stream": True, **change},
        headers=KEY,
        timeout=60,
    )


def test_the_key(small):
    assert ask(small, max_tokens=2).status_code == 200
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": b"Bearer \xe4"},
    ):
        assert refused(ask(small, headers), 401)["code"] == "invalid_api_key"
        assert httpx.get(f"{small.url}/v1/models", headers=headers).status_code == 401
        assert httpx.get(f"{small.url}/metrics", headers=headers).status_code == 401
    assert httpx.get(f"{small.url}/health").status_code == 200
    assert (
        "401"
        in httpx.get(f"{small.url}/openapi.json").json()["paths"]["/v1/models"]["get"]["responses"]
    )


def test_long_bodies_are_refused_before_they_are_read(small):
    error = refused(ask(small, messages=[{"role": "user", "content": "x" * 30_000}]), 413)
    assert "20,000 bytes" in error["message"]
    parts = (b"x" * 1000 for _ in range(40))  # no length is announced
    response = httpx.post(
        f"{small.url}/v1/chat/completions",
        content=parts,
        headers=KEY | {"Content-Type": "application/json"},
    )
    assert response.status_code == 413


def test_bodies_that_never_end(small, monkeypatch):
    monkeypatch.setattr("scripts.openai_api.http.BODY_SECONDS", 0.1)
    with socket.create_connection(small.url.removeprefix("http://").split(":")) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
            b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_full_queue_says_when_to_come_back(small):
    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(ask, small, max_tokens=400) for _ in range(5)]
        wait_until(lambda: small.chat.in_flight == 5)
        response = ask(small, max_tokens=1)
        assert (
            refused(response, 429)["code"] == "queue_full"
            and response.headers["retry-after"] == "1"
        )
        wait_until(lambda: small.counts() == (2, 3, 5))
        assert [one.result().status_code for one in running] == [200] * 5
    assert ask(small, max_tokens=1).status_code == 200
    assert "6 completions in one request" in refused(ask(small, n=6))["message"]
    assert len(ask(small, n=5, max_tokens=2).json()["choices"]) == 5


def test_clients_that_leave_a_stream_free_its_slot(small):
    for _ in range(3):
        with stream(small, n=2) as response:
            parts = response.iter_text()
            for _ in range(3):
                next(parts)
            assert small.counts() == (2, 0, 2)
        wait_until(lambda: small.counts() == (0, 0, 0), 2)
    with stream(small, n=5) as response:  # waiting ones go too
        next(response.iter_text())
    wait_until(lambda: small.counts() == (0, 0, 0), 2)


def test_clients_that_do_not_wait_for_a_whole_reply_free_its_slot(small):
    with pytest.raises(httpx.ReadTimeout):
        ask(small, timeout=0.3)
    wait_until(lambda: small.counts() == (0, 0, 0), 2)
    connection = socket.create_connection(small.url.removeprefix("http://").split(":"))
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
        b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    )
    connection.close()  # in the middle of a request
    assert ask(small, max_tokens=1).status_code == 200
    wait_until(lambda: small.app.state.gate.num_active == 0, 2)


def test_prompts_that_are_only_scored_count_and_end_with_their_client(small, monkeypatch):
    served, scored = small.models["base"], []
    monkeypatch.setattr(
        served,
        "score_now",
        lambda prompt, number: time.sleep(0.2) or scored.append(prompt) or [None] * len(prompt),
    )
    body = {
        "model": "base",
        "prompt": ["a", "b", "c", "d"],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 0,
    }

    def ask_for_scores(**options):
        return httpx.post(f"{small.url}/v1/completions", json=body, headers=KEY, **options)

    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(ask_for_scores, timeout=60)
        wait_until(lambda: served.in_flight == 4)
        assert refused(ask_for_scores(timeout=60), 429)["code"] == "queue_full"
        assert whole.result().status_code == 200 and len(scored) == 4 and served.in_flight == 0
    with pytest.raises(httpx.ReadTimeout):
        ask_for_scores(timeout=0.3)
    wait_until(lambda: served.in_flight == 0, 2)
    time.sleep(0.3)
    assert len(scored) < 8


def test_a_client_that_stops_reading_is_given_up(small, monkeypatch):
    monkeypatch.setattr(
        "scripts.openai_api.http.SEND_SECONDS", 0.3
    )  # the log-probs below are more than sockets hold
    body = json.dumps(
        {**ENDLESS, "stream": True, "logprobs": True, "top_logprobs": 20, "n": 2}
    ).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = small.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        wait_until(lambda: small.counts() == (2, 0, 2))
        wait_until(lambda: small.app.state.gate.num_active == 0, 30)
        wait_until(lambda: small.counts() == (0, 0, 0), 2)


def test_others_go_on_when_one_leaves(small):
    expected = ask(small, max_tokens=200).json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(1) as pool:
        with stream(small) as response:
            parts = response.iter_text()
            next(parts)
            other = pool.submit(ask, small, max_tokens=200)
            wait_until(lambda: small.chat.in_flight == 2)
        assert other.result().json()["choices"][0]["message"]["content"] == expected


def test_an_engine_that_fails_tells_everyone():
    server = Running(max_batch_size=2, max_len=4000)
    threading.excepthook, hook = lambda *_: None, threading.excepthook
    try:
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(ask, server)
            with stream(server) as response:
                lines = response.iter_lines()
                next(lines)
                wait_until(lambda: server.chat.in_flight == 2)
                server.chat.engine._decode = lambda: 1 / 0
                errors = [
                    json.loads(line[6:]) for line in lines if line.startswith('data: {"error"')
                ]
            assert errors[0]["error"]["type"] == "server_error"
            assert refused(whole.result(), 500)["type"] == "server_error"
        refused(ask(server), 503)
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503 and health.json() == {
            "status": "failed",
            "failed": ["chat"],
        }
    finally:
        threading.excepthook = hook
        server.close()


def save_checkpoints(folder):
    """Two runs and an adapter, as the stages leave them."""
    for seed, name in enumerate(("full_sft_small", "other")):
        model, tokenizer = small_network(seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "full_sft_small"),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight.normal_()
    model.save_pretrained(folder / "poet_adapter")


def test_a_process_serves_several_models_drains_and_ends(tmp_path):
    save_checkpoints(tmp_path)
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "scripts" / "serve_openai_api.py"),
            "--save_dir",
            str(tmp_path),
            "--port",
            "0",
            "--weight",
            "full_sft",
            f"second={tmp_path / 'other'}",
            "--adapter",
            f"poet={tmp_path / 'poet_adapter'}",
            "--device",
            "cpu",
            "--int8",
            "--max_len",
            "4000",
            "--max_batch_size",
            "2",
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        lines = iter(process.stdout.readline, "")
        url = next(line for line in lines if line.startswith("listening")).split()[-1]
        cards = httpx.get(f"{url}/models").json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [
            ("full_sft", None),
            ("second", None),
            ("poet", "full_sft"),
        ]
        texts = {
            card["id"]: httpx.post(
                f"{url}/chat/completions",
                json={**ENDLESS, "model": card["id"], "max_tokens": 12},
                timeout=60,
            ).json()["choices"][0]["message"]["content"]
            for card in cards
        }
        assert len(set(texts.values())) == 3
        body = {**ENDLESS, "model": "full_sft", "max_tokens": 700, "stream": True}
        running = httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60)
        with httpx.Client(timeout=60) as other, running as response:
            parts = response.iter_text()
            next(parts)
            other.get(f"{url}/models")
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            late = other.post(f"{url}/chat/completions", json=body)
            assert refused(late, 503)["code"] == "draining" and "retry-after" in late.headers
            assert other.get(url.replace("/v1", "/health")).status_code == 503
            assert "".join(parts).endswith("data: [DONE]\n\n")
        assert process.wait(20) == 0
    finally:
        process.kill()


def test_an_adapter_that_taught_to_chat_brings_its_template(tmp_path):
    save_checkpoints(tmp_path)
    (tmp_path / "full_sft_small" / "chat_template.jinja").unlink()
    shutil.copytree(tmp_path / "poet_adapter", tmp_path / "raw")
    (tmp_path / "poet_adapter" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    args = parse_args(
        ServeArgs,
        [
            "--save_dir",
            str(tmp_path),
            "--device",
            "cpu",
            "--weight",
            "full_sft",
            "--adapter",
            f"poet={tmp_path / 'poet_adapter'}",
            f"raw={tmp_path / 'raw'}",
        ],
    )
    served = load_models(args, Compute(args))
    try:
        assert {name: one.chats for name, one in served.items()} == {
            "full_sft": False,
            "poet": True,
            "raw": False,
        }
        assert served["poet"].tokenizer.chat_template == "{{ messages[0].content }}"
    finally:
        for one in served.values():
            one.thread.close(10)


@pytest.mark.parametrize(
    "written, message",
    [
        (["--port", "70000"], "--port 70000"),
        (["--max_batch_size", "0"], "--max_batch_size"),
        (["--max_queue", "-1"], "--max_queue"),
    ],
)
def test_flags_that_cannot_work(written, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(ServeArgs, written)
    assert message in capsys.readouterr().err


def test_names_and_ports_that_are_taken(tmp_path, capsys):
    save_checkpoints(tmp_path)
    common = ["--save_dir", str(tmp_path), "--device", "cpu", "--max_batch_size", "1"]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(ValueError, match="two models would be served as 'other'"):
            main(
                [
                    *common,
                    "--weight",
                    "full_sft",
                    "other",
                    "--adapter",
                    f"other={tmp_path / 'poet_adapter'}",
                ]
            )
        with pytest.raises(ValueError, match="no weights are found"):
            main([*common, "--weight", "nothing"])
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(OSError, match="cannot be opened"):
                main([*common, "--port", str(taken.getsockname()[1])])
    finally:
        signal.signal(signal.SIGTERM, handler)
