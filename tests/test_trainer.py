"""The trainer on recorded teachers: its batches, its loss, its arguments, and what it must not touch."""

import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_osd._compat import global_seed_untouched
from hf_osd.config import OnlineConfig
from hf_osd.errors import ConfigError
from hf_osd.learning.losses import sparse_loss
from hf_osd.learning.reading import ObservationCollator
from hf_osd.learning.session import UpdateCallback
from hf_osd.learning.trainer import OnlineGKDTrainer, training_arguments
from hf_osd.records import Observation

VOCAB = 64


def llama(seed: int = 0, vocab: int = VOCAB, **options: Any) -> LlamaForCausalLM:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes, **options))
    torch.set_rng_state(state)
    return model.eval()


def gpt2() -> GPT2LMHeadModel:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    torch.set_rng_state(state)
    return model.eval()


def observe(target: PreTrainedModel, number: int, k: int = 8) -> Observation:
    """A random request, recorded as serving would: the target's distribution at every output position."""
    generator = torch.Generator().manual_seed(number)
    prompt = torch.randint(0, VOCAB, (3 + number % 5,), generator=generator)
    output = torch.randint(0, VOCAB, (6 + number % 7,), generator=generator)
    with torch.no_grad():
        logits = target(torch.cat((prompt, output))[None]).logits[0, len(prompt) - 1 : -1]
    log_probs, ids = logits.log_softmax(-1).sort(descending=True)
    accepted = torch.rand(len(output), generator=generator) < 0.5
    drafted = torch.randint(-1, VOCAB, (len(output),), generator=generator)
    tail = log_probs[:, k:].exp().sum(-1)
    return Observation(prompt, output, ids[:, :k], log_probs[:, :k], tail, drafted, accepted & (drafted >= 0))


class Steps:
    """A session that counts, and may end an update early."""

    def __init__(self, seconds: float = 1.0, most: int | None = None) -> None:
        self.seconds, self.most = seconds, most
        self.positions: list[int] = []
        self.pauses = 0

    def give_way(self) -> float:
        self.pauses += 1
        return self.seconds

    def count_step(self, positions: int) -> None:
        self.positions.append(positions)

    def is_over(self) -> bool:
        return len(self.positions) == self.most


def trainer_of(
    draft: PreTrainedModel, observations: list[Observation], session: Steps, config: OnlineConfig, **options: Any
) -> OnlineGKDTrainer:
    generator = random.Random(0)

    def sample(size: int) -> list[Observation]:
        return generator.sample(observations, min(size, len(observations)))

    return OnlineGKDTrainer(draft, sample, config, UpdateCallback(session), **options)


def updated(
    draft: PreTrainedModel, observations: list[Observation], config: OnlineConfig, count: int = 1, rate: float = 1e-3
) -> list[float]:
    """Run some updates; their losses."""
    trainer = trainer_of(draft, observations, Steps(), config)
    return [trainer.update(config.steps_per_update, rate) for _ in range(count)]


def loss_one_by_one(draft: PreTrainedModel, observations: list[Observation], positions: str = "all") -> float:
    """The loss without batches, padding or positions."""
    values = []
    for o in observations:
        with torch.no_grad():
            logits = draft(torch.cat((o.prompt_ids, o.output_ids))[None]).logits[0, len(o.prompt_ids) - 1 : -1]
        each = sparse_loss(logits, o.teacher_ids, o.teacher_log_probs, o.teacher_tail)
        values.append(each[o.rejected] if positions == "rejected" else each)
    return torch.cat(values).mean().item()


def batch_loss(trainer: OnlineGKDTrainer, observations: list[Observation]) -> torch.Tensor:
    return trainer.compute_loss(trainer.model, trainer.data_collator(observations))


@pytest.mark.parametrize("positions", ["all", "rejected"])
@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_batched_loss_equals_one_by_one(make: Any, positions: str) -> None:
    """Catches logits shifted by one, padding that is attended to or learned from, and wrong absolute positions."""
    draft, target = make(), llama(seed=1)
    observations = [observe(target, number) for number in range(6)]
    trainer = trainer_of(draft, observations, Steps(), OnlineConfig(positions=positions))
    loss = batch_loss(trainer, observations)
    assert loss.item() == pytest.approx(loss_one_by_one(draft, observations, positions), rel=1e-4)
    loss.backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in draft.parameters())


