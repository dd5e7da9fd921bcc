"""Programs of others put to the server: a fuzzer that reads its OpenAPI document, and an evaluation
harness.
"""

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

FUZZ = [
    "run",
    "--phases",
    "fuzzing",
    "--seed",
    "1",
    "--request-timeout",
    "20",
    "--checks",
    "all",
    "--exclude-checks",
    "positive_data_acceptance",
    "--no-shrink",
]  # a document cannot say which fields contradict each other


def test_requests_made_from_the_document(server, tmp_path):
    """By hand with more: start the server with --max_len 128, then schemathesis run
    http://127.0.0.1:8000/openapi.json --phases coverage,fuzzing --max-examples 400
    --request-timeout 30
    --checks all --exclude-checks positive_data_acceptance   (2,300 cases in 3.5 minutes on two
                                                             cores)"""
    command = [str(Path(sys.executable).with_name("schemathesis")), *FUZZ, "--max-examples", "18"]
    done = subprocess.run(
        [*command, f"{server.url}/openapi.json"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) generated", done.stdout)[1]) >= 100
    assert httpx.get(f"{server.url}/health").status_code == 200 and server.chat.in_flight == 0


@pytest.mark.parametrize("tokenized", [True, False])
def test_the_harness_gets_the_log_likelihoods_of_the_network(server, tmp_path, tokenized):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    served = server.models["base"]
    served.tokenizer.save_pretrained(tmp_path)
    lm = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="base",
        tokenizer=str(tmp_path),
        max_length=500,
        tokenizer_backend="huggingface",
        tokenized_requests=tokenized,
        batch_size=2,
    )
    pairs = [
        ("What is it?", " A lamp"),
        ("What is it?", " 一盏灯"),
        ("Once upon", " a time there was"),
        ("Say", " x" * 50),
    ]
    got = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    for (context, continuation), (log_likelihood, is_greedy) in zip(pairs, got):
        before, whole = (
            served.tokenizer(text).input_ids for text in (context, context + continuation)
        )
        ids = whole if tokenized else [0, *whole]
        log_probs = (
            served.engine.model(torch.tensor([ids]))
            .logits[0, -1 - len(whole) + len(before) : -1]
            .log_softmax(-1)
        )
        targets = torch.tensor(whole[len(before) :])
        assert log_likelihood == pytest.approx(
            log_probs.gather(1, targets[:, None]).sum().item(), abs=1e-2
        )
        assert is_greedy == bool((log_probs.argmax(-1) == targets).all())
    greedy = lm.generate_until(
        [Instance("generate_until", {}, ("Once", {"max_gen_toks": 8, "until": ["zzz"]}), 0)]
    )
    prompt = served.tokenizer("Once").input_ids if tokenized else "Once"
    body = {"model": "base", "temperature": 0, "max_tokens": 8, "prompt": prompt}
    reply = httpx.post(f"{server.url}/v1/completions", json=body)
    assert greedy == [reply.json()["choices"][0]["text"]]
