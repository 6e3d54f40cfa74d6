"""Links of docs/ to files outside of it, which GitHub shows and the site has not: point them to the repository."""

from __future__ import annotations

import os
import re
from typing import Any

# Where the repository's files can be read, such as https://HOST/OWNER/echodistill/blob/main. Without it, the link's
# text stays, and the path in parentheses.
REPOSITORY = os.environ.get("DOCS_REPOSITORY", "").rstrip("/")
OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the links of one page."""
    replacement = rf"[\1]({REPOSITORY}/\2)" if REPOSITORY else r"\1 (`\2`)"
    return OUTSIDE.sub(replacement, markdown)