def test_a_model_without_logits_to_keep() -> None:
    """Catches an argument that the draft's forward does not take, and logits taken from the wrong end."""

    class Plain(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    target, draft = llama(seed=1), llama()
    observations = [observe(target, number) for number in range(4)]
    draft.__class__ = Plain
    trainer = trainer_of(draft, observations, Steps(), OnlineConfig())
    loss = batch_loss(trainer, observations).item()
    assert loss == pytest.approx(loss_one_by_one(llama(), observations), rel=1e-3)


@pytest.mark.parametrize("vocab", [VOCAB, VOCAB + 8])
def test_full_teacher(vocab: int) -> None:
    """Catches a re-run teacher that is misaligned, and padded vocabularies that do not fit together."""
    target, draft = llama(seed=1, vocab=vocab), llama()
    observations = [observe(target, number, k=VOCAB) for number in range(5)]
    config = OnlineConfig(full_teacher=True)
    trainer = trainer_of(draft, observations, Steps(), config, target=target)
    values = []
    for o in observations:
        ids, start = torch.cat((o.prompt_ids, o.output_ids))[None], len(o.prompt_ids) - 1
        with torch.no_grad():
            p = target(ids).logits[0, start:-1, :VOCAB].log_softmax(-1)
            q = draft(ids).logits[0, start:-1].log_softmax(-1)
        values.append((p.exp() * (p - q)).sum(-1))
    assert batch_loss(trainer, observations).item() == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)
    assert not target.training
    assert "forward" not in vars(target)
    assert all(weight.grad is None for weight in target.parameters())


