"""Other packages in the benchmark: stand-ins where they would be imported, and the real ones where they are."""

import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from test_demo_runner import make_model, make_tokenizer
from test_suites import silent

from benchmarks.suites import command, peers, serving, tables
from benchmarks.suites.command import SuitesCommand
from benchmarks.suites.floor import Floor
from benchmarks.suites.session import Session
from hf_osd import ConfigError
from hf_osd.bench.serving import ONLINE, PLAIN, STATIC
from hf_osd.evaluation.contenders import Generate
from hf_osd.evaluation.models import Pair
from hf_osd.evaluation.streams import in_batches, make_stream

PROMPTS = ["a", "bcd", "ef", "ghij", "k", "lm"]


class Attached:
    """What `economize.apply` returns: decodes as the target does, row by row, and counts two of three as accepted."""

    def __init__(self, target: Any, config: Any) -> None:
        self.target, self.config = target, config
        self.detached = 0

    def decode_batch(self, prompts: list[torch.Tensor], count: int, *, decoding: Any, stop: list[int]) -> list[Any]:
        return [self._decode(prompt, count, stop) for prompt in prompts]

    def _decode(self, prompt: torch.Tensor, count: int, stop: list[int]) -> Any:
        output = self.target.generate(prompt[None], max_new_tokens=count, eos_token_id=stop, pad_token_id=0)
        cost = SimpleNamespace(count=lambda kind: {"exact": 5}[kind])
        return SimpleNamespace(tokens=output[0, len(prompt) :], acceptance=[(2, 1), (1, 1)], cost=cost)

    def detach(self) -> None:
        self.detached += 1


class Engine:
    """flashspec's engine: decodes as the target does, one row at a time, and pads with -1."""

    def __init__(self, config: Any, drafters: list[Any], target: Any, arms: list[Any]) -> None:
        self.target, self.arms = target, arms

    def generate(self, ids: torch.Tensor, count: int, eos_token_ids: list[int]) -> Any:
        new = self.target.generate(ids, max_new_tokens=count, eos_token_id=eos_token_ids, pad_token_id=0)
        new = new[:, ids.shape[1] :]
        padded = torch.nn.functional.pad(new, (0, count - new.shape[1]), value=-1)
        steps = [SimpleNamespace(drafter=i, proposed=3 + i, accepted=1 + i) for i in (0, 1)]
        return SimpleNamespace(output_ids=padded, n_tokens_generated=new.shape[1], arm_steps=steps)


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(members)
    return made


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> list[Attached]:
    """Stand-ins for both packages; what was attached to a target."""
    made: list[Attached] = []

    def apply(target: Any, config: Any) -> Attached:
        made.append(Attached(target, config))
        return made[-1]

    fakes = [
        module("economize", apply=apply, DecodeConfig=lambda cycle_length: cycle_length),
        module("economize.techniques", __path__=[]),
        module("economize.techniques.draft_model", DraftModelConfig=SimpleNamespace),
        module("economize.techniques.lookup", LookupConfig=SimpleNamespace),
        module("economize.techniques.hybrid", HybridConfig=SimpleNamespace),
        module(
            "flashspec", FlashSpecConfig=SimpleNamespace, SamplingConfig=SimpleNamespace, BanditConfig=SimpleNamespace,
            SpeculativeEngine=Engine,
        ),
        module(
            "flashspec.engine", ArmSpec=lambda *values, **names: (values, names), NgramDrafter=SimpleNamespace,
            HuggingFaceDrafter=lambda name, device, dtype, model: model,
            TargetModel=lambda name, device, dtype, model: model,
        ),
    ]  # fmt: skip
    for fake in fakes:
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return made


@pytest.fixture
def session() -> Session:
    pair = Pair(make_model(2, seed=1), make_model(1, seed=2), make_tokenizer())
    return Session(
        pair=pair,
        streams=[make_stream(pair, "letters", PROMPTS, 8)],
        floor=Floor({"target": pair.target, "draft": pair.draft}),
        max_new_tokens=8,
        steps=silent,
        peers=True,
    )


