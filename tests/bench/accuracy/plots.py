"""Self-contained SVG figures: KL per method with intervals, KL against bits per weight. For light and dark pages."""
import html
import math

COLOURS = ["#2a6fbb", "#c2571a", "#3a8f4d", "#8a4fb0", "#b0892a", "#7a7a7a"]
STYLE = ("<style>text{font:12px sans-serif;fill:#333}.t{font-weight:bold}.g{stroke:#ccc;stroke-width:1}"
         ".a{stroke:#888;stroke-width:1}@media(prefers-color-scheme:dark){text{fill:#ddd}.g{stroke:#444}}</style>")


def ticks(low, high, about=6):
    """Round numbers that cover [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    for factor in (1, 2, 5, 10):
        if (high - low) / (step * factor) <= about:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def text(x, y, value, anchor="start", kind=""):
    look = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}>{html.escape(value)}</text>'


def line(x1, y1, x2, y2, kind=None, colour=None, width=1.5):
    look = f'class="{kind}"' if kind else f'stroke="{colour}" stroke-width="{width}"'
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {look}/>'


def document(width, height, parts):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img">{STYLE}{"".join(parts)}</svg>\n')


def colours(entries):
    formats = list(dict.fromkeys(e["format"] for e in entries))
    return {form: COLOURS[i % len(COLOURS)] for i, form in enumerate(formats)}


def methods(entries, title):
    """One line per format and method: mean KL as a dot, its interval as a bar, from zero."""
    left, right, top, row = 220, 80, 40, 22
    width, height = 760, top + row * len(entries) + 46
    highest = max((e["metrics"]["kl"]["interval"] or [0, e["metrics"]["kl"]["value"]])[1] for e in entries) * 1.05
    x = lambda value: left + (width - left - right) * value / highest
    parts = [text(12, 22, f"Mean KL to the original, nats per token: {title}", kind="t")]
    for tick in ticks(0, highest):
        parts += [line(x(tick), top, x(tick), height - 40, kind="g"),
                  text(x(tick), height - 24, f"{tick:.4g}", "middle")]
    parts.append(text(left, height - 8, "dot: mean; bar: 95 % interval over documents"))
    colour = colours(entries)
    for i, e in enumerate(entries):
        y, kl, mine = top + row * (i + 0.5), e["metrics"]["kl"], colour[e["format"]]
        parts.append(text(left - 10, y + 4, f"{e['format']} {e['method']}", "end"))
        if kl["interval"]:
            parts.append(line(x(kl["interval"][0]), y, x(kl["interval"][1]), y, colour=mine, width=3))
        parts += [f'<circle cx="{x(kl["value"]):.1f}" cy="{y:.1f}" r="4.5" fill="{mine}"/>',
                  text(x((kl["interval"] or [0, kl["value"]])[1]) + 8, y + 4, f"{kl['value']:.4g}")]
    return document(width, height, parts)


def bits(entries, title):
    """Mean KL (logarithmic) against bits per weight of everything."""
    left, right, top, bottom, width, height = 70, 190, 40, 50, 760, 420
    xs = [e["bits_per_weight"] for e in entries]
    kls = [max(e["metrics"]["kl"]["value"], 1e-12) for e in entries]
    low_x, high_x = min(xs) - 0.15, max(xs) + 0.15
    low_y, high_y = math.log10(min(kls)) - 0.1, math.log10(max(kls)) + 0.1
    x = lambda value: left + (width - left - right) * (value - low_x) / (high_x - low_x)
    y = lambda value: top + (height - top - bottom) * (high_y - math.log10(max(value, 1e-12))) / (high_y - low_y)
    parts = [text(12, 22, f"Mean KL to the original against bits per weight: {title}", kind="t")]
    for tick in ticks(low_x, high_x):
        parts += [line(x(tick), top, x(tick), height - bottom, kind="g"),
                  text(x(tick), height - bottom + 18, f"{tick:.4g}", "middle")]
    marks = [m * 10.0 ** e for e in range(math.floor(low_y), math.ceil(high_y) + 1) for m in (1, 2, 3, 5, 7)]
    for mark in marks:
        if low_y <= math.log10(mark) <= high_y:
            parts += [line(left, y(mark), width - right, y(mark), kind="g"),
                      text(left - 6, y(mark) + 4, f"{mark:.4g}", "end")]
    parts.append(text((left + width - right) / 2, height - 10,
                      "bits per weight: scales, zeros, embedding, norms counted", "middle"))
    colour, last = colours(entries), -1e9
    # Labels to the right of the plot, in the order of the points, never one over the other.
    for e in sorted(entries, key=lambda e: y(e["metrics"]["kl"]["value"])):
        at_x, at_y, mine = x(e["bits_per_weight"]), y(e["metrics"]["kl"]["value"]), colour[e["format"]]
        last = max(at_y + 4, last + 14)
        parts += [line(at_x, at_y, width - right + 6, last - 4, kind="g"),
                  f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4.5" fill="{mine}"/>',
                  text(width - right + 10, last, f"{e['format']} {e['method']}")]
    return document(width, max(height, last + 20), parts)
