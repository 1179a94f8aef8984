"""The forward kernel of flash_attn_npu for Ascend 910."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .memory import Memory, tree_sum
from .tiling import (
    BAND,
    CAUSAL,
    KV_TILE,
    NO_MASK,
    Q_TILE,
    UNBOUNDED,
    ceil_div,
    head_blocks,
    kv_tiles,
    tasks,
)

MASKED = -3e38  # added to a score: not -inf, so a row of these alone gives the mean of v


@dataclass
class Kernel:
    """One launch. mask and softcap are the template arguments that the host chooses; the other
    parameters are read from t. kind names the kernel: "910", "950", or "0.2" and "0.3" for Ascend
    910 as of those releases."""

    t: np.ndarray
    q: Memory
    k: Memory
    v: Memory
    out: Memory
    lse: Memory
    cu_q: Memory | None
    kv_lens: Memory
    page_table: Memory | None
    k_new: Memory | None
    v_new: Memory | None
    mask: int
    softcap: bool
    partials_cleared: bool
    kind: str = "910"

    def run(self) -> None:
        t = self.t
        self.group = int(t["heads"]) // int(t["heads_k"])
        self.dim, self.dim_v = int(t["headdim"]), int(t["headdim_v"])
        self.partials: dict[int, tuple[Tensor, Tensor]] = {}
        self.fills: list[Tensor] = []
        if t["flash_decode"]:
            for core in t["core"][: int(t["cores_used"])]:
                self._run_core(core)
        else:
            self._run_tasks()
        for address in self.fills:  # of several cores that race, these come last
            self.lse[address] = math.inf
        if t["flash_decode"]:
            for cut in t["cut"][: int(t["cuts_used"])]:
                self._merge(cut)

    def _run_tasks(self) -> None:
        t = self.t
        b, before, after = 0, 0, int(t["first_tasks"])
        for task in range(int(t["tasks"])):
            while task >= after:
                b, before = b + 1, after
                after += tasks(self._q_rows(b)[1], self.group, int(t["heads_k"]))
            per_row_block = head_blocks(self._q_rows(b)[1], self.group)[1] * int(t["heads_k"])
            self._task(b, (task - before) % per_row_block, (task - before) // per_row_block)

    def _run_core(self, core: np.ndarray) -> None:
        start = int(core["start_b"]), int(core["start_n"])
        end = int(core["end_b"]), int(core["end_n"])
        partial = int(core["partial"])
        for b in range(start[0], end[0] + 1):
            q_len = self._q_rows(b)[1]
            _, old, _ = self._kv_rows(b)
            n_tiles = kv_tiles(old, int(self.t["new"]))
            blocks = head_blocks(q_len, self.group)[1] * int(self.t["heads_k"])
            first_n = start[1] if b == start[0] else 0
            last_n = end[1] if b == end[0] else blocks - 1
            for n in range(first_n, last_n + 1):
                for s in range(1 if (b, n) == end else ceil_div(q_len, Q_TILE)):
                    first = int(core["start_tile"]) if (b, n, s) == (*start, 0) else 0
                    last = int(core["end_tile"]) if (b, n) == end else n_tiles
                    cut = 0 < last - first < n_tiles
                    rows = self._task(b, n, s, (first, last), partial if cut else None)
                    partial += rows if cut else 0

    def _q_rows(self, b: int) -> tuple[int, int]:
        """(first row, rows) of sequence b in q, out and LSE."""
        if self.cu_q is None:
            return b * int(self.t["max_q"]), int(self.t["max_q"])
        first, end = self.cu_q.integer(b), self.cu_q.integer(b + 1)
        absolute = self.kind in ("910", "0.3")
        return first - (0 if absolute else self.cu_q.integer(0)), end - first

    def _kv_rows(self, b: int) -> tuple[int, int, int]:
        """(first row in an unpaged cache, rows before the append, rows of all)."""
        new = int(self.t["new"])
        length = self.kv_lens.integer(b)
        if self.page_table is not None:
            first = 0
        elif self.cu_q is None and self.kind == "910":  # as if all were as long as the first
            first = self.kv_lens.integer(0) * b
        elif self.cu_q is None:
            first = sum(self.kv_lens.integer(i) for i in range(b))
        else:
            first, length = length, self.kv_lens.integer(b + 1) - length
        return b * int(self.t["capacity"]) if new else first, length, length + new

    def _cache_rows(self, b: int, positions: Tensor) -> Tensor:
        if self.page_table is None:
            return self._kv_rows(b)[0] + positions
        size = int(self.t["page_size"])
        pages = self.page_table[b * int(self.t["pages_per_row"]) + positions // size]
        return pages.long() * size + positions % size

    def _address(self, rows: Tensor, heads: int, head: int | Tensor, dim: int) -> Tensor:
        """Elements of (row, head), in a dense (rows, heads, dim)."""
        return ((rows * heads + head) * dim)[..., None] + torch.arange(dim)

    def _lse_address(self, b: int, head: int, row: int) -> tuple[int, int]:
        """(address, step between heads)."""
        first, _ = self._q_rows(b)
        heads, max_q = int(self.t["heads"]), int(self.t["max_q"])
        if self.kind == "0.2":
            return (first + row) * heads + head, 1
        if self.cu_q is None:
            return first * heads + head * max_q + row, max_q
        total = self.cu_q.integer(int(self.t["batch"]))
        return head * total + first + row, total

    def _task(
        self,
        b: int,
        n: int,
        s: int,
        segment: tuple[int, int] | None = None,
        partial: int | None = None,
    ) -> int:
        """Rows [s * 128, ...) of head block n of sequence b; flash-decode gives a segment of kv
        tiles, and a place for the partial result if this is not all of them."""
        t = self.t
        q_first, q_len = self._q_rows(b)
        _, old, kv_len = self._kv_rows(b)
        block, per_group = head_blocks(q_len, self.group)
        head_k = n // per_group
        head = head_k * self.group + n % per_group * block
        heads = min(block, (head_k + 1) * self.group - head)
        rows = min(Q_TILE, q_len - s * Q_TILE)

        first, keys, blind = 0, kv_len, 0  # blind: the rows before it see no key
        shift = kv_len - q_len
        left, right = int(t["window_left"]), int(t["window_right"])
        if t["mask"] == CAUSAL:
            keys = min(max((s + 1) * Q_TILE + shift, 0), kv_len)
            blind = -shift
            if self.kind in ("0.2", "0.3"):
                # The diagonal ends at the keys in use, and is lost if too few.
                wraps = shift if self.kind == "0.3" else (s + 1) * Q_TILE + shift
                keys = kv_len if wraps < 0 else keys
                shift = kv_len if rows > keys else keys - rows - s * Q_TILE
                blind = 0
        elif t["mask"] == BAND:
            if left != UNBOUNDED:
                first = max(s * Q_TILE + shift - left, 0) // KV_TILE
            end = ceil_div(s * Q_TILE + rows + shift + right, KV_TILE) * KV_TILE
            keys = min(kv_len, end) if end > 0 else kv_len
            blind = -shift - right
        tiles = [(i, min(i + KV_TILE, keys), False) for i in range(0, min(keys, old), KV_TILE)]
        if t["new"]:
            tiles = [(i, min(i + KV_TILE, old), False) for i in range(0, old, KV_TILE)]
            tiles += [(i, min(i + KV_TILE, kv_len), True) for i in range(old, kv_len, KV_TILE)]
        last = len(tiles)
        if segment is not None:
            first = segment[0] if self.kind == "0.3" else max(first, segment[0])
            if segment[1] != kv_tiles(old, int(t["new"])):
                last = min(last, segment[1])
        if first >= last:
            unwritten = self.kind == "0.2" or (self.kind == "0.3" and t["mask"] != BAND)
            if partial is None and not unwritten:
                self._clear(b, head, heads, s * Q_TILE, rows)
            return heads * rows

        q_rows = q_first + s * Q_TILE + torch.arange(rows)[:, None]
        address = self._address(q_rows, int(t["heads"]), head + torch.arange(heads), self.dim)
        q = self.q[address].float().flatten(0, 1)
        row = (s * Q_TILE + torch.arange(rows)).repeat_interleave(heads)
        state = None
        writes_back = s == b % ceil_div(q_len, Q_TILE)
        for start, stop, appended in tiles[first:last]:
            k, v = self._load(b, head_k, start, stop, old if appended else None, writes_back)
            state = self._step(state, q, k, v, self._hidden(row + shift, start, stop))
        m, total, acc = state
        out, lse = acc / total[:, None], total.log() + m
        if partial is not None:
            self.partials[partial] = (out, lse)
            return heads * rows
        if segment is None:  # flash-decode forgets to
            out[row < blind] = 0.0
            lse[row < blind] = math.inf
        self._store(b, head, heads, s * Q_TILE, rows, out, lse)
        return heads * rows

    def _load(
        self, b: int, head_k: int, start: int, stop: int, old: int | None, writes_back: bool
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [start, stop) of a kv head. With old they come from k_new and v_new,
        and one of the row blocks also writes them to the cache."""
        heads_k, positions = int(self.t["heads_k"]), torch.arange(start, stop)
        rows = self._cache_rows(b, positions)
        cached = self._address(rows, heads_k, head_k, self.dim)
        if old is None:
            return self.k[cached], self.v[self._address(rows, heads_k, head_k, self.dim_v)]
        rows = b * int(self.t["new"]) + positions - old
        fresh = self._address(rows, heads_k, head_k, self.dim)
        k, v = self.k_new[fresh], self.v_new[fresh]
        if writes_back:
            self.k[cached], self.v[cached] = k, v
        return k, v

    def _hidden(self, diagonal: Tensor, start: int, stop: int) -> Tensor | None:
        """(rows * heads, keys of the tile), true where the row may not look."""
        t, i, j = self.t, diagonal[:, None], torch.arange(start, stop)
        if self.mask == CAUSAL:
            return j > i
        if self.mask == NO_MASK or t["mask"] != BAND:
            return None
        hidden = j > i + int(t["window_right"])
        left = int(t["window_left"])
        if self.kind == "0.3" and stop <= int(diagonal[0]) - left:
            return hidden  # a tile before the window, which only flash-decode does not skip
        if left != UNBOUNDED:
            hidden |= j < i - left
        return hidden

    def _step(
        self,
        state: tuple[Tensor, Tensor, Tensor] | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Online softmax over one tile. A row's bits do not depend on the other rows, nor on
        masked keys: all sums are trees over a tile of 512."""
        width = len(k)
        scores = q.new_zeros(len(q), KV_TILE)
        for r in range(len(q)):
            scores[r, :width] = tree_sum(q[r] * k.float(), 1)
        scores *= float(self.t["scale"])
        if self.softcap:
            scores = torch.tanh(scores) * float(self.t["softcap"])
        if hidden is not None:
            scores[:, :width] += hidden * MASKED
        scores[:, width:] = -math.inf
        m = scores.max(1).values
        if state is not None:
            m = torch.maximum(m, state[0])
        p = torch.exp(scores - m[:, None])
        total = tree_sum(p, 1)
        p, v = p[:, :width].to(v.dtype).float(), v.float()
        padding = v.new_zeros(KV_TILE - width, self.dim_v)
        acc = torch.stack([tree_sum(torch.cat([p_row[:, None] * v, padding]), 0) for p_row in p])
        if state is not None:
            decay = torch.exp(state[0] - m)
            total, acc = state[1] * decay + total, state[2] * decay[:, None] + acc
        return m, total, acc

    def _store(
        self, b: int, head: int, heads: int, row: int, rows: int, out: Tensor, lse: Tensor
    ) -> None:
        """out (rows * heads, headdim) and lse (rows * heads), rows outermost."""
        at = self._q_rows(b)[0] + row + torch.arange(rows)[:, None]
        columns = head + torch.arange(heads)
        address = self._address(at, int(self.t["heads"]), columns, self.dim_v)
        self.out[address] = out.view(rows, heads, -1)
        base, step = self._lse_address(b, head, row)
        row_step = int(self.t["heads"]) if self.kind == "0.2" else 1
        at = base + torch.arange(rows)[:, None] * row_step + torch.arange(heads) * step
        self.lse[at] = lse.view(rows, heads)

    def _clear(self, b: int, head: int, heads: int, row: int, rows: int) -> None:
        """No key at all: out becomes 0, and LSE +inf, by two vector cores with half the heads
        each. On 910 each fills as if the LSE of its heads were contiguous."""
        if self.kind == "950":
            blank = torch.zeros(rows * heads, self.dim_v), torch.full((rows * heads,), math.inf)
            self._store(b, head, heads, row, rows, *blank)
            return
        at = self._q_rows(b)[0] + row + torch.arange(rows)[:, None]
        columns = head + torch.arange(heads)
        self.out[self._address(at, int(self.t["heads"]), columns, self.dim_v)] = 0.0
        for first, count in ((0, heads // 2), (heads // 2, heads - heads // 2)):
            base, _ = self._lse_address(b, head + first, row)
            self.fills.append(base + torch.arange(count * rows))

    def _merge(self, cut: np.ndarray) -> None:
        b, head, heads, rows, pieces, partial = (int(x) for x in cut.item())
        # A piece that nobody computed: neutral if the host cleared the workspace, else garbage.
        blank = (0.0, -math.inf) if self.partials_cleared else (math.nan, math.nan)
        parts = []
        for i in range(pieces):
            part = self.partials.get(partial + i * heads * rows)
            if part is None or len(part[0]) != heads * rows:
                part = (
                    torch.full((heads * rows, self.dim_v), blank[0]),
                    torch.full((heads * rows,), blank[1]),
                )
            parts.append(part)
        lses = torch.stack([lse for _, lse in parts])
        m = lses.max(0).values
        total = torch.zeros_like(m)
        for lse in lses:
            total = total + torch.exp(lse - m)
        lse = total.log() + m
        out = torch.zeros(heads * rows, self.dim_v)
        for part, part_lse in parts:
            out = out + part * torch.exp(part_lse - lse)[:, None]
        self._store(b, head, heads, 0, rows, out, lse)
