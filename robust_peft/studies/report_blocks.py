"""What a report is made of, whatever it is written as: paragraphs, lists, tables, figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A file beside the report: what is shown, and its path relative to the report."""

    text: str
    path: str


Cell = str | tuple[Link, ...]


@dataclass(frozen=True)
class Paragraph:
    text: str
    lead: bool = False
    """Whether it is what a reader in a hurry reads."""


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Lines as they are typed."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False
    """Whether it is long and shown only when asked for, where the format has that."""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.header) for row in self.rows):
            raise ValueError(f"rows should have {len(self.header)} cells each: {', '.join(self.header)}.")


@dataclass(frozen=True)
class Figure:
    path: str
    """Relative to the report; an SVG file."""
    alt: str
    """What it shows, for those who do not see it."""
    caption: str


Block = Paragraph | Items | Code | Table | Figure


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]