def opened(session: Session, stack: ExitStack, trial: Any = None) -> peers.Peers:
    trial = session.streams[0].warm_up if trial is None else trial
    return peers.open_peers(session.pair, trial, session.options, stack, None)


def test_peers_take_part_in_serving(session: Session, attached: list[Attached]) -> None:
    """Would catch a peer that is left out of the figures, is not compared, or stays attached to the target."""
    (stream,) = serving.run(session)["streams"].values()
    found, swept = stream["contenders"], stream["peers"]["ms_per_token_by_length"]
    assert [*swept] == [
        "economize, draft model", "economize, lookup", "economize, hybrid",
        "flashspec, lookup", "flashspec, lookup or draft",
    ]  # fmt: skip
    assert all([*times] == [*peers.LENGTHS] for times in swept.values())
    best = [peers.named(name, min(times, key=times.get)) for name, times in swept.items()]
    assert [*found][4:] == [STATIC, ONLINE, serving.DRAFT_ALONE, *best]
    assert {one["tokens"] for one in found.values()} == {found[PLAIN]["tokens"]}
    assert stream["outputs"]["mismatches"] == []
    assert [one.detached for one in attached] == [1, 1, 1]


def test_what_a_peer_counts_goes_to_the_right_field(session: Session, attached: list[Attached]) -> None:
    """Would catch proposals of a lookup in the draft's acceptance, and passes of one row for a batch."""
    with ExitStack() as stack:
        makers = opened(session, stack).makers
        (batch,) = in_batches(session.streams[0], 3, 0).requests
        request = session.streams[0].requests[0]
        samples = {
            name: make(2).answer(batch if name.startswith("economize") else request, **session.options)[1]
            for name, make in makers.items()
        }
    told = {
        name: (one.drafted, one.accepted, one.lookups, one.accepted_lookups, one.passes)
        for name, one in samples.items()
    }
    assert told == {
        "economize, draft model": (9, 6, 0, 0, 15),
        "economize, lookup": (0, 0, 9, 6, 15),
        "economize, hybrid": (0, 0, 0, 0, 15),  # which of the two proposed, it does not say
        "flashspec, lookup": (4, 2, 3, 1, 3),
        "flashspec, lookup or draft": (4, 2, 3, 1, 3),
    }


def test_rows_of_a_batch_are_padded_as_those_of_generate(session: Session, attached: list[Attached]) -> None:
    """Would catch left padding that is taken for text, and outputs that differ in their padding alone."""
    session.pair.target.generation_config.eos_token_id = [*range(2, 60)]  # some rows end early
    batched = in_batches(session.streams[0], 3, 0)
    plain = Generate(PLAIN, session.pair.target)
    with ExitStack() as stack:
        found = opened(session, stack, batched.warm_up)
        for request in (*batched.requests, batched.warm_up):
            expected, _ = plain.answer(request, **session.options)
            for make in found.makers.values():
                assert torch.equal(make(2).answer(request, **session.options)[0], expected)
    why = "flashspec serves one row at a time"
    assert found.left_out == dict.fromkeys(("flashspec, lookup", "flashspec, lookup or draft"), why)


def test_in_batches_only_those_are_compared_that_serve_them(session: Session, attached: list[Attached]) -> None:
    """Would catch a run in batches that ends at transformers' assisted generation, and a table without its columns."""
    figures = serving.run(Session(**{**vars(session), "batch": 2}))
    (stream,) = figures["streams"].values()
    names = [name.partition(", ")[0] for name in stream["contenders"]]
    assert names == [PLAIN, *["hf_osd"] * 3, *["economize"] * 3]
    assert [*stream["speedup_over"]] == [PLAIN]
    assert stream["outputs"] == {"requests": 2, "near_ties": 0, "mismatches": []}
    screen = io.StringIO()
    for table in tables.TABLES["serving"](figures):
        Console(file=screen, width=200).print(table)
    assert "over plain" in screen.getvalue()
    assert "over assisted" not in screen.getvalue()
    assert "flashspec, lookup is left out: flashspec serves one row" in screen.getvalue()


