"""The ledger: what one prefill and one decoded token cost, part by part, and the bytes of the KV cache.

Conventions, the same everywhere: a multiply-accumulate (MAC) is two FLOPs; attention is counted dense, without
the half that a causal mask would save; softmax, norms, activations, biases and embeddings are not counted, as in
`torch.utils.flop_counter`; the LM head runs on the last position of a prompt, as in `generate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.errors import UnsupportedModelError
from ..core.signals import Kind, Signal

PARTS = ("vision", "projector", "selector", "decoder", "lm_head")


@dataclass(frozen=True, order=True)
class Ops:
    """An amount of arithmetic: `macs` multiply-accumulates, `flops` = 2 x macs."""

    macs: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.macs

    def __add__(self, other: Ops) -> Ops:
        return Ops(self.macs + other.macs)

    def __mul__(self, times: int) -> Ops:
        return Ops(self.macs * times)


@dataclass(frozen=True)
class LinearAttention:
    """Layers that keep one state a head in place of keys and values (the gated delta rule), read in chunks.

    Args:
        layers: which layers of a stack.
        n_key_heads, n_value_heads: queries and keys have as many heads as keys; states as many as values.
        key_dim, value_dim: widths of a head.
        kernel: tokens that the convolution before it sees.
        chunk: tokens that are computed together; a prompt is padded to whole chunks.
    """

    layers: frozenset[int]
    n_key_heads: int
    n_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int = 4
    chunk: int = 64

    def mixer(self, width: int, n_query: int) -> Ops:
        """All of a layer but its MLP, on `n_query` tokens."""
        values = self.n_value_heads * self.value_dim
        mixed = 2 * self.n_key_heads * self.key_dim + values
        projections = width * (mixed + 2 * values + 2 * self.n_value_heads)  # with a gate, two scalars a head, output
        state = 3 * self.key_dim * self.value_dim  # read twice, written once
        if n_query == 1:
            return Ops(projections + mixed * self.kernel + self.n_value_heads * state)
        padded = -(-n_query // self.chunk) * self.chunk
        inside = self.chunk * (2 * self.key_dim + self.value_dim)
        convolved = (n_query + self.kernel - 1) * mixed * self.kernel
        return Ops(n_query * projections + convolved + padded * self.n_value_heads * (state + inside))


@dataclass(frozen=True)
class Stack:
    """A stack of transformer layers.

    Args:
        n_layers: how many run.
        width: of the hidden states.
        mlp_width: of the MLP.
        n_heads, n_kv_heads: query heads, and key and value heads (fewer under grouped-query attention).
        head_dim: width of a head.
        gated: three MLP matrices (SwiGLU and its kin) or two.
        n_windowed: layers whose queries see only `window` keys.
        window: tokens.
        linear: of layers with linear attention, where there are some.
        gated_attention: queries come with a gate for what attention gives, of the same width.
    """

    n_layers: int
    width: int
    mlp_width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    gated: bool = True
    n_windowed: int = 0
    window: int = 0
    linear: LinearAttention | None = None
    gated_attention: bool = False

    def layer(self, n_query: int, n_key: int) -> Ops:
        """One layer on `n_query` tokens whose attention runs over `n_key` tokens."""
        inner = self.n_heads * self.head_dim
        n_inner = 3 if self.gated_attention else 2
        projections = n_inner * self.width * inner + 2 * self.width * self.n_kv_heads * self.head_dim
        return Ops(n_query * (projections + self.mlp) + 2 * n_query * n_key * inner)

    @property
    def mlp(self) -> int:
        """Multiply-accumulates of the MLP on a token."""
        return (3 if self.gated else 2) * self.width * self.mlp_width

    def at(self, layer: int, n_query: int, n_key: int) -> Ops:
        """The layer of this index."""
        if not self.is_linear(layer):
            return self.layer(n_query, n_key)
        return self.linear.mixer(self.width, n_query) + Ops(n_query * self.mlp)  # type: ignore[union-attr]

    def is_linear(self, layer: int) -> bool:
        """Whether the layer of this index keeps a state in place of keys and values."""
        return self.linear is not None and layer in self.linear.layers

    def all_layers(self, n_tokens: int) -> Ops:
        """Every layer on the same tokens."""
        if self.linear is not None:
            return sum((self.at(i, n_tokens, n_tokens) for i in range(self.n_layers)), Ops())
        windowed = self.layer(n_tokens, self.window) * self.n_windowed
        return self.layer(n_tokens, n_tokens) * (self.n_layers - self.n_windowed) + windowed

    def kv_bytes(self, bytes_per_value: int = 2) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.n_kv_heads * self.head_dim * bytes_per_value


@dataclass(frozen=True)
class Vision:
    """A vision tower, by crop.

    Args:
        stack: all layers that run, including those after the one whose features are used.
        n_patches: patches of a crop.
        n_special: special tokens, such as [CLS].
        patch_values: pixel values of a patch, 3 x 14 x 14 for instance.
        pooling_head: SigLIP's attention-pooling head, which runs although its output is not used.
    """

    stack: Stack
    n_patches: int
    n_special: int
    patch_values: int
    pooling_head: bool = False

    def crop(self, n_patches: int | None = None) -> Ops:
        """One crop, of `n_patches` patches if given."""
        n_patches = self.n_patches if n_patches is None else n_patches
        n_tokens, s = n_patches + self.n_special, self.stack
        head = s.width * (2 * s.width + 2 * n_tokens * s.width + 2 * n_tokens + 2 * s.mlp_width)
        embedding = n_patches * self.patch_values * s.width
        return s.all_layers(n_tokens) + Ops(embedding + (head if self.pooling_head else 0))

    def signals(self, signals: Iterable[Signal], n_patches: int | None = None) -> Ops:
        """Collecting signals from the tower's queries and keys, one crop; see `tokprune.core.attention`."""
        n_patches = self.n_patches if n_patches is None else n_patches
        n_tokens, inner = n_patches + self.n_special, self.stack.n_heads * self.stack.head_dim
        products = set()  # (layer, what is multiplied): received and given share their softmax rows
        for s in signals:
            n_keys = n_patches if s.special == "none" else n_tokens
            n_queries = n_tokens if s.special == "both" else n_patches
            way = (s.form, s.heads, s.special)
            for layer in s.layers:
                if s.kind is Kind.CLS_ROW:
                    products.add((layer, *way, "cls", n_keys))
                elif s.kind is Kind.KEYS:
                    continue  # what the tower computes anyway
                elif s.form == "logits":
                    products.add((layer, *way, s.kind.value, n_patches))
                else:
                    products.add((layer, *way, "map", n_queries * n_keys))
        return Ops(inner * sum(p[-1] for p in products))


