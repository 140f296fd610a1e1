"""Seasons are data: every rule has a source, overriding is by name and shows."""

import dataclasses

import pytest

from pertcast.errors import ConfigError
from pertcast.seasons import SEASONS, season


@pytest.mark.parametrize("name", SEASONS)
def test_every_limit_of_a_season_names_its_source(name: str) -> None:
    rules = SEASONS[name]
    limits = {"num_genes", "max_cells", "controls", "members", "num_targets"}
    limits |= {
        rule for rule in ("max_cell_sum", "max_stored_values", "cells_per_target", "max_log1p") if getattr(rules, rule)
    }
    assert limits <= set(rules.sources)


def test_a_season_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SEASONS["vcc2025"].num_genes = 7  # type: ignore[misc]


def test_an_override_is_kept_beside_the_seasons_own_value() -> None:
    small = season("vcc2025", {"num_genes": 1000})
    assert small.num_genes == 1000
    assert small.describe_overrides() == ["rule num_genes overridden: 1000 (season vcc2025: 18080)"]
    assert SEASONS["vcc2025"].num_genes == 18_080


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"num_gene": 10}, "did you mean 'num_genes'"),
        ({"num_genes": "many"}, "expected int"),
        ({"num_genes": True}, "expected int"),
        ({"num_genes": 0}, "at least 1"),
        ({"controls": "maybe"}, "'required' or 'forbidden'"),
        ({"members": "a"}, "no such rule"),
        ({"contexts": "A,B"}, "the season has one context"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(rules: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        season("vcc2025", rules)


@pytest.mark.parametrize("names", ["", "A,,B", "A,B,A", ","])
def test_contexts_are_different_names(names: str) -> None:
    with pytest.raises(ConfigError, match="different names"):
        season("vcc2026", {"contexts": names})


def test_contexts_are_data() -> None:
    rules = season("vcc2026", {"contexts": "D, E"})
    assert rules.contexts == (("D", "E"),)
    assert rules.describe_overrides() == ["rule contexts overridden: D,E (season vcc2026: A,B,C or D,E,F)"]


def test_all_wrong_overrides_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        season("vcc2025", {"num_gene": 10, "max_cells": "x"})
    assert len(caught.value.problems) == 2


def test_an_unknown_season_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="vcc2025, vcc2026"):
        season("vcc2024")
