"""Whose state it is: the draft that it began with, or was live, in any dtype; and no other."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import prompts, tiny_model
from restarts import made, observe, same_weights, traffic
from transformers import AutoModelForCausalLM

import hf_osd
from hf_osd import LearningError, OnlineAssistant, OnlineConfig
from hf_osd.learning.online import OnlineLearner
from hf_osd.storage import StateDirectory, read_state
from hf_osd.storage.identity import STATE_FOLDER

TARGET = tiny_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A state directory after some updates, and what was live at the end."""
    path = tmp_path_factory.mktemp("learned") / "state"
    live, learner = made(state_dir=path, gate=False)
    observe(learner, traffic(12))
    learner.close()
    assert learner.counters.updates == 3
    return path, {name: weight.clone() for name, weight in live.draft.state_dict().items()}


@pytest.fixture
def state(learned: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(learned[0], tmp_path / "state"))


def content(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("begins", ["initial", "live"])
def test_the_draft_itself_is_known(
    begins: str, dtype: torch.dtype, state: Path, learned: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    """Catches a restart that is refused: from the draft as it was loaded at first, or as it is saved, in any dtype."""
    for _ in range(3):
        live, learner = made(learn=False)
        if begins == "live":
            live.draft.load_state_dict(learned[1])
        live.draft.to(dtype)
        learner = live.learner(state_dir=state, gate=False)
        expected = {name: weight.to(dtype) for name, weight in learned[1].items()}
        assert same_weights(live.draft.state_dict(), expected)
        assert learner.counters.updates == 3
        learner.close()


def test_a_draft_that_has_learned_more_is_still_known(tmp_path: Path) -> None:
    """Catches a state that forgets what its draft began with, after a restart from other weights than those."""
    began = {name: weight.clone() for name, weight in made()[0].draft.state_dict().items()}
    weights = began
    for life in range(4):
        live, learner = made(draft=weights if life % 2 else began, state_dir=tmp_path, gate=False)
        observe(learner, traffic(8, 8 * life))
        learner.close()
        assert learner.counters.updates == 2 * (life + 1)
        weights = {name: weight.clone() for name, weight in live.draft.state_dict().items()}
    assert not same_weights(began, weights)


# Others.


def other_seed(draft: Any) -> None:
    draft.load_state_dict(tiny_like(draft, seed=9))


def tiny_like(draft: Any, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(w.shape, generator=generator) for name, w in draft.state_dict().items()}


def one_norm(draft: Any) -> None:
    draft.model.norm.weight.data.mul_(1.05)


def one_value(draft: Any) -> None:
    draft.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 0.5


def fine_tuned(draft: Any) -> None:
    for weight in draft.parameters():
        weight.data += 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


def frozen_part(draft: Any) -> None:
    draft.model.embed_tokens.weight.data.mul_(-1.0)
    draft.model.embed_tokens.weight.requires_grad_(False)


OTHERS: list[Callable[[Any], None]] = [other_seed, one_norm, one_value, fine_tuned, frozen_part]


@pytest.mark.parametrize("change", OTHERS)
@pytest.mark.parametrize("where", ["state_dir", "load"])
def test_another_draft_of_the_same_shape_is_refused(where: str, change: Callable[[Any], None], state: Path) -> None:
    """Catches weights of one draft that go live in another, and files that leave when that is found out."""
    live, _ = made(learn=False)
    change(live.draft)
    before, files = {name: w.clone() for name, w in live.draft.state_dict().items()}, content(state)
    leaving = {"max_disk_bytes": 1, "time_to_live": 1e-6, "flush_seconds": 0.001}  # nothing would stay with these
    use = {
        "state_dir": lambda: live.learner(state_dir=state, **leaving),
        "load": lambda: live.learner().load(state),
    }[where]
    with pytest.raises(LearningError, match=f"{state} holds the state of another draft: .*use another state dir"):
        use()
    assert same_weights(before, live.draft.state_dict())
    assert live.published == []
    assert content(state) == files
    assert not [thread for thread in threading.enumerate() if thread.name == "hf_osd-writer"]
    made(state_dir=state, gate=False)[1].close()  # it is free, for the draft that it is of


def test_what_an_adapter_does_not_touch_counts_too(tmp_path: Path) -> None:
    """Catches a draft that differs in weights which are never trained, and so are not in the state."""
    _, learner = made("lora", state_dir=tmp_path, gate=False)
    observe(learner, traffic(8))
    learner.close()
    live, _ = made(learn=False)
    one_norm(live.draft)
    with pytest.raises(LearningError, match=r"another draft: model.norm.weight \(32,\)"):
        live.learner(state_dir=tmp_path)
    again, _ = made("lora", state_dir=tmp_path, gate=False)
    assert again.published


def test_requests_without_a_snapshot_have_an_owner(tmp_path: Path) -> None:
    """Catches requests of another pair of models that are learned from, because the process died before any update."""
    _, learner = made(state_dir=tmp_path / "state", update_every=1000)
    learner._disk._writer._collect = lambda: None
    observe(learner, traffic(3))
    learner._disk.flush()
    left = Path(shutil.copytree(tmp_path / "state", tmp_path / "left"))  # as after a kill
    learner.close()
    live, _ = made(learn=False)
    other_seed(live.draft)
    with pytest.raises(LearningError, match="another draft"):
        live.learner(state_dir=left)
    _, restored = made(state_dir=left)
    assert len(restored.learner.replay.observations()) == 3
    assert restored.counters.updates == 0
    restored.close()


def test_a_directory_that_changes_hands_meanwhile(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check before the lock alone, where another process writes between the two."""
    live, _ = made(learn=False)
    other_seed(live.draft)
    monkeypatch.setattr("hf_osd.learning.resuming.read_groups", lambda *_: None)
    with pytest.raises(LearningError, match="another draft"):
        live.learner(state_dir=state, gate=False)
    assert live.published == []
    made(state_dir=state, gate=False)[1].close()


# Assistants.

SETTINGS: dict[str, Any] = {"update_every": 2, "steps_per_update": 2, "batch_size": 4, "learning_rate": 3e-3}
FAST: dict[str, Any] = {**SETTINGS, "gate": False, "draft_length_schedule": "constant", "draft_length": 3}


def fresh(seed: int = 5) -> Any:
    return tiny_model("llama", seed=seed, dtype=torch.float32)


def serve(assistant: OnlineAssistant, seed: int = 0) -> None:
    hf_osd.generate(TARGET, **prompts(2, seed=seed), online_assistant=assistant, max_new_tokens=8, do_sample=False)


def test_an_assistant_of_another_draft_is_not_made(tmp_path: Path) -> None:
    """Catches a refusal that comes with the first request, or leaves the directory locked."""
    config = OnlineConfig(**FAST, state_dir=tmp_path)
    with OnlineAssistant(fresh(), TARGET, config) as assistant:
        serve(assistant)
    for _ in range(2):
        with pytest.raises(LearningError, match="another draft"):
            OnlineAssistant(fresh(6), TARGET, config)
    with OnlineAssistant(fresh(), TARGET, config) as again:
        assert again.stats().updates == assistant.stats().updates == 1


def test_a_draft_that_was_saved_earlier_is_known(tmp_path: Path) -> None:
    """Catches a server that is started from what it once saved, and finds its state directory refused or stale."""
    config = OnlineConfig(**FAST, state_dir=tmp_path / "state")
    with OnlineAssistant(fresh(), TARGET, config) as assistant:
        serve(assistant)
        assistant.save_pretrained(tmp_path / "saved")
        serve(assistant, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        with OnlineAssistant.from_pretrained(tmp_path / "saved", TARGET, config, dtype=dtype) as again:
            expected = [weight.to(dtype) for weight in assistant.draft.parameters()]
            assert all(torch.equal(a, b) for a, b in zip(expected, again.draft.parameters(), strict=True))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with OnlineAssistant(plain, TARGET, config) as again:
        assert again.stats().updates == 2
    fresh(6).save_pretrained(tmp_path / "saved")  # another draft in the folder of the first
    for keep in (config, OnlineConfig(**FAST), OnlineConfig(**FAST, state_dir=tmp_path / "new")):
        with pytest.raises(LearningError, match="another draft"):
            OnlineAssistant.from_pretrained(tmp_path / "saved", TARGET, keep)
    StateDirectory(tmp_path / "new", collect=lambda: None).close()  # which is free


def test_a_draft_and_its_state_are_saved_together(tmp_path: Path) -> None:
    """Catches an update between the two, so that what was saved is refused as another draft's."""
    config = OnlineConfig(**{**FAST, "update_every": 1, "background": True, "duty_cycle": 1.0})
    over = threading.Event()
    with OnlineAssistant(fresh(), TARGET, config) as assistant:
        inner = assistant.draft.save_pretrained

        def slow(*args: Any, **kwargs: Any) -> None:
            inner(*args, **kwargs)
            time.sleep(0.3)  # an update would come now

        assistant.draft.save_pretrained = slow
        serve(assistant)

        def work() -> None:
            number = 0
            while not over.is_set():
                serve(assistant, seed=(number := number + 1))

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for number in range(3):
                assistant.update()
                assistant.save_pretrained(tmp_path / str(number))
        finally:
            over.set()
            worker.join()
        for number in range(3):
            saved = OnlineAssistant.from_pretrained(tmp_path / str(number), TARGET)
            snapshot, _ = read_state(tmp_path / str(number) / STATE_FOLDER)
            assert snapshot is not None
            assert saved.stats().updates == snapshot.numbers["counters"]["updates"] > 0
            saved.close()
        assert assistant.stats().failed_updates == 0


def test_a_config_is_not_saved_through_a_link(tmp_path: Path) -> None:
    """Catches settings that are written over a file of somebody else."""
    (tmp_path / "precious").write_text("keep me")
    (tmp_path / "saved" / STATE_FOLDER).mkdir(parents=True)
    (tmp_path / "saved" / STATE_FOLDER / "config.json").symlink_to(tmp_path / "precious")
    with OnlineAssistant(fresh(), TARGET, OnlineConfig(**FAST)) as assistant:
        assistant.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "precious").read_text() == "keep me"
    OnlineAssistant.from_pretrained(tmp_path / "saved", TARGET).close()


def test_a_learner_that_does_not_learn_keeps_nothing(tmp_path: Path) -> None:
    """Catches a directory that is taken, or a state that is refused, where `learn=False` needs neither."""
    live, learner = made(learn=False, state_dir=tmp_path / "state")
    assert not (tmp_path / "state").exists()
    learner.save(tmp_path / "saved")
    again: OnlineLearner = live.learner(learn=False)
    again.load(tmp_path / "saved")
    assert not again.has_state


def test_a_draft_made_of_the_target_goes_on(tmp_path: Path) -> None:
    """Catches "auto" drafts that begin at random, whose state is refused, and a start that is solved for again."""
    target, known = tiny_model("llama", layers=4, dtype=torch.float32), []
    for seed in range(2):
        torch.manual_seed(seed)
        with OnlineAssistant("auto", target, OnlineConfig(state_dir=tmp_path / "state", update_every=2)) as assistant:
            known.append((assistant.draft.config.solved, assistant._learner.learner.requests))
            for number in range(4):
                request = prompts(1, seed=number)
                hf_osd.generate(target, **request, online_assistant=assistant, max_new_tokens=8)
            known.append((assistant.draft.config.solved, assistant._learner.learner.requests))
    start, end, again, _ = known
    assert start == (0, 0)
    assert end[0] > 0
    assert again == end
