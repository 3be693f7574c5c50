"""Plain paragraphs out of etexts."""

import re
import unicodedata

_PLAIN = str.maketrans(
    {
        "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...",
        "\u00a0": " ", "\ufeff": "", "\ufffd": "", "\t": " ", "æ": "ae", "œ": "oe", "Æ": "Ae",
    }
)  # fmt: skip


def clean(text: str) -> str:
    """Paragraphs divided by an empty line, each on one line unless it is verse; plain quotes."""
    text = unicodedata.normalize("NFC", text.translate(_PLAIN))
    text = re.sub(r"[\x00-\x09\x0b-\x1f]", "", text)
    text = re.sub(r"\[(Illustration|Footnote)[^\]]*\]", "", text)
    text = re.sub(r"(?<!\w)_+|_+(?!\w)", "", text)
    paragraphs = (_paragraph(block) for block in re.split(r"\n\s*\n", text))
    return "\n\n".join(p for p in paragraphs if _prose(p))


def _prose(paragraph: str) -> bool:
    """Not a table or a line of asterisks."""
    visible = re.sub(r"\s", "", paragraph)
    return sum(map(str.isalpha, visible)) > 0.6 * len(visible)


def _paragraph(block: str) -> str:
    lines = [re.sub(r" {2,}", " ", line).strip() for line in block.strip("\n").split("\n")]
    lines = [line for line in lines if line]
    verse = len(lines) > 1 and max(map(len, lines)) < 50
    return ("\n" if verse else " ").join(lines)
