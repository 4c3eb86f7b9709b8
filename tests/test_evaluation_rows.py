"""What is read of files and data sets, whatever is in them."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_osd.errors import PromptSourceError
from hf_osd.evaluation import rows
from hf_osd.evaluation.prompts import load_prompts
from hf_osd.evaluation.rows import json_lines, read_rows

TEXTS = st.text(min_size=1).filter(lambda text: bool(text.strip()))  # any character but surrogates
CONTENTS = st.binary(max_size=200) | st.text(max_size=100).map(str.encode)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def limited(seconds: int = 20) -> Iterator[None]:
    """A test that would wait for ever fails instead."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"no end in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@quick
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), escaped=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_json_lines_come_back_as_they_were_written(tmp_path: Path, texts: list[str], escaped: bool, end: str) -> None:
    """Catches lines that end at U+2028, U+2029, U+0085 or a form feed, all of which may stand inside a JSON text."""
    path = tmp_path / "mine.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=escaped) + end for text in texts]
    path.write_bytes("".join(lines).encode())
    assert load_prompts(str(path), 10) == texts


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\v", "\f", "\x1c"])
def test_a_line_of_text_ends_where_an_editor_ends_it(tmp_path: Path, separator: str) -> None:
    """Catches a prompt that is cut in two by `str.splitlines`."""
    path = tmp_path / "mine.txt"
    path.write_bytes(f"one{separator}more\ntwo\r\nthree\rfour".encode())
    assert load_prompts(str(path), 10) == [f"one{separator}more", "two", "three", "four"]


@quick
@given(content=CONTENTS, kind=st.sampled_from(["txt", "json", "jsonl"]))
def test_whatever_a_file_holds_it_is_prompts_or_refused_by_its_name(tmp_path: Path, content: bytes, kind: str) -> None:
    """Catches a traceback out of `json`, `codecs` or a tokenizer for a file of something else."""
    path = tmp_path / f"mine.{kind}"
    path.write_bytes(content)
    loaded, refusal = loaded_or_refused(path)
    if refusal is None:
        assert loaded
        for prompt in loaded:
            assert json.dumps(prompt, ensure_ascii=False).encode()
    else:
        assert refusal.startswith(str(path))


def loaded_or_refused(path: Path) -> tuple[list[Any], str | None]:
    try:
        return load_prompts(str(path), 10), None
    except PromptSourceError as error:
        return [], str(error)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "\\ud800"}\n', r"a\.jsonl, line 2: '\\ud800' is half of a character"),
        ("b.json", '["x", "y\\udfff"]', r"b\.json, row 2: '\\udfff' is half of a character"),
        ("c.jsonl", '{"messages": [{"role": "user", "content": "\\ud800"}]}', r"c\.jsonl, line 1, 'messages': '\\ud8"),
        ("d.jsonl", '{"messages": [{"role": "\\ud800", "content": ""}]}', r"d\.jsonl, line 1, 'messages': '\\ud8"),
        ("e.jsonl", '{"messages": [{"role": "user", "content": null}]}', r"e\.jsonl, .*: a chat is a list of objects"),
        ("f.jsonl", '\n{"prompt": ' + "9" * 5000 + "}", r"f\.jsonl, line 2: JSON that cannot be read \(Exceeds the"),
        ("g.jsonl", "[" * 100_000, r"g\.jsonl, line 1: JSON that cannot be read \(maximum recursion depth"),
        ("h.json", "[" * 100_000, r"h\.json, line 1: JSON that cannot be read \(maximum recursion depth"),
        ("i.jsonl", "[" * 400 + "]" * 400, r"i\.jsonl, line 1: expected a text or an object .*\[\.\.\.\]"),
        ("j.txt", "fine\na\0b\n", r"j\.txt, line 2: a NUL character, so it is no file of text"),
        ("k.jsonl", '{"prompt": "a\0b"}', r"k\.jsonl, line 1: not JSON"),
        ("l.jsonl", '{"prompt": "a"}\r{"prompt": "b"}', r"l\.jsonl, line 1: not JSON \(Extra data\)"),
        ("m.json", "", r"m\.json, line 1: not JSON"),
        ("n.jsonl", json.dumps({f"column {n}": 1 for n in range(1000)}), r"n\.jsonl, line 1: .*'column 19'$"),
    ],
)  # fmt: skip
def test_what_no_tokenizer_or_parser_takes_is_named_with_its_place(
    tmp_path: Path, name: str, content: str, expected: str
) -> None:
    """Catches a TypeError out of a tokenizer, and a RecursionError, which no `except ValueError` sees."""
    (tmp_path / name).write_bytes(content.encode())
    with pytest.raises(PromptSourceError, match=expected) as caught:
        load_prompts(str(tmp_path / name), 10)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("content", [b"\xff\xfeh\0i\0", b"\x80", "h\u00e9".encode("latin-1")])
