"""The rungs of scripts/ladder.py for reinforcement learning: what each algorithm adds to a model that was fine-tuned shortly.

The base is weaker than that of the other rungs: what is solved already leaves nothing to find. Right answers are what
dataset/toy_scorer.py holds for right, in training as the reward and afterwards on held-out questions.
"""

from dataset.toy_world import RL_SKILLS
from trainer import train_agent, train_grpo, train_ppo, train_spo

RL_EPOCHS = (1, 1)  # of pretraining and fine-tuning
COMMON = ["--max_seq_len", 256, "--max_new_tokens", 80, "--learning_rate", 2e-4, "--warmup_share", 0.1, "--val_interval", 10,
          "--max_steps", 80]


def rung(name, doc, module, *flags, skills=RL_SKILLS):
    """A rung (bench, seed) -> {what: (before, after)} that trains `module` with these flags, and measures these skills."""
    def run(bench, seed):
        folder = bench.train(module, f"{name}-{seed}", seed, "--from_weight", bench.base, *COMMON, *flags)
        asked, engine = bench.skills(*skills), bench.engine(folder)
        others = [question for question in bench.questions if question.skill not in skills]
        return {"right answers": (bench.of_base(f"right {skills}", asked), bench.accuracy(engine, asked)),
                "other skills": (bench.of_base(f"others {skills}", others), bench.accuracy(engine, others))}

    run.__name__, run.__doc__ = name, doc
    return run


def grpo_rung(loss_type, doc, *flags):
    """A member of GRPO's family."""
    return rung(loss_type, doc, train_grpo, "--loss_type", loss_type, "--num_prompts", 16, "--num_generations", 8, *flags)


RL_RUNGS = {one.__name__: one for one in (
    rung("ppo", "PPO: a critic says what was to be expected.", train_ppo, "--num_prompts", 128, "--num_minibatches", 2,
         "--update_epochs", 1),
    grpo_rung("grpo", "GRPO: the other answers to a prompt say it."),
    grpo_rung("dr_grpo", "Dr. GRPO: without the divisions that favour some prompts and lengths."),
    grpo_rung("dapo", "DAPO: a wider clip, other prompts for groups that say nothing."),
    grpo_rung("cispo", "CISPO: the weight is clipped, no token loses its gradient."),
    grpo_rung("gspo", "GSPO: one ratio for an answer."),
    rung("spo", "SPO: one answer to a prompt, against what it is known to earn.", train_spo, "--num_prompts", 128),
    rung("agent", "An agent learns to call tools with the right arguments.", train_agent, "--num_prompts", 16,
         "--max_seq_len", 512, skills=("tools",)),
)}
RL_AIMS = {(name, "right answers"): ("gain", 0.10) for name in RL_RUNGS}
