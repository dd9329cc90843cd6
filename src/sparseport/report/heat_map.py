"""Every linear layer of a model as a field: shade for sparsity, a number for bits, dashes for what was cut away.

Drawn twice, upright for phones and lying for wide screens; the style sheet shows one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparseport.model_card.facts import Layer, ModelFacts
from sparseport.model_card.numbers import percent
from sparseport.report.html import Markup, join, leaf, tag

SHADES = 11
# The order in which a block computes; what is not here stands behind, by name.
_ORDER = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "q", "k", "v"),
    *("o_proj", "out_proj", "dense", "gate", "gate_proj", "gate_up_proj", "w1", "up_proj", "w3", "fc1", "c_fc"),
    *("dense_h_to_4h", "down_proj", "w2", "fc2", "dense_4h_to_h", "c_proj"),
)
_PER_BAND = 32  # blocks side by side in the lying map
_ATTENTION = ("attn", "attention")


@dataclass(frozen=True)
class Cell:
    """One place of the map: a layer, or all experts' layers of one name."""

    layers: tuple[Layer, ...]

    @property
    def sparsity(self) -> float | None:
        masked = [layer for layer in self.layers if layer.pruned is not None]
        weights = sum(layer.weights for layer in masked)
        return sum(layer.pruned or 0 for layer in masked) / weights if weights else None

    @property
    def bits(self) -> str:
        """`4`, `4/8`, with a plus where un-merged branches lie beside the weight."""
        beside = "+" if any(layer.beside is not None for layer in self.layers) else ""
        return "/".join(map(str, sorted({layer.bits for layer in self.layers}))) + beside

    @property
    def merged(self) -> bool:
        """Whether an adapter was merged here."""
        return any(layer.rank is not None for layer in self.layers)

    @property
    def share(self) -> tuple[float, float]:
        """Rows and columns that are left, as shares of the whole model's; of several layers all is put on the rows."""
        if len(self.layers) == 1:
            one = self.layers[0]
            return one.shape[0] / one.whole[0], one.shape[1] / one.whole[1]
        whole = sum(layer.whole[0] * layer.whole[1] for layer in self.layers)
        return sum(layer.weights for layer in self.layers) / whole, 1.0


@dataclass(frozen=True)
class Grid:
    """Blocks of the whole model (rows of the map), paths inside a block (columns), and what is there."""

    blocks: tuple[int, ...]
    parts: tuple[str, ...]
    cells: dict[tuple[int, str], Cell]
    gone: tuple[int, ...]


def grid_of(facts: ModelFacts) -> Grid:
    """The map of a model; layers outside of the blocks are not on it."""
    found: dict[tuple[int, str], list[Layer]] = {}
    for layer in facts.layers:
        if layer.block is not None:
            found.setdefault((layer.block, layer.part), []).append(layer)
    parts = sorted({part for _, part in found}, key=_place_in_block)
    gone = tuple(sorted(set(range(facts.blocks)) - set(facts.kept))) if facts.cut_blocks else ()
    blocks = tuple(sorted({*facts.kept, *gone}))
    return Grid(blocks, tuple(parts), {place: Cell(tuple(layers)) for place, layers in found.items()}, gone)


def heat_map(facts: ModelFacts) -> Markup:
    """Both drawings of a model's map; nothing where no layer lies in a block."""
    grid = grid_of(facts)
    if not grid.cells:
        return Markup("")
    return join([_upright(grid), _lying(grid)])


def short_names(parts: Sequence[str]) -> list[str]:
    """`q`, `k`, `gate`: last names without `_proj`; with the name before where two would be the same."""
    last = [part.rpartition(".")[2].removesuffix("_proj") for part in parts]
    return [
        name if last.count(name) == 1 else ".".join(part.split(".")[-2:])
        for name, part in zip(last, parts, strict=True)
    ]


def shade(sparsity: float | None) -> str:
    """Name of a shade, 0 for nothing pruned to 10 for nothing left; `n` without a mask."""
    return "n" if sparsity is None else str(min(SHADES - 1, math.floor(sparsity * (SHADES - 1) + 0.5)))


def described(cell: Cell) -> str:
    """What stands in a cell, in words."""
    one = cell.layers[0]
    name = one.module if len(cell.layers) == 1 else f"{len(cell.layers)} layers {one.part} of block {one.block}"
    shape = f"{one.shape[0]}×{one.shape[1]}" if len(cell.layers) == 1 else ""
    if one.shape != one.whole and len(cell.layers) == 1:
        shape += f" of {one.whole[0]}×{one.whole[1]}"
    sparsity = "no mask" if cell.sparsity is None else f"{percent(cell.sparsity)} pruned"
    rank = "" if one.rank is None else f", rank {one.rank} merged"
    beside = "" if one.beside is None else f", un-merged branch of rank {one.beside}"
    return f"{name}: {shape}{', ' if shape else ''}{one.stored}, {sparsity}{rank}{beside}"


def legend(facts: ModelFacts) -> Markup:
    """What shades, numbers and dashes mean; only what is on the map."""
    scale = join(
        tag("svg", leaf("rect", class_=f"s{number}", width="100%", height="100%"), width="22", height="14")
        for number in range(SHADES)
    )
    items = []
    if facts.sparsity is not None:
        items.append(tag("span", "0% pruned ", tag("span", scale, class_="ramp", aria_hidden="true"), " 100%"))
    if any(layer.pruned is None for layer in facts.layers):
        swatch = leaf("rect", class_="sn", width="14", height="14", rx="2")
        items.append(tag("span", _key(swatch), " no mask"))
    items.append(tag("span", tag("b", "/".join(map(str, facts.by_bits))), " bits of a stored weight"))
    if any(layer.rank is not None for layer in facts.layers):
        items.append(
            tag("span", _key(leaf("circle", class_="merged", cx="7", cy="7", r="2.5")), " an adapter was merged here")
        )
    if any(layer.beside is not None for layer in facts.layers):
        items.append(tag("span", tag("b", "+"), " an un-merged branch lies beside the weight"))
    if facts.narrower or facts.cut_blocks:
        items.append(tag("span", _key(_dashes(1, 1, 12, 12)), " cut away"))
    return tag("p", *items, class_="legend")


