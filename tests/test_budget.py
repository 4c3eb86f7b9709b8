"""The budget of a draft: learning takes no more time than serving has earned for it."""

from hf_osd.budget import Budget


def test_updates_wait_until_they_are_earned() -> None:
    """Catches learning that costs more than its share, and one that never begins again."""
    of = Budget(0.1)
    assert not of.allows_training()
    spent = 0.0
    for served in range(1, 1001):
        of.earn(1.0)
        if of.allows_training():
            of.spend(1.5)
            spent += 1.5
        assert spent <= 0.1 * served + 1.5
    assert spent >= 0.1 * 1000 - 1.5


def test_less_eagerness_earns_less() -> None:
    """Catches a share that is cut for training alone, or for all that was earned before."""
    of = Budget(0.1)
    of.earn(10.0)
    of.spend(1.0)
    of.earn(79.0, eagerness=0.125)
    of.spend(0.98, scoring=0.98)
    of.spend(0.0, scoring=0.02)
    assert of.allows_training()
    assert not of.allows_scoring()
    of.spend(0.1)
    assert not of.allows_training()


def test_little_time_is_saved_up() -> None:
    """Catches learning that goes on as before where nothing is gained, from what better times have left over."""
    of = Budget(0.1)
    for _ in range(100):
        of.earn(1.0)
    of.spend(0.5)
    assert not of.allows_training()
    of.earn(4.0)
    assert of.allows_training()


def test_an_update_takes_no_longer_than_the_request_that_waits() -> None:
    """Catches a request that takes many times as long as its neighbours."""
    of = Budget(0.1)
    of.earn(2.0)
    assert not of.is_used_up(1.9)
    assert of.is_used_up(2.0)


def test_training_takes_half() -> None:
    """Catches scoring that leaves no time for training, and scoring that stops while an update is paid back."""
    of = Budget(0.1)
    scored = 0
    for _ in range(1000):
        of.earn(1.0)
        if of.allows_scoring():
            of.spend(0.2, scoring=0.2)
            scored += 1
        if of.allows_training():
            of.spend(1.5)
    assert 200 <= scored <= 251  # half of a tenth of 1,000 seconds, at 0.2 each


def test_without_a_limit_time_does_not_matter() -> None:
    """Catches inline results that depend on the clock although nobody asked for a limit."""
    of = Budget()
    of.spend(1e9, scoring=1e9)
    of.earn(1.0)
    assert of.allows_training()
    assert of.allows_scoring()
    assert not of.is_used_up(1e9)


def test_a_request_without_time_changes_nothing() -> None:
    """Catches a mixed batch in which a draft's rows got no token, and that takes the time which it had saved."""
    budget = Budget(learning_share=0.5)
    budget.earn(4.0)
    budget.earn(0.0)
    assert budget.allows_training()
    assert not budget.is_used_up(3.0)
