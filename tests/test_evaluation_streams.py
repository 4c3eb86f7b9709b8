"""Named streams of requests, and batches made of them."""

import os
from pathlib import Path

import pytest
import torch
from test_demo_runner import make_model, make_tokenizer

from hf_osd import ConfigError
from hf_osd.errors import InputError
from hf_osd.evaluation.models import Pair
from hf_osd.evaluation.streams import batches, in_batches, load_prompt_streams, make_stream


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(make_model(2, seed=1), make_model(1, seed=2), make_tokenizer())


def test_batches_are_padded_on_the_left_and_full(pair: Pair) -> None:
    """Would catch requests that are served twice, whose answers prompt lookup knows, and misplaced padding."""
    requests = make_stream(pair, "letters", ["a", "bcd", "ef", "g", "hi", "k"], 8).requests
    assert [len(batch["input_ids"]) for batch in batches(requests, 2, pad_token_id=0)] == [2, 2]
    some = make_stream(pair, "letters", ["a", "bcd", "ef", "g"], 8, count=1)
    assert [len(some.requests), len(some.spare)] == [1, 2]
    (batch,) = batches(requests, 9, pad_token_id=0)
    assert batch["input_ids"].shape == (5, max(one["input_ids"].shape[1] for one in requests))
    for row in range(5):
        kept = batch["input_ids"][row, batch["attention_mask"][row].bool()]
        assert torch.equal(kept, requests[row]["input_ids"][0])
        assert batch["attention_mask"][row].tolist() == sorted(batch["attention_mask"][row].tolist())


def test_no_prompt_comes_twice(pair: Pair) -> None:
    """Would catch a lookup that remembers the answer of an earlier row, and rows that warm up and count."""
    stream = make_stream(pair, "letters", ["a", "b", "a", "c", "b", "d", "e", "a"], 8, count=3)
    rows = [stream.warm_up, *stream.requests, *stream.spare]
    assert len({tuple(one["input_ids"][0].tolist()) for one in rows}) == len(rows) == 5
    batched = in_batches(stream, 2, 0)
    assert [len(one["input_ids"]) for one in (*batched.requests, batched.warm_up)] == [2, 2]
    with pytest.raises(InputError, match="'letters' has 5 different prompts that fit, and batches of 3 need 6"):
        in_batches(stream, 3, 0)


def test_streams_are_named_by_their_files(tmp_path: Path) -> None:
    """Would catch two streams of one file name that overwrite each other's figures."""
    for name in ("maths/stream.txt", "sql/stream.txt", "other.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("hello\n")
    paths = [str(tmp_path / name) for name in ("maths/stream.txt", "sql/stream.txt")]
    assert [*load_prompt_streams(paths, 1)] == ["maths/stream", "sql/stream"]
    assert [*load_prompt_streams([str(tmp_path / "other.txt")], 1)] == ["other"]
    with pytest.raises(ConfigError, match=r"prompts names a source twice, got .*other\.txt"):
        load_prompt_streams([str(tmp_path / "other.txt")] * 2, 1)


def test_a_stream_needs_a_prompt_that_warms_up(pair: Pair) -> None:
    """Would catch a request that is timed after it was served already."""
    with pytest.raises(InputError, match="stream 'short' has one prompt that fits"):
        make_stream(pair, "short", ["a"], 8)


def test_names_that_no_terminal_can_print_are_written_out(tmp_path: Path) -> None:
    """Would catch a name of bytes that are no UTF-8, which neither matplotlib nor a JSON file takes."""
    path = tmp_path / os.fsdecode(b"p\xff.txt")
    path.write_text("hello\n")
    assert [*load_prompt_streams([str(path)], 1)] == ["p\\udcff"]


def test_names_of_folders_alone_are_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch an error about an empty name where two sources have none, such as `.` and `/`."""
    monkeypatch.setattr("hf_osd.evaluation.streams.load_prompts", lambda source, count: [source])
    assert len(load_prompt_streams([".", "/", ".."], 1)) == 3
