"""The text that is there wherever Python is: the language reference that comes with CPython."""

import importlib.util


def default_text() -> str | None:
    """Half a megabyte of English and code; None where this Python comes without."""
    if importlib.util.find_spec("pydoc_data.topics") is None:
        return None
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())
