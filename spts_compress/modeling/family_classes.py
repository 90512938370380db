"""A family's classes, made of its stock module and the method."""

from types import ModuleType, new_class
from typing import Any

import transformers
from packaging.version import Version
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast

from .calls import SkippingForCausalLM
from .configuration_spts import Schedule
from .skipping import SkippingDecoderLayer, SkippingModel

TRANSFORMERS = ("5.17", "5.24")  # tested from the first on and below the second
if not Version(TRANSFORMERS[0]) <= Version(Version(transformers.__version__).base_version) < Version(TRANSFORMERS[1]):
    raise ImportError(
        f"this model's code is tested with transformers {TRANSFORMERS[0]} up to, not including, {TRANSFORMERS[1]}; "
        f"you have {transformers.__version__}"
    )


class SptsConfigMixin:
    """Adds the `spts` block to a stock configuration class."""

    spts: dict | None = None
    num_hidden_layers: int
    num_attention_heads: int

    def schedule(self, **changes: Any) -> Schedule:
        """The skipping schedule, with top-level keys of the block replaced by `changes` for one use.

        Raises:
            ValueError: if the block or a change is not valid.
        """
        block = {**(self.spts or {}), **changes}
        return Schedule.from_dict(block, self.num_hidden_layers, self.num_attention_heads)


def skipping_classes(
    module: str,
    name: str,
    stock: ModuleType,
    *,
    text: str = "",
    layer: type = SkippingDecoderLayer,
    model: type = SkippingModel,
    experts: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """Configuration, decoder layer, decoder and causal language model of a family, as classes of `module`.

    Args:
        name: what the stock classes' names begin with, such as "Llama".
        stock: the module that holds them; `text`: what the names of the configuration and the decoder add to `name`.
        layer, model: mixed into the decoder layer and the decoder, where the family differs.
        experts: whether the feed-forward networks are routed experts.
    """

    def made(kind: str, bases: tuple, **names: Any) -> Any:
        names["__module__"] = module
        return new_class(f"Spts{name}{kind}", bases, {}, lambda space: space.update(names))

    stock_config, stock_layer = getattr(stock, f"{name}{text}Config"), getattr(stock, f"{name}DecoderLayer")
    model_type = f"spts_{stock_config.model_type}"
    if experts:
        # Published checkpoints hold every expert's weights alone; transformers joins them, told so for each model type.
        joined = get_checkpoint_conversion_mapping(stock_config.model_type)
        register_checkpoint_conversion_mapping(model_type, joined, overwrite=True)
    config_class = made(
        "Config",
        (SptsConfigMixin, stock_config),
        model_type=model_type,
        spts=None,
        __annotations__={"spts": dict | None},
    )
    functions = {"rotate_half": getattr(stock, "rotate_half", None), "eager_attention": stock.eager_attention_forward}
    functions = {key: staticmethod(function) for key, function in functions.items() if function is not None}
    layer_class = made("DecoderLayer", (layer, stock_layer), **functions)
    shared = {
        "config_class": config_class,
        "__annotations__": {"config": config_class},
        "_no_split_modules": [stock_layer.__name__, layer_class.__name__],
    }
    output_class = MoeModelOutputWithPast if experts else BaseModelOutputWithPast
    decoder = (model, getattr(stock, f"{name}{text}Model"))
    model_class = made("Model", decoder, layer_class=layer_class, output_class=output_class, **shared)
    causal = (SkippingForCausalLM, getattr(stock, f"{name}ForCausalLM"))
    return config_class, layer_class, model_class, made("ForCausalLM", causal, model_class=model_class, **shared)
