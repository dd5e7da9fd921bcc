"""Distillation's teacher: whose tokenizer is refused, and completions that the student samples."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.chat.format import encode_conversation, encode_prompt
from dataset.packing import collate
from model.engine import Engine
from model.sampling import SamplingParams
from tests.helpers.checkpoints import load_tokenizer, random_network
from tests.helpers.networks import write_network
from trainer.runtime.arguments import parse_args
from trainer.runtime.data import documents_of
from trainer.runtime.run import Run
from trainer.runtime.teacher import (
    OnPolicyCompletions,
    load_teacher,
    prompt_of,
    tokenizer_differences,
)
from trainer.train_distillation import DistillationArgs

SHAPE = dict(hidden_size=32, num_hidden_layers=1)
CONVERSATIONS = [
    [{"role": "user", "content": "1 plus 1?"}, {"role": "assistant", "content": "2"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello to you"},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Now we part."},
    ],
    [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好！", "reasoning_content": "他在打招呼。"},
    ],
]


def arguments(**changes):
    flags = [part for name, x in changes.items() for part in (f"--{name}", str(x))]
    return parse_args(DistillationArgs, ["--device", "cpu", *flags])


# --- the teacher ---


def changed(folder, change):
    """A copy of a checkpoint folder whose tokenizer.json was changed by `change(its content)`."""
    copy = folder.with_name("changed")
    shutil.copytree(folder, copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    change(content)
    (copy / "tokenizer.json").write_text(json.dumps(content))
    return copy


def swap_tokens(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġof"] = vocabulary["Ġof"], vocabulary["Ġthe"]


def swap_merges(content):
    merges = content["model"]["merges"]
    merges[5], merges[6] = merges[6], merges[5]


def rename_added_token(content):
    token = content["added_tokens"][-1]
    content["model"]["vocab"].pop(token["content"], None)
    token["content"] = "<|other|>"


@pytest.mark.parametrize(
    "change, message",
    [
        (swap_tokens, r"2 entries of the vocabulary \(e\.g\. 'Ġof': \d+ and \d+\)"),
        (swap_merges, r"2 entries of the merges"),
        (
            rename_added_token,
            r"2 entries of the added tokens \(e\.g\. '<\|other\|>': None and \d+\)",
        ),
    ],
)
def test_a_teacher_of_another_tokenizer_is_refused(change, message, tmp_path):
    other = changed(write_network(tmp_path / "teacher_32x1", 1, **SHAPE), change)
    with pytest.raises(
        ValueError,
        match=rf"MiniMind's own.* is not that of the teacher .*changed: .*{message}.*make_teacher",
    ):
        load_teacher(arguments(teacher=other), load_tokenizer(), torch.device("cpu"))


def test_the_teacher_is_frozen_and_its_flags_are_its_own(tmp_path):
    """--hidden_size is the student's; --teacher_hidden_size chooses among the runs of a name."""
    folder = write_network(tmp_path / "big_32x1", 1, **SHAPE)
    write_network(tmp_path / "big_48x1", 1, hidden_size=48, num_hidden_layers=1)
    flags = dict(teacher="big", save_dir=tmp_path, hidden_size=64, teacher_hidden_size=32)
    args = arguments(**flags, teacher_num_hidden_layers=1)
    teacher = load_teacher(args, load_tokenizer(), torch.device("cpu"))
    assert teacher.config.hidden_size == 32 and not teacher.training
    assert not any(x.requires_grad for x in teacher.parameters())
    assert tokenizer_differences(load_tokenizer(), load_tokenizer()) == "" and folder.is_dir()


# --- the student's completions ---


@pytest.fixture
def sampling():
    """sampling(ratio): (OnPolicyCompletions, its network, its tokenizer, a packed micro-batch of
    three conversations).
    """
    tokenizer = load_tokenizer()
    network = random_network(3, num_hidden_layers=1, qk_norm=True, initializer_range=0.2)
    network.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    documents = []
    for messages in CONVERSATIONS:
        ids, is_target = map(np.array, encode_conversation(tokenizer, messages))
        documents.append({"input_ids": ids, "labels": np.where(is_target, ids, -100)})
    micro = collate([documents[:2], documents[2:]], 128, 2, tokenizer.pad_token_id)

    def make(ratio):
        args = arguments(on_policy_ratio=ratio, max_completion_length=6, max_seq_len=128)
        return OnPolicyCompletions(Run(args), network, tokenizer), network, tokenizer, micro

    return make


def test_the_student_completes_the_rows_prompts_itself(sampling):
    completions, network, tokenizer, micro = sampling(1.0)
    (new,) = completions.replace_some([micro], step=4)
    documents = {tuple(prompt_of(one)): one for one in documents_of(new)}
    expected = {tuple(encode_prompt(tokenizer, messages[:-1])): None for messages in CONVERSATIONS}
    assert documents.keys() == expected.keys()
    assert (new["data_labels"] == -100).all() and (new["labels"] != -100).any()
    before = documents_of(micro)
    for prompt, one in documents.items():
        row = next(x for x in before if x["input_ids"][: len(prompt)].tolist() == list(prompt))
        _, seed = completions.draw(row, 4)
        (request,) = Engine(network, tokenizer, 1, 128).generate(
            [list(prompt)], SamplingParams(max_tokens=6, seed=seed)
        )
        assert one["input_ids"].tolist() == request.tokens and len(request.sampled) <= 7
        assert one["labels"].tolist() == [-100] * len(prompt) + request.sampled

    def sampled_in(step):
        return completions.replace_some([micro], step)[0]["input_ids"]

    assert torch.equal(sampled_in(4), new["input_ids"])
    assert not torch.equal(sampled_in(5), new["input_ids"])
    with torch.no_grad():
        network.model.norm.weight.mul_(-1)  # the completions are of the weights as they are now
    assert not torch.equal(sampled_in(4), new["input_ids"])


def test_a_fraction_of_the_rows_is_the_students_and_the_rest_stays(sampling):
    completions, _, _, micro = sampling(0.5)
    before = {tuple(one["input_ids"].tolist()): one["labels"] for one in documents_of(micro)}
    replaced = 0
    for step in range(40):
        (new,) = completions.replace_some([micro], step)
        data = documents_of({**new, "labels": new["data_labels"]})
        assert len(documents_of(new)) == 3
        for one in data:
            assert torch.equal(one["labels"], before[tuple(one["input_ids"].tolist())])
        replaced += 3 - len(data)
    assert 40 < replaced < 80  # of 120, half


def test_the_draw_depends_on_the_seed_the_step_and_the_row_alone():
    def draw(seed, step, ids):
        args = SimpleNamespace(seed=seed)
        document = {"input_ids": torch.tensor(ids)}
        return OnPolicyCompletions.draw(SimpleNamespace(args=args), document, step)

    assert draw(1, 2, [3, 4]) == draw(1, 2, [3, 4])
    others = {draw(*given) for given in ((1, 2, [3, 4]), (2, 2, [3, 4]), (1, 3, [3, 4]))}
    assert len(others | {draw(1, 2, [3, 5])}) == 4 and all(0 <= x < 1 for x, _ in others)
