"""The text of a document that has a title: one rule for training, encoding, mining, indexing and evaluation."""


def titled(title: str | None, text: str) -> str:
    """Title and text joined by one space, as BEIR and mteb join them; the text itself where there is no title."""
    return f"{title} {text}".strip() if title else text
