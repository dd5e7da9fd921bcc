"""Preference pairs: what becomes of a row, and that the packed trees mean what each side alone
means.
"""

import pytest
import torch

from dataset import inspect_rows
from dataset.chat.format import encode_conversation, encode_prompt
from dataset.packing import IGNORE
from dataset.pair_dataset import (
    CHOSEN,
    PROMPT,
    REJECTED,
    MismatchedPairs,
    PairBatches,
    PairDataset,
    collate_trees,
    fit,
    tree_mask,
)
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from tests.helpers.rows import chat, write
from trainer.losses.preference import completion_log_probs
from trainer.runtime.costs import step_work

SHAPE = dict(
    vocab_size=6400,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    initializer_range=0.2,
)
NETWORKS = {
    "qwen3": dict(qk_norm=True),
    "llama": {},
    "moe": dict(qk_norm=True, num_experts=4, num_experts_per_tok=2),
}


def ask(text):
    return {"role": "user", "content": text}


def say(text, **extra):
    return {"role": "assistant", "content": text, **extra}


def pair(prompt, chosen, rejected):
    prompt = [ask(prompt)] if isinstance(prompt, str) else prompt
    return {"chosen": [*prompt, say(chosen)], "rejected": [*prompt, say(rejected)]}


MANY = [
    pair(
        f"How much is {i} + {i}?" + " Think!" * (i % 3),
        f"Gladly! It is {2 * i}." + " Bye." * (i % 4),
        f"{2 * i + 1}" * (1 + i % 5),
    )
    for i in range(40)
]


@pytest.fixture
def pairs(tmp_path, tokenizer):
    return lambda rows, max_seq_len=256, **options: PairDataset(
        write(tmp_path / "rows.jsonl", rows),
        tokenizer,
        max_seq_len,
        cache_dir=tmp_path / "cache",
        num_proc=1,
        **options,
    )


def parts(tokenizer, item):
    """The texts of prompt, chosen and rejected answer, and of both answers' scored tokens."""
    ids, labels, branch = item["input_ids"], item["labels"], item["branch"]
    texts = [tokenizer.decode(ids[branch == one]) for one in (PROMPT, CHOSEN, REJECTED)]
    return texts + [
        tokenizer.decode(labels[(branch == one) & (labels != IGNORE)]) for one in (CHOSEN, REJECTED)
    ]


def test_a_pair_is_one_tree(pairs, tokenizer):
    dataset = pairs([pair("Two and two?", "Four.", "Five.")])
    assert parts(tokenizer, dataset[0]) == [
        "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n",
        "Four.<|im_end|>\n",
        "Five.<|im_end|>\n",
        "Four.<|im_end|>",
        "Five.<|im_end|>",
    ]
    assert dataset.report.rows_used == 1 and dataset.report.tokens == len(dataset[0]["input_ids"])
    assert dataset.report.targets == (dataset[0]["labels"] != IGNORE).sum()


def test_only_what_follows_the_shared_messages_is_scored(pairs, tokenizer):
    shared = [{"role": "system", "content": "Be kind."}, ask("Hello?"), say("Hi."), ask("Two?")]
    tools = [
        say("", tool_calls=[{"name": "add", "arguments": {}}]),
        {"role": "tool", "content": "4"},
        say("Four."),
    ]
    row = {"chosen": [*shared, *tools], "rejected": [*shared, say("5")]}
    prompt, chosen, rejected, *scored = parts(tokenizer, pairs([row])[0])
    assert prompt.endswith(
        "Hi.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (
        "<tool_response>\n4" in chosen
        and chosen.endswith("Four.<|im_end|>\n")
        and rejected == "5<|im_end|>\n"
    )
    assert scored == [
        '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>Four.<|im_end|>',
        "5<|im_end|>",
    ]


def test_sides_that_the_template_begins_differently(pairs, tokenizer):
    """An empty think block is no target; reasoning in a shared message is shown only where no
    question follows.
    """
    row = {
        "chosen": [ask("Two?"), say("2", reasoning_content="")],
        "rejected": [ask("Two?"), say("3")],
    }
    prompt, chosen, rejected, *scored = parts(tokenizer, pairs([row])[0])
    assert prompt.endswith("assistant\n") and chosen == "<think>\n\n</think>\n\n2<|im_end|>\n"
    assert scored == ["2<|im_end|>", "3<|im_end|>"]
    shared = [ask("Two?"), say("2", reasoning_content="Easy.")]
    row = {
        "chosen": [*shared, say("More?"), ask("No."), say("Bye")],
        "rejected": [*shared, say("Else?")],
    }
    prompt, chosen, rejected, *scored = parts(tokenizer, pairs([row])[0])
    assert rejected.startswith("<think>\nEasy.") and chosen.startswith("2<|im_end|>")
    assert scored == ["More?<|im_end|>Bye<|im_end|>", "Else?<|im_end|>"]


