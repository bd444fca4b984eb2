"""A page as headless Chromium lays it out: overlaps, overflow, where links lead. No driver is needed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# The page stands in a frame of each width. The outer page measures the frames, and writes what it found into itself.
FRAMES = """<!doctype html><meta charset="utf-8"><body>%s<pre id="found"></pre><script>
const TOLERANCE = 3;  // pixels: letters have room around them

function texts(page) {
  const found = [];
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (!node.data.trim() || /^(style|script)$/i.test(node.parentElement.tagName)) continue;
    const range = page.createRange();
    range.selectNodeContents(node);
    const boxes = node.parentElement.closest("svg") ? [node.parentElement.getBoundingClientRect()]
                                                    : range.getClientRects();
    for (const box of boxes)
      if (box.width && box.height) found.push({text: node.data.trim().slice(0, 40), box});
  }
  return found;
}

function overlaps(page) {
  const all = texts(page).sort((a, b) => a.box.top - b.box.top), found = [];
  for (let i = 0; i < all.length; i++)
    for (let j = i + 1; j < all.length && all[j].box.top < all[i].box.bottom; j++) {
      const a = all[i].box, b = all[j].box;
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > TOLERANCE && high > TOLERANCE) found.push([all[i].text, all[j].text]);
    }
  return found;
}

function measured(frame) {
  const page = frame.contentDocument, view = frame.contentWindow;
  for (const details of page.querySelectorAll("details")) details.open = true;
  const box = element => element.getBoundingClientRect();
  const beyond = [...page.querySelectorAll("body *")].filter(element =>
    !element.closest(".scroll") && !element.closest("svg") && box(element).right > view.innerWidth + 1);
  const small = [...page.querySelectorAll("svg text")].map(text => box(text).height).filter(h => h > 0);
  const cells = [...page.querySelectorAll("td, th")].map(cell => cell.textContent);
  const report = {width: view.innerWidth, scrolls: page.documentElement.scrollWidth, overlaps: overlaps(page),
    beyond: beyond.slice(0, 5).map(e => e.tagName + " " + e.className + " " + e.textContent.slice(0, 40)),
    texts: texts(page).length, letters: Math.min(...small),
    json: cells.filter(text => /[{}]|\\[\\s*["\\d[]/.test(text)),
    lost: [], links: 0};
  for (const link of page.querySelectorAll('a[href^="#"]')) {
    link.click();
    const target = page.getElementById(link.getAttribute("href").slice(1));
    const top = target ? box(target).top : NaN;
    report.links += 1;
    if (!(top > -40 && top < view.innerHeight)) report.lost.push(link.textContent + " " + top);
  }
  return report;
}

window.onload = () => {
  const reports = [...document.querySelectorAll("iframe")].map(measured);
  document.getElementById("found").textContent = JSON.stringify(reports);
};
</script></body>"""


def find_browser() -> str | None:
    """Chromium or Chrome, where one is installed."""
    return next((found for found in map(shutil.which, NAMES) if found), None)


def measure(page: Path, widths: tuple[int, ...], folder: Path, dark: bool = False) -> list[dict]:
    """What the browser finds on a page at each width, everything that is folded opened.

    Returns:
        For each width "overlaps" (pairs of texts), "beyond" (elements that reach over the right edge, outside of what
        scrolls), "scrolls" (the page's width), "lost" (links that do not lead to what they name), "json" (cells with
        braces or brackets), "letters" (the lowest line of a plot, in pixels), and how many texts and links there are.
    """
    frames = "".join(
        f'<iframe src="{page.resolve().as_uri()}" width="{width}" height="900" style="border:0"></iframe>'
        for width in widths
    )
    outer = folder / "frames.html"
    outer.write_text(FRAMES.replace("%s", frames, 1), encoding="utf-8")
    command = [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    # A page in a file may otherwise not look into another one.
    command += ["--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}"]
    command += ["--force-dark-mode"] if dark else []
    command += ["--virtual-time-budget=20000", "--dump-dom", outer.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    assert found[1], "the page was not measured"
    return json.loads(html.unescape(found[1]))
