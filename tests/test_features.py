"""A draft that reads its target's states: what it computes, what it borrows, how it serves and learns."""

import copy
import gc
import weakref

import pytest
import torch
from fakes import ARCHITECTURES, VOCAB, prompts, tiny_model
from test_speculation import chi_square, exact_distribution
from transformers import AutoModelForCausalLM

import hf_osd
from hf_osd import ConfigError, OnlineAssistant, OnlineConfig, UnsupportedModelError
from hf_osd.drafts.features import FeatureDraft
from hf_osd.drafts.starting import solve
from hf_osd.drafts.states import StateTap, with_states
from hf_osd.learning.features import FeatureCollator
from hf_osd.resolving import resolve_assistant
from hf_osd.serving.feature_decoder import FeatureDecoder
from hf_osd.serving.states import TargetStates

ALWAYS = {"draft_length_schedule": "constant", "draft_length": 4, "learn": False}
GREEDY = {"max_new_tokens": 24, "do_sample": False}


def draft_for(target, **options):
    """A cold draft whose vocabulary lacks tokens that the target uses."""
    torch.manual_seed(0)
    return FeatureDraft.of(target, **{"general": torch.arange(0, VOCAB, 2), **options})


def states_of(target, ids, layers):
    tap = StateTap.of(target, layers)
    with torch.no_grad():
        return tap.read(lambda: target(ids))[1]


def recorded(draft, target, count):
    """What serving a batch of prompts leaves to learn from."""
    config = OnlineConfig(**{**ALWAYS, "learn": True, "update_every": 100})
    with OnlineAssistant(draft, target, config) as assistant:
        hf_osd.generate(target, **prompts(count), online_assistant=assistant, **GREEDY)
        return assistant._learner.learner.replay.observations()


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "mistral", "gemma3"])
def test_states_are_those_of_the_model(kind):
    """Catches a tap on other layers than `output_hidden_states` counts, or before the last norm."""
    target = tiny_model(kind, layers=4)
    ids = prompts(1)["input_ids"]
    expected = target(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states_of(target, ids, (1, 3, 4)), torch.cat([expected[1], expected[3], expected[4]], dim=-1))


def test_states_of_one_forward_alone():
    """Catches a tap that keeps what an earlier forward, or one of a copy of the model, left behind."""
    target = tiny_model(layers=4)
    tap = StateTap.of(target, (2,))
    target(prompts(1)["input_ids"])
    copied = copy.deepcopy(target)
    with tap.reading() as found:
        copied(prompts(1)["input_ids"])
    assert not found


def test_layer_that_the_target_lacks_is_refused():
    """Catches a draft of a deeper target that fails in the middle of a request."""
    with pytest.raises(UnsupportedModelError, match="reads layer 9 of its target, and LlamaForCausalLM has 2"):
        StateTap.of(tiny_model(), (9,))


def test_unrolled_steps_are_what_serving_computes():
    """Catches training on another input or another view of the past than a proposal has."""
    target = tiny_model(layers=4)
    draft = draft_for(target, layers=2)
    ids = prompts(1, length=12)["input_ids"]
    states = states_of(target, ids, draft.state_layers)
    before = torch.nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]
    unrolled = draft(ids, states=before, own_steps=3).logits  # (4, 1, 12, vocab)
    source = TargetStates(target, draft.state_layers, [0], 12)
    for end in range(4, 9):
        source.write(states[:, :end], [end])
        decoder = FeatureDecoder(draft, [0], 12, source=source)
        for step in range(4):
            served = decoder.feed(ids, [end + step], keep=1)[0, 0].to(unrolled)
            torch.testing.assert_close(served, unrolled[step, 0, end + step - 1], atol=1e-5, rtol=1e-4)


