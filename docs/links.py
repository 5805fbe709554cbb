"""A hook of the documentation site: links of notebooks to pages, which GitHub follows as they are."""

import re
from typing import Any


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Return the page with the site's addresses instead of `../PAGE.md`."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(r'href="\.\./([\w/]+)\.md(#[\w-]*)?"', r'href="../../\1/\2"', html)
