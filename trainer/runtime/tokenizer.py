"""The tokenizer of a network: named by --tokenizer_path, found in its folder or beside its `.pth`
file, or recognised by what the network predicts.

A network with another tokenizer than its own reads and writes nonsense without any error: many have
6,400 entries, with other meanings. So a tokenizer that does not lie with the weights must show that
it fits: with it the network must predict some plain sentences far better than with the same entries
at other places.
"""

from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model.model_minimind import MiniMindForCausalLM
from trainer.runtime.arguments import ROOT

OURS = ROOT / "model"
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # our chat template needs them
# in both languages, plain and as a chat: whatever a network has learned, it knows some of these
SENTENCES = (
    "Hello! My name is MiniMind. Who are you? I am a language model. 你好！我是一个语言模型。",
    "今天的天气很好，我们一起去公园里走一走。中国的首都是北京，这里有很多人。",
    "Once upon a time there was a little girl who lived in a house near the sea with her mother.",
    "What is 12 plus 7? The answer is 19. 3 加 5 等于多少？答案是 8。",
)
LEAST_GAIN = 1.0  # nats per token; measured: 2.0 to 3.8 with the right one, up to 0.2 with others


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. ValueError if there is none, or none of byte-level BPE."""
    folder = Path(folder).parent if Path(folder).name == "tokenizer.json" else Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json: give a folder with a tokenizer as --tokenizer_path, "
            "such as trainer/train_tokenizer.py writes"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library raises all kinds
        raise ValueError(
            f"{folder}: the tokenizer cannot be read ({type(error).__name__}: {error})"
        ) from error
    if "ByteLevel" not in tokenizer.backend_tokenizer.to_str():
        raise ValueError(
            f"{folder}: the tokenizer is not a byte-level BPE, the only kind that works here; make "
            "one with trainer/train_tokenizer.py"
        )
    return tokenizer


def tokenizer_of(
    model: MiniMindForCausalLM, source: Path, tokenizer_path: str = ""
) -> PreTrainedTokenizerBase:
    """The tokenizer of the network that was read from `source`, a folder or a `.pth` file.

    ValueError if there is none with as many entries as the network has, and which it knows.
    """
    named = Path(tokenizer_path) if tokenizer_path else source
    if tokenizer_path or (source / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(named)
        check_vocabulary(model, tokenizer, named)
        if tokenizer_path and gain(model, tokenizer) < LEAST_GAIN:
            print(
                f"warning: {source} predicts plain sentences no better with --tokenizer_path "
                f"{named} than with its entries mixed up: is it the one that it was trained with?"
            )
        return tokenizer
    beside = source.with_name(f"{source.stem}_tokenizer")  # where convert_model.py puts it
    for folder in (beside, source.parent):
        if (folder / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(folder)
            check_vocabulary(model, tokenizer, folder)
            print(f"{source.name}: the tokenizer beside it, {folder}")
            return tokenizer
    return recognised(model, source)


def recognised(model: MiniMindForCausalLM, source: Path) -> PreTrainedTokenizerBase:
    """The tokenizer near a `.pth` file, or ours, with which the network predicts best."""
    near = source.parent.resolve().parent / "model"  # out/NAME.pth, model/tokenizer.json
    gains = {}
    for folder in dict.fromkeys([near / "minimind_tokenizer", near, OURS]):
        if (folder / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(folder)
            if len(tokenizer) == model.config.vocab_size:
                gains[folder] = gain(model, tokenizer), tokenizer
    best = max(gains, key=lambda folder: gains[folder][0], default=None)
    if best is None or gains[best][0] < LEAST_GAIN:
        tried = ", ".join(map(str, gains)) or "none with so many entries"
        raise ValueError(
            f"{source} holds no tokenizer, and none that is here fits it (vocabulary "
            f"{model.config.vocab_size}; tried: {tried}): give the folder of the one that it was "
            "trained with as --tokenizer_path"
        )
    print(
        f"{source.name}: the tokenizer of {best}, with which the network predicts plain sentences "
        f"{gains[best][0]:.1f} nats per token better than with its entries mixed up"
    )
    return gains[best][1]


@torch.no_grad()
def gain(model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase) -> float:
    """By how many nats per token the network predicts SENTENCES better with this tokenizer than
    with its entries mixed up; about 0 with another's, or before any training.

    Only neighbours are mixed: low ids are frequent in every tokenizer, which any network learns.
    """
    chance, V = torch.Generator().manual_seed(0), model.config.vocab_size
    mixed = torch.cat(
        [x[torch.randperm(len(x), generator=chance)] for x in torch.arange(V).split(64)]
    )
    total, count, was_training = 0.0, 0, model.training
    model.eval()
    for sentence in SENTENCES:
        ids = torch.tensor(tokenizer(sentence, add_special_tokens=False).input_ids)
        rows = torch.stack([ids, mixed[ids]]).to(model.device)  # 2 T
        logits = model(rows[:, :-1]).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").sum(1)
        total, count = total + float(losses[1] - losses[0]), count + len(ids) - 1
    model.train(was_training)
    return total / count


def check_vocabulary(
    model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """ValueError unless token ids and rows of the embedding matrix correspond one to one."""
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} entries, the network "
            f"{model.config.vocab_size}; use the tokenizer that the network was trained with"
        )


def check_for_training(tokenizer: PreTrainedTokenizerBase, where: str | Path) -> None:
    """ValueError unless the tokenizer has the special tokens that every stage of training needs."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    missing = [name for name in CONTROL_TOKENS if name not in added]
    if missing:
        raise ValueError(
            f"{where}: the tokenizer has no special token {', '.join(missing)}, with which "
            "documents and chats are marked; make one with trainer/train_tokenizer.py, or only "
            "talk to this network"
        )
