"""`python -m tools.pages`: write every generated part anew."""

from __future__ import annotations

from tools.pages.parts import DOCS, PARTS, filled

if __name__ == "__main__":
    for page, make in PARTS.items():
        path = DOCS / page
        text = path.read_text(encoding="utf-8")
        new = filled(text, make(), page)
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(f"docs/{page} written anew")
