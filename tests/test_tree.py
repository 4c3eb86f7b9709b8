"""Trees of proposals: what is merged and laid out, who sees whom, and a cache from which one path is kept."""

from functools import partial

import pytest
import torch
from fakes import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_osd.drafts.states import StateTap
from hf_osd.serving.decoder import RaggedDecoder
from hf_osd.serving.states import TargetStates
from hf_osd.serving.tree import ROOT, Candidates, chain, depths, lineage, visible

VOCAB = 61
MODELS = {kind: tiny_model(kind) for kind in ("llama", "gpt2", "neox", "gemma")}
MODELS["eager"] = tiny_model("llama", attn_implementation="eager")
BOTH = ["sliding_attention", "full_attention"]
WINDOWED = {
    "mistral": tiny_model("mistral", sliding_window=4),
    "gemma3": tiny_model("gemma3", sliding_window=3, layer_types=BOTH, attn_implementation="eager"),
}
MODELS |= WINDOWED
LAYERS = (1, 2)


@st.composite
def trees(draw, nodes):
    """The parents of that many nodes."""
    return [draw(st.integers(ROOT, node - 1)) for node in range(nodes)]


CHAINS = st.lists(st.lists(st.tuples(st.integers(0, 2), st.floats(0.0, 1.0)), max_size=5), max_size=5)
"""What some proposers think comes next: tokens, each with the chance that it is reached."""


def merged(chains):
    """The candidates of some chains."""
    found = Candidates()
    for one in chains:
        found.add_chain(*zip(*one, strict=True) if one else ((), ()))
    return found


def paths(tokens, parents):
    """The text that each node stands for."""
    return [tuple(tokens[ancestor] for ancestor in ancestors) for ancestors in walked(parents)]


def walked(parents):
    """Each node's ancestors and itself, by walking up from it."""
    found = []
    for node in range(len(parents)):
        up = [node]
        while parents[up[-1]] != ROOT:
            up.append(parents[up[-1]])
        found.append(up[::-1])
    return found


@given(CHAINS)
def test_merging_against_brute_force(chains):
    """Catches a prefix that has two nodes, a chance that is lost or added up, and one that exceeds its parent's."""
    reach = {}
    for one in chains:
        for length in range(1, len(one) + 1):
            prefix, chance = tuple(token for token, _ in one[:length]), one[length - 1][1]
            chance = min(chance, reach.get(prefix[:-1], 1.0))
            reach[prefix] = max(chance, reach.get(prefix, 0.0))
    found = merged(chains)
    assert dict(zip(paths(found.tokens, found.parents), found.reach, strict=True)) == reach
    assert len(found.tokens) == len(found.parents) == len(found.reach) == len(reach)
    assert all(found.reach[node] <= found.reach[parent] for node, parent in enumerate(found.parents) if parent != ROOT)


@given(CHAINS, st.integers(0, 3))
def test_the_best_chain_against_brute_force(chains, forced):
    """Catches a chain of which the row accepts fewer tokens than of another, and one that leaves what is forced."""
    found = merged(chains)
    first = list(range(min(forced, len(chains[0]) if chains else 0)))
    best = found.best_chain(first)
    assert best[: len(first)] == first
    assert [found.parents[node] for node in best] == [ROOT, *best[:-1]][: len(best)]
    worth = [sum(found.reach[one] for one in up) for up in walked(found.parents) if up[: len(first)] == first]
    assert sum(found.reach[node] for node in best) == pytest.approx(max(worth, default=0.0))


@given(CHAINS)
def test_the_likeliest_nodes_are_a_tree(chains):
    """Catches a node that is ranked before its parent, and one that is ranked before a likelier one."""
    found = merged(chains)
    ranked = found.ranked()
    assert sorted(ranked) == list(range(len(found.tokens)))
    assert [found.reach[node] for node in ranked] == sorted(found.reach, reverse=True)
    for place, node in enumerate(ranked):
        assert found.parents[node] == ROOT or found.parents[node] in ranked[:place]


