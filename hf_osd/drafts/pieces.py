"""
The bytes that each token of a tokenizer stands for, found by asking the tokenizer to decode it.

Not covered: tokenizers that normalise a text beyond recognition, such as by lower case. Their tokens stand for what
they decode to.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

_UNREADABLE = "\ufffd"  # what a decoder writes for bytes that are no character
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a token of one byte, of SentencePiece
_CHUNK = 4096  # tokens that are decoded in one call


class Piece(NamedTuple):
    """
    What a token stands for.

    Attributes:
        text (`bytes`): What it adds to a text.
        is_byte (`bool`): Whether it is a stand-in for a single byte, which is used where nothing else fits.
    """

    text: bytes
    is_byte: bool


def pieces_of(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, Piece]:
    """
    Return what each token adds to a text that is decoded.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        size (`int`): Tokens to look at, at most; a tokenizer may have more than its model.

    Returns:
        `dict[int, Piece]`: By token, without special ones and those that stand for nothing.
    """
    special, alphabet = special_tokens(tokenizer), _byte_alphabet()
    names = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    texts = _texts(tokenizer, _anchor(names, special), len(names))
    named = {token: pair for token, pair in enumerate(zip(names, texts, strict=True)) if token not in special}
    found = {token: _piece(name, text, alphabet) for token, (name, text) in named.items() if name and text}
    return {token: piece for token, piece in found.items() if piece.text}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that are no text, such as the end of a text or of a turn in a chat, with their names."""
    added = {token: entry.content for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def by_bytes(pieces: Mapping[int, Piece]) -> dict[bytes, int]:
    """Return the token for each text: of several the first, and stand-ins for bytes last."""
    order = sorted(pieces, key=lambda token: (pieces[token].is_byte, token), reverse=True)
    return {pieces[token].text: token for token in order}


def _texts(tokenizer: PreTrainedTokenizerBase, anchor: int, count: int) -> Iterator[str]:
    """What each token adds behind another one: some decoders drop a space at the beginning of a text."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = str(tokenizer.decode([anchor], **options))
    for start in range(0, count, _CHUNK):
        pairs = [[anchor, token] for token in range(start, min(start + _CHUNK, count))]
        for text in tokenizer.batch_decode(pairs, **options):
            yield text[len(before) :] if text.startswith(before) else ""


def _anchor(names: Sequence[str | None], special: Mapping[int, str]) -> int:
    """Return a token of plain letters."""
    found = (token for token, name in enumerate(names) if name and name.isascii() and name.isalpha())
    return next((token for token in found if token not in special), 0)


def _piece(name: str, text: str, alphabet: Mapping[str, int]) -> Piece:
    """A token by its text, or, where that is not readable by itself, by how its name spells the bytes."""
    spelled = _BYTE.fullmatch(name)
    if spelled is not None and text != name:
        return Piece(bytes.fromhex(spelled[1]), is_byte=True)
    if _UNREADABLE in text and set(name) <= alphabet.keys():
        return Piece(bytes(alphabet[letter] for letter in name), is_byte=False)
    return Piece(text.encode(), is_byte=False)


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's letters for bytes: printable ones stand for themselves, others come behind these in Unicode."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
