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
    "inference_rope_scaling": "a checkpoint's own config.json says how its positions are scaled: "
    'rope_parameters with "rope_type": "yarn"',
}
