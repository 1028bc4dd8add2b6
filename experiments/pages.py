"""A page of tables and figures, as Markdown with pictures beside it or as one file of HTML that opens offline."""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

from pruning.files import write_atomic


@dataclass(frozen=True)
class Table:
    """Cells under their heads, as text.

    Attributes:
        heads: of the columns.
        rows: a cell for each column.
        words: heads of columns that stand to the left, as the first one does; the others hold numbers and stand to the
            right.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Collection[str] = ()

    def markdown(self) -> str:
        """The table in Markdown."""
        rule = ["---:" if is_number else "---" for is_number in self._are_numbers]
        # A bar within a cell would end it, in code too.
        lines = ([cell.replace("|", r"\|") for cell in row] for row in (self.heads, rule, *self.rows))
        return "\n".join(f"| {' | '.join(row)} |" for row in lines)

    def html(self) -> str:
        """The table in HTML."""
        body = "".join(self._html_row("td", row) for row in self.rows)
        head = self._html_row("th", self.heads)
        return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'

    def _html_row(self, tag: str, cells: Sequence[str]) -> str:
        classes = [' class="number"' if is_number else "" for is_number in self._are_numbers]
        texts = (f"<{tag}{kind}>{_inline(cell)}</{tag}>" for kind, cell in zip(classes, cells, strict=True))
        return f"<tr>{''.join(texts)}</tr>"

    @property
    def _are_numbers(self) -> list[bool]:
        return [place > 0 and head not in self.words for place, head in enumerate(self.heads)]


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
