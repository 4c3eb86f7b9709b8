"""Between two tokenizers: what a token stands for, which tokens both have, and requests in the draft's tokens."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tongues import DRAFT, OTHERS, TARGET, tokenizer, translation
from transformers import PreTrainedTokenizerFast

from hf_osd.drafts.pieces import by_bytes, pieces_of
from hf_osd.drafts.translation import Translation
from hf_osd.records import Observation


def _bpe(words: list[str], decoder: Any, **options: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE({word: index for index, word in enumerate(["<eos>", *words])}, [], **options))
    made.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: a letter for each byte, and words that are written by these letters."""
    return _bpe([*ALPHABET, "Ġthe", "ĊĊ", "Ã©", "ðŁĺ", "ï¿½"], decoders.ByteLevel())


def sentence_piece(strips: bool = False) -> PreTrainedTokenizerFast:
    """As Gemma's, or as Llama 2's, which drops the space before a text."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if strips else []
    return _bpe([*BYTES, "▁", "\n", "a", "▁the", "\n\n", "é", "é▁", "�"], decoders.Sequence(steps), byte_fallback=True)


@pytest.mark.parametrize("strips", [False, True])
def test_what_tokens_of_sentence_piece_stand_for(strips: bool) -> None:
    """Catches spaces that a decoder drops, and bytes that are no character by themselves."""
    words = sentence_piece(strips)
    found = {words.convert_ids_to_tokens(token): piece for token, piece in pieces_of(words, len(words)).items()}
    assert "<eos>" not in found
    for name, text in {"▁": b" ", "▁the": b" the", "\n\n": b"\n\n", "é▁": "é ".encode(), "�": "�".encode()}.items():
        assert found[name] == (text, False)
    for byte, name in enumerate(BYTES):
        assert found[name] == (bytes([byte]), True)


def test_what_tokens_of_a_byte_level_tokenizer_stand_for() -> None:
    """Catches parts of a character that all decode to the same sign."""
    words = byte_level()
    found = {words.convert_ids_to_tokens(token): piece.text for token, piece in pieces_of(words, len(words)).items()}
    assert len({found[letter] for letter in ALPHABET}) == 256
    expected = {"Ġthe": b" the", "ĊĊ": b"\n\n", "Ã©": "é".encode(), "ðŁĺ": "😀".encode()[:3], "ï¿½": "�".encode()}
    assert {name: found[name] for name in expected} == expected


def test_a_word_is_preferred_to_a_stand_in_for_its_byte() -> None:
    """Catches proposals of tokens that the target never writes, such as `<0x0A>` for a line break."""
    words = sentence_piece()
    found = by_bytes(pieces_of(words, len(words)))
    assert words.convert_ids_to_tokens(found[b"\n"]) == "\n"
    assert words.convert_ids_to_tokens(found[b"\t"]) == "<0x09>"


@pytest.mark.parametrize("swapped", [False, True])
def test_tokens_that_both_have(swapped: bool) -> None:
    """Catches spaces that the two write differently, and a map by the order of a dictionary."""
    target, draft = (byte_level(), sentence_piece()) if swapped else (sentence_piece(), byte_level())
    found = Translation.between(target, draft, (len(target), len(draft)))
    pairs = {(target.convert_ids_to_tokens(one), draft.convert_ids_to_tokens(two)) for one, two in _pairs(found)}
    wanted = {("▁", "Ġ"), ("▁the", "Ġthe"), ("\n\n", "ĊĊ"), ("é", "Ã©"), ("<eos>", "<eos>"), ("<0xF0>", "ð")}
    assert pairs >= {pair[::-1] if swapped else pair for pair in wanted}
    assert len({one for one, _ in pairs}) == len({two for _, two in pairs}) == len(pairs)
    assert found.targets.tolist() == sorted(found.targets.tolist())


def _pairs(found: Translation) -> list[tuple[int, int]]:
    return list(zip(found.targets.tolist(), found.drafts.tolist(), strict=True))


def test_all_texts_can_be_read() -> None:
    """Catches tokens that the draft reads as something else: a run spells exactly what its token stands for."""
    target, draft = sentence_piece(), byte_level()
    found, pieces = Translation.between(target, draft, (len(target), len(draft))), pieces_of(draft, len(draft))
    for token, piece in pieces_of(target, len(target)).items():
        assert b"".join(pieces[one].text for one in found.run(token)) == piece.text


def _named(*names: str) -> list[int]:
    return [int(DRAFT.convert_tokens_to_ids(name)) for name in names]


def test_tokens_that_the_draft_does_not_have_are_spelled() -> None:
    """Catches marks of the target that become text, and a draft that reads less than there is."""
    found = translation()
    runs = {name: found.run(int(TARGET.convert_tokens_to_ids(name))) for name in ("bcd", "aaa", "é", "<bos>", "<eos>")}
    assert runs == {
        "bcd": (*_named("bc"), *_named("d")),
        "aaa": (*_named("aaa"),),
        "é": (*_named("<bos>"),),  # the draft has only two of them
        "<bos>": (*_named("<bos>"),),
        "<eos>": (*_named("<eos>"),),
    }
    assert found.text([1, 3]) == [*_named("<bos>"), *found.run(3)]
    assert found.text([3, 1]) == [*_named("<bos>"), *found.run(3), *_named("<bos>")]
    assert found.run(10**6) == (*_named("<bos>"),)


def test_a_text_is_never_empty() -> None:
    """Catches a draft that is asked for a token behind nothing."""
    silent = tokenizer(OTHERS, begins=False)
    assert translation(silent).text([]) == [silent.bos_token_id]


def test_a_mark_of_a_chat_is_read_as_text() -> None:
    """Catches turns of a chat that run into one another, and ends that the draft cannot propose."""
    target = tokenizer(["a", "b", "<b>"])
    target.add_special_tokens({"additional_special_tokens": ["<b>"], "eos_token": "<b>"})
    target.add_special_tokens({"additional_special_tokens": ["<ab>"]})
    found = Translation.between(target, DRAFT, (len(target), len(DRAFT)))
    for name in ("<b>", "<eos>"):
        assert found.run(int(target.convert_tokens_to_ids(name))) == (*_named("<eos>"),)
    ends = [token for token, own in _pairs(found) if own == DRAFT.eos_token_id]
    assert ends == [target.eos_token_id] != [2]
    assert found.run(target.convert_tokens_to_ids("<ab>")) == (*_named("a"), *_named("b"))


def test_a_recorded_request_in_the_drafts_tokens() -> None:
    """Catches teachers at other positions than their tokens, and tokens among them that the draft does not have."""
    a, b, bcd, aaa = (int(TARGET.convert_tokens_to_ids(name)) for name in ("a", "b", "bcd", "aaa"))
    seen = Observation(
        prompt_ids=torch.tensor([1, b]),
        output_ids=torch.tensor([a, bcd, aaa]),
        teacher_ids=torch.tensor([[a, bcd], [bcd, b], [aaa, a]]),
        teacher_log_probs=torch.tensor([[-0.1, -3.0], [-0.2, -4.0], [-0.3, -5.0]]),
        teacher_tail=torch.tensor([0.1, 0.2, 0.3]),
        draft_ids=torch.tensor([a, b, -1]),
        accepted=torch.tensor([True, False, False]),
    )
    found = translation()
    read = found.observation(seen)
    unknown = len(DRAFT)
    own = {name: _named(name)[0] for name in ("a", "b", "bc", "d", "aaa", "<bos>")}
    assert read.prompt_ids.tolist() == [own["<bos>"], own["b"]]
    assert read.output_ids.tolist() == [own["a"], own["bc"], own["d"], own["aaa"]]
    assert read.teacher_ids.tolist() == [
        [own["a"], unknown],
        [unknown, own["b"]],
        [unknown, unknown],
        [own["aaa"], own["a"]],
    ]
    assert torch.equal(read.teacher_log_probs, seen.teacher_log_probs[[0, 1, 1, 2]])
    assert torch.equal(read.teacher_tail, seen.teacher_tail[[0, 1, 1, 2]])
    assert read.draft_ids.tolist() == [own["a"], own["b"], -1, -1]
    assert read.accepted.tolist() == [True, False, False, False]
    assert read.rejected.tolist() == [False, True, False, False]
