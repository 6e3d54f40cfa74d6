"""`python -m examples.benchmark.live_latency [RUN]`: key to picture of `echodistill live`, in a real Chromium.

Each user is a page of its own that types a prompt at a steady pace. A key is answered by the first picture of its text
or of a later one; the clock stops in the frame after the picture is on the page. All of it runs on one machine, with
the server: four users are four pages that share its CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from examples.live_browser import Visit, browser, chromium, served

TEXT = "a photo of a sks {} in front of a mountain in the snow"
# Types a text into the prompt and notes, on the page's clock, each key and each picture.
TYPING = """async ([text, pause]) => {
  const box = document.querySelector('#prompt textarea'), place = document.querySelector('#picture');
  const keys = [], pictures = [];
  const see = () => { const image = place.querySelector('img'); if (!image) return;
    const ms = parseFloat(place.querySelector('.ed-ms').textContent), prompt = image.dataset.prompt;
    requestAnimationFrame(() => pictures.push({prompt, ms, at: performance.now()})); };
  const watch = new MutationObserver(see);
  watch.observe(place, {subtree: true, childList: true, attributes: true, characterData: true});
  const wait = ms => new Promise(done => setTimeout(done, ms));
  box.focus();
  box.select();
  for (let end = 8; end <= text.length; end++) {
    keys.push({text: text.slice(0, end), at: performance.now()});
    document.execCommand('insertText', false, end === 8 ? text.slice(0, 8) : text[end - 1]);  // as a key does
    await wait(pause);
  }
  for (let i = 0; i < 300 && pictures.at(-1)?.prompt !== text; i++) await wait(100);
  watch.disconnect();
  return {keys, pictures};
}"""


def latencies(seen: dict[str, Any]) -> list[tuple[float, float]]:
    """Return, for each key that was answered, milliseconds to its picture, and those that the models took."""
    order = {key["text"]: index for index, key in enumerate(seen["keys"])}
    answers = []
    for index, key in enumerate(seen["keys"]):
        later = (one for one in seen["pictures"] if order.get(one["prompt"], -1) >= index and one["at"] >= key["at"])
        if (first := next(later, None)) is not None:
            answers.append((first["at"] - key["at"], first["ms"]))
    return answers


def measure(visits: list[Visit], noun: str, pace: float) -> dict[str, float]:
    """Return the figures of some users who type at once."""
    text = TEXT.format(noun)
    for visit in visits:
        visit.page.evaluate(f"(given) => {{ window.typed = ({TYPING})(given) }}", [text, 1000 / pace])
    answers = [pair for visit in visits for pair in latencies(visit.page.evaluate("window.typed"))]
    waits, costs = sorted(wait for wait, _ in answers), [cost for _, cost in answers]
    return {
        "users": len(visits),
        "keys": len(waits),
        "median_ms": round(statistics.median(waits), 1),
        "p95_ms": round(waits[int(0.95 * (len(waits) - 1))], 1),
        "generation_ms": round(statistics.median(costs), 1),
        "overhead_ms": round(statistics.median(wait - cost for wait, cost in answers), 1),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure one user and four, print a line for each, and the load of the machine."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark.live_latency", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="run folder; without one, the embedded base model draws")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--pace", type=float, default=5.0, help="keys per second of each user")
    parser.add_argument("--noun", default="dog", help="what the subject is")
    parser.add_argument("--alone", action="store_true", help="without the base model beside it")
    options = parser.parse_args(arguments)
    if chromium() is None:
        parser.error("Chromium is not installed")
    words = [options.run.absolute()] if options.run else ["--model", "mini"]
    with tempfile.TemporaryDirectory() as folder, browser() as started, served(Path(folder), *words) as (address, _):
        for users in options.users:
            visits = [Visit(started, address) for _ in range(users)]
            for visit in visits:
                visit.page.wait_for_selector("#picture img")
                if options.alone:
                    visit.page.locator("#beside input").uncheck()
                visit.type("a photo")  # the first event opens the stream of answers
            figures = measure(visits, options.noun, options.pace)
            print(json.dumps(figures | {"load": round(os.getloadavg()[0], 1), "cpus": os.cpu_count()}), flush=True)
            for visit in visits:
                visit.page.close()


if __name__ == "__main__":
    main()