@given(CHAINS, st.integers(0, 20), st.booleans())
def test_what_is_laid_out(chains, count, forced):
    """Catches nodes that are lost or stand before their parents, and a drafted chain that does not come first."""
    found = merged(chains)
    first = list(range(len(chains[0]))) if forced and chains else []
    chosen = [*first, *(node for node in found.ranked() if node not in first)][: max(count, len(first))]
    tokens, parents = found.arranged(chosen, first)
    assert all(parent < node for node, parent in enumerate(parents))
    expected = paths(found.tokens, found.parents)
    assert sorted(paths(tokens, parents)) == sorted(expected[node] for node in chosen)
    assert parents[: len(first)] == chain(len(first))
    assert tokens[: len(first)] == [token for token, _ in chains[0]] if first else True


@given(CHAINS)
def test_the_likeliest_path_comes_first(chains):
    """Catches a layout in which what is mostly accepted has to be moved in the cache."""
    found, last, likeliest = merged(chains), ROOT, []
    while children := [node for node, parent in enumerate(found.parents) if parent == last]:
        last = max(children, key=lambda node: (found.reach[node], -node))
        likeliest.append(last)
    tokens, parents = found.arranged(found.ranked())
    assert tokens[: len(likeliest)] == [found.tokens[node] for node in likeliest]
    assert parents[: len(likeliest)] == chain(len(likeliest))


@given(st.data())
def test_who_sees_whom(data):
    """Catches nodes that see their siblings, or not their own text, and wrong depths."""
    batch, nodes, text = (data.draw(st.integers(*ends)) for ends in ((1, 3), (0, 7), (0, 3)))
    parents = [data.draw(trees(nodes)) for _ in range(batch)]
    seen = visible(parents, text + nodes)
    assert seen.shape == (batch, text + nodes, text + nodes)
    for row, one in enumerate(parents):
        assert lineage(one) == walked(one)
        assert depths(one) == [len(ancestors) for ancestors in walked(one)]
        for token in range(text + nodes):
            behind = {text + ancestor for ancestor in walked(one)[token - text]} if token >= text else {token}
            expected = set(range(min(token, text))) | behind
            assert set(seen[row, token].nonzero().flatten().tolist()) == expected


# In the cache.


@torch.no_grad()
def plain(model, text):
    """Logits and states behind every token of one text, from one forward."""
    output, states = StateTap.of(model, LAYERS).read(partial(model, text[None]))
    return output.logits[0].float(), states[0]


