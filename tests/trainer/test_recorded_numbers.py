"""Numbers that the first version wrote, with float32 and one thread on a CPU.

A change of the arithmetic shows here, and so does a change of a fingerprint, by which older runs
find their tokens and are resumed. Where a change is meant, record the new numbers and say so in
docs/LOG.md.
"""

import json

import pytest

from dataset.lm_dataset import PretrainDataset, ReasonDataset, SFTDataset
from dataset.pair_dataset import MismatchedPairs, PairDataset
from tests.helpers.checkpoints import load_tokenizer
from tests.helpers.pair_rows import pair_flags, talk, write_pairs, write_start
from tests.helpers.rows import write
from trainer import train_dpo, train_full_sft, train_pretrain
from trainer.runtime.metrics import read_metrics

STEPS = dict(max_steps=3, accumulation_steps=2, val_interval=99)
PRETRAIN = {
    "losses": [8.751934051513672, 8.56894302368164, 8.387018203735352],
    "grad_norms": [2.234884023666382, 2.2919223308563232, 2.061666965484619],
    "targets": 678,
    "validation": {"val_loss/held_out": 8.393333199097938, "val_bpb/held_out": 7.830499718254184},
    "data": "b0a767ce7b26e1b63989cc3eca8826e4f7c5b819e1926d2e0a677d5bc3aff480",
}
SFT = {
    "losses": [8.798443794250488, 8.672565460205078, 8.625669479370117],
    "grad_norms": [2.3910298347473145, 2.4785573482513428, 2.5102360248565674],
    "targets": 151,
    "validation": {"val_loss/held_out": 8.565842172373896, "val_bpb/held_out": 14.211582726589572},
    "data": "4e8c971a9082e4d487bba553474ebd28ff40ff71688a19616bbe7855ce34215e",
}
DPO = {
    "losses": [2.4624719619750977, 1.9573500752449036, 1.8656710386276245],
    "grad_norms": [5.768425464630127, 1.8457645177841187, 1.5945920944213867],
    "targets": 474,
    "validation": {
        "val_loss/held_out": 1.8739510377248128,
        "val_rewards/chosen/held_out": 0.8316016991933187,
        "val_rewards/rejected/held_out": -0.3665645768245061,
        "val_rewards/margins/held_out": 1.1981662760178249,
        "val_log_probs/chosen/held_out": -78.54774475097656,
        "val_log_probs/rejected/held_out": -103.57379659016927,
    },
}


def check(folder, recorded):
    """A run of 3 steps against its recorded numbers; other CPUs add up in another order."""
    rows = read_metrics(folder / "metrics.jsonl")
    steps, last = [row for row in rows if "loss" in row], rows[-1]
    for name, numbers in (("loss", "losses"), ("grad_norm", "grad_norms")):
        assert [row[name] for row in steps] == pytest.approx(recorded[numbers], rel=1e-4)
    assert last["targets"] == recorded["targets"]
    found = {name: last[name] for name in recorded["validation"]}
    assert found == pytest.approx(recorded["validation"], rel=1e-4)
    progress = json.loads((folder / "checkpoints" / "step-3" / "progress.json").read_text())
    assert progress["fingerprint"] == recorded.get("data", progress["fingerprint"])


def test_pretraining(flags, tmp_path):
    train_pretrain.main(flags(**STEPS))
    check(tmp_path / "out" / "pretrain_32x2", PRETRAIN)


def test_supervised_fine_tuning(flags, tmp_path):
    train_full_sft.main(flags("sft", **STEPS))
    check(tmp_path / "out" / "full_sft_32x2", SFT)


def test_preferences(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl")
    start = write_start(tmp_path / "start")
    train_dpo.main(pair_flags(tmp_path, start, sft_weight=0.2, epochs=1, **STEPS))
    check(tmp_path / "out" / "dpo_32x2", DPO)


FINGERPRINTS = {
    "texts": "fd87dadc45317e9ba08a6ed9ab1f568d86598149828ab83cbd6b727458770c1d",
    "half of the texts": "2099007ac431bed5ddd9165ae861c0b924b7f202ca18d18442fba56b0ef3ec99",
    "split": "59c692b9ea66f1ef9fda20829c534cb703cf253271785a755f300711bda7cbd6",
    "held out": "73e537c6d9c7c7865d5d89e72c28a69b9ed0d71ee27de9192a5439353340248f",
    "chats": "c8ff7d7abfb95895acb34d09600fb19c41b56628396b7c8487959c74eab0d4dd",
    "changed chats": "ef0ec8c6f31a5c7c1c12d3f55b3146c048f8033cab37e8d5f7f64c0c94b65ab5",
    "reasoning": "0acc52fcffaaf1386fa30d04a869da671c7f2b3dadb496c724c184581944f08e",
    "pairs": "61f3f43e0297e38fa3e569b66b4b7f9a448951916bce580b44e273427a3d39e1",
    "whole pairs": "347eef359b9c93a04154cf3e349c3f0ff475521e4893aa92647663752a89c984",
    "mismatched": "f8dc5e404c336835a2a7a8bd96eebb0e55ebd094bd2c90049363482aba3704e7",
}


def test_fingerprints_of_data(tmp_path):
    texts = [{"text": f"{i} and {i + 1} make {2 * i + 1}."} for i in range(9)]
    chats = [{"conversations": talk(f"What is {i}?", f"{i}")} for i in range(9)]
    for row in chats:
        row["conversations"][1]["reasoning_content"] = "so"
    pairs = [{"chosen": talk("a", f"{i}"), "rejected": talk("a", f"{i + 1}")} for i in range(9)]
    rows = {"texts": texts, "chats": chats, "pairs": pairs}
    path = {name: write(tmp_path / f"{name}.jsonl", x) for name, x in rows.items()}
    tokenizer = load_tokenizer()

    def make(kind, name, **options):
        return kind(name, tokenizer, 64, cache_dir=tmp_path / "cache", num_proc=1, **options)

    text = make(PretrainDataset, path["texts"])
    ratios = dict(system_prompt_ratio=0.5, empty_think_ratio=0.25)
    found = {
        "texts": text,
        "half of the texts": make(PretrainDataset, f"{path['texts']}@0.5"),
        "chats": make(SFTDataset, path["chats"], seed=3),
        "changed chats": make(SFTDataset, path["chats"], seed=3, **ratios),
        "reasoning": make(
            ReasonDataset, path["chats"], seed=3, direct_ratio=0.3, empty_think_ratio=1.0
        ),
        "pairs": make(PairDataset, path["pairs"]),
        "whole pairs": make(PairDataset, path["pairs"], whole=True),
        "mismatched": MismatchedPairs(make(PairDataset, path["pairs"], unpaired=True)),
    }
    found["split"], found["held out"] = text.held_out_split(0.3, seed=1, max_rows=5)
    assert {name: dataset.fingerprint for name, dataset in found.items()} == FINGERPRINTS
