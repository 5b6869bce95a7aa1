"""Every rule obeys the law, and frees what it should."""

from __future__ import annotations

from collections import Counter

import pytest

from spa import rules
from tests.cases import attention, choice, control, elementwise, linear, movement, norm, quant, recurrent, reduce
from tests.law import Law
from tests.subject import Case

FAMILIES = (elementwise, linear, norm, reduce, movement, recurrent, attention, quant, control, choice)
CASES: list[Case] = [c for family in FAMILIES for c in family.CASES]


@pytest.mark.parametrize("spec", CASES, ids=str)
def test_rule_obeys_the_law(spec: Case) -> None:
    law = Law(spec.subject, spec.engine)
    assert law.free() == spec.free
    removals = law.check(seeds=3)
    assert removals or not law.buckets() or len(law.buckets()[0]) < 2


def test_every_rule_has_a_case() -> None:
    tested = {(c.domain, c.operator) for c in CASES}
    missing = [f"{domain}::{op}" if domain else op for domain, op in rules.table() if (domain, op) not in tested]
    assert not missing, f"operators with a rule but without a case: {', '.join(missing)}"


def test_every_rule_version_has_a_case() -> None:
    tested = {
        (c.domain, c.operator, id(rules.lookup(c.domain, c.operator, c.opset if not c.domain else 1))) for c in CASES
    }
    missing = [
        f"{op} since {since}"
        for (domain, op), versions in rules.table().items()
        for since, rule in versions
        if (domain, op, id(rule)) not in tested
    ]
    assert not missing, f"rules without a case: {', '.join(missing)}"


def test_cases_are_distinct() -> None:
    assert [name for name, count in Counter(map(str, CASES)).items() if count > 1] == []


def test_cases_run_where_users_run_them() -> None:
    """Only kernels that ONNX Runtime lacks on CPU go through ONNX's own interpreter."""
    elsewhere = {c.operator for c in CASES if c.engine == "reference"}
    assert elsewhere <= {
        "BiasAdd",
        "FusedGemm",
        "GemmFastGelu",
        "LSTM",
        "GRU",
        "RNN",
        "ReduceSum",
        "CumProd",
        "ReduceLogSumExp",
    }
