"""How the figures look."""

import matplotlib

matplotlib.use("Agg")

COLORS = {
    "steady_came": "#d55e00",
    "came": "#882255",
    "AdamW": "#0072b2",
}
# Dark text on white of its own: reads on a light page and on a dark one.
STYLE = {"font.size": 11, "svg.hashsalt": "came-optax"}
