"""How good a policy is on held-out prompts: the rewards of its greedy completions."""

import numpy as np

from dataset.prompt_dataset import PromptDataset
from trainer.rl.rewards import Rewards
from trainer.rl.rollout import Sampler, part_of_rank
from trainer.runtime.run import Run


def held_out_scores(
    run: Run, sampler: Sampler, held_out: dict[str, PromptDataset], rewards: Rewards, index: int = 0
) -> tuple[dict[str, float], str]:
    """({"val_reward/PART/NAME": mean over the greedy completions}, a sentence with an example).

    All ranks call together; `index` of the validation changes nothing.
    """
    scores, sentences = {}, []
    if held_out:
        sampler.rollout.refresh(now=True)
    for name, dataset in held_out.items():
        items = part_of_rank(list(range(len(dataset))), run.ranks)
        samples = rewards.rate(sampler(dataset, items, [0] * len(items), temperature=0))
        samples = run.ranks.gather(samples)
        means = {
            part: float(np.mean([sample.rewards[part] for sample in samples]))
            for part in samples[0].rewards
        }
        scores |= {f"val_reward/{part}/{name}": mean for part, mean in means.items()}
        question = dataset.rows[0]["conversations"][-1]["content"].strip()
        listed = ", ".join(f"{part} {mean:.3f}" for part, mean in means.items())
        sentences.append(f"{name}: {listed}; {question!r} -> {samples[0].text.strip()!r}")
    sampler.rollout.watch.lap()  # this sampling is not the next step's
    return scores, "\n".join(sentences)