def _key(inside: Markup) -> Markup:
    return tag("svg", inside, width="14", height="14", aria_hidden="true")


def _place_in_block(part: str) -> tuple[int, int, str]:
    last = part.rpartition(".")[2]
    attention = any(word in part for word in _ATTENTION)
    return (0 if attention else 1, _ORDER.index(last) if last in _ORDER else len(_ORDER), part)


def _upright(grid: Grid) -> Markup:
    """A row for each block; as wide as a phone."""
    width, left, top, row = 340.0, 30.0, 22.0, 21.0
    step = (width - left) / len(grid.parts)
    size = 10 if step > 24 else 7
    parts: list[Markup] = []
    for number, name in enumerate(short_names(grid.parts)):
        middle = left + (number + 0.5) * step
        parts.append(_text(_fitting(name, step, size), middle, 14, "head", size=size))
    for number, block in enumerate(grid.blocks):
        y = top + number * row
        parts.append(_text(str(block), left - 7, y + row / 2 + 3.5, "head", anchor="end"))
        if block in grid.gone:
            parts += _removed(left + 1, y + 1, width - left - 2, row - 2, "block removed")
        for column, part in enumerate(grid.parts):
            cell = grid.cells.get((block, part))
            if cell is not None:
                parts.append(_cell(cell, left + column * step + 1, y + 1, step - 2, row - 2))
    height = top + len(grid.blocks) * row
    return _drawing("upright", width, height, parts, grid)


def _lying(grid: Grid) -> Markup:
    """A column for each block, in bands of at most 32."""
    width, left, top, row = 1040.0, 76.0, 20.0, 30.0
    bands = -(-len(grid.blocks) // _PER_BAND)
    each = -(-len(grid.blocks) // bands)
    step = min((width - left) / each, 64.0)
    parts: list[Markup] = []
    tall = top + len(grid.parts) * row + 18
    for band in range(bands):
        down = band * tall
        for number, name in enumerate(short_names(grid.parts)):
            y = down + top + (number + 0.5) * row + 4
            parts.append(_text(_fitting(name, left - 10, 12), left - 10, y, "head", anchor="end", size=12))
        for number, block in enumerate(grid.blocks[band * each : (band + 1) * each]):
            x = left + number * step
            parts.append(_text(str(block), x + step / 2, down + 13, "head", size=11))
            if block in grid.gone:
                parts += _removed(x + 1, down + top + 1, step - 2, len(grid.parts) * row - 2, "")
            for line, part in enumerate(grid.parts):
                cell = grid.cells.get((block, part))
                if cell is not None:
                    parts.append(_cell(cell, x + 1, down + top + line * row + 1, step - 2, row - 2))
    return _drawing("lying", width, bands * tall - 18, parts, grid)


def _drawing(kind: str, width: float, height: float, parts: Iterable[Markup], grid: Grid) -> Markup:
    label = (
        f"Map of {len(grid.blocks)} decoder blocks by {len(grid.parts)} layers each; the table below has the numbers"
    )
    box = f"0 0 {width:g} {height:g}"
    return tag("svg", join(parts), class_=f"map {kind}", viewBox=box, role="img", aria_label=label)


def _cell(cell: Cell, x: float, y: float, width: float, height: float) -> Markup:
    rows, columns = cell.share
    inner_width, inner_height = width * columns, height * rows
    level = shade(cell.sparsity)
    parts = [tag("title", described(cell))]
    if rows < 1 or columns < 1:
        parts.append(_dashes(x, y, width, height))
    parts.append(
        leaf("rect", class_=f"s{level}", x=_n(x), y=_n(y), width=_n(inner_width), height=_n(inner_height), rx="2")
    )
    if height * rows > 8 and width * columns > 8:
        size = min(11.0, width * columns / (0.62 * len(cell.bits)), height * rows)
        parts.append(_text(cell.bits, x + inner_width / 2, y + inner_height / 2 + size * 0.36, f"t{level}", size=size))
    if cell.merged and inner_width > 14 and inner_height > 8:
        parts.append(leaf("circle", class_=f"merged t{level}", cx=_n(x + inner_width - 4.5), cy=_n(y + 4.5), r="1.8"))
    return tag("g", *parts)


def _removed(x: float, y: float, width: float, height: float, words: str) -> list[Markup]:
    parts = [tag("g", tag("title", "block removed"), _dashes(x, y, width, height))]
    return parts + ([_text(words, x + width / 2, y + height / 2 + 3.5, "head")] if words else [])


def _dashes(x: float, y: float, width: float, height: float) -> Markup:
    return leaf("rect", class_="cut", x=_n(x + 0.5), y=_n(y + 0.5), width=_n(width - 1), height=_n(height - 1), rx="2")


def _text(words: str, x: float, y: float, kind: str, *, anchor: str = "middle", size: float = 10) -> Markup:
    return tag("text", words, class_=kind, x=_n(x), y=_n(y), text_anchor=anchor, font_size=_n(size))


def _fitting(name: str, width: float, size: float) -> str:
    """As much of a name as fits; letters are about 0.6 of their size wide."""
    longest = max(1, int(width / (0.6 * size)))
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
