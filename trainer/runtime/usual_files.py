"""The data files that tutorials of this model family tell people to put into dataset/."""

from pathlib import Path

from trainer.runtime.arguments import ROOT

DATASET = ROOT / "dataset"
USUAL_FILES = {  # by stage, the first that is there is taken
    "pretrain": ("pretrain_t2t_mini.jsonl", "pretrain_t2t.jsonl", "pretrain_hq.jsonl"),
    "sft": ("sft_t2t_mini.jsonl", "sft_t2t.jsonl", "sft_mini_512.jsonl", "sft_512.jsonl"),
    "lora": ("lora_medical.jsonl", "lora_identity.jsonl"),
    "dpo": ("dpo.jsonl",),
    "reason": ("r1_mix_1024.jsonl",),
    "rl": ("rlaif.jsonl", "rlaif-mini.jsonl"),
    "agent": ("agent_rl.jsonl", "agent_rl_math.jsonl"),
}


def usual_file(stage: str) -> Path | None:
    """The file that a stage takes without --data_path; None if none of its files is there."""
    paths = (DATASET / name for name in USUAL_FILES[stage])
    return next((path for path in paths if path.is_file()), None)