@pytest.mark.parametrize("kind", ["txt", "json", "jsonl"])
def test_another_encoding_is_said_to_be_one(tmp_path: Path, content: bytes, kind: str) -> None:
    """Catches a file of UTF-16 or Latin-1 that ends in a traceback."""
    path = tmp_path / f"mine.{kind}"
    path.write_bytes(content)
    with pytest.raises(PromptSourceError, match=rf"mine\.{kind}: cannot be read \('utf-8' codec"):
        load_prompts(str(path), 10)


@pytest.mark.parametrize(("kind", "content"), [("txt", "x\ny"), ("json", '["x", "y"]'), ("jsonl", '"x"\n"y"')])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path, kind: str, content: str) -> None:
    """Catches files of Windows editors that are not JSON, or whose first prompt begins with an invisible character."""
    path = tmp_path / f"mine.{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert load_prompts(str(path), 10) == ["x", "y"]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    """Catches a pipe that is read until someone writes to it, and a device that never ends."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name in ("pipe.jsonl", "zero.txt", "loop.json"):
        with limited(), pytest.raises(PromptSourceError, match=rf"{name}: cannot be read"):
            load_prompts(str(tmp_path / name), 1)


def test_a_long_file_is_read_as_far_as_it_is_asked_for(tmp_path: Path) -> None:
    """Catches gigabytes that are read, and a broken line far behind that ends a run of three requests."""
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "x"}\n' * 3 + "broken")
    assert load_prompts(str(path), 3) == ["x"] * 3
    with pytest.raises(PromptSourceError, match="line 4: not JSON"):
        load_prompts(str(path), 10**30)


@pytest.mark.parametrize("source", [":", "::test", "a:b:c:d", ":a:b"])
def test_a_data_set_has_an_id_and_no_more_than_a_config_and_a_split(source: str) -> None:
    """Catches parts of a name that are dropped without a word."""
    with pytest.raises(PromptSourceError, match=r"a data set is written id, id:config or id:config:split"):
        read_rows(source).__next__()


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + ".jsonl", "a\0b", "a\0b.txt"])
def test_names_that_no_file_can_have_are_refused_like_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the operating system's own error for a name that is too long."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PromptSourceError):
        load_prompts(name, 1)


def test_a_data_set_that_breaks_in_the_middle_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches errors of the network or of a parser that come with a later row than the first."""

    def broken(*_: Any) -> Iterator[dict[str, str]]:
        yield {"text": "x"}
        raise ConnectionResetError("the Hub\nis gone")

    monkeypatch.setattr(rows, "_open_dataset", broken)
    assert load_prompts("some/set", 1) == ["x"]
    with pytest.raises(PromptSourceError, match=r"some/set: neither a file nor a data set .*\(the Hub is gone"):
        load_prompts("some/set", 2)


def test_json_lines_say_where_each_value_is(tmp_path: Path) -> None:
    """Catches line numbers that blank lines put out of step."""
    path = tmp_path / "mine.jsonl"
    path.write_text('\n{"a": 1}\n\n[2]\n')
    assert list(json_lines(path)) == [(f"{path}, line 2", {"a": 1}), (f"{path}, line 4", [2])]
