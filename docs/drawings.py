"""Draw gemm-tiling.svg, decode-partition.svg and block.svg in docs/images: `python docs/drawings.py`."""

from pathlib import Path

IMAGES = Path(__file__).parent / "images"
INK, FAINT = "#222222", "#bbbbbb"
BLUE, ORANGE, GREEN, GREY = "#9ecae1", "#fdbe85", "#a1d99b", "#eeeeee"
SHADES = ("#6baed6", "#fd8d3c", "#74c476", "#9e9ac8")


class Drawing:
    """Shapes of an SVG file, in pixels."""

    def __init__(self, width: int, height: int):
        self.size = width, height
        self.items: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, fill: str = "white", line: str = INK
    ) -> None:
        self.items.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{line}"/>'
        )

    def text(self, x: float, y: float, words: str, anchor: str = "middle", size: int = 13) -> None:
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        self.items.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{words}</text>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.items.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" marker-end="url(#head)"/>'
        )

    def save(self, name: str) -> None:
        width, height = self.size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="sans-serif" fill="{INK}">\n'
            '<rect width="100%" height="100%" fill="white"/>\n'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>\n'
        )
        (IMAGES / name).write_text(head + "\n".join(self.items) + "\n</svg>\n", encoding="utf-8")


def tile_position(tile: int, row_tiles: int, column_tiles: int, group_m: int) -> tuple[int, int]:
    """The order of kernels/gemm_tiles.py: `group_m` rows of tiles pass over the weight together."""
    group, inside = divmod(tile, group_m * column_tiles)
    first = group * group_m
    height = min(row_tiles - first, group_m)
    return first + inside % height, inside // height


def gemm_tiling() -> None:
    """norm_linear: 4 x 5 output tiles, group_m = 2, the last column of tiles holds z."""
    drawing = Drawing(760, 490)
    rows, columns, group_m, step = 4, 5, 2, 6
    left, top, tile_w, tile_h, k = 230, 190, 80, 50, 20
    # The stream h, on the left of the output, and the weight, above it.
    drawing.text(left - 20 - step * k / 2, top - 12, "h  [T, d]")
    drawing.text(
        left + columns * tile_w / 2, 34, "Wᵀ  [d, N]: rows of v, k, q (or gate, up), then those of Fᵀ"
    )
    for row in range(rows):
        for j in range(step):
            chosen = row == 1
            drawing.box(left - 20 - (step - j) * k, top + row * tile_h, k, tile_h,
                        BLUE if chosen else "white", INK if chosen else FAINT)  # fmt: skip
    for column in range(columns):
        for j in range(step):
            chosen = column == 2
            fill = ORANGE if chosen else GREY if column == columns - 1 else "white"
            drawing.box(left + column * tile_w, 50 + j * k, tile_w, k, fill, INK if chosen else FAINT)
    for tile in range(rows * columns):
        row, column = tile_position(tile, rows, columns, group_m)
        x, y = left + column * tile_w, top + row * tile_h
        here = (row, column) == (1, 2)
        drawing.box(x, y, tile_w, tile_h, GREEN if here else GREY if column == columns - 1 else "white")
        drawing.text(x + tile_w / 2, y + tile_h / 2 + 5, str(tile))
    drawing.text(left - 20 - step * k - 8, top + 1.5 * tile_h + 5, "block_m", "end", 12)
    drawing.text(left + 2.5 * tile_w, 50 + step * k + 14, "block_n", size=12)
    drawing.text(left - 20 - 4.5 * k, top + rows * tile_h + 16, "block_k", size=12)
    drawing.text(left + columns * tile_w + 14, 50 + step * k / 2 + 4, "d, in steps", "start", 12)
    drawing.text(left + columns * tile_w + 14, 50 + step * k / 2 + 20, "of block_k", "start", 12)
    drawing.text(left + columns * tile_w + 14, top + tile_h + 5, "group_m = 2", "start", 12)
    drawing.text(left + columns * tile_w + 14, top + tile_h + 21, "rows of tiles", "start", 12)
    drawing.text(left + 2 * tile_w, top + rows * tile_h + 18, "scaled columns", size=12)
    drawing.text(left + 4.5 * tile_w, top + rows * tile_h + 18, "z = h F", size=12)
    y = top + rows * tile_h + 50
    lines = (
        "Persistent: program p of P computes tiles p, p + P, p + 2P, ... in the order of the numbers.",
        "A tile:  acc = Σ h wᵀ over the steps, in float32;  scaled columns: act(s · acc + bias);  z: acc;",
        "rounded once, stored.",
    )
    for number, line in enumerate(lines):
        drawing.text(20, y + 19 * number, line, "start", 12)
    drawing.save("gemm-tiling.svg")


