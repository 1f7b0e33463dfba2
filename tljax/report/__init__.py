"""What a run tells: figures, tables, pictures, one page."""

from tljax.report import console, metrics, page, pictures, table
from tljax.report.page import html

__all__ = ["console", "html", "metrics", "page", "pictures", "table"]
