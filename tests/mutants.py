"""Rules broken on purpose: every mutant that changes what a rule says must break the law or an expectation.

A rule is data (notation) and calls of a few verbs (`freeze`, `same`, `edit` ...). Mutants lose one coupling, free what
is read as a whole, forget an edit, call a statistic a passing axis, promise zeros that are none, and so on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from spa.axes import Axes
from spa.rules import Op, Rule, Zero
from spa.rules.base import _RULES
from spa.rules.notation import Attr, Einsum, parse
from tests.law import Law, LawBroken
from tests.subject import Case

Text = tuple[str, tuple[tuple[str, str], ...], tuple[str, ...]]
"""A notation line as used: text, leavings, names with an attribute."""
Site = tuple[str, str, int]
"""A verb, and file and line where a rule calls it."""
_VERBS: dict[str, type] = {
    "freeze": Op,
    "edit": Op,
    "flow": Op,
    "choose": Op,
    "remap": Op,
    "pin": Op,
    "same": Axes,
    "cat": Axes,
    "take": Axes,
}
_SHARED = ("notation.py", "base.py", "axes.py")


@dataclass(frozen=True)
class Mutant:
    """One way to break a rule."""

    name: str
    verbs: frozenset[str] = frozenset()
    """Verbs that are never carried out."""
    site: Site | None = None
    """A call that is not carried out."""
    text: Text | None = None
    """The notation line to replace ..."""
    change: Callable[[Einsum, Op], Einsum] | None = None
    """... and how;"""
    loose: int | None = None
    """or the operand that it leaves out, counted through inputs and outputs."""
    apply: Callable[[Op], None] | None = None
    """The whole rule, replaced."""
    zero: Zero | None = None
    """The promise about zeros, replaced."""
    cases: frozenset[Case] | None = None
    """The cases that it can show in; all if None."""


@dataclass
class Outcome:
    """What became of the mutants of one rule."""

    law: int = 0
    expectation: int = 0
    crash: int = 0
    unchanged: int = 0
    """Mutants that say the same about every case."""
    survivors: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Sum up."""
        self.law += other.law
        self.expectation += other.expectation
        self.crash += other.crash
        self.unchanged += other.unchanged
        self.survivors += other.survivors


# -- carrying out ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _watched(mutant: Mutant | None, sites: set[Site], texts: dict[Text, None]) -> Iterator[None]:
    """Record the verbs and notation lines that rules use; leave out what the mutant leaves out."""
    saved: list[tuple[type, str, Any]] = []

    def wrap(owner: type, verb: str) -> None:
        original = getattr(owner, verb)
        saved.append((owner, verb, original))

        def call(self: Any, *args: Any, **options: Any) -> None:
            code = sys._getframe(1)
            file = os.path.basename(code.f_code.co_filename)
            site = (verb, file, code.f_lineno)
            inside = file in _SHARED
            if not inside:
                sites.add(site)
            if mutant is not None and (verb in mutant.verbs or (not inside and site == mutant.site)):
                axes = self if owner is Axes else self.axes
                for argument in args:
                    axes.mentioned.update(_axes(argument))
                return
            original(self, *args, **options)

        setattr(owner, verb, call)

    for verb, owner in _VERBS.items():
        wrap(owner, verb)
    bind = Einsum.bind
    saved.append((Einsum, "bind", bind))

    def bound(self: Einsum, op: Op) -> Any:
        text = _text(self)
        texts[text] = None
        if mutant is None or mutant.text != text:
            return bind(self, op)
        return bind(mutant.change(self, op) if mutant.change else self, _loosened(op, self, mutant.loose))

    Einsum.bind = bound  # type: ignore[method-assign]  # put back below
    try:
        yield
    finally:
        for owner, verb, original in saved:
            setattr(owner, verb, original)


def _loosened(op: Op, rule: Einsum, loose: int | None) -> Op:
    """The node with one operand that has nothing to do with the others."""
    if loose is None:
        return op
    inputs, outputs = list(op.inputs), list(op.outputs)
    split = len(parse(rule.text).inputs)
    side, k = (inputs, loose) if loose < split else (outputs, loose - split)
    operand = side[k] if k < len(side) else None
    if operand is not None:
        op.axes.mentioned.update(operand.dims)
        side[k] = dataclasses.replace(operand, dims=tuple(op.axes.leaf(size) for size in operand.shape))
    return Op(op.node, inputs, outputs, op.axes, op.relations, op.version, op.resolve)


def _axes(argument: Any) -> list[int]:
    if isinstance(argument, bool):
        return []
    if isinstance(argument, int):
        return [argument]
    return [a for a in argument if isinstance(a, int)] if isinstance(argument, list | tuple) else []


def _text(rule: Einsum) -> Text:
    attributes = tuple(n for n, a in rule.sizes.items() if isinstance(a, Attr))
    return rule.text, tuple(sorted(rule.leaving.items())), attributes


