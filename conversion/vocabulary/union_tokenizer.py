"""The tokenizer of a union of vocabularies: the base's, with the tokens that only experts have.

Pieces of an expert's own segmentation (a model that was extended by another language) are in it too, so that every id
decodes; but they never match in a text, or other experts would be given tokens that they do not know.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, decoders
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conversion.io.model_files import TOKENIZER_CONFIG, read_config_file, write_json
from conversion.vocabulary.own_vocabulary import OwnVocabulary, named_templates

# A private character that no text has in front of a piece; the decoder takes it away again.
PIECE_MARK = "\uf8ff"

SAMPLES = (
    "Hello, how are you today?",
    "The quick brown fox jumps over the lazy dog.",
    "What is 12.5 % of 1,234,567? Let x = 3y - 7; solve for y.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    '\t{"key": [1, 2, null], "nested": {"empty": ""}}',
    "  two spaces before, and three   between; a line\r\nand another\n\n\nfar below",
    "https://example.org/a/path?query=1&other=two#part",
    "请用中文介绍一下人工智能的历史。",
    "日本語の文章もあります。",
    "Привет, как дела?",
    "مرحبا بالعالم",
    "À l'œuvre on connaît l'artisan; Straße, naïve, coöperate",
    "∑ x² ≥ ∫ f(t) dt → ∞",
    "🙂👩‍👩‍👧 emoji",
)


def extended_tokenizer(base: PreTrainedTokenizerBase, tokens: list[AddedToken], first: int) -> PreTrainedTokenizerBase:
    """The base's tokenizer with further tokens, the first at id `first`, as it will be loaded from its files.

    Raises:
        ValueError: a token would get another id than the next one, or a text without it would be encoded otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        # Some classes build their own pipeline and forget what was changed in tokenizer.json; this one loads it.
        file = Path(folder) / TOKENIZER_CONFIG
        write_json(file, {**read_config_file(file), "tokenizer_class": "PreTrainedTokenizerFast"})
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if any(token.content.startswith(PIECE_MARK) for token in tokens):
            backend = tokenizer.backend_tokenizer
            if backend.decoder is None:
                raise ValueError(
                    "the base's tokenizer has no decoder, so the pieces of an expert with another segmentation cannot "
                    "be decoded: use tokenizer_source 'base'"
                )
            backend.decoder = decoders.Sequence([decoders.Replace(PIECE_MARK, ""), backend.decoder])
        tokenizer.add_tokens(tokens)
        tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    for number, token in enumerate(tokens, start=first):
        if tokenizer.convert_tokens_to_ids(token.content) != number:
            raise ValueError(
                f"the base's tokenizer gives the token {token.content!r} the id "
                f"{tokenizer.convert_tokens_to_ids(token.content)}, expected {number}: its ids have gaps that it fills"
            )
    for text in SAMPLES:
        if not any(token.content in text for token in tokens) and tokenizer.encode(text) != base.encode(text):
            raise ValueError(f"the base's tokenizer ({type(base).__name__}) cannot be extended: it changes {text!r}")
    return tokenizer


def sample_texts(own: OwnVocabulary, max_added_tokens: int = 256) -> Iterator[str]:
    """Texts on which an expert's tokenizer is compared: general ones, its added tokens, a rendered conversation."""
    yield from SAMPLES
    for token in list(own.added_tokens.values())[-max_added_tokens:]:
        yield f"one{token.content}two {token.content} three"
    for template in named_templates(own.tokenizer).values():
        try:
            messages = [{"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "42."}]
            yield own.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception:  # a template may refuse a conversation that it is not for
            continue
