"""spa methods: methods and criteria by name."""

from __future__ import annotations

from spa.cli import output
from spa.cli.options import Json


def methods(json: Json = False) -> None:
    """List the methods and criteria that `spa prune` knows, each with its source."""
    from spa.criteria import CRITERIA
    from spa.methods import METHODS

    if json:
        output.emit(
            {
                "methods": [
                    m.settings() | {"text": m.text, "needs_data": bool(m.needs_data)} for m in METHODS.values()
                ],
                "criteria": [{"name": c.name, "text": c.text, "needs": c.needs} for c in CRITERIA.values()],
            }
        )
        return
    screen = output.console()
    rows: list[tuple[str, ...]] = [
        (name, m.criterion, m.allocation, m.compensate, "data" if m.needs_data else "-", m.text)
        for name, m in METHODS.items()
    ]
    rows.append(("auto", "", "", "", "data", "the one of several that does best on samples held out"))
    screen.print(output.table(("method", "criterion", "widths", "compensates", "needs", "what it is"), rows))
    screen.print()
    found = [(c.name, "-" if c.needs == "weights" else c.needs, c.text) for c in CRITERIA.values()]
    screen.print(output.table(("criterion", "needs", "what it is"), found))
