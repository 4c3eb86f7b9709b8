"""The token buffer: where rows end, what is padding, what may be streamed."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.serving.sequences import Sequences


def make(batch=2, eos=(), limit=9, slack=3):
    return Sequences(torch.full((batch, 4), 5), [0] * batch, limit, slack, 0, eos)


def commit(sequences, *rows):
    sequences.propose(torch.tensor([[*row, 0, 0, 0][:3] for row in rows]))
    return sequences.commit(rows)


def test_commit_stops_at_eos_and_limit():
    """Catches tokens behind eos or beyond the limit, and finished rows that take more."""
    sequences = make(eos=(2,))
    assert commit(sequences, [7, 2, 8], [7, 8, 9]) == [2, 3]
    assert sequences.stops == [6, None]
    assert commit(sequences, [1, 1, 1], [7, 8, 9]) == [0, 2]
    assert sequences.finished
    assert sequences.padded(9).tolist() == [[5, 5, 5, 5, 7, 2, 0, 0, 0], [5, 5, 5, 5, 7, 8, 9, 7, 8]]


def test_without_eos_stopped_rows_run_on():
    """Catches a difference to transformers: without eos, rows go on until the last one has stopped."""
    sequences = make()
    commit(sequences, [6, 6], [6, 6])
    sequences.stop(0, 5)
    sequences.settle()
    assert sequences.is_active(0)
    assert sequences.limit == 9
    commit(sequences, [6, 6], [6])
    sequences.stop(1, 7)
    sequences.settle()
    assert sequences.limit == 7
    assert sequences.ends == [7, 7]
    assert sequences.finished


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=6))
def test_streamed_columns_are_the_output(steps):
    """Catches columns streamed before the slowest row has reached them, or streamed twice."""
    sequences = make(limit=12)
    streamed = []
    for counts in steps:
        commit(sequences, *[[6 + index for index in range(count)] for count in counts])
        streamed += [column.tolist() for column in sequences.finished_columns(4 + len(streamed))]
        assert len(streamed) == min(sequences.ends) - 4
    assert streamed == sequences.padded(min(sequences.ends))[:, 4:].T.tolist()