def test_unrolled_steps_do_not_see_padding():
    """Catches a mask that lets short rows of a batch look at their padding."""
    target = tiny_model(layers=4)
    draft = draft_for(target)
    ids = prompts(1, length=8)["input_ids"]
    states = torch.randn(1, 8, draft.state_size, dtype=torch.float64)
    padded, wide = (torch.nn.functional.pad(value, side) for value, side in ((ids, (3, 0)), (states, (0, 0, 3, 0))))
    mask = torch.tensor([[0] * 3 + [1] * 8])
    alone = draft(ids, states=states, own_steps=2).logits
    together = draft(padded, states=wide, attention_mask=mask, own_steps=2).logits
    torch.testing.assert_close(together[:, :, 3:], alone)


def test_borrowed_weights_are_neither_saved_nor_copied(tmp_path):
    """Catches a checkpoint with the target's embedding in it, and a training copy with one of its own."""
    target = tiny_model(layers=4)
    draft = draft_for(target)
    draft.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 1.2 * sum(weight.numel() * weight.element_size() for weight in draft.parameters()) + 8_000
    copied = copy.deepcopy(draft)
    assert copied.get_input_embeddings() is target.get_input_embeddings()
    assert copied.vocabulary is draft.vocabulary
    assert not any(weight is target.get_input_embeddings().weight for weight in draft.parameters())


def test_loaded_by_the_auto_class(tmp_path):
    """Catches a folder that transformers does not load, and weights that it draws anew."""
    target = tiny_model(layers=4)
    draft = draft_for(target)
    draft.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).borrow(target)
    ids = prompts(2)["input_ids"]
    states = torch.randn(2, ids.shape[1], draft.state_size, dtype=torch.float64)
    torch.testing.assert_close(loaded(ids, states=states).logits, draft(ids, states=states).logits)
    assert torch.equal(loaded.general, draft.general)


def test_draft_without_its_target_says_what_to_do():
    """Catches an AttributeError deep in a forward."""
    target = tiny_model(layers=4)
    draft = FeatureDraft(draft_for(target).config)
    with pytest.raises(UnsupportedModelError, match="call borrow"):
        draft(prompts(1)["input_ids"])
    with pytest.raises(UnsupportedModelError, match="design a draft for this target"):
        draft.borrow(tiny_model(vocab_size=VOCAB + 7))


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "mistral", "gemma3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_output_is_the_targets(kind, batch):
    """Catches states written at the wrong columns in a way that leaks into the target, and rollbacks of windows."""
    target = tiny_model(kind, layers=4)
    assistant = OnlineAssistant(draft_for(target), target, OnlineConfig(**ALWAYS))
    for seed in range(3):
        inputs = prompts(batch, seed=seed)
        expected = target.generate(**inputs, **GREEDY)
        assert torch.equal(hf_osd.generate(target, **inputs, online_assistant=assistant, **GREEDY), expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_proposals_follow_from_the_true_states(batch, monkeypatch):
    """Catches a draft that serves losslessly and uselessly: stale states, of another row or another column."""
    target = tiny_model(layers=4)
    draft = draft_for(target)
    seen = []
    before = TargetStates.before

    def spy(self, columns, positions):
        found = before(self, columns, positions)
        seen.append((columns, positions, found))
        return found

    monkeypatch.setattr(TargetStates, "before", spy)
    inputs = prompts(batch)
    assistant = OnlineAssistant(draft, target, OnlineConfig(**ALWAYS))
    out = hf_osd.generate(target, **inputs, online_assistant=assistant, **GREEDY)
    assert len(seen) > 3
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 24), value=1)
    tap = StateTap.of(target, draft.state_layers)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        _, states = tap.read(lambda: target(out, attention_mask=mask, position_ids=positions))
    for columns, positions, read in seen[1:]:  # the first is the draft's trial
        for row in range(batch):
            for place, column in enumerate(columns[row].tolist()):
                if positions[row, place] > 0:
                    torch.testing.assert_close(read[row, place], states[row, column - 1])
                else:
                    assert not read[row, place].any()


