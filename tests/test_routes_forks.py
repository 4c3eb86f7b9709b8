"""A new route's draft is a copy: of what was trained, over the same memory of all that is not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from borrowed import EMBEDDING, OUTPUT, SHARES, copies, pair, views
from borrowed import same as unchanged
from routed import FAST, TARGET, plain, serve, small
from torch import nn

from hf_osd import OnlineAssistant
from hf_osd.routing import ByKey


def places(model: nn.Module) -> dict[str, int]:
    return {name: weight.data_ptr() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_a_fork_reads_the_targets_memory_where_its_parent_does(share: Callable[..., None]) -> None:
    """Catches a fork with an embedding of its own, which takes the memory and is trained away from the target's."""
    draft, target = pair(share)
    before = copies(target)
    with OnlineAssistant(draft, target, FAST, router=ByKey()) as assistant:
        serve(assistant, target=target)
        assert torch.equal(serve(assistant, target=target, osd_route="new"), plain(target=target))
        assert torch.equal(serve(assistant, seed=1, target=target, osd_route="new"), plain(4, 1, target))
        new = assistant.routes["new"]
        shared = {name for name, place in places(new.draft).items() if place == places(draft)[name]}
        assert shared == new.frozen == {EMBEDDING, OUTPUT}
        assert new.stats().updates > 0 == new.stats().failed_updates
    assert unchanged(target, before)


def test_a_fork_shares_with_another_draft_what_its_parent_does() -> None:
    """Catches forks of drafts over one embedding that each get their own, which nobody trains in their parents."""
    drafts: dict[str, Any] = {"a": small(5), "b": small(6)}
    drafts["b"].set_input_embeddings(drafts["a"].get_input_embeddings())
    with OnlineAssistant(drafts=drafts, target=TARGET, config=FAST) as assistant:
        serve(assistant, osd_route="new")
        new = assistant.routes["new"]
        assert new.draft.get_input_embeddings().weight.data_ptr() == places(drafts["a"])[EMBEDDING]
        assert EMBEDDING in new.frozen
        assert OUTPUT not in new.frozen


def test_a_fork_of_a_tied_draft_stays_tied() -> None:
    """Catches a head that is copied beside the embedding it was tied to, and one that is read at another place."""
    target = copy.deepcopy(TARGET)
    draft: Any = small()
    draft.set_input_embeddings(target.get_input_embeddings())
    draft.get_output_embeddings().weight = target.get_input_embeddings().weight
    with OnlineAssistant(draft, target, FAST, router=ByKey()) as assistant:
        assert torch.equal(serve(assistant, target=target, osd_route="new"), plain(target=target))
        forked: Any = assistant.routes["new"].draft
        assert forked.get_output_embeddings().weight is forked.get_input_embeddings().weight
        assert places(forked)[EMBEDDING] == places(target)[EMBEDDING]


def test_a_fork_keeps_an_adapter_and_what_its_base_shares(tmp_path: Any) -> None:
    """Catches names of the wrapped model that are looked for in the model inside."""
    peft = pytest.importorskip("peft")
    draft, target = pair(views)
    wrapped = peft.get_peft_model(draft, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    before = copies(target)
    with OnlineAssistant(wrapped, target, FAST, router=ByKey()) as assistant:
        serve(assistant, target=target, osd_route=["default", "new", "new", "new"])
        new = assistant.routes["new"]
        assert places(new.draft)[EMBEDDING] == places(draft)[EMBEDDING]
        assert new.stats().updates > 0 == new.stats().failed_updates
    assert unchanged(target, before)
