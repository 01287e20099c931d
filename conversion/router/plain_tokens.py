"""What the tokens of a vocabulary are without case and white space, for a router that reads words."""

import torch
from transformers import PreTrainedTokenizerBase

SPACES = ("Ġ", "▁", " ")  # how tokens of byte-level BPE and SentencePiece begin where a space stands before them
UNDECODABLE = "\ufffd"  # in place of a part of a character


def plain_tokens(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(V,) int32: a number from 1 for each token id, the same for tokens that differ in case and white space only.

    It is negative where the token begins a word: after a space, and where it is no letter or digit of an alphabet.
    """
    numbers: dict[str, int] = {}
    values = []
    for token_id, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        token = token or ""
        text = tokenizer.decode([token_id])
        plain = text.strip().lower()
        if not plain or UNDECODABLE in text:
            plain = token or f"id {token_id}"
        number = numbers.setdefault(plain, len(numbers) + 1)
        continues = not token.startswith(SPACES) and not text[:1].isspace() and _is_alphabetic(text[:1])
        values.append(number if continues else -number)
    return torch.tensor(values, dtype=torch.int32)


def _is_alphabetic(character: str) -> bool:
    """A letter or digit, but for the signs of Chinese and Japanese, each of which is a word here."""
    return character.isalnum() and not "\u2e80" <= character <= "\u9fff" and character < "\U00020000"
