"""SPTS written a second time, slowly and plainly, from the method's description: token by token, head by head.

Shares no code with spts_compress. Everything is float64. One prompt (no batch, no padding).
"""

import math

import torch


class Reference:
    """A Llama-like decoder that skips tokens, from a state dict of the exported model; with norms of queries and keys,
    fused projections, partial rotary positions and windows where the model has them. The cache holds what was ever put
    into it, also outside the windows."""

    def __init__(self, state: dict, config, schedule: dict):
        self.c = config
        self.w = {}
        for name, tensor in state.items():
            for part, rows in self.unfused(name, tensor.double()):
                self.w[part] = rows
        self.s = schedule
        self.gemma = "gemma" in config.model_type
        self.d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.scaling = getattr(config, "query_pre_attn_scalar", self.d) ** -0.5
        self.cache: list[dict] = []  # per layer: {"pos": [...], "k": [(G, d)], "v": [(G, d)]}
        self.count = 0
        self.margin = float("inf")  # smallest gap between the last chosen and the first not chosen score

    def unfused(self, name, tensor):
        """A fused projection's rows by the names of the single ones."""
        c = self.c
        if "qkv_proj" in name:
            d = c.hidden_size // c.num_attention_heads
            counts = [d * c.num_attention_heads, d * c.num_key_value_heads, d * c.num_key_value_heads]
            return [
                (name.replace("qkv_proj", f"{n}_proj"), t) for n, t in zip("qkv", tensor.split(counts), strict=True)
            ]
        if "gate_up_proj.weight" in name:
            return [(name.replace("gate_up", n), t) for n, t in zip(("gate", "up"), tensor.chunk(2), strict=True)]
        return [(name, tensor)]

    # -- parts ---------------------------------------------------------------------------------------------------
    def norm_if_there(self, x, name):
        return self.norm(x, name) if name + ".weight" in self.w else x

    def transform(self, x, layer):
        """What the feed-forward network adds to a state, between the norms that the layer has."""
        p = f"model.layers.{layer}."
        if p + "post_feedforward_layernorm.weight" in self.w:
            inner = self.norm_if_there(x, p + "pre_feedforward_layernorm")
            return self.norm(self.ffn(inner, layer), p + "post_feedforward_layernorm")
        return self.ffn(self.norm(x, p + "post_attention_layernorm"), layer)

    def attended(self, out, layer):
        """What attention adds."""
        p = f"model.layers.{layer}."
        made = self.lin(out, p + "self_attn.o_proj")
        behind = p + "post_feedforward_layernorm.weight" in self.w
        return self.norm(made, p + "post_attention_layernorm") if behind else made

    def lin(self, x, name):
        y = self.w[name + ".weight"] @ x
        bias = self.w.get(name + ".bias")
        return y if bias is None else y + bias

    def norm(self, x, name):
        weight = self.w[name + ".weight"]
        return x / torch.sqrt((x * x).mean() + self.c.rms_norm_eps) * (weight + 1 if self.gemma else weight)

    def act(self, x):
        return torch.nn.functional.gelu(x, approximate="tanh") if self.gemma else torch.nn.functional.silu(x)

    def sliding(self, layer):
        """Whether the layer's attention has a window."""
        kinds = getattr(self.c, "layer_types", None)
        return kinds[layer] == "sliding_attention" if kinds else getattr(self.c, "sliding_window", None) is not None

    def sees(self, layer, asking, position):
        """Whether a token sees one at an earlier position, or itself."""
        return not self.sliding(layer) or asking - position < self.c.sliding_window

    def embedded(self, token):
        return self.w["model.embed_tokens.weight"][token] * (math.sqrt(self.c.hidden_size) if self.gemma else 1)

    def rope(self, vector, position, layer):
        told = self.c.rope_parameters
        told = told.get("sliding_attention" if self.sliding(layer) else "full_attention", told)
        turned = int(self.d * told.get("partial_rotary_factor", 1))
        half = turned // 2
        theta = told["rope_theta"]
        out = vector.clone()
        for i in range(half):
            angle = position * theta ** (-2 * i / turned)
            a, b = vector[i], vector[i + half]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def heads(self, x, name, position=None):
        whole, norm = self.lin(x, name), name.replace("_proj", "_norm")
        size = len(self.w.get(norm + ".weight", ()))
        if size:  # of each head, or of all together
            whole = torch.cat([self.norm(part, norm) for part in whole.split(size)])
        parts = whole.view(-1, self.d)
        layer = int(name.split(".")[2])
        return parts if position is None else torch.stack([self.rope(p, position, layer) for p in parts])

    def ffn(self, x, layer):
        if f"model.layers.{layer}.mlp.gate.weight" in self.w:
            return self.routed(x, layer)
        p = f"model.layers.{layer}.mlp."
        return self.lin(self.act(self.lin(x, p + "gate_proj")) * self.lin(x, p + "up_proj"), p + "down_proj")

    def routed(self, x, layer):
        """The most probable experts' outputs, weighed."""
        p = f"model.layers.{layer}.mlp."
        probable = torch.softmax(self.w[p + "gate.weight"] @ x, 0)
        order = sorted(range(len(probable)), key=lambda e: -float(probable[e]))[: self.c.num_experts_per_tok]
        total = sum(probable[e] for e in order) if getattr(self.c, "norm_topk_prob", True) else 1
        made = 0
        for e in order:
            gate, up = (self.w[p + "experts.gate_up_proj"][e] @ x).chunk(2)
            made = made + probable[e] / total * (
                self.w[p + "experts.down_proj"][e] @ (torch.nn.functional.silu(gate) * up)
            )
        return made

    def predicted_norm(self, x, layer):
        """From the residual state in front of the feed-forward norm, whose weight is part of `down`."""
        p = f"model.layers.{layer}.proxy."
        unit = x / torch.sqrt((x * x).mean() + self.c.rms_norm_eps)
        low = self.w[p + "down"] @ unit
        r = low.numel() // 2
        constant, power = self.w[p + "constants"].tolist()
        made = math.exp(float(low[-1]) + float(self.w[p + "square"] @ unit**2) + constant)
        if r:
            product = self.act(self.w[p + "gate"] @ low[:r]) * (self.w[p + "up"] @ low[r:-1])
            made *= math.sqrt(float((product**2).sum())) ** power
        return made

    def attend(self, q, held, layer):
        """Attention of the last of the tokens held: q (H, d) over lists of keys and values (G, d)."""
        group = self.c.num_attention_heads // self.c.num_key_value_heads
        seen = [i for i, position in enumerate(held["pos"]) if self.sees(layer, held["pos"][-1], position)]
        keys, values = [held["k"][i] for i in seen], [held["v"][i] for i in seen]
        out = []
        for h in range(self.c.num_attention_heads):
            logits = torch.stack([(q[h] * k[h // group]).sum() * self.scaling for k in keys])
            p = torch.softmax(logits, 0)
            out.append(sum(p[i] * values[i][h // group] for i in range(len(values))))
        return torch.cat(out)

    # -- selection -----------------------------------------------------------------------------------------------
    def amount(self, amount, n):
        if isinstance(amount, int):
            tokens = amount
        else:
            tokens = max(round(amount.get("fraction", 0) * n), amount.get("floor", 0))
            tokens = tokens if amount.get("cap") is None else min(tokens, amount["cap"])
        always = self.s.get("keep_first", 0) + max(
            self.s.get("keep_last", 1), self.s.get("probe", {}).get("queries", 1)
        )
        return min(n, max(tokens, always))

    def top(self, score, raw, count):
        """Places of the `count` best candidates: always active ones, then by score, raw score, later place."""
        n = len(score)
        first = self.s.get("keep_first", 0)
        last = max(self.s.get("keep_last", 1), self.s.get("probe", {}).get("queries", 1))

        def rank(i):
            return (i < first or i >= n - last, score[i], raw[i], i)

        order = sorted(range(n), key=rank, reverse=True)
        if count < n:
            a, b = order[count - 1], order[count]
            if not rank(a)[0]:
                gap = abs(score[a] - score[b]) / max(abs(score[a]), 1e-300)
                if gap == 0:
                    gap = abs(raw[a] - raw[b]) / max(abs(raw[a]), 1e-300)
                self.margin = min(self.margin, gap if gap > 0 else float("inf"))
        return sorted(order[:count])

    def probe(self, x, keys, positions, layer, carried):
        probe = self.s.get("probe", {})
        w = min(probe.get("queries", 1), len(x))
        group = self.c.num_attention_heads // self.c.num_key_value_heads
        n = len(x)
        per_head = []
        for h in range(self.c.num_attention_heads):
            total = [0.0] * n
            for i in range(n - w, n):
                q = self.heads(x[i], f"model.layers.{layer}.self_attn.q_proj", positions[i])[h]
                seen = [j for j in range(i + 1) if self.sees(layer, positions[i], positions[j])]
                logits = torch.stack([(q * keys[j][h // group]).sum() * self.scaling for j in seen])
                for j, p in zip(seen, torch.softmax(logits, 0).tolist(), strict=True):
                    total[j] += p / w
            per_head.append(total)
        if probe.get("heads", "mean") == "mean":
            raw = [sum(col) / len(per_head) for col in zip(*per_head, strict=True)]
        else:
            raw = [max(col) for col in zip(*per_head, strict=True)]
        if carried is not None:
            raw = [s + probe.get("carry", 0) * carried[p] for s, p in zip(raw, positions, strict=True)]
        reach = probe.get("pool", 1) // 2
        pooled = [max(raw[max(0, i - reach) : i + reach + 1]) for i in range(n)]
        return pooled, raw

    # -- the model -----------------------------------------------------------------------------------------------
    def prefill(self, tokens):
        """Logits after the last token; fills the cache."""
        n = len(tokens)
        x = [self.embedded(t) for t in tokens]
        positions = list(range(n))
        last_budget = carried = None
        pruned = {}
        for layer in range(self.c.num_hidden_layers):
            p = f"model.layers.{layer}."
            normed = [self.norm_if_there(v, p + "input_layernorm") for v in x]
            keys = [self.heads(v, p + "self_attn.k_proj", pos) for v, pos in zip(normed, positions, strict=True)]
            places = range(len(x))
            skipping = layer >= self.s["start"]
            if skipping:
                stage = next((s for s in self.s["stages"] if layer <= s["end"]), self.s["stages"][-1])
                last_budget = min(len(x), self.amount(stage["budget"], n))
                score, raw = self.probe(normed, keys, positions, layer, carried)
                carried = dict(zip(positions, raw, strict=True))
                places = self.top(score, raw, last_budget)
            held = {
                "pos": [positions[i] for i in places],
                "k": [keys[i] for i in places],
                "v": [self.heads(normed[i], p + "self_attn.v_proj") for i in places],
            }
            self.cache.append(held)
            for number, i in enumerate(places):
                q = self.heads(normed[i], p + "self_attn.q_proj", positions[i])
                out = self.attend(q, {name: part[: number + 1] for name, part in held.items()}, layer)
                x[i] = x[i] + self.attended(out, layer)
            places = range(len(x))
            choice = self.s.get("feed_forward", "proxy")
            ffn_budget = len(x)
            if skipping and choice != "all":
                ffn_budget = min(len(x), self.amount(stage.get("ffn_budget") or stage["budget"], n))
            if ffn_budget < len(x):
                change = score
                if choice != "attention":
                    change = [self.predicted_norm(v, layer) * s for v, s in zip(x, score, strict=True)]
                if choice == "relative":
                    size = [torch.sqrt((v * v).mean() + self.c.rms_norm_eps) for v in x]
                    change = [c / float(s) for c, s in zip(change, size, strict=True)]
                places = self.top(change, raw, ffn_budget)
            for i in places:
                x[i] = x[i] + self.transform(x[i], layer)
            if skipping and layer == stage["end"] and stage.get("prune_to") is not None:
                count = min(len(x), self.amount(stage["prune_to"], n))
                keep = self.top(score, raw, count)
                pruned.update({positions[i]: x[i] for i in range(len(x)) if i not in keep})
                x, positions = [x[i] for i in keep], [positions[i] for i in keep]
        self.count = n
        pruned.update(dict(zip(positions, x, strict=True)))
        self.states = [self.norm(pruned[i], "model.norm") for i in range(n)]
        return self.logits(x[-1])

    def step(self, token):
        """Logits after one more token, which sees what each layer's cache holds."""
        position, self.count = self.count, self.count + 1
        x = self.embedded(token)
        for layer in range(self.c.num_hidden_layers):
            p = f"model.layers.{layer}."
            normed = self.norm_if_there(x, p + "input_layernorm")
            held = self.cache[layer]
            held["pos"].append(position)
            held["k"].append(self.heads(normed, p + "self_attn.k_proj", position))
            held["v"].append(self.heads(normed, p + "self_attn.v_proj"))
            q = self.heads(normed, p + "self_attn.q_proj", position)
            x = x + self.attended(self.attend(q, held, layer), layer)
            x = x + self.transform(x, layer)
        return self.logits(x)

    def logits(self, x):
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        made, cap = head @ self.norm(x, "model.norm"), getattr(self.c, "final_logit_softcapping", None)
        return made if cap is None else torch.tanh(made / cap) * cap
