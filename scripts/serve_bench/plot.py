"""Tokens a second of every server as bars in an SVG. Knows the entries of the JSON and nothing else."""

from __future__ import annotations

from html import escape
from typing import Any

WIDTH, LEFT, BAR, HEAD = 760, 300, 18, 48  # pixels


def speeds(data: dict[str, Any]) -> str:
    """One bar per server and number of clients."""
    bars = [(found, who, row) for found in data["results"] for who, row in found["servers"].items()]
    scale = (WIDTH - LEFT - 190) / max(row["tokens_per_second"]["median"] for _, _, row in bars)
    height = HEAD + len(bars) * (BAR + 6) + 12
    task = data["task"]
    caption = f"{data['hardware']}, {task['threads']} thread(s), torch {data['versions']['torch']}, "
    caption += f"transformers {data['versions']['transformers']}, commit {data['commit'][:7]}"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="18" font-size="13">Served tokens a second, answers of {task["tokens"]} tokens</text>',
        f'<text x="10" y="34" fill="#718096">{escape(caption)}</text>',
    ]
    for index, (found, who, row) in enumerate(bars):
        y, value = HEAD + index * (BAR + 6), row["tokens_per_second"]["median"]
        label = f"{found['model']}, {found['clients']} client{'s' * (found['clients'] > 1)}: {who}"
        colour = "#2b6cb0" if not who.startswith("transformers") else "#718096"
        out += [
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{value * scale:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<text x="{LEFT + value * scale + 6:.1f}" y="{y + 13}">{value:,.0f} tokens/s, first text '
            f"{row['first_ms']['median']:,.0f} ms</text>",
        ]
    return "\n".join([*out, "</svg>", ""])
