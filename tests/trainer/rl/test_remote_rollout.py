"""Rollouts from a server: the local engine's completions, weights that are new enough, and a
message for each fault.
"""

import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from model.model_lora import AdapterOnly, LoRASettings, add_adapter
from model.model_minimind import MiniMindForCausalLM
from tests.helpers.fake_rollout_server import FakeServer
from tests.helpers.networks import write_network
from trainer.rl import remote_rollout
from trainer.rl.remote_rollout import RemoteRollout
from trainer.rl.rollout import Rollout
from trainer.runtime.ranks import Ranks

PROMPTS, SEEDS = [[5, 6, 7], [8, 9], [8, 9], list(range(40, 60))], [1, 2, 3, 4]


@pytest.fixture
def folder(tmp_path):
    return write_network(tmp_path / "net", 0, hidden_size=32, num_hidden_layers=2)


@pytest.fixture
def other(tmp_path):
    return write_network(tmp_path / "other", 1, hidden_size=32, num_hidden_layers=2)


@pytest.fixture
def server(other):
    with FakeServer(other) as server:
        yield server


@pytest.fixture
def made(folder, server, tmp_path, monkeypatch):
    """made(backend, **changes of the flags): (RemoteRollout, a local Rollout)."""
    monkeypatch.setattr(remote_rollout, "PAUSE", 0.0)
    model, tokenizer = (
        MiniMindForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    options = {
        "temperature": 0.7,
        "rollout_batch_size": 3,
        "max_seq_len": 40,
        "rollout_url": server.url + "/",
        "rollout_dir": str(tmp_path / "shared"),
        "max_staleness": 0,
    }

    def make(backend="vllm", saved=None, **changes):
        args = SimpleNamespace(**{**options, "rollout_backend": backend, **changes})
        run = SimpleNamespace(
            args=args, device=torch.device("cpu"), dtype=torch.float32, ranks=Ranks()
        )
        remote = RemoteRollout(run, model, saved or model, tokenizer)
        return remote, Rollout(run, model, tokenizer)

    make.model = model
    return make


def assert_same(remote, local, **options):
    """Both give the same completions of PROMPTS, of which one is cut at the longest length."""
    found, expected = remote(PROMPTS, SEEDS, 24, **options), local(PROMPTS, SEEDS, 24, **options)
    for a, b in zip(found, expected, strict=True):
        assert (a.tokens, a.text, a.is_complete) == (b.tokens, b.text, b.is_complete)
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)
    return found


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_the_servers_completions_are_those_of_the_local_engine(made, backend):
    remote, local = made(backend)
    found = assert_same(remote, local)
    assert [len(one.tokens) for one in found] == [24, 24, 24, 20]
    assert found[1].tokens != found[2].tokens
    assert_same(remote, local, temperature=0)
    made.model.generation_config.eos_token_id = list(range(1, 6400, 5))
    remote, local = made(backend)
    ended = [one for one in assert_same(remote, local) if one.is_complete]
    assert ended and all(one.tokens[-1] % 5 == 1 for one in ended)


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_after_an_update_the_server_has_the_new_weights(made, server, tmp_path, backend):
    remote, local = made(backend)
    before = remote(PROMPTS, SEEDS, 8)
    with torch.no_grad():
        made.model.lm_head.weight.mul_(-1)
    assert [one.tokens for one in remote(PROMPTS, SEEDS, 8)] == [one.tokens for one in before]
    remote.refresh()
    local.refresh()
    assert_same(remote, local)
    names = [
        "policy-000001",
        "shaken",
        "policy-000001",
        "policy-000002",
    ]  # the first is followed by a test
    assert server.loaded[1:] == [str(tmp_path / "shared" / name) for name in names]
    assert [path.name for path in (tmp_path / "shared").iterdir()] == [
        "policy-000002"
    ]  # the last stays
    if backend == "vllm":
        assert server.paths[server.paths.index("/collective_rpc") + 1] == "/reset_prefix_cache"


def test_the_weights_are_at_most_so_many_updates_old(made, server):
    remote, *_ = made(max_staleness=2)
    pushed = []
    for _ in range(8):
        before = len(server.loaded)
        remote.refresh()
        pushed.append(len(server.loaded) - before)
    assert pushed == [3, 0, 0, 1, 0, 0, 1, 0]  # with the first's test


