"""Keyed draws: equal keys give equal streams, any difference of a key another one."""

from hypothesis import given
from hypothesis import strategies as st

from pertcast.stats.draws import generator, key_hash

KEYS = st.lists(st.one_of(st.text(max_size=5), st.integers(-5, 5)), max_size=4)


@given(st.integers(0, 9), KEYS, st.integers(0, 9), KEYS)
def test_hashes_are_equal_exactly_when_seeds_and_keys_are(
    seed: int, key: list[str | int], other_seed: int, other_key: list[str | int]
) -> None:
    same = (seed, key) == (other_seed, other_key) and [type(k) for k in key] == [type(k) for k in other_key]
    assert (key_hash(seed, *key) == key_hash(other_seed, *other_key)) == same


def test_a_stream_does_not_depend_on_what_was_drawn_before() -> None:
    first = generator(3, "a").normal(size=5)
    generator(3, "b").normal(size=100)
    assert (generator(3, "a").normal(size=5) == first).all()


def test_the_streams_of_a_key_are_pinned() -> None:
    """Changing this changes every user's predictions: only with a new major version."""
    assert key_hash(0, "pin") == 214096846121021702521420487543900109522
    assert generator(0, "pin").integers(1000, size=3).tolist() == [961, 147, 395]
