"""The page: one file with its style sheet in it, which loads nothing and runs no script."""

from __future__ import annotations

from pathlib import Path

from sparseport.report.closing_sections import loading_section, provenance_section
from sparseport.report.drift_sections import naive_section, numerics_section
from sparseport.report.gather import Gathered
from sparseport.report.glance import header, title_of
from sparseport.report.html import Markup, join, leaf, tag
from sparseport.report.search_section import search_section
from sparseport.report.speed_section import speed_section
from sparseport.report.weights_section import weights_section

MADE_BY = "<!-- made by sparseport report -->"
"""Second line of every page, by which one is known that may be replaced."""

# Nothing may be loaded, whatever a text in the page looks like to a browser.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(gathered: Gathered) -> str:
    """The whole page; the same files give the same text."""
    sections = {
        "weights": ("Weights", weights_section(gathered)),
        "usual-way": ("Against the usual way", naive_section(gathered.naive)),
        "speed": ("Speed", speed_section(gathered)),
        "search": ("Search", search_section(gathered.search)),
        "precision": ("Precision", numerics_section(gathered)),
        "load": ("Load it", loading_section(gathered)),
        "origin": ("Origin", provenance_section(gathered)),
    }
    links = [tag("a", name, href=f"#{key}") for key, (name, _) in sections.items()]
    body = [
        header(gathered),
        tag("nav", *links, aria_label="Sections"),
        *(tag("section", content, id=key) for key, (_, content) in sections.items()),
        tag(
            "footer",
            tag(
                "p",
                f"Made by sparseport {gathered.version} from the folders and files named above. ",
                "The page is one file and loads nothing.",
            ),
        ),
    ]
    html = tag("html", _head(gathered), tag("body", tag("main", *body)), lang="en")
    return f"<!doctype html>\n{MADE_BY}\n{html}\n"


def _head(gathered: Gathered) -> Markup:
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return tag(
        "head",
        leaf("meta", charset="utf-8"),
        leaf("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        leaf("meta", name="viewport", content="width=device-width, initial-scale=1"),
        leaf("meta", name="color-scheme", content="light dark"),
        leaf("meta", name="referrer", content="no-referrer"),
        leaf("meta", name="generator", content=f"sparseport {gathered.version}"),
        tag("title", f"{title_of(gathered)} - sparseport report"),
        leaf("link", rel="icon", href="data:,"),
        join([Markup("<style>"), Markup(style), Markup("</style>")]),
    )
