# ruff: noqa: E501
"""Pages in a real browser: what overflows, what fails, and what cannot be read."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (390, 768, 1280)
CHECK = """
const rgb = text => { const n = (text.match(/-?[\\d.]+(e-?\\d+)?/g) || []).map(Number);
  return text.startsWith("color(") ? [...n.slice(0, 3).map(v => 255 * v), n[3] ?? 1] : [...n.slice(0, 3), n[3] ?? 1]; };
const light = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
function ground(view, node) { for (; node; node = node.parentElement) {
  const c = rgb(view.getComputedStyle(node).backgroundColor); if (c[3] > 0.99) return c.slice(0, 3); } return [255, 255, 255]; }
function faults(view, name) {
  const found = [], doc = view.document, wide = view.innerWidth;
  if (doc.documentElement.scrollWidth > wide) found.push(`${name}: page is ${doc.documentElement.scrollWidth} wide`);
  for (const node of doc.body.querySelectorAll("*")) {
    const box = node.getBoundingClientRect();
    const hidden = node.closest("details:not([open]) > :not(summary)");
    if (!node.closest(".scroll, svg") && !hidden && box.right > wide + 1) found.push(`${name}: ${node.tagName} beyond the edge`);
    const own = [...node.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || hidden || ["TITLE", "STYLE", "SCRIPT"].includes(node.tagName.toUpperCase())) continue;
    const style = view.getComputedStyle(node), svg = !!node.closest("svg");
    const [a, b] = [light(rgb(svg ? style.fill : style.color)), light(ground(view, node))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05), size = parseFloat(style.fontSize);
    const need = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    if (ratio < need) found.push(`${name}: contrast ${ratio.toFixed(2)} of "${node.textContent.trim().slice(0, 40)}"`);
  }
  for (const svg of doc.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")].filter(t => frame.width);
    const boxes = texts.map(t => t.getBoundingClientRect());
    boxes.forEach((box, k) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        found.push(`${name}: "${texts[k].textContent}" leaves its drawing "${svg.ariaLabel}"`);
      for (let j = 0; j < k; j++) { const o = boxes[j];
        if (box.left < o.right - 1 && o.left < box.right - 1 && box.top < o.bottom - 3 && o.top < box.bottom - 3)
          found.push(`${name}: "${texts[j].textContent}" on "${texts[k].textContent}" in "${svg.ariaLabel}"`); }
    });
  }
  return found;
}
"""


def faults(pages: Mapping[str, str], folder: Path, dark: bool) -> list[str]:
    """Sentences for everything wrong with the pages (name -> HTML) at each of WIDTHS, in the light or dark scheme."""
    frames, loads = [], []
    for name, text in pages.items():
        quoted = json.dumps(text).replace("</", "<\\/")  # it stands inside a script
        for width in WIDTHS:
            key = f"{name} at {width} px"
            frames.append(f'<iframe name="{key}" width="{width}" height="900"></iframe>')
            loads.append(f"load({json.dumps(key)}, {quoted})")
    script = f"""{CHECK}
const all = [];
async function load(name, text) {{
  const frame = document.getElementsByName(name)[0];
  await new Promise(done => {{ frame.onload = done; frame.srcdoc = text; }});
  frame.contentWindow.onerror = message => all.push(`${{name}}: ${{message}}`);
  const scheme = frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches;
  if (scheme !== {json.dumps(dark)}) all.push(`${{name}}: the browser's scheme is not as asked`);
  all.push(...faults(frame.contentWindow, name));
}}
Promise.all([{", ".join(loads)}]).catch(e => all.push(String(e))).then(() => {{
  const out = document.createElement("pre"); out.id = "found"; out.textContent = JSON.stringify(all);
  document.body.replaceChildren(out); }});
"""
    harness = folder / f"harness-{'dark' if dark else 'light'}.html"
    body = f"<body style='margin:0'>{''.join(frames)}<script>{script}</script>"
    harness.write_text(f"<!doctype html><meta charset=utf-8>{body}")
    assert CHROMIUM is not None
    scheme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", *scheme,
         f"--user-data-dir={folder / harness.stem}", "--virtual-time-budget=20000", "--window-size=1400,1000",
         "--dump-dom", harness.as_uri()], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return list(json.loads(html.unescape(found[1])))
