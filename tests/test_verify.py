"""`hf-osd verify`: what it calls a difference, what it calls rounding, and that it finds a decoder that is wrong."""

import json
import string
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import prompts, tiny_model, wrong_draft
from seq2seq import TEXT, encoder_decoder
from test_demo_runner import make_model, make_tokenizer
from tongues import tokenizer
from typer.testing import CliRunner

from hf_osd.cli.app import app
from hf_osd.drafts.features import FeatureDraft
from hf_osd.evaluation import contenders
from hf_osd.evaluation.encoding import Inputs
from hf_osd.evaluation.exactness import plain_answers
from hf_osd.evaluation.models import Pair
from hf_osd.verify import verify
from hf_osd.verify.command import VerifyCommand
from hf_osd.verify.report import verdict
from hf_osd.verify.results import Outcome, Verification
from hf_osd.verify.runner import ASSISTED, GENERATE, LOOKUP, OURS, OURS_IN_BATCHES

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
NEW = 24


def make_pair(dtype: torch.dtype, seed: int = 1) -> Pair:
    target = tiny_model("llama", seed=seed, dtype=dtype)
    return Pair(target, wrong_draft(target, "noisy"), make_tokenizer())


def requests(count: int, seed: int = 0) -> list[Inputs]:
    rows = (prompts(1, length=6 + (seed + number) % 7, seed=100 * seed + number) for number in range(count))
    return [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in rows]


def test_in_float32_no_output_differs() -> None:
    """Would catch a comparison of unlike things: padding, prompts of other lengths, rows in another order."""
    found = verify(make_pair(torch.float32), requests(10), max_new_tokens=NEW)
    assert [*found.outcomes] == [GENERATE, ASSISTED, OURS, OURS_IN_BATCHES]
    assert all(outcome.differences == [] for outcome in found.outcomes.values())
    assert (found.dtype, found.requests, found.tokens) == ("float32", 10, 10 * NEW)
    assert found.rounding < 1e-4
    assert found.is_lossless
    assert found.outcomes[OURS].tokens_per_pass >= 1
    assert found.outcomes[OURS].fallbacks == {}


def test_in_bfloat16_no_difference_lies_outside_rounding() -> None:
    """
    Would catch decoding that goes wrong where the best tokens are further apart than rounding explains.

    Of sixty models and sets of prompts, 118 outputs differed, none of them outside: with other kernels than here, the
    odds of a false alarm are below one in twenty.
    """
    found = verify(make_pair(torch.bfloat16, seed=5), requests(16, seed=4), max_new_tokens=NEW)
    assert [found.unexplained(outcome) for outcome in found.outcomes.values()] == [[], [], [], []]
    assert found.rounding > 0


def test_answers_that_end_early_are_compared_up_to_their_end() -> None:
    """Would catch the padding of a batch that counts as an output."""
    pair = make_pair(torch.float32)
    pair.target.generation_config.eos_token_id = pair.draft.generation_config.eos_token_id = list(range(3, 16))
    found = verify(pair, requests(9), max_new_tokens=NEW)
    assert 9 <= found.tokens < 9 * NEW
    assert all(outcome.differences == [] for outcome in found.outcomes.values())


def test_where_transformers_cannot_take_the_draft_it_looks_up_the_prompt() -> None:
    """Would catch a draft that runs without the states it reads, and figures named after another way to decode."""
    pair = make_pair(torch.float32)
    found = verify(replace(pair, draft=FeatureDraft.of(pair.target)), requests(2), max_new_tokens=NEW)
    assert [*found.outcomes] == [GENERATE, LOOKUP, OURS, OURS_IN_BATCHES]
    assert all(outcome.differences == [] for outcome in found.outcomes.values())


def test_the_observer_hears_of_every_group() -> None:
    """Would catch a progress bar that stands still, or runs over."""
    heard: list[int] = []
    verify(make_pair(torch.float32), requests(9), max_new_tokens=2, observer=lambda: heard.append(1))
    assert len(heard) == 3


