import json

import pytest
import torch

from dataset.packing import PackedBatches
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts.bench_training import FirstRows, Ours, Theirs, main, pad
from trainer.arguments import TrainArgs
from trainer.run import Run

SHAPE = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)


def sequences(count=23):
    rows = FirstRows()
    for _ in range(count):
        input_ids = torch.randint(3, 97, (int(torch.randint(3, 40, ())),))
        labels = torch.where(torch.rand(len(input_ids)) < 0.5, input_ids, -100)
        labels[0] = -100
        rows.append({"input_ids": input_ids.numpy(), "labels": labels.numpy()})
    return rows


def two_sides(qk_norm, size):
    run = Run(TrainArgs(device="cpu"))
    model = MiniMindForCausalLM(MiniMindConfig(**SHAPE, qk_norm=qk_norm)).train()
    batches = PackedBatches(sequences(), batch_size=2, accumulation_steps=1, max_seq_len=64, seed=0, epochs=1, pad_id=0)
    return Ours(model, run, batches), Theirs(model, run, batches, size)


@pytest.mark.parametrize("qk_norm, name", [(True, "Qwen3ForCausalLM"), (False, "LlamaForCausalLM")])
@pytest.mark.parametrize("size", [0, 3])
def test_both_sides_learn_the_same(qk_norm, name, size):
    """Same loss on the same sequences, before and after updates, however theirs are cut into batches."""
    ours, theirs = two_sides(qk_norm, size)
    assert type(theirs.model).__name__ == name
    for step in range(3):
        assert ours.step(step) == pytest.approx(theirs.step(step), abs=1e-4)
    torch.testing.assert_close(dict(ours.model.state_dict()), dict(theirs.model.state_dict()), atol=2e-4, rtol=0)


def test_both_sides_see_the_same_tokens():
    ours, theirs = two_sides(True, 4)
    for step in range(len(ours.batches)):
        packed = torch.cat([x["input_ids"][x["labels"] != -100] for x in ours.batches[step]])
        padded = torch.cat([x["input_ids"][x["labels"] != -100] for x in theirs.padded(step)])
        assert packed.tolist() == padded.tolist()
        assert all(len(x["input_ids"]) <= 4 for x in theirs.padded(step))


def test_work_of_a_step():
    rows = FirstRows({"input_ids": torch.ones(n).long().numpy(), "labels": torch.ones(n).long().numpy()} for n in (40, 50))
    batches = PackedBatches(rows, batch_size=2, accumulation_steps=1, max_seq_len=64, seed=0, epochs=1, pad_id=0)
    run, model = Run(TrainArgs(device="cpu")), MiniMindForCausalLM(MiniMindConfig(**SHAPE)).train()
    pairs = sum(n * (n + 1) // 2 for n in (40, 24, 50, 14))  # two rows of 64, their ends are documents of padding
    assert Ours(model, run, batches).work(0) == (128, 88, pairs)
    assert Theirs(model, run, batches, 0).work(0) == (100, 100, 2 * 50 * 51 // 2)


def test_pad():
    rows = [{"input_ids": torch.tensor(x).numpy(), "labels": torch.tensor([-100, *x[1:]]).numpy()} for x in ([5, 6, 7], [8, 9])]
    padded = pad(rows, pad_id=1)
    assert padded["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert padded["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.fixture
def short_rate(monkeypatch):
    monkeypatch.setattr("scripts.bench_training.matrix_rate", lambda device, dtype: 1e11)


@pytest.fixture
def chats(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.lm_dataset.DEFAULT_CACHE", tmp_path / "cache")
    turns = [{"role": "user", "content": "How much is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"conversations": turns * (1 + i % 3)}) + "\n" for i in range(24)), encoding="utf-8")
    return str(path)


def test_command(chats, short_rate, tmp_path, capsys):
    out = tmp_path / "figures.json"
    main(["--preset", "tiny", "--data_path", chats, "--rows", "20", "--steps", "3", "--warmup", "1", "--batch_size", "1",
          "--max_seq_len", "128", "--device", "cpu", "--json", str(out)])
    (figure,) = json.loads(out.read_text(encoding="utf-8"))
    assert figure["our_losses"] == pytest.approx(figure["their_losses"], abs=1e-3) and len(figure["our_losses"]) == 3
    assert figure["limit"] == figure["their_positions"] / figure["real_tokens"] >= 1
    assert figure["ratio"] == pytest.approx(figure["our_targets_per_s"] / figure["their_targets_per_s"])
    assert figure["our_positions"] == 3 * 128 and 0 < figure["targets"] < figure["real_tokens"]
    assert "| tiny | sft | Qwen3ForCausalLM |" in capsys.readouterr().out


@pytest.mark.parametrize("qk_norm, name", [(True, "Qwen3MoeForCausalLM"), (False, "GraniteMoeSharedForCausalLM")])
def test_mixtures_of_experts_have_the_same_losses(chats, short_rate, tmp_path, monkeypatch, qk_norm, name):
    shape = {**SHAPE, "vocab_size": 6400, "qk_norm": qk_norm, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    monkeypatch.setattr("trainer.weights.config_from_args", lambda args, device, vocab_size: MiniMindConfig(**shape))
    out = tmp_path / "new" / "figures.json"
    main(["--preset", "minimind-3-moe", "--data_path", chats, "--steps", "3", "--warmup", "0", "--batch_size", "1",
          "--max_seq_len", "128", "--reference_batch", "2", "--device", "cpu", "--json", str(out)])
    (figure,) = json.loads(out.read_text(encoding="utf-8"))
    assert figure["reference"] == name and figure["our_losses"] == pytest.approx(figure["their_losses"], abs=1e-4)


def test_errors(chats, capsys):
    with pytest.raises(ValueError, match=r"the rows fill 1 steps: give more of them, or make --warmup 2 plus --steps 10"):
        main(["--preset", "tiny", "--data_path", chats, "--rows", "2", "--device", "cpu"])
    with pytest.raises(SystemExit):
        main(["--steps", "0"])
    assert "--steps 0: give more than 0" in capsys.readouterr().err
