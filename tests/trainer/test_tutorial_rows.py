"""Files of the minimind tutorials in the stages of reinforcement learning: two steps of each, what
the model sees, and the reward that rows without a list of calls have.
"""

import pytest

from dataset.chat.tools import EVERYDAY_TOOLS, load_tools
from dataset.toy.tools import tool_schemas
from tests.helpers.checkpoints import load_tokenizer
from tests.helpers.prompt_rows import folder_of, policy_flags, record_samples, steps, write_policy
from tests.helpers.tool_episodes import Script, call, results
from tests.helpers.tutorial_rows import write_agent_rl, write_rlaif, write_rows
from trainer import train_agent, train_grpo, train_ppo, train_spo


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):
    monkeypatch.setattr("trainer.runtime.loop.plot_curve", lambda folder: None)


def flags(folder, path, **changes):
    """A run of two steps from a random network; a reward of format alone, unless told otherwise."""
    start = write_policy(folder / "start", 10)
    options = {"data_path": path, "max_steps": 2, "max_seq_len": 1000, "rewards": "format=1"}
    return policy_flags(folder, start, **{**options, "val_ratio": 0, **changes})


@pytest.mark.parametrize("stage", [train_grpo, train_ppo, train_spo])
def test_rlaif_rows(stage, tmp_path, monkeypatch, capsys):
    rollouts = record_samples(monkeypatch, stage)
    single = {"num_generations": 1} if stage is train_spo else {}
    stage.main(flags(tmp_path, write_rlaif(tmp_path / "rlaif.jsonl"), **single))
    assert "without their last answer, which the model writes: 12" in capsys.readouterr().out
    prompt = load_tokenizer().decode(rollouts[0][0].prompt)
    assert prompt.endswith("<|im_start|>assistant\n") and "无" not in prompt and "说说" in prompt
    assert len(steps(folder_of(tmp_path / "out"))) == 2


def test_the_default_reward_says_what_rlaif_rows_need(tmp_path):
    path = write_rlaif(tmp_path / "rlaif.jsonl")
    with pytest.raises(ValueError, match=r"rlaif.jsonl:1: .*--rewards without answer, such as mod"):
        train_grpo.main(flags(tmp_path, path, rewards=None))


CALLS = {
    "乘": [call("calculate_math", expression="7 × 8")],
    "miles": [call("unit_converter", value=10, from_unit="km", to_unit="miles")],
    "东京": [
        call("get_current_weather", location="东京"),
        call("get_exchange_rate", from_currency="USD", to_currency="CNY"),
    ],
    "早上好": [call("translate_text", text="早上好", target_language="english")],
}
ANSWERS = {"乘": "56", "miles": "6.2137", "东京": "12°C, 7.21", "早上好": "It is Good morning."}


def perfect(prompt, seed):
    """The right calls, then the right answer; every second episode guesses without a call."""
    name = next(name for name in CALLS if name in prompt)
    return "\n".join(CALLS[name]) if "<tool_response>" not in prompt and seed % 2 else ANSWERS[name]


@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_agent_rows_run_the_everyday_tools(loss_type, tmp_path, monkeypatch, capsys):
    """Without --tools; a valid call for each value of "gt" is rewarded, none is not."""
    monkeypatch.setattr(train_agent, "open_rollout", lambda *_: Script(load_tokenizer(), perfect))
    rollouts = record_samples(monkeypatch, train_agent)
    path = write_agent_rl(tmp_path / "agent_rl.jsonl")
    changes = {"loss_type": loss_type, "rewards": None, "num_generations": 8}
    train_agent.main(flags(tmp_path, path, **changes, max_completion_length=64))
    said = capsys.readouterr().out
    assert (
        "tools of dataset/chat/everyday_tools.py, because rows offer them: calculate_math" in said
    )
    samples = [sample for rollout in rollouts for sample in rollout]
    for sample in samples:
        has_called = bool(results(sample))
        assert sample.rewards["answer"] == 1 and sample.rewards["tools"] == has_called
        assert not any("error" in result for result in results(sample))
    assert {sample.rewards["tools"] for sample in samples} == {0, 1}
    assert len(steps(folder_of(tmp_path / "out"))) == 2


def test_agent_rows_and_a_real_random_network(tmp_path):
    path = write_agent_rl(tmp_path / "agent_rl.jsonl")
    train_agent.main(flags(tmp_path, path, rewards=None, val_ratio=0.2))
    assert len(steps(folder_of(tmp_path / "out"))) == 2


def test_a_file_of_tools_that_lacks_some_is_told_where_they_are(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataset.chat.tools import tool\n\n@tool\ndef look() -> str:\n    '''Look.'''\n"
    )
    path = write_agent_rl(tmp_path / "agent_rl.jsonl")
    with pytest.raises(ValueError, match=r"--tools \(dataset/chat/everyday_tools.py has calculate"):
        train_agent.main(flags(tmp_path, path, rewards=None, tools=tmp_path / "mine.py"))


def test_calls_of_everyday_tools_compare_by_their_results(tmp_path, monkeypatch):
    """Next to the toy world's tools in one file: 7 × 8 is the call 7*8, and no other sum."""
    schemas = [load_tools(EVERYDAY_TOOLS).tools["calculate_math"].schema]
    system = {"role": "system", "content": "", "tools": schemas + tool_schemas(("get_time",))}
    calls = [{"name": "calculate_math", "arguments": {"expression": "7*8"}}]
    row = {"conversations": [system], "gt": ["56"], "calls": calls}
    rows = [
        {**row, "conversations": [system, {"role": "user", "content": f"{i} 乘"}]} for i in range(8)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    other = call("calculate_math", expression="7 + 49 + 1")

    def reply(prompt, seed):
        return other if seed % 2 and "<tool_response>" not in prompt else perfect(prompt, 1)

    monkeypatch.setattr(train_agent, "open_rollout", lambda *_: Script(load_tokenizer(), reply))
    rollouts = record_samples(monkeypatch, train_agent)
    train_agent.main(flags(tmp_path, path, rewards=None, max_completion_length=64))
    found = {
        (results(one)[0]["result"], one.rewards["tools"]) for rollout in rollouts for one in rollout
    }
    assert found == {("56", 1), ("57", 0)}
