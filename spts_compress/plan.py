"""What a recipe would do, before any long work: its values for one model, what they need, and all of it as text."""

from dataclasses import astuple
from typing import Any

from .cost import LayerShape, has_experts, layer_costs, predicted, proxy_flop_fraction, suitable_proxy
from .modeling.configuration_spts import Proxy, Schedule
from .modeling.stock_layer import layer_windows
from .recipe import DistillSection, ProxySection, Recipe, SearchSection
from .utils.errors import UserError
from .utils.tables import size, table

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def complete(recipe: Recipe, config: Any, context: int) -> Recipe:
    """The recipe with values that suit the model in place of those it does not give: lengths cut to a `context` of so
    many tokens, and the size of the proxies."""

    def filled(section: Any, **values: Any) -> Any:
        return section.model_copy(update={k: v for k, v in values.items() if k not in section.model_fields_set})

    lengths = [length for length in recipe.report.lengths if length <= context] or [context]
    calibration = filled(recipe.calibration, length=min(recipe.calibration.length, context))
    proxy, report = recipe.proxy, filled(recipe.report, lengths=lengths)
    if plain := [layer for layer in range(config.num_hidden_layers) if not has_experts(config, layer)]:
        shape = LayerShape.of(config, plain[0])
        size_ = suitable_proxy(shape, proxy.max_flop_fraction, proxy.channels, proxy.rank)
        proxy = proxy.model_copy(update={"channels": size_.channels, "rank": size_.rank})
    queries, windows = recipe.queries, layer_windows(config)
    most = min(context, max(window or context for window in windows)) - queries.following
    queries = filled(queries, length=max(512, min(queries.length, most)))
    return recipe.model_copy(update={"calibration": calibration, "proxy": proxy, "report": report, "queries": queries})


def proxy_sizes(config: Any, section: ProxySection, start: int = 0) -> dict[int, Proxy]:
    """The largest proxy of each layer, of a complete recipe; among experts it is the regression.

    Raises:
        UserError: if a size costs more than its share of the dense network, or there is nothing to make it of, in a
            layer from `start` on.
    """
    full = Proxy(section.channels or 1, section.rank or 0)
    sizes = {n: Proxy(1, 0) if has_experts(config, n) else full for n in range(config.num_hidden_layers)}
    if has_experts(config) and not section.regression:
        raise UserError("proxy.regression is false, but experts share no matrices that another proxy is made of")
    plain = [n for n in range(start, config.num_hidden_layers) if not has_experts(config, n)]
    if not plain:
        return sizes
    if not full.rank and not section.regression:
        raise UserError("proxy.regression is false, and no rank is within proxy.max_flop_fraction; give a proxy.rank")
    fraction = proxy_flop_fraction(config.hidden_size, LayerShape.of(config, plain[0]).intermediate, full)
    if full.rank and fraction > section.max_flop_fraction:
        fits = int(full.rank * section.max_flop_fraction / fraction)
        raise UserError(
            f"proxy: {full.channels} channels and rank {full.rank} cost {fraction:.1%} of the FLOPs of the dense "
            f"feed-forward network, proxy.max_flop_fraction allows {section.max_flop_fraction:.1%}: "
            f"take a rank of at most {fits}, or raise proxy.max_flop_fraction"
        )
    return sizes


def parameters(config: Any) -> int:
    """Number of parameters of the dense model, without norms and biases."""
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    return sum(LayerShape.of(config, layer).weights for layer in range(config.num_hidden_layers)) + embeddings


def proxy_parameters(config: Any, schedule: Schedule) -> int:
    """Number of parameters of all that is fitted."""
    layers, hidden = range(schedule.start, config.num_hidden_layers), config.hidden_size
    sizes = [schedule.proxy_of(layer) for layer in layers if schedule.proxy]
    ranks = [rank for layer in layers if schedule.update for rank in astuple(schedule.update_of(layer))]
    proxies = sum(2 * size_.rank * (hidden + size_.channels) + 2 * hidden + 1 for size_ in sizes)
    ranks += [schedule.probe.rank] * len(layers) if schedule.probe.rank else []
    return proxies + sum((2 * rank + 1) * hidden for rank in ranks)


