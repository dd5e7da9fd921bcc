"""Episodes with tools against transformers' chat template, and everything that can go wrong in a
call.
"""

import json
import time
from types import SimpleNamespace

import pytest

from dataset.chat.tools import load_tools
from dataset.toy.tools import TOY_TOOLS
from tests.helpers.checkpoints import load_tokenizer
from tests.helpers.tool_episodes import Script, ask, call, results, write_tools
from trainer.rl.episodes import Episodes, episode_metrics
from trainer.rl.rollout import draw_seed

WORDS = {
    "en": ("You can look.", "What is it?", "Let me see.", "It is blue.", "Look, then look again."),
    "zh": ("你可以看。", "这是什么？", "我看看。", "是蓝色的。", "先看，再看一次。"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def run_episodes(tokenizer, tmp_path):
    """run_episodes(replies, conversation, **flags) -> (the Sample of one episode, its Script).

    replies: the texts of its turns. Or a function as of Script, with several conversations, which
    are batched: -> (Samples, Script).
    """

    def make(replies, conversation, tools=True, thinking=None, **flags):
        options = {"tool_timeout": 0.2, "max_turns": 4, "thinking": thinking}
        options |= {"max_completion_length": 40, "max_seq_len": 1000, **flags}
        args = SimpleNamespace(**options)
        turns = iter(replies) if isinstance(replies, list) else None
        conversations = conversation if isinstance(conversation[0], list) else [conversation]
        script = Script(tokenizer, replies if turns is None else lambda *_: next(turns))
        prompts = [templated(tokenizer, one, thinking) for one in conversations]
        dataset = SimpleNamespace(
            rows=[{"conversations": one} for one in conversations], prompts=prompts
        )
        copies = [list(prompt) for prompt in prompts]
        box = load_tools(write_tools(tmp_path)) if tools else TOY_TOOLS
        episodes = Episodes(SimpleNamespace(args=args), script, tokenizer, box)
        items = list(range(len(prompts)))
        samples = episodes(dataset, items, [70 + i for i in items])
        assert prompts == copies and [len(row["conversations"]) for row in dataset.rows] == [
            len(one) for one in conversations
        ]
        for one in samples:
            assert len(one.tokens) == len(one.is_sampled) == len(one.log_probs)
            assert all(
                x == 0 for x, is_sampled in zip(one.log_probs, one.is_sampled) if not is_sampled
            )
            assert len(one.prompt) + len(one.tokens) <= args.max_seq_len
        return (samples[0] if turns else samples), script

    return make


def templated(tokenizer, messages, thinking=None, add_generation_prompt=True):
    """Ids of a conversation by transformers' apply_chat_template."""
    options = {} if thinking is None else {"enable_thinking": thinking}
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
    )
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize("count", [1, 2])
def test_an_episode_is_what_the_template_makes_of_the_conversation(
    count, language, thinking, run_episodes, tokenizer
):
    """Before every turn the policy sees the template's ids; in the end the sampled ones are those
    that it has written.
    """
    system, question, say, answer, reasoning = WORDS[language]
    calls = "\n".join(call("look", place=f"{language}{n}") for n in range(count))
    opening = {
        None: f"<think>\n{reasoning}\n</think>\n\n",
        True: f"{reasoning}\n</think>\n\n",
        False: "",
    }[thinking]
    replies = [opening + say + "\n" + calls, opening + calls, opening + answer]
    sample, script = run_episodes(replies, ask(question, system=system), thinking=thinking)
    messages = [dict(message) for message in sample.messages]
    asked = [one["prompts"][0] for one in script.asked]
    assert [message["role"] for message in messages[2:]] == ["assistant", *["tool"] * count] * 2 + [
        "assistant"
    ]
    if thinking is False:  # the template writes an empty reasoning
        for message in messages:
            assert "reasoning_content" not in message
            message |= {"reasoning_content": ""} if message["role"] == "assistant" else {}
    else:
        assert [
            message["reasoning_content"] for message in messages if message["role"] == "assistant"
        ] == [reasoning] * 3
    for turn, prompt in enumerate(asked):
        assert prompt == templated(tokenizer, messages[: 2 + turn * (1 + count)], thinking)
    after = tokenizer("\n", add_special_tokens=False).input_ids
    assert sample.prompt + sample.tokens + after == templated(
        tokenizer, messages, thinking, add_generation_prompt=False
    )
    assert sample.is_complete and sample.messages[-1]["content"] == answer
    assert sample.text == ("<think>\n" if thinking else "") + replies[-1]

    runs, written = [], []  # each run of sampled tokens is a turn with its end
    for token, is_sampled, before in zip(
        sample.tokens, sample.is_sampled, [False, *sample.is_sampled]
    ):
        if is_sampled:
            runs += [] if before else [[]]
            runs[-1].append(token)
            written.append(token)
    assert [tokenizer.decode(run) for run in runs] == [reply + "<|im_end|>" for reply in replies]
    assert sample.old_log_probs.tolist() == [
        -0.25 - 0.5 * i for run in runs for i in range(len(run))
    ]
    assert [one["seeds"] for one in script.asked] == [[draw_seed(70, turn)] for turn in range(3)]
    assert results(sample) == [{"result": "blue"}] * 2 * count


def test_episodes_are_batched(run_episodes):
    """Of one, two and three turns; the third ends at max_turns, with a call that nobody runs."""
    conversations = [ask(f"{n}?") for n in range(3)]

    def reply(prompt, seed):
        turns = prompt.count("<tool_response>\n{")
        number = next(n for n in range(3) if f"\n{n}?" in prompt)
        return (
            f"done {number}"
            if turns == number and number < 2
            else call("look", place=f"{number} {turns}")
        )

    samples, script = run_episodes(reply, conversations, max_turns=3)
    first, second, _ = script.asked
    assert [len(one["prompts"]) for one in script.asked] == [3, 2, 1]
    assert second["seeds"] == [draw_seed(71, 1), draw_seed(72, 1)]
    assert (first["max_completion_length"], first["temperature"]) == (40, None)
    assert [sum(message["role"] == "assistant" for message in one.messages) for one in samples] == [
        1,
        2,
        3,
    ]
    assert [one.text for one in samples[:2]] == ["done 0", "done 1"] and [
        len(results(one)) for one in samples
    ] == [0, 1, 2]
    assert [one.is_complete for one in samples] == [True, True, False] and samples[2].is_sampled[-1]
    assert "tool_calls" in samples[2].messages[-1]
    assert episode_metrics(samples) == {"turns/mean": 2, "calls/mean": pytest.approx(4 / 3)}


@pytest.mark.parametrize("max_turns", [1, 2])
def test_calls_of_the_last_turn_are_not_run(max_turns, run_episodes):
    sample, script = run_episodes([call("look")] * 9, ask("?"), max_turns=max_turns)
    assert len(script.asked) == max_turns and len(results(sample)) == max_turns - 1
    assert sample.messages[-1]["role"] == "assistant" and not sample.is_complete


def test_an_episode_without_room_for_a_turn_is_cut(run_episodes):
    """With exactly enough it continues; results that no turn can follow are not in the tokens."""
    whole, script = run_episodes([call("look"), "blue"], ask("?"))
    length = len(script.asked[1]["prompts"][0])
    sample, script = run_episodes([call("look"), "blue"], ask("?"), max_seq_len=length + 40)
    assert sample.tokens == whole.tokens and sample.is_complete
    sample, script = run_episodes([call("look"), "blue"], ask("?"), max_seq_len=length + 39)
    assert len(script.asked) == 1 and not sample.is_complete and all(sample.is_sampled)
    assert sample.tokens == whole.tokens[: len(sample.tokens)] and results(sample) == [
        {"result": "blue"}
    ]
    sample, script = run_episodes([call("chat"), "blue"], ask("?", ["chat"]), max_seq_len=300)
    assert (
        len(results(sample)) == 1 and len(script.asked) == 2
    )  # the result that was too long is an error, which fits


@pytest.mark.parametrize(
    "reply",
    [
        "<tool_call>\n{nope}\n</tool_call>",
        '<tool_call>\n{"name": "look"',
        '<tool_call>{"arguments": {}}</tool_call>',
        "blue",
        '<tool_call>\n{"name": "look", "arguments": [1]}\n</tool_call>',
        f"<think>\n{call('look')}",
    ],
)
def test_what_is_no_call_ends_the_episode(reply, run_episodes):
    sample, script = run_episodes([reply], ask("?"))
    assert len(script.asked) == 1 and sample.is_complete and len(sample.messages) == 3
    assert "tool_calls" not in sample.messages[-1]


def test_a_call_in_a_turn_that_was_cut_is_not_run(run_episodes):
    sample, script = run_episodes([(call("look"), False)], ask("?"))
    assert (
        len(script.asked) == 1
        and results(sample) == []
        and not sample.is_complete
        and all(sample.is_sampled)
    )
    sample, script = run_episodes([call("look"), ("blue", False)], ask("?"))
    assert len(script.asked) == 2 and not sample.is_complete


def test_what_goes_wrong_in_a_call_is_its_result(run_episodes):
    """A row's tools are all that there are; an error in one call does not keep the next one from
    being made.
    """
    wrong = [
        call("fail"),
        call("chat"),
        call("sleep"),
        call("look", place=3),
        call("look", where="x"),
        call("trick"),
        call("away"),
        call("calculator", expression="1 + 1"),
        call("look"),
    ]
    start = time.monotonic()
    sample, _ = run_episodes(
        ["\n".join(wrong), "done"], ask("?", ["look", "fail", "chat", "sleep"])
    )
    assert time.monotonic() - start < 10 and sample.is_complete and sample.text == "done"
    assert [one.get("error", one) for one in results(sample)] == [
        "KeyError: 'nothing'",
        "chat has answered with 5014 characters, at most 4000 are allowed",
        "sleep has not answered within 0.2 seconds",
        "place must be a text",
        "look takes exactly: ; and may take: place",
        "there is no tool trick",
        "there is no tool away",
        "there is no tool calculator",
        {"result": "blue"},
    ]


def test_a_tool_cannot_speak_for_others(run_episodes, tokenizer):
    """Special tokens in a result are text: the turns are those of the template."""
    sample, _ = run_episodes([call("trick"), "done"], ask("?", ["trick"]))
    assert (
        "<|im_end|>" in results(sample)[0]["result"]
        and "<tool_call>" in sample.messages[3]["content"]
    )
    ends, starts, calls = (
        sample.tokens.count(tokenizer.convert_tokens_to_ids(name))
        for name in ("<|im_end|>", "<|im_start|>", "<tool_call>")
    )
    assert (ends, starts, calls) == (3, 2, 1)


def test_the_toy_worlds_tools_are_the_default_and_stay_as_they_are(run_episodes):
    schema = TOY_TOOLS.tools["calculator"].schema
    conversation = [
        {"role": "system", "content": "", "tools": json.dumps([schema])},
        {"role": "user", "content": "2 + 3?"},
    ]
    sample, _ = run_episodes(
        [call("calculator", expression="2 + 3"), "5"], conversation, tools=False
    )
    assert results(sample) == [{"result": 5}] and TOY_TOOLS.seconds is None


def test_without_tools_in_a_row_a_call_is_text(run_episodes):
    sample, script = run_episodes([call("look")], [{"role": "user", "content": "?"}])
    assert (
        len(script.asked) == 1
        and sample.is_complete
        and sample.messages[-1]["content"] == call("look")
    )