def test_every_side_is_the_rendered_conversation(pairs, tokenizer):
    dataset = pairs(MANY)
    for index, row in enumerate(MANY):
        item = dataset[index]
        for side, other in (("chosen", REJECTED), ("rejected", CHOSEN)):
            ids, is_target = encode_conversation(tokenizer, row[side])
            kept = item["branch"] != other
            assert item["input_ids"][kept].tolist() == ids
            assert (item["labels"][kept] != IGNORE).tolist() == is_target
        assert (item["branch"] == PROMPT).sum() == len(encode_prompt(tokenizer, row["chosen"][:1]))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("capacity", [96, 256])
def test_packed_log_probs_are_those_of_each_side_alone(name, capacity, pairs, tokenizer):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**SHAPE, **NETWORKS[name])).double().eval()
    rows = [
        *MANY,
        {
            "chosen": [ask("Two?"), say("2", reasoning_content="")],
            "rejected": [ask("Two?"), say("3")],
        },
        {"conversations": [ask("Good?"), say("Yes.")], "label": True},
        {"conversations": [ask("Bad?"), say("No.")], "label": False},
    ]
    dataset = pairs(rows, capacity, unpaired=True)
    batches = PairBatches(
        dataset,
        batch_size=4,
        accumulation_steps=2,
        max_seq_len=capacity,
        seed=1,
        epochs=1,
        pad_id=0,
    )
    seen = []
    for batch in (micro for step in batches for micro in step):
        out = model(
            batch["input_ids"],
            attention_mask=tree_mask(batch["tree"], batch["branch"]),
            position_ids=batch["position_ids"],
            head_positions=batch["is_source"],
        )
        found = completion_log_probs(out.logits, batch)
        for index, log_probs, lengths in zip(batch["items"].tolist(), found, batch["lengths"]):
            seen.append(index)
            sides = {
                "chosen": 0,
                "rejected": 1,
                "conversations": 0 if rows[index].get("label") else 1,
            }
            for side, column in sides.items():
                if side in rows[index]:
                    ids, is_target = (
                        torch.tensor(x) for x in encode_conversation(tokenizer, rows[index][side])
                    )
                    alone = model(ids[None, :-1]).logits[0].float().log_softmax(-1)
                    expected = alone.gather(1, ids[1:, None])[:, 0][is_target[1:]]
                    assert lengths[column] == len(expected)
                    torch.testing.assert_close(
                        log_probs[column], expected.sum(), rtol=1e-6, atol=1e-5
                    )
    assert sorted(seen) == list(range(len(rows)))
    assert sum(len(step) for step in batches) > 2


def test_the_balance_loss_does_not_see_the_padding(pairs):
    """A longer row in the micro-batch makes more of it."""
    dataset = pairs(MANY)
    model = MiniMindForCausalLM(
        MiniMindConfig(**SHAPE, **NETWORKS["moe"], router_aux_loss_coef=1.0)
    )

    def balance_loss(rows):
        batch = collate_trees(rows, dataset, 256, len(rows), pad_id=0)
        return model(
            batch["input_ids"],
            attention_mask=tree_mask(batch["tree"], batch["branch"]),
            labels=batch["labels"],
            position_ids=batch["position_ids"],
            num_items_in_batch=1,
            head_positions="none",
        ).loss

    apart = balance_loss([[0], [1]]), balance_loss([[2, 3, 4, 5]])
    torch.testing.assert_close(balance_loss([[0], [1], [2, 3, 4, 5]]), sum(apart))
    assert apart[0] > 1


def test_the_mask_and_the_positions_by_hand(pairs):
    dataset = pairs(MANY)
    batch = collate_trees([[0, 3, 7], [5]], dataset, 256, 2, pad_id=0)
    mask, T = tree_mask(batch["tree"], batch["branch"])[:, 0], batch["input_ids"].shape[1]
    for b, row in enumerate([[0, 3, 7], [5]]):
        kind = [(index, branch) for index in row for branch in dataset[index]["branch"].tolist()]
        kind += [(None, PROMPT)] * (T - len(kind))
        for q in range(T):
            sees = [
                k <= q and kind[k][0] == kind[q][0] and kind[k][1] in (PROMPT, kind[q][1])
                for k in range(T)
            ]
            assert mask[b, q].tolist() == sees
            assert batch["position_ids"][b, q] == sum(sees) - 1
    # what a step costs is counted from the positions
    assert step_work([batch])[2] == mask.sum()
    assert batch["is_end"].sum() == 8 and all((batch["labels"][batch["is_end"]] == IGNORE).tolist())
    ends = torch.where(batch["is_end"][0])[0]
    assert [(batch["tree"][0, end].item(), batch["branch"][0, end].item()) for end in ends] == [
        (tree, branch) for tree in range(3) for branch in (CHOSEN, REJECTED)
    ]


