"""The commands of the minimind tutorials, typed word for word in a folder like theirs; flags that
are appended only keep them small.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from scripts.openai_api import server as serving
from scripts.openai_api.model_pool import load_models
from scripts.terminal_chat import Talk
from tests.helpers.fake_rollout_server import FakeServer
from tests.helpers.other_checkout import write_checkout
from tests.helpers.prompt_rows import FUNCTION
from trainer.runtime import data, tracker, usual_files
from trainer.runtime.arguments import ROOT
from trainer.runtime.metrics import read_metrics
from trainer.runtime.process import Compute

NETWORK = ["--hidden_size", "64", "--num_hidden_layers", "1"]
SMALL = shlex.split("--save_dir ../out --device cpu --max_steps 2 --batch_size 2 --num_proc 1")
RL = shlex.split(
    "--save_dir ../out --device cpu --max_steps 1 --num_prompts 2 --num_generations 2 "
    "--max_gen_len 8 --val_ratio 0"
)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return write_checkout(tmp_path_factory.mktemp("theirs") / "minimind")


@pytest.fixture
def checkout(template, tmp_path, monkeypatch):
    """A copy of the folder, in which `type_command` is at home."""
    folder = shutil.copytree(template, tmp_path / "minimind")
    monkeypatch.setattr(usual_files, "DATASET", folder / "dataset")
    monkeypatch.setattr(data, "TOY", tmp_path / "toy")
    monkeypatch.setattr("trainer.runtime.loop.plot_curve", lambda folder: None)
    monkeypatch.chdir(folder)
    return folder


def type_command(line: str, more: list[str] | str = ()) -> None:
    """Run a line like `cd trainer && python train_dpo.py`, with more flags, in this process."""
    *folders, program = line.split(" && ")
    for folder in folders:
        os.chdir(folder.removeprefix("cd "))
    python, script, *argv = shlex.split(program)
    assert python == "python"
    name = Path(script).stem
    place = next(p for p in ("", "trainer", "scripts") if (ROOT / p / script).is_file())
    module = import_module(f"{place}.{name}".removeprefix("."))
    module.main([*argv, *(shlex.split(more) if isinstance(more, str) else more)])


def last_step(folder: Path) -> dict:
    """The last metrics of a training step in a run's folder, which holds weights."""
    assert any((folder / f"{name}.safetensors").is_file() for name in ("model", "adapter_model"))
    return [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row][-1]


# --- training ---

OF_STAGES = [  # command, appended flags, the file of dataset/ that it takes, its run in out/
    ("python train_pretrain.py", NETWORK, "pretrain_t2t_mini.jsonl", "pretrain_64x1"),
    ("python train_full_sft.py", [*NETWORK, "--from_weight", "none"], "sft_t2t_mini.jsonl", ""),
    ("python train_lora.py", NETWORK, "lora_medical.jsonl", "lora_64x1"),
    ("python train_dpo.py", NETWORK, "dpo.jsonl", "dpo_64x1"),
    ("python train_reason.py", ["--format_prompts", "0"], "r1_mix_1024.jsonl", "reason_64x1"),
    (
        "python train_distillation.py",
        ["--from_student_weight", "full_sft", "--student_hidden_size", "64"],
        "sft_t2t_mini.jsonl",
        "distillation_64x1",
    ),
]


@pytest.mark.parametrize("line, more, file, run", OF_STAGES)
def test_a_stage_takes_the_file_of_its_tutorial(line, more, file, run, checkout, tmp_path, capsys):
    cache = ["--max_seq_len", "256", "--cache_dir", str(tmp_path / "cache")]
    type_command(f"cd trainer && {line}", [*more, *SMALL, *cache])
    out = capsys.readouterr().out
    assert f"learning from {checkout / 'dataset' / file}" in out and "24 read, 24 used" in out
    assert last_step(checkout / "out" / (run or "full_sft_64x1"))["step"] == 2
    if "--from_weight" not in more and "pretrain" not in line:  # they began from out/*.pth
        assert f"full_sft_64.pth: the tokenizer of {checkout / 'model'}" in out


