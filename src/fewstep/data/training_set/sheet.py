"""Contact sheets: all images of a set, small and numbered, a page at a time."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

TILE, COLUMNS, ROWS, LABEL = 160, 8, 8, 14


class ContactSheet:
    """Writes ``sheet-01.jpg``, ``sheet-02.jpg``, ... into a folder; one page is in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pages: list[Path] = []
        self._canvas: Image.Image | None = None
        self._count = 0

    def add(self, tile: Image.Image, label: str) -> None:
        """Add an image of at most ``TILE`` pixels of a side."""
        if self._canvas is None:
            self._canvas = Image.new("RGB", (COLUMNS * TILE, ROWS * (TILE + LABEL)), "white")
        row, column = divmod(self._count, COLUMNS)
        left, top = column * TILE, row * (TILE + LABEL)
        self._canvas.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        ImageDraw.Draw(self._canvas).text((left + 4, top + TILE), label, fill="black")
        self._count += 1
        if self._count == COLUMNS * ROWS:
            self.close()

    def close(self) -> None:
        """Write the last page."""
        if self._canvas is None:
            return
        rows = -(-self._count // COLUMNS)
        page = self.folder / f"sheet-{len(self.pages) + 1:02d}.jpg"
        self._canvas.crop((0, 0, self._canvas.width, rows * (TILE + LABEL))).save(page, quality=88)
        self.pages.append(page)
        self._canvas, self._count = None, 0
