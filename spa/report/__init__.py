"""Pages to look at: what a run did (`spa prune --report`), and what is coupled with what (`spa inspect --html`).

Each is one HTML file that loads nothing: style, script and pictures are inside.
"""

from spa.report.content import gather
from spa.report.data import Frontier, FrontierPoint, Page, Speed
from spa.report.drawing import chart
from spa.report.page import render

__all__ = ["Frontier", "FrontierPoint", "Page", "Speed", "chart", "gather", "render"]
