"""What a reward model thinks of conversations."""

from dataset.chat_format import encode_conversation


def score_conversations(model, tokenizer, conversations, batch_size=32):
    """Rewards of whole conversations (lists of messages), float32 [n] on the CPU, read after the last message of each.

    model: a MiniMindForSequenceClassification in evaluation mode, with its tokenizer. Only rewards of answers to one prompt
    can be compared. ValueError where `check_conversation` finds a fault.
    """
    return model.rewards([encode_conversation(tokenizer, messages)[0] for messages in conversations], batch_size)
