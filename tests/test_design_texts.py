"""What a draft learns from: files of prompts and answers, documents, and how they become tokens."""

import json

import pytest
from toys import END, word_tokenizer

from hf_osd.design.requests import encode_texts, template_head, template_tokens
from hf_osd.design.texts import Text, load_texts
from hf_osd.errors import PromptSourceError
from hf_osd.evaluation.prompts import is_held_out


def write_rows(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_answers_go_with_their_prompts(tmp_path):
    """Catches answers of recorded chats that are lost, and prompts of several files that are not mixed."""
    chat = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    first = write_rows(tmp_path / "a.jsonl", {"prompt": "a", "response": "b"}, {"messages": chat}, {"prompt": "e"})
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    (tmp_path / "c.md").write_text("x" * 1_000 + "\n\n" + "y" * 1_000)
    texts = load_texts([first, str(tmp_path / "b.txt"), str(tmp_path / "c.md")], 7)
    assert texts[:3] == [Text("a", "b"), Text("one"), Text(None, "x" * 1_000)]
    assert texts[3:6] == [Text([chat[0]], "d"), Text("two"), Text(None, "y" * 1_000)]
    assert texts[6] == Text("e")
    assert len(load_texts([first], 2)) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "response": 3}, "line 1: an answer is a text that is not empty, found 3"),
        ({"prompt": "a", "response": " "}, "line 1: an answer is a text"),
        ({"response": "b"}, "line 1: no prompt under any of"),
    ],
)
def test_rows_that_are_no_texts_are_refused(tmp_path, row, message):
    """Catches a run of an hour that learns from half of the data."""
    with pytest.raises(PromptSourceError, match=message):
        load_texts([write_rows(tmp_path / "a.jsonl", row)], 5)


def test_sources_that_cannot_be_read_are_refused(tmp_path):
    """Catches a traceback for a document that is missing, and an empty file that nobody notices."""
    (tmp_path / "empty.md").write_text("\n\n \n")
    with pytest.raises(PromptSourceError, match=r"missing\.md: cannot be read"):
        load_texts([str(tmp_path / "missing.md")], 5)
    with pytest.raises(PromptSourceError, match="no texts in it"):
        load_texts([str(tmp_path / "empty.md")], 5)


def test_default_texts_are_not_those_of_the_demo():
    """Catches a demo that serves what its draft was made of."""
    texts = load_texts(["stdlib"], 50)
    assert len(texts) == 50
    assert all(text.answer and not is_held_out(text.prompt.split("\n", 1)[1]) for text in texts)


def test_a_text_is_what_serving_will_see():
    """Catches an answer that is not where the target writes it, and template tokens that teach."""
    tokenizer = word_tokenizer()
    assert template_head(tokenizer).tolist() == [3]
    asked, answered, document = encode_texts(
        tokenizer, [Text("w7 w8"), Text("w7", "w9"), Text(None, "w9 w10 w11")], END, 20, 8
    )
    assert asked.prompt_ids.tolist() == [3, 7, 8, 2, 4]
    assert asked.answer_ids is None
    assert asked.head == 1
    assert (answered.prompt_ids.tolist(), answered.answer_ids.tolist()) == ([3, 7, 2, 4], [9, END])
    assert answered.head == 2
    assert (document.prompt_ids.tolist(), document.answer_ids.tolist()) == ([9], [10, 11])


def test_texts_fit_into_their_room():
    """Catches texts beyond the context, and prompts that leave no room for an answer."""
    long = Text("w7 " * 9, "w9 " * 30)
    assert not encode_texts(word_tokenizer(), [long], END, 20, 9)
    (request,) = encode_texts(word_tokenizer(), [long], END, 20, 8)
    assert len(request.prompt_ids) + len(request.answer_ids) == 20
    assert not encode_texts(word_tokenizer(None), [Text(None, "w7"), Text(None, "")], END, 20, 8)


def test_special_tokens_are_found():
    """Catches a draft that can never propose the end of an answer."""
    assert {END, 3, 4} <= template_tokens(word_tokenizer())
    assert template_tokens(word_tokenizer(None)) >= {END}
    assert template_head(word_tokenizer(None)).tolist() == []


def test_a_system_prompt_is_learned_once():
    """Catches a draft whose time goes into a system prompt that comes with every request."""
    tokenizer = word_tokenizer()
    chats = [
        Text([{"role": "system", "content": "w9 w10 w11 w12"}, {"role": "user", "content": f"w{20 + row} w8"}])
        for row in range(4)
    ]
    first, *others = encode_texts(tokenizer, chats, END, 30, 8)
    assert first.head == 1
    assert {request.head for request in others} == {7}