def test_proposes_nothing_outside_its_vocabulary():
    """Catches logits of 0 for tokens that are not scored, which would win over negative ones."""
    target = tiny_model(layers=4)
    draft = draft_for(target, general=torch.tensor([5, 9, 11]))
    assistant = OnlineAssistant(draft, target, OnlineConfig(**ALWAYS))
    proposed = []
    engine_propose = hf_osd.OnlineAssistedGenerator.propose

    def spy(self, *args, **kwargs):
        proposal = engine_propose(self, *args, **kwargs)
        proposed.extend(proposal.tokens.flatten().tolist())
        return proposal

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_osd.OnlineAssistedGenerator, "propose", spy)
        inputs = prompts(1)
        first = hf_osd.generate(target, **inputs, online_assistant=assistant, **GREEDY)
    prompt = set(inputs["input_ids"].flatten().tolist())
    assert proposed
    assert set(proposed) <= {5, 9, 11} | prompt
    assert set(draft.vocabulary.tokens().tolist()) == {5, 9, 11} | set(first[0, 9:].tolist())


def test_recorded_states_are_those_that_serving_read():
    """Catches states recorded a token off, or of columns that were rejected: learning would teach noise."""
    target = tiny_model(layers=4)
    draft = draft_for(target)
    observations = recorded(draft, target, 3)
    assert len(observations) == 3
    for observation in observations:
        ids = torch.cat((observation.prompt_ids, observation.output_ids))[None, :-1]
        expected = states_of(target, ids, draft.state_layers)[0].to(torch.bfloat16)
        assert torch.equal(observation.states, expected)


def test_states_that_are_not_kept_are_read_again():
    """Catches learning that stops where the memory for states is full, or after a restart."""
    target = tiny_model(layers=4)
    draft = draft_for(target)
    observations = recorded(draft, target, 2)
    collate = FeatureCollator(64, "all", draft)
    kept = collate(observations)
    for observation in observations:
        object.__setattr__(observation, "states", None)
    again = collate(observations)
    assert torch.equal(kept["states"], again["states"])
    assert all(observation.states is None for observation in observations)
    assert all(one.states is not None for one in with_states(draft, observations))


def test_only_the_end_of_a_prompt_is_read():
    """Catches states or teachers that move against their tokens, and prompts whose tokens are no longer proposed."""
    target = tiny_model(layers=4)
    draft = draft_for(target)
    observations = recorded(draft, target, 2)
    whole, cut = FeatureCollator(64, "all", draft)(observations), FeatureCollator(64, "all", draft, 2)(observations)
    width = max(len(one.output_ids) for one in observations) + 1
    assert cut["input_ids"].shape[1] == width < whole["input_ids"].shape[1]
    assert torch.equal(cut["states"][:, 1:], whole["states"][:, 1 - width :])
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(cut[name], whole[name][:, -width:])
    for name in ("vocabulary", "teacher_ids", "teacher_tail", "learn_mask"):
        assert torch.equal(cut[name], whole[name])


def test_teacher_ids_are_places_in_the_vocabulary():
    """Catches a draft that is taught the token which stands at the place of another one."""
    target = tiny_model(layers=4)
    draft = draft_for(target)
    observations = recorded(draft, target, 2)
    batch = FeatureCollator(64, "all", draft)(observations)
    vocabulary = batch["vocabulary"].tolist()
    for row, observation in enumerate(observations):
        places, ids = batch["teacher_ids"][row, -24:], observation.teacher_ids
        for place, token in zip(places.flatten().tolist(), ids.flatten().tolist(), strict=True):
            assert place == (vocabulary.index(token) if token in vocabulary else len(vocabulary))


