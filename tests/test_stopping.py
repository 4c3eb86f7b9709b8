"""Stopping criteria asked after every token of a committed run."""

import torch
from transformers import MaxTimeCriteria

from hf_osd.serving.sequences import Sequences
from hf_osd.serving.stopping import StopCheck


def sequences_after(rows, eos=(2,)):
    sequences = Sequences(torch.full((len(rows), 3), 5), [0] * len(rows), 20, 4, 0, eos)
    sequences.propose(torch.tensor([[*row, 0, 0, 0, 0][:4] for row in rows]))
    return sequences, sequences.commit(rows)


def ends_in(token):
    lengths = []

    def criterion(ids, scores, **kwargs):
        lengths.append(ids.shape[1])
        return ids[:, -1] == token

    return criterion, lengths


def test_stops_inside_a_run():
    """Catches a criterion asked only about the last token of a run, and lengths asked about twice."""
    sequences, taken = sequences_after([[6, 7, 8, 9], [7, 6]])
    criterion, lengths = ends_in(7)
    assert StopCheck([criterion])(sequences, taken, None) == [2, 1]
    assert sequences.ends == [5, 4]
    assert lengths == sorted(set(lengths))
    assert sequences.finished


def test_nothing_to_ask():
    """Catches eos and length being enforced twice."""
    sequences, taken = sequences_after([[6, 7], [6]])
    assert StopCheck([])(sequences, taken, None) == [2, 1]
    assert not sequences.finished


def test_time_is_up():
    """Catches criteria that answer for all rows at once."""
    sequences, taken = sequences_after([[6, 7], [6]])
    assert StopCheck([MaxTimeCriteria(0.0)])(sequences, taken, None) == [1, 1]
    assert sequences.finished