def test_an_adapter_goes_there_merged(made, folder, server):
    model = made.model
    add_adapter(model, LoRASettings(4, 8.0))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith(".B"):
                x.normal_(std=0.3)
    remote, local = made(saved=AdapterOnly(model, LoRASettings(4, 8.0), folder))
    assert_same(remote, local)
    assert any(
        ".lora." in name for name, _ in model.named_parameters()
    )  # the network in training keeps its adapter
    plain = MiniMindForCausalLM.from_pretrained(server.loaded[-1]).state_dict()
    assert not torch.equal(
        plain["model.layers.0.mlp.up_proj.weight"],
        model.state_dict()["model.layers.0.mlp.up_proj.weight"],
    )


def test_ranks_push_once_and_ask_for_themselves(made, server):
    first, second = (made()[0] for _ in range(2))
    box, is_pushed = [], threading.Event()

    def share(make):
        box.append(make())
        is_pushed.set()
        return box[0]

    def receive(make):
        assert is_pushed.wait(30)
        return box[0]

    first.run, second.run = (
        SimpleNamespace(ranks=SimpleNamespace(from_main=how)) for how in (share, receive)
    )
    other = threading.Thread(target=second.refresh)
    other.start()
    first.refresh()
    other.join()
    assert len(server.loaded) == 4 and first.folder == second.folder
    assert second(PROMPTS[:1], [1], 8)[0].tokens == first(PROMPTS[:1], [1], 8)[0].tokens


def test_a_passing_failure_is_tried_again(made, server):
    remote, local = made()
    remote.refresh()
    server.failures = 2
    assert_same(remote, local)


def test_what_is_wrong_is_said(made, server, tmp_path):
    remote, *_ = made()
    server.failures = 3
    with pytest.raises(
        ConnectionError,
        match=rf"{server.url}/collective_rpc answered 500: .*out of memory.*3 times.*vllm serve "
        rf"{tmp_path}/shared/policy-000001 --logprobs-mode processed_logprobs",
    ):
        remote.refresh()
    server.is_deaf = True
    with pytest.raises(
        ValueError,
        match=r"has loaded .*policy-000002, yet differs from the network by \d\.\d\d nats",
    ):
        remote.refresh()
    assert (
        len(list((tmp_path / "shared").iterdir())) == 2
    )  # nothing is deleted before the server has another
    server.is_deaf, server.is_raw = False, True
    with pytest.raises(
        ValueError,
        match=r"reports the log-probabilities of temperature 1, but .* 0\.7.*processed_logprobs",
    ):
        remote.refresh()
    made(temperature=1.0)[0].refresh()  # where that is the same
    server.is_raw, server.offset = False, 6400
    with pytest.raises(
        ValueError, match=r"answered with token \d{4,}, and the network's go up to 6399"
    ):
        remote.refresh()


def test_a_part_that_stays_old_is_seen_at_once(made, server, folder):
    server.load(folder)  # what the server is started with is what training begins with
    server.keeps_head = True
    remote, *_ = made()
    with pytest.raises(
        ValueError,
        match=r"has loaded .*shaken, yet differs .*some of its old weights.*serve .*policy-000001 ",
    ):
        remote.refresh()


def test_a_server_of_another_vocabulary_cannot_load(made, tmp_path):
    with FakeServer(
        write_network(tmp_path / "wide", 0, hidden_size=32, num_hidden_layers=2, vocab_size=6464)
    ) as wide:
        with pytest.raises(
            ConnectionError,
            match=r"the embedding has another size.*start the server with: python -m sglang",
        ):
            made("sglang", rollout_url=wide.url)[0].refresh()


def test_a_server_that_is_not_there_or_another_is_said(made, server):
    with pytest.raises(
        ConnectionError,
        match=r"http://127.0.0.1:9/update_weights_from_disk gave no answer.*3 times",
    ):
        made("sglang", rollout_url="http://127.0.0.1:9")[0].refresh()
    remote, *_ = made()
    remote.url += "/nothing"
    with pytest.raises(
        ValueError, match=r"/nothing/collective_rpc answered 404: .*VLLM_SERVER_DEV_MODE=1"
    ):
        remote.refresh()
    assert (
        len([path for path in server.paths if "/nothing" in path]) == 1
    )  # a refusal is not asked for again
    remote.age, server.as_vllm = 0, lambda body: {"choices": [{"text": "2"}]}
    remote.url = server.url
    with pytest.raises(ValueError, match="answered without token ids and their log-probabilities"):
        remote(PROMPTS, SEEDS, 8)
