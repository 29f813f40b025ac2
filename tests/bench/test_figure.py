"""Pictures that can be read: no label of an axis lies over the next."""

from __future__ import annotations

from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from taichi_serve.bench.figure import figure


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (0.00012, 0.00043), (0.0312, 0.0548), (6.0221, 6.0312), (999.5, 1000.5), (0.0, 1.2e7)],
)
def test_labels_below_a_panel_do_not_overlap(columns: int, low: float, high: float) -> None:
    made, panels = figure(columns)
    for panel in panels:
        panel.plot([low, high], [0.0, 1.0])
    FigureCanvasAgg(made).draw()
    for panel in panels:
        boxes = [label.get_window_extent() for label in panel.get_xticklabels() if label.get_text()]
        inside = [box for box in boxes if panel.bbox.x0 - 1 <= (box.x0 + box.x1) / 2 <= panel.bbox.x1 + 1]
        assert len(inside) >= 3
        assert all(one.x1 < two.x0 for one, two in pairwise(inside))
