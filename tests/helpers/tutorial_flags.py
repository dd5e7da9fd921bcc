"""The flags that the scripts of the minimind tutorials have had from 2024-09 to 2026-08, by ours
that take their place.
"""

_ALL = (
    "save_dir out_dir epochs batch_size learning_rate device dtype num_workers accumulation_steps "
    "grad_clip log_interval save_interval max_seq_len data_path from_resume use_wandb "
    "wandb_project use_compile"
)
_SHAPE = "hidden_size num_hidden_layers use_moe"
_STAGE = f"{_ALL} {_SHAPE} save_weight from_weight"
_OLDER = f"{_STAGE} dim n_layers ddp local_rank warmup_iters"
_RL = f"{_STAGE} ddp max_gen_len reasoning reward_model_path"
_ROLLOUT = (
    "thinking_ratio debug_mode debug_interval rollout_engine sglang_base_url sglang_model_path "
    "sglang_shared_path"
)
_GROUP = "num_generations beta loss_type epsilon epsilon_high"
_EVAL = f"save_dir out_dir device weight load_from lora_weight lora_name {_SHAPE} dim n_layers"
_TALK = f"{_EVAL} load model_mode inference_rope_scaling max_seq_len"
_STUDENT = (
    "student_hidden_size student_num_layers student_use_moe teacher_hidden_size "
    "teacher_num_layers teacher_use_moe from_student_weight from_teacher_weight"
)
FLAGS = {
    name: text.split()
    for name, text in {
        "pretrain": _OLDER,
        "full_sft": _OLDER,
        "lora": f"{_OLDER} lora_name",
        "dpo": f"{_OLDER} beta",
        "reason": _OLDER,
        "distillation": f"{_ALL} ddp local_rank warmup_iters save_weight use_moe alpha "
        f"temperature {_STUDENT}",
        "spo": f"{_RL} beta",
        "grpo": f"{_RL} {_ROLLOUT} {_GROUP}",
        "agent": f"{_STAGE} max_gen_len reward_model_path {_ROLLOUT} {_GROUP} max_total_len",
        "ppo": f"{_RL} {_ROLLOUT} clip_epsilon vf_coef kl_coef gamma lam cliprange_value "
        "ppo_update_iters early_stop_kl mini_batch_size critic_learning_rate debug_log_ratio "
        "rollout_eval_mode update_old_actor_freq",
        "eval_llm.py": f"{_TALK} max_new_tokens temperature top_p open_thinking historys "
        "history_cnt stream show_speed",
        "serve_openai_api.py": _TALK,
        "eval_toolcall.py": f"save_dir device weight load_from {_SHAPE} max_new_tokens temperature "
        "top_p show_speed backend api_base_url api_key api_model stream",
    }.items()
}
