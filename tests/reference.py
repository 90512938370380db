"""SPTS written a second time, slowly and plainly, from the method's description: token by token, head by head.

Shares no code with spts_compress. Everything is float64. One prompt (no batch, no padding).
"""

import math

import torch


class Reference:
    """A Llama-like decoder that skips tokens, from a state dict of the exported model; with norms of queries and keys,
    fused projections, partial rotary positions, experts, latent attention and windows where the model has them. The
    cache holds what was ever put into it, also outside the windows."""

    def __init__(self, state: dict, config, schedule: dict):
        self.c = config
        self.w = {}
        for name, tensor in state.items():
            for part, rows in self.unfused(name, tensor.double()):
                self.w[part] = rows
        self.s = schedule
        self.gemma = "gemma" in config.model_type
        self.d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.latent = hasattr(config, "kv_lora_rank")
        if self.latent:
            self.d = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.scaling = getattr(config, "query_pre_attn_scalar", self.d) ** -0.5
        self.cache: list[dict] = []  # per layer: {"pos": [...], "k": [(G, d)], "v": [(G, d)]}, or of latents
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
        return self.norm_if_there(self.ffn(self.ffn_input(x, layer), layer), p + "post_feedforward_layernorm")

    def ffn_input(self, x, layer):
        p = f"model.layers.{layer}."
        if p + "post_feedforward_layernorm.weight" in self.w:
            return self.norm_if_there(x, p + "pre_feedforward_layernorm")
        return self.norm(x, p + "post_attention_layernorm")

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
        angles = [position * told["rope_theta"] ** (-2 * i / turned) for i in range(turned // 2)]
        cos, sin = (vector.new_tensor([f(angle) for angle in angles]) for f in (math.cos, math.sin))
        a, b = vector[:turned].chunk(2)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, vector[turned:]])

    def heads(self, x, name, position=None):
        whole, norm = self.lin(x, name), name.replace("_proj", "_norm")
        size = len(self.w.get(norm + ".weight", ()))
        if size:  # of each head, or of all together
            whole = torch.cat([self.norm(part, norm) for part in whole.split(size)])
        parts = whole.view(-1, self.d)
        layer = int(name.split(".")[2])
        return parts if position is None else torch.stack([self.rope(p, position, layer) for p in parts])

    def query(self, x, layer, position):
        """One token's queries, (H, d)."""
        p = f"model.layers.{layer}.self_attn."
        if not self.latent:
            return self.heads(x, p + "q_proj", position)
        if p + "q_proj.weight" in self.w:
            made = self.lin(x, p + "q_proj")
        else:
            made = self.lin(self.norm(self.lin(x, p + "q_a_proj"), p + "q_a_layernorm"), p + "q_b_proj")
        still = self.c.qk_nope_head_dim
        return torch.stack([torch.cat([q[:still], self.turn(q[still:], position)]) for q in made.view(-1, self.d)])

    def held(self, x, layer, position):
        """What one token puts into a layer's cache."""
        p = f"model.layers.{layer}.self_attn."
        if not self.latent:
            return self.heads(x, p + "k_proj", position), self.heads(x, p + "v_proj")
        made, rank = self.lin(x, p + "kv_a_proj_with_mqa"), self.c.kv_lora_rank
        return self.norm(made[:rank], p + "kv_a_layernorm")[None], self.turn(made[rank:], position)[None]

    def read(self, k, v, layer):
        """Keys and values of every query head, (H, .), from what the cache holds of a token."""
        if not self.latent:
            group = self.c.num_attention_heads // self.c.num_key_value_heads
            return k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        made = self.lin(k[0], f"model.layers.{layer}.self_attn.kv_b_proj").view(self.c.num_attention_heads, -1)
        still = self.c.qk_nope_head_dim
        return torch.stack([torch.cat([m[:still], v[0]]) for m in made]), made[:, still:]

    def turn(self, vector, position):
        """Rotary positions of DeepSeek: neighbours turn together. V3 then puts all first ones in front of all second
        ones, or has them there from the start."""
        size = len(vector)
        paired = getattr(self.c, "rope_interleave", True)
        firsts, seconds = (vector[0::2], vector[1::2]) if paired else vector.chunk(2)
        angles = [position * self.c.rope_parameters["rope_theta"] ** (-2 * i / size) for i in range(size // 2)]
        cos = vector.new_tensor([math.cos(angle) for angle in angles])
        sin = vector.new_tensor([math.sin(angle) for angle in angles])
        made = [firsts * cos - seconds * sin, seconds * cos + firsts * sin]
        return torch.stack(made, 1).flatten() if self.c.model_type.endswith("v2") else torch.cat(made)

    def ffn(self, x, layer):
        if f"model.layers.{layer}.mlp.gate.weight" in self.w:
            return self.routed(x, layer)
        return self.plain(x, f"model.layers.{layer}.mlp.")

    def plain(self, x, p):
        return self.lin(self.act(self.lin(x, p + "gate_proj")) * self.lin(x, p + "up_proj"), p + "down_proj")

    def routed(self, x, layer):
        """The chosen experts' outputs, weighed, and the shared one's."""
        p = f"model.layers.{layer}.mlp."
        logits, bias = self.w[p + "gate.weight"] @ x, self.w.get(p + "gate.e_score_correction_bias")
        probable = torch.softmax(logits, 0) if bias is None else torch.sigmoid(logits)
        wanted = (probable if bias is None else probable + bias).tolist()
        allowed = range(len(wanted))
        if getattr(self.c, "n_group", None):  # experts of the best groups only, each judged by its best one or two
            size = len(wanted) // self.c.n_group
            groups = [range(g * size, g * size + size) for g in range(self.c.n_group)]
            groups.sort(key=lambda g: -sum(sorted(wanted[e] for e in g)[-1 if bias is None else -2 :]))
            allowed = [e for g in groups[: self.c.topk_group] for e in g]
        order = sorted(allowed, key=lambda e: -wanted[e])[: self.c.num_experts_per_tok]
        normed = getattr(self.c, "norm_topk_prob", True)
        total = sum(probable[e] for e in order) if normed else 1
        total = total / getattr(self.c, "routed_scaling_factor", 1)
        shared = p + "shared_experts."
        made = self.plain(x, shared) if shared + "up_proj.weight" in self.w else 0
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

    def update(self, x, layer, part):
        """What a layer is estimated to add to a token that it skips; what is added to one that probes."""
        p = f"model.layers.{layer}.{part}_update."
        estimate = self.w[p + "bias"]
        return estimate + self.w[p + "up"] @ (self.w[p + "down"] @ x) if p + "up" in self.w else estimate

    def attend(self, q, seen):
        """One token's attention: q (H, d) over a list of keys and values of all heads (H, .)."""
        keys, values = (torch.stack(parts) for parts in zip(*seen, strict=True))
        weights = torch.softmax((keys * q).sum(-1) * self.scaling, 0)
        return (weights[..., None] * values).sum(0).flatten()

    # -- selection -----------------------------------------------------------------------------------------------
    def amount(self, amount, n):
        if isinstance(amount, int):
            tokens = amount
        else:
            tokens = max(round(amount.get("fraction", 0) * n), amount.get("floor", 0))
            tokens = tokens if amount.get("cap") is None else min(tokens, amount["cap"])
        always = self.s.get("sink_tokens", 0) + max(
            self.s.get("recent_tokens", 1), self.s.get("probe", {}).get("window_size", 1)
        )
        return min(n, max(tokens, always))

    def top(self, score, raw, count):
        """Places of the `count` best candidates: always active ones, then by score, raw score, later place."""
        n = len(score)
        first = self.s.get("sink_tokens", 0)
        last = max(self.s.get("recent_tokens", 1), self.s.get("probe", {}).get("window_size", 1))

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
        w = min(probe.get("window_size", 1), len(x))
        n = len(x)
        per_head = []
        for h in range(self.c.num_attention_heads):
            total = [0.0] * n
            for i in range(n - w, n):
                asking = x[i] + self.update(x[i], layer, "probe") if probe.get("rank") else x[i]
                q = self.query(asking, layer, positions[i])[h]
                seen = [j for j in range(i + 1) if self.sees(layer, positions[i], positions[j])]
                logits = torch.stack([(q * keys[j][h]).sum() * self.scaling for j in seen])
                for j, p in zip(seen, torch.softmax(logits, 0).tolist(), strict=True):
                    total[j] += p / w
            per_head.append(total)
        heads = probe.get("heads", "mean")
        if not isinstance(heads, str):
            own = [per_head[head] for head in heads.get(str(layer), ())]
            if not own:
                raw = [carried[p] for p in positions]
                return self.pooled(raw), raw
            raw = [sum(col) / len(own) for col in zip(*own, strict=True)]
        elif heads == "mean":
            raw = [sum(col) / len(per_head) for col in zip(*per_head, strict=True)]
        else:
            raw = [max(col) for col in zip(*per_head, strict=True)]
        if carried is not None:
            raw = [s + probe.get("score_carry", 0) * carried[p] for s, p in zip(raw, positions, strict=True)]
        return self.pooled(raw), raw

    def pooled(self, raw):
        reach = self.s.get("probe", {}).get("kernel_size", 1) // 2
        return [max(raw[max(0, i - reach) : i + reach + 1]) for i in range(len(raw))]

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
            pairs = [self.held(v, layer, pos) for v, pos in zip(normed, positions, strict=True)]
            seen = [self.read(*pair, layer) for pair in pairs]
            places = cached = range(len(x))
            skipping = layer >= self.s["start"]
            if skipping:
                stage = next((s for s in self.s["stages"] if layer <= s["end"]), self.s["stages"][-1])
                last_budget = min(len(x), self.amount(stage["budget"], n))
                score, raw = self.probe(normed, [k for k, _ in seen], positions, layer, carried)
                carried = dict(zip(positions, raw, strict=True))
                places = self.top(score, raw, last_budget)
                share = self.s.get("kv")
                more = len(places) if share is None else max(len(places), round(share * n))
                cached = self.top(score, raw, min(len(x), more))
            held = {
                "pos": [positions[i] for i in cached],
                "k": [pairs[i][0] for i in cached],
                "v": [pairs[i][1] for i in cached],
            }
            self.cache.append(held)
            for i in set(range(len(x))) - set(places) if self.s.get("update") else ():
                x[i] = x[i] + self.update(normed[i], layer, "attention")
            for number, i in enumerate(places):
                q = self.query(normed[i], layer, positions[i])
                before = [j for j in places[: number + 1] if self.sees(layer, positions[i], positions[j])]
                out = self.attend(q, [seen[j] for j in before])
                x[i] = x[i] + self.attended(out, layer)
            places = range(len(x))
            choice = self.s.get("ffn_selection", "proxy")
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
            for i in range(len(x)):
                if i in places:
                    x[i] = x[i] + self.transform(x[i], layer)
                elif self.s.get("update"):
                    x[i] = x[i] + self.update(self.ffn_input(x[i], layer), layer, "ffn")
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
            for name, made in zip("kv", self.held(normed, layer, position), strict=True):
                held[name].append(made)
            seen = [
                self.read(k, v, layer)
                for at, k, v in zip(*held.values(), strict=True)
                if self.sees(layer, position, at)
            ]
            x = x + self.attended(self.attend(self.query(normed, layer, position), seen), layer)
            x = x + self.transform(x, layer)
        return self.logits(x)

    def logits(self, x):
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        made, cap = head @ self.norm(x, "model.norm"), getattr(self.c, "final_logit_softcapping", None)
        return made if cap is None else torch.tanh(made / cap) * cap
