"""llama.cpp by its Python binding cyllama, whose wheels hold it compiled: quantiser, tokenizer, next-token logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.common.adapter import Adapter
from serving.export.parity import Answers, LabelAnswers, TextAnswers, answer_ids, label_probabilities
from serving.export.rows import TestRows
from stages.common.errors import UserError
from stages.common.progress import progress
from stages.common.scoring.batches import check_finite

# llama.cpp's own numbers for the file types (`llama_ftype` in llama.h).
FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_k_m": 15}
# Answers that are scored in one batch; llama.cpp has a limit on sequences.
MOST_SEQUENCES = 64
TOKENS_AT_ONCE = 512


def binding() -> Any:
    """The module, its log turned off.

    Raises:
        UserError: it is not installed.
    """
    try:
        import cyllama.llama.llama_cpp as llama_cpp
    except ImportError:
        raise UserError(
            "cyllama, which holds llama.cpp, is not installed. `make serving` installs what serving/requirements.txt "
            "lists. There are wheels for Linux on x86-64, macOS and Windows; on others export on such a machine."
        ) from None
    llama_cpp.disable_logging()
    return llama_cpp


def quantise(source: Path, target: Path, file_type: str) -> None:
    """Make a smaller GGUF file of one of type f16, by llama.cpp's quantiser.

    Args:
        source: the f16 file.
        target: the file to write.
        file_type: a key of FILE_TYPES.

    Raises:
        UserError: llama.cpp refuses.
    """
    llama_cpp = binding()
    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype, params.nthread = FILE_TYPES[file_type], torch.get_num_threads()
    try:
        llama_cpp.model_quantize(str(source), str(target), params)
    except RuntimeError as error:
        raise UserError(f"{source}: llama.cpp cannot quantise it to {file_type} ({error}).") from None


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of each type a GGUF file holds: the quantiser falls back where rows do not fill its blocks."""
    from gguf import GGUFReader

    counts: dict[str, int] = {}
    for tensor in GGUFReader(path).tensors:
        counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
    return dict(sorted(counts.items()))


class LlamaModel:
    """A GGUF file loaded by llama.cpp, on the CPU."""

    def __init__(self, path: Path) -> None:
        llama_cpp = binding()
        # cyllama 0.2.18 asks a model for `n_vocab` when logits are read, which its vocabulary alone has.
        size = property(lambda model: model.get_vocab().n_vocab)
        with_size: Any = type("LlamaModel", (llama_cpp.LlamaModel,), {"n_vocab": size})
        params = llama_cpp.LlamaModelParams()
        params.n_gpu_layers = 0
        try:
            self._model = with_size(path_model=str(path), params=params, verbose=False)
        except ValueError as error:
            raise UserError(f"{path}: llama.cpp cannot load it ({str(error)[:300]}).") from None
        self._vocab = self._model.get_vocab()
        self._llama_cpp = llama_cpp
        self._room = self._sequences = 0

    @property
    def adds_bos(self) -> bool:
        """Whether it puts the begin token before every text."""
        return bool(self._vocab.get_add_bos())

    def token_ids(self, prompt: str) -> list[int]:
        """The tokens that it makes of a prompt in which control tokens are spelled out, as Ollama lets it."""
        bos = self._vocab.get_text(self._vocab.token_bos()) if self.adds_bos else ""
        return list(self._vocab.tokenize(prompt.removeprefix(bos), True, True))

    def answers(self, adapter: Adapter, rows: TestRows) -> Answers:
        """What the model says of the rows, from the very tokens that the adapter was asked.

        Raises:
            UserError: its scores are no numbers.
        """
        with progress(len(rows.prompt_ids), "asking llama.cpp") as bar:
            if adapter.answers_with_texts:
                pairs = zip(rows.prompt_ids, rows.references, strict=True)
                found = []
                for prompt, reference in pairs:
                    found.append(self._along(prompt, reference))
                    bar.update()
                likeliest, own = np.concatenate(found, axis=1)
                check_finite(own)
                return TextAnswers(likeliest.astype(np.int64), own)
            scores, labels = [], answer_ids(adapter)
            for prompt in rows.prompt_ids:
                scores.append(self._score(prompt, labels))
                bar.update()
        check_finite(np.array(scores))
        return LabelAnswers(label_probabilities(adapter, np.array(scores)))

    def _along(self, prompt: list[int], reference: list[int]) -> np.ndarray:
        """At each token of a reference the likeliest token and ln p of its own, float64 of shape (2, tokens)."""
        tokens = [*prompt, *reference[:-1]]
        first = len(prompt) - 1
        steps = self._log_probabilities([(token, place, [0], place >= first) for place, token in enumerate(tokens)], 1)
        found = [(step.argmax(), step[token]) for step, token in zip(steps, reference, strict=True)]
        return np.array(found, np.float64).T

    def _score(self, prompt: list[int], answers: list[list[int]]) -> list[float]:
        """The log-likelihood of each answer after the prompt, its terminator included."""
        scores: list[float] = []
        for start in range(0, len(answers), MOST_SEQUENCES):
            some = answers[start : start + MOST_SEQUENCES]
            every = list(range(len(some)))
            batch = [(token, place, every, place == len(prompt) - 1) for place, token in enumerate(prompt)]
            for sequence, ids in enumerate(some):
                batch += [(token, len(prompt) + place, [sequence], True) for place, token in enumerate(ids[:-1])]
            steps = self._log_probabilities(batch, len(some))
            first = next(steps)
            for ids in some:
                scores.append(float(first[ids[0]] + sum(next(steps)[token] for token in ids[1:])))
        return scores

    def _log_probabilities(
        self, tokens: list[tuple[int, int, list[int], bool]], sequences: int
    ) -> Iterator[np.ndarray]:
        """The log-likelihood of every next token, float64 (vocabulary,), behind those tokens that ask for it in turn.

        Args:
            tokens: each with its place in the sequences that it belongs to, those sequences, and whether it asks.
            sequences: how many there are.
        """
        context, batch = self._context(len(tokens), sequences)
        context.kv_cache_clear()
        batch.reset()
        for token in tokens:
            batch.add(*token)
        context.decode(batch)
        for index, (_, _, _, asks) in enumerate(tokens):
            if asks:
                logits = np.array(context.get_logits_ith(index))
                yield logits - np.logaddexp.reduce(logits)

    def _context(self, tokens: int, sequences: int) -> tuple[Any, Any]:
        """A context and a batch with room for so many; the ones of the last call where they have it."""
        if tokens > self._room or sequences > self._sequences:
            params = self._llama_cpp.LlamaContextParams()
            self._room = max(self._room, -(-tokens // TOKENS_AT_ONCE) * TOKENS_AT_ONCE)
            self._sequences = max(sequences, self._sequences)
            params.n_ctx = params.n_batch = self._room
            params.n_ubatch = TOKENS_AT_ONCE
            params.n_seq_max = self._sequences
            # So that a prompt's tokens can belong to all answers' sequences.
            params.kv_unified = True
            params.n_threads = params.n_threads_batch = torch.get_num_threads()
            self._made = (
                self._llama_cpp.LlamaContext(model=self._model, params=params, verbose=False),
                self._llama_cpp.LlamaBatch(n_tokens=self._room, embd=0, n_seq_max=self._sequences, verbose=False),
            )
        return self._made
