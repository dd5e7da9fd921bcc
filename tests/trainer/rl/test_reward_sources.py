"""Rewards that ask somebody else: user's functions, reward models of three kinds, and a judge on a
small server of our own.
"""

import json
import re
import threading
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    dynamic_module_utils,
)

from dataset.chat.format import encode_conversation
from model.model_minimind import MiniMindConfig
from model.reward_model import MiniMindForSequenceClassification
from tests.helpers.checkpoints import load_tokenizer
from trainer.rl import reward_sources
from trainer.rl.rewards import Rewards

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
SCORER = """
from transformers import PretrainedConfig, PreTrainedModel
import torch

class LetterConfig(PretrainedConfig):
    model_type = "letters"

class Letters(PreTrainedModel):
    config_class = LetterConfig
    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.post_init()
    def _init_weights(self, module):
        pass
    def METHOD
"""


def sample(text, answer="4"):
    row = {
        "conversations": [{"role": "user", "content": f"What is 2 + 2? {text[:1]}"}],
        "answer": answer,
    }
    messages = [*row["conversations"], {"role": "assistant", "content": text}]
    return Namespace(
        row=row, text=text, messages=messages, tokens=[1], is_sampled=[True], is_complete=True
    )


SAMPLES = [sample("4"), sample("It is four, as far as I know."), sample("5!")]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def values(tokenizer):
    """values(name, samples) -> that reward of the samples."""

    def make(name, samples=SAMPLES):
        args = Namespace(rewards=[f"{name}=2"], max_completion_length=10, overlong_buffer=0)
        run = Namespace(args=args, device=torch.device("cpu"))
        totals, parts = Rewards(run, tokenizer)(samples)
        assert totals == [2 * value for value in parts[name]] and all(
            isinstance(value, float) for value in totals
        )
        return parts[name]

    return make


def test_functions_of_the_user(tmp_path, values):
    (tmp_path / "mine.py").write_text(
        "def brief(text, row):\n    return 1 / len(text)\n\ndef same(text, row):\n"
        "    return text == row['answer']\n"
    )
    assert values(f"{tmp_path}/mine.py:brief") == [1, 1 / 29, 0.5] and values(
        f"{tmp_path}/mine.py:same"
    ) == [1, 0, 0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "def f(text, row):\n    x = 1\n    return row['none']\n",
            "mine.py:3: KeyError: 'none', at the row {\"conversations\": ",
        ),
        (
            "def f(text, row):\n    return 'good'\n",
            "mine.py:f gave 'good' as the reward of the row {\"conversations\": ",
        ),
        ("def f(text, row):\n    return float('nan')\n", "mine.py:f gave nan as the reward of"),
        ("def f(text, row):\n    return None\n", "mine.py:f gave None as the reward of"),
        (
            "def g(text, row):\n    return 1\n",
            "mine.py has no function f. Write `def f(text: str, row: dict) -> float:` into it.",
        ),
        (
            "\nimport nothing_of_this_name\n",
            "mine.py:2: ModuleNotFoundError: No module named 'nothing_of_this_name'. Put that",
        ),
    ],
)
def test_faults_of_the_users_functions(body, message, tmp_path, values):
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(ValueError, match=re.escape(message)):
        values(f"{tmp_path}/mine.py:f")
    with pytest.raises(
        ValueError,
        match=r"none.py is no Python file. Give a .py file with the function f\(text, row\)",
    ):
        values(f"{tmp_path}/none.py:f")


def test_our_own_reward_model(tmp_path, values, tokenizer):
    torch.manual_seed(0)
    config = MiniMindConfig(
        vocab_size=6400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        initializer_range=0.1,
        qk_norm=True,
    )
    MiniMindForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    expected = [
        theirs(torch.tensor([encode_conversation(tokenizer, one.messages)[0]])).logits.item()
        for one in SAMPLES
    ]
    assert len(set(expected)) == 3 and values(f"model:{tmp_path}") == pytest.approx(
        expected, abs=1e-5
    )


def save_foreign(folder, tokenizer, template=TEMPLATE, num_labels=1, pad=True):
    """A small Llama classifier with another chat template than ours."""
    torch.manual_seed(1)
    LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=6400,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=num_labels,
            initializer_range=0.2,
        )
    ).save_pretrained(folder)
    copy = load_tokenizer()
    copy.chat_template = template
    if not pad:
        copy.pad_token = None
    copy.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", [True, False])
