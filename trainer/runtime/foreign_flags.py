"""Flags of other repositories of this kind that have no counterpart here: what to type instead."""

import re

TRANSCRIPTS = "each logged step writes --num_transcripts completions to transcripts.jsonl"
ONE_RATE = "all parameters have the same --learning_rate"
PACKED = "sequences are always packed, and none sees another: leave it out"
# flag: what to type instead, or several of these; the first whose flags the script has is shown
EXPLAINED: dict[str, str | tuple[str, ...]] = {
    # the minimind tutorials
    "reward_model_path": "a reward model is a part of the reward: --rewards model:FOLDER=1",
    "thinking_ratio": "reasoning is --enable_thinking on, off, or model: as the model likes",
    "reasoning": "reasoning is --enable_thinking on, off, or model: as the model likes",
    "debug_mode": TRANSCRIPTS,
    "debug_interval": f"{TRANSCRIPTS}; --log_interval says how often",
    "debug_log_ratio": "metrics.jsonl has approx_kl and clip_fraction: leave it out",
    "sglang_model_path": "the tokenizer is that of --from_weight: leave it out",
    "max_total_len": "the longest episode, prompt and tools included, is --max_seq_len",
    "mini_batch_size": "a step's completions are cut into --num_minibatches parts",
    "critic_learning_rate": "actor and critic learn with the same --learning_rate",
    "update_old_actor_freq": "the old policy is always the one that has sampled: leave it out",
    "rollout_eval_mode": "completions are always sampled in evaluation mode: leave it out",
    "load_from": (
        "--from_weight takes a folder as well as the name of a run",
        "--weight takes a folder as well as the name of a run",
    ),
    "lora_weight": "--adapter FOLDER",
    "load": "a folder for transformers is --load_from FOLDER, other weights are --weight NAME",
    "model_mode": "--weight pretrain, full_sft, dpo, reason or grpo, for 0, 1, 2, 3 or 4",
    "history_cnt": "--historys N/2: a question and its answer are one",
    "stream": "a completion is shown while it is written: leave it out",
    "ddp": "torchrun says that there are several processes: leave it out",
    "warmup_iters": "--warmup_ratio, a fraction of all steps",
    "inference_rope_scaling": "a checkpoint's own config.json says how its positions are scaled: "
    'rope_parameters with "rope_type": "yarn"',
    # TRL and transformers
    "max_tool_calling_iterations": "--max_turns N+1 for N: calls in the last turn are not run",
    "output_dir": "a run is in SAVE_DIR/SAVE_WEIGHT_PRESET: --save_dir and --save_weight",
    "overwrite_output_dir": "--overwrite",
    "warmup_steps": "--warmup_ratio, a fraction of all steps",
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype float16",
    "optim": "--optimizer adamw or muon",
    "lr_scheduler_type": "--schedule cosine or wsd",
    "resume_from_checkpoint": "the same command with --from_resume",
    "do_train": "each stage is a script, and trains: leave it out",
    "packing": PACKED,
    # LLaMA-Factory
    "stage": "each stage is a script, trainer/train_full_sft.py, train_dpo.py and so on, and "
    "starts from the weights of --from_weight",
    "finetuning_type": "trainer/train_lora.py trains adapters, the other scripts all weights",
    "dataset": "--data_path FILES",
    "dataset_dir": "--data_path FILES",
    "eval_dataset": "--val_path FILES",
    "val_size": "--val_ratio, a fraction of the rows",
    "max_samples": "--data_path FILE@0.1 takes that fraction of the rows",
    "template": "the chat template is the one in the tokenizer's folder: leave it out",
    "lora_target": "--target_modules q_proj v_proj, with spaces between them; all: leave it out",
    "neat_packing": PACKED,
    "overwrite_cache": "tokens are made anew when the file has changed: leave it out",
    "use_swanlab": "--tracker swanlab",
    "reward_model": "a reward model is a part of the reward: --rewards model:FOLDER=1",
    # nanochat
    "run": "--use_wandb and --wandb_run_name NAME",
    "depth": "--num_hidden_layers and --hidden_size, or --preset for both",
    "num_iterations": "--max_steps",
    "total_batch_size": "tokens of a step are --batch_size times --accumulation_steps times "
    "--max_seq_len, times the number of GPUs",
    "matrix_lr": ONE_RATE,
    "embedding_lr": ONE_RATE,
    "unembedding_lr": ONE_RATE,
    "resume_from_step": "the same command with --from_resume",
    "eval_tokens": "--val_max_rows, a number of rows",
    "model_tag": "a run is named by --save_weight",
    "source": "--from_weight",
}


def explanation(name: str, known: set[str]) -> str:
    """What to type instead of the flag of that name, "" if it is not explained.

    name: without dashes. known: the flags that the script has, with their dashes; an explanation
    that names others is not for this script.
    """
    explained = EXPLAINED.get(name, ())
    for text in (explained,) if isinstance(explained, str) else explained:
        if set(re.findall(r"--\w+", text)) <= known:
            return text
    return ""