def test_a_tokenizer_is_trained_on_the_file_of_its_tutorial(checkout, capsys):
    line = "cd trainer && python train_tokenizer.py"
    type_command(line, "--save_dir ../model_learn_tokenizer/ --vocab_size 400")
    file = checkout / "dataset" / "sft_t2t_mini.jsonl"
    assert f"learning from {file}" in capsys.readouterr().out
    assert (checkout / "model_learn_tokenizer" / "tokenizer.json").is_file()


def test_the_first_chapter_from_pretraining_to_a_chat(checkout, tmp_path, monkeypatch, capsys):
    (checkout / "out" / "full_sft_64.pth").unlink()
    small = [*SMALL, "--max_seq_len", "64", "--cache_dir", str(tmp_path / "cache")]
    type_command("cd trainer && python train_pretrain.py", [*NETWORK, *small, "--save_every", "1"])
    checkpoints = checkout / "out" / "pretrain_64x1" / "checkpoints"
    shutil.rmtree(checkpoints / "step-2")
    type_command("python train_pretrain.py --from_resume 1", [*NETWORK, *small, "--save_every=1"])
    assert (checkpoints / "step-2").is_dir()
    type_command("python train_full_sft.py", small)
    assert not (checkout / "out" / "full_sft_64.pth").exists()
    told = chat(monkeypatch, "cd .. && python eval_llm.py --weight full_sft")
    assert told.chats and told.engine.model.config.hidden_size == 64
    assert not chat(monkeypatch, "python eval_llm.py --weight pretrain").chats
    assert "tokens/s" in capsys.readouterr().out


AGENT = (
    "python train_agent.py --rollout_engine sglang --sglang_base_url http://localhost:8998 "
    "--sglang_shared_path ./ckpt_mm --data_path ../dataset/agent_rl_math.jsonl --use_wandb"
)


class FakeWandB:
    """Stands for wandb: remembers the steps that it gets."""

    next_step, steps = 0, []

    def __init__(self, *settings):
        self.steps.clear()

    def log(self, numbers, step):
        self.steps.append(step)

    def close(self, failed):
        assert not failed


def test_agents_learn_from_the_rollouts_of_a_server(checkout, tmp_path, monkeypatch):
    monkeypatch.setitem(tracker.BACKENDS, "wandb", FakeWandB)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    (tmp_path / "reward.py").write_text(FUNCTION)  # the network's nonsense has no right answers
    rewards = ["--rewards", f"{tmp_path}/reward.py:early=1"]
    with FakeServer(checkout / "minimind-3", max_len=1024) as server:
        line = AGENT.replace("http://localhost:8998", server.url)
        type_command(f"cd trainer && {line}", [*RL, *rewards, "--max_seq_len", "1000"])
    assert "/generate" in server.paths and "/update_weights_from_disk" in server.paths
    assert "policy-" in server.loaded[-1] and (checkout / "trainer" / "ckpt_mm").is_dir()
    step = last_step(checkout / "out" / "agent_64x1")
    assert step["grad_norm"] > 0 and FakeWandB.steps == [1]


def test_agents_sample_here_with_the_engine_named_torch(checkout, capsys):
    line = "cd trainer && python train_agent.py --rollout_engine torch"
    type_command(line, [*RL, "--max_seq_len", "1000"])
    assert f"learning from {checkout / 'dataset' / 'agent_rl.jsonl'}" in capsys.readouterr().out
    assert last_step(checkout / "out" / "agent_64x1")["step"] == 1


@pytest.mark.parametrize("stage", ["ppo", "grpo", "spo"])
def test_rows_without_answers_need_another_reward(stage, checkout, tmp_path, capsys):
    line = f"cd trainer && python train_{stage}.py"
    rl = RL if stage == "grpo" else shlex.split(" ".join(RL).replace("--num_generations 2", ""))
    with pytest.raises(ValueError, match=r"rlaif\.jsonl:1: .*--rewards without answer, such as mo"):
        type_command(line, rl)
    assert f"learning from {checkout / 'dataset' / 'rlaif.jsonl'}" in capsys.readouterr().out
    (tmp_path / "reward.py").write_text(FUNCTION)
    type_command(
        line.removeprefix("cd trainer && "), [*rl, "--rewards", f"{tmp_path}/reward.py:early=1"]
    )
    assert last_step(checkout / "out" / f"{stage}_64x1")["step"] == 1


