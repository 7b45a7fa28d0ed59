"""Showing comparisons and reports: terminal, Markdown, HTML and PNG. Nothing here computes a result."""

from kvsim.rendering.gallery import write_gallery
from kvsim.rendering.markdown import comparison_markdown, quality_markdown

__all__ = ["comparison_markdown", "quality_markdown", "write_gallery"]