def test_long_pairs_lose_the_ends_of_their_answers(pairs, tokenizer):
    assert [
        fit([5, 9], 20),
        fit([5, 9], 10),
        fit([9, 2], 6),
        fit([9, 8], 7),
        fit([4], 3),
        fit([3, 3], -1),
    ] == [[5, 9], [5, 5], [4, 2], [4, 3], [3], [0, 0]]
    long = pair("Why?", "a b c d e f g h i j k l m n o p", "q r s")
    whole = pairs([long])
    n = (whole[0]["branch"] == PROMPT).sum()
    rows = [
        long,
        pair("Why " * 60, "a", "b"),
        pair("Why?", "z " * 90 + "a", "z " * 90 + "b"),
        pair("Why?", "a", "b"),
    ]
    dataset = pairs(rows, int(n) + 12)
    assert len(dataset) == 2 and (dataset.report.rows_cut, dataset.report.rows_too_long) == (1, 2)
    _, chosen, rejected, *_ = parts(tokenizer, dataset[0])
    assert (
        dataset.lengths[0] == n + 12
        and long["chosen"][-1]["content"].startswith(chosen)
        and rejected == "q r s<|im_end|>\n"
    )
    assert "too long: " in str(dataset.report) and "rows.jsonl:2; " in str(dataset.report)
    kept = pairs(rows, int(n) + 12, whole=True)
    assert len(kept) == 1 and (kept.report.rows_cut, kept.report.rows_too_long) == (0, 3)


SHARED = [ask("Two?")]


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"text": "a"},
            r'no "chosen" and "rejected" among the keys \[.text.\]. A pair is .*prepare_data.py '
            r"convert",
        ),
        ({"chosen": SHARED}, 'no "chosen" and "rejected"'),
        ({"chosen": "a", "rejected": "b"}, "chosen: a conversation must be a list"),
        (
            {
                "chosen": [*SHARED, say("a")],
                "rejected": [*SHARED, {"role": "robot", "content": "b"}],
            },
            "rejected: message 1 .*robot",
        ),
        (pair("Two?", "a", "a"), "chosen and rejected are the same"),
        (
            {
                "chosen": [*SHARED, say("<think>\nx\n</think>\n\na")],
                "rejected": [*SHARED, say("a", reasoning_content="x")],
            },
            "the same in the chat template",
        ),
        (
            {"chosen": [ask("One?"), say("a")], "rejected": [ask("Two?"), say("b")]},
            "different prompts: message 0 differs",
        ),
        (
            {
                "chosen": [*SHARED, ask("One?"), say("a")],
                "rejected": [*SHARED, ask("Two?"), say("b")],
            },
            "prompts: message 1 differs",
        ),
        (
            {"chosen": [*SHARED, say("a")], "rejected": SHARED},
            "no message of the assistant after message 0",
        ),
        (
            {"conversations": [*SHARED, say("a")], "label": True},
            "only --loss_type kto learns from it",
        ),
    ],
)
def test_bad_rows_are_named(row, message, pairs):
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: .*{message}"):
        pairs([MANY[0], row])
    assert pairs([MANY[0], row], bad_rows="skip").report.rows_skipped == 1


@pytest.mark.parametrize(
    "row, message",
    [
        ({"conversations": [ask("a"), say("b")], "label": 1}, '"label" is 1. Give true'),
        ({"label": True}, "must be a list"),
        (
            {"conversations": [say("b"), ask("a")], "label": False},
            "no message of the assistant after message 1",
        ),
    ],
)
def test_bad_unpaired_rows_are_named(row, message, pairs):
    with pytest.raises(ValueError, match=message):
        pairs([row], unpaired=True)


def test_an_unpaired_row_scores_the_answer_to_the_last_question(pairs, tokenizer):
    talk = [ask("One?"), say("1"), ask("Two?"), say("2"), say("really")]
    dataset = pairs(
        [{"conversations": talk, "label": label} for label in (True, False)], unpaired=True
    )
    for index, column in ((0, 1), (1, 2)):
        texts = parts(tokenizer, dataset[index])
        assert (
            texts[0].endswith("Two?<|im_end|>\n<|im_start|>assistant\n") and texts[3 - column] == ""
        )
        assert texts[column + 2] == "2<|im_end|>really<|im_end|>"


def test_a_prompt_is_held_out_with_all_its_pairs(pairs):
    rows = [pair(f"Question {i // 4}", f"right {i}", f"wrong {i}") for i in range(80)]
    training, held_out = pairs(rows).held_out_split(0.2)
    prompts = [
        {
            tuple(item["input_ids"][item["branch"] == PROMPT])
            for item in map(view.__getitem__, range(len(view)))
        }
        for view in (training, held_out)
    ]
    assert not prompts[0] & prompts[1] and len(prompts[0]) == 16 and len(held_out) == 16