def _counts(tokens: tuple[int, int, int, int]) -> str:
    entering, active, changed, cached = tokens
    ffn = f", FFN {changed}" if changed != active else ""
    return f"{active} of {entering}{ffn}" + (f", KV {cached}" if cached > active else "")


def schedule_table(config: Any, schedule: Schedule, lengths: list[int]) -> str:
    """Candidates and active tokens per layer (those of the FFN where they differ, those cached where they are more);
    equal layers share a row."""
    columns = [layer_costs(config, schedule, length) for length in lengths]
    counts = list(
        zip(*[[(c.candidates_in, c.active, c.ffn_tokens, c.cached) for c in column] for column in columns], strict=True)
    )
    rows, first = [], 0
    for layer in range(1, len(counts) + 1):
        if layer == len(counts) or counts[layer] != counts[first]:
            name = f"{first}" if layer == first + 1 else f"{first}-{layer - 1}"
            rows.append([name, *map(_counts, counts[first])])
            first = layer
    return table(["layers", *(f"{n} tokens" for n in lengths)], rows)


def prediction_table(config: Any, schedule: Schedule, lengths: list[int]) -> str:
    rows = []
    for length in lengths:
        p = predicted(config, schedule, length)
        rows.append([length, f"{p['speedup']:.2f}x", f"{p['kv_share']:.1%}", f"{p['probing_share']:.1%}"])
    return table(["prompt", "FLOPs, dense / SPTS", "KV cache kept", "probing share"], rows)


def disk_need(
    config: Any, schedule: Schedule, dtype: str, tokens: int, search: SearchSection | None, weights: int | None
) -> int:
    """Bytes a run writes at most: the `weights`, of as many bytes if that is known, the proxies twice, two sets of
    hidden states, and the dense states of the search's prompts before every layer where skipping may begin."""
    proxies, states = proxy_parameters(config, schedule), 2 * tokens
    if search is not None:
        places = {*search.start_layers(config.num_hidden_layers), schedule.start}
        states += 2 * len(places) * len(search.kinds) * search.prompts * sum(search.lengths)
    weights = BYTES[dtype] * parameters(config) if weights is None else weights
    return weights + BYTES[dtype] * states * config.hidden_size + (4 + BYTES[dtype]) * proxies


def memory_need(config: Any, dtype: str, tokens: int, device: str, distill: DistillSection | None) -> int:
    """Bytes of one layer's calibration: its states in the model's type thrice, and in float32 with the regression's
    features, and its feed-forward network in float32; or of what all layers, and the logits, keep for the gradient of a
    step of distillation; on a GPU the weights, too. On a CPU they are pages of the files, which the system reads again
    where memory is short."""
    weights = 0 if device == "cpu" else BYTES[dtype] * parameters(config)
    shapes, step = [LayerShape.of(config, number) for number in range(config.num_hidden_layers)], 0
    width = max(shape.intermediate for shape in shapes)
    layer = 5 * 4 * config.hidden_size * width + (3 * BYTES[dtype] + 20) * tokens * config.hidden_size
    if distill is not None:
        states = sum(10 * config.hidden_size + 3 * shape.pair + 4 * shape.intermediate for shape in shapes)
        logits = 16 + 12 * BYTES[dtype]  # of a step, and the dense model's of the texts that are looked at
        step = BYTES[dtype] * distill.tokens * states + logits * distill.following * config.vocab_size
    return weights + max(layer, step)


def blind_ends(config: Any, schedule: Schedule) -> list[int]:
    """Layers that prune by what windows alone show, theirs or those they carry scores from, and so drop all that is
    before them."""
    ends, windows = [stage.end for stage in schedule.stages if stage.prune_to is not None], layer_windows(config)
    scoring = [n for n in range(schedule.start, config.num_hidden_layers) if schedule.probe.heads_of(n)]
    sources = {end: [n for n in scoring if n <= end] for end in ends}
    if not schedule.probe.score_carry:
        sources = {end: own[-1:] for end, own in sources.items()}
    return [end for end, own in sources.items() if None not in [windows[n] for n in own]]


