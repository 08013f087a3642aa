"""Seconds of a GRPO step as stacked bars in an SVG. Knows the entries of the JSON and nothing else."""

from __future__ import annotations

from html import escape
from typing import Any

WIDTH, LEFT, BAR, HEAD = 760, 220, 20, 66  # pixels
COLOURS = {"rollouts": "#2b6cb0", "scoring": "#d69e2e", "update": "#718096"}


def steps(data: dict[str, Any]) -> str:
    """One bar per competitor and precision, split into the parts of a step."""
    bars = [(found, who, parts) for found in data["results"] for who, parts in found["medians"].items()]
    scale = (WIDTH - LEFT - 150) / max(parts["seconds"] for _, _, parts in bars)
    height = HEAD + len(bars) * (BAR + 6) + 12
    task = data["results"][0]["task"]
    versions = f"torch {data['versions']['torch']}, commit {data['commit'][:7]}"
    caption = f"{data['hardware']}, {task['threads']} thread(s), {versions}"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="18" font-size="13">Seconds of a GRPO step: {task["prompts"]} prompts x {task["group_size"]} '
        f"answers of at most {task['max_new_tokens']} tokens</text>",
        f'<text x="10" y="34" fill="#718096">{escape(caption)}</text>',
    ]
    for index, (part, colour) in enumerate(COLOURS.items()):
        x = LEFT + 90 * index
        out.append(f'<rect x="{x}" y="43" width="11" height="11" fill="{colour}"/>')
        out.append(f'<text x="{x + 16}" y="53">{part}</text>')
    for index, (found, who, parts) in enumerate(bars):
        y, x = HEAD + index * (BAR + 6), float(LEFT)
        label = f"{found['task']['precision']} {who}"
        out.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>')
        for part, colour in COLOURS.items():
            width = parts[part] * scale
            out.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>')
            x += width
        ratio = f"  ({found['speed_vs_peer']:.2f}x)" if who == "ours" else ""
        out.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{parts["seconds"]:.2f} s{ratio}</text>')
    return "\n".join([*out, "</svg>", ""])
