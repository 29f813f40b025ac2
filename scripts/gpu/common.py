"""What the GPU checks share: models made on the spot, a server of several instances, streams that move."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from taichi_serve.bench.client import MANY, Answer, stream

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN_14B = QWEN_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
}


FOUR = ["--p-heavy", "1", "--d-heavy", "3", "--devices", "0;0;0;0"]
DECODERS = ["i1", "i2", "i3"]
ASKED: Counter[int] = Counter()  # what the server said to wishes to move


# A model without weights says what no tokenizer knows, and vLLM's detokenizer then looks at a whole stream
# again for every token of it: only token ids are asked for.
NO_WEIGHTS = ["--load-format", "dummy", "--skip-tokenizer-init"]


def fast_start(share: str = "0.2") -> list[str]:
    """Flags with which several instances start quickly on one GPU and run without eager launches."""
    sizes = [1, 2, 4, 8, 16, 32, 64, 128, 264, 288, 512]
    compilation = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": sizes}
    # Instances on one GPU see each other's memory: they are told what is theirs.
    return ["--gpu-memory-utilization", share, "--compilation-config", json.dumps(compilation)]


def state(url: str) -> dict[str, Any]:
    """GET /taichi/state."""
    data: dict[str, Any] = httpx.get(f"{url}/taichi/state").json()
    return data


def shape(tokenizer_of: Path, config: dict[str, Any], target: Path) -> Path:
    """A model directory of this shape without weights (load_format dummy), with somebody's tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    for path in tokenizer_of.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            shutil.copy(path, target / path.name)
    (target / "config.json").write_text(json.dumps(config))
    return target


@contextlib.contextmanager
def server(model: Path, port: int, log: Path, *flags: str) -> Iterator[str]:
    """`taichi serve` with these flags; yields its URL once it is ready."""
    command = [sys.executable, "-m", "taichi_serve.cli", "serve", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", "m", "--disable-uvicorn-access-log", *flags]
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        while "taichi: ready" not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() - began > 300:
                tail(log)
                raise SystemExit(f"the server did not start (exit code {process.poll()})")
            time.sleep(0.2)
        print(f"ready after {time.monotonic() - began:.0f} s: {' '.join(flags)}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        keep_logs(log.parent)


@contextlib.contextmanager
def vllm(
    model: Path, port: int, log: Path, flags: list[str]
) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """One of vLLM's own servers, starting."""
    module = "vllm.entrypoints.launchers.api_server.entry"
    command = [sys.executable, "-m", module, "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--disable-uvicorn-access-log", *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process, f"http://127.0.0.1:{port}", log
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


def ready(process: subprocess.Popen[bytes], url: str, log: Path) -> str:
    """Wait until it answers; its URL."""
    until = time.monotonic() + 300
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return url
        if process.poll() is not None or time.monotonic() > until:
            tail(log)
            raise SystemExit(f"vLLM's own server did not start (exit code {process.poll()})")
        time.sleep(0.2)


def tail(log: Path, lines: int = 25) -> None:
    """The last lines of a server's log and of its instances' logs."""
    for path in [log, *sorted(Path("/tmp").glob("taichi-*/*.log"))]:
        print(f"--- {path}")
        print("\n".join(path.read_text(errors="replace").splitlines()[-lines:]))


def keep_logs(target: Path) -> None:
    """Copy instance logs, where a failure left them, beside the server's."""
    for path in Path("/tmp").glob("taichi-*/*.log"):
        shutil.copy(path, target / f"{path.parent.name}-{path.name}")


def bodies(count: int, low: int, high: int, outputs: tuple[int, int], seed: int = 0) -> list[dict[str, Any]]:
    """Greedy completions over random token prompts, the same for the same seed."""
    rng = random.Random(seed)
    return [
        {
            "model": "m",
            "prompt": [rng.randrange(300, 4000) for _ in range(rng.randint(low, high))],
            "max_tokens": rng.randint(*outputs),
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        for _ in range(count)
    ]


class Mover:
    """For `stream`: moves a request when it has got to each of these tokens, always to the next of
    `targets`."""

    def __init__(self, client: httpx.AsyncClient, steps: list[int], targets: list[str], number: int) -> None:
        self._client = client
        self._steps = steps
        self._targets = targets
        self._turn = 1 + number % (len(targets) - 1)  # not all of them go the same way round
        self._at = ""

    async def __call__(self, answer: Answer) -> None:
        if not self._steps or len(answer.tokens) < self._steps[0]:
            return
        if not self._at:
            view = (await self._client.get(f"/taichi/requests/{answer.id}")).json()["requests"][0]
            self._at = view["legs"][-1]["instance"]
        here = self._targets.index(self._at) if self._at in self._targets else 0
        to = self._targets[(here + self._turn) % len(self._targets)]
        asked = await self._client.post(f"/taichi/requests/{answer.id}/flow", json={"to": to})
        ASKED[asked.status_code] += 1
        if asked.status_code == 202:
            self._at = to
        if asked.status_code == 202 or "bound" in asked.text:
            self._steps.pop(0)


async def run(
    url: str,
    jobs: list[dict[str, Any]],
    moves: int,
    targets: list[str],
    window: tuple[float, float] = (0.0, 0.67),
) -> list[Answer]:
    """All jobs at once; each is moved `moves` times at random steps within a share of its output."""
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=MANY) as client:
        rng = random.Random(0)

        async def one(job: dict[str, Any], number: int) -> Answer:
            first, last = (int(share * job["max_tokens"]) for share in window)
            steps = sorted(rng.sample(range(max(2, first), last), moves))
            mover = Mover(client, steps, targets, number) if moves else None
            return await stream(client, "/v1/completions", job, mover)

        return await asyncio.gather(*(one(job, number) for number, job in enumerate(jobs)))


async def legs(client: httpx.AsyncClient, answers: list[Answer], kind: str) -> list[dict[str, Any]]:
    """Every leg of these that began with a move of this kind, as the server recorded it."""
    found = []
    for answer in answers:
        for view in (await client.get(f"/taichi/requests/{answer.id}")).json()["requests"]:
            why = {row["leg"]: row["move"] for row in view["log"] if row["type"] in ("Flow", "Decode")}
            moved = [leg for leg in view["legs"] if leg["gap"] is not None and why.get(leg["leg"]) == kind]
            found += [{**leg, "request": view["id"]} for leg in moved]
    return found


def out_directory() -> Path:
    """Where logs and figures go."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OUT", "/tmp/taichi-gpu"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def kv_of_each() -> str:
    """KV of each of four 7B instances on one card, as a flag of vLLM: 6 GB, or 3 where the card is small."""
    word = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    total = int(subprocess.check_output(word, text=True).split()[0])  # MiB
    return "6G" if total > 100_000 else "3G"