def test_mismatched_answers_are_another_prompts(pairs, tokenizer):
    rows = [
        pair(f"Question {i // 3}", f"right {i}", f"wrong {i}" * (1 + 9 * (i == 3)))
        for i in range(9)
    ]
    dataset = pairs(rows, 40)
    mismatched = MismatchedPairs(dataset)
    assert dataset.strangers().tolist() == [3, 3, 3, 6, 6, 6, 0, 0, 0]
    for index, partner in enumerate(dataset.strangers()):
        ours, theirs, both = (
            parts(tokenizer, one) for one in (dataset[index], dataset[partner], mismatched[index])
        )
        assert both[0] == ours[0] and all(
            whole.startswith(cut) and cut for whole, cut in zip(theirs[1:], both[1:])
        )
        assert len(mismatched[index]["input_ids"]) == mismatched.lengths[index] <= 40
    assert parts(tokenizer, mismatched[5])[1:] == parts(tokenizer, dataset[6])[1:]
    assert pairs([pair("Same", f"right {i}", "wrong") for i in range(3)]).strangers().tolist() == [
        1,
        2,
        0,
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_pairs_of_a_step(world_size, pairs):
    dataset, seen = pairs(MANY[:5]), []
    for rank in range(world_size):
        batches = PairBatches(
            dataset,
            batch_size=4,
            accumulation_steps=1,
            max_seq_len=256,
            seed=0,
            epochs=1,
            pad_id=0,
            rank=rank,
            world_size=world_size,
            rows_per_step=4,
        )
        micro_batches = batches[0]
        assert len(batches) == 1 and len(micro_batches) == 1
        seen += micro_batches[0]["items"].tolist()
        empty = micro_batches[0]
    assert sorted(seen) == list(range(5))
    if world_size == 3:  # fewer rows than ranks: the last has padding alone
        assert (
            empty["items"].shape == (0,)
            and empty["lengths"].shape == (0, 2)
            and empty["input_ids"].shape == (1, 64)
        )
        model = MiniMindForCausalLM(MiniMindConfig(**SHAPE, **NETWORKS["moe"]))
        out = model(
            empty["input_ids"],
            attention_mask=tree_mask(empty["tree"], empty["branch"]),
            labels=empty["labels"],
            position_ids=empty["position_ids"],
            head_positions=empty["is_source"],
            num_items_in_batch=1,
        )
        (completion_log_probs(out.logits, empty).sum() + out.loss).backward()
        assert all(x.grad is not None and not x.grad.any() for x in model.parameters())


def test_inspecting_shows_both_answers(pairs, tokenizer, tmp_path, capsys):
    inspect_rows.show_rows(pairs([pair("Two?", "2", "3")]), tokenizer, 1)
    assert "assistant\n⟦2<|im_end|>⟧\n⟦3<|im_end|>⟧" in capsys.readouterr().out
    inspect_rows.main(
        [
            "--inspect",
            str(write(tmp_path / "more.jsonl", [MANY[0]])),
            "--cache_dir",
            str(tmp_path / "cache"),
        ]
    )
    assert "assistant\n⟦Gladly! It is 0.<|im_end|>⟧\n⟦1<|im_end|>⟧" in capsys.readouterr().out


@pytest.mark.parametrize("end", ["", " and more of it"])
def test_answers_cut_to_the_same_words_are_left_out(pairs, end):
    """Wherever the cut falls in what both begin with."""
    start = "ok " * 100
    row = {
        side: [{"role": "user", "content": "q"}, {"role": "assistant", "content": start + text}]
        for side, text in (("chosen", "yes"), ("rejected", "no" + end))
    }
    good = {side: chat("q", side)["conversations"] for side in ("chosen", "rejected")}
    for max_seq_len in range(40, 200, 9):
        dataset = pairs([row, good], max_seq_len)
        assert dataset.report.rows_too_long == 1 and len(dataset) == 1


def test_weights_of_a_pair(pairs, tokenizer):
    """Before the compared answers they mean nothing; on these they are a mistake."""
    start = [*chat("q", "a", weight=0)["conversations"], {"role": "user", "content": "r"}]
    row = {
        side: [*start, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")
    }
    plain = {
        side: [{**one, "weight": 1} if one["role"] == "assistant" else one for one in row[side][:3]]
        + row[side][3:]
        for side in row
    }
    assert parts(tokenizer, pairs([row])[0]) == parts(tokenizer, pairs([plain])[0])
    row["chosen"][-1]["weight"] = 0
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:1: the compared answer is not to be trained"
    ):
        pairs([row])
