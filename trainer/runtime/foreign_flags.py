"""Flags of other repositories of this kind that have no counterpart here: what to type instead."""

SERVER = "a server samples with --rollout_url URL --rollout_backend sglang (or vllm)"
TRANSCRIPTS = "each logged step writes --num_transcripts completions to transcripts.jsonl"
EXPLAINED = {
    "reward_model_path": "a reward model is a part of the reward: --rewards model:FOLDER=1",
    "thinking_ratio": "reasoning is --enable_thinking on, off, or model: as the model likes",
    "debug_mode": TRANSCRIPTS,
    "debug_interval": f"{TRANSCRIPTS}; --log_interval says how often",
    "debug_log_ratio": "metrics.jsonl has the ratio of each step",
    "rollout_engine": f"this process samples, or {SERVER}",
    "sglang_base_url": SERVER,
    "sglang_model_path": "the tokenizer is that of --from_weight: leave it out",
    "max_total_len": "the longest episode, prompt and tools included, is --max_seq_len",
    "mini_batch_size": "a step's completions are cut into --num_minibatches parts",
    "critic_learning_rate": "actor and critic learn with the same --learning_rate",
    "max_tool_calling_iterations": "--max_turns N+1 for N: calls in the last turn are not run",
    "load_from": "--weight takes a folder as well as the name of a run",
    "lora_weight": "--adapter FOLDER",
    "output_dir": "a run is in SAVE_DIR/SAVE_WEIGHT_PRESET: --save_dir and --save_weight",
    "warmup_steps": "--warmup_ratio, a fraction of all steps",
    "warmup_iters": "--warmup_ratio, a fraction of all steps",
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype float16",
    "optim": "--optimizer adamw or muon",
    "lr_scheduler_type": "--schedule cosine or wsd",
    "resume_from_checkpoint": "the same command with --from_resume",
    "inference_rope_scaling": "a checkpoint's own config.json says how its positions are scaled: "
    'rope_parameters with "rope_type": "yarn"',
}