def test_a_classifier_of_transformers_with_its_own_template(pad, tmp_path, values, tokenizer):
    folder = save_foreign(tmp_path, tokenizer, pad=pad)
    model, expected = AutoModelForSequenceClassification.from_pretrained(folder), []
    for one in SAMPLES:  # each alone, without padding
        text = f"[user] {one.messages[0]['content']}\n[assistant] {one.text}\n"
        expected.append(model(torch.tensor([tokenizer.encode(text)])).logits.item())
    assert len(set(expected)) == 3 and values(f"model:{folder}") == pytest.approx(
        expected, abs=1e-5
    )


def test_folders_that_are_no_reward_model(tmp_path, values, tokenizer):
    for name, options, message in (
        (
            "two",
            {"num_labels": 2},
            "is LlamaForSequenceClassification with 2 labels, no reward model: give a sequence",
        ),
        ("bare", {"template": None}, "its tokenizer has no chat template"),
    ):
        folder = save_foreign(tmp_path / name, tokenizer, **options)
        with pytest.raises(ValueError, match=message):
            values(f"model:{folder}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(ValueError, match="is LlamaForCausalLM with 1 labels, no reward model"):
        values(f"model:{folder}")
    with pytest.raises(
        ValueError,
        match=r"model:nowhere: there is no config.json in that folder\. Give the folder of",
    ):
        values("model:nowhere")


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Where transformers puts a folder's code before it runs it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def save_scorer(folder, tokenizer, method):
    """A folder whose code scores a conversation by the length of its last message, as
    InternLM2-Reward's interface has it.
    """
    tokenizer.save_pretrained(folder)
    (folder / "letters.py").write_text(SCORER.replace("METHOD", method))
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "letters",
                "architectures": ["Letters"],
                "auto_map": {"AutoConfig": "letters.LetterConfig", "AutoModel": "letters.Letters"},
            }
        )
    )
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    "method",
    [
        "get_score(self, tokenizer, chat):\n        return len(chat[-1]['content'])",
        "get_scores(self, tokenizer, conversations):\n        return [len(one[-1]['content']) for "
        "one in conversations]",
        "get_scores(self, tokenizer, talks):\n        return "
        "torch.tensor([[len(one[-1]['content'])] for one in talks])",
    ],
)
def test_a_model_with_its_own_code_runs_only_when_told_so(
    method, tmp_path, values, tokenizer, monkeypatch
):
    monkeypatch.setattr(reward_sources, "BATCH_SIZE", 2)
    folder = save_scorer(tmp_path / f"model{len(method)}", tokenizer, method)
    assert values(f"model!:{folder}") == [1, 29, 2]
    with pytest.raises(
        ValueError, match="If its folder has code that you trust, give model!: in place of model:"
    ):
        values(f"model:{folder}")


def test_code_without_a_score_is_refused(tmp_path, values, tokenizer):
    folder = save_scorer(tmp_path / "silent", tokenizer, "forward(self):\n        return 0")
    with pytest.raises(
        ValueError,
        match=r"Letters has neither get_scores nor get_score\. Give model: in place of model!:",
    ):
        values(f"model!:{folder}")


