"""docs/quality.md: a ladder as a document."""

from collections.abc import Iterable, Sequence

from .ladder import Ladder, Row
from .report import HEADINGS, Tables, cells

_READING = """\
- **KL** is how far a checkpoint's predictions are from the source's: the Kullback-Leibler
  divergence between their distributions over the next token, in nats, the mean over all tokens of
  the text; ± is its standard error over tokens. 0 means equal.
- **Top-1** is the share of tokens for which both find the same next token likeliest.
- **Perplexity** is on the text itself. It hardly moves between good recipes, and may by chance be
  below the source's: compare recipes by KL.
- **Size** counts the tensors that the model uses; **bits/weight** is that over all parameters.
- The values are of this model and this text. `ds4 plan` has the sizes of DeepSeek-V4-Flash.
"""


def write(ladder: Ladder, tables: Tables, command: str, about: Sequence[str]) -> str:
    """The document. `about` are lines on the texts and the machine."""
    windows, top = ladder.windows, tables.top.score
    parts = [
        "# Quality of the recipes",
        f"Made by `{command}`; do not edit. Every figure below is measured, none is copied.",
        "\n".join(f"- {line}" for line in about),
        f"The source, {ladder.source.name}, has a perplexity of {top.perplexity:.3f} "
        f"({top.bits_per_byte:.4f} bits per byte) on these {windows.tokens:,} tokens "
        f"({windows.nbytes:,} bytes), in {len(windows.ids)} windows.",
        "## How to read this",
        _READING.rstrip(),
        "## Recipes",
        "As `ds4 quantize SRC DST --recipe R --calibrate FILE` makes them.",
        _table([tables.top, *tables.recipes]),
        "## Ways to find codes",
        "`rtn` rounds to the nearest code of the full range, `ls` searches the scale and bias of "
        "least squared error, `+ calibration` weighs each input's error by what a text showed, "
        "`gptq` makes each input's rounding error good by the inputs after it.",
        _table(tables.methods),
        "## Fewer experts",
        "A quarter of the experts of each layer dropped, the others as shipped (q8_0). REAP keeps "
        "those whose output, times the router's weight, has the largest mean norm on the "
        "calibration text (`ds4 quantize SRC DST --recipe q8_0 --experts N --calibrate FILE`); "
        "frequency keeps those that were used most.",
        _table(tables.prunings),
        "## What the figures show",
        "\n".join(f"- {finding}" for finding in tables.findings()),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Iterable[Row]) -> str:
    lines = [HEADINGS, ["---"] * 2 + ["---:"] * (len(HEADINGS) - 2), *(cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
