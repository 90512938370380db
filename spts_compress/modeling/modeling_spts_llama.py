"""Llama with Self-Predictive Token Skipping (SPTS, arXiv 2601.13155); the method is in skipping.py."""

from transformers.models.llama import modeling_llama

from .family_classes import skipping_classes

SptsLlamaConfig, SptsLlamaDecoderLayer, SptsLlamaModel, SptsLlamaForCausalLM = skipping_classes(
    __name__, "Llama", modeling_llama
)
