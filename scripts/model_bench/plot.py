"""Speed of ours over transformers' as bars in an SVG. Knows the entries of the JSON and nothing else."""

from __future__ import annotations

from html import escape
from typing import Any

WIDTH, LEFT, BAR, HEAD = 760, 260, 18, 48  # pixels


def speeds(data: dict[str, Any]) -> str:
    """One bar per job that has a peer; the line is the peer's own speed."""
    shown = [job for job in data["jobs"] if "speed_vs_peer" in job]
    longest = max([job["speed_vs_peer"] for job in shown], default=1.0)
    scale = (WIDTH - LEFT - 130) / longest
    height = HEAD + len(shown) * (BAR + 6) + 12
    caption = f"{data['hardware']}, torch {data['versions']['torch']}, commit {data['commit'][:7]}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{height}" fill="white"/>',
        '<text x="10" y="18" font-size="13">Speed over transformers at its fastest settings (line: equal)</text>',
        f'<text x="10" y="34" fill="#718096">{escape(caption)}</text>',
    ]
    for index, job in enumerate(shown):
        y = HEAD + index * (BAR + 6)
        size = f"batch {job['rows']}" if job["kind"] == "decode" else f"{job['rows']} x {job['seq_len']}"
        label = f"{job['kind']} {job['shape']} {job['precision']} {size}, {job['threads']} thr."
        value = job["speed_vs_peer"]
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{value * scale:.1f}" height="{BAR}" fill="#2b6cb0"/>',
            f'<text x="{LEFT + value * scale + 6:.1f}" y="{y + 13}">{value:.2f}x  '
            f"({job['tokens_per_second']:,.0f} tokens/s)</text>",
        ]
    line = LEFT + scale
    parts.append(f'<line x1="{line:.1f}" x2="{line:.1f}" y1="{HEAD - 6}" y2="{height - 8}" stroke="#1a202c"/>')
    return "\n".join([*parts, "</svg>", ""])
