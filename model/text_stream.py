"""Tokens to text while they come: whole characters only, and nothing that may turn out to be the
start of a stop text.
"""

import codecs
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def byte_alphabet() -> dict[str, int]:
    """The characters of a byte-level vocabulary, and the bytes that they stand for (Radford et al.
    2019, section 2.2).

    Printable bytes are spelt as themselves, the others as the characters from 256 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    spelling = {chr(byte): byte for byte in printable}
    return spelling | {chr(256 + n): byte for n, byte in enumerate(others)}


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> list[bytes]:
    """The bytes that each token of a byte-level vocabulary adds to the text: V of them.

    Special tokens add nothing; other added tokens (`<think>`, `<tool_call>`) add their spelling.
    """
    special = frozenset(tokenizer.all_special_ids)
    return _token_bytes(tokenizer.backend_tokenizer, len(tokenizer), special)


@lru_cache(maxsize=8)
def _token_bytes(backend, size, special):
    alphabet, added = byte_alphabet(), backend.get_added_tokens_decoder()
    out = []
    for token in range(size):
        if token in added:
            is_silent = added[token].special or token in special
            out.append(b"" if is_silent else added[token].content.encode())
        else:
            out.append(bytes(alphabet[char] for char in backend.id_to_token(token)))
    return out


class TextStream:
    """The text of one completion, fed with tokens.

    pieces: from `token_bytes`; stop: texts that end the completion. `text` is all that was handed
    out; `stopped` is set when a stop text came, which is cut off with everything behind it.
    stop_switches: {token: whether stop texts are looked for after it}, for special tokens around
    reasoning or tool calls; line breaks right after one belong to it. in_stop_scope: whether they
    are looked for from the start.
    """

    def __init__(
        self,
        pieces: list[bytes],
        stop: Sequence[str] = (),
        stop_switches: Mapping[int, bool] | None = None,
        in_stop_scope: bool = True,
    ):
        self.pieces, self.stop = pieces, tuple(stop)
        self.switches, self.in_scope, self.after_switch = stop_switches or {}, in_stop_scope, False
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.held, self.stopped = "", "", False

    def push(self, token: int) -> str:
        """Take in a token; returns the text (maybe empty) that is now certain."""
        text = self.decoder.decode(self.pieces[token])
        if token not in self.switches or self.stopped:
            return self._release(text)
        out, self.held = self.held + text, ""
        self.in_scope, self.after_switch = self.switches[token], True
        self.text += out
        return out

    def finish(self) -> str:
        """The rest of the text, with the part held back; half a character becomes U+FFFD."""
        if self.stopped:
            return ""
        rest = self._release(self.decoder.decode(b"", final=True))
        if not self.stopped:
            rest += self.held
            self.text, self.held = self.text + self.held, ""
        return rest

    def _release(self, new):
        if self.stopped:
            return ""
        text, start = self.held + new, self._start_of_scope(new)
        ends = [place for place in (text.find(stop, start) for stop in self.stop) if place >= 0]
        if ends:
            self.stopped, out, self.held = True, text[: min(ends)], ""
        else:
            held = max((self._overlap(text[start:], stop) for stop in self.stop), default=0)
            out, self.held = text[: len(text) - held], text[len(text) - held :]
        self.text += out
        return out

    def _start_of_scope(self, new):
        """Where stop texts may begin in the held text and `new`."""
        if not self.in_scope:
            return len(self.held) + len(new)
        if not self.after_switch:
            return 0
        rest = new.lstrip("\n")  # nothing is held after a switch
        self.after_switch = not rest
        return len(new) - len(rest)

    @staticmethod
    def _overlap(text, stop):
        """Number of characters at the end of `text` that are the beginning of `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
