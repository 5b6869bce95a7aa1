"""From scores and targets to the units that leave."""

from __future__ import annotations

from spa.budget.select import Selection, select
from spa.budget.targets import Goal, Target, parse_request, parse_target, parse_targets

__all__ = ["Goal", "Selection", "Target", "parse_request", "parse_target", "parse_targets", "select"]