# --- talking ---


def chat(monkeypatch, line: str, more: str = "--device cpu --max_new_tokens 4") -> Talk:
    """The Talk of a command that answers one typed question."""
    talks, answer = [], Talk.answer
    typed = iter(["Who are you?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(typed))
    monkeypatch.setattr(Talk, "answer", lambda talk, text: talks.append(talk) or answer(talk, text))
    type_command(line, f"{more} --save_dir out")
    return talks[0]


@pytest.mark.parametrize(
    "line",
    [
        "python eval_llm.py --load_from ./minimind-3",
        "python eval_llm.py --load_from ./model --weight full_sft",
        "python eval_llm.py --weight full_sft",
        "python eval_llm.py  --weight full_sft --lora_weight lora_medical",
        "python eval_llm.py --load_from ./minimind-3 --open_thinking 1",
        "python eval_llm.py --weight full_sft --inference_rope_scaling",
    ],
)
def test_a_chat_begins_as_in_the_tutorial(line, checkout, monkeypatch, capsys):
    talk = chat(monkeypatch, line)
    theirs = json.loads((checkout / "model" / "tokenizer.json").read_text("utf-8"))
    assert talk.chats and talk.tokenizer.get_vocab().items() >= theirs["model"]["vocab"].items()
    assert "tokens/s" in capsys.readouterr().out
    model = talk.engine.model
    names = {name for name, _ in model.named_parameters() if "lora" in name}
    assert bool(names) == ("--lora_weight" in line)
    is_yarn = model.config.rope_parameters["rope_type"] == "yarn"
    assert is_yarn == ("scaling" in line)


def test_an_adapter_that_is_not_there_is_answered_with_those_that_are(checkout, monkeypatch):
    line = "python eval_llm.py  --weight full_sft --lora_weight lora_identity"
    with pytest.raises(
        ValueError, match=r"no adapter is found as 'lora_identity': .* only lora_medical_64\.pth\."
    ):
        chat(monkeypatch, line)


def test_a_run_of_another_name_is_answered_with_those_that_are_there(checkout):
    (checkout / "minimind-3").rename(checkout / "out" / "ppo_64x1")
    with pytest.raises(
        ValueError, match=r"no weights are found as 'ppo_actor': .* only out/ppo_64"
    ):
        type_command("python eval_llm.py --weight ppo_actor", "--save_dir out")


def test_calls_of_tools_are_counted(checkout, capsys):
    line = "cd scripts && python eval_toolcall.py --weight full_sft"
    type_command(line, "--save_dir ../out --device cpu --max_new_tokens 4 --limit 1")
    assert "overall" in capsys.readouterr().out


def test_the_server_takes_its_flags(checkout, monkeypatch):
    served = {}
    monkeypatch.setattr(
        serving, "serve", lambda args: served.update(load_models(args, Compute(args)))
    )
    lines = [
        "cd scripts && python serve_openai_api.py",
        "python serve_openai_api.py --load_from ../minimind-3 --max_seq_len 96",
        "python serve_openai_api.py --lora_name lora_medical --dim 64 --out_dir ../out",
    ]
    for line in lines:
        served.clear()
        type_command(line, "--device cpu" + ("" if "out_dir" in line else " --save_dir ../out"))
        for model in served.values():
            model.thread.close(0)
        names = ["minimind-3"] if "load_from" in line else ["full_sft"]
        assert list(served) == names + (["lora_medical"] if "lora_name" in line else [])
        assert served[names[0]].max_len == (96 if "max_seq_len" in line else 2048)


# --- sentences ---


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "python eval_model.py --load 1 --model_mode 2",
            "--load is not a flag here: a folder for transformers is --load_from FOLDER, other "
            "weights are --weight NAME; --model_mode is not a flag here: --weight pretrain, full",
        ),
        (
            "python eval_model.py --lora_name 'lora_medical' --model_mode 2",
            "--model_mode is not a flag here: --weight pretrain, full_sft, dpo, reason or grpo,",
        ),
        ("python eval_model.py --history_cnt 4 --stream True", "--historys N/2"),
        ("cd scripts && python convert_model.py", "which command, native, pth, merge? For example"),
        ("cd trainer && python train_pretrain.py --ddp --warmup_iters 0", "torchrun says"),
        ("cd trainer && python train_grpo.py --thinking_ratio 0.9", "--enable_thinking on, off"),
        ("cd trainer && python train_grpo.py --reward_model_path x", "--rewards model:FOLDER=1"),
        ("cd trainer && python train_ppo.py --critic_learning_rate 5e-7", "same --learning_rate"),
        ("cd trainer && python train_ppo.py --mini_batch_size 2", "--num_minibatches parts"),
        ("cd trainer && python train_agent.py --rollout_engine sglang", "without --rollout_url"),
    ],
)
def test_what_cannot_work_says_what_to_type(line, message, checkout, capsys):
    with pytest.raises(SystemExit) as end:
        type_command(line)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_client_without_a_server_says_which_to_start(checkout):
    pytest.importorskip("openai")
    with pytest.raises(OSError, match=r"start one with scripts/serve_openai_api\.py"):
        type_command("cd scripts && python chat_api.py", "--base_url http://127.0.0.1:9/v1")