def test_training_lowers_the_loss() -> None:
    """Catches a step in the wrong direction, a frozen copy, and an update that ends before its last step."""
    target, draft = llama(seed=1), llama()
    observations = [observe(target, number) for number in range(8)]
    session, before = Steps(), loss_one_by_one(draft, observations)
    trainer = trainer_of(draft, observations, session, OnlineConfig())
    losses = [trainer.update(5, 3e-3) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert loss_one_by_one(draft, observations) < 0.8 * before
    assert len(session.positions) == trainer.state.global_step == 30


def test_updates_are_one_training() -> None:
    """Catches an optimiser or a learning rate that starts anew in each update, or a batch that is drawn twice."""
    target = llama(seed=1)
    observations = [observe(target, number) for number in range(8)]
    drafts = llama(), llama()
    trainers = [trainer_of(draft, observations, Steps(), OnlineConfig()) for draft in drafts]
    for _ in range(3):
        trainers[0].update(2, 1e-3)
    trainers[1].update(6, 1e-3)
    for one, other in zip(drafts[0].parameters(), drafts[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_an_update_may_end_early() -> None:
    """Catches an update that ignores that its time is over, or that ends all later ones as well."""
    target, session = llama(seed=1), Steps(most=2)
    trainer = trainer_of(llama(), [observe(target, 0)], session, OnlineConfig())
    trainer.update(5, 1e-3)
    assert len(session.positions) == 2
    trainer.update(5, 1e-3)
    assert len(session.positions) == 7


@pytest.mark.parametrize("background", [False, True])
def test_no_rejected_position_is_no_error(background: bool) -> None:
    """Catches 0 / 0, which would poison the weights."""
    target, draft = llama(seed=1), llama()
    o = observe(target, 0)
    none = Observation(
        o.prompt_ids, o.output_ids, o.teacher_ids, o.teacher_log_probs, o.teacher_tail,
        torch.full_like(o.draft_ids, -1), torch.zeros_like(o.accepted),
    )  # fmt: skip
    assert updated(draft, [none], OnlineConfig(positions="rejected", background=background)) == [0.0]
    assert all(weight.isfinite().all() for weight in draft.parameters())


def test_the_learning_rate_is_that_of_the_update() -> None:
    """Catches a rate that only the first update gets, and one that compounds."""
    target = llama(seed=1)
    observations = [observe(target, number) for number in range(4)]
    drafts, arguments = (llama(), llama()), {"optim": "sgd", "max_grad_norm": 0.0}
    config = OnlineConfig(steps_per_update=1, training_arguments=arguments)
    for draft, rates in zip(drafts, ((0.1, 0.1), (0.1, 0.0)), strict=True):
        trainer = trainer_of(draft, observations, Steps(), config)
        first = [trainer.update(1, rates[0]), [weight.clone() for weight in draft.parameters()]][1]
        trainer.update(1, rates[1])
        moved = any(not torch.equal(one, now) for one, now in zip(first, draft.parameters(), strict=True))
        assert moved == (rates[1] > 0.0)


@pytest.mark.parametrize("seconds", [1.0, 0.0], ids=["row by row", "growing parts"])
@pytest.mark.parametrize("positions", ["all", "rejected"])
def test_parts_take_the_step_of_the_batch(positions: Any, seconds: float) -> None:
    """Catches parts that each take a mean of their own, a step for each part, and a loss or count of one part only."""
    target = llama(seed=1)
    observations = [observe(target, number) for number in range(6)]
    sessions, losses, drafts = [], [], []
    for background in (False, True):
        # SGD: a wrong gradient shows in full, where Adam would only look at its sign.
        config = OnlineConfig(
            background=background, positions=positions, batch_size=6,
            training_arguments={"optim": "sgd", "max_grad_norm": 0.0},
        )  # fmt: skip
        sessions.append(Steps(seconds))
        drafts.append(llama())
        trainer = trainer_of(drafts[-1], observations, sessions[-1], config)
        losses.append([trainer.update(2, 0.1) for _ in range(2)])
    whole, parts = sessions
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert parts.positions == whole.positions == [whole.positions[0]] * 4
    assert parts.pauses > whole.pauses
    start = llama().parameters()
    for first, one, other in zip(start, *(draft.parameters() for draft in drafts), strict=True):
        torch.testing.assert_close(other - first, one - first, rtol=1e-3, atol=1e-6)


def test_collator_keeps_the_end_of_long_requests() -> None:
    """Catches a truncation that cuts the verified end, or leaves a teacher without its input."""
    o = observe(llama(seed=1), 6)
    assert len(o.output_ids) == 12
    batch = ObservationCollator(max_length=5, positions="all")([o, observe(llama(seed=1), 1)])
    assert batch["input_ids"].shape == (2, 5)
    assert batch["input_ids"][0].tolist() == o.output_ids[-6:-1].tolist()
    assert batch["learn_mask"].shape == (2, 5)
    assert torch.equal(batch["teacher_ids"][0], o.teacher_ids[-5:])


def test_collator_folds_a_larger_k_into_the_tail() -> None:
    """Catches mass lost where requests recorded with different k share a batch."""
    target = llama(seed=1)
    batch = ObservationCollator(64, "all")([observe(target, 0, k=8), observe(target, 1, k=3)])
    mass = batch["teacher_log_probs"].exp().sum(-1) + batch["teacher_tail"]
    assert batch["teacher_ids"].shape[-1] == 3
    torch.testing.assert_close(mass[batch["learn_mask"]], torch.ones(int(batch["learn_mask"].sum())))


def test_global_random_state_is_untouched() -> None:
    """Catches `set_seed` in `Trainer.__init__`, GKD's coin, a DataLoader's seed: serving samples from these."""
    target, draft = llama(seed=1), llama()
    observations = [observe(target, number) for number in range(4)]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    updated(draft, observations, OnlineConfig(), count=2)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_it_is_quiet_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Catches output directories, progress bars, printed logs and telemetry."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: pytest.fail("telemetry"))
    target = llama(seed=1)
    updated(llama(), [observe(target, 0)], OnlineConfig(), count=2)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert list(tmp_path.iterdir()) == []


def test_log_history_is_bounded() -> None:
    """Catches a trainer that remembers every update for ever."""
    target = llama(seed=1)
    config = OnlineConfig(steps_per_update=1, batch_size=1)
    trainer = trainer_of(llama(), [observe(target, 0)], Steps(), config)
    for _ in range(130):
        trainer.update(1, 1e-3)
    assert len(trainer.state.log_history) <= 100


def test_reporters_see_every_update() -> None:
    """Catches `report_to` that reports nothing, or one update late."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        logs: list[dict[str, float]] = []  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.logs.append(logs)

    trainer = trainer_of(llama(), [observe(llama(seed=1), 0)], Steps(), OnlineConfig())
    trainer.add_callback(Reporter())
    losses = [trainer.update(2, 1e-3) for _ in range(3)]
    assert [logs["online_loss"] for logs in Reporter.logs] == losses


def test_user_arguments_arrive() -> None:
    """Catches arguments that are dropped, and defaults of TRL that a small CPU draft pays for."""
    config = OnlineConfig(training_arguments={"weight_decay": 0.3, "adam_beta2": 0.9, "max_grad_norm": 0.1})
    arguments = training_arguments(config, torch.device("cpu"))
    assert (arguments.weight_decay, arguments.adam_beta2, arguments.max_grad_norm) == (0.3, 0.9, 0.1)
    assert not arguments.gradient_checkpointing
    assert not arguments.bf16
    assert arguments.report_to == []
    assert arguments.device == torch.device("cpu")
    checkpointing = OnlineConfig(training_arguments={"gradient_checkpointing": True})
    assert training_arguments(checkpointing, torch.device("cpu")).gradient_checkpointing


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rat", 1.0, "no field 'learning_rat'"),
        ("learning_rate", 1.0, "OnlineConfig.learning_rate"),
        ("max_steps", 3, "OnlineConfig.steps_per_update"),
        ("optim", "no such optimiser", "no such optimiser"),
        ("lmbda", 2.0, "lmbda"),
    ],
)
def test_bad_arguments_are_named(name: str, value: Any, message: str) -> None:
    """Catches unknown options that are dropped, and a TypeError without the name of the setting."""
    with pytest.raises(ConfigError, match=message):
        training_arguments(OnlineConfig(training_arguments={name: value}), torch.device("cpu"))


def test_importing_the_package_does_not_import_trl() -> None:
    """Catches seconds of import time for users who never learn."""
    code = "import sys, hf_osd.learning; assert not {'trl', 'datasets'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_trainers_that_are_made_at_once_leave_the_seeding_as_it_was():
    """Catches two threads that each put back what the other one had put there: `Trainer` would never seed again."""
    module, entered = SimpleNamespace(set_seed=print), threading.Event()

    def make_another() -> None:
        with global_seed_untouched(module):
            entered.set()

    other = threading.Thread(target=make_another)
    with global_seed_untouched(module):
        other.start()
        assert not entered.wait(0.05)
    other.join()
    assert entered.is_set()
    assert module.set_seed is print