@pytest.mark.parametrize("background", [False, True])
def test_learns_what_the_target_says(background):
    """Catches updates that fail, train nothing, or change what is borrowed."""
    target = tiny_model(layers=4, dtype=torch.float32)
    draft = draft_for(target)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    config = OnlineConfig(
        draft_length_schedule="constant",
        draft_length=3,
        update_every=4,
        steps_per_update=30,
        learning_rate=1e-2,
        background=background,
        duty_cycle=1.0,
    )
    with OnlineAssistant(draft, target, config) as assistant:
        for turn in range(16):
            if background and turn == 12:
                assistant.update()  # which waits for it
            inputs = prompts(1, seed=turn % 4)
            expected = target.generate(**inputs, **GREEDY)
            assert torch.equal(hf_osd.generate(target, **inputs, online_assistant=assistant, **GREEDY), expected)
        stats = assistant.stats()
        judged = [request.acceptance for request in assistant.journal.requests]
    assert stats.failed_updates == 0
    assert stats.updates > 0
    assert sum(judged[-4:]) / 4 > sum(judged[:4]) / 4 + 0.3
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_sampling_has_the_targets_distribution():
    """
    Catches draft probabilities that are not those that were sampled from, as where tokens outside the vocabulary are
    given some.

    All 5^3 continuations against their exact probabilities; 1 and 2 are never proposed. A correct sampler fails with a
    probability of 1e-4; this one is seeded.
    """
    rows = 800
    target = tiny_model(vocab_size=5, initializer_range=0.15, pad_token_id=None, layers=4)
    prompt = [3, 4, 0, 3, 4]
    expected = exact_distribution(target, torch.tensor([prompt]), 4, temperature=1.3, top_k=4)
    settings = dict(max_new_tokens=4, do_sample=True, top_k=4, temperature=1.3)
    counts = torch.zeros(expected.numel(), dtype=torch.long)
    for seed in range(8):
        draft = draft_for(target, general=torch.tensor([0]))
        assistant = OnlineAssistant(draft, target, OnlineConfig(**ALWAYS))
        generator = torch.Generator().manual_seed(seed)
        ids = torch.tensor([prompt]).expand(rows, -1)
        out = hf_osd.generate(target, input_ids=ids, online_assistant=assistant, generator=generator, **settings)
        places = (out[:, 5:] * torch.tensor([125, 25, 5, 1])).sum(1)
        counts += torch.bincount(places, minlength=expected.numel())
        assert assistant.stats().accepted_tokens > 0
    assert chi_square(counts, expected.flatten()) > 1e-4


def test_auto_makes_a_draft_and_keeps_it():
    """Catches a draft made anew for every request, which would never learn."""
    target = tiny_model(layers=4)
    for _ in range(2):
        out = hf_osd.generate(target, **prompts(1), online_assistant="auto", **GREEDY)
        assert torch.equal(out, target.generate(**prompts(1), **GREEDY))
    assert resolve_assistant("auto", target).stats().requests == 2
    assert isinstance(resolve_assistant("auto", target).draft, FeatureDraft)


def test_auto_says_where_no_draft_can_be_made():
    """Catches an AttributeError of some architecture's own code."""
    with pytest.raises(UnsupportedModelError, match="recurrent state or is offloaded: pass a draft"):
        OnlineAssistant("auto", tiny_model("mamba"))
    with pytest.raises(UnsupportedModelError, match="or 'auto', got 'gpt2': load it with"):
        OnlineAssistant("gpt2", tiny_model())


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_target_is_served_without_it(in_place):
    """Catches states that the graphs of a compiled forward do not give: its hooks are not called, or once."""
    target = tiny_model()
    with OnlineAssistant(draft_for(target), target, OnlineConfig(**{**ALWAYS, "learn": True})) as assistant:
        for compiles in (False, True):
            if compiles and in_place:
                target.compile(backend="eager")
            elif compiles:
                target.forward = torch.compile(target.forward, backend="eager")
            out = hf_osd.generate(target, **prompts(1), online_assistant=assistant, **GREEDY)
            assert torch.equal(out, target.generate(**prompts(1), **GREEDY))
            assert len(assistant.stats().fallback_reasons) == compiles


