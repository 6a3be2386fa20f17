"""A tiny base model that llama.cpp knows the tokenizer of: SentencePiece's kind, a token for each character."""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, processors

from tests.tiny import CHAT_TEMPLATE

CONTROL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def make_character_tokenizer() -> Tokenizer:
    """A tokenizer as Llama 2 has it, bytes for what is no ASCII.

    llama.cpp's converter knows byte-level tokenizers by a hash over their whole vocabulary, which no vocabulary made on
    the spot has. It takes all of SentencePiece's kind, but without the order of their merges; there are none here.
    """
    characters = ["\u2581", *string.ascii_letters, *string.digits, *string.punctuation]
    tokens = [*CONTROL_TOKENS[:3], *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *CONTROL_TOKENS[3:]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    return tokenizer


def save_spoken_base(folder: Path) -> None:
    """A Llama of random weights, large enough that its answers depend on every token before them.

    Most of its rows have 256 numbers, as llama.cpp's smaller types want them; those of `down_proj` have 96.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_character_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        # The converter takes for control tokens what is named here.
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(2)
    model.save_pretrained(folder)