@pytest.fixture
def judge(monkeypatch):
    """A server that answers by `judge.reply(prompt) -> text, None for an error`; what it was sent
    is in `judge.requests`.
    """
    monkeypatch.setattr(reward_sources, "PAUSE", 0.01)
    judge, lock = (
        Namespace(requests=[], keys=set(), at_once=0, most=0, reply=lambda prompt: "Grade: 7"),
        threading.Lock(),
    )

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                judge.requests.append(request)
                judge.keys.add(self.headers["Authorization"])
                judge.at_once += 1
                judge.most = max(judge.most, judge.at_once)
            text = judge.reply(request["messages"][0]["content"])
            with lock:
                judge.at_once -= 1
            body = json.dumps(
                {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": request["model"],
                    "choices": [
                        {
                            "index": 0,
                            "finish_reason": "stop",
                            "message": {"role": "assistant", "content": text},
                        }
                    ],
                }
            ).encode()
            self.send_response(500 if text is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield judge
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_judge_grades_question_answer_and_reference(judge, values, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge.reply = lambda prompt: (
        "<think>9?</think>Grade: **10**/10" if "\n4\n[end of the answer]" in prompt else "2.5"
    )
    samples = [
        sample("4"),
        sample("5"),
        sample("<think>4</think>six"),
        sample("<think>4"),
        sample(""),
    ]
    assert values(f"judge:{judge.url}#mini=big", samples) == [1, 0.25, 0.25, 0, 0]
    assert len(judge.requests) == 3 and judge.keys == {
        "Bearer secret"
    }  # what is empty is not asked about
    assert {request["model"] for request in judge.requests} == {"mini=big"}
    prompts = sorted(request["messages"][0]["content"] for request in judge.requests)
    assert all(
        "[question]\nWhat is 2 + 2? " in prompt and "[right answer]\n4\n" in prompt
        for prompt in prompts
    )
    assert sum("[answer]\nsix\n" in prompt for prompt in prompts) == 1 and not any(
        "<think>" in prompt for prompt in prompts
    )


def test_what_a_judge_reads_of_a_longer_conversation_without_reference():
    row = {
        "conversations": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "Hi {name}"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "And?"},
        ]
    }
    prompt = reward_sources.judge_prompt(row, "No {answer}")
    assert "[question]\nuser: Hi {name}\n\nassistant: Hello\n\nuser: And?\n[end" in prompt
    assert "[answer]\nNo {answer}\n[end" in prompt and "right answer" not in prompt
    assert "[right answer]\n7, Rome\n" in reward_sources.judge_prompt(
        {**row, "gt": ["7", "Rome"]}, "x"
    )


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("8", 8),
        ("Grade: 8", 8),
        ("**Grade:** 7.5/10", 7.5),
        ("Grade: 9\nGood.", 9),
        ("first Grade: 3, then Grade: 5", 5),
        ("8/10", 8),
        ("-3", None),
        ("Grade: -3", None),
        ("Grade: 11", None),
        ("12", None),
        ("I like it", None),
        ("", None),
        ("2 and 2 is 4", None),
    ],
)
def test_grades(text, grade):
    assert reward_sources.read_grade(text) == grade


def test_many_are_asked_at_once_but_not_all(judge, values):
    gate = threading.Barrier(
        reward_sources.CONCURRENCY, timeout=5
    )  # opens when so many are under way

    def reply(prompt):
        gate.wait()
        return "5"

    judge.reply = reply
    assert (
        values(
            f"judge:{judge.url}#m", [sample(str(i)) for i in range(2 * reward_sources.CONCURRENCY)]
        )
        == [0.5] * 16
    )
    assert judge.most == reward_sources.CONCURRENCY


def test_a_judge_is_asked_again_up_to_three_times(judge, values):
    replies = iter([None, "well", "6"])
    judge.reply = lambda prompt: next(replies)
    assert values(f"judge:{judge.url}#m", SAMPLES[:1]) == [0.6] and len(judge.requests) == 3
    judge.requests.clear()
    judge.reply = lambda prompt: "no number"
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"judge:{judge.url}#m gave no grade in 3 tries: no grade from 0 to 10 in the "
            "reply 'no number'. Is the server there"
        ),
    ):
        values(f"judge:{judge.url}#m", SAMPLES[:1])
    assert len(judge.requests) == 3
    judge.reply = lambda prompt: None
    with pytest.raises(ValueError, match=f"{judge.url}#m gave no grade in 3 tries: .*500"):
        values(f"judge:{judge.url}#m", SAMPLES[:1])


def test_a_judge_that_is_too_slow_or_away(judge, values, monkeypatch):
    release = threading.Event()
    judge.reply = lambda prompt: release.wait(5) and "5"
    monkeypatch.setattr(reward_sources, "TIME_LIMIT", 0.1)
    with pytest.raises(ValueError, match="gave no grade in 3 tries: Request timed out"):
        values(f"judge:{judge.url}#m", SAMPLES[:1])
    release.set()
    with pytest.raises(
        ValueError,
        match=r"judge:http://127\.0\.0\.1:9/v1#m gave no grade in 3 tries: Connection error",
    ):
        values("judge:http://127.0.0.1:9/v1#m", SAMPLES[:1])