@contextlib.contextmanager
def _installed(rule: Rule, broken: Rule) -> Iterator[None]:
    """Put a broken rule into the registry."""
    places = [(entries, k) for entries in _RULES.values() for k, (_, found) in enumerate(entries) if found is rule]
    for entries, k in places:
        entries[k] = (entries[k][0], broken)
    try:
        yield
    finally:
        for entries, k in places:
            entries[k] = (entries[k][0], rule)


# -- making mutants --------------------------------------------------------------------------------------------------


def mutants(rule: Rule, cases: Sequence[Case]) -> list[Mutant]:
    """All mutants of a rule, as far as its cases show what it does."""
    sites: dict[Site, set[Case]] = {}
    texts: dict[Text, set[Case]] = {}
    for spec in cases:
        seen: tuple[set[Site], dict[Text, None]] = (set(), {})

        def recorded(op: Op, seen: tuple[set[Site], dict[Text, None]] = seen) -> None:
            with _watched(None, *seen):
                rule.apply(op)

        with _installed(rule, dataclasses.replace(rule, apply=recorded)):
            Law(spec.subject, spec.engine)
        for site in seen[0]:
            sites.setdefault(site, set()).add(spec)
        for text in seen[1]:
            texts.setdefault(text, set()).add(spec)
    out = [
        Mutant("everything passes", apply=_elementwise),
        Mutant("nothing is frozen", verbs=frozenset({"freeze"})),
        *(Mutant(f"no {verb}", verbs=frozenset({verb})) for verb in ("edit", "pin", "remap")),
    ]
    for (verb, file, line), where in sorted(sites.items(), key=lambda item: item[0]):
        out.append(Mutant(f"without {verb} at {file}:{line}", site=(verb, file, line), cases=frozenset(where)))
    for text, where in texts.items():
        out.extend(dataclasses.replace(mutant, cases=frozenset(where)) for mutant in _text_mutants(text))
    out.extend(Mutant(f"zero: {zero}", zero=zero) for zero in _promises(rule, cases))
    return out


def _elementwise(op: Op) -> None:
    Einsum(", ".join("..." for _ in op.inputs) + " -> " + ", ".join("..." for _ in op.outputs))(op)


def _promises(rule: Rule, cases: Sequence[Case]) -> list[Zero]:
    """Promises that go further than the rule's own: one operand is enough, or one less is needed."""
    slots = range(max(len(c.operands.split()) for c in cases))
    promises = [Zero(any_of=(k,)) for k in slots if k not in rule.divisors]
    if isinstance(rule.zero, Zero) and rule.zero.all_of and rule.zero.all_of != "all":
        promises.extend(
            dataclasses.replace(rule.zero, all_of=tuple(s for s in rule.zero.all_of if s != k))
            for k in rule.zero.all_of
        )
    if isinstance(rule.zero, Zero) and rule.zero.outputs:
        promises.append(dataclasses.replace(rule.zero, outputs=()))
    return [promise for promise in promises if promise != rule.zero]


Terms = list[list[tuple[str, ...] | str]]


def _text_mutants(text: Text) -> Iterator[Mutant]:
    """Lose a coupling, swap factors, free what is frozen, let a contracted index pass, forget an edit."""
    line, leavings, attributes = text
    notation = parse(line)
    split = len(notation.inputs)
    operands: Terms = [list(terms) for terms in (*notation.inputs, *notation.outputs)]
    names = [n for terms in operands for term in terms if not isinstance(term, str) for n in term]
    for k, terms in enumerate(operands):
        yield Mutant(f"{line}: operand {k} is not related", text=text, loose=k)
        for d, term in enumerate(terms):
            if term == "~":
                yield _rewritten(text, operands, split, [(k, d, "...")])
                continue
            if isinstance(term, str):
                continue
            for f, name in enumerate(term):
                if (name.isdigit() and name != "1") or (names.count(name) > 1 and not name.isdigit()):
                    yield _rewritten(text, operands, split, [(k, d, _with(term, f, "zz"))])
            if len(set(term)) > 1:
                yield _rewritten(text, operands, split, [(k, d, term[::-1])])
    whole = [(k, d, "...") for k, terms in enumerate(operands) for d, term in enumerate(terms) if term == "~"]
    if whole:
        yield _rewritten(text, operands, split, whole)
    for name, leaving in leavings:
        if leaving == "pass":
            continue
        yield _changed(text, f"{name} passes instead of {leaving}", leaving={n: v for n, v in leavings if n != name})
    outside = {n for terms in operands[split:] for term in terms if not isinstance(term, str) for n in term}
    for name in sorted(set(names) - outside):
        if not name.isdigit() and name not in dict(leavings):
            yield _changed(text, f"{name} passes instead of sum", leaving={**dict(leavings), name: "pass"})
    for name in attributes:

        def fixed(rule: Einsum, op: Op, name: str = name) -> Einsum:
            attr = rule.sizes[name]
            assert isinstance(attr, Attr)
            return dataclasses.replace(rule, sizes={**rule.sizes, name: op.attr(attr.name, attr.default)})

        yield Mutant(f"{line}: {name} is not written back", text=text, change=fixed)


def _with(term: tuple[str, ...], f: int, name: str) -> tuple[str, ...]:
    return (*term[:f], name, *term[f + 1 :])


