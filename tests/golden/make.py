"""Write the golden logs again from a small model of a cluster: `PYTHONPATH=src python tests/golden/make.py`.

Only for a change that is meant to decide otherwise. The stories are made from seeds, step by step; what the
model instances do (a fixed time a step, every move granted) is a story, not a measurement.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from test_eventlog import golden_scheduler  # noqa: E402

from taichi_serve.eventlog import Logged  # noqa: E402
from taichi_serve.messages import (  # noqa: E402
    Abort,
    Arrived,
    Cancelled,
    Decode,
    Drained,
    Event,
    Finished,
    Flow,
    Flowed,
    Joined,
    Lost,
    Prefill,
    Prefilled,
    SetChunk,
    Silent,
    Slid,
    Stepped,
)
from taichi_serve.sliders import Sliders  # noqa: E402

HYBRID = {"p_heavy": 1, "d_heavy": 2, "p_chunk": 512, "d_chunk": 64}
STORIES: dict[str, dict[str, object]] = {
    "aggregation": {"sliders": {"p_heavy": 0, "d_heavy": 2, "p_chunk": 0, "d_chunk": 128}, "policy": {}},
    "disaggregation": {
        "sliders": {"p_heavy": 1, "d_heavy": 1, "p_chunk": 2048, "d_chunk": 0},
        "policy": {"watermark": 1.0},
    },
    "hybrid": {"sliders": HYBRID, "policy": {"dwell": 0.0}},
    "bad_day": {"sliders": HYBRID, "policy": {"dwell": 0.0}},
    "comes_back": {
        "sliders": {"p_heavy": 1, "d_heavy": 2, "p_chunk": 512, "d_chunk": 0},
        "policy": {"dwell": 0.0},
    },
}


@dataclass
class Work:
    prompt: int
    output: int
    on: str = ""
    leg: int = 0
    done: int = 0
    out: int = 0
    held: bool = False
    hand_over: bool = False


class Story:
    def __init__(self, head: dict[str, object]) -> None:
        self.out = io.StringIO()
        self.inner = golden_scheduler(head)
        self.scheduler = Logged(self.inner, self.out)
        self.work: dict[str, Work] = {}
        self.chunks = {i.name: i.chunk for i in self.inner.instances.values()}
        self.coming: dict[str, str] = {}
        self.busy_until = dict.fromkeys(self.chunks, 0.0)
        self.now = 0.0

    def tell(self, event: Event) -> None:
        for c in self.scheduler.on(event):
            match c:
                case Prefill():
                    work = self.work[c.request]
                    work.on, work.leg, work.hand_over, work.done = c.on, c.leg, c.hand_over, 0
                case Decode(on=to) | Flow(to=to):
                    self.work[c.request].leg = c.leg
                    self.coming[c.request] = to
                case Abort():
                    self.work.pop(c.request, None)
                    self.coming.pop(c.request, None)
                case SetChunk():
                    self.chunks[c.instance] = c.chunk

    def step(self, name: str) -> None:
        here = [(n, w) for n, w in self.work.items() if w.on == name and n not in self.coming]
        landing = [n for n, to in self.coming.items() if to == name]
        if self.now < self.busy_until[name] or not (here or landing):
            return
        left, first, running = self.chunks[name], [], []
        for n, w in here:
            if w.out:
                running.append(n)
                w.out += 1
            elif left:
                took = min(left, w.prompt - w.done)
                left, w.done = left - took, w.done + took
                first += [n] if w.done == w.prompt else []
        used = sum(w.done + w.out for w in self.work.values() if w.on == name)
        prefilled = self.chunks[name] - left
        seconds = round(0.01 + 1e-4 * prefilled, 6)
        self.busy_until[name] = self.now + seconds
        self.tell(Stepped(self.now, name, seconds, prefilled, len(running), used))
        for n in first:
            w = self.work[n]
            w.out, w.held = 1, w.hand_over
            self.tell(Prefilled(self.now, n, w.leg, name, held=w.hand_over))
        for n in landing:
            w = self.work[n]
            w.on, w.out, w.held, w.done = name, w.out + 1, False, w.prompt
            del self.coming[n]
            self.tell(Flowed(self.now, n, w.leg, name, w.out, w.prompt + w.out - 1, 0.02))
        for n in [
            n for n, w in self.work.items() if w.on == name and w.out >= w.output and n not in self.coming
        ]:
            out = self.work.pop(n).out
            self.tell(Finished(self.now, n, out))


def bad_luck(story: Story, tick: int) -> None:
    if tick == 60:
        story.tell(Cancelled(story.now, next(iter(story.work))))
    if tick == 80:
        story.tell(Drained(story.now, "i1"))
    if tick == 100:
        story.tell(Drained(story.now, "i1", on=False))
    if tick == 120:
        story.tell(Slid(story.now, Sliders(2, 1, 256, 32)))
    if tick == 150:
        lose(story, "i2")


def lose(story: Story, name: str) -> None:
    for n, w in story.work.items():
        if w.on == name:
            w.on = ""
        if story.coming.get(n) == name:
            del story.coming[n]
    story.tell(Lost(story.now, name, "killed"))


def coming_back(story: Story, tick: int) -> None:
    """The only one who prefills is silent, heard, lost and back; then all are lost, and two come back."""
    match tick:
        case 40:
            story.tell(Silent(story.now, "i0"))
        case 60:
            story.tell(Silent(story.now, "i0", on=False))
        case 90:
            lose(story, "i0")
        case 120:
            story.tell(Joined(story.now, "i0", 2_000))
        case 150:
            for name in ("i2", "i0", "i1"):
                lose(story, name)
        case 160:
            story.tell(Joined(story.now, "i1", 2_400))
        case 165:
            story.tell(Joined(story.now, "i0", 2_400))


def tell(name: str, head: dict[str, object]) -> str:
    head = {**head, "capacity": 2_400, "predictor": "learned" if name == "bad_day" else "profiled"}
    story, chance = Story(head), Random(len(name))
    for tick in range(250):
        story.now = round(story.now + 0.02, 6)
        if tick < 180 and tick % 6 == 0:
            prompt, output = chance.randint(20, 900), chance.randint(10, 120)
            request = f"r{tick // 6}"
            story.work[request] = Work(prompt, output)
            story.tell(Arrived(story.now, request, prompt, output + 50))
        if name == "bad_day":
            bad_luck(story, tick)
        if name == "comes_back":
            coming_back(story, tick)
        for instance in story.chunks:
            if story.inner.instances[instance].answers:
                story.step(instance)
    return json.dumps(head) + "\n" + story.out.getvalue()


if __name__ == "__main__":
    for name, head in STORIES.items():
        (HERE / f"{name}.jsonl").write_text(tell(name, head))
