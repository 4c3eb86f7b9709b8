"""
Other packages as contenders, on the same weights and prompts: economize and flashspec.

Both are optional, and imported when they are set up. Neither changes the target. economize is called by its
`decode_batch`: its `generate` (0.3.2) refuses the name that transformers 5.24 gives the cache.

Not covered: what both offer beyond greedy decoding, and economize's techniques that train or rewrite the target.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from hf_osd.bench.serving import Maker
from hf_osd.config import reason_of
from hf_osd.drafts.features import FeatureDraft
from hf_osd.errors import InputError
from hf_osd.evaluation.contenders import Sample, timed
from hf_osd.evaluation.encoding import Inputs, end_tokens
from hf_osd.evaluation.models import Pair

PACKAGES = ("economize", "flashspec")
LENGTHS = (2, 4, 6, 10)  # tokens a round that are tried; economize's default is 3, flashspec's are 6 and 2

_FALLBACK_LENGTH = 2  # tokens that flashspec's draft proposes where its lookup finds nothing, as in its default
_TRIED_TOKENS = 2  # that a peer generates to show that it can serve the models


@dataclass(frozen=True, slots=True)
class Peers:
    """
    The peers that can serve a pair.

    Attributes:
        makers (`dict[str, Maker]`): By name, without the length.
        left_out (`dict[str, str]`): Why others of an installed package cannot.
    """

    makers: dict[str, Maker] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def missing_peers() -> list[str]:
    """Return a line for each package that is not installed: that it takes no part, and how to install it."""
    return [
        f'{name} is not installed and takes no part: pip install "hf-osd[peers]"'
        for name in PACKAGES
        if find_spec(name) is None
    ]


def open_peers(pair: Pair, trial: Inputs, options: dict[str, Any], stack: ExitStack, eagle3: Path | None) -> Peers:
    """
    Set up the peers that are installed, until the stack closes.

    Each serves a request first: one that cannot, with these models or in batches, is left out.

    Args:
        pair (`Pair`): The models.
        trial (`Inputs`): A request, or a batch of them, that is not among those to be served.
        options (`dict[str, Any]`): For `generate`.
        stack (`ExitStack`): Takes off again what is attached to the target.
        eagle3 (`Path`, *optional*): A checkpoint of economize with a trained `eagle3`.
    """
    found = Peers()
    setups = {"economize": _Techniques(pair, stack, eagle3).setups(), "flashspec": _engines(pair)}
    for name, set_up in ((name, one) for key in PACKAGES if find_spec(key) for name, one in setups[key].items()):
        try:
            make = set_up()
            make(LENGTHS[0]).answer(trial, **options | {"max_new_tokens": _TRIED_TOKENS})
        except Exception as error:  # code of other packages, with models and versions that they may not know
            found.left_out[name] = reason_of(error)
        else:
            found.makers[name] = make
    return found


class Economize:
    """
    A drafting technique of economize (https://github.com/Thiggel/economize).

    Args:
        name (`str`): What to call it.
        target (`PreTrainedModel`): The model.
        model (`economize.EfficientModel`): The target with the technique.
        length (`int`): Tokens that it proposes in each round, at most.
        counters (`tuple[str, str]`, *optional*): The fields of [`Sample`] that its proposals go to; without them where
            they come from two drafters, since economize does not tell them apart.
    """

    def __init__(
        self, name: str, target: PreTrainedModel, model: Any, length: int, counters: tuple[str, ...] = ()
    ) -> None:
        import economize

        self.name = name
        self.target = target  # run layer by layer, which no hook on the model sees
        self._model, self._counters = model, counters
        self._decoding = economize.DecodeConfig(cycle_length=length + 1)  # the target's own token is one of the cycle

    def answer(self, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, Sample]:
        """Generate with the technique; rows go in without their padding."""
        target = self.target
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        prompts = [ids[mask] for ids, mask in rows]
        results, seconds = timed(
            lambda: self._model.decode_batch(
                prompts, options["max_new_tokens"], decoding=self._decoding, stop=end_tokens(target)
            ),
            target.device,
        )
        tokens = [one.tokens for one in results]
        new = pad_sequence(tokens, batch_first=True, padding_value=options["pad_token_id"]).cpu()
        judged = [one for result in results for one in result.acceptance]  # (proposed, accepted) of each round
        counts: dict[str, Any] = dict(zip(self._counters, map(sum, zip(*judged, strict=True)), strict=False))
        passes = sum(one.cost.count("exact") for one in results)
        return new, Sample(tokens=new.numel(), seconds=seconds, passes=passes, **counts)


class _Techniques:
    """Attaches economize's techniques to a target, and takes them off when the stack closes."""

    def __init__(self, pair: Pair, stack: ExitStack, eagle3: Path | None) -> None:
        self._pair, self._stack, self._eagle3 = pair, stack, eagle3

    def setups(self) -> dict[str, Callable[[], Maker]]:
        """Return what sets up each, by name."""
        found = {
            "economize, draft model": self._draft_model,
            "economize, lookup": self._lookup,
            "economize, hybrid": self._hybrid,
        }
        return found | ({} if self._eagle3 is None else {"economize, eagle3": self._trained})

    @cached_property
    def _draft(self) -> Any:
        """The draft as economize takes it, which is by the name of a folder."""
        from economize.techniques.draft_model import DraftModelConfig

        folder = self._stack.enter_context(TemporaryDirectory())
        self._pair.draft.save_pretrained(folder)
        self._pair.tokenizer.save_pretrained(folder)
        return DraftModelConfig(model=folder)

    def _draft_model(self) -> Maker:
        return self._apply("economize, draft model", self._draft, ("drafted", "accepted"))

    def _lookup(self) -> Maker:
        from economize.techniques.lookup import LookupConfig

        return self._apply("economize, lookup", LookupConfig(), ("lookups", "accepted_lookups"))

    def _hybrid(self) -> Maker:
        from economize.techniques.hybrid import HybridConfig

        return self._apply("economize, hybrid", HybridConfig(fallback=self._draft))

    def _trained(self) -> Maker:
        import economize

        checkpoint = economize.read_checkpoint(self._eagle3)
        checkpoint.configs = [replace(one, param_dtype="model") for one in checkpoint.configs]  # float32 by default
        model = economize.attach(self._pair.target, checkpoint)
        return self._maker("economize, eagle3", model, ("drafted", "accepted"))

    def _apply(self, name: str, config: Any, counters: tuple[str, ...] = ()) -> Maker:
        import economize

        return self._maker(name, economize.apply(self._pair.target, config), counters)

    def _maker(self, name: str, model: Any, counters: tuple[str, ...]) -> Maker:
        self._stack.callback(model.detach)
        target = self._pair.target
        return lambda length: Economize(named(name, length), target, model, length, counters)


class FlashSpec:
    """
    The engine of flashspec (https://github.com/Mattral/FlashSpec): its prompt lookup, with or without the draft.

    It serves one row at a time. Its own default is a lookup of 6 tokens and a draft of 2.

    Args:
        name (`str`): What to call it.
        models (`dict[str, PreTrainedModel]`): `"target"`, and `"draft"` where it drafts too.
        length (`int`): Tokens of a lookup.

    Raises:
        InputError: The draft reads the target's states.
    """

    def __init__(self, name: str, models: dict[str, PreTrainedModel], length: int) -> None:
        import flashspec
        from flashspec.engine import ArmSpec, HuggingFaceDrafter, NgramDrafter, TargetModel

        self.name, self.target, self.seen_models = name, models["target"], models
        target, draft = models["target"], models.get("draft")
        config = flashspec.FlashSpecConfig(
            device=str(target.device),
            sampling=flashspec.SamplingConfig(temperature=0.0),
            bandit=flashspec.BanditConfig(n_arms=1),
        )
        drafters, arm = [NgramDrafter()], ArmSpec(0, length)
        if isinstance(draft, FeatureDraft):
            raise InputError("flashspec would run the draft without the target's states, which it reads")
        if draft is not None:
            drafters.append(HuggingFaceDrafter("draft", draft.device, draft.dtype, model=draft))
            arm = ArmSpec(0, length, fallback=1, fallback_gamma=min(_FALLBACK_LENGTH, length))
        wrapped = TargetModel("target", target.device, target.dtype, model=target)
        self._engine = flashspec.SpeculativeEngine(config, drafters, wrapped, arms=[arm])

    def answer(self, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, Sample]:
        """
        Generate with the engine.

        Raises:
            InputError: It is a batch, whose padding the engine would read as text.
        """
        target, ids = self.target, inputs["input_ids"]
        if len(ids) > 1:
            raise InputError("flashspec serves one row at a time")
        result, seconds = timed(
            lambda: self._engine.generate(ids, options["max_new_tokens"], eos_token_ids=end_tokens(target)),
            target.device,
        )
        new = result.output_ids[:, : result.n_tokens_generated].cpu()
        looked_up, drafted = ([one for one in result.arm_steps if one.drafter == index] for index in (0, 1))
        return new, Sample(
            tokens=new.numel(),
            seconds=seconds,
            drafted=sum(one.proposed for one in drafted),
            accepted=sum(one.accepted for one in drafted),
            lookups=sum(one.proposed for one in looked_up),
            accepted_lookups=sum(one.accepted for one in looked_up),
            passes=1 + len(result.arm_steps),  # the prompt's is no step
        )


def _engines(pair: Pair) -> dict[str, Callable[[], Maker]]:
    """Return what sets up flashspec's engines, by name."""
    alone = {"target": pair.target}
    return {
        "flashspec, lookup": lambda: _engine("flashspec, lookup", alone),
        "flashspec, lookup or draft": lambda: _engine("flashspec, lookup or draft", alone | {"draft": pair.draft}),
    }


def _engine(name: str, models: dict[str, PreTrainedModel]) -> Maker:
    return lambda length: FlashSpec(named(name, length), models, length)


def named(name: str, length: int) -> str:
    """Add the tokens that a contender proposes in a round to its name."""
    return f"{name} ({length})"
