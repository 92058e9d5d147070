"""Draw book/_static/social.png, the picture that a link to the book is shown with: python book/runs/social.py

1200 by 630 pixels, as those who show links ask for. The rings are those of _static/loops.svg.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).resolve().parents[1] / "_static" / "social.png"
RINGS = (  # name, colour, radius, where its mark stands in parts of a turn
    ("outer step", "#5b7fb5", 132, 0.10),
    ("CMS", "#4fa89e", 98, 0.31),
    ("chunk", "#2a8f83", 66, 0.58),
    ("token", "#e69f00", 34, 0.86),
)

fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor="#14181e")
ax = fig.add_axes((0.04, 0.08, 0.44, 0.84))
ax.set(xlim=(-150, 150), ylim=(-150, 150), aspect="equal")
ax.axis("off")
for name, colour, radius, turn in RINGS:
    ax.add_patch(plt.Circle((0, 0), radius, fill=False, color=colour, linewidth=7))
    point = complex(0, 1) * radius * 2.718281828459045 ** complex(0, -6.283185307179586 * turn)
    ax.plot(point.real, point.imag, "o", color=colour, markersize=22)
title = "Nested Learning,\nexecutable"
fig.text(0.5, 0.60, title, color="white", fontsize=40, weight="bold", va="center", linespacing=1.25)
says = "Memories inside memories, each with\na clock of its own: a book whose equations\nare checked by running them."
fig.text(0.5, 0.37, says, color="#c8d0da", fontsize=19, va="center", linespacing=1.4)
for i, (name, colour, *_) in enumerate(RINGS[::-1]):
    fig.text(0.5 + 0.105 * i, 0.15, name, color=colour, fontsize=18, weight="bold")
fig.savefig(OUT, facecolor=fig.get_facecolor())
