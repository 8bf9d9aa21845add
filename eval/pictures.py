"""Plots as files and as elements of a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from eval import page
from eval.files import write_atomic
from eval.page import Html
from eval.style import DARK, LIGHT, Theme


class Pictures:
    """Draws in both themes, keeps the files, returns the element. No picture where there is nothing to draw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, draw: Callable[[Theme], bytes | None], alt: str, caption: str) -> Html | None:
        light, dark = draw(LIGHT), draw(DARK)
        if light is None or dark is None:
            return None
        write_atomic(self.folder / f"{name}.png", light)
        write_atomic(self.folder / f"{name}-dark.png", dark)
        return page.picture(light, dark, alt, caption)