def _changed(text: Text, what: str, **fields: Any) -> Mutant:
    return Mutant(f"{text[0]}: {what}", text=text, change=lambda rule, _: dataclasses.replace(rule, **fields))


def _rewritten(
    text: Text, operands: Terms, split: int, places: Sequence[tuple[int, int, tuple[str, ...] | str]]
) -> Mutant:
    changed = [list(terms) for terms in operands]
    for k, d, term in places:
        changed[k][d] = term
    sides = [", ".join(_operand(terms) for terms in side) for side in (changed[:split], changed[split:])]
    line = " -> ".join(sides)
    return Mutant(f"{text[0]} as {line}", text=text, change=lambda rule, _: dataclasses.replace(rule, text=line))


def _operand(terms: list[tuple[str, ...] | str]) -> str:
    return " ".join(t if isinstance(t, str) else t[0] if len(t) == 1 else f"({' '.join(t)})" for t in terms)


# -- killing ---------------------------------------------------------------------------------------------------------


def run(rule: Rule, cases: Sequence[Case]) -> Outcome:
    """Try to kill all mutants of a rule with its cases."""
    sound = [said(Law(spec.subject, spec.engine)) for spec in cases]
    outcome = Outcome()
    for mutant in mutants(rule, cases):
        how = _kill(rule, mutant, cases, sound)
        if how == "survived":
            outcome.survivors.append(mutant.name)
        else:
            setattr(outcome, how, getattr(outcome, how) + 1)
    return outcome


def _kill(rule: Rule, mutant: Mutant, cases: Sequence[Case], sound: Sequence[Any]) -> str:
    """How the mutant dies: law, expectation, crash; else `unchanged` or `survived`."""
    changed = False
    apply = mutant.apply or rule.apply

    def broken(op: Op) -> None:
        with _watched(mutant, set(), {}):
            apply(op)

    verdicts = []
    with _installed(rule, dataclasses.replace(rule, apply=broken, zero=mutant.zero or rule.zero)):
        for spec, before in zip(cases, sound, strict=True):
            if mutant.cases is not None and spec not in mutant.cases:
                continue
            try:
                law = Law(spec.subject, spec.engine)
                if said(law) == before if mutant.zero is None else not _promises_more(law, rule, mutant.zero):
                    continue
                changed = True
                law.check(seeds=2)
                if law.free() != spec.free:
                    verdicts.append("expectation")
            except LawBroken:
                return "law"
            except Exception:  # whatever a wrong rule leads to
                verdicts.append("crash")
    if verdicts:
        return min(verdicts)
    return "survived" if changed else "unchanged"


def _promises_more(law: Law, rule: Rule, zero: Zero) -> bool:
    """Whether some zero operand lets `zero` promise more than the rule does."""
    if not law.subject.single:
        return False
    op = law.op
    slots = [k for k, operand in enumerate(op.inputs) if operand is not None and operand.dims]
    choices: list[list[int]] = [*([k] for k in slots), [], slots]
    for choice in choices:
        claims = []
        for promise in (rule.zero, zero):
            known = {}
            for k in choice:
                operand, value = op.inputs[k], op.node.inputs[k]
                assert operand is not None
                assert value is not None
                known[value] = {
                    leaf for axis in operand.dims for leaf in law.solution.leaves(axis) if law.movable(leaf)
                }
            claims.append(law.promised(dataclasses.replace(rule, zero=promise), known))
        if any(claims[1].get(v, set()) - claims[0].get(v, set()) for v in claims[1]):
            return True
    return False


def said(law: Law) -> Any:
    """Everything the rules said about a model, in a form that can be compared."""
    coupling, solution = law.coupling, law.solution
    relations = coupling.relations
    number: dict[int, int] = {}

    def positions(axis: int) -> tuple[Any, ...]:
        out = []
        for leaf in solution.leaves(axis):
            span = slice(solution.base[leaf], solution.base[leaf + 1])
            for label, frozen in zip(solution.label[span].tolist(), solution.frozen[span].tolist(), strict=True):
                out.append(-1 if frozen else number.setdefault(label, len(number)))
        return tuple(out)

    operands = [o for op in coupling.ops for o in (*op.inputs, *op.outputs) if o is not None]
    return (
        [positions(axis) for operand in operands for axis in operand.dims],
        sorted(
            (f.leaving, f.inputs, f.outputs, positions(f.axis))
            for f in relations.flows
            if f.leaving != "pass" and any(p >= 0 for p in positions(f.axis))
        ),
        [
            (str(e.slot), e.entry, [positions(a) for a in (*e.axes, *e.watch)])
            for e in relations.edits
            if _moves(e.axes, positions)
        ],
        [(r.slot, positions(r.source), positions(r.target)) for r in relations.remaps],
        [(str(p.slot), p.value, positions(p.axis)) for p in relations.pins if _moves((p.axis,), positions)],
    )


def _moves(axes: Sequence[int], positions: Callable[[int], tuple[Any, ...]]) -> bool:
    return any(p >= 0 for axis in axes for p in positions(axis))