def decoder_signals(stack: Stack, signals: Iterable[Signal], layer: int, n_columns: int, n_text: int) -> Ops:
    """Computing signals for a cut before a decoder layer, of one row of a batch; see `tokprune.core.attention`.

    Args:
        stack: the decoder.
        signals: what is asked for.
        layer: the first that sees fewer columns; scores from this layer need its keys computed in advance.
        n_columns: of the row at the cut.
        n_text: tokens of text, for signals about all of them.
    """
    inner = stack.n_heads * stack.head_dim
    products: set[tuple] = set()
    for s in signals:
        queries = {Kind.LM_ROW: 1, Kind.LM_MASS: 1, Kind.LM_TEXT_ROWS: n_text}.get(s.kind, 0)
        for at in s.layers:
            products.add((at, s.kind is Kind.LM_TEXT_ROWS, queries * inner * n_columns))
            if at == layer and s.kind is not Kind.LM_TEXT_STATES:  # those are there
                ahead = queries * inner + n_columns * stack.n_kv_heads * stack.head_dim
                products.add((at, "ahead", ahead * stack.width))
    return Ops(sum(p[-1] for p in products))


@dataclass(frozen=True)
class Shape:
    """The sizes of a multimodal model that its cost depends on.

    Args:
        name: for tables.
        vision: the tower.
        projector: widths from the tower to the language model, (1024, 4096, 4096) for two layers.
        n_rows: rows of a crop that the projector runs on.
        n_visual: visual tokens of a crop.
        text: the decoder layers of the language model.
        vocabulary: rows of the LM head.
        any_size: the tower takes a picture of any size as one crop; numbers per crop are those of one size.
        token_side: pixels a side of what a visual token shows, if `any_size`; 0 where it is not known.
        frames_a_step: frames of a video that share their tokens.
        gated_projector: half of the projector's last inner width gates the other half (SwiGLU).
        takes_cells: the tower can run on a part of a picture's patches.
        n_projectors: projectors that run on every row; several if features of several tower layers are used.
    """

    name: str
    vision: Vision
    projector: tuple[int, ...]
    n_rows: int
    n_visual: int
    text: Stack
    vocabulary: int
    any_size: bool = False
    token_side: int = 0
    frames_a_step: int = 1
    n_projectors: int = 1
    gated_projector: bool = False
    takes_cells: bool = False

    def project(self, n_rows: int) -> Ops:
        """The projector on `n_rows` rows."""
        one = sum(a * b for a, b in zip(self.projector, self.projector[1:], strict=False))
        if self.gated_projector:
            one -= self.projector[-2] // 2 * self.projector[-1]
        return Ops(n_rows * self.n_projectors * one)

    @property
    def lm_head(self) -> Ops:
        return Ops(self.vocabulary * self.text.width)

    def encode(self, crops: int = 1, n_patches: int | None = None, selector: Ops | None = None) -> Ledger:
        """Tower, projector and selector of one picture.

        Args:
            crops: that the tower encodes.
            n_patches: of a crop, where they differ from the configuration's.
            selector: what a method computes for this picture.
        """
        n_rows = self.n_rows if n_patches is None else round(self.n_rows * n_patches / self.vision.n_patches)
        return Ledger(
            vision=self.vision.crop(n_patches) * crops,
            projector=self.project(n_rows) * crops,
            selector=selector or Ops(),
            layers=(Ops(),) * self.text.n_layers,
        )

    def read(
        self, columns: int | Sequence[int], *, rows: int = 1, past: int | Sequence[int] = 0, bytes_per_value: int = 2
    ) -> Ledger:
        """Decoder layers and LM head on a prompt.

        Args:
            columns: tokens, text and visual, in every decoder layer, or one count per layer.
            rows: rows of the batch; `columns` is then the padded width.
            past: tokens already in the KV cache, in every layer or one count per layer.
            bytes_per_value: 2 in half precision, 4 in float32.
        """
        pairs = list(zip(self._per_layer(columns), self._per_layer(past), strict=True))
        return Ledger(
            layers=tuple(self.text.at(i, n, n + before) * rows for i, (n, before) in enumerate(pairs)),
            lm_head=self.lm_head * rows,
            kv_bytes=sum(
                self.text.kv_bytes(bytes_per_value) * n * rows
                for i, (n, _) in enumerate(pairs)
                if not self.text.is_linear(i)
            ),
        )

    def picture(self, n_visual: int, crops: int | None = None, signals: Iterable[Signal] = ()) -> Ledger:
        """Encoding a picture of `n_visual` tokens: that many crops (or frames), or one picture of that size."""
        if self.any_size:
            crops = crops or 1
            n_patches: int | None = round(self.vision.n_patches * n_visual / (self.n_visual * crops))
        else:
            crops, n_patches = crops or -(-n_visual // self.n_visual), None
        selector = self.vision.signals(signals, n_patches) * crops
        return self.encode(crops, n_patches, selector)

    def tokens_of(self, width: int, height: int, n_frames: int = 0) -> tuple[int, int]:
        """Visual tokens of a picture, or of a video with so many frames, and the crops (or steps of time) they are in.

        The processor's limits on the number of pixels are not known here: give the size that it resizes to.

        Raises:
            UnsupportedModelError: the size is not what decides.
        """
        if not self.token_side:
            raise UnsupportedModelError(
                f"{self.name} cuts pictures into crops of one size: use --crops or --visual instead of --pixels"
            )
        steps = -(-n_frames // self.frames_a_step) if n_frames else 1
        rows, columns = (max(1, round(side / self.token_side)) for side in (height, width))
        return steps * rows * columns, steps

    def prefill(
        self,
        columns: int | Sequence[int],
        *,
        crops: int = 1,
        n_patches: int | None = None,
        signals: Iterable[Signal] = (),
        rows: int = 1,
        bytes_per_value: int = 2,
    ) -> Ledger:
        """One picture and its prompt, up to the first token; arguments as in `encode` and `read`."""
        selector = self.vision.signals(signals, n_patches) * crops
        encoded = self.encode(crops, n_patches, selector)
        return encoded + self.read(columns, rows=rows, bytes_per_value=bytes_per_value)

    def decode(self, past: int | Sequence[int], rows: int = 1) -> Ops:
        """One decoded token after `past` tokens in the KV cache, LM head included."""
        steps = (self.text.at(i, 1, n + 1) * rows for i, n in enumerate(self._per_layer(past)))
        return sum(steps, self.lm_head * rows)

    def _per_layer(self, count: int | Sequence[int]) -> list[int]:
        return [count] * self.text.n_layers if isinstance(count, int) else list(count)


@dataclass(frozen=True, repr=False)
class Ledger:
    """The cost of one prefill by part, and the size of its KV cache; ledgers of several passes add up.

    Args:
        layers: decoder layers of the language model, one entry each.
        vision, projector, selector: before the language model.
        lm_head: on the last position.
        kv_bytes: keys and values of the prompt; the states of linear attention, which do not grow, are not counted.
    """

    layers: tuple[Ops, ...]
    vision: Ops = Ops()
    projector: Ops = Ops()
    selector: Ops = Ops()
    lm_head: Ops = Ops()
    kv_bytes: int = 0

    @property
    def decoder(self) -> Ops:
        return sum(self.layers, Ops())

    @property
    def llm(self) -> Ops:
        """Decoder layers and LM head: the "LLM FLOPs" of reports and tables."""
        return self.decoder + self.lm_head

    @property
    def before_llm(self) -> Ops:
        """Vision tower and projector, which pruning after them cannot save."""
        return self.vision + self.projector

    @property
    def prefill(self) -> Ops:
        """Everything up to the first token."""
        return self.before_llm + self.selector + self.llm

    def part(self, name: str) -> Ops:
        return getattr(self, name)

    def __repr__(self):
        parts = ", ".join(f"{name} {self.part(name).flops:.4g}" for name in PARTS)
        return f"Ledger(FLOPs: {parts}; {len(self.layers)} decoder layers, KV cache {self.kv_bytes} bytes)"

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(
            layers=tuple(a + b for a, b in zip(self.layers, other.layers, strict=True)),
            vision=self.vision + other.vision,
            projector=self.projector + other.projector,
            selector=self.selector + other.selector,
            lm_head=self.lm_head + other.lm_head,
            kv_bytes=self.kv_bytes + other.kv_bytes,
        )


# ------------------------------------------------------------------------------------- papers' formulas


def fastv_macs(stack: Stack, n_tokens: int) -> Ops:
    """FastV's and DivPrune's formula, L(4nd^2 + 2n^2d + 2ndm): MACs, and two of the three MLP matrices of a LLaMA.

    Neither grouped-query attention nor the LM head is in it; the papers print its value as FLOPs.
    """
    n, d, m = n_tokens, stack.width, stack.mlp_width
    return Ops(stack.n_layers * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m))


def sparsevlm_macs(stack: Stack, n_tokens: int) -> Ops:
    """SparseVLM's and PyramidDrop's formula, L(4nd^2 + 2n^2d + 3ndm): MACs, printed as FLOPs.

    With n = 576 and no text it is the 3.82 T often quoted for LLaVA-1.5-7B.
    """
    n, d, m = n_tokens, stack.width, stack.mlp_width
    return Ops(stack.n_layers * (4 * n * d * d + 2 * n * n * d + 3 * n * d * m))


COMPAT = {"FastV": fastv_macs, "SparseVLM": sparsevlm_macs}
