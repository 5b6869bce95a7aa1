"""The law is itself tested: rules broken on purpose must be caught."""

from __future__ import annotations

import pytest

from spa import rules
from spa.rules import Rule
from tests.equivalents import EQUIVALENT
from tests.mutants import Outcome, run
from tests.subject import Case
from tests.test_law import CASES


def _grouped() -> list[tuple[str, Rule, list[Case]]]:
    """Every rule once, with the operators that share it and their cases."""
    found: dict[int, tuple[list[str], Rule, list[Case]]] = {}
    for spec in CASES:
        rule = rules.lookup(spec.domain, spec.operator, spec.opset if not spec.domain else 1)
        if rule is not None:
            names, _, cases = found.setdefault(id(rule), ([], rule, []))
            cases.append(spec)
            if spec.operator not in names:
                names.append(spec.operator)
    return [(" ".join(names), rule, cases) for names, rule, cases in found.values()]


RULES = _grouped()


@pytest.mark.parametrize(("names", "rule", "cases"), RULES, ids=[names[:60] for names, *_ in RULES])
def test_every_mutant_is_caught(names: str, rule: Rule, cases: list[Case]) -> None:
    outcome = run(rule, cases)
    print(line(names, outcome))
    assert set(outcome.survivors) == set(EQUIVALENT.get(names.split()[0], {}))


def test_equivalents_name_operators() -> None:
    assert set(EQUIVALENT) <= {names.split()[0] for names, *_ in RULES}


def line(names: str, outcome: Outcome) -> str:
    """A row of the kill table."""
    counts = (
        f"{outcome.law:5} {outcome.expectation:5} {outcome.crash:5} {len(outcome.survivors):5} {outcome.unchanged:5}"
    )
    return f"{names[:60]:60} {counts}"


if __name__ == "__main__":
    print(f"{'killed by':60}   law  free crash equiv  same")
    total = Outcome()
    for names, rule, cases in RULES:
        outcome = run(rule, cases)
        print(line(names, outcome), flush=True)
        total.add(outcome)
    print(line("all", total))
