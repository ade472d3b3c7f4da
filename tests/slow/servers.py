"""A server answers as real ones do at their worst: each image ends as a record, or as a rejection with its reason."""

import collections
import json
import random
from collections.abc import Callable
from pathlib import Path

from common import Row, pictures, start, wait
from fake_server import FakeServer, chat, error, sent_image

from mllmfl_lite.__main__ import main

IMAGES, RUNS, AGAIN = 24, 12, 8  # of one run; runs; how often a run that ended is started again
THOUGHT, DOG = "Let me look", [{"type": "text", "text": "A dog."}]
REPLIES = {
    "good": [(200, body) for body in (
        chat(finish=None), chat(finish="eos_token"), chat(finish="tool_calls"), chat("I see a dog. " * 40, "length"),
        chat("图片中有一只狗。"), chat("<think>no</think>A dog."), chat("half \ud83d", "length"), chat("**A dog.**"),
        chat(DOG), chat("A\0 dog\u202e"), chat(reasoning_content="hm"), chat("a\r\nb\u2028c\x85d"), chat(model=None),
        chat('{"crc": 1}\n'),
    )],
    "final": [  # of one image, each time that it is asked
        (400, error("image too small")), (400, error("maximum context length is 4096 tokens")),
        (413, error("too large")), (422, {"detail": [{"msg": "aspect ratio must be below 200"}]}),
        (500, error("content policy violation")), (200, []), (200, chat("", "content_filter")),
        (200, chat(None, refusal="I cannot look at this.")), (200, chat("", "stop")), (200, error("no such image")),
        (200, {"error": "unexpected"}), (200, {"choices": None}), (200, {"choices": []}),
        (200, chat("", "length", reasoning_content=THOUGHT)), (200, chat("<think>it is", "length")), (400, {}),
        (400, b""), (200, {"choices": [{"finish_reason": "stop", "message": None}]}), (200, chat({"no": "text"})),
        (400, b"<p>no</p>"),
    ],
    "passing": [  # once of an image; then it is answered
        (429, error("slow down"), {"Retry-After": "0"}), (503, error("loading"), {"Retry-After": "0.01"}),
        ("close", b""), ("cut", chat()), (500, b"<h1>Internal Server Error</h1>"), (408, error("timeout")),
        (200, b"upstream error"), (504, b""), (429, error("quota"), {"retry-after-ms": "1"}),
        (529, error("overloaded")),
    ],
    "whole server": [
        (401, error("wrong key")), (429, error("a day's limit"), {"Retry-After": "9999"}), (404, error("no model")),
    ],
}  # fmt: skip


def world(seed: int) -> Callable[[dict], tuple]:
    """Replies: each image has its own, chosen by the seed; now and then the whole server fails."""
    rng, said, natures = random.Random(seed), collections.Counter(), {}

    def reply(request: dict) -> tuple:
        said[key := sent_image(request).tobytes()] += 1
        if key not in natures:
            kind = rng.choices(("good", "final", "passing"), (6, 3, 2))[0]
            natures[key] = kind, rng.choice(REPLIES[kind])
        if rng.random() < 0.03:
            return rng.choice(REPLIES["whole server"])
        kind, answer = natures[key]
        return answer if kind != "passing" or said[key] == 1 else (200, chat())

    return reply


def check(place: Path, seed: int) -> list[Row]:
    images, kind = pictures(place / "images", IMAGES), "detailed_description"
    row, ended = (
        Row("servers: images kept or named", "each once"),
        Row("servers: how runs end", "exit 0 to 3, a sentence"),
    )
    for number in range(RUNS):
        out, log, server = place / f"{number}", place / f"{number}.log", FakeServer(world(1000 * seed + number))
        words = ["annotate", images, "--out", out, "--endpoint", server.url, "--mllm", "m", "--batch-size", "4"]
        words = [str(word) for word in (*words, "--kinds", kind, "--timeout", "5")]
        for _ in range(AGAIN):
            status = wait(start(lambda words=words: main(words), log), 90)
            text = log.read_text(errors="replace")
            ended.check(status in (0, 1, 2, 3) and "Traceback" not in text, f"{number}: exit {status}; {text}")
            if status in (0, 3):
                break
        server.close()
        kept = [json.loads(line)["id"] for line in Path(f"{out}.jsonl").read_text(encoding="utf-8").splitlines()]
        rejected = json.loads(Path(f"{out}.rejected.json").read_text(encoding="utf-8"))
        reasons = {name: kinds[kind]["reason"] for name, kinds in rejected.items()}
        for name in (path.name for path in images.iterdir()):
            fine = kept.count(name) + (name in reasons) == 1 and reasons.get(name, "kept").strip()
            row.check(
                bool(fine), f"{number}: {name}: {kept.count(name)} records, rejected: {reasons.get(name)}; {text}"
            )
    return [row, ended]
