"""A reward model: the network with one number for a whole conversation in place of the language-model head.

The reward is read at the conversation's last token, which alone has seen all of it. On disk it is the standard
architecture's sequence classifier: transformers' `AutoModelForSequenceClassification` loads the folder and finds the same
rewards, also with padding on the right.

Shapes: `B` batch, `T` tokens, `D` model width, `n` rewards.
"""

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .model_minimind import MiniMindConfig, MiniMindForCausalLM, MiniMindModel, MiniMindPreTrainedModel
from .native_format import check_classifier, load_strictly, read_config, read_state, write_folder


class MiniMindForSequenceClassification(MiniMindPreTrainedModel):
    """The network and `score`, one weight [1, D] without bias. ValueError for a shape that transformers cannot load."""

    def __init__(self, config):
        check_classifier(config)
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @classmethod
    def from_causal_lm(cls, language_model):
        """The reward model that begins with the layers of a language model, which it shares, and a random score."""
        model = cls(language_model.config)
        model.model = language_model.model
        return model.to(language_model.device).train(language_model.training)

    def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=None, num_items_in_batch=None):
        """Rewards as `logits` [n, 1]: one for each row, at its last token that is no padding.

        logits_to_keep: bool [B, T], read the rewards there instead, in row-major order. With num_items_in_batch, the rewards
        of the whole optimizer step, `loss` is the part that keeps a mixture's experts busy alike: MiniMindForCausalLM's
        balance losses, weighted by the rewards read in each document; 0 for a dense network.
        """
        balance = None
        if self.config.num_experts and num_items_in_batch is not None:
            balance = MiniMindForCausalLM.documents(input_ids, attention_mask, position_ids)
        out = self.model(input_ids, attention_mask, position_ids, balance=balance)
        if logits_to_keep is None:  # the test for padding is transformers'
            last = torch.arange(input_ids.shape[1], device=input_ids.device) * (input_ids != self.config.pad_token_id)
            hidden = out.last_hidden_state[torch.arange(len(input_ids), device=input_ids.device), last.argmax(-1)]
        else:
            hidden = out.last_hidden_state[logits_to_keep]  # n D
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 would tell rewards of 4 apart by 0.03 at best
            logits = self.score(hidden.to(self.score.weight.dtype))
        loss = logits.new_zeros(())
        if balance is not None:
            doc_ids, num_docs = balance
            reads = torch.bincount(doc_ids, logits_to_keep.flatten().float(), minlength=num_docs)
            loss = self.config.router_aux_loss_coef * (reads * out.balance_losses).sum() / num_items_in_batch
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def rewards(self, sequences, batch_size=32):
        """Rewards of token sequences (lists of ids), float32 [n] on the CPU; those of similar length are computed together."""
        order, found = sorted(range(len(sequences)), key=lambda i: len(sequences[i])), torch.empty(len(sequences))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = [torch.tensor(sequences[i]) for i in chosen]
            input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.config.pad_token_id)
            ends = torch.tensor([len(row) - 1 for row in rows])[:, None] == torch.arange(input_ids.shape[1])
            # what follows a token does not change it, so padding on the right needs no mask
            found[chosen] = self(input_ids.to(self.device), logits_to_keep=ends.to(self.device)).logits[:, 0].float().cpu()
        return found

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **unused):
        """Write a folder that `AutoModelForSequenceClassification` loads; see MiniMindForCausalLM.save_pretrained."""
        if is_main_process:
            write_folder(self, save_directory, state_dict, is_classifier=True)

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        """Read a folder written by `save_pretrained`; dtype: default float32. ValueError if it is not one, or damaged."""
        model = cls(MiniMindConfig(**read_config(folder)))
        load_strictly(model, model.read_weights(folder), folder)
        return model.to(dtype or torch.float32).eval()

    def read_weights(self, folder):
        """The state dict, under our names, of a folder written by `save_pretrained`. ValueError if it is damaged."""
        state = read_state(folder, self.config.num_experts)
        if "score.weight" not in state:
            raise ValueError(f"{folder} holds a language model, no reward model: train_reward.py makes one of it")
        return state
