"""The two networks of PPO: the policy, and the critic that predicts the return at each token."""

import copy
from typing import Any

import torch
from torch import nn

from model.model_lora import fold_adapters
from model.model_minimind import MiniMindForCausalLM


class Critic(nn.Module):
    """The expected return at each token: the policy's layers, copied, and a head [D] -> 1."""

    def __init__(self, policy: MiniMindForCausalLM):
        super().__init__()
        self.model = fold_adapters(copy.deepcopy(policy.model))  # adapters are the policy's alone
        self.model.requires_grad_(True)
        self.value = nn.Linear(policy.config.hidden_size, 1).to(policy.device)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Values [n] at a micro-batch's source positions: the return expected before each token."""
        out = self.model(batch["input_ids"], position_ids=batch["position_ids"])
        return self.value(out.last_hidden_state[batch["is_source"]])[:, 0].float()


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that ranks average the gradients of both."""

    def __init__(self, policy: MiniMindForCausalLM):
        super().__init__()
        self.policy, self.critic = policy, Critic(policy)
        self.config = policy.config

    def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
        for part in (self.policy, self.critic.model):
            part.gradient_checkpointing_enable(options)

    def num_parameters(self) -> int:
        return sum(x.numel() for x in self.parameters())

    def forward(
        self, batch: dict[str, torch.Tensor], num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logits [n, V] and values [n] at the source positions, the policy's balance loss).

        num_tokens: of the whole update.
        """
        out = self.policy(
            batch["input_ids"],
            position_ids=batch["position_ids"],
            labels=batch["labels"],
            num_items_in_batch=num_tokens,
            head_positions=batch["is_source"],
        )
        return out.logits, self.critic(batch), out.loss
