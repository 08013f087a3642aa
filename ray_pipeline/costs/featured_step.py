"""What a step takes by software with given features, in arithmetic: no device, no schedule played.

`timing` plans what this engine does, with one share of the peak for all of a step. Here products, attention, passes
over memory and messages are apart, since a feature changes some of them alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_pipeline.costs.expert_rows import reached
from ray_pipeline.costs.features import (
    ATTENTION,
    GROUPED,
    HIDDEN,
    MEMORY,
    OPTIMIZER,
    SCORE_PASSES,
    SLOWER,
    SPEEDS,
    Features,
)
from ray_pipeline.costs.hardware_table import Hardware
from ray_pipeline.costs.weights import head_weight, layer_weights, mtp_projection, part_weights
from ray_pipeline.costs.workload import BF16, Workload
from ray_pipeline.errors import UserError

Times = dict[str, float]


@dataclass(frozen=True)
class _MicroBatch:
    """Seconds of one on a rank by kind: forward, backward, and what backward computes again."""

    forward: Times = field(default_factory=dict)
    backward: Times = field(default_factory=dict)
    again: Times = field(default_factory=dict)

    def total(self) -> float:
        return sum(sum(part.values()) for part in self._parts())

    def plus(self, other: _MicroBatch, times: float = 1.0) -> _MicroBatch:
        """Both, the other so many times."""
        pairs = zip(self._parts(), other._parts(), strict=True)
        return _MicroBatch(*({key: a.get(key, 0.0) + times * b.get(key, 0.0) for key in a | b} for a, b in pairs))

    def seen(self, shares: Times, other: float) -> _MicroBatch:
        """Each kind times its share, the others times `other`."""
        return _MicroBatch(*({key: s * shares.get(key, other) for key, s in part.items()} for part in self._parts()))

    def kinds(self) -> Times:
        """What is computed again is one of them."""
        both = {key: seconds + self.backward[key] for key, seconds in self.forward.items()}
        return both | {"computed again": sum(self.again.values())}

    def _parts(self) -> tuple[Times, Times, Times]:
        return self.forward, self.backward, self.again


@dataclass(frozen=True)
class Explained:
    """A step in seconds, and what the busiest rank spends them on."""

    seconds: float
    shares: Times


class FeaturedStep:
    """One optimizer step of `work` on `hardware` by software with `features`.

    Of the layout its sizes are read, and whether it is dualpipev; else `features.chunks` stages are interleaved.

    Raises:
        UserError: naming the devices whose speeds are known.
    """

    def __init__(self, work: Workload, hardware: Hardware, features: Features) -> None:
        if hardware.name not in SPEEDS:
            known = ", ".join(SPEEDS)
            raise UserError(f"{hardware.name}: its sustained speeds are not known. Use one of {known}.")
        self.work, self.hardware, self.features, self.speeds = work, hardware, features, SPEEDS[hardware.name]
        self.model, self.layout = work.model, work.layout
        self.modules = self.model.num_nextn_predict_layers if work.trains_mtp else 0
        self.tokens = work.tokens_at_once  # of all ranks of a tensor-parallel group
        self.own = self.tokens / self.layout.tp
        self.memory = MEMORY * self.speeds.memory
        self.intra, self.inter = hardware.intra * hardware.links, hardware.inter * hardware.links

    def explain(self) -> Explained:
        """All micro-batches of the busiest rank, the pipeline's idle time, and the update."""
        n, pp = self.work.micro_batches, self.layout.pp
        whole = self._whole()
        busiest = self._busiest(whole)
        if self.layout.schedule == "dualpipev":  # (pp / 2 - 1) (F&B + B - 3W): arXiv:2412.19437, table 2
            backward, weights = sum(busiest.backward.values()), busiest.forward["products"]
            idle = (pp / 2 - 1) * (busiest.total() + backward - 3 * weights)
        else:  # (pp - 1) (F + B) / chunks: arXiv:2104.04473, §2.2.2
            idle = (pp - 1) * whole.total() / pp / self.features.chunks
        shares = {kind: n * seconds for kind, seconds in busiest.kinds().items()}
        shares |= {"idle in the pipeline": idle, "gradients and update": self._update(busiest)}
        return Explained(sum(shares.values()), shares)

    def _whole(self) -> _MicroBatch:
        """All layers, as if one rank had them."""
        total = self._tail()
        for layer in range(self.model.num_hidden_layers):
            total = total.plus(self._layer(layer))
        return total

    def _busiest(self, whole: _MicroBatch) -> _MicroBatch:
        """Of the pipeline's ranks the one with the head, or one of the others."""
        pp, last = self.layout.pp, self.features.last_layers
        if last is None or pp == 1:
            return _MicroBatch().plus(whole, 1 / pp)
        with_head = self._tail().plus(self._layer(self.model.num_hidden_layers - 1), last)
        others = _MicroBatch().plus(whole, 1 / (pp - 1)).plus(with_head, -1 / (pp - 1))
        return max(with_head, others, key=_MicroBatch.total)

    def _tail(self) -> _MicroBatch:
        """MTP modules, and the head for the model and each of them: in bf16, and logits are read and written."""
        heads = 1 + self.modules
        flops = 2 * (heads * head_weight(self.model).count + self.modules * mtp_projection(self.model).count)
        products = self.own * flops / (self.speeds.sustained * self.speeds.bf16)
        forward = {"products": products, "memory": self.own * heads * 2 * BF16 * self.model.vocab_size / self.memory}
        total = _MicroBatch(forward, {kind: 2 * seconds for kind, seconds in forward.items()})
        for layer in self.model.mtp_layers[: self.modules]:
            total = total.plus(self._layer(layer))
        return total

    def _layer(self, layer: int) -> _MicroBatch:
        features, weights = self.features, layer_weights(self.model, layer)
        routed = sum(weight.active for weight in weights if weight.kind == "routed experts")
        dense = sum(weight.active for weight in weights if weight.kind not in ("routed experts", "norms"))
        attention, scores = self._attention()
        forward = {
            "products": self._products(dense + routed / GROUPED), "attention": attention,
            "memory": self._passes(layer) + scores, **self._messages(layer),
        }  # fmt: skip
        backward = {kind: 2 * seconds for kind, seconds in forward.items()}
        backward["attention"] = (2.5 if features.fused_attention else 2) * attention
        backward["dispatch"] = forward["dispatch"]
        # The input of every sublayer is gathered once more, for the gradient of its weights.
        backward["messages of tp"] = 1.5 * forward["messages of tp"]
        again: Times = {}
        if features.recomputes == "all":
            again = dict(forward)
        elif features.recomputes == "attention":
            again = {"attention": attention, "memory": scores}
        elif features.recomputes == "cheap":
            norms = self.own * BF16 * 4 * self.model.hidden_size / self.memory
            again = {"products": self._products(self._up_projections()), "memory": norms}
        return self._hide(_MicroBatch(forward, backward, again))

    def _hide(self, layer: _MicroBatch) -> _MicroBatch:
        """Without what goes beside computing: micro-batches in pairs, which the first and the last ones are not."""
        features, layout = self.features, self.layout
        shown, slower = {"dispatch": 1.0, "messages of tp": 1 / layout.tp if features.overlaps_tp else 1.0}, 1.0
        if features.overlaps_dispatch:
            dual = layout.schedule == "dualpipev"
            paired = max(0.0, 1 - layout.pp / self.work.micro_batches)
            shown["dispatch"] -= paired * (1.0 if dual else HIDDEN)
            slower = SLOWER if dual else 1.0
        return layer.seen(shown, slower)

    def _products(self, weights: float) -> float:
        speed = self.speeds.fp8 if self.features.fp8 else self.speeds.bf16
        return self.own * 2 * weights / (self.speeds.sustained * speed)

    def _up_projections(self) -> int:
        """Weights from the latents to heads."""
        model, heads = self.model, self.model.num_attention_heads
        if not model.is_latent:
            return 0
        keys = model.kv_lora_rank * (model.qk_nope_head_dim + model.v_head_dim)
        return heads * ((model.q_lora_rank or 0) * model.qk_head_dim + keys)

    def _attention(self) -> tuple[float, float]:
        """Seconds of attention's core, and of passes over scores in memory."""
        model, seq, fused = self.model, self.work.seq_len, self.features.fused_attention
        rows = model.num_attention_heads * self.own
        core = 2 * rows * (model.qk_head_dim + model.value_head_dim) * (seq / 2 if fused else seq)
        scores = 0.0 if fused else SCORE_PASSES * rows * seq * BF16 / self.memory
        return core / (ATTENTION * self.hardware.bf16), scores

    def _passes(self, layer: int) -> float:
        """Seconds of reading and writing around products, each operation fused with its neighbours."""
        model, heads, hidden = self.model, self.model.num_attention_heads, self.model.hidden_size
        moe, keys = model.is_moe_layer(layer), heads if model.is_latent else model.num_kv_heads
        chosen = model.num_experts_per_tok if moe else 0
        inner = model.moe_intermediate_size * (chosen + model.n_shared_experts) if moe else model.intermediate_size
        stream = 2 * (2 + 3) * hidden  # two norms, two sums with the residual stream
        stream *= 1 if self.features.sequence_parallel else self.layout.tp
        turned = 2 * (heads * model.qk_head_dim + keys * (model.qk_head_dim + model.value_head_dim))
        gated, copied = 3 * inner, 4 * chosen * hidden  # rows into experts' order, and back
        sizes: float = BF16 * (stream + turned + gated + copied)
        if self.features.fp8:  # what products read, in bf16, is written as it is and transposed
            sizes += 2 * BF16 * (hidden + heads * model.value_head_dim + max(1, chosen) * hidden + inner)
        return self.own * sizes / self.memory

    def _messages(self, layer: int) -> Times:
        """Forward, before any is hidden. A pipeline's go beside computing."""
        moe = self.model.is_moe_layer(layer)
        sublayers = 1 if moe and self.features.sequence_parallel else 2
        ring = self.tokens * self.model.hidden_size * BF16 * (1 - 1 / self.layout.tp)
        dispatch = self._dispatch() if moe and self.layout.ep > 1 else 0.0
        return {"messages of tp": sublayers * 2 * ring / self.intra, "dispatch": dispatch}

    def _dispatch(self) -> float:
        """To experts and back, over both kinds of link at once; ranks of experts are neighbours."""
        model, features = self.model, self.features
        nodes = -(-self.layout.ep // self.hardware.node)
        chosen = model.num_experts_per_tok
        within: float = chosen
        away = chosen * (1 - 1 / nodes)
        if features.dispatch == "by node":
            away = reached(model, nodes) * (1 - 1 / nodes)
        else:
            within = chosen / nodes
        row = model.hidden_size * ((1 if features.fp8_dispatch else BF16) + BF16)
        tokens = self.own if features.sequence_parallel else self.tokens
        return tokens * row * max(away / self.inter, within / self.intra)

    def _update(self, rank: _MicroBatch) -> float:
        """Reduce gradients and bring weights together, both in bf16; and the optimizer's passes over memory."""
        layout, seconds, sent = self.layout, 0.0, 0.0
        weights = part_weights(self.model, range(self.model.num_hidden_layers))
        for expert in (False, True):
            cut = layout.pp * (layout.ep if expert else layout.tp)
            held, replicas = sum(w.count for w in weights if w.expert == expert) / cut, layout.gpus // cut
            seconds += held * (2 * BF16 + OPTIMIZER / replicas) / self.memory
            sent += BF16 * held * (1 - 1 / replicas) / self.inter
        if not self.features.overlaps_gradients:
            return seconds + 2 * sent
        return seconds + sum(max(0.0, sent - sum(beside.values())) for beside in (rank.forward, rank.backward))