class Fed:
    """A decoder in the middle of some rows, and what it should give."""

    def __init__(self, data, kind):
        self.model, self.draw = MODELS[kind], data.draw
        self.batch = self.draw(st.integers(1, 3))
        self.padding = self.draw(st.lists(st.integers(0, 3), min_size=self.batch, max_size=self.batch))
        self.ends = [pad + self.draw(st.integers(1, 5)) for pad in self.padding]
        self.width = max(self.ends) + 16
        generator = torch.Generator().manual_seed(self.draw(st.integers(0, 99)))
        self.ids = torch.randint(0, VOCAB, (self.batch, self.width), generator=generator)
        self.states = TargetStates(self.model, LAYERS, self.padding, self.width)
        options = {"states": self.states, "own_masks": kind in WINDOWED}
        self.decoder = RaggedDecoder(self.model, self.padding, self.width, **options)

    def text(self, row):
        return self.ids[row, self.padding[row] : self.ends[row]]

    @torch.no_grad()
    def feed_some(self):
        """Read some of the text, all but one token at most."""
        cached = [self.draw(st.integers(pad, end - 1)) for pad, end in zip(self.padding, self.ends, strict=True)]
        if all(end > pad for end, pad in zip(cached, self.padding, strict=True)):
            self.decoder.feed(self.ids, cached, 1)

    @torch.no_grad()
    def feed_tree(self, nodes):
        """Read a tree behind every row, and keep a path of it."""
        parents = [self.draw(trees(nodes)) for _ in range(self.batch)]
        logits = self.decoder.feed(self.ids, [end + nodes for end in self.ends], nodes + 1, parents)
        kept = []
        for row, end in enumerate(self.ends):
            walks = [[], *walked(parents[row])]
            tokens = self.ids[row, end : end + nodes]
            for place, walk in enumerate(walks):
                expected, _ = plain(self.model, torch.cat([self.text(row), tokens[walk]]))
                torch.testing.assert_close(logits[row, place], expected[-1], atol=1e-5, rtol=1e-5)
            kept.append(self.draw(st.sampled_from(walks)))
        self.decoder.select(self.ends, kept)
        for row, (end, walk) in enumerate(zip(self.ends, kept, strict=True)):
            self.ids[row, end : end + nodes] = torch.cat(
                [self.ids[row, end : end + nodes][walk], -torch.ones(nodes - len(walk)).long() % VOCAB]
            )
            self.ends[row] += len(walk)
        self.decoder.rollback(self.ends)
        self.check_states()

    def check_states(self):
        for row, end in enumerate(self.ends):
            _, expected = plain(self.model, self.text(row))
            torch.testing.assert_close(self.states.of(row, end), expected, atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def feed_on(self):
        """A correction behind every row, as after every round; what it sees is the kept path."""
        self.ends = [end + 1 for end in self.ends]
        logits = self.decoder.feed(self.ids, self.ends, 1)
        for row in range(self.batch):
            expected, _ = plain(self.model, self.text(row))
            torch.testing.assert_close(logits[row, 0], expected[-1], atol=1e-5, rtol=1e-5)
        self.check_states()


@pytest.mark.parametrize("kind", MODELS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_trees_of_any_shape_in_ragged_batches(kind, data):
    """
    Catches nodes at wrong positions, nodes that see each other, a path that is kept in the wrong place, and windows
    that are counted in slots or in another row's positions.
    """
    fed = Fed(data, kind)
    fed.feed_some()
    for _ in range(data.draw(st.integers(1, 2))):
        fed.feed_tree(data.draw(st.integers(1, 6)))
        fed.feed_on()


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_a_tree_of_one_row_is_staged_as_any_rows_are(kind, data):
    """Catches a shortcut for one row that reads other tokens, or at other positions, than the general way."""
    nodes, text, cached = (data.draw(st.integers(*ends)) for ends in ((1, 6), (1, 4), (0, 3)))
    cached, parents = min(cached, text - 1), [data.draw(trees(nodes))]
    ids = torch.randint(0, VOCAB, (1, text + nodes), generator=torch.Generator().manual_seed(nodes))
    calls = []
    for general in (False, True):
        decoder = RaggedDecoder(MODELS[kind], [0], text + nodes, own_masks=kind in WINDOWED)
        call = decoder._call
        decoder._call = lambda *given, call=call: calls.append(given) or call(*given)
        if general:
            decoder._is_inside = lambda *_: False
        with torch.no_grad():
            if cached:
                decoder.feed(ids, [cached], 1)
            decoder.feed(ids, [text + nodes], nodes + 1, parents)
    for shortcut, plainly in zip(calls[len(calls) // 2 - 1][:3], calls[-1][:3], strict=True):
        assert torch.equal(shortcut, plainly)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_every_query_sees_something(kind, data):
    """Catches padding that sees nothing at all: softmax over nothing is nan, and nan spreads wherever rows meet."""
    fed, masks = Fed(data, kind), []
    call = fed.decoder._call
    fed.decoder._call = lambda *given: masks.append(given[2]) or call(*given)
    nodes = data.draw(st.integers(1, 6))
    fed.feed_tree(nodes)
    assert all(bool(mask.any(-1).all()) for mask in masks if mask is not None)


def test_states_move_as_keys_do():
    """Catches states that are read after another one was moved over them, and rows mixed up."""
    states = TargetStates(MODELS["llama"], LAYERS, [0, 1], 6)
    states.write(torch.arange(12.0).view(2, 6, 1), [6, 6])
    states.move([0, 0, 1], [2, 3, 5], [1, 2, 1])
    assert states.of(0, 6).flatten().tolist() == [0, 2, 3, 3, 4, 5]
    assert states.of(1, 6).flatten().tolist() == [11, 8, 9, 10, 11]
