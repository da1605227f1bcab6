"""Report pages: one layout and style for all of them, and self-contained HTML."""
