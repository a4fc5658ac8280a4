"""Records to figures. The only place that imports matplotlib."""

from robust_peft.plots.charts import plot_accuracies, plot_bars, plot_curve, plot_lines, plot_panels, plot_scatter
from robust_peft.plots.fronts import Point, plot_front
from robust_peft.plots.seed_fronts import SeedPoint, plot_seed_fronts

__all__ = [
    "Point",
    "SeedPoint",
    "plot_accuracies",
    "plot_bars",
    "plot_curve",
    "plot_front",
    "plot_lines",
    "plot_panels",
    "plot_scatter",
    "plot_seed_fronts",
]
