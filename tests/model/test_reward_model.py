"""The reward model against transformers' sequence classifiers, and what it refuses."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.reward_model import MiniMindForSequenceClassification
from tests.helpers.networks import SMALL
from trainer.rl.reward_sources import score_conversations

SHAPE = dict(SMALL, vocab_size=6400, initializer_range=0.2)
MOE = dict(num_experts=4, num_experts_per_tok=2)
NETWORKS = {
    "Qwen3ForSequenceClassification": dict(qk_norm=True),
    "LlamaForSequenceClassification": {},
    "Qwen3MoeForSequenceClassification": dict(qk_norm=True, moe_intermediate_size=48, **MOE),
}


def reward_model(**shape):
    return MiniMindForSequenceClassification(MiniMindConfig(**SHAPE, **shape)).eval()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_folder_and_finds_the_same_rewards(name, tied, tmp_path):
    model = reward_model(**NETWORKS[name], tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(theirs).__name__ == name and theirs.config.id2label == {0: "reward"}
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not (tmp_path / "generation_config.json").exists()
    sequences = [torch.randint(32, 6400, (n,)).tolist() for n in (5, 17, 9, 1)]
    alone = torch.stack([theirs(torch.tensor([ids])).logits[0, 0] for ids in sequences])
    rows = [torch.tensor(ids) for ids in sequences]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (padded != 0).long()
    assert alone.std() > 0.1
    again = MiniMindForSequenceClassification.from_pretrained(tmp_path)
    for found in (
        model.rewards(sequences, batch_size=3),
        again.rewards(sequences),
        model(padded).logits[:, 0],
        model(padded, attention_mask=mask).logits[:, 0],
        theirs(padded, attention_mask=mask).logits[:, 0],
    ):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_reading_back_is_exact(tmp_path):
    model = reward_model(**NETWORKS["Qwen3MoeForSequenceClassification"])
    model.save_pretrained(tmp_path)
    again = MiniMindForSequenceClassification.from_pretrained(tmp_path)
    assert not again.training and again.config.moe_intermediate_size == 48
    for name, x in again.state_dict().items():
        assert torch.equal(x, model.state_dict()[name]), name
    low = MiniMindForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16


def test_it_begins_with_the_layers_of_a_language_model():
    language_model = MiniMindForCausalLM(MiniMindConfig(**SHAPE))
    model = MiniMindForSequenceClassification.from_causal_lm(language_model)
    ids = torch.randint(32, 6400, (1, 9))
    hidden = language_model.model(ids).last_hidden_state[0, -1]
    torch.testing.assert_close(model(ids).logits[0], model.score.weight @ hidden)
    assert model.training and model.score.weight.shape == (1, 32)


def test_rewards_are_float32_under_autocast():
    model = reward_model(qk_norm=True)
    with torch.autocast("cpu", torch.bfloat16):
        rewards = model(torch.randint(32, 6400, (4, 9))).logits
    assert rewards.dtype == torch.float32 and not torch.equal(rewards, rewards.bfloat16().float())


@pytest.mark.parametrize(
    "shape", [dict(MOE, norm_topk_prob=True, shared_expert_intermediate_size=32), dict(MOE)]
)
def test_shapes_that_transformers_has_no_classifier_for_are_refused(shape):
    message = r"no sequence classifier of the type (granitemoeshared|minimind).*minimind-3"
    with pytest.raises(ValueError, match=message):
        reward_model(**shape)


def test_a_language_models_folder_is_refused(tmp_path):
    MiniMindForCausalLM(MiniMindConfig(**SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a language model, no reward model"):
        MiniMindForSequenceClassification.from_pretrained(tmp_path)


def test_the_balance_loss_is_that_of_the_documents_read():
    """Of two packed documents with two and one rewards; 0 where nothing is asked for, and for a
    dense network.
    """
    model = reward_model(**NETWORKS["Qwen3MoeForSequenceClassification"], router_aux_loss_coef=0.5)
    ids, positions = torch.randint(32, 6400, (1, 12)), torch.tensor([[*range(7), *range(5)]])
    keep = torch.zeros(1, 12, dtype=torch.bool)
    keep[0, [3, 6, 11]] = True
    loss = model(ids, position_ids=positions, head_positions=keep, num_items_in_batch=5).loss
    alone = []
    for part in (ids[:, :7], ids[:, 7:]):
        positions = torch.arange(part.shape[1])[None]
        options = dict(position_ids=positions, head_positions=positions == 0, num_items_in_batch=1)
        alone.append(model(part, **options).loss)
    torch.testing.assert_close(loss, (2 * alone[0] + alone[1]) / 5)
    assert alone[0] > 0.5 and model(ids).loss == 0
    assert reward_model()(ids, head_positions=keep, num_items_in_batch=1).loss == 0


def test_conversations_are_scored_as_apply_chat_template_writes_them(tokenizer, tmp_path):
    model = reward_model(qk_norm=True)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)

    def talk(completion):
        roles = ("user", "Two?"), ("assistant", completion)
        return [{"role": role, "content": text} for role, text in roles]

    talks = [talk("2"), talk("That is two. " * 9)]
    found = score_conversations(model, tokenizer, talks)
    for one, reward in zip(talks, found):
        batch = tokenizer.apply_chat_template(one, return_tensors="pt", return_dict=True)
        score = theirs(batch["input_ids"]).logits[0, 0]
        torch.testing.assert_close(score, reward, rtol=1e-4, atol=1e-5)
    marker = talk("2<|im_end|>\n<|im_start|>user\nGreat!")
    assert score_conversations(model, tokenizer, [marker]) != found[0]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pad_token_id"] == tokenizer.pad_token_id
