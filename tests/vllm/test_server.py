"""vLLM's OpenAI server on our backend, and OpenAI's client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
from servers import server
from tiny_models import make

OURS = [
    "--attention-backend",
    "CUSTOM",
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "1024",
]
PROMPTS = ["def main():\n" * (i + 1) for i in range(16)]
SAMPLED = {"model": "tiny", "max_tokens": 24, "temperature": 1.0}


def complete(client: openai.OpenAI, seed: int) -> str:
    answer = client.completions.create(prompt=PROMPTS[seed], seed=seed, **SAMPLED)
    return answer.choices[0].text


def stream(client: openai.OpenAI, tokens: int = 24) -> Iterator[str]:
    messages = [{"role": "user", "content": "What is a page table?"}]
    settings = SAMPLED | {"max_tokens": tokens, "seed": 1}
    with client.chat.completions.create(messages=messages, stream=True, **settings) as chunks:
        for chunk in chunks:
            yield chunk.choices[0].delta.content or ""


def ask_everything(client: openai.OpenAI) -> list[str]:
    """One completion after another, and a streamed chat."""
    return [*(complete(client, seed) for seed in range(4)), "".join(stream(client))]


def crowd(client: openai.OpenAI) -> tuple[list[str], int]:
    """16 requests at once, every third of which goes away in the middle."""

    def one(i: int) -> str | None:
        if i % 3:
            return complete(client, i)
        chunks = stream(client, tokens=400)
        next(chunks)
        chunks.close()
        return None

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(16)))
    return [text for text in answers if text is not None], answers.count(None)


def test_the_server(folder: Path, tmp_path: Path) -> None:
    model = make("qwen3", folder)
    with server(model, tmp_path / "first", *OURS) as client:
        alone = ask_everything(client)
        many, gone = crowd(client)
        assert ask_everything(client) == alone
    with server(model, tmp_path / "second", *OURS) as client:
        again = ask_everything(client)
    log = (tmp_path / "first").read_text()
    served = [line for line in log.splitlines() if "attention by fa3_ops" in line]
    print(
        f"server: {len(alone)} answers the same before and after {len(many)} others at once, "
        f"of which {gone} more went away, and the same after a restart; {served[0]}"
    )
    assert len(many) == 10
    assert gone == 6
    assert all(many)
    assert again == alone
    assert "flash_attn_kvcache: cpu" in served[0]
    assert len(served) == 1