def skips_from(schedule: Schedule, length: int) -> int:
    """The first layer that skips tokens of a prompt of `length` tokens; before it there may be some that only score."""
    layers = range(schedule.start, schedule.stages[-1].end + 1)
    counts = {layer: schedule.counts(layer, length) for layer in layers}
    return next((n for n, c in counts.items() if min(c.active, c.ffn_tokens) < length), schedule.start)


def probe_words(schedule: Schedule) -> str:
    """How tokens are ranked, and which ones need not be, in words."""
    probe, heads = schedule.probe, schedule.probe.heads
    how = f"{heads} over heads" if isinstance(heads, str) else f"{len(heads)} heads of {len(dict(heads))} layers"
    how += f", corrected at rank {probe.rank}" if probe.rank else ""
    return (
        f"probe: last {probe.window_size} queries, {how}, carrying {probe.score_carry:g}, "
        f"pooled over {probe.kernel_size}; "
        f"first {schedule.sink_tokens} and last {schedule.always_last} tokens always active"
    )


def _sizes(schedule: Schedule) -> str:
    sizes = sorted({(size_.channels, size_.rank) for size_ in schedule.proxy})
    proxies = [f"{channels} channels and rank {rank}" if rank else "regression" for channels, rank in sizes]
    ranks = sorted({astuple(update) for update in schedule.update})
    queries = [f"queries' corrections of rank {schedule.probe.rank}"] if schedule.probe.rank else []
    updates = [f"updates of rank {a} (attention) and {f} (FFN)" for a, f in ranks]
    return ", ".join(proxies + updates + queries) or "none"


def _search(search: SearchSection) -> str:
    goals = ", ".join(f"{name} {target:g}" for name, target in search.targets())
    wanted = f", quality at least {search.quality:g}" if search.quality is not None else ""
    wanted += f", then queries corrected at rank {search.probe_rank}" if search.probe_rank else ""
    return (
        f"search    {goals}{wanted}; {search.candidates} candidates and {search.rounds} rounds of "
        f"{search.candidates // 2} more on {search.num_prompts} prompts, confirmed on {search.num_prompts} others"
    )


def describe(
    name: str,
    config: Any,
    schedule: Schedule,
    lengths: list[int],
    dtype: str,
    tokens: int,
    search: SearchSection | None,
    device: str,
    weights: int | None = None,
    distill: DistillSection | None = None,
) -> str:
    """The plan as text, without what a run needs if it has no `tokens`."""
    probes = proxy_parameters(config, schedule)
    head = [
        f"model     {name}: {config.model_type}, {config.num_hidden_layers} layers, "
        f"hidden size {config.hidden_size}, {parameters(config) / 1e9:.2f}B parameters, {dtype}",
        f"proxies   {config.num_hidden_layers - schedule.start} layers, {_sizes(schedule)}: "
        f"{probes / 1e6:.1f}M parameters ({probes / parameters(config):.1%} of the model)",
    ]
    if tokens:
        beside = " beside the weights, which stay on the disk where it is short," if device == "cpu" else ""
        memory = memory_need(config, dtype, tokens, device, distill)
        disk = disk_need(config, schedule, dtype, tokens, search, weights)
        head.append(f"needs     about {size(memory)} of memory{beside} and {size(disk)} of disk")
    if distill and distill.steps:
        text = f"{distill.length} tokens and the {distill.following} that follow"
        head.append(f"distills  the updates in {distill.steps} steps, each on {text}")
    if search is not None:
        return "\n".join([*head, _search(search)])
    if blind := blind_ends(config, schedule):
        head.append(
            f"careful   stages end at layers with a window ({', '.join(map(str, blind))}), where pruning drops all "
            "that is before it: end them at layers without one, or set probe.score_carry after such a layer"
        )
    if schedule.kv is not None and not schedule.update:
        head.append("careful   kv without update caches keys and values of tokens whose states are stale")
    return "\n".join(
        [
            *head,
            f"schedule  skips from layer {skips_from(schedule, max(lengths))}, {len(schedule.stages)} stages, "
            + probe_words(schedule)
            + (f"; prompts of fewer than {schedule.min_length} tokens run dense" if schedule.min_length else ""),
            "",
            "Active tokens of the candidates, per layer:",
            schedule_table(config, schedule, lengths),
            "",
            "By the FLOP count, not measured:",
            prediction_table(config, schedule, lengths),
        ]
    )