def test_a_peer_that_fails_ends_no_run(
    session: Session, attached: list[Attached], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch hours of measurements lost to another package, and one that stays attached after an error."""
    monkeypatch.setattr(Attached, "decode_batch", lambda *arguments, **names: 1 / 0)
    with ExitStack() as stack:
        found = opened(session, stack)
    assert [*found.makers] == ["flashspec, lookup", "flashspec, lookup or draft"]
    assert {*found.left_out.values()} == {"division by zero"}
    assert [one.detached for one in attached] == [1, 1, 1]


def test_the_draft_is_handed_on_as_a_folder(session: Session, attached: list[Attached]) -> None:
    """Would catch a draft with other weights than everybody's, and folders that are left behind."""
    with ExitStack() as stack:
        opened(session, stack)
        draft, _, hybrid = (one.config for one in attached)
        assert hybrid.fallback is draft
        saved = type(session.pair.draft).from_pretrained(draft.model)
        assert torch.equal(saved.lm_head.weight, session.pair.draft.lm_head.weight)
    assert not Path(draft.model).exists()


def test_what_is_not_installed_is_named_once(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Would catch an import error in the middle of a run, or peers that are missing without a word."""
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert peers.missing_peers() == [
        f'{name} is not installed and takes no part: pip install "hf-osd[peers]"'
        for name in ("economize", "flashspec")
    ]
    with ExitStack() as stack:
        assert opened(session, stack) == peers.Peers()
    screen = io.StringIO()
    monkeypatch.setattr(command, "load_prompt_streams", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        SuitesCommand(peers=True, output=tmp_path, plot=False).run(Console(file=screen, width=160))
    assert screen.getvalue().count("is not installed") == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"peers": True, "models": "scripted"}, "peers=True means nothing with models='scripted'"),
        ({"eagle3": "."}, r"eagle3 must be a folder that exists, and peers=True, got '\.'"),
        ({"eagle3": "missing", "peers": True}, "eagle3 must be a folder that exists, and peers=True, got 'missing'"),
    ],
)
def test_options_that_mean_nothing_are_refused(wrong: dict[str, Any], message: str) -> None:
    """Would catch a trained head that never takes part."""
    with pytest.raises(ConfigError, match=message):
        SuitesCommand(**wrong)


@pytest.fixture(params=peers.PACKAGES)
def package(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    if find_spec(name) is None:
        pytest.skip(f'{name} is not installed: pip install "hf-osd[peers]"')
    return name


def test_the_real_package_says_what_the_target_says(session: Session, package: str) -> None:
    """Would catch a new version with another interface, other outputs, or one that changes the target."""
    target, plain = session.pair.target, Generate(PLAIN, session.pair.target)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in target.modules()]
    size = 2 if package == "economize" else 1
    batched = in_batches(session.streams[0], size, 0)
    with ExitStack() as stack:
        found = opened(session, stack, batched.warm_up)
        mine = {name: make for name, make in found.makers.items() if name.startswith(package)}
        assert len(mine) == {"economize": 3, "flashspec": 2}[package], found.left_out
        for request in batched.requests:
            expected, _ = plain.answer(request, **session.options)
            for make in mine.values():
                output, sample = make(3).answer(request, **session.options)
                assert torch.equal(output, expected)
                assert 0 < sample.passes <= expected.numel() + size
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    assert hooks == [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in target.modules()]
    assert not target.training
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_a_trained_head_drafts_for_the_target(session: Session, tmp_path: Path) -> None:
    """Would catch a checkpoint that is read and not used, and a head in another dtype than the target's."""
    economize = pytest.importorskip("economize", reason='economize is not installed: pip install "hf-osd[peers]"')
    from economize.techniques.eagle3 import Eagle3Config

    target, request = session.pair.target.to(torch.bfloat16), session.streams[0].requests[0]
    economize.save(economize.apply(target, Eagle3Config(draft_vocab=100)), tmp_path)
    with ExitStack() as stack:
        found = peers.open_peers(session.pair, session.streams[0].warm_up, session.options, stack, tmp_path)
        contender = found.makers["economize, eagle3"](2)
        assert contender._model.techniques["eagle3"].dtype == torch.bfloat16
        assert contender.answer(request, **session.options)[1].drafted > 0
