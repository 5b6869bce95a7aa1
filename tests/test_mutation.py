"""The law is itself tested: rules broken on purpose must be caught."""

from __future__ import annotations

import pytest

from spa import rules
from spa.rules import Rule
from tests.equivalents import EQUIVALENT
from tests.mutants import run
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
    outcome = run(rule, cases, lambda name: any(known in name for known in EQUIVALENT.get(names.split()[0], {})))
    print(
        f"{names[:40]:40} killed {outcome.killed:4} (law {outcome.law}, expectation {outcome.expectation}, "
        f"crash {outcome.crash}), say the same {outcome.unchanged}"
    )
    assert not outcome.survivors


if __name__ == "__main__":
    for names, rule, cases in RULES:
        outcome = run(rule, cases, lambda name, first=names.split()[0]: name in EQUIVALENT.get(first, {}))
        print(f"{names[:40]:40}", outcome.law, outcome.expectation, outcome.crash, outcome.unchanged, flush=True)
        for survivor in outcome.survivors:
            print("    SURVIVED", survivor, flush=True)
