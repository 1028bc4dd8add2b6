"""A page of tables and figures, as Markdown with pictures beside it or as one file of HTML that opens offline."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

from pruning.files import write_atomic


@dataclass(frozen=True)
class Table:
    """Cells under their heads, as text."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = (self.heads, ["---"] * len(self.heads), *self.rows)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def html(self) -> str:
        """The table in HTML."""
        head = "".join(f"<th>{_inline(name)}</th>" for name in self.heads)
        body = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


@dataclass(frozen=True)
class Figure:
    """A picture: a name for its file, and PNG."""

    name: str
    png: bytes


@dataclass(frozen=True)
class Items:
    """A numbered list; text may hold **bold** and `code`, as all text of a page."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Section:
    """A title and what stands below it, in order; a string is a paragraph."""

    title: str
    parts: Sequence[str | Table | Figure | Items] = field(default_factory=tuple)


def write_markdown(page: Path, title: str, sections: Sequence[Section]) -> None:
    """Write a page of Markdown, and its figures into a folder of its name beside it."""
    blocks = [f"# {title}"]
    for section in sections:
        blocks += [f"## {section.title}"] if section.title else []
        for part in section.parts:
            if isinstance(part, Table):
                blocks.append(part.markdown())
            elif isinstance(part, Figure):
                write_atomic(page.parent / page.stem / f"{part.name}.png", part.png)
                blocks.append(f"![{part.name}]({page.stem}/{part.name}.png)")
            elif isinstance(part, Items):
                blocks.append("\n".join(f"{number}. {text}" for number, text in enumerate(part.texts, 1)))
            else:
                blocks.append(part)
    write_atomic(page, ("\n\n".join(blocks) + "\n").encode())


def write_html(page: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the same as one file of HTML without any outside asset."""
    template = Template((Path(__file__).parent / "templates" / "page.html").read_text())
    content = "".join(_section(section) for section in sections)
    write_atomic(page, template.substitute(title=escape(title), sections=content).encode())


def _section(section: Section) -> str:
    blocks = [f"<h2>{_inline(section.title)}</h2>"] if section.title else []
    for part in section.parts:
        if isinstance(part, Table):
            blocks.append(part.html())
        elif isinstance(part, Figure):
            data = base64.b64encode(part.png).decode()
            blocks.append(f'<figure><img alt="{escape(part.name)}" src="data:image/png;base64,{data}"></figure>')
        elif isinstance(part, Items):
            blocks.append(f"<ol>{''.join(f'<li>{_inline(text)}</li>' for text in part.texts)}</ol>")
        else:
            blocks.append(f"<p>{_inline(part)}</p>")
    return f"<section>{''.join(blocks)}</section>"


def _inline(text: str) -> str:
    """Bold, code and links of Markdown; a link becomes its text, for the page may lie anywhere."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", escape(text))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text))
