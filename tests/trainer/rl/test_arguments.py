"""The flags of reinforcement learning: ranges, other names, and flags without effect."""

import re

import pytest

from trainer.rl.arguments import BACKENDS, BUILT_IN, SOURCES, PolicyArgs, check_success_rewards
from trainer.rl.remote_rollout import PROTOCOLS
from trainer.rl.rewards import MAKERS, REWARDS
from trainer.runtime.arguments import parse_args


def parse(*pairs, **changes):
    flags = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
    return parse_args(PolicyArgs, [*flags, *map(str, pairs)])


def test_what_samples_is_this_process_or_a_servers_program():
    assert parse().rollout_backend == parse(rollout_engine="torch").rollout_backend == "torch"
    server = dict(sglang_base_url="http://127.0.0.1:1", sglang_shared_path="weights")
    assert parse(**server).rollout_backend == "vllm"
    args = parse(rollout_engine="sglang", **server)
    assert args.rollout_backend == "sglang"
    assert (args.rollout_url, args.rollout_dir) == ("http://127.0.0.1:1", "weights")


def test_names_without_their_functions_are_those_of_the_functions():
    """--help does not import the functions."""
    assert tuple(REWARDS) == BUILT_IN and ("torch", *PROTOCOLS) == BACKENDS
    assert tuple(MAKERS) == tuple(SOURCES)


def test_defaults_make_sense():
    args = parse()
    assert (args.max_completion_length, args.num_generations, args.beta) == (128, 8, 0)
    assert args.thinking is None and args.from_weight == "full_sft"
    assert parse(enable_thinking="on").thinking is True
    assert parse(enable_thinking="off").thinking is False


def test_completions_are_the_rows_of_a_step():
    """Whatever the number of ranks and the batch size."""
    args = parse(num_prompts=6, num_generations=3, batch_size=7)
    assert args.rows_per_step(1) == args.rows_per_step(4) == 18
    assert "from_weight" not in args.FREE and "rollout_url" in args.FREE


@pytest.mark.parametrize(
    "name, others, value",
    [
        ("max_completion_length", ["max_new_tokens", "response_length", "max_gen_len"], 60),
        ("beta", ["kl_weight", "kl_coef"], 0.5),
        ("update_epochs", ["num_iterations"], 3),
        ("num_minibatches", ["num_mini_batches"], 2),
        ("lora_rank", ["lora_r"], 4),
        ("val_ratio", ["val_share"], 0.5),
        ("num_prompts", ["examples_per_step"], 4),
        ("num_generations", ["num_samples"], 4),
    ],
)
def test_other_names_of_the_flags_are_known(name, others, value):
    for other in others:
        assert getattr(parse(**{other: value}), name) == value


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(temperature=0), "--temperature 0.0: give more than 0"),
        (dict(num_prompts=0), "--num_prompts 0: give more than 0"),
        (dict(update_epochs=0), "--update_epochs 0: give more than 0"),
        (dict(num_minibatches=0), "--num_minibatches 0: give more than 0"),
        (dict(rollout_batch_size=0), "--rollout_batch_size 0: give more than 0"),
        (dict(num_transcripts=-1), "--num_transcripts -1: give 0 or more"),
        (dict(max_staleness=-1), "--max_staleness -1: give 0 or more"),
        (dict(lora_rank=-1), "--lora_rank -1: give 0 or more"),
        (dict(beta=-1), "--beta -1.0: give 0 or more"),
        (dict(kl_estimator="k2"), "--kl_estimator has an effect with --beta only"),
        (dict(kl_estimator="k1", beta=1), "invalid choice: 'k1'"),
        (
            dict(max_completion_length=64, max_seq_len=64),
            "--max_completion_length 64 leaves no room for a prompt in --max_seq_len 64",
        ),
        (dict(from_weight="none"), "--from_weight none: a network"),
        (dict(rollout_url="http://127.0.0.1:1"), "--rollout_url needs --rollout_dir"),
        (dict(max_staleness=2), "--max_staleness without --rollout_url"),
        (dict(rollout_dir="x"), "--rollout_dir without --rollout_url"),
        (dict(rollout_backend="sglang"), "--rollout_backend sglang without --rollout_url"),
        (
            dict(rollout_engine="sglang", sglang_shared_path="x"),
            "--rollout_backend sglang without --rollout_url, so completions are sampled here: "
            "leave it out, or give the server's address, such as --rollout_url http://127.0.0.1:89",
        ),
        (
            dict(rollout_backend="torch", rollout_url="http://127.0.0.1:1", rollout_dir="x"),
            "--rollout_backend torch samples in this process, --rollout_url http://127.0.0.1:1",
        ),
        (dict(accumulation_steps=2), "--accumulation_steps: a step's completions are cut into"),
        (dict(dropout=0.1), "--dropout would train another policy"),
        (dict(num_proc=2), "--num_proc: prompts are few"),
        (dict(cache_dir="x"), "--cache_dir: prompts are few"),
        (dict(deepspeed="trainer/ds_zero2.json"), "is not for reinforcement learning here"),
    ],
)
def test_flags_that_make_no_sense_are_refused(wrong, message, capsys):
    with pytest.raises(SystemExit):
        parse(**wrong)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (
            ["answr=1"],
            "--rewards answr: there is no such reward. Take of: answer, format, think, length, "
            "overlong, repetition, tools, valid_calls, FILE.py:FUNCTION, model:FOLDER, "
            "model!:FOLDER, judge:URL#MODEL",
        ),
        (["answer"], "--rewards answer: give NAME=WEIGHT, for example answer=1"),
        (["answer=x"], "'x' is no finite number"),
        (["answer=nan"], "'nan' is no finite number; give a weight like answer=0.5"),
        (["answer=inf"], "'inf' is no finite number"),
        (["answer="], "'' is no finite number"),
        (["answer=1", "answer=2"], "--rewards answer is given twice"),
        (["judge:http://127.0.0.1:1/v1=1"], "judge:URL#MODEL"),
        (["model:=1"], "model:FOLDER"),
        (
            ["overlong=1"],
            "--overlong_buffer 0: give the number of tokens before the longest length over which "
            "the penalty grows, from 1 to 128",
        ),
        (["overlong=1", "--overlong_buffer", "129"], "from 1 to 128"),
        (["answer=1", "--overlong_buffer", "4"], "has an effect with the reward overlong only"),
    ],
)
def test_rewards_that_cannot_be_are_refused(rewards, message, capsys):
    with pytest.raises(SystemExit):
        parse("--rewards", *rewards)
    assert message in capsys.readouterr().err


def test_rewards_of_a_single_stream_are_successes():
    check_success_rewards(parse("--rewards", "answer=0.7", "tools=0.3"))
    for rewards in (["answer=1", "length=0.1"], ["answer=-1"], ["answer=1", "format=0.2"]):
        message = "SPO counts rewards as fractions of a success, from 0 to 1. Give parts"
        with pytest.raises(ValueError, match=re.escape(message)):
            check_success_rewards(parse("--rewards", *rewards))
    with pytest.raises(ValueError, match="--num_prompts 1: one completion cannot be compared"):
        check_success_rewards(parse(num_prompts=1))
