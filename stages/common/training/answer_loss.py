"""The training loss on answers alone, with the LM head run on no other position."""

from __future__ import annotations

import torch
from datasets import Dataset
from peft import PeftModel
from trl import SFTTrainer

IGNORED = -100  # PyTorch's and TRL's label for positions without a loss


def collate(rows: list[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Join prompts and completions, padded on the right, with labels on completions only.

    Padding is on the right because a left-padded row gave NaN losses with SDPA in bfloat16.

    Args:
        rows: token ids under "prompt_ids" and "completion_ids".
        pad_id: a token id for padding; the attention mask hides it.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each (rows, longest row).
    """
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    shape = (len(rows), max(lengths))
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        batch["input_ids"][index, :length] = torch.tensor(row["prompt_ids"] + row["completion_ids"])
        batch["attention_mask"][index, :length] = 1
        batch["labels"][index, len(row["prompt_ids"]) : length] = torch.tensor(row["completion_ids"])
    return batch


def answer_logits(
    model: torch.nn.Module, head: torch.nn.Module, inputs: dict[str, torch.Tensor], positions: torch.Tensor
) -> torch.Tensor:
    """Next-token logits of some positions, through the model's own forward pass.

    A hook hands the LM head only those positions. Everything around it (soft-capping, scaling, autocast, wrappers)
    stays the model's, which calling backbone and head by hand would lose.

    Args:
        model: a causal language model, or what wraps it.
        head: its LM head.
        inputs: its keyword arguments, `input_ids` (rows, length) among them.
        positions: boolean, (rows, length).

    Returns:
        (number of positions, vocabulary) in float32, row by row.
    """
    hook = head.register_forward_pre_hook(lambda _module, arguments: (arguments[0][positions],))
    try:
        return model(**inputs, use_cache=False).logits.float()
    finally:
        hook.remove()


class AnswerLossTrainer(SFTTrainer):
    """TRL's trainer with a loss that scores answer positions only, on every kind of device.

    TRL does that on CUDA; on a CPU it projects every position onto the vocabulary, which takes half of the time of a
    small model. It also reads per-step statistics back from the device, which this leaves out.
    """

    @property
    def adapter(self) -> PeftModel:
        """The model that is trained, without what may wrap it."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, PeftModel)
        return model

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean negative log-likelihood of an answer token, in nats, over the whole optimizer step.

        In evaluation, batches are weighted so that the mean over all of them is the mean over all answer tokens,
        whatever the batch size.
        """
        assert not return_outputs, "only losses are asked for"
        labels = inputs["labels"]
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        positions = targets != IGNORED
        head = self.adapter.get_output_embeddings()
        arguments = {name: value for name, value in inputs.items() if name != "labels"}
        logits = answer_logits(model, head, arguments, positions)
        loss = torch.nn.functional.cross_entropy(logits, targets[positions], reduction="sum")
        if num_items_in_batch is None:
            return loss / (len(labels) * self._evaluation_tokens_per_row())
        # num_items_in_batch counts the answer tokens of all processes, and DDP averages their gradients.
        return loss / num_items_in_batch * self.accelerator.num_processes

    def _evaluation_tokens_per_row(self) -> float:
        if not hasattr(self, "_tokens_per_row"):
            assert isinstance(self.eval_dataset, Dataset)
            counts = [len(ids) for ids in self.eval_dataset["completion_ids"]]
            self._tokens_per_row = sum(counts) / len(counts)
        return self._tokens_per_row
