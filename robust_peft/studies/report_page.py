"""A report's sections as one HTML page that needs nothing else, and as Markdown with its figures beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from robust_peft.studies.report_blocks import Block, Cell, Code, Figure, Items, Paragraph, Section

STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --page: #fff; --line: #c8c8c8; --soft: #f3f3f3; --link: #004b8d; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --page: #161616; --line: #4a4a4a; --soft: #242424; --link: #8cc4ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
a { color: var(--link); }
.lead { font-size: 1.1rem; }
.scroll { overflow-x: auto; margin: .4rem 0 1.4rem; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
.caption { margin: .8rem 0 .2rem; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; min-width: 5rem; max-width: 22rem; }
td:first-child { min-width: 11rem; }
thead th { border-bottom-width: 2px; }
figure { margin: 1rem 0 1.6rem; }
figure svg { display: block; width: 100%; max-width: 40rem; height: auto; background: #fff; border-radius: 4px; }
figcaption { max-width: 40rem; font-size: .9rem; margin-top: .4rem; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; }
@media print { body { max-width: none; } .scroll { overflow: visible; } }
"""


def to_html(title: str, sections: Sequence[Section], folder: str | Path) -> str:
    """One page with its style and figures inside; it loads nothing and runs no script.

    Args:
        title: The page's heading.
        sections: What follows.
        folder: Where the figures' files lie.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    count = 0
    for section in sections:
        body.append(f"<section>\n<h2>{escape(section.title)}</h2>" if section.title else "<section>")
        for block in section.blocks:
            count += 1
            body.append(_html(block, Path(folder), f"f{count}-"))
        body.append("</section>")
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    head += '<link rel="icon" href="data:,">\n'  # or a browser asks the server for one
    head += f"<title>{escape(title)}</title>\n<style>{STYLE}</style>"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n'
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _html(block: Block, folder: Path, prefix: str) -> str:
    if isinstance(block, Paragraph):
        kind = ' class="lead"' if block.lead else ""
        return f"<p{kind}>{escape(block.text)}</p>"
    if isinstance(block, Items):
        return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in block.items) + "\n</ul>"
    if isinstance(block, Code):
        return f"<pre><code>{escape(chr(10).join(block.lines))}</code></pre>"
    if isinstance(block, Figure):
        svg = inline_svg((folder / block.path).read_text(encoding="utf-8"), prefix, block.alt)
        return f"<figure>\n{svg}\n<figcaption>{escape(block.caption)}</figcaption>\n</figure>"
    header = "".join(f'<th scope="col">{escape(name)}</th>' for name in block.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{_html_cell(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
    table = f"<table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    # With the keyboard, too, what is cut off at the right can be reached.
    boxed = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(block.caption)}">{table}</div>'
    if block.folded:  # says what it is in the line that unfolds it
        return f"<details>\n<summary>{escape(block.caption)}</summary>\n{boxed}\n</details>"
    # Not the table's own caption, which would be as wide as the table and scroll away with it.
    return f'<p class="caption">{escape(block.caption)}</p>\n{boxed}'


def _html_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return escape(cell)
    return " ".join(f'<a href="{escape(_address(link.path))}">{escape(link.text)}</a>' for link in cell)


def inline_svg(text: str, prefix: str, alt: str) -> str:
    """A figure's SVG as part of a page: without its head, its ids its own, and with words for those who do not see it.

    Args:
        text: The SVG file's text.
        prefix: Put before every id, so that several figures fit into one page.
        alt: What the figure shows.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{prefix}", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1).strip()


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The same in Markdown; figures are linked."""
    parts = [f"# {_plain(title)}"]
    for section in sections:
        parts += [f"## {_plain(section.title)}"] if section.title else []
        parts += [_markdown(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Paragraph):
        return _plain(block.text)
    if isinstance(block, Items):
        return "\n".join(f"- {_plain(item)}" for item in block.items)
    if isinstance(block, Code):
        return "\n".join(f"    {line}" for line in "\n".join(block.lines).split("\n"))
    if isinstance(block, Figure):
        return f"![{_plain(block.alt)}]({_address(block.path)})\n\n{_plain(block.caption)}"
    lines = [f"{_plain(block.caption)}", "", f"| {' | '.join(map(_plain, block.header))} |"]
    lines += [f"| {' | '.join('---' for _ in block.header)} |"]
    lines += [f"| {' | '.join(_markdown_cell(cell) for cell in row)} |" for row in block.rows]
    return "\n".join(lines)


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return _plain(cell)
    return " ".join(f"[{_plain(link.text)}]({_address(link.path)})" for link in cell)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_\[\]<>#|~&])", r"\\\1", " ".join(text.split()))


def _address(path: str) -> str:
    return quote(path)
