"""The laboratory's pair with encoders: trained for a few steps, on made-up data."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import encoder_decoder as laboratory

SHAPE = dict(d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=1, num_decoder_layers=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A few lines of each file that the command reads."""
    for folder in ("spider", "python"):
        (tmp_path / folder).mkdir()
        for split in ("train", "stream"):
            rows = [{"prompt": f"Count the {word} of row {row}.", "response": f"SELECT {word} FROM t{row}"}
                    for row in range(3) for word in ("names", "ages")]  # fmt: skip
            (tmp_path / folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_the_command(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pair that is trained again, a source that is the answer, and outputs that are not compared."""
    monkeypatch.setattr(laboratory, "SHAPES", {"target": SHAPE, "draft": SHAPE})
    monkeypatch.setattr(laboratory, "VOCABULARY", 300)
    output, threads = tmp_path / "found.json", torch.get_num_threads()
    command = ["--data", str(data), "--folder", str(tmp_path / "pair"), "--output", str(output), "--served", "2"]
    command += ["--target-steps", "2", "--draft-steps", "1", "--recipes", "static", "defaults"]
    laboratory.main(command)
    monkeypatch.setattr(laboratory, "_train", lambda *parts: pytest.fail("trained again"))
    laboratory.main(command)
    torch.set_num_threads(threads)
    found = json.loads(output.read_text())
    assert set(found["streams"]) == set(found["served"]) == {"spider", "summaries"}
    assert all(one["outputs_that_differ"] == 0 and one["requests"] == 2 for one in found["served"].values())
    assert all(stream["requests"] == 6 for stream in found["streams"].values())


def test_which_text_is_the_source(data: Path) -> None:
    """Catches tasks that ask for what they give."""
    assert laboratory._examples(data, "spider", "train")[0] == ("Count the names of row 0.", "SELECT names FROM t0")
    assert laboratory._examples(data, "summaries", "train")[0] == ("SELECT names FROM t0", "Count the names of row 0.")


def test_answers_are_recorded_as_serving_would() -> None:
    """Catches answers with what follows their end, or distributions of another position."""
    torch.manual_seed(0)
    config = laboratory.T5Config(**SHAPE, vocab_size=300, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    target = laboratory.T5ForConditionalGeneration(config).eval()
    sources = [torch.tensor([5, 6, 7, 1]), torch.tensor([8, 1])]
    for source, one in zip(sources, laboratory._recorded(target, sources), strict=True):
        assert torch.equal(one.source_ids, source)
        output = target.generate(input_ids=source[None], max_new_tokens=laboratory.ANSWER, do_sample=False)[0, 1:]
        assert torch.equal(one.output_ids, output)
        assert torch.equal(one.output_ids, one.teacher_ids[:, 0])
        assert 1 not in one.output_ids[:-1]