def test_a_student_needs_the_teachers_tokenizer(checkout, tmp_path):
    with pytest.raises(
        ValueError, match=r"teacher's tokenizer \(--from_weight or --tokenizer_path"
    ):
        line = "cd trainer && python train_distillation.py --student_hidden_size 64"
        type_command(line, [*SMALL, "--student_num_layers", "1", "--cache_dir", str(tmp_path)])


# --- one row ---


@pytest.mark.parametrize("stage", ["pretrain", "full_sft", "dpo", "grpo", "agent"])
def test_one_row_alone_cannot_be_split(stage, checkout, tmp_path):
    names = {"pretrain": "pretrain_t2t_mini", "full_sft": "sft_t2t_mini", "dpo": "dpo"}
    path = checkout / "dataset" / f"{names.get(stage, 'agent_rl')}.jsonl"
    path.write_text(path.read_text("utf-8").splitlines()[0] + "\n", encoding="utf-8")
    more = ["--data_path", str(path), "--save_dir", "../out", "--device", "cpu"]
    more += ["--from_weight", str(checkout / "out" / "full_sft_64.pth"), "--max_seq_len", "512"]
    if stage not in names:
        more += ["--max_gen_len", "8"]
    line = f"cd trainer && python train_{stage}.py"
    with pytest.raises(ValueError, match=r"cannot be split.*or --val_ratio 0\."):
        type_command(line, [*more, "--cache_dir", str(tmp_path)] if stage in names else more)


# --- processes ---


def run(line: str, folder: Path, **options: object) -> str:
    """What a command prints, typed in a folder of this repository as a process of its own."""
    program, *words = shlex.split(line)
    start = [sys.executable, "-m", "torch.distributed.run"]
    start = start if program == "torchrun" else [sys.executable]
    done = subprocess.run(
        [*start, *words], cwd=folder, capture_output=True, text=True, timeout=100, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_are_processes_in_the_folders_of_the_tutorial(template, tmp_path):
    common = f"--save_dir {tmp_path} --cache_dir {tmp_path} --device cpu --max_steps 1"
    file = template / "dataset" / "pretrain_t2t_mini.jsonl"
    line = f"torchrun --nproc_per_node 1 train_pretrain.py --data_path {file} {common}"
    run(f"{line} --hidden_size 64 --num_hidden_layers 1", ROOT / "trainer")
    assert last_step(tmp_path / "pretrain_64x1")["step"] == 1
    file = template / "dataset" / "r1_mix_1024.jsonl"
    line = f"python train_distill_reason.py --data_path {file} --format_prompts 0 {common}"
    run(f"{line} --from_weight {tmp_path}/pretrain_64x1", ROOT / "trainer")
    trained = load_file(tmp_path / "reason_64x1" / "model.safetensors")
    assert all(torch.isfinite(x).all() for x in trained.values())
    line = f"python eval_model.py --load_from {tmp_path}/reason_64x1 --max_new_tokens 4"
    assert "tokens/s" in run(line, ROOT, input="Who are you?\n/exit\n")
