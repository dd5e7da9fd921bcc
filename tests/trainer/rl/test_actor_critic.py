"""The two networks of PPO: what each computes, and that neither holds the other's parts."""

import pytest
import torch

from model.model_lora import LoRASettings, adapter_names, add_adapter
from tests.helpers.networks import build
from trainer.losses.policy import token_log_probs
from trainer.rl.actor_critic import ActorCritic, Critic


@pytest.fixture
def batch():
    """Two rows, of which five tokens were sampled."""
    ids = torch.randint(1, 97, (2, 8))
    is_source = torch.zeros(2, 8, dtype=torch.bool)
    is_source[0, 2:5] = is_source[1, 5:7] = True
    labels = torch.where(is_source.roll(1, 1), ids, -100)
    positions = torch.arange(8).repeat(2, 1)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "is_source": is_source}


def test_a_critic_begins_at_0_and_reads_hidden_states(batch):
    policy = build("qwen3")
    critic = Critic(policy)
    assert critic(batch).tolist() == [0] * 5
    with torch.no_grad():
        critic.value.weight.fill_(0.5)
        critic.value.bias.fill_(2)
        hidden = policy.model(batch["input_ids"]).last_hidden_state[batch["is_source"]]
        torch.testing.assert_close(critic(batch), 0.5 * hidden.sum(-1) + 2)


def test_both_together_are_each_alone(batch):
    policy = build("qwen3_moe")
    model = ActorCritic(policy)
    logits, values, balance_loss = model(batch, 5)
    alone = policy(batch["input_ids"]).logits[batch["is_source"]]
    torch.testing.assert_close(logits, alone)
    torch.testing.assert_close(values, model.critic(batch))
    targets = batch["input_ids"][batch["is_source"].roll(1, 1)]
    assert token_log_probs(logits, targets, 1.0)[0].shape == (5,) and balance_loss > 0
    # the critic's last layer has 32 weights and a bias
    assert model.num_parameters() == 2 * policy.num_parameters() + 33
    (logits.sum() + values.sum() + balance_loss).backward()
    assert model.critic.value.weight.grad is not None
    assert policy.model.embed_tokens.weight.grad is not None


def test_the_critic_of_a_policy_with_an_adapter_is_a_plain_network():
    policy = build("llama")
    plain = dict(policy.model.named_parameters()).keys()
    add_adapter(policy, LoRASettings(4, 8.0))
    critic = Critic(policy)
    assert adapter_names(critic) == [] and adapter_names(policy) == ["default"]
    assert all(x.requires_grad for x in critic.parameters())
    assert dict(critic.model.named_parameters()).keys() == plain