def decode_partition() -> None:
    """One output tile of the CUDA decode kernels: row_warps = 2, column_warps = 2, split_k = 2, 16 chunks a row."""
    drawing = Drawing(760, 522)
    left, top, chunk, height, chunks = 190, 80, 30, 46, 16
    drawing.text(left + chunks * chunk / 2, 28, "weight  [N, K], row-major: K in chunks of 128 bytes")
    half = chunks * chunk / 2
    for split in range(2):
        middle = left + split * half + half / 2
        drawing.text(middle, 56, f"split {split}: block (tile, {split})", size=12)
    for tile in range(3):
        for row in range(2):
            y = top + (2 * tile + row) * height
            for c in range(chunks):
                split, inside = divmod(c, chunks // 2)
                if tile == 1:
                    warp = 2 * row + inside % 2
                    drawing.box(left + c * chunk, y, chunk, height, SHADES[warp])
                    drawing.text(left + (c + 0.5) * chunk, y + height / 2 + 4, str(warp), size=12)
                else:
                    drawing.box(left + c * chunk, y, chunk, height, "white", FAINT)
        drawing.box(left, top + 2 * tile * height, chunks * chunk, 2 * height, "none")
        drawing.text(left - 12, top + (2 * tile + 1) * height - 2, f"tile {tile}:", "end", 12)
        drawing.text(left - 12, top + (2 * tile + 1) * height + 14, "16 · row_warps rows", "end", 12)
    drawing.box(left + half - 1, top - 6, 2, 6 * height + 12, INK)
    drawing.text(left + chunks * chunk + 10, top + 2.5 * height + 5, "16 rows", "start", 12)
    drawing.text(left + chunks * chunk + 10, top + 3.5 * height + 5, "16 rows", "start", 12)
    y = top + 6 * height + 34
    lines = (
        "Numbers and colours: the warp of the block that reads the chunk (row_warps = 2, column_warps = 2).",
        "A lane reads 16 bytes at a time straight into registers, two chunks ahead; the other operand of mma.sync",
        "is the tokens' rows [1 to 16, K], which come through L1.",
        "1. A block adds up its column_warps in shared memory, in a fixed order.",
        "2. With split_k > 1 it writes these sums to `partial` and counts its arrival;",
        " the last block of a tile to arrive adds all splits in the order 0, 1, ...: the same bits on every run.",
        "3. That block runs the epilogue: norm scale, bias, activation; or residual, shortcut, sums of squares.",
    )
    for number, line in enumerate(lines):
        drawing.text(20, y + 19 * number, line, "start", 12)
    drawing.save("decode-partition.svg")


def block() -> None:
    """An attention block in the runtime: two products, the shortcut in both."""
    drawing = Drawing(860, 250)

    def row(x: float, y: float, parts: tuple[tuple[str, int, str], ...]) -> None:
        for words, width, fill in parts:
            drawing.box(x, y, width, 30, fill)
            drawing.text(x + width / 2, y + 20, words)
            x += width

    row(20, 100, (("h", 70, BLUE),))
    drawing.text(55, 147, "stream [T, d]", size=12)
    drawing.arrow(95, 115, 140, 115)
    drawing.box(145, 60, 130, 110)
    drawing.text(210, 82, "norm_linear", size=14)
    row(158, 95, (("v", 26, "white"), ("k", 26, "white"), ("q", 26, "white"), ("Fᵀ", 26, GREY)))
    drawing.text(210, 145, "rows of its weight", size=11)
    drawing.text(210, 160, "scale: rms of h", size=11)
    drawing.arrow(275, 115, 300, 115)
    row(305, 100, (("v", 30, "white"), ("k", 30, "white"), ("q", 40, "white"), ("z", 30, GREY)))
    drawing.text(370, 90, "its output, one buffer", size=12)
    drawing.arrow(385, 132, 385, 165)
    drawing.box(305, 170, 130, 30)
    drawing.text(370, 190, "attention", size=13)
    drawing.text(370, 216, "writes its result over q", size=12)
    drawing.arrow(435, 115, 470, 115)
    row(475, 100, (("attended", 70, GREEN), ("z", 30, GREY)))
    drawing.text(525, 90, "read without a copy", size=12)
    drawing.arrow(575, 115, 600, 115)
    drawing.box(605, 60, 130, 110)
    drawing.text(670, 82, "rotate_add", size=14)
    row(628, 95, (("W_out", 54, "white"), ("-F", 30, GREY)))
    drawing.text(670, 145, "columns of its weight", size=11)
    drawing.text(670, 160, "+ h + bias", size=11)
    drawing.arrow(735, 115, 760, 115)
    row(765, 100, (("h next", 75, BLUE),))
    drawing.text(802, 90, "stream [T, d']", size=12)
    drawing.text(802, 147, "Σ h² of every", size=12)
    drawing.text(802, 162, "32 columns", size=12)
    drawing.items.append(
        f'<path d="M55 100 V36 H670 V52" fill="none" stroke="{INK}" marker-end="url(#head)"/>'
    )
    drawing.text(360, 30, "the stream itself is added: S = I - F Fᵀ", size=12)
    drawing.save("block.svg")


if __name__ == "__main__":
    gemm_tiling()
    decode_partition()
    block()
