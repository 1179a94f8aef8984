"""Trains a small GPT on packed text, then generates text through a paged KV cache.

    python examples/train_and_generate.py
    python examples/train_and_generate.py --text book.txt --steps 1000 --prompt "It was"

All attention is torch.ops.fa3npu (see gpt.py): flash_attn_varlen_func trains, and
flash_attn_with_kvcache generates, first in eager mode, then in a step that torch.compile captures
whole. At the end the same text must come from both, and from a computation without a cache; on an
accelerator in float32 also from the CPU.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Read when torch is imported: OpenMP threads that spin for long starve others on shared cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.nn.functional as F
from documents import load_documents, pieces_of, show_progress
from gpt import GPT, Config, Packed, PagedCache
from torch import Tensor

PROMPTS = ('The "for" statement', "A class definition ", "object.__getitem__(")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# How much logits of about 10 may differ between eager, compiled and recomputed.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}

DecodeStep = Callable[[Tensor, PagedCache], Tensor]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="file to learn from (default: Python's manual)")
    parser.add_argument("--device", help="npu, cuda or cpu (default: the first of them there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on cpu, else bfloat16")
    parser.add_argument(
        "--backend",
        choices=("inductor", "aot_eager", "npugraph_ex", "ge"),
        help="of torch.compile; ge is torchair's graph (default: inductor, on npu npugraph_ex)",
    )
    parser.add_argument(
        "--run-eagerly", action="store_true", help="ge: build the graph, run the step without it"
    )
    parser.add_argument("--steps", type=int, default=900, help="of training (default: 900)")
    parser.add_argument("--batch", type=int, default=512, help="tokens per training step")
    parser.add_argument("--tokens", type=int, default=128, help="to generate per prompt")
    parser.add_argument("--prompt", action="append", help="repeatable; any lengths")
    parser.add_argument("--temperature", type=float, default=0.5, help="0 is greedy (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def default_device() -> str:
    for name in ("npu", "cuda"):
        if hasattr(torch, name) and getattr(torch, name).is_available():
            return name
    return "cpu"


def compile_step(step: DecodeStep, args: argparse.Namespace, device: torch.device) -> DecodeStep:
    backend: Any = args.backend or ("npugraph_ex" if device.type == "npu" else "inductor")
    if backend == "ge":
        import torchair

        config = torchair.CompilerConfig()
        config.debug.run_eagerly = args.run_eagerly
        backend = torchair.get_npu_backend(compiler_config=config)
    compiled: DecodeStep = torch.compile(step, backend=backend, fullgraph=True)
    return compiled


def packed_batch(
    documents: Sequence[Tensor], total: int, model: GPT, rng: random.Random
) -> tuple[Tensor, Tensor, Packed]:
    """Pieces of documents of different lengths, `total` tokens in all, without padding."""
    device = model.embedding.weight.device
    pieces = pieces_of(documents, total, model.config.context, rng)
    tokens = torch.cat([piece[:-1] for piece in pieces]).to(device)
    targets = torch.cat([piece[1:] for piece in pieces]).to(device)
    return tokens, targets, Packed.of([len(piece) - 1 for piece in pieces], device)


def train(
    model: GPT, documents: Sequence[Tensor], args: argparse.Namespace, dtype: torch.dtype
) -> None:
    steps, rng = args.steps, random.Random(args.seed)
    fused = model.embedding.weight.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=fused
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1 - step / (steps + 1))
    )
    smooth, start = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        tokens, targets, packed = packed_batch(documents, args.batch, model, rng)
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(tokens, packed).float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        rate = step * args.batch / (time.perf_counter() - start)
        show_progress(step, steps, f"step {step}/{steps}  loss {smooth:.3f}  {rate:,.0f} tokens/s")


@torch.no_grad()
def mean_loss(model: GPT, documents: Sequence[Tensor]) -> float:
    """Cross entropy in nats per byte over the same pieces at every call."""
    rng = random.Random(0)
    losses = []
    for _ in range(4):
        tokens, targets, packed = packed_batch(documents, 1024, model, rng)
        losses.append(F.cross_entropy(model(tokens, packed), targets).item())
    return sum(losses) / len(losses)


class Generated(NamedTuple):
    tokens: Tensor  # (batch_size, n_tokens)
    logits: Tensor  # that they were chosen from
    rate: float  # tokens per second


@torch.no_grad()
def generate(model: GPT, decode: DecodeStep, prompts: Sequence[Tensor], noise: Tensor) -> Generated:
    """Continues all prompts at once; each next token is argmax(logits + noise)."""
    weight = model.embedding.weight
    cache = PagedCache.empty(model.config, len(prompts), weight.dtype, weight.device)
    # Prefill: all prompts in one ragged call.
    packed = Packed.of([len(prompt) for prompt in prompts], weight.device)
    last = packed.cu_seqlens[1:] - 1
    logits = [model(torch.cat(list(prompts)), packed, cache)[last]]
    tokens = [(logits[0] + noise[:, 0]).argmax(-1)]
    cache.cache_seqlens += packed.cu_seqlens.diff()
    start = time.perf_counter()
    for i in range(1, noise.shape[1]):
        cache.plan(model.config)
        # A captured graph writes its next result over this one.
        logits.append(decode(tokens[-1], cache).clone())
        tokens.append((logits[-1] + noise[:, i]).argmax(-1))
    texts = torch.stack(tokens, dim=1).cpu()  # waits for the device
    rate = tokens[0].numel() * (len(tokens) - 1) / (time.perf_counter() - start)
    return Generated(texts, torch.stack(logits, dim=1).float().cpu(), rate)


@torch.no_grad()
def recompute(model: GPT, prompts: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """The logits of every generated token from the whole sequences at once, without a cache."""
    device = model.embedding.weight.device
    sequences = [
        torch.cat((prompt, row[:-1].to(device)))
        for prompt, row in zip(prompts, tokens, strict=True)
    ]
    lengths = [len(sequence) for sequence in sequences]
    logits = model(torch.cat(sequences), Packed.of(lengths, device)).split(lengths)
    return torch.stack([rows[-tokens.shape[1] :] for rows in logits]).float().cpu()


def decoding(model: GPT) -> DecodeStep:
    def decode(tokens: Tensor, cache: PagedCache) -> Tensor:
        """One token for every sequence; the operator appends its key and value to the cache."""
        logits: Tensor = model(tokens.unsqueeze(1), cache=cache).squeeze(1)
        cache.cache_seqlens += 1
        return logits

    return decode


def same_as_cpu(model: GPT, prompts: Sequence[Tensor], eager: Generated, noise: Tensor) -> bool:
    """Whether the CPU generates the same tokens with the same weights and noise."""
    model = copy.deepcopy(model).cpu()
    generated = generate(model, decoding(model), [p.cpu() for p in prompts], noise.cpu())
    same = torch.equal(generated.tokens, eager.tokens)
    difference = float((generated.logits - eager.logits)[:, 0].abs().max())
    print(
        f"same tokens as on cpu: {'yes' if same else 'NO'} ({eager.tokens.numel()} tokens); "
        f"logits of the prompts differ by at most {difference:.1e}"
    )
    return same


def check(
    model: GPT,
    prompts: Sequence[Tensor],
    eager: Generated,
    compiled: Generated,
    noise: Tensor,
) -> bool:
    """Whether eager decoding, compiled decoding and a computation without a cache agree."""
    tokens, logits, _ = eager
    recomputed = recompute(model, prompts, tokens)
    chosen = (recomputed + noise.cpu()).argmax(-1)
    same = torch.equal(tokens, chosen) and torch.equal(tokens, compiled.tokens)
    # Where a text has gone another way, only what was computed from the same tokens compares.
    common = (tokens == compiled.tokens).cumprod(1).roll(1, dims=1)
    common[:, 0] = 1
    difference = max(
        float((logits - recomputed).abs().max()),
        float(((logits - compiled.logits).abs().amax(-1) * common).max()),
    )
    dtype = model.embedding.weight.dtype
    # In bfloat16 two logits are often equal, and such a tie may fall either way.
    agree = difference < TOLERANCE[dtype] and (same or dtype != torch.float32)
    print(
        f"eager = compiled = recomputed: {'yes' if agree else 'NO'}"
        f"{', but for ties' if agree and not same else ''} "
        f"({len(prompts)} prompts x {tokens.shape[1]} tokens); "
        f"logits differ by at most {difference:.1e}"
    )
    return agree


def main(argv: Sequence[str] | None = None) -> int:
    start = time.perf_counter()
    args = arguments(argv)
    device = torch.device(args.device or default_device())
    dtype = DTYPES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    torch.manual_seed(args.seed)

    config = Config()
    model = GPT(config).to(device)
    name, documents = load_documents(args.text)
    cuts = [len(document) * 15 // 16 for document in documents]  # what is behind is held out
    training = [d[:cut] for d, cut in zip(documents, cuts, strict=True) if cut > 1]
    held_out = [d[cut:] for d, cut in zip(documents, cuts, strict=True) if len(d) - cut > 1]
    if not held_out:
        raise SystemExit(f"{name} is too short to learn from")
    texts = args.prompt or PROMPTS
    prompts = [torch.tensor(list(text.encode()), device=device) for text in texts]
    for text, prompt in zip(texts, prompts, strict=True):
        if args.tokens < 1 or not 0 < len(prompt) <= config.context - args.tokens:
            raise SystemExit(f"prompt and tokens must fit in {config.context}, got {text!r}")

    on = f"cpu, {torch.ops.fa3npu.cpu_capability()}" if device.type == "cpu" else str(device)
    print(
        f"device    {on}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads\n"
        f"model     {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{config.n_layers} layers, {config.nheads} heads of {config.headdim}, "
        f"{config.nheads_k} of keys\n"
        f"text      {name}: {len(documents)} documents, {sum(map(len, documents)):,} bytes\n"
        f"training  {args.steps} steps of {args.batch:,} tokens"
    )
    before = mean_loss(model, training), mean_loss(model, held_out)
    train(model, training, args, dtype)
    after = mean_loss(model, training), mean_loss(model, held_out)
    print(
        f"loss      training {before[0]:.3f} -> {after[0]:.3f}, "
        f"held out {before[1]:.3f} -> {after[1]:.3f} nats per byte"
    )

    model.to(dtype).eval()

    decode = decoding(model)
    # argmax(logits + noise) draws from softmax(logits / temperature), the same for equal logits.
    noise = torch.empty(len(prompts), args.tokens, config.vocab_size).exponential_().log()
    noise = (-args.temperature * noise).to(device)
    compiled_decode = compile_step(decode, args, device)
    compiling = time.perf_counter()
    generate(model, compiled_decode, prompts, noise[:, :2])
    compiling = time.perf_counter() - compiling
    eager = generate(model, decode, prompts, noise)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled = generate(model, compiled_decode, prompts, noise)

    for text, row in zip(texts, compiled.tokens, strict=True):
        print(f"\n--- {text!r} and {args.tokens} tokens")
        print(f"{text}{bytes(row.tolist()).decode(errors='replace')}".rstrip())
    print(
        f"\ndecoding: eager {eager.rate:,.0f} tokens/s, compiled {compiled.rate:,.0f} tokens/s "
        f"(compiled in {compiling:.0f} s)"
    )
    agree = check(model, prompts, eager, compiled, noise)
    if device.type != "cpu" and dtype == torch.float32:
        agree = same_as_cpu(model, prompts, eager, noise) and agree
    print(f"total: {time.perf_counter() - start:.0f} s")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