def wrong(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A decoder that lets the target write, and changes it."""

    def generate(target: Any, *, online_assistant: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        output = target.generate(input_ids=input_ids, **options)
        return torch.cat([input_ids, change(output[:, input_ids.shape[1] :].clone())], dim=1)

    return generate


def replace_a_token(rows: torch.Tensor) -> torch.Tensor:
    rows[:, 5] = (rows[:, 5] + 1) % 50 + 3
    return rows


WRONG = {
    "another token": (replace_a_token, 5),
    "cut short": (lambda rows: rows[:, :7], 7),
    "one more token": (lambda rows: torch.cat([rows, rows[:, -1:]], dim=1), NEW),
    "a token left out": (lambda rows: torch.cat([rows[:, :3], rows[:, 4:], rows[:, 3:4]], dim=1), 3),
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_decoder_is_found_out(monkeypatch: pytest.MonkeyPatch, how: str, dtype: torch.dtype) -> None:
    """Would catch a verification that calls everything rounding, or looks at what both outputs share alone."""
    change, position = WRONG[how]
    monkeypatch.setattr(contenders, "generate", wrong(change))
    found = verify(make_pair(dtype), requests(5), max_new_tokens=NEW)
    assert not found.is_lossless
    ours = found.outcomes[OURS]
    assert min(one.position for one in found.unexplained(ours)) == position
    assert len(found.unexplained(ours)) >= 4  # one prompt may have two tokens alike at that place
    assert any(OURS in line and f"token {position}: " in line for line in verdict(found))


def test_an_error_of_transformers_is_counted_and_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch exit code 1 for what is not hf_osd's, and an error of others that goes unseen."""
    answer = contenders.Generate.answer

    def wrong_answer(self: contenders.Generate, inputs: Inputs, **options: Any) -> Any:
        rows, sample = answer(self, inputs, **options)
        return replace_a_token(rows), sample

    monkeypatch.setattr(contenders.Generate, "answer", wrong_answer)
    found = verify(make_pair(torch.float32), requests(5), max_new_tokens=NEW)
    assert len(found.unexplained(found.outcomes[ASSISTED])) >= 4
    assert found.is_lossless


def test_the_second_best_token_is_wrong_where_the_best_one_is_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a bound that any runner-up passes."""
    pair = make_pair(torch.bfloat16)
    monkeypatch.setattr(contenders, "generate", write_the_second_best)
    found = verify(pair, requests(4), max_new_tokens=NEW)
    gaps = []
    for request in requests(4):
        answer = plain_answers(pair.target, request, {"max_new_tokens": NEW, "do_sample": False})[0]
        best, second = answer.scores[0].topk(2).values.tolist()
        gaps.append(best - second)
    differences = found.outcomes[OURS].differences
    assert [one.gap for one in differences] == pytest.approx(gaps)
    assert [not one.is_explained(found.rounding) for one in differences] == [
        one in found.unexplained(found.outcomes[OURS]) for one in differences
    ]
    assert not found.is_lossless


def write_the_second_best(target: Any, *, online_assistant: Any, input_ids: torch.Tensor, **options: Any) -> Any:
    output = target.generate(input_ids=input_ids, **options)
    mask = options["attention_mask"]
    logits = target(input_ids=input_ids, attention_mask=mask).logits[:, -1]
    output[:, input_ids.shape[1]] = logits.topk(2).indices[:, 1]
    return output


def test_penalties_count_in_the_gap() -> None:
    """Would catch gaps of logits that nothing was chosen from: many checkpoints bring a repetition penalty."""
    pair = make_pair(torch.float32)
    pair.target.generation_config.repetition_penalty = 1.3
    answer = plain_answers(pair.target, requests(1)[0], {"max_new_tokens": NEW, "do_sample": False})[0]
    assert torch.equal(answer.scores.argmax(1), answer.tokens)
    assert not torch.equal(answer.scores, answer.logits)
    found = verify(pair, requests(5), max_new_tokens=NEW)
    assert found.outcomes[OURS].differences == []
    assert found.is_lossless  # in a batch, some versions of transformers penalise the padding too


def test_what_was_not_speculated_on_is_said() -> None:
    """Would catch a target that is served plainly, and so verified against itself without a word."""
    found = Verification("float32", {OURS: Outcome(is_ours=True, fallbacks={"a window": 3})}, requests=4)
    assert f"{OURS} wrote 3 of 4 outputs without draft or speculation: a window." in [*verdict(found)]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A target and prompts in files, named as the command takes them."""
    monkeypatch.chdir(tmp_path)
    make_model(2, seed=1).save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    rows = (json.dumps({"prompt": f"zanzibar {number}"}) for number in range(9))
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    options = {"--prompts": "prompts.jsonl", "--requests": "5", "--max-new-tokens": "8", "--device": "cpu"}
    return ["verify", "target", *(word for pair in options.items() for word in pair)]


def test_the_command_leaves_a_table_and_all_figures_but_no_prompt(arguments: list[str], tmp_path: Path) -> None:
    """Would catch a dtype that is left out, figures that do not reach the file, and prompts that do."""
    file = tmp_path / "figures" / "verify.json"
    result = runner.invoke(app, [*arguments, "--dtype", "float32", "--dtype", "bfloat16", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "float32: 5 greedy outputs against generate, one prompt at a time" in result.output
    assert "All outputs of hf_osd equal those of generate." in result.output
    written = json.loads(file.read_text())
    assert [run["dtype"] for run in written["runs"]] == ["float32", "bfloat16"]
    assert [*written["runs"][0]["decoding"]] == [GENERATE, LOOKUP, OURS, OURS_IN_BATCHES]
    assert written["about"]["options"]["requests"] == 5
    assert written["about"]["versions"]["transformers"]
    assert "zanzibar" not in file.read_text()


def test_help_lists_every_option() -> None:
    """Would catch an option that the command line does not pass on, or names otherwise."""
    assert "verify" in runner.invoke(app, ["--help"]).output
    text = runner.invoke(app, ["verify", "--help"]).output.lower()
    named = {"dtypes": "--dtype", "output": "--json", "target": "target"}
    for field in fields(VerifyCommand):
        assert named.get(field.name, f"--{field.name.replace('_', '-')}") in text


def test_with_a_draft_transformers_is_assisted_by_it(arguments: list[str], tmp_path: Path) -> None:
    """Would catch a draft that is given and left aside."""
    result = runner.invoke(app, [*arguments, "--assistant", "target"])
    assert result.exit_code == 0, result.output
    assert ASSISTED in result.output
    assert not [*tmp_path.glob("*.json")]


def test_the_command_exits_with_what_it_found(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch an error that a script around the command cannot see."""
    monkeypatch.setattr(contenders, "generate", wrong(replace_a_token))
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert "Outputs of hf_osd are NOT the target's own:" in result.output


@pytest.mark.parametrize("kind", TEXT)
def test_a_pair_with_encoders(kind: str, arguments: list[str], tmp_path: Path) -> None:
    """Would catch sources that a batch pads where the encoder counts, and answers that are cut by their sources."""
    for name, seed in (("target", 0), ("draft", 7)):
        encoder_decoder(kind, seed, dtype=torch.float32, vocab_size=259).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    result = runner.invoke(app, [*arguments, "--assistant", "draft"])
    assert result.exit_code == 0, result.output
    assert ASSISTED in result.output
    assert "All outputs of hf_osd equal those of generate." in result.output


def test_a_pair_with_two_tokenizers(arguments: list[str], tmp_path: Path) -> None:
    """Would catch a draft that is fed the target's tokens, or left out."""
    words = tokenizer(string.ascii_lowercase)
    draft = make_model(1, seed=2)
    draft.resize_token_embeddings(len(words))
    for made in (draft, words):
        made.save_pretrained(tmp_path / "draft")
    result = runner.invoke(app, [*arguments, "--assistant", "draft"])
    assert result.exit_code == 0, result.output
    assert ASSISTED in result.output
    assert "without draft" not in result.output
    assert "All outputs of hf_osd equal those of generate." in result.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dtype", "int8"], "dtype must be 'auto' or a floating torch dtype"),
        (["--prompts", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--json", "."], "the file for the figures is a folder: '.'"),
        (["--json", ""], "the file for the figures is a folder: '.'"),
        (["--assistant", "no/such/draft"], "cannot load 'no/such/draft'"),
        (["--max-new-tokens", "256"], "leaves no room for a prompt"),
    ],
)
def test_bad_options_are_refused_with_a_reason(arguments: list[str], more: list[str], message: str) -> None:
    """Would catch a traceback in the user's face, or a run of minutes that ends in one."""
    result = runner.invoke(app, [*arguments, *more])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_draft_of_no_target_is_refused() -> None:
    """Would catch a draft that is taken for one of the embedded pair's target."""
    result = runner.invoke(app, ["verify", "--assistant", "target"])
    assert result.exit_code == 2
    assert "an assistant needs its target" in result.output