def test_auto_is_solved_from_its_requests():
    """Catches a cold draft that begins to learn by gradient alone, or that is begun anew with every update."""
    target = tiny_model(layers=4, dtype=torch.float32)
    config = OnlineConfig(update_every=4, steps_per_update=1, learning_rate=1e-9, gate=False)
    with OnlineAssistant("auto", target, config) as assistant:
        cold, solved = copy.deepcopy(assistant.draft), []
        for turn in range(12):
            hf_osd.generate(target, **prompts(1, seed=turn), online_assistant=assistant, **GREEDY)
            solved.append(assistant.draft.config.solved)
            if turn == 7:
                seen = assistant._learner.learner.replay.observations()
        assert assistant.stats().updates == 3
        assert 0 < solved[3] < solved[7] == solved[11]
        expected = {**cold.state_dict(), **solve(cold, seen[::-1])}
        for name, value in assistant.draft.state_dict().items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


def test_auto_does_not_keep_the_target_alive():
    """Catches a draft that holds the model it borrows from: every target would stay in memory for ever."""
    target = tiny_model(layers=4)
    hf_osd.generate(target, **prompts(1), online_assistant="auto", **GREEDY)
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None


def test_saved_with_what_it_learned(tmp_path):
    """Catches an assistant that cannot be saved or resumed with such a draft."""
    target = tiny_model(layers=4, dtype=torch.float32)
    config = OnlineConfig(update_every=4, learning_share=None)
    with OnlineAssistant("auto", target, config) as assistant:
        for seed in range(8):
            hf_osd.generate(target, **prompts(1, seed=seed), online_assistant=assistant, **GREEDY)
        assistant.save_pretrained(tmp_path)
        steps = assistant.stats().learned_steps
    with OnlineAssistant.from_pretrained(tmp_path, target) as again:
        assert again.stats().learned_steps == steps > 0
        for seed in range(8, 12):
            hf_osd.generate(target, **prompts(1, seed=seed), online_assistant=again, **GREEDY)
        assert again.stats().learned_steps > steps
        assert again.stats().failed_updates == 0


@pytest.mark.parametrize("settings", [{"lmbda": 0.5}, {"full_teacher": True}])
def test_settings_that_it_cannot_learn_by_are_refused(settings):
    """Catches an update that fails, for every request, in a thread."""
    with pytest.raises(ConfigError, match="does not go with a draft that reads the target's states"):
        OnlineAssistant("auto", tiny_model(layers=4), OnlineConfig(**settings))


def test_states_are_kept_within_their_budget():
    """Catches a replay buffer that grows by the hidden states of hundreds of requests."""
    target = tiny_model(layers=4, dtype=torch.float32)
    draft = draft_for(target)
    size = (9 + 24 - 1) * draft.state_size * 2  # bytes of one request
    config = OnlineConfig(update_every=4, steps_per_update=2, gate=False, max_state_bytes=3 * size)
    with OnlineAssistant(draft, target, config) as assistant:
        for seed in range(9):
            hf_osd.generate(target, **prompts(1, seed=seed), online_assistant=assistant, **GREEDY)
        kept = [request.states is not None for request in assistant._learner.learner.replay.observations()]
        assert kept == [False] * 6 + [True] * 3
        assert assistant.stats().updates == 2
        assert assistant.stats().failed_updates == 0


@pytest.mark.parametrize("gate", [False, True])
def test_learns_by_an_adapter(gate):
    """Catches an adapter of the embedding that the draft does not have, or one that cannot be merged."""
    target = tiny_model(layers=4, dtype=torch.float32)
    config = OnlineConfig(update_every=4, steps_per_update=2, gate=gate, peft_config={})
    with OnlineAssistant(draft_for(target), target, config) as assistant:
        for seed in range(8):
            hf_osd.generate(target, **prompts(1, seed=seed), online_assistant=assistant, **GREEDY)
        assert assistant.stats().failed_updates == 0
        assert assistant.stats().learned_steps == 4
