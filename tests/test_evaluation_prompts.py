"""Where prompts come from, and what is said about sources that hold none."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from hf_osd.errors import PromptSourceError
from hf_osd.evaluation.prompts import INSTRUCTION, is_held_out, load_prompts, stdlib_functions, stdlib_prompts

_LIBRARY = '''
def documented_{n}(x):
    """Return {n} times x."""
    return {n} * x

def bare_{n}(x):
    return x

def only_a_docstring_{n}():
    """Do nothing, {n} times."""
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "library"
    (root / "site-packages").mkdir(parents=True)
    for n in range(64):
        (root / f"module_{n:02}.py").write_text(_LIBRARY.format(n=n))
    (root / "copy.py").write_text(_LIBRARY.format(n=0))
    (root / "broken.py").write_text("def f(:")
    (root / "latin.py").write_bytes(b'def f():\n    """\xff\xfe"""\n    return 1\n')
    (root / "site-packages" / "other.py").write_text(_LIBRARY.format(n=999))
    return root


def test_the_walk_finds_documented_functions_once_and_survives_broken_files(library: Path) -> None:
    """Would catch duplicated prompts, third-party packages among them, or a crash on an unparsable file."""
    found = dict(stdlib_functions(library))
    assert set(found) == {f"Return {n} times x." for n in range(64)}
    assert found["Return 3 times x."] == "def documented_3(x):\n    return 3 * x"


def test_held_out_functions_are_those_that_the_full_walk_would_split_off(library: Path) -> None:
    """Would catch a filter that changes which function stands for a docstring, and so leaks prompts into training."""
    everything = [pair for pair in stdlib_functions(library) if is_held_out(pair[0])]
    assert everything
    assert list(stdlib_functions(library, keep=is_held_out)) == everything


def test_the_split_depends_on_the_text_alone() -> None:
    """Would catch a split by `hash()`, which differs in every process and so between training and demo."""
    texts = [f"Return the item number {n}." for n in range(4096)]
    held_out = [n for n, text in enumerate(texts) if is_held_out(text)]
    assert held_out[:5] == [13, 28, 30, 39, 91]
    assert 0.04 < len(held_out) / len(texts) < 0.09


def test_default_prompts_are_held_out_docstrings_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch prompts that the embedded target was trained on, and an order that changes between runs."""
    prompts = stdlib_prompts()
    assert len(prompts) > 160
    assert all(prompt.startswith(INSTRUCTION) and is_held_out(prompt.removeprefix(INSTRUCTION)) for prompt in prompts)
    assert len(set(prompts)) == len(prompts)
    assert prompts == sorted(prompts, key=lambda prompt: _digest(prompt.removeprefix(INSTRUCTION))[1:])
    monkeypatch.setattr("hf_osd.evaluation.prompts.stdlib_prompts", lambda: prompts)
    assert load_prompts(None, 7) == prompts[:7]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@pytest.mark.parametrize("column", ["prompt", "instruction", "question", "text"])
def test_every_known_column_is_found_in_json_lines(tmp_path: Path, column: str) -> None:
    """Would catch a column that the error message promises and the reader ignores."""
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"id": n, column: f"prompt {n}"}) + "\n\n" for n in range(5)))
    assert load_prompts(str(path), 3) == ["prompt 0", "prompt 1", "prompt 2"]


def test_json_holds_texts_or_rows(tmp_path: Path) -> None:
    """Would catch a reader that takes only one of the two common shapes of a JSON list."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(["first", {"prompt": "second"}, {"text": "third"}]))
    assert load_prompts(str(path), 10) == ["first", "second", "third"]


def test_text_holds_a_prompt_a_line(tmp_path: Path) -> None:
    """Would catch empty prompts from blank lines."""
    path = tmp_path / "mine.txt"
    path.write_text("first\n\n  second  \n")
    assert load_prompts(str(path), 10) == ["first", "second"]


def test_chats_lose_the_answer_that_is_to_be_generated(tmp_path: Path) -> None:
    """Would catch recorded chats being continued after their answer, which asks the model for nothing."""
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ({"messages": [user, answer]}, {"prompt": [user]})))
    assert load_prompts(str(path), 10) == [[user], [user]]


def test_a_folder_of_data_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a break of the `datasets` path, which no other test takes because it is offline."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [json.dumps({"question": f"{split} {n}", "answer": "?"}) for n in range(3)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    assert load_prompts(str(folder), 2) == ["train 0", "train 1"]
    assert load_prompts(f"{folder}::test", 1) == ["test 0"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', r"a\.jsonl, line 2: not JSON"),
        ("b.jsonl", '{"prompt": "x"}\n{"title": "t", "body": "b"}\n', r"b\.jsonl, line 2: .*found: 'title', 'body'"),
        ("c.jsonl", "\n\n", r"c\.jsonl: no prompts"),
        ("d.json", '{"prompt": "x"}', r"d\.json: expected a list .* JSON dict"),
        ("e.json", "[3]", r"e\.json, row 1: expected a text or an object .*3"),
        ("f.csv", "prompt\nx\n", r"f\.csv: a file of prompts ends in one of \.json, \.jsonl, \.txt"),
        ("g.jsonl", '{"messages": [{"from": "human"}]}', r"g\.jsonl, line 1, 'messages': a chat is a list of objects"),
        ("h.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', r"h\.jsonl, .*without a message"),
        ("i.jsonl", '{"prompt": "   "}', r"i\.jsonl, line 1: no prompt under any of"),
    ],
)
def test_errors_name_the_file_the_place_and_the_columns(
    tmp_path: Path, name: str, content: str, expected: str
) -> None:
    """Would catch messages that leave the user to search a file of thousands of lines."""
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(PromptSourceError, match=expected):
        load_prompts(str(path), 10)


def test_a_source_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a traceback from deep inside `datasets` or the file system instead of our error."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PromptSourceError, match=r"missing\.jsonl: cannot be read"):
        load_prompts(str(tmp_path / "missing.jsonl"), 1)
    with pytest.raises(PromptSourceError, match=re.escape(f"{tmp_path}/nowhere: neither a file nor a data set")):
        load_prompts(str(tmp_path / "nowhere"), 1)
