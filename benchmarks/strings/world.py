"""The world of strings: which strings there are, what prompts say, how a string looks, and what a picture says.

A prompt is `write "CAT"`. Its picture shows the letters in reading order on a 3x3 grid of cells, from the top left cell
on; the cells after the last letter are blank. N = 9 cells, P = 64 pixels a cell.

`python -m benchmarks.strings.world` prints the prompt file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.embedded.scenes import CELL, GRID, IMAGE_SIZE

Split = Literal["train", "held_out"]

FONT: dict[str, tuple[str, ...]] = {
    "A": (".###.", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "C": (".####", "#....", "#....", "#....", "#....", "#....", ".####"),
    "E": ("#####", "#....", "#....", "####.", "#....", "#....", "#####"),
    "H": ("#...#", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "I": ("#####", "..#..", "..#..", "..#..", "..#..", "..#..", "#####"),
    "K": ("#...#", "#..#.", "#.#..", "##...", "#.#..", "#..#.", "#...#"),
    "L": ("#....", "#....", "#....", "#....", "#....", "#....", "#####"),
    "M": ("#...#", "##.##", "#.#.#", "#.#.#", "#...#", "#...#", "#...#"),
    "N": ("#...#", "##..#", "##..#", "#.#.#", "#..##", "#..##", "#...#"),
    "O": (".###.", "#...#", "#...#", "#...#", "#...#", "#...#", ".###."),
    "P": ("####.", "#...#", "#...#", "####.", "#....", "#....", "#...."),
    "S": (".####", "#....", "#....", ".###.", "....#", "....#", "####."),
    "T": ("#####", "..#..", "..#..", "..#..", "..#..", "..#..", "..#.."),
    "X": ("#...#", "#...#", ".#.#.", "..#..", ".#.#.", "#...#", "#...#"),
}
"""Letter -> 7 rows of 5 pixels. W is missing on purpose: no string may contain a piece of the word "write"."""
ALPHABET = "".join(FONT)
BLANK, UNREADABLE = " ", "?"
LENGTHS: tuple[int, ...] = (3, 4, 5, 6)
"""Letters of the strings that prompts ask for."""
PER_LENGTH: dict[Split, int] = {"held_out": 32, "train": 96}
CELLS = GRID * GRID
GROUND: tuple[int, int, int] = (22, 24, 38)
INK: tuple[int, int, int] = (240, 240, 230)
LEFT = 1
"""Pixels between a cell's left edge and its letter, which stands at the cell's top: three columns and one row stay free."""
READABLE = 0.3
"""Distance of a cell from its nearest glyph, as root mean square over pixels in units of ink minus ground, up to which the
cell is read. Two glyphs are at least 0.25 apart, so that a cell halfway between two is still read, a smear is not."""


@dataclass(frozen=True)
class StringPrompt:
    """A prompt of this world: its text, and the string that it asks for."""

    text: str
    string: str


def text(string: str) -> str:
    """What a prompt says."""
    return f'write "{string}"'


def vocabulary() -> list[str]:
    """The words of prompts that are one token each; strings are spelled, letter by letter."""
    return ["write", '"']


@cache
def _strings(length: int) -> tuple[str, ...]:
    """Distinct random strings of one length, enough for both splits; the first are held out."""
    rng = np.random.default_rng(length)
    found: dict[str, None] = {}
    while len(found) < sum(PER_LENGTH.values()):
        found[random_string(length, rng)] = None
    return tuple(found)


def prompts(split: Split) -> list[StringPrompt]:
    """The prompts of a split, equally many of each length. Deterministic; the splits share no string."""
    cut = PER_LENGTH["held_out"]
    parts = {"held_out": slice(cut), "train": slice(cut, None)}
    if split not in parts:
        raise ValueError(f"unknown split {split!r}; known: {list(PER_LENGTH)}")
    return [StringPrompt(text(s), s) for length in LENGTHS for s in _strings(length)[parts[split]]]


def prompt_file() -> str:
    """The prompt file: one JSON object a line."""
    splits: tuple[Split, ...] = ("train", "held_out")
    lines = [{"text": p.text, "metadata": {"string": p.string}, "split": split} for split in splits for p in prompts(split)]
    return "".join(json.dumps(line) + "\n" for line in lines)


def random_string(length: int, rng: np.random.Generator) -> str:
    """Letters drawn independently."""
    return "".join(ALPHABET[i] for i in rng.integers(len(ALPHABET), size=length))


@cache
def glyphs() -> NDArray[np.uint8]:
    """The cell of every letter of ALPHABET, then the blank one: (letters + 1, CELL, CELL, 3) uint8. Shared: do not write."""
    cells = np.empty((len(ALPHABET) + 1, CELL, CELL, 3), np.uint8)
    cells[:] = GROUND
    for cell, rows in zip(cells, FONT.values(), strict=False):
        mask = np.array([[pixel == "#" for pixel in row] for row in rows])
        cell[: mask.shape[0], LEFT : LEFT + mask.shape[1]][mask] = INK
    return cells


def render(strings: Sequence[str]) -> NDArray[np.uint8]:
    """Draw strings of at most N letters and blanks: (B, IMAGE_SIZE, IMAGE_SIZE, 3) uint8, RGB."""
    symbols = ALPHABET + BLANK
    index = np.array([[symbols.index(letter) for letter in s.ljust(CELLS, BLANK)] for s in strings]).reshape(-1, CELLS)
    cells: NDArray[np.uint8] = glyphs()[index].reshape(-1, GRID, GRID, CELL, CELL, 3)
    return cells.swapaxes(2, 3).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)


def read(images: NDArray[np.uint8]) -> list[str]:
    """What pictures (B, IMAGE_SIZE, IMAGE_SIZE, 3) uint8 say: the nearest glyph of each cell, without blanks at the end.

    A blank before a letter is read as a space; a cell that is far from every glyph as UNREADABLE.
    """
    cells = images.reshape(-1, GRID, CELL, GRID, CELL, 3).swapaxes(2, 3).reshape(len(images), CELLS, 1, -1)
    contrast = np.sqrt(np.square(np.subtract(INK, GROUND, dtype=np.float32)).mean())
    known = glyphs().reshape(len(glyphs()), -1).astype(np.float32)
    distances = np.sqrt(np.square(cells.astype(np.float32) - known).mean(-1)) / contrast
    symbols = np.array([*ALPHABET, BLANK])
    found = np.where(distances.min(-1) <= READABLE, symbols[distances.argmin(-1)], UNREADABLE)
    return ["".join(row).rstrip(BLANK) for row in found]


if __name__ == "__main__":
    print(prompt_file(), end="")
