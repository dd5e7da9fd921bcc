"""A reward model: the network with one number for a whole conversation in place of the
language-model head.

The reward is read at the conversation's last token, which alone has seen all of it. On disk it is
the standard architecture's sequence classifier: transformers' `AutoModelForSequenceClassification`
loads the folder and finds the same rewards, also with padding on the right.

Shapes: `B` batch, `T` tokens, `D` model width, `n` rewards.
"""

from pathlib import Path

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .model_minimind import (
    MiniMindConfig,
    MiniMindForCausalLM,
    MiniMindModel,
    MiniMindPreTrainedModel,
    documents,
)
from .native_format import load_strictly, native_type, read_config, read_state

WITH_CLASSIFIER = ("llama", "qwen3", "qwen3_moe")  # types with one of their own in transformers


class MiniMindForSequenceClassification(MiniMindPreTrainedModel):
    """The network and `score`, a weight [1, D]. ValueError for a shape that transformers lacks."""

    def __init__(self, config: MiniMindConfig):
        if (kind := native_type(config)) not in WITH_CLASSIFIER:
            raise ValueError(
                f"transformers has no sequence classifier of the type {kind}, so a reward model of "
                f"this shape could not be saved; it has {', '.join(WITH_CLASSIFIER)}: start from a "
                "network without shared expert, such as minimind-3 or minimind-3-moe"
            )
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @classmethod
    def from_causal_lm(
        cls, language_model: MiniMindPreTrainedModel
    ) -> "MiniMindForSequenceClassification":
        """A reward model with a random score on the layers of a language model, which it shares."""
        model = cls(language_model.config)
        model.model = language_model.model
        return model.to(language_model.device).train(language_model.training)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        head_positions: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> SequenceClassifierOutput:
        """Rewards as `logits` [n, 1]: one for each row, at its last token that is no padding.

        head_positions: bool [B, T], read the rewards there instead, in row-major order. With
        num_items_in_batch, the rewards of the whole optimizer step, `loss` is the part that keeps a
        mixture's experts busy alike: MiniMindForCausalLM's balance losses, weighted by the rewards
        read in each document; 0 for a dense network.
        """
        balance = None
        if self.config.num_experts and num_items_in_batch is not None:
            balance = documents(input_ids, attention_mask, position_ids)
        out = self.model(input_ids, attention_mask, position_ids, balance=balance)
        if head_positions is None:
            B, T = input_ids.shape
            places = torch.arange(T, device=input_ids.device)
            # the test for padding is transformers'
            last = (places * (input_ids != self.config.pad_token_id)).argmax(-1)
            hidden = out.last_hidden_state[torch.arange(B, device=input_ids.device), last]
        else:
            hidden = out.last_hidden_state[head_positions]  # n D
        # in bfloat16, rewards of about 4 would differ by 0.03 at least
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.score(hidden.to(self.score.weight.dtype))
        loss = logits.new_zeros(())
        if balance is not None:
            doc_ids, num_docs = balance
            reads = torch.bincount(doc_ids, head_positions.flatten().float(), minlength=num_docs)
            loss = self.config.router_aux_loss_coef * (reads * out.balance_losses).sum()
            loss = loss / num_items_in_batch
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def rewards(self, sequences: list[list[int]], batch_size: int = 32) -> torch.Tensor:
        """Rewards of token sequences, float32 [n] on the CPU; similar lengths share a batch."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        found = torch.empty(len(sequences))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = [torch.tensor(sequences[i]) for i in chosen]
            input_ids = nn.utils.rnn.pad_sequence(
                rows, batch_first=True, padding_value=self.config.pad_token_id
            )
            last = torch.tensor([len(row) - 1 for row in rows])[:, None]
            ends = last == torch.arange(input_ids.shape[1])
            # a token does not see later ones, so padding on the right needs no mask
            out = self(input_ids.to(self.device), head_positions=ends.to(self.device))
            found[chosen] = out.logits[:, 0].float().cpu()
        return found

    save_pretrained = MiniMindForCausalLM.save_pretrained

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None
    ) -> "MiniMindForSequenceClassification":
        """Read a saved folder; dtype: default float32. ValueError if it is none, or damaged."""
        model = cls(MiniMindConfig(**read_config(folder)))
        load_strictly(model, model.read_weights(folder), folder)
        return model.to(dtype or torch.float32).eval()

    def read_weights(self, folder: str | Path) -> dict[str, torch.Tensor]:
        """The state dict of a folder, under our names. ValueError if it is damaged."""
        state = read_state(folder, self.config)
        if "score.weight" not in state:
            raise ValueError(
                f"{folder} holds a language model, no reward model: train_reward.py makes one of it"
            )
        return state
